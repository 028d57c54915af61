"""What decides over a measurement: the model that runs and the tokens that it runs on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from river_llm.evaluation.run import describe_model
from river_llm.river_lm import RiverLM


def model_identity(lm: RiverLM, name: str) -> dict[str, Any]:
    """What runs, whatever the policy, see `describe_model`."""
    described = describe_model(lm, name)
    return {key: value for key, value in described.items() if key != "policy"}


def tokens_digest(token_ids: Sequence[int]) -> str:
    """A name for a sequence of tokens."""
    return f"sha256:{hashlib.sha256(json.dumps(list(token_ids)).encode()).hexdigest()}"
