"""Tokens out of steps: requests that join and leave, their sampling, and lossless mode."""

from river_llm.generate.events import NewToken, Origin, Outcome, StepEvent
from river_llm.generate.generator import Generator, check_prompt, check_request
from river_llm.generate.lossless import check_drafts
from river_llm.generate.recorder import Recorder
from river_llm.generate.request import FinishReason, Request
from river_llm.generate.responses import GenerationResponse, GenerationResult, LosslessStatistics

__all__ = [
    "FinishReason",
    "GenerationResponse",
    "GenerationResult",
    "Generator",
    "LosslessStatistics",
    "NewToken",
    "Origin",
    "Outcome",
    "Recorder",
    "Request",
    "StepEvent",
    "check_drafts",
    "check_prompt",
    "check_request",
]
