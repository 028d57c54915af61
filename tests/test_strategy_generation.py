"""`RiverLM` with a strategy, and `--strategy` on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from strategy_models import WITH_EXITS, mixed_policy, thresholds_of
from strategy_reference import run_text
from test_cli import PROMPT, answer
from test_cli_chat import chat, interrupt
from tiny_lm import character_tokenizer, sharpened, tiny_lm
from tiny_models import tiny_model

from river_llm import (
    ConfigError,
    Conversation,
    DraftConfig,
    ExitPolicy,
    PromptCacheError,
    River,
    RiverConfig,
    RiverLM,
)
from river_llm.config import Strategy
from river_llm.engines import TorchEngine
from river_llm.strategies import STRATEGIES, StrategyEngine, make_strategy_engine

pytest_plugins = ["cli_models"]

every_strategy = pytest.mark.parametrize("strategy", WITH_EXITS)
LENGTH = 12


@pytest.fixture
def lm(strategy: Strategy) -> RiverLM:
    """A tiny model that speaks in characters."""
    policy = None if strategy == "none" else mixed_policy("Llama")
    engine = make_strategy_engine(sharpened(tiny_model("Llama")), strategy, policy)
    return RiverLM(engine, character_tokenizer(), None)


def greedy(
    strategy: str, prompt: list[int], of_prompt: list[tuple[float, ...] | None]
) -> tuple[list[int], list[int]]:
    """An answer and its exit layers by the reference, which runs the whole text for every token."""
    model = sharpened(tiny_model("Llama", attn_implementation="eager"))
    text, exits = list(prompt), []
    for _ in range(LENGTH):
        of_tokens = [*of_prompt, *[thresholds_of("Llama")] * (len(text) - len(prompt))]
        logits, exit_layers = run_text(model, strategy, text, of_tokens)
        exits.append(exit_layers[-1])
        text.append(int(logits[-1].argmax()))
    return text[len(prompt) :], exits


class TestRiverLM:
    @every_strategy
    def test_answers_by_the_definition(self, strategy: str, lm: RiverLM) -> None:
        prompt = lm.tokenizer("Who are you?").input_ids
        result = lm.generate("Who are you?", raw=True, max_new_tokens=LENGTH)
        tokens, exit_layers = greedy(strategy, prompt, [None] * len(prompt))
        assert (result.tokens, result.exit_layers) == (tokens, exit_layers)
        assert len(set(exit_layers)) > 2
        assert (result.strategy, result.engine, result.mode) == (strategy, "torch", "river")
        assert result.policy == mixed_policy("Llama").to_dict()

    @every_strategy
    def test_a_second_turn_goes_on_from_what_the_first_one_left(
        self, strategy: str, lm: RiverLM
    ) -> None:
        conversation = Conversation(lm, max_new_tokens=LENGTH)
        first = [response.token for response in conversation.stream("Hello")]
        second = [response.token for response in conversation.stream("And you?")]
        text = lm.tokenizer.apply_chat_template(
            [*conversation.messages[:3]], add_generation_prompt=True, tokenize=False
        )
        token_ids = lm.tokenizer(text).input_ids
        start = len("u:Hello\na:")
        assert token_ids[start : start + LENGTH] == first
        of_prompt: list[tuple[float, ...] | None] = [None] * len(token_ids)
        of_prompt[start : start + LENGTH - 1] = [thresholds_of("Llama")] * (LENGTH - 1)
        assert second == greedy(strategy, token_ids, of_prompt)[0]

    @every_strategy
    def test_a_batch_answers_like_its_prompts_alone(self, strategy: str, lm: RiverLM) -> None:
        prompts = ["Hello, river", "y", "Who are you? Hm"]
        together = lm.generate_batch(prompts, raw=True, max_new_tokens=LENGTH)
        for prompt, result in zip(prompts, together, strict=True):
            alone = lm.generate(prompt, raw=True, max_new_tokens=LENGTH)
            assert (result.tokens, result.exit_layers) == (alone.tokens, alone.exit_layers)

    @every_strategy
    def test_a_prompt_may_leave_token_by_token(self, strategy: str, lm: RiverLM) -> None:
        lm.policy = replace(lm.policy, prefill="token")
        prompt = lm.tokenizer("Who are you?").input_ids
        result = lm.generate("Who are you?", raw=True, max_new_tokens=LENGTH)
        assert (result.tokens, result.exit_layers) == greedy(
            strategy, prompt, [thresholds_of("Llama")] * len(prompt)
        )

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_keeps_no_prompt_cache(self, strategy: Strategy, lm: RiverLM, tmp_path: Path) -> None:
        tokens = lm.generate("Who are you?", raw=True, max_new_tokens=3).tokens
        with pytest.raises(PromptCacheError, match=f"strategy {strategy} keeps no prompt caches"):
            lm.save_prompt_cache(tmp_path / "prompt")
        assert list(tmp_path.iterdir()) == []
        other = tiny_lm(tiny_model("Llama", intermediate_size=128))
        other.generate("Who are you?", raw=True, max_new_tokens=1)
        other.save_prompt_cache(tmp_path / "prompt")
        with pytest.raises(PromptCacheError, match=f"strategy {strategy} keeps no prompt caches"):
            lm.load_prompt_cache(tmp_path / "prompt")
        assert lm.generate("Who are you?", raw=True, max_new_tokens=3).tokens == tokens

    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_has_no_lossless_mode(self, strategy: Strategy, lm: Any) -> None:
        with pytest.raises(ConfigError, match=f"not with the strategy {strategy}"):
            lm.generate("y", raw=True, mode="lossless")


class TestFromPretrained:
    @pytest.mark.parametrize("strategy", STRATEGIES)
    def test_takes_the_torch_engine_and_builds_no_river(
        self, strategy: Strategy, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(River, "build", lambda *args: pytest.fail("built for nothing"))
        lm = RiverLM.from_pretrained(model, strategy=strategy, device="cpu")
        assert isinstance(lm.engine, StrategyEngine)
        assert lm.engine.strategy == strategy
        assert lm.river_config is None
        assert lm.fallback_reason == f"the strategy {strategy} is for it alone"
        default = ExitPolicy.never() if strategy == "none" else ExitPolicy.similarity(0.9)
        assert lm.policy == default
        assert lm.engine.model.dtype == torch.bfloat16
        lm = RiverLM.from_pretrained(model, strategy=strategy, device="cpu", engine="torch")
        assert lm.fallback_reason is None
        assert len(lm.generate(PROMPT, max_new_tokens=4).tokens) == 4

    def test_quantised_is_the_river_alone(self, model: str) -> None:
        config = RiverConfig(3, 32, "rtn")
        lm = RiverLM.from_pretrained(model, config, strategy="quantised", device="cpu")
        assert isinstance(lm.engine, TorchEngine)
        assert (lm.engine.strategy, lm.river_config) == ("quantised", config)
        result = lm.generate(PROMPT, max_new_tokens=5)
        assert (result.strategy, result.exit_layers) == ("quantised", [0] * 5)
        river = RiverLM.from_pretrained(
            model, config, ExitPolicy.always(), device="cpu", engine="torch"
        )
        assert river.generate(PROMPT, max_new_tokens=5).tokens == result.tokens
        with pytest.raises(ConfigError, match="no exit policy but always"):
            lm.policy = ExitPolicy.fixed(1)
        with pytest.raises(ConfigError, match="not with the strategy quantised"):
            lm.generate(PROMPT, mode="lossless", drafts=DraftConfig())

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"strategy": "hope"}, "strategy is 'hope'; choose one of river, mask, recompute"),
            ({"strategy": "mask", "engine": "cpu"}, "mask is for the torch engine; take --engine"),
            ({"strategy": "quantised", "engine": "cpu"}, "quantised is for the torch engine"),
            ({"strategy": "mask", "engine": "gpu"}, "engine is 'gpu'"),
            ({"strategy": "mask", "lm_head_bits": 8}, "8-bit weights .* mask is for the torch"),
            ({"strategy": "none", "backbone_bits": 8}, "8-bit weights .* none is for the torch"),
            ({"strategy": "mask", "river": RiverConfig()}, "mask has no river; leave the river"),
            ({"strategy": "mask", "kv_bits": 8}, "mask keeps its KV cache in the model's dtype"),
            ({"strategy": "mask", "kv_bits": 4}, "the KV cache has 4 bits"),
            ({"strategy": "mask", "offload": "2"}, "mask has no river to leave for, so all of the"),
            ({"strategy": "none", "no_miss": True}, "offloading goes with the strategy river"),
            ({"strategy": "none", "policy": ExitPolicy.fixed(1)}, "no exit policy but never"),
            ({"strategy": "quantised", "policy": ExitPolicy.never()}, "policy but always"),
            ({"strategy": "mask", "policy": ExitPolicy.always()}, "prefill rule river is not for"),
        ],
    )
    def test_refuses_before_anything_is_loaded(
        self, settings: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            RiverLM.from_pretrained(tmp_path / "nothing", **settings)

    @pytest.mark.parametrize("off", ["off", " OFF"])
    def test_takes_offloading_that_is_off(self, off: str, model: str) -> None:
        lm = RiverLM.from_pretrained(model, strategy="none", offload=off, device="cpu")
        assert (lm.engine.strategy, lm.residency) == ("none", None)


class TestCommandLine:
    @pytest.mark.parametrize("strategy", ["mask", "recompute", "propagate", "monotonic"])
    def test_generates(self, strategy: str, model: str) -> None:
        output = answer(model, "--strategy", strategy, "--exit-layer", 2)
        assert output["strategy"] == strategy
        assert output["engine"] == "torch"
        assert output["exit_layers"] == [4] + [2] * 7
        assert answer(model, "--exit-layer", 2)["strategy"] == "river"

    def test_without_exits_gives_the_backbones_answer(self, model: str) -> None:
        plain = answer(model, "--policy", "never", "--engine", "torch")
        output = answer(model, "--strategy", "none")
        assert output["tokens"] == plain["tokens"]
        assert (output["strategy"], output["policy"]["kind"]) == ("none", "never")

    def test_quantised_gives_the_rivers(self, model: str) -> None:
        plain = answer(model, "--policy", "always", "--engine", "torch", "--bits", 8)
        output = answer(model, "--strategy", "quantised", "--bits", 8)
        assert output["tokens"] == plain["tokens"]
        assert output["exit_layers"] == [0] * 8

    def test_quantised_takes_a_prompt_cache_and_offloading(
        self, model: str, tmp_path: Path
    ) -> None:
        plain = answer(model, "--strategy", "quantised")
        options = ("--strategy", "quantised", "--prompt-cache", tmp_path / "x", "--offload", 2)
        first, second = answer(model, *options), answer(model, *options)
        assert first["tokens"] == second["tokens"] == plain["tokens"]
        assert second["cached_prompt_tokens"] == second["prompt_tokens"] - 1
        assert second["offload"]["resident_layers"] == 2
        assert second["offload"]["misses"] == 0

    def test_says_that_pytorch_computes(self, model: str) -> None:
        command = ("generate", PROMPT, "-m", model, "-n", 2, "--strategy", "mask")
        note = "river-llm: PyTorch computes: the strategy mask is for it alone\n"
        assert run(*command).stderr.startswith(note)
        assert note not in run(*command, "--engine", "torch").stderr

    def test_chats(self, model: str) -> None:
        options = ("--strategy", "recompute", "--exit-layer", 2)
        first = chat(model, "Hello\n", *options).stdout
        both = chat(model, "Hello\nAnd you?\n/clear\nHello\n", *options).stdout
        assert both.startswith(first)
        assert both.endswith(first)
        assert len(both) > 2 * len(first)

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (("mask", "--policy", "always"), 1, "the prefill rule river is not for it"),
            (("mask", "--exit-layer", 9), 1, "the exit layer is 9"),
            (("mask", "--mode", "lossless"), 2, "--mode lossless drafts with the river"),
            (("none", "--threshold", 0.5), 2, "--strategy none has no exit policy"),
            (("quantised", "--exit-layer", 1), 2, "--strategy quantised has no exit policy"),
            (("mask", "--bits", 3), 2, "--strategy mask has no river; leave --river, --bits"),
            (("mask", "--river", "somewhere"), 2, "--strategy mask has no river"),
            (("mask", "--offload", 2), 2, "--strategy mask has no river to leave for, so all laye"),
            (("none", "--prompt-cache", "x"), 2, "--strategy none keeps no prompt caches"),
            (("mask", "--compare"), 2, "--compare compares the river"),
            (("hope",), 2, "'hope'"),
        ],
    )
    def test_refuses_what_does_not_go_together(
        self, options: tuple[object, ...], code: int, message: str, model: str
    ) -> None:
        outcome = run("generate", PROMPT, "-m", model, "--strategy", *options)
        outcome.check_fails(code, message)

    @pytest.mark.parametrize(
        ("strategies", "option", "message"),
        [
            (STRATEGIES, "--kv-bits=8", "keeps its KV cache in the model's dtype"),
            (["mask", "quantised"], "--engine=cpu", "is for the torch engine; leave --engine cpu"),
            (
                ["none", "quantised"],
                "--lm-head-bits=8",
                "is for the torch engine, which has no 8-bit weights",
            ),
            (
                ["none", "quantised"],
                "--backbone-bits=8",
                "is for the torch engine, which has no 8-bit weights",
            ),
        ],
    )
    def test_refuses_what_no_model_could_take(
        self, strategies: list[str], option: str, message: str, tmp_path: Path
    ) -> None:
        model = ("-m", tmp_path / "absent")
        for command in (("generate", PROMPT), ("chat",), ("eval", "arc_easy")):
            for strategy in strategies:
                outcome = run(*command, *model, "--strategy", strategy, option)
                outcome.check_fails(2, f"--strategy {strategy} {message}")
        # what does go together gets as far as the model
        outcome = run("generate", PROMPT, *model, "--strategy", "quantised", "--kv-bits", 8)
        outcome.check_fails(1, "there is no file or directory")

    def test_ctrl_c_gives_what_has_come(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        options = ("--strategy", "recompute", "--exit-layer", 2)
        whole = answer(model, *options)
        interrupt(monkeypatch, "decode", 3, StrategyEngine)
        output = answer(model, *options)
        assert output["finish_reason"] == "interrupted"
        assert output["tokens"] == whole["tokens"][:4]
