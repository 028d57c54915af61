"""Lossless mode on the command line: `generate`, `chat` and `check-exact`."""

from __future__ import annotations

import copy
import dataclasses
import io
import itertools
import json
import re
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SCRIPT, Outcome, run, run_process, start
from rich.console import Console
from test_cli import FIELDS, PROMPT, answer
from test_cli_chat import chat, interrupt
from test_cli_errors import no_loading  # noqa: F401 - a fixture
from tiny_lm import sharpened, tiny_lm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from river_llm import (
    ConfigError,
    Conversation,
    DraftConfig,
    ExitPolicy,
    GenerationResponse,
    GenerationResult,
    River,
    RiverLM,
)
from river_llm.cli import render
from river_llm.cli.check_exact import read_prompts
from river_llm.config import Mode
from river_llm.engines import CpuEngine, TorchEngine
from river_llm.lossless import LosslessDecoder, LosslessStatistics, Origin
from river_llm.lossless.exactness import Difference, Exactness, check_exactness
from river_llm.lossless.rounds import VerifiedToken
from river_llm.lossless.sources import NgramSource

pytest_plugins = ["cli_models"]

NUM_LAYERS, VOCABULARY = 4, 49152
LOSSLESS = ("--mode", "lossless")
BACKBONE = ("--policy", "never")
FLOAT32 = ("--engine", "torch", "--dtype", "float32")
# Drafts of two tokens by the backbone itself: all are accepted, so a round gives three tokens.
PERFECT = (*LOSSLESS, "--draft-tokens", 2, "--draft-exit-layer", NUM_LAYERS, "--no-ngram")
PERFECT += ("--draft-lm-head-bits", 16, "--draft-vocabulary", VOCABULARY)
SAMPLING = ["--temperature=0.8", "--seed=3", "--top-k=50", "--top-p=0.95", "--min-p=0.01"]
DRAFTS = [
    "",
    "--no-ngram",
    "--draft-tokens 3",
    "--draft-tokens 2 --draft-exit-layer 0 --no-ngram",
    "--draft-exit-layer 2",
    "--draft-tokens 5 --draft-exit-layer 4 --draft-lm-head-bits 4",
]
ROUNDING_NOTE = "PyTorch in {} rounds a pass over several tokens otherwise than single steps"


def field_names(kind: type) -> set[str]:
    """Of a dataclass."""
    return {field.name for field in dataclasses.fields(kind)}


