"""The tiny models that tests of the command line run on, written to directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase


def save_tiny_llama(
    directory: Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0, **settings: Any
) -> str:
    """Write a random Llama of 4 layers, and a real tokeniser with a chat template beside it."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
        pad_token_id=0,
        **{"max_position_embeddings": 100_000, **settings},
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> str:
    """The directory of a tiny model whose context is long enough for Ctrl-C to come in time."""
    return save_tiny_llama(tmp_path_factory.mktemp("cli") / "tiny", tokenizer)


@pytest.fixture(scope="session")
def other_model(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The same with other weights and a context of 96 tokens."""
    directory = tmp_path_factory.mktemp("cli") / "other"
    return save_tiny_llama(directory, tokenizer, seed=1, max_position_embeddings=96)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Three prompts, one a line."""
    path = tmp_path / "prompts.txt"
    path.write_text("Name three rivers.\n\n  \nWho are you?\nIl était une fois\n", encoding="utf-8")
    return path
