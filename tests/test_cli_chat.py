"""`river-llm chat`, and Ctrl-C in it and in `generate`."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from command_line import Outcome, run, start

from river_llm import Conversation, ExitPolicy, RiverLM
from river_llm.engines import CpuEngine, Step, StepResult

pytest_plugins = ["cli_models"]

PROMPT = "Name three rivers."
NEVER = ("--policy", "never")
_ANNOUNCE = """
import sys
from river_llm.cli import main
from river_llm.lm import RiverLM
stream = RiverLM.stream_tokens
def announced(*args, **kwargs):
    for count, response in enumerate(stream(*args, **kwargs)):
        if count == 5:
            print("streaming", file=sys.stderr, flush=True)
        yield response
RiverLM.stream_tokens = announced
main()
"""


def chat(model: str, stdin: str, *options: object) -> Outcome:
    """A conversation of short answers."""
    outcome = run("chat", "-m", model, "-n", 6, *options, stdin=stdin)
    assert outcome.exit_code == 0
    assert "Traceback" not in outcome.stderr
    return outcome


class TestChat:
    def test_goes_on_from_turn_to_turn(self, model: str) -> None:
        first, second = (chat(model, f"{line}\n").stdout for line in ("Hello", "And you?"))
        both = chat(model, "Hello\nAnd you?\n")
        assert both.stdout.startswith(first)
        assert both.stdout != first + second
        assert len(both.stdout) > len(first)
        assert both.stderr.count("6 tokens (length)") == 2
        assert "/clear" in both.stderr.splitlines()[0]

    def test_clear_starts_anew(self, model: str) -> None:
        first, both = chat(model, "Hello\n").stdout, chat(model, "Hello\nAnd you?\n").stdout
        assert chat(model, "Hello\nAnd you?\n /clear \nHello\n").stdout == both + first

    @pytest.mark.parametrize("end", ["/exit", "/quit"])
    def test_exit_ends_and_empty_lines_are_no_turns(self, model: str, end: str) -> None:
        cut = chat(model, f"\n  \nHello\n\n{end}\nAnd you?\n")
        assert cut.stdout == chat(model, "Hello\n").stdout
        assert chat(model, f"{end}\n").stdout == ""

    def test_an_unknown_command_is_no_turn(self, model: str) -> None:
        line = " /Exit "
        outcome = chat(model, f"{line}\nHello\n")
        assert outcome.stdout == chat(model, "Hello\n").stdout
        first, second = outcome.stderr.splitlines()[:2]
        assert "/clear" in first
        assert second == f"unknown command {line.strip()}; {first}"

    def test_a_line_that_only_begins_with_a_slash_is_a_turn(self, model: str) -> None:
        lines = "/tmp is full, what now?\n/usr/bin\n/ is a slash\n"
        assert chat(model, lines).stderr.count("6 tokens (length)") == 3

    @pytest.mark.parametrize("options", [(), ("--exit-layer", 1)], ids=["lossless", "river"])
    def test_a_line_is_the_message(self, model: str, options: tuple[object, ...]) -> None:
        stdin = "Hello\n"
        policy = ExitPolicy.fixed(1) if options else None
        lm = RiverLM.from_pretrained(model, policy=policy, device="cpu")
        conversation = Conversation(lm, "Be brief.", max_new_tokens=6)
        expected = "".join(response.text for response in conversation.stream("Hello"))
        outcome = chat(model, stdin, *options, "--system", "Be brief.")
        assert outcome.stdout == f"{expected}\n"
        assert chat(model, stdin, *options).stdout != outcome.stdout
        assert ("lossless: " in outcome.stderr) == (not options)

    def test_a_full_context_is_a_line_and_no_end(self, other_model: str) -> None:
        long = "river " * 100
        outcome = chat(other_model, f"Hello\n{long}\n/clear\nHello\n")
        assert outcome.stdout == 2 * chat(other_model, "Hello\n").stdout
        full = [line for line in outcome.stderr.splitlines() if "context" in line]
        assert len(full) == 1
        assert "holds 96" in full[0]
        assert full[0].endswith("/clear starts a new conversation")

    def test_an_answer_ends_where_the_context_does(self, other_model: str) -> None:
        outcome = chat(other_model, "Hello\nAgain\n", "-n", 500)
        assert "tokens (context)" in outcome.stderr
        assert "/clear starts a new conversation" in outcome.stderr.splitlines()[-1]

    def test_a_model_without_chat_template_is_refused(self, model: str, tmp_path: Path) -> None:
        for path in Path(model).iterdir():
            if path.name != "chat_template.jinja":
                (tmp_path / path.name).symlink_to(path)
        run("chat", "-m", tmp_path, stdin="Hello\n").check_fails(1, "no chat template", "--raw")
        options = ("-n", 4, "--json")
        raw = run("generate", PROMPT, "-m", model, "--raw", *options).json
        assert run("generate", PROMPT, "-m", tmp_path, *options).json["tokens"] == raw["tokens"]


class TestCtrlC:
    @pytest.mark.parametrize("steps", [1, 4])
    def test_in_a_chat_ends_the_answer_only(
        self, model: str, steps: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = chat(model, "Hello\n", *NEVER).stdout
        interrupt(monkeypatch, steps)
        outcome = chat(model, "Hello\n/clear\nHello\n", *NEVER)
        answers = outcome.stdout.removesuffix(whole)
        assert whole.startswith(answers.removesuffix("\n"))
        assert 1 < len(answers) < len(whole)
        assert f"{steps} tokens (interrupted)" in outcome.stderr
        assert "6 tokens (length)" in outcome.stderr

    @pytest.mark.parametrize("steps", [0, 1, 5])
    def test_gives_what_has_come(
        self, model: str, steps: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("generate", PROMPT, "-m", model, "-n", 8, "--exit-layer", 2)
        whole = run(*command, "--json").json
        interrupt(monkeypatch, steps)
        output = run(*command, "--json").json
        assert output["finish_reason"] == "interrupted"
        assert output["tokens"] == whole["tokens"][:steps]
        assert output["exit_layers"] == [4, 2, 2, 2, 2][:steps]
        assert whole["text"].startswith(output["text"])
        assert (output["time_to_first_token"] is None) == (steps == 0)

    def test_in_lossless_mode_gives_what_was_verified(
        self, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("generate", PROMPT, "-m", model, "-n", 30, "--json")
        whole = run(*command).json
        interrupt(monkeypatch, 3)
        output = run(*command).json
        assert output["finish_reason"] == "interrupted"
        assert 3 <= len(output["tokens"]) < 30
        assert output["tokens"] == whole["tokens"][: len(output["tokens"])]

    @pytest.mark.parametrize("steps", [3, 20], ids=["answer", "comparison"])
    def test_before_a_comparison_is_done_leaves_the_answer(
        self, model: str, steps: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        command = ("generate", PROMPT, "-m", model, "-n", 8, "--json", *NEVER)
        whole = run(*command).json
        interrupt(monkeypatch, steps)
        outcome = run(*command, "--compare")
        assert outcome.exit_code == 130
        assert outcome.stderr.endswith("interrupted before the comparison was done\n")
        output = json.loads(outcome.stdout)
        assert output["tokens"] == whole["tokens"][:steps]
        assert "comparison" not in output

    @pytest.mark.parametrize(
        "command",
        [
            "generate Hi -m",
            "chat -m",
            "inspect",
            "build -o river",
            "bench -m",
            "check-exact --prompts prompts.txt",
        ],
    )
    def test_while_a_model_loads_is_one_line(
        self, command: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*args: object, **options: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.chdir(tmp_path)
        Path("prompts.txt").write_text(PROMPT)
        monkeypatch.setattr("river_llm.cli.loading.import_libraries", interrupted)
        outcome = run(*command.split(), model)
        outcome.check_fails(130, "interrupted")
        assert outcome.stderr == "river-llm: interrupted\n"
        assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]

    @pytest.mark.parametrize("options", [(), ("--exit-layer", 1)], ids=["lossless", "river"])
    def test_as_a_signal_in_a_stream_of_text(self, model: str, options: tuple[object, ...]) -> None:
        process = start("generate", PROMPT, "-m", model, "-n", 50_000, *options)
        assert process.stdout
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert (first + rest).endswith(b"\n")
        assert b"tokens (interrupted)" in errors
        assert b"Traceback" not in errors

    def test_as_a_signal_leaves_one_json_object(self, model: str) -> None:
        command = ("generate", PROMPT, "-m", model, "-n", 50_000, "--exit-layer", 1, "--json")
        process = start(*command, python=("-c", _ANNOUNCE))
        assert process.stderr
        assert process.stderr.readline() == b"streaming\n"
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert stderr == b""
        output = Outcome(process.returncode, stdout.decode(), "").json
        assert output["finish_reason"] == "interrupted"
        assert 5 <= len(output["tokens"]) == len(output["exit_layers"]) < 50_000


def interrupt(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Raise KeyboardInterrupt, once, in place of the native engine's next step but so many."""
    forward = CpuEngine.forward
    left = iter(range(steps, -1, -1))

    def interrupted(self: CpuEngine, step: Step) -> StepResult:
        if next(left, None) == 0:
            raise KeyboardInterrupt
        return forward(self, step)

    monkeypatch.setattr(CpuEngine, "forward", interrupted)
