"""Saved tiny models that start from packed copies, and what such a start is held against."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from native_engines import random_tokens
from steps import append, begin
from tiny_lm import character_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from river_llm import ExitPolicy, River, RiverConfig, RiverLM
from river_llm.engines import CpuEngine, DraftRule
from river_llm.engines.native_model import NativeModel
from river_llm.load.model import load_backbone
from river_llm.store import ENVIRONMENT_VARIABLE

PROMPT = "A river's name?"
MESSAGES = [{"role": "user", "content": PROMPT}]
MIXED = ExitPolicy.similarity(0.75)  # tokens of the tiny models leave after all numbers of layers
LENGTH = 16  # of an answer
WIDTHS = list(itertools.product((16, 8), (16, 8)))  # of backbone and LM head
ROUNDED = RiverConfig(bits=3, group_size=32, quantizer="rtn")


def save_model(
    directory: Path,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **settings: Any,
) -> Path:
    """Write a random Llama of 4 layers, by default one that speaks in characters."""
    tokenizer = tokenizer or character_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.1,
            "eos_token_id": None,
            "pad_token_id": 0,
            **settings,
        }
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_river(
    model: Path, directory: Path, config: RiverConfig, bits: list[dict[str, int]] | None = None
) -> Path:
    """Build a river of a saved model, and write it."""
    River.build(load_backbone(model)[0], config, bits=bits).save(directory)
    return directory


def start(model: str | Path, river: Any = None, **settings: Any) -> RiverLM:
    """As a program does, on one thread."""
    settings = {"policy": MIXED, "device": "cpu", "threads": 1, **settings}
    return RiverLM.from_pretrained(model, river, **settings)


def start_without_cache(model: str | Path, river: Any = None, **settings: Any) -> RiverLM:
    """The same from the model's own files."""
    with mock.patch.dict(os.environ, {ENVIRONMENT_VARIABLE: "off"}):
        return start(model, river, **settings)


def starts_from_a_copy(loads: list[object], *arguments: Any, **options: Any) -> bool:
    """Start, see that it is a start from the files as they are now, and say how it went.

    `loads` is the fixture of that name.
    """
    before = len(loads)
    lm = start(*arguments, **options)
    loaded = len(loads) - before
    check_same_lm(lm, start_without_cache(*arguments, **options))
    return loaded == 0


def check_same_lm(lm: RiverLM, expected: RiverLM) -> None:
    """See that both are one and answer alike."""
    assert type(lm.engine) is type(expected.engine)
    assert lm.engine.setting == expected.engine.setting
    assert lm.engine.context_length == expected.engine.context_length
    assert lm.policy == expected.policy
    assert lm.river_config == expected.river_config
    assert lm.stop_tokens == expected.stop_tokens
    assert lm.fallback_reason == expected.fallback_reason
    check_same_tokenizer(lm.tokenizer, expected.tokenizer)
    if isinstance(lm.engine, CpuEngine):
        check_same_weights(lm.engine, expected.engine)
    for policy in (expected.policy, None):
        for prompt in (PROMPT, MESSAGES) if expected.tokenizer.chat_template else (PROMPT,):
            ours, theirs = (
                one.generate(prompt, policy=policy, max_new_tokens=LENGTH) for one in (lm, expected)
            )
            assert ours.tokens == theirs.tokens
            assert ours.text == theirs.text
            assert ours.finish_reason == theirs.finish_reason
            assert ours.exit_layers == theirs.exit_layers


