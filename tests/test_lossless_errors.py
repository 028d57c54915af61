"""What lossless mode refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from lossless_lm import (
    CONTEXT,
    PROMPTS,
    any_drafts,
    backbone,
    check_answer,
    lossless,
    reply,
    subject_with,
)
from tiny_lm import character_tokenizer

from river_llm import (
    ConfigError,
    Conversation,
    DraftConfig,
    RiverLM,
)
from river_llm.sampling import SamplingConfig


class TestBadInput:
    @pytest.mark.parametrize("mode", ["x", "", "Lossless", None])
    def test_an_unknown_mode(self, lm: RiverLM, mode: Any) -> None:
        wanted = f"^mode is {mode!r}; choose one of river, lossless$"
        for answer in _verbs(lm, mode=mode):
            with pytest.raises(ConfigError, match=wanted):
                answer()

    def test_drafts_in_river_mode(self, lm: RiverLM) -> None:
        for answer in _verbs(lm, drafts=DraftConfig()):
            with pytest.raises(ConfigError, match=r'^drafts are for mode="lossless"$'):
                answer()

    def test_an_exit_layer_that_the_model_has_not(self, lm: RiverLM) -> None:
        wanted = (
            r"^the draft's exit layer is 5, but the model has 4 layers; choose one in \[0, 4\]$"
        )
        for answer in _verbs(lm, mode="lossless", drafts=DraftConfig(exit_layer=5)):
            with pytest.raises(ConfigError, match=wanted):
                answer()

    def test_more_tokens_than_the_model_has(self, lm: RiverLM) -> None:
        wanted = "^drafts of the first 98 tokens, but the model has 97$"
        for answer in _verbs(lm, mode="lossless", drafts=DraftConfig(vocabulary=98)):
            with pytest.raises(ConfigError, match=wanted):
                answer()

    @pytest.mark.parametrize("make_lm", ["torch"], indirect=True)
    @pytest.mark.parametrize("bits", [8, 4])
    def test_a_narrow_head_on_the_torch_engine(self, lm: RiverLM, bits: int) -> None:
        wanted = f"^the torch engine has no LM head of {bits} bits for drafts; choose 16$"
        for answer in _verbs(lm, mode="lossless", drafts=DraftConfig(lm_head_bits=bits)):
            with pytest.raises(ConfigError, match=wanted):
                answer()

    def test_a_head_wider_than_the_engines(self) -> None:
        subject = subject_with(CONTEXT)
        engine = subject.engine(lm_head_bits=8)
        lm = RiverLM(engine, character_tokenizer(), subject.river.config)
        with pytest.raises(
            ConfigError, match=r"the cpu engine has no LM head of 16 bits.*choose 8$"
        ):
            lm.generate("x", mode="lossless", drafts=DraftConfig(lm_head_bits=16))

    @pytest.mark.parametrize(
        ("settings", "wanted"),
        [
            ({"tokens": 0}, "a draft of 0 tokens; it must have 1 to 64"),
            ({"tokens": -1}, "a draft of -1 tokens; it must have 1 to 64"),
            ({"tokens": 65}, "a draft of 65 tokens; it must have 1 to 64"),
            ({"exit_layer": -1}, "the draft's exit layer is -1; it must be 0 or more"),
            ({"lm_head_bits": 5}, "the drafts' LM head has 5 bits; choose 16, 8 or 4"),
            ({"lm_head_bits": 0}, "the drafts' LM head has 0 bits; choose 16, 8 or 4"),
            ({"vocabulary": 0}, "drafts of 0 tokens' vocabulary; give 2 or more"),
            ({"vocabulary": 1}, "drafts of 1 tokens' vocabulary; give 2 or more"),
            ({"tokens": "3"}, "tokens of drafts is '3'; it must be a whole number"),
            ({"exit_layer": 1.5}, "exit_layer of drafts is 1.5; it must be a whole number"),
            ({"vocabulary": True}, "vocabulary of drafts is True; it must be a whole number"),
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, Any], wanted: str) -> None:
        with pytest.raises(ConfigError) as raised:
            DraftConfig(**settings)
        assert str(raised.value) == wanted

    def test_leaves_the_model_usable(self, lm: RiverLM) -> None:
        conversation = Conversation(lm, max_new_tokens=5)
        reply(conversation, "Hi")
        cached = lm._cached
        with pytest.raises(ConfigError):
            lm.generate("x", mode="lossless", drafts=DraftConfig(exit_layer=9))
        with pytest.raises(ConfigError):
            lm.generate_batch(["x"], drafts=DraftConfig())
        assert lm._cached is cached is not None
        check_answer(lossless(lm, PROMPTS[0], None), backbone(lm, PROMPTS[0]))

    @any_drafts
    def test_the_longest_draft_fits_any_context(self, lm: RiverLM, drafts: DraftConfig) -> None:
        drafts = DraftConfig(64, drafts.exit_layer, ngram=drafts.ngram)
        for prompt in PROMPTS[:2]:
            check_answer(lossless(lm, prompt, drafts), backbone(lm, prompt))


def _verbs(lm: RiverLM, **settings: Any) -> list[Callable[[], object]]:
    """All that take a mode and drafts."""
    return [
        partial(lm.generate, "x", **settings),
        partial(lm.stream, "x", **settings),
        partial(lm.chat, "x", **settings),
        partial(lm.generate_batch, ["x", "yz"], **settings),
        partial(lm.stream_tokens, [5], SamplingConfig(), **settings),
        lambda: next(Conversation(lm, **settings).stream("x")),
    ]
