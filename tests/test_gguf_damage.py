"""A damaged GGUF file gives a model or one line, whatever bits of it are changed: no crash, no
hang, no other exception."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch
from byte_models import byte_model, save_gguf

from river_llm.errors import RiverError
from river_llm.load.model import load_backbone
from river_llm.store import ENVIRONMENT_VARIABLE

_LONGEST = 20.0  # seconds that one file may take on a busy machine


def _damage(content: bytes, header: int, seed: int) -> bytes:
    """Cut short, or with a few bits, bytes or whole stretches changed, mostly before the
    tensors."""
    chance = random.Random(seed)
    if chance.random() < 0.2:
        return content[: chance.randrange(len(content))]
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        place = chance.randrange(header if chance.random() < 0.95 else len(content))
        kind = chance.random()
        if kind < 0.5:
            changed[place] ^= 1 << chance.randrange(8)
        elif kind < 0.8:
            changed[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        else:
            length = chance.choice((4, 8, 24))
            changed[place : place + length] = chance.randbytes(length)
    return bytes(changed)


def _check_damaged(folder: Path, seeds: range) -> None:
    model = byte_model(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    file = save_gguf(folder / "model.gguf", model, pre="llama-bpe")
    content = file.read_bytes()
    header = len(content) - sum(weight.numel() * 4 for weight in model.parameters())
    loaded, refused = 0, []
    for seed in seeds:
        file.write_bytes(_damage(content, header, seed))
        start = time.monotonic()
        try:
            load_backbone(file, torch.float32)
            loaded += 1
        except RiverError as error:
            refused.append(str(error))
        except Exception as error:
            raise AssertionError(f"damage {seed}") from error
        assert time.monotonic() - start < _LONGEST, seed
    assert loaded > 0
    assert refused
    assert not any("\n" in message for message in refused)


def test_a_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
    _check_damaged(tmp_path, range(200))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_hundred_thousand(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
    _check_damaged(tmp_path, range(10_000 * (part + 1), 10_000 * (part + 2)))
