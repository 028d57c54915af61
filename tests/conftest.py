"""Models that the tests share. Each is loaded once per worker; a test leaves it as it found it."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's library reads it: tests fetch nothing
os.environ["RIVER_LLM_PROGRESS"] = "off"  # what stderr has doesn't depend on the machine's speed

import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from lossless_lm import RowSpy, lm_on
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from river_llm import RiverLM
from river_llm.load.model import load_backbone

# The workers, and the next run, read one copy of the default model in place of parsing its file.
_CACHE = Path(__file__).resolve().parent.parent / ".cache" / "river-llm"
os.environ.setdefault("RIVER_LLM_CACHE", str(_CACHE))
settings.register_profile("river", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("river")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests send it
torch.set_num_threads(1)  # two spinning threads beside another process take a hundred times longer


@pytest.fixture(scope="session")
def _smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_backbone("smollm2", torch.float32)


@pytest.fixture(scope="session")
def smollm2(
    _smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> Iterator[PreTrainedModel]:
    """The real SmolLM2-135M-Instruct in float32, without a river."""
    model = _smollm2[0]
    yield model
    assert not hasattr(model, "_river_attachment"), "a test left its river attached"


@pytest.fixture(scope="session")
def smollm2_bf16() -> PreTrainedModel:
    """The real SmolLM2-135M-Instruct in bfloat16, without a river."""
    # loaded, not converted: `.to` would round the rotary frequencies too
    return load_backbone("smollm2", torch.bfloat16)[0]


@pytest.fixture(scope="session")
def tokenizer(
    _smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> PreTrainedTokenizerBase:
    """SmolLM2's tokeniser."""
    return _smollm2[1]


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """A fresh random Llama of 4 layers, float32, whose layers change the hidden state a little."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=["torch", "cpu"])
def make_lm(request: pytest.FixtureRequest) -> Callable[..., RiverLM]:
    """Makes a model on one of the engines, see `lm_on`."""
    return partial(lm_on, request.param)


@pytest.fixture
def lm(make_lm: Callable[..., RiverLM]) -> RiverLM:
    """The tiny model on either engine; some test modules have another one of that name."""
    return make_lm()


@pytest.fixture
def rows(lm: RiverLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step of the test's `lm` had since."""
    return RowSpy(lm.engine, monkeypatch).rows
