"""`river-llm check-exact` and what it is made of: the first token that differs, and speeds."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SCRIPT, Outcome, run, run_process
from river_llm.lossless import LosslessDecoder
from river_llm.lossless.rounds import VerifiedToken
from test_cli import PROMPT, answer
from test_cli_errors import no_loading  # noqa: F401 - a fixture
from test_cli_lossless import (
    BACKBONE,
    FLOAT32,
    LOSSLESS,
    NUM_LAYERS,
    PERFECT,
    ROUNDING_NOTE,
    SAMPLING,
    check_refused,
    field_names,
)
from tiny_lm import sharpened, tiny_lm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from river_llm import (
    ConfigError,
    DraftConfig,
    ExitPolicy,
    GenerationResult,
    RiverLM,
)
from river_llm.cli.check_exact import read_prompts
from river_llm.config import Mode
from river_llm.engines import CpuEngine
from river_llm.measure.exactness import Difference, Exactness, check_exactness

pytest_plugins = ["cli_models"]


class TestCheckExact:
    def check(self, model: str, prompts: Path, *options: object) -> Outcome:
        return run("check-exact", model, "--prompts", prompts, "-n", 20, *options)

    @pytest.mark.parametrize(
        "options",
        [
            (),
            ("--batch-size", 2),
            ("--batch-size", 8, "--draft-tokens", 3),
            ("--raw", "--no-ngram"),
            SAMPLING,
            (*SAMPLING, "--batch-size", 2, "--repetition-penalty", 1.2),
            FLOAT32,
            (*FLOAT32, "--draft-exit-layer", 4, "--batch-size", 2),
            ("--bits", 8, "--draft-exit-layer", 0, "--draft-lm-head-bits", 16),
        ],
        ids=lambda options: " ".join(map(str, options)),
    )
    def test_finds_the_backbones_tokens(
        self, model: str, prompts: Path, options: tuple[object, ...]
    ) -> None:
        outcome = self.check(model, prompts, *options)
        assert (outcome.exit_code, outcome.stderr) == (0, "")
        same, speed = outcome.stdout.splitlines()
        assert same == "3 of 3 prompts have the backbone's own tokens (60 in all)"
        assert re.fullmatch(
            r"backbone \d+\.\d tokens/s, lossless \d+\.\d: \d+\.\d\dx, quartiles \S+ to \S+; "
            r"\d+\.\d\d tokens a verification, \d+% drafted \(\d+% by the text itself\), "
            r"\d+% of the time in drafting",
            speed,
        )

    def test_json_has_the_documented_fields(self, model: str, prompts: Path) -> None:
        options = ("--json", "--bits", 8, "--temperature", 0.5, "--seed", 4, "--batch-size", 2)
        outcome = self.check(model, prompts, *options)
        output = outcome.json
        assert outcome.stderr == ""
        loading = {"model", "engine", "device", "dtype", "backbone_bits", "lm_head_bits", "kv_bits"}
        setting = {
            *loading,
            "version",
            "river",
            "river_directory",
            "drafts",
            "batch_size",
            "sampling",
            "interrupted",
        }
        assert set(output) == setting | set(field_names(Exactness))
        assert output["batch_size"] == 2
        assert (output["model"], output["engine"]) == (model, "cpu")
        assert output["river"] == {"bits": 8, "group_size": 64, "quantizer": "hqq"}
        sampling = output["sampling"]
        assert (sampling["max_new_tokens"], sampling["temperature"], sampling["seed"]) == (
            20,
            0.5,
            4,
        )
        assert (output["prompts"], output["tokens"], output["differences"]) == (3, 60, [])
        backbone, lossless = (
            output[f"{mode}_tokens_per_second"] for mode in ("backbone", "lossless")
        )
        assert backbone > 0
        assert output["speed_up"] == pytest.approx(lossless / backbone)
        quartiles = output["speed_up_quartiles"]
        assert quartiles == sorted(quartiles)
        assert 1 <= output["tokens_per_verification"] <= 20
        assert 0 <= output["ngram_share"] <= output["draft_share"] < 1
        assert 0 <= output["draft_time_share"] < 1

    def test_json_counts_what_was_drafted(self, model: str, prompts: Path) -> None:
        options = [option for option in PERFECT if option not in LOSSLESS]
        output = self.check(model, prompts, "--json", *options, "-n", 13).json
        assert output["tokens_per_verification"] == 3
        assert output["draft_share"] == pytest.approx(2 / 3)
        assert output["ngram_share"] == 0

    @pytest.mark.parametrize("limit", [1, 2, 3, 9])
    def test_limit_takes_the_first_prompts(self, model: str, prompts: Path, limit: int) -> None:
        output = self.check(model, prompts, "--limit", limit, "--json", "-n", 4).json
        assert output["prompts"] == min(limit, 3)
        assert output["tokens"] == 4 * min(limit, 3)

    def test_answers_of_one_token(self, model: str, prompts: Path) -> None:
        outcome = self.check(model, prompts, "-n", 1)
        assert outcome.exit_code == 0
        assert "3 of 3 prompts have the backbone's own tokens (3 in all)" in outcome.stdout
        output = self.check(model, prompts, "-n", 1, "--json").json
        assert output["speed_up_quartiles"] == []

    def test_answers_the_prompts_of_the_file(
        self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Où est la rivière ?"},
        ]
        entries = [
            {"messages": messages},
            {"question_id": 81, "turns": ["Name three rivers.", "Now four."]},
            {"prompt": "One line\nand another"},
        ]
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n\n".join(map(json.dumps, entries)))
        seen: list[Any] = []
        generate_batch = RiverLM.generate_batch

        def spied(lm: RiverLM, batch: Any, **settings: Any) -> list[GenerationResult]:
            seen.append(batch)
            return generate_batch(lm, batch, **settings)

        monkeypatch.setattr(RiverLM, "generate_batch", spied)
        assert self.check(model, path, "--batch-size", 2).exit_code == 0
        first, second = [messages, "Name three rivers."], ["One line\nand another"]
        assert seen == [first, first, second, second]

    def test_pytorch_with_rounding_says_so(self, model: str, prompts: Path) -> None:
        outcome = self.check(model, prompts, "--engine", "torch", "-n", 1)
        assert outcome.exit_code == 0
        assert ROUNDING_NOTE.format("bfloat16") in outcome.stderr

    def test_help_needs_no_torch(self) -> None:
        arguments = ("check-exact", "--help")
        outcome = run_process(*arguments, python=("-X", "importtime", SCRIPT))
        assert outcome.exit_code == 0
        assert "--prompts" in outcome.stdout
        assert not re.search(r"\| +(torch|transformers|numpy)\n", outcome.stderr)


class TestADifference:
    """The first token of a round is replaced by the next one of the vocabulary."""

    def check(self, model: str, prompts: Path, *options: object) -> Outcome:
        outcome = run("check-exact", model, "--prompts", prompts, "-n", 8, *options)
        assert (outcome.exit_code, outcome.stderr) == (1, "")
        return outcome

    def test_names_prompt_and_tokens(
        self,
        model: str,
        prompts: Path,
        tokenizer: PreTrainedTokenizerBase,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tokens = answer(model, *BACKBONE)["tokens"]
        spoil_round(monkeypatch)
        difference, same, _ = self.check(model, prompts).stdout.splitlines()
        assert same.startswith("2 of 3 prompts have the backbone's own tokens")
        backbone, lossless = (repr(tokenizer.decode([tokens[1] + more])) for more in (0, 1))
        found = re.fullmatch(
            re.escape(
                f"prompt 1, token 2: the backbone has {backbone}, lossless mode {lossless}; "
                f"likeliest there: {backbone}"
            )
            + r" (-?\d+\.\d{4}), '.*' (-?\d+\.\d{4})",
            difference,
        )
        assert found
        assert float(found[1]) >= float(found[2])

    def test_in_json_has_the_two_top_logits(
        self, model: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = answer(model, *BACKBONE)
        spoil_round(monkeypatch)
        outcome = self.check(model, prompts, "--json")
        assert outcome.stdout.count("\n") == 1
        (difference,) = json.loads(outcome.stdout)["differences"]
        assert set(difference) == field_names(Difference)
        assert (difference["prompt"], difference["place"]) == (0, 1)
        assert difference["backbone"] == difference["top_tokens"][0] == whole["tokens"][1]
        assert difference["lossless"] == whole["tokens"][1] + 1
        # transformers, in float32, gives these tokens the same logits but for bfloat16's rounding
        lm = RiverLM.from_pretrained(model, device="cpu")
        prompt = lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=True
        ).input_ids
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            text = torch.tensor([[*prompt, whole["tokens"][0]]])
            logits = reference(text).logits[0, -1]
        at_tokens = logits[difference["top_tokens"]].tolist()
        assert difference["top_logits"] == pytest.approx(at_tokens, abs=0.01)
        assert min(difference["top_logits"]) > logits.topk(8).values[-1] - 0.01

    def test_in_a_batch_is_of_its_own_prompt(
        self, model: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil_round(monkeypatch, sequence=1)
        lines = self.check(model, prompts, "--batch-size", 2).stdout.splitlines()
        assert lines[0].startswith("prompt 2, token 2: the backbone has ")
        assert lines[1].startswith("2 of 3 prompts")

    def test_in_every_prompt_is_a_line_for_each(
        self, model: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil_round(monkeypatch, once=False)
        lines = self.check(model, prompts).stdout.splitlines()
        assert [line.split(":")[0] for line in lines[:3]] == [
            f"prompt {number}, token 2" for number in (1, 2, 3)
        ]
        assert lines[3].startswith("0 of 3 prompts")

    def test_of_sampled_tokens(
        self, model: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil_round(monkeypatch)
        lines = self.check(model, prompts, *SAMPLING).stdout.splitlines()
        assert lines[0].startswith("prompt 1, token 2: the backbone has ")

    def test_of_an_engine_that_verifies_wrongly(
        self, model: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokens = answer(model, *BACKBONE)["tokens"]
        verify = CpuEngine.verify

        def wrong(engine: CpuEngine, *args: Any) -> Any:
            result = verify(engine, *args)
            result.best_tokens[:] = tokens[0]
            return result

        monkeypatch.setattr(CpuEngine, "verify", wrong)
        outcome = self.check(model, prompts, "--json", "--limit", 1)
        (difference,) = json.loads(outcome.stdout)["differences"]
        assert (difference["prompt"], difference["place"]) == (0, 1)
        assert (difference["backbone"], difference["lossless"]) == (tokens[1], tokens[0])

    @pytest.mark.parametrize(
        ("cut", "part"),
        [("lossless", "lossless mode the end; likeliest there: "), ("river", "has the end, ")],
    )
    def test_where_one_answer_has_ended(
        self, model: str, prompts: Path, cut: Mode, part: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        change_tokens(monkeypatch, RiverLM, cut, lambda tokens: tokens[:3])
        line = self.check(model, prompts, "--limit", 1).stdout.splitlines()[0]
        assert line.startswith("prompt 1, token 4: the backbone has ")
        assert part in line
        assert ("likeliest" in line) == (cut == "lossless")


@pytest.mark.usefixtures("no_loading")
class TestPromptFiles:
    def test_a_line_is_a_prompt(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.txt"
        path.write_bytes('one\r\n\n \ntwo  {"prompt": 3}\nrivière'.encode())
        assert read_prompts(path) == ["one", 'two  {"prompt": 3}', "rivière"]

    def test_an_object_is_a_prompt(self, tmp_path: Path) -> None:
        path = tmp_path / "prompts.jsonl"
        turn = {"role": "user", "content": "two"}
        entries = [{"prompt": "one\n"}, {"messages": [turn]}, {"turns": ["three", "no"]}]
        path.write_text("\n".join(map(json.dumps, entries)))
        assert read_prompts(path) == ["one\n", [turn], "three"]

    @pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
    def test_an_object_may_hold_separators_of_lines(self, tmp_path: Path, character: str) -> None:
        """JSON allows these characters in a string as they are."""
        path = tmp_path / "prompts.jsonl"
        entry = {"prompt": f"one{character}line"}
        path.write_text(json.dumps(entry, ensure_ascii=False) + "\n", encoding="utf-8")
        assert read_prompts(path) == [entry["prompt"]]

    @pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
    @pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
    def test_an_empty_one_is_refused(self, tmp_path: Path, name: str, content: bytes) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        run("check-exact", "--prompts", path).check_fails(2, f"{path} holds no prompt")

    def test_one_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.txt", tmp_path):
            run("check-exact", "--prompts", path).check_fails(2, f"{path} can't be read")

    @pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
    def test_one_that_is_no_text_is_refused(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / name
        path.write_bytes(b'{"prompt": "caf\xe9"}\n')
        run("check-exact", "--prompts", path).check_fails(2, f"{path} is no UTF-8 text")

    @pytest.mark.parametrize(
        "line",
        [
            "{",
            "words",
            '{"prompt": "one"} two',
            "[]",
            '["prompt"]',
            '"a prompt"',
            "3",
            "null",
            "{}",
            '{"text": "one"}',
            '{"turns": []}',
            '{"turns": null}',
            '{"turns": 3}',
            '{"messages": null}',
            '{"messages": "Hello"}',
            '{"messages": [{"role": "user"}]}',
            '{"messages": [{"content": "Hello"}]}',
            '{"messages": ["Hello"]}',
        ],
    )
    def test_a_line_that_is_no_prompt_is_refused(self, tmp_path: Path, line: str) -> None:
        check_refused(tmp_path, line)

    @pytest.mark.parametrize(
        "line",
        [
            '{"prompt": null}',
            '{"prompt": ["one"]}',
            '{"turns": [null]}',
            '{"turns": "Hello"}',
            '{"messages": [{"role": "user", "content": null}]}',
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}',
        ],
    )
    def test_a_prompt_that_is_no_string_is_refused(self, tmp_path: Path, line: str) -> None:
        """Its answer would be to "None", to one letter, or to Python's words for a list."""
        check_refused(tmp_path, line)