class TestGenerate:
    @pytest.mark.parametrize("drafts", DRAFTS)
    def test_answers_as_the_backbone(self, model: str, drafts: str) -> None:
        expected = answer(model, *BACKBONE, length=40)
        output = answer(model, *LOSSLESS, *drafts.split(), length=40)
        for name in ("tokens", "text", "exit_layers", "finish_reason", "prompt_tokens", "policy"):
            assert output[name] == expected[name]

    @pytest.mark.parametrize("drafts", DRAFTS[:4])
    @pytest.mark.parametrize("penalty", [1, 1.2])
    def test_samples_as_the_backbone(self, model: str, drafts: str, penalty: float) -> None:
        options = (*SAMPLING, "--repetition-penalty", penalty)
        expected = answer(model, *BACKBONE, *options, length=30)
        output = answer(model, *LOSSLESS, *drafts.split(), *options, length=30)
        assert output["tokens"] == expected["tokens"]
        assert output["text"] == expected["text"]
        assert output["tokens"] != answer(model, *BACKBONE, length=30)["tokens"]

    @pytest.mark.parametrize("sampling", [[], SAMPLING], ids=["greedy", "sampled"])
    def test_answers_as_the_backbone_on_pytorch(self, model: str, sampling: list[str]) -> None:
        expected = answer(model, *BACKBONE, *FLOAT32, *sampling, length=30)
        output = answer(model, *LOSSLESS, *FLOAT32, *sampling, length=30)
        assert output["engine"] == "torch"
        assert output["tokens"] == expected["tokens"]

    def test_other_settings_reach_the_answer(self, model: str) -> None:
        whole = answer(model, *BACKBONE, "--raw", prompt="A river", length=20)
        stop = whole["text"][20:26]
        output = answer(model, *LOSSLESS, "--raw", "--stop", stop, prompt="A river", length=20)
        assert output["text"] == whole["text"][: whole["text"].index(stop)]
        assert output["finish_reason"] == "stop"
        assert output["prompt_tokens"] == whole["prompt_tokens"]

    def test_json_has_the_documented_fields(self, model: str) -> None:
        output = answer(model, *LOSSLESS, length=40)
        assert set(output) == FIELDS
        assert output["mode"] == "lossless"
        assert output["policy"] == ExitPolicy.never().to_dict()
        assert output["exit_layers"] == [NUM_LAYERS] * 40
        assert output["mean_exit_layer"] == NUM_LAYERS
        found = output["lossless"]
        assert set(found) == field_names(LosslessStatistics)
        decoded, verifications = 39, found["verifications"]
        assert 1 <= verifications <= decoded
        assert found["tokens_per_verification"] == pytest.approx(decoded / verifications)
        assert found["accepted_tokens"] == decoded - verifications
        assert found["draft_share"] == pytest.approx(found["accepted_tokens"] / decoded)
        assert 0 <= found["ngram_tokens"] <= found["accepted_tokens"] <= found["drafted_tokens"]
        assert all(0 <= share <= 1 for share in found["acceptance_by_position"])
        assert found["draft_seconds"] > 0
        assert found["verify_seconds"] > 0

    def test_json_of_river_mode_has_no_statistics_of_drafts(self, model: str) -> None:
        output = answer(model)
        assert (output["mode"], output["lossless"]) == ("river", None)
        assert answer(model, "--mode", "river")["tokens"] == output["tokens"]

    def test_json_counts_what_was_drafted(self, model: str) -> None:
        found = answer(model, *PERFECT, length=13)["lossless"]
        assert found["verifications"] == 4
        assert found["tokens_per_verification"] == 3
        assert found["drafted_tokens"] == found["accepted_tokens"] == 8
        assert found["ngram_tokens"] == 0
        assert found["acceptance_by_position"] == [1, 1]

    def test_json_of_one_token_has_nothing_verified(self, model: str) -> None:
        found = answer(model, *LOSSLESS, length=1)["lossless"]
        assert found["verifications"] == found["drafted_tokens"] == 0
        assert found["tokens_per_verification"] is None
        assert found["draft_share"] is None
        assert found["acceptance_by_position"] == []

    def test_statistics_come_after_the_answer(self, model: str) -> None:
        outcome = run("generate", PROMPT, "-m", model, "-n", 13, *PERFECT)
        assert outcome.exit_code == 0
        assert outcome.stdout == answer(model, *BACKBONE, length=13)["text"] + "\n"
        drafting, whole = outcome.stderr.splitlines()
        assert re.fullmatch(
            r"lossless: 3\.00 tokens a verification, 67% of the tokens drafted \(0 by the text "
            r"itself\), accepted by position: 100%, 100%; drafting \d+\.\d\d s, verifying "
            r"\d+\.\d\d s",
            drafting,
        )
        assert whole.startswith("13 tokens (length), ")
        assert "mean exit depth 4.0 of 4" in whole

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_pytorch_with_rounding_says_so(self, model: str, dtype: str) -> None:
        options = (*LOSSLESS, "--engine", "torch", "--dtype", dtype, "-n", 2, "--json")
        outcome = run("generate", PROMPT, "-m", model, *options)
        assert outcome.json["engine"] == "torch"
        (line,) = outcome.stderr.splitlines()
        assert line.startswith(f"river-llm: {ROUNDING_NOTE.format(dtype)}")

    @pytest.mark.parametrize(
        "options",
        [(*LOSSLESS, *FLOAT32), (*LOSSLESS, "--engine", "cpu"), ("--engine", "torch")],
        ids=["float32", "native", "river"],
    )
    def test_others_have_nothing_to_say(self, model: str, options: tuple[str, ...]) -> None:
        assert run("generate", PROMPT, "-m", model, "-n", 2, "--json", *options).stderr == ""


