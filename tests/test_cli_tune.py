"""`river-llm tune`: the whole command, what it saves, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from command_line import run

from river_llm import ExitPolicy, RiverLM
from river_llm.river.tuned import Tuned

pytest_plugins = ["cli_models"]

# little is lost by any setting, and nothing is slow
QUICK = ("--sequences", 24, "--tokens", 20, "--rounds", 1, "--threads", 1)
BUDGET = ("--budget", "kld=0.5")


@pytest.fixture(scope="module")
def river(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune") / "river4"
    assert run("build", model, "-o", folder).exit_code == 0
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("A river begins where water gathers, and ends in the sea. " * 80)
    return path


def test_the_whole_command(model: str, river: Path, tmp_path: Path) -> None:
    other = tmp_path / "river8"
    assert run("build", model, "-o", other, "--bits", 8).exit_code == 0
    plot = tmp_path / "front.svg"
    rivers = ("--river", river, "--river", other)
    output = run("tune", model, *rivers, *BUDGET, *QUICK, "--plot", plot, "--json").json
    chosen = output["chosen"]
    assert chosen["budget"] == "kld=0.5"
    assert chosen["data"] == "text that the model writes"
    settings = output["settings"]
    assert settings[0]["setting"] == "never leaves"
    assert settings[0]["speed_up"] == {"median": 1, "lowest": 1, "highest": 1}
    assert [one["river"] for one in settings if one["setting"] == "lossless"] == [
        str(river),
        str(other),
    ]
    assert len(settings) + output["slower_settings"] > 8
    assert 0 <= max(one["kld"] for one in settings) < 0.5
    assert "kld=0.5" in plot.read_text()
    tuned = Tuned.load(Path(chosen["river"]))
    assert tuned is not None
    assert json.loads(json.dumps({**tuned.to_dict(), "river": chosen["river"]})) == chosen

    taken = ("--river", chosen["river"])
    answer = run("generate", "Hm", "--model", model, *taken, "--policy", "tuned", "-n", 3, "--json")
    assert answer.json["policy"] == (None if tuned.policy is None else tuned.policy.to_dict())
    assert RiverLM.from_pretrained(model, chosen["river"], "tuned").policy == tuned.policy
    assert run("inspect", model, *taken, "--json").json["tuned"]["budget"] == "kld=0.5"
    assert f"tuned: {tuned.describe()}" in run("inspect", model, *taken).stdout


@pytest.mark.parametrize(("engine", "data"), [("cpu", "--text"), ("torch", "--prompts")])
def test_tables_on_given_texts_and_prompts(
    model: str, river: Path, tmp_path: Path, text: Path, engine: str, data: str
) -> None:
    path = text
    if data == "--prompts":
        path = tmp_path / "prompts.txt"
        path.write_text("".join(f"Name river number {i}.\n" for i in range(24)))
    outcome = run(
        *("tune", model, "--river", river, "--budget", "agreement=0.2", data, path),
        *(*QUICK, "--engine", engine, "--confidence", 0.9),
    )
    assert outcome.exit_code == 0, outcome.stderr
    for word in ("never leaves", "lossless", "(chosen)", "x backbone", "agreement"):
        assert word in outcome.stdout
    tuned = Tuned.load(river)
    assert tuned is not None
    assert tuned.engine == engine
    assert path.name in tuned.data
    assert f"{river}: {tuned.describe()}\n" in outcome.stdout
    assert f"it is saved with the river: --river {river} --policy tuned\n" in outcome.stdout


def test_a_budget_that_no_setting_keeps_is_answered(model: str, river: Path) -> None:
    outcome = run("tune", model, "--river", river, "--budget", "kld=1e-9", *QUICK)
    assert outcome.exit_code == 0
    assert "never leave" in outcome.stdout


def test_a_result_that_cannot_be_saved_is_shown(
    model: str, river: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("river_llm.river.tuned.atomic_write", Mock(side_effect=OSError("full")))
    outcome = run("tune", model, "--river", river, *BUDGET, *QUICK)
    assert outcome.exit_code == 1
    assert "(chosen)" in outcome.stdout
    assert "it is saved" not in outcome.stdout
    assert outcome.stderr.endswith(f"can't write to {river / 'tuned.json'}: full\n")


@pytest.fixture
def tuned(model: str, river: Path) -> Callable[..., None]:
    """Tune the river to something by hand."""

    def save(policy: ExitPolicy | None, **widths: int) -> None:
        Tuned(
            policy=policy,
            budget="kld=0.5",
            certified=None,
            confidence=0.95,
            sequences=0,
            tokens=20,
            cut_sequences=0,
            loss=0.0,
            held_out_loss=None,
            speed_up=1.5,
            data="notes.txt",
            data_digest="abc",
            seed=0,
            widths={"backbone_bits": 16, "lm_head_bits": 16, "kv_bits": 16, **widths},
            engine="cpu",
            run={},
        ).save(river)

    return save


def test_the_widths_of_the_measurement_are_told(
    model: str, river: Path, tuned: Callable[..., None]
) -> None:
    tuned(ExitPolicy.fixed(2), kv_bits=8)
    named = ("--model", model, "--river", river, "--policy", "tuned")
    outcome = run("generate", "Hm", *named, "-n", 2, "--json")
    assert outcome.json["kv_bits"] == 8
    assert "the KV cache is in 8 bits: the answers are not exactly the model's" in outcome.stderr


@pytest.mark.parametrize(
    ("policy", "kind", "is_told"),
    [(None, "never", False), (ExitPolicy.fixed(2, second_look=0.4), "fixed", True)],
)
def test_inspect_takes_what_was_tuned(
    model: str,
    river: Path,
    tuned: Callable[..., None],
    policy: ExitPolicy | None,
    kind: str,
    is_told: bool,
) -> None:
    tuned(policy)
    outcome = run(
        *("inspect", model, "--river", river, "--policy", "tuned"),
        *("--text", "The river runs to the sea.", "--json"),
    )
    assert outcome.json["policy"]["kind"] == kind
    assert ("second look is left out" in outcome.stderr) == is_told


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    river: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    access = os.access

    def denied(path: Path, mode: int) -> bool:
        return access(path, mode) and not (Path(path) == river and mode & os.W_OK)

    monkeypatch.setattr("os.access", denied)
    outcome = run("tune", "no-such-model", "--river", river, *BUDGET)
    outcome.check_fails(1, f"{river} can't be written to")


def test_a_prompt_that_does_not_fit_is_named_by_its_place(other_model: str, tmp_path: Path) -> None:
    river, prompts = tmp_path / "river", tmp_path / "prompts.txt"
    assert run("build", other_model, "-o", river, "--quantizer", "hqq").exit_code == 0
    lines = ["Name a river."] * 24
    lines[16] = "water " * 200
    prompts.write_text("\n".join(lines))
    outcome = run("tune", other_model, "--river", river, *BUDGET, "--prompts", prompts)
    assert outcome.exit_code == 1
    assert outcome.stdout == ""
    assert "prompt 17 of 24: the prompt has" in outcome.stderr


def test_what_is_wrong_is_one_line(
    model: str, other_model: str, river: Path, text: Path, tmp_path: Path
) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("")
    short.write_text("Some words. " * 30)
    command = ("tune", model, "--river", river)
    for options, exit_code, words in [
        (("--budget", "much"), 2, "the budget is 'much'; give kld=0.05, agreement=0.95 or"),
        (("--budget", "agreement=95"), 2, "agreement takes a share between 0 and 1"),
        (("--budget", "speed=500", *QUICK), 1, "no setting has 500 times the backbone's speed"),
        ((*BUDGET, "--text", empty), 1, "empty.txt: 0 sequences of 128 tokens"),
        ((*BUDGET, "--text", short), 1, "22, half of them to certify, 2816 tokens in all"),
        ((*BUDGET, "--text", text, "--prompts", text), 2, "--text or --prompts, not both"),
        ((*BUDGET, "--text", tmp_path / "none.txt"), 2, "none.txt"),
        ((*BUDGET, "--raw"), 2, "go with --prompts"),
        ((*BUDGET, "--confidence", 1), 2, "--confidence is 1.0; it must be between"),
        ((*BUDGET, "--plot", "front.txt"), 2, "--plot writes"),
        ((*BUDGET, "--tokens", 200_000), 1, "200000 tokens don't fit the model's context"),
    ]:
        run(*command, *options).check_fails(exit_code, words)
    # known before anything is loaded
    for options in (("--sequences", 21), ("--prompts", short)):
        few = run("tune", "no-such-model", "--river", river, *BUDGET, *options)
        few.check_fails(1, "needs 22, half of them to certify")
    run("tune", other_model, "--river", river, *BUDGET).check_fails(1, "built for other weights")
    nowhere = run("tune", model, "--river", tmp_path / "nothing", *BUDGET)
    nowhere.check_fails(1, "holds no river.json")
    untuned = run("generate", "Hm", "--model", model, "--policy", "tuned")
    untuned.check_fails(1, "there is no tuned policy")
    tuned_prefill = run("generate", "Hm", "--policy", "tuned", "--prefill", "river")
    tuned_prefill.check_fails(2, "a tuned policy brings its own prefill")