@pytest.fixture
def lm(tiny_llama: PreTrainedModel) -> RiverLM:
    """On the torch engine in float32, with a policy that isn't the backbone's alone."""
    return tiny_lm(sharpened(tiny_llama), ExitPolicy.fixed(1))


class TestCheckExactness:
    PROMPTS = ("Hello, river", "y", "abcabcabcab")

    def test_finds_no_difference(self, lm: RiverLM) -> None:
        for settings in ({}, {"batch_size": 2}, {"temperature": 1.0, "seed": 3, "batch_size": 5}):
            found = check_exactness(lm, self.PROMPTS, max_new_tokens=12, **settings)
            assert (found.prompts, found.tokens, found.differences) == (3, 36, [])
        assert lm.policy == ExitPolicy.fixed(1)

    @pytest.mark.parametrize(
        ("prompts", "settings", "wanted"),
        [
            ([], {}, "one prompt or more"),
            (PROMPTS, {"batch_size": 0}, "batches of one or more"),
            (PROMPTS, {"temperature": 0.8}, "seed"),
            (PROMPTS, {"temperature": 0.8, "seed": None}, "seed"),
            (["one", " "], {}, "the prompt is empty"),
            (PROMPTS, {"max_new_tokens": 0}, "max_new_tokens"),
            (PROMPTS, {"frob": 1}, "frob"),
        ],
    )
    def test_bad_input_is_refused(
        self, lm: RiverLM, prompts: list[str], settings: dict[str, Any], wanted: str
    ) -> None:
        with pytest.raises(ConfigError, match=wanted):
            check_exactness(lm, prompts, **{"max_new_tokens": 2, **settings})
        assert lm.policy == ExitPolicy.fixed(1)
        assert check_exactness(lm, self.PROMPTS, max_new_tokens=2).differences == []

    def test_tells_of_its_progress(self, lm: RiverLM) -> None:
        done: list[tuple[int, int]] = []
        prompts = ["one", "two", "three", "four", "five"]
        check_exactness(
            lm, prompts, batch_size=2, max_new_tokens=2, progress=lambda *pair: done.append(pair)
        )
        assert done == [(2, 5), (4, 5), (5, 5)]

    def test_neither_mode_always_comes_first(
        self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        modes: list[Mode] = []
        generate_batch = lm.generate_batch

        def spied(batch: Any, *, mode: Mode, **settings: Any) -> list[GenerationResult]:
            modes.append(mode)
            return generate_batch(batch, mode=mode, **settings)

        monkeypatch.setattr(lm, "generate_batch", spied)
        check_exactness(lm, ["one", "two", "three", "four"], max_new_tokens=2)
        firsts = modes[::2]
        assert sorted(firsts) == ["lossless", "lossless", "river", "river"]
        assert modes.count("river") == modes.count("lossless") == 4

    def test_speeds_are_all_tokens_over_all_time(
        self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # 10 tokens after the first: 1 s and 2 s, 0.5 s and 0.5 s
        speeds: dict[Mode, list[float]] = {"river": [10, 5], "lossless": [20, 20]}
        set_speeds(monkeypatch, lm, speeds)
        found = check_exactness(lm, ["one", "two"], max_new_tokens=11)
        assert found.backbone_tokens_per_second == pytest.approx(20 / 3)
        assert found.lossless_tokens_per_second == pytest.approx(20)
        assert found.speed_up == pytest.approx(3)

    def test_a_batch_takes_as_long_as_its_longest(
        self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        speeds: dict[Mode, list[float]] = {"river": [10, 5], "lossless": [20, 10]}
        set_speeds(monkeypatch, lm, speeds)
        found = check_exactness(lm, ["one", "two"], batch_size=2, max_new_tokens=11)
        assert found.backbone_tokens_per_second == pytest.approx(10)
        assert found.lossless_tokens_per_second == pytest.approx(20)
        assert found.speed_up_quartiles == pytest.approx((2.0,))

    @pytest.mark.parametrize("ratios", [[1, 3], [2, 1, 3], [1, 2, 3, 4]], ids=str)
    def test_quartiles_are_within_what_was_measured(
        self, lm: RiverLM, ratios: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        speeds: dict[Mode, list[float]] = {"river": [1] * len(ratios), "lossless": ratios}
        set_speeds(monkeypatch, lm, speeds)
        found = check_exactness(lm, ["one"] * len(ratios), max_new_tokens=11)
        low, median, high = found.speed_up_quartiles
        assert median == pytest.approx(sum(ratios) / len(ratios))
        assert min(ratios) <= low <= median <= high <= max(ratios)

    def test_what_stands_behind_a_stop_token_does_not_count(self, lm: RiverLM) -> None:
        """A draft goes on after the token that ends the answer."""
        perfect = DraftConfig(tokens=5, exit_layer=NUM_LAYERS, ngram=False)
        settings = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
        lm.policy = ExitPolicy.never()
        tokens = lm.generate(self.PROMPTS[0], **settings).tokens
        place = next(i for i in range(2, 6) if tokens[i] not in tokens[:i])
        lm.stop_tokens = frozenset({tokens[place]})
        found = check_exactness(lm, self.PROMPTS[:1], drafts=perfect, **settings)
        assert (found.tokens, found.differences) == (place + 1, [])
        assert 0 < found.draft_share <= 1


class TestDifference:
    """Where one answer differs, on a model that nothing else changes."""

    PROMPTS = ("Hello, river", "y", "abcabcabcab")

    def find(self, lm: RiverLM) -> list[Difference]:
        return check_exactness(lm, self.PROMPTS, raw=True, max_new_tokens=12).differences

    def test_where_lossless_mode_ends_first(
        self, tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        reference = copy.deepcopy(sharpened(tiny_llama))
        lm = tiny_lm(tiny_llama)
        text = lm.tokenizer(self.PROMPTS[1]).input_ids
        tokens = lm.generate(self.PROMPTS[1], raw=True, max_new_tokens=12).tokens
        change_tokens(monkeypatch, lm, "lossless", lambda all_: all_[:5], only=tokens)
        (difference,) = self.find(lm)
        assert (difference.prompt, difference.place) == (1, 5)
        assert (difference.backbone, difference.lossless) == (tokens[5], None)
        with torch.no_grad():
            logits = reference(torch.tensor([[*text, *tokens[:5]]])).logits[0, -1]
        top = logits.topk(2)
        assert difference.top_tokens == tuple(top.indices.tolist())
        assert difference.top_tokens[0] == tokens[5]
        assert difference.top_logits == pytest.approx(tuple(top.values.tolist()), abs=1e-3)

    def test_where_the_backbone_ends_first(
        self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        change_tokens(monkeypatch, lm, "river", lambda tokens: tokens[:5])
        differences = self.find(lm)
        assert [difference.prompt for difference in differences] == [0, 1, 2]
        for difference in differences:
            assert (difference.place, difference.backbone) == (5, None)
            assert difference.lossless is not None
            assert difference.top_tokens == difference.top_logits == ()

    @pytest.mark.parametrize("place", [0, 1, 6, 11])
    def test_is_the_first_of_several(
        self, lm: RiverLM, place: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The answers go on to differ, and one of them is shorter."""
        spoiled = [96] * 20
        change_tokens(monkeypatch, lm, "lossless", lambda tokens: tokens[:place] + spoiled)
        lm.policy = ExitPolicy.never()
        whole = [lm.generate(p, raw=True, max_new_tokens=12).tokens for p in self.PROMPTS]
        assert all(96 not in tokens for tokens in whole)
        for difference, tokens in zip(self.find(lm), whole, strict=True):
            assert (difference.place, difference.lossless) == (place, 96)
            assert difference.backbone == difference.top_tokens[0] == tokens[place]
            first, second = difference.top_logits
            assert first >= second

    def test_is_by_the_backbones_logits_whatever_the_policy(
        self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        change_tokens(monkeypatch, lm, "lossless", lambda tokens: tokens[:3])
        lm.policy = ExitPolicy.always()
        found = self.find(lm)
        assert lm.policy == ExitPolicy.always()
        lm.policy = ExitPolicy.never()
        assert self.find(lm) == found


def spoil_round(monkeypatch: pytest.MonkeyPatch, sequence: int = 0, once: bool = True) -> None:
    """Make the first token of one sequence's first round, or of every round, a wrong one."""
    honest = LosslessDecoder.round
    calls = itertools.count()

    def spoiled(decoder: LosslessDecoder) -> list[list[VerifiedToken]]:
        verified = honest(decoder)
        if next(calls) == 0 or not once:
            right = verified[sequence][0]
            verified[sequence][0] = dataclasses.replace(right, token=right.token + 1)
        return verified

    monkeypatch.setattr(LosslessDecoder, "round", spoiled)


def change_tokens(
    monkeypatch: pytest.MonkeyPatch,
    owner: RiverLM | type[RiverLM],
    changed: Mode,
    change: Any,
    only: list[int] | None = None,
) -> None:
    """Change the tokens of the answers in one mode, or only of one answer."""
    generate_batch = owner.generate_batch

    def changing(*args: Any, mode: Mode, **settings: Any) -> list[GenerationResult]:
        results = generate_batch(*args, mode=mode, **settings)
        return [
            dataclasses.replace(result, tokens=change(result.tokens))
            if mode == changed and only in (None, result.tokens)
            else result
            for result in results
        ]

    monkeypatch.setattr(owner, "generate_batch", changing)


def set_speeds(
    monkeypatch: pytest.MonkeyPatch, lm: RiverLM, speeds: dict[Mode, list[float]]
) -> None:
    """Let the answers in each mode have come at these speeds, one after the other."""
    generate_batch = lm.generate_batch
    left = {mode: iter(values) for mode, values in speeds.items()}

    def timed(batch: Any, *, mode: Mode, **settings: Any) -> list[GenerationResult]:
        return [
            dataclasses.replace(result, decode_tokens_per_second=next(left[mode]))
            for result in generate_batch(batch, mode=mode, **settings)
        ]

    monkeypatch.setattr(lm, "generate_batch", timed)
