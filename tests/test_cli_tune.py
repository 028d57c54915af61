"""`river-llm tune`: the whole command, what it saves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run

from river_llm import RiverLM
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
        ((*BUDGET, "--text", empty), 1, "empty.txt: 0 sequences"),
        ((*BUDGET, "--text", short), 1, "needs 22, half of them to certify"),
        ((*BUDGET, "--text", text, "--prompts", text), 2, "--text or --prompts, not both"),
        ((*BUDGET, "--text", tmp_path / "none.txt"), 2, "none.txt"),
        ((*BUDGET, "--raw"), 2, "go with --prompts"),
        ((*BUDGET, "--confidence", 1), 2, "--confidence is 1.0; it must be between"),
        ((*BUDGET, "--plot", "front.txt"), 2, "--plot writes"),
        ((*BUDGET, "--tokens", 200_000), 1, "200000 tokens don't fit the model's context"),
    ]:
        run(*command, *options).check_fails(exit_code, words)
    run("tune", other_model, "--river", river, *BUDGET).check_fails(1, "built for other weights")
    nowhere = run("tune", model, "--river", tmp_path / "nothing", *BUDGET)
    nowhere.check_fails(1, "holds no river.json")
    untuned = run("generate", "Hm", "--model", model, "--policy", "tuned")
    untuned.check_fails(1, "there is no tuned policy")
    tuned_prefill = run("generate", "Hm", "--policy", "tuned", "--prefill", "river")
    tuned_prefill.check_fails(2, "a tuned policy brings its own prefill")
