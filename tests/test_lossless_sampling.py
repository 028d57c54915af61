"""Sampled tokens of lossless mode follow the backbone's own distribution, which is computed from
its logits for every text that may come."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from lossless_lm import Clock
from native_engines import Subject
from test_sampling import distribution, p_value
from tiny_lm import character_tokenizer
from torch import Tensor

from river_llm import DraftConfig, ExitPolicy, GenerationResult, RiverLM

VOCABULARY = 10
PROMPT = "#$%&"
ANSWERS, ROWS = 4000, 50  # in batches of so many rows
TOKENS = 3
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 4},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "min_p": 0.2},
    {"temperature": 1.0, "repetition_penalty": 1.6},
    {"temperature": 1.8, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 0.7},
]
FIXED = DraftConfig(tokens=2, exit_layer=0, ngram=False)


@pytest.mark.parametrize("drafts", [FIXED, DraftConfig()], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_follow_the_backbones_distribution(
    settings: dict[str, Any], drafts: DraftConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(_lm().engine, monkeypatch, drafted_token=0.05)  # drafts pay, which decides how many
    rows = [
        row for seed in range(0, ANSWERS, ROWS) for row in _answers(drafts, seed=seed, **settings)
    ]
    counts = torch.zeros((VOCABULARY,) * TOKENS, dtype=torch.double)
    for row in rows:
        counts[tuple(row.tokens[:TOKENS])] += 1
    expected = ANSWERS * _distribution(ExitPolicy.never(), **settings)
    for kept in [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (0, 1, 2)]:
        others = [place for place in range(TOKENS) if place not in kept]
        marginal = (counts.sum(others), expected.sum(others)) if others else (counts, expected)
        # the least of a hundred or so
        assert p_value(*_pooled(*marginal)) > 1e-4, f"tokens {kept}"
    # so that this could fail: the river's own distribution is another, and drafts were made
    of_river = ANSWERS * _distribution(ExitPolicy.fixed(0), **settings)
    assert p_value(*_pooled(counts, of_river)) < 1e-9
    found = [row.lossless for row in rows if row.lossless is not None]
    drafted = sum(statistics.drafted_tokens for statistics in found)
    accepted = sum(statistics.accepted_tokens for statistics in found)
    assert 0.02 * ANSWERS < accepted < 0.98 * drafted


@cache
def _subject() -> Subject:
    """Ten tokens, none of which is certain or out of the question."""
    subject = Subject("Llama", {"vocab_size": VOCABULARY, "num_hidden_layers": 2})
    subject.model.lm_head.weight.data.mul_(2)
    return subject


@cache
def _lm() -> RiverLM:
    subject = _subject()
    return RiverLM(subject.engine(), character_tokenizer(), subject.river.config)


def _answers(drafts: DraftConfig, **settings: Any) -> list[GenerationResult]:
    """A batch of answers, with a seed of its own each."""
    most = TOKENS + 1  # the last token of an answer is never drafted
    return _lm().generate_batch(
        [PROMPT] * ROWS, raw=True, mode="lossless", drafts=drafts, max_new_tokens=most, **settings
    )


def _distribution(policy: ExitPolicy, **settings: Any) -> Tensor:
    """How likely each is, double `[V, V, V]`."""
    engine = _subject().engine(policy)
    prompt = character_tokenizer()(PROMPT).input_ids
    pairs = torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))
    step = engine.prefill(torch.tensor([prompt] * len(pairs)))
    steps = [step.logits, *(engine.decode(tokens).logits for tokens in pairs.T)]
    logits = [step.double() for step in steps]
    joint = torch.zeros((VOCABULARY,) * TOKENS, dtype=torch.double)
    for row, (first, second) in enumerate(pairs.tolist()):
        seen = [*prompt, first, second]
        after = [
            distribution(logits[n][row], seen[: len(prompt) + n], **settings) for n in range(3)
        ]
        joint[first, second] = after[0][first] * after[1][second] * after[2]
    return joint


def _pooled(counts: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one row, the rarest as one class, so that no class is too small for the test."""
    order = expected.flatten().argsort()
    counts, expected = counts.flatten()[order], expected.flatten()[order]
    impossible = int((expected == 0).sum())
    small = impossible + int((expected[impossible:].cumsum(0) < 10).sum()) + 1
    small = max(small, int((expected < 5).sum()))
    sizes = [impossible, small - impossible, *[1] * (len(expected) - small)]
    return (
        torch.stack([part.sum() for part in counts.split(sizes)]),
        torch.stack([part.sum() for part in expected.split(sizes)]),
    )
