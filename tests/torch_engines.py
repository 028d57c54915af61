"""Torch engines of tiny models, and texts for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, VOCABULARY, tiny_model

from river_llm import RiverConfig, attach_river
from river_llm.engines import TorchEngine

CONFIG = RiverConfig(group_size=32, quantizer="rtn")
CLOSE = {16: {"rtol": 1e-3, "atol": 1e-4}, 8: {"rtol": 0.1, "atol": 0.05}}

both_widths = pytest.mark.parametrize("kv_bits", [16, 8])


def engine_of(architecture: str = "Llama", kv_bits: int = 16, **settings: Any) -> TorchEngine:
    """With four layers and a river."""
    model = tiny_model(architecture, **{**ARCHITECTURES.get(architecture, {}), **settings})
    return TorchEngine(attach_river(model, CONFIG), kv_bits)


def tokens_of(count: int, seed: int = 0) -> list[int]:
    """Random ones."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()
    return tokens
