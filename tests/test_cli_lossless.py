"""Lossless mode on the command line: `generate` and `chat`."""

from __future__ import annotations

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
from command_line import run, start
from rich.console import Console
from test_cli import FIELDS, PROMPT, answer
from test_cli_chat import chat, interrupt
from test_cli_errors import no_loading  # noqa: F401 - a fixture

from river_llm import (
    Conversation,
    ExitPolicy,
    GenerationResponse,
    River,
    RiverLM,
)
from river_llm.cli import render
from river_llm.engines import CpuEngine, TorchEngine
from river_llm.lossless import LosslessStatistics, Origin
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
        outcome.check_fails(130, "interrupted after 0 of 3 prompts")

    def test_in_check_exact_leaves_what_was_found(
        self, model: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("check-exact", model, "--prompts", prompts, "-n", 6)
        whole = run(*command, "--json").json
        assert whole["interrupted"] is False
        for options in ([], ["--json"]):
            interrupt(monkeypatch, "prefill", 3)  # of the second prompt's second answer
            outcome = run(*command, *options)
            assert outcome.exit_code == 130
            assert outcome.stderr == "river-llm: interrupted after 1 of 3 prompts\n"
            if options:
                found = json.loads(outcome.stdout)
                assert set(found) == set(whole)
                assert (found["interrupted"], found["prompts"]) == (True, 1)
                assert (found["differences"], found["tokens"]) == ([], 6)
            else:
                assert "1 of 1 prompts have the backbone's own tokens (6 in all)" in outcome.stdout


def test_check_exact_names_a_prompt_that_is_too_long_before_any_is_answered(
    other_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer_none(*args: object) -> None:
        raise AssertionError("a prompt is answered")

    monkeypatch.setattr(CpuEngine, "prefill", answer_none)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"Hello\n\n{'river ' * 100}\n")
    outcome = run("check-exact", other_model, "--prompts", prompts)
    outcome.check_fails(1, "prompt 2: the prompt has", "holds 96")


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


def check_refused(directory: Path, line: str) -> None:
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