def check_same_tokenizer(
    tokenizer: PreTrainedTokenizerBase, expected: PreTrainedTokenizerBase
) -> None:
    """See that both turn texts into the same tokens and back."""
    assert type(tokenizer) is type(expected)
    assert tokenizer.backend_tokenizer.to_str() == expected.backend_tokenizer.to_str()
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.special_tokens_map == expected.special_tokens_map
    assert tokenizer.padding_side == expected.padding_side
    assert tokenizer.model_max_length == expected.model_max_length
    assert tokenizer.name_or_path == expected.name_or_path
    for text in (PROMPT, " two  blanks\n\n\tand a tab", "a<end>b", "<|im_start|>user"):
        token_ids = tokenizer(text).input_ids
        assert token_ids == expected(text).input_ids
        for skip in (False, True):
            options = {"skip_special_tokens": skip}
            decoded = tokenizer.decode(token_ids, **options)
            assert decoded == expected.decode(token_ids, **options)
    if expected.chat_template:
        options = {"add_generation_prompt": True, "return_dict": False}
        rendered = tokenizer.apply_chat_template(MESSAGES, **options)
        assert rendered == expected.apply_chat_template(MESSAGES, **options)


def check_same_weights(engine: CpuEngine, expected: CpuEngine) -> None:
    """See that both hold the same, bit for bit."""
    for part, expected_part in zip(engine.packed_weights, expected.packed_weights, strict=True):
        assert np.array_equal(part, expected_part)
    if expected.embedding is None:
        assert engine.embedding is None
    else:
        assert engine.embedding.dtype == expected.embedding.dtype
        assert np.array_equal(engine.embedding, expected.embedding)
    check_same_model(engine.model, expected.model)
    assert engine.formats == expected.formats


def check_same_model(model: NativeModel, expected: NativeModel) -> None:
    """See that both describe the same one, bit for bit."""
    for name in ("shape", "rope_boundary", "query_scaling", "context_length"):
        assert getattr(model, name) == getattr(expected, name)
    assert np.array_equal(model.final_norm, expected.final_norm)
    for parts, expected_parts in zip(model.layers, expected.layers, strict=True):
        assert parts.keys() == expected_parts.keys()
        for name, part in expected_parts.items():
            assert type(parts[name]) is type(part)
            assert np.array_equal(parts[name], part)
    for table, expected_table in zip(model.rotary, expected.rotary, strict=True):
        assert table.scaling == expected_table.scaling
        assert torch.equal(table.frequencies, expected_table.frequencies)
        assert (table.long_frequencies is None) == (expected_table.long_frequencies is None)
        if expected_table.long_frequencies is not None:
            assert torch.equal(table.long_frequencies, expected_table.long_frequencies)


def steps_of(engine: CpuEngine, prompt_length: int = 12) -> list[Tensor]:
    """Logits, exits, similarities and tokens of two texts of unlike lengths that are run together,
    and drafts of them."""
    lengths = [prompt_length, prompt_length - 4]
    tokens = [random_tokens(length + 8, seed=3) for length in lengths]
    texts = dict(zip(begin(engine, lengths), tokens, strict=True))
    steps = []

    def run_but(left: int) -> None:
        rows = {one: text[engine.length(one) : len(text) - left] for one, text in texts.items()}
        step = append(engine, rows, MIXED, record_similarities=True)
        similarities = step.similarities.nan_to_num(7.0)
        steps.extend([step.logits, step.exit_layers, step.best_tokens, similarities])

    for left in (8, 7, 6, 5, 4):
        run_but(left)
    for bits in engine.draft_head_bits:
        engine.prepare_drafts(bits)
        for draft in engine.draft(
            list(texts), [text[-4] for text in tokens], [3, 3], DraftRule(1, bits)
        ):
            steps.append(torch.tensor(draft.tokens))
            steps.append(torch.tensor(draft.margins))
    run_but(0)
    for sequence in texts:
        engine.truncate(sequence, engine.length(sequence) - 2)
    run_but(0)
    return steps


def check_same_steps(engine: CpuEngine, expected: CpuEngine, prompt_length: int = 12) -> None:
    """See that both compute the same, bit for bit."""
    steps, expected_steps = steps_of(engine, prompt_length), steps_of(expected, prompt_length)
    for step, expected_step in zip(steps, expected_steps, strict=True):
        assert torch.equal(step, expected_step)