class TestColours:
    """Green what the river guessed, blue what the text itself did, red what nothing did."""

    def test_are_those_of_the_origin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = _terminal(monkeypatch)
        for origin in ("backbone", "river", "ngram"):
            render.print_token("x", NUM_LAYERS, NUM_LAYERS, origin)
            render.print_response(_response(origin), NUM_LAYERS)
        shown = [_nearest(colour) for colour, _ in _coloured(terminal)]
        assert shown == ["backbone", "backbone", "river", "river", "ngram", "ngram"]

    def test_of_a_guess_do_not_depend_on_the_exit_layer(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        terminal = _terminal(monkeypatch)
        for origin, layer in itertools.product(("river", "ngram"), range(NUM_LAYERS + 1)):
            render.print_token("x", layer, NUM_LAYERS, origin)
        assert len({colour for colour, _ in _coloured(terminal)}) == 2

    @pytest.mark.parametrize("drafts", ["", "--no-ngram"])
    def test_of_an_answer(self, model: str, drafts: str, monkeypatch: pytest.MonkeyPatch) -> None:
        prefer_ngrams(monkeypatch)
        responses: list[GenerationResponse] = []
        stream_tokens = RiverLM.stream_tokens

        def spied(*args: Any, **settings: Any) -> Iterable[GenerationResponse]:
            for response in stream_tokens(*args, **settings):
                responses.append(response)
                yield response

        monkeypatch.setattr(RiverLM, "stream_tokens", spied)
        terminal = _terminal(monkeypatch)
        options = (*LOSSLESS, "--draft-tokens", 2, "--draft-exit-layer", 3, *drafts.split())
        assert run("generate", PROMPT, "-m", model, "-n", 40, *options).exit_code == 0
        origins = {"backbone", "river"} if drafts else {"backbone", "river", "ngram"}
        assert {response.origin for response in responses} == origins
        found = responses[-1].lossless
        assert found is not None
        guessed = [response.origin for response in responses if response.origin != "backbone"]
        assert len(guessed) == found.accepted_tokens
        assert guessed.count("ngram") == found.ngram_tokens
        shown = [(_nearest(colour), c) for colour, text in _coloured(terminal) for c in text]
        meant = [(response.origin, c) for response in responses for c in response.text]
        assert [pair for pair in shown if pair[1] != "\n"] == [
            pair for pair in meant if pair[1] != "\n"
        ]

    def test_are_not_in_a_file(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        prefer_ngrams(monkeypatch)
        outcome = run("generate", PROMPT, "-m", model, "-n", 40, *LOSSLESS)
        assert "\x1b" not in outcome.stdout + outcome.stderr


class TestLosslessLine:
    STATISTICS = LosslessStatistics(
        verifications=10,
        tokens_per_verification=2.344,
        drafted_tokens=40,
        accepted_tokens=13,
        ngram_tokens=7,
        draft_share=0.5649,
        acceptance_by_position=(1.0, 0.75, 0.5, 0.25, 0.125, 0.0625, 0.99),
        draft_seconds=0.126,
        verify_seconds=12.344,
    )

    def test_says_what_was_counted(self) -> None:
        assert render.lossless_line(self.STATISTICS) == (
            "lossless: 2.34 tokens a verification, 56% of the tokens drafted (7 by the text "
            "itself), accepted by position: 100%, 75%, 50%, 25%, 12%, 6%; drafting 0.13 s, "
            "verifying 12.34 s"
        )

    def test_without_drafts(self) -> None:
        statistics = dataclasses.replace(
            self.STATISTICS, acceptance_by_position=(), tokens_per_verification=1.0, draft_share=0.0
        )
        line = render.lossless_line(statistics)
        assert "1.00 tokens a verification, 0% of the tokens drafted" in line
        assert "accepted by position: no drafts;" in line

    def test_without_verifications(self) -> None:
        statistics = LosslessStatistics(0, None, 0, 0, 0, None, (), 0.0, 0.0)
        assert render.lossless_line(statistics) == "lossless: nothing was verified"


class TestChat:
    @pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}], ids=str)
    def test_is_the_librarys_conversation(self, model: str, sampling: dict[str, Any]) -> None:
        lm = RiverLM.from_pretrained(model, policy=ExitPolicy.never(), device="cpu")
        settings = [f"--{name}={value}" for name, value in sampling.items()]
        outcome = chat(model, "Hello\nAnd you?\n", *LOSSLESS, *settings, "-n", 20)
        for mode in ("lossless", "river"):
            conversation = Conversation(lm, mode=mode, max_new_tokens=20, **sampling)
            turns = [
                "".join(response.text for response in conversation.stream(text))
                for text in ("Hello", "And you?")
            ]
            assert outcome.stdout == f"{turns[0]}\n{turns[1]}\n"

    def test_says_what_drafts_brought_in_each_turn(self, model: str) -> None:
        outcome = chat(model, "Hello\nAnd you?\n", *PERFECT, "-n", 7)
        lines = outcome.stderr.splitlines()[1:]
        assert [line.split()[0] for line in lines] == ["lossless:", "7", "lossless:", "7"]
        for line in lines[::2]:
            assert "3.00 tokens a verification" in line
            assert "accepted by position: 100%, 100%;" in line

    def test_in_river_mode_says_nothing_of_drafts(self, model: str) -> None:
        assert "lossless" not in chat(model, "Hello\n").stderr

    def test_runs_the_second_turn_on_the_cache_of_the_first(
        self, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        counts: list[int] = []
        prefill = CpuEngine.prefill

        def spied(engine: CpuEngine, token_ids: torch.Tensor, *args: Any) -> Any:
            counts.append(token_ids.numel())
            return prefill(engine, token_ids, *args)

        monkeypatch.setattr(CpuEngine, "prefill", spied)
        chat(model, "Hello\nHello\n", *LOSSLESS, "-n", 20)
        assert counts[1] < counts[0]


class TestCtrlC:
    """A round of these drafts gives three tokens."""

    @pytest.mark.parametrize("rounds", [0, 2])
    @pytest.mark.parametrize("verb", ["draft", "verify"])
    @pytest.mark.parametrize("engine", [CpuEngine, TorchEngine])
    def test_gives_what_was_verified(
        self,
        model: str,
        rounds: int,
        verb: str,
        engine: type[CpuEngine | TorchEngine],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        dtype = "bfloat16" if engine is CpuEngine else "float32"
        options = (*PERFECT, "--engine", engine.name, "--dtype", dtype)
        whole = answer(model, *options, length=12)
        interrupt(monkeypatch, verb, rounds, engine)
        output = answer(model, *options, length=12)
        assert set(output) == FIELDS
        assert output["mode"] == "lossless"
        assert output["finish_reason"] == "interrupted"
        assert output["tokens"] == whole["tokens"][: 1 + 3 * rounds]
        assert output["exit_layers"] == [NUM_LAYERS] * (1 + 3 * rounds)
        assert output["lossless"]["verifications"] == rounds
        assert whole["text"].startswith(output["text"])

    def test_before_the_first_token_gives_an_empty_answer(
        self, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt(monkeypatch, "prefill", 0)
        output = answer(model, *LOSSLESS)
        assert (output["text"], output["tokens"]) == ("", [])
        assert (output["mode"], output["lossless"]) == ("lossless", None)
        assert output["finish_reason"] == "interrupted"
        interrupt(monkeypatch, "prefill", 0)
        outcome = run("generate", PROMPT, "-m", model, *LOSSLESS)
        assert (outcome.exit_code, outcome.stdout) == (0, "\n")
        assert "0 tokens (interrupted)" in outcome.stderr

    @pytest.mark.parametrize(
        ("rounds", "part"), [(0, "nothing was verified"), (1, "3.00 tokens a verification")]
    )
    def test_in_text_leaves_the_statistics(
        self, model: str, rounds: int, part: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt(monkeypatch, "verify", rounds)
        outcome = run("generate", PROMPT, "-m", model, *PERFECT)
        assert outcome.exit_code == 0
        drafting, whole = outcome.stderr.splitlines()
        assert part in drafting
        assert whole.startswith(f"{1 + 3 * rounds} tokens (interrupted)")

    @pytest.mark.parametrize("verb", ["draft", "verify"])
    def test_in_a_chat_ends_the_answer_only(
        self, model: str, verb: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options = (*PERFECT, *FLOAT32)
        interrupt(monkeypatch, verb, 1, TorchEngine)
        outcome = chat(model, "Hello\nAnd you?\n", *options)
        assert "4 tokens (interrupted)" in outcome.stderr
        assert "6 tokens (length)" in outcome.stderr
        lm = RiverLM.from_pretrained(
            model, policy=ExitPolicy.never(), dtype=torch.float32, device="cpu", engine="torch"
        )
        cut = lm.generate("Hello", max_new_tokens=4).text
        turns = [("user", "Hello"), ("assistant", cut), ("user", "And you?")]
        messages = [{"role": role, "content": content} for role, content in turns]
        assert outcome.stdout == f"{cut}\n{lm.chat(messages, max_new_tokens=6).text}\n"

    def test_as_a_signal_leaves_the_text(self, model: str) -> None:
        process = start("generate", PROMPT, "-m", model, "-n", 50_000, *LOSSLESS)
        assert process.stdout
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert (first + rest).endswith(b"\n")
        assert b"tokens (interrupted)" in errors
        assert b"Traceback" not in errors

    def test_in_check_exact_is_one_line(
        self, model: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt(monkeypatch, "verify", 2)
        outcome = run("check-exact", model, "--prompts", prompts)
        assert outcome.exit_code in (1, 130)
        outcome.check_fails(outcome.exit_code, "interrupted")


@pytest.mark.usefixtures("no_loading")
class TestWrongUsage:
    COMMANDS = (["generate", PROMPT], ["chat"])
    any_command = pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])

    @any_command
    @pytest.mark.parametrize("mode", [[], ["--mode", "river"]])
    @pytest.mark.parametrize(
        "options",
        [
            "--draft-tokens 4",
            "--draft-exit-layer 0",
            "--draft-lm-head-bits 16",
            "--ngram",
            "--no-ngram",
            "--policy never --draft-tokens 4",
        ],
    )
    def test_drafts_without_lossless_mode(
        self, command: list[str], mode: list[str], options: str
    ) -> None:
        run(*command, *mode, *options.split()).check_fails(2, "draft options", "--mode lossless")

    @any_command
    @pytest.mark.parametrize(
        "options",
        [
            "--threshold 0.9",
            "--threshold 0",
            "--policy never",
            "--policy similarity",
            "--exit-layer 2",
            "--exit-layer 0",
            "--prefill backbone",
            "--first-layer 3",
        ],
    )
    def test_an_exit_policy_in_lossless_mode(self, command: list[str], options: str) -> None:
        run(*command, *LOSSLESS, *options.split()).check_fails(2, "no exit policy")

    @pytest.mark.parametrize(
        "command",
        [[*words, *LOSSLESS] for words in COMMANDS] + [["check-exact", "--prompts", "none"]],
        ids=lambda words: words[0],
    )
    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ("--draft-tokens 0", "1 to 64"),
            ("--draft-tokens 65", "1 to 64"),
            ("--draft-tokens -1", "1 to 64"),
            ("--draft-exit-layer -1", "0 or more"),
            ("--draft-lm-head-bits 5", "--draft-lm-head-bits"),
            ("--temperature -1", "temperature"),
            ("--max-new-tokens 0", "max_new_tokens"),
        ],
    )
    def test_out_of_range(self, command: list[str], options: str, part: str) -> None:
        run(*command, *options.split()).check_fails(2, part)

    def test_compare_in_lossless_mode(self) -> None:
        outcome = run("generate", PROMPT, *LOSSLESS, "--compare")
        outcome.check_fails(2, "--compare", "check-exact")

    @any_command
    def test_an_unknown_mode(self, command: list[str]) -> None:
        run(*command, "--mode", "lossy").check_fails(2, "--mode", "lossless")

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ("", "--prompts"),
            ("--prompts none --limit 0", "--limit"),
            ("--prompts none --batch-size 0", "--batch-size"),
            ("--prompts none --policy never", "--policy"),
        ],
    )
    def test_of_check_exact(self, options: str, part: str) -> None:
        run("check-exact", "tiny", *options.split()).check_fails(2, part)

    def test_a_built_river_with_other_bits(self, prompts: Path) -> None:
        options = ("--river", "somewhere", "--bits", 8)
        run("check-exact", "--prompts", prompts, *options).check_fails(2, "--river brings its own")


