"""What tests of prompt caches share: tiny models on either engine, and how a file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lossless_lm import MIXED, lm_on, subject_with
from native_engines import Subject
from tiny_lm import character_tokenizer, sharpened

from river_llm import ExitPolicy, GenerationResult, PromptCacheError, RiverConfig, RiverLM

CONTEXT = 512
DOCUMENT = "The river runs to the sea, past mills and towns. "
QUESTIONS = ["Where to?", "Past what does it run, and why?"]
RANDOM = {"temperature": 5.0, "seed": 3}  # so that answers depend on the prompt's beginning


def other_subject(**changes: Any) -> Subject:
    """The subject of these tests with another river, or another config."""
    config = changes.pop("river", RiverConfig(group_size=32))
    subject = Subject("Llama", {"max_position_embeddings": CONTEXT, **changes}, config)
    sharpened(subject.model)
    return subject


def lm_with(
    kind: str, policy: ExitPolicy | None = MIXED, subject: Subject | None = None, kv_bits: int = 16
) -> RiverLM:
    """A model with an empty cache, as another run would load it."""
    return lm_on(kind, subject or subject_with(CONTEXT), policy, kv_bits=kv_bits)


def ask(lm: RiverLM, prompt: str, *, reuse: bool = False, **settings: Any) -> GenerationResult:
    return lm.generate(prompt, raw=True, reuse_cache=reuse, **{"max_new_tokens": 8, **settings})


def save(lm: RiverLM, path: Path, prompt: str = DOCUMENT + QUESTIONS[0], **settings: Any) -> int:
    """Answer a prompt and keep its tokens."""
    return lm.save_prompt_cache(path, ask(lm, prompt, **settings).prompt_tokens)


def check_refused(lm: RiverLM, path: Path, *parts: str, **policy: Any) -> None:
    """The file is refused in one line, and what the model had in its cache is there still."""
    expected = ask(lm, "Hello, river")
    with pytest.raises(PromptCacheError) as raised:
        lm.load_prompt_cache(path, **policy)
    assert "\n" not in str(raised.value)
    for part in (str(path), *parts):
        assert part in str(raised.value)
    again = ask(lm, "Hello, river", reuse=True)
    assert again.cached_prompt_tokens == len("Hello, river") - 1
    assert again.tokens == expected.tokens
    assert len(lm.engine.sequences()) == 1


def token_ids_of(text: str) -> list[int]:
    tokens: list[int] = character_tokenizer()(text).input_ids
    return tokens
