"""Lossless mode: the river drafts, the backbone verifies, the tokens are the backbone's."""

from river_llm.lossless.rounds import LosslessDecoder, Origin, VerifiedToken, check_drafts
from river_llm.lossless.statistics import LosslessStatistics

__all__ = ["LosslessDecoder", "LosslessStatistics", "Origin", "VerifiedToken", "check_drafts"]