class TestFailure:
    @pytest.mark.parametrize("command", ["generate", "chat", "check-exact"])
    def test_a_draft_beyond_the_layers(self, model: str, prompts: Path, command: str) -> None:
        outcome = run(*_command(command, model, prompts), "--draft-exit-layer", 5)
        outcome.check_fails(1, "the draft's exit layer is 5", "the model has 4 layers")

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("command", ["generate", "chat", "check-exact"])
    def test_a_narrow_head_on_pytorch(
        self, model: str, prompts: Path, command: str, dtype: str
    ) -> None:
        options = ("--draft-lm-head-bits", 8, "--engine", "torch", "--dtype", dtype)
        outcome = run(*_command(command, model, prompts), *options)
        outcome.check_fails(1, "the torch engine has no LM head of 8 bits", "choose 16")

    def test_a_head_wider_than_the_engines(self, model: str) -> None:
        options = (*LOSSLESS, "--lm-head-bits", 8, "--draft-lm-head-bits", 16, "--json")
        outcome = run("generate", PROMPT, "-m", model, *options)
        assert (outcome.exit_code, outcome.stdout) == (1, "")
        assert "no LM head of 16 bits for drafts; choose 8" in outcome.stderr.splitlines()[-1]

    def test_a_prompt_beyond_the_context(self, other_model: str, tmp_path: Path) -> None:
        long = "river " * 200
        outcome = run("generate", long, "-m", other_model, *LOSSLESS)
        outcome.check_fails(1, "holds 96", "shorten the prompt")
        (tmp_path / "long.txt").write_text(f"Hello\n{long}\n")
        outcome = run("check-exact", other_model, "--prompts", tmp_path / "long.txt", "-n", 2)
        outcome.check_fails(1, "holds 96", "shorten the prompt")

    def test_messages_without_a_chat_template(self, model: str, tmp_path: Path) -> None:
        for path in Path(model).iterdir():
            if path.name != "chat_template.jinja":
                (tmp_path / path.name).symlink_to(path)
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
        run("check-exact", tmp_path, "--prompts", file).check_fails(1, "no chat template")


class TestLearntDrafts:
    @pytest.fixture
    def river(self, model: str, tmp_path: Path) -> Path:
        directory = tmp_path / "river"
        assert run("build", model, "-o", directory).exit_code == 0
        return directory

    def test_are_kept_beside_a_saved_river(self, model: str, river: Path) -> None:
        whole = answer(model, *BACKBONE, length=20)["tokens"]
        built = {path.name for path in river.iterdir()}
        answer(model, "--river", river)
        assert {path.name for path in river.iterdir()} == built
        for _ in range(2):
            assert answer(model, *LOSSLESS, "--river", river, length=20)["tokens"] == whole
            assert {path.name for path in river.iterdir()} == {*built, "drafts.json"}
            assert len(_entries(river)) == 1
        answer(model, *LOSSLESS, "--river", river, "--draft-tokens", 2)
        assert len(_entries(river)) == 2

    def test_are_kept_by_every_command(self, model: str, river: Path, prompts: Path) -> None:
        for command in ("generate", "chat", "check-exact"):
            outcome = run(*_command(command, model, prompts), "--river", river, stdin="Hello\n")
            assert outcome.exit_code == 0
            assert _entries(river)
            (river / "drafts.json").unlink()

    def test_are_kept_of_an_answer_that_is_cut(
        self, model: str, river: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt(monkeypatch, "verify", 1)
        output = answer(model, *LOSSLESS, "--river", river, length=40)
        assert output["finish_reason"] == "interrupted"
        assert len(_entries(river)) == 1

    def test_go_with_the_river_that_is_built_over_them(self, model: str, river: Path) -> None:
        whole = answer(model, *LOSSLESS, "--river", river)["tokens"]
        assert (river / "drafts.json").exists()
        outcome = run("build", model, "-o", river, "--bits", 8)
        assert outcome.exit_code == 0, outcome.stderr
        assert {path.name for path in river.iterdir()} == {"river.json", "river.safetensors"}
        assert River.load(river).config.bits == 8
        assert [path.name for path in river.parent.iterdir()] == ["river"]
        assert answer(model, *LOSSLESS, "--river", river)["tokens"] == whole

    def test_that_are_damaged_do_no_harm(self, model: str, river: Path) -> None:
        (river / "drafts.json").write_bytes(b'{"format_version": 1, "entries": \xff')
        outcome = run("generate", PROMPT, "-m", model, "--river", river, *LOSSLESS, "--json")
        assert outcome.json["mode"] == "lossless"
        assert outcome.stderr == ""
        assert len(_entries(river)) == 1


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Three prompts, one a line."""
    path = tmp_path / "prompts.txt"
    path.write_text("Name three rivers.\n\n  \nWho are you?\nIl était une fois\n", encoding="utf-8")
    return path


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
        loading = {"model", "engine", "dtype", "backbone_bits", "lm_head_bits", "river"}
        setting = {*loading, "drafts", "batch_size", "sampling"}
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
        run("check-exact", "--prompts", path).check_fails(2, f"{path} can't be read as text")

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
        _check_refused(tmp_path, line)

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
        _check_refused(tmp_path, line)


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


def prefer_ngrams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft out of the text wherever it repeats, whatever that has brought so far."""
    monkeypatch.setattr(NgramSource, "best_length", lambda source, match, most, *_: (most, 1e9))


def _command(name: str, model: str, prompts: Path) -> list[object]:
    """A command in lossless mode."""
    if name == "check-exact":
        return [name, model, "--prompts", prompts, "-n", 4]
    return [name, *([PROMPT] if name == "generate" else []), "-m", model, *LOSSLESS, "-n", 4]


def _entries(river: Path) -> dict[str, Any]:
    """What was learnt beside a river, by its key."""
    content = json.loads((river / "drafts.json").read_text())
    assert content["format_version"] == 1
    entries: dict[str, Any] = content["entries"]
    return entries


def _check_refused(directory: Path, line: str) -> None:
    """The line is named where it comes second."""
    path = directory / "prompts.jsonl"
    path.write_text(f'{{"prompt": "one"}}\n{line}\n')
    outcome = run("check-exact", "--prompts", path)
    outcome.check_fails(2, f"{path}: object 2 is no prompt", "messages, turns or prompt")


def _terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What the commands write to stdout from now on, as to a terminal."""
    output = io.StringIO()
    terminal = Console(
        file=output,
        force_terminal=True,
        color_system="truecolor",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    monkeypatch.setattr(render, "stdout", terminal)
    return output


def _coloured(output: io.StringIO) -> list[tuple[tuple[int, ...], str]]:
    """The pieces that were written, with the red, green and blue of each."""
    pieces = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+)m(.*?)\x1b\[0m", output.getvalue(), re.DOTALL)
    return [(tuple(map(int, rgb)), text) for *rgb, text in pieces]


def _nearest(colour: tuple[int, ...]) -> Origin:
    """What a colour stands for: the strongest of red, green and blue."""
    origins: tuple[Origin, ...] = ("backbone", "river", "ngram")
    return origins[colour.index(max(colour))]


def _response(origin: Origin) -> GenerationResponse:
    """The next piece of a stream."""
    return GenerationResponse(
        text="x",
        token=1,
        exit_layer=NUM_LAYERS,
        finish_reason=None,
        prompt_tokens=1,
        generated_tokens=1,
        time_to_first_token=0.1,
        prompt_tokens_per_second=1.0,
        decode_tokens_per_second=None,
        mean_exit_layer=4.0,
        peak_memory_bytes=0,
        origin=origin,
    )
