"""Lossless mode beside the backbone: the first token that differs, and speeds."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from lossless_lm import NUM_LAYERS, PROMPTS, RANDOM, lm_on

from river_llm import ConfigError, ContextFullError, DraftConfig, ExitPolicy, RiverLM
from river_llm.cli.check_exact import read_prompts
from river_llm.measure.exactness import Exactness, check_exactness

pytest_plugins = ["cli_models"]

Change = Callable[[list[int]], list[int]]
DRAFTS = DraftConfig(2, NUM_LAYERS, ngram=False)


@pytest.fixture(params=["torch", "cpu"])
def lm(request: pytest.FixtureRequest) -> RiverLM:
    return lm_on(request.param)


def spoil(patched: pytest.MonkeyPatch, lm: RiverLM, change: Change, policy: Any = None) -> None:
    """Change the tokens of the second prompt's answer in lossless mode, or by another policy."""
    generate_batch = lm.generate_batch

    def spoilt(prompts: list[str], **settings: Any) -> Any:
        results = generate_batch(prompts, **settings)
        return [
            dataclasses.replace(result, tokens=change(result.tokens))
            if settings["policy"] == policy and prompt == PROMPTS[1]
            else result
            for prompt, result in zip(prompts, results, strict=True)
        ]

    patched.setattr(lm, "generate_batch", spoilt)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("sampling", [{}, RANDOM], ids=["greedy", "sampled"])
def test_a_check_finds_the_backbones_tokens(
    lm: RiverLM, batch_size: int, sampling: dict[str, Any]
) -> None:
    done: list[tuple[int, int]] = []
    found = check_exactness(
        lm,
        PROMPTS,
        raw=True,
        drafts=DRAFTS,
        batch_size=batch_size,
        progress=lambda *steps: done.append(steps),
        max_new_tokens=13,
        **sampling,
    )
    assert (found.prompts, found.tokens, found.differences) == (4, 52, [])
    assert found.speed_up == pytest.approx(
        found.lossless_tokens_per_second / found.backbone_tokens_per_second
    )
    assert found.tokens_per_verification == 3
    assert found.draft_share == pytest.approx(2 / 3)
    assert found.ngram_share == 0
    assert 0 < found.draft_time_share < 1
    assert list(found.speed_up_quartiles) == sorted(found.speed_up_quartiles)
    assert done[-1] == (4, 4)
    assert len(done) == -(-4 // batch_size)


class TestADifference:
    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_is_the_first_token_that_is_another(
        self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch, batch_size: int
    ) -> None:
        spoil(monkeypatch, lm, lambda tokens: [*tokens[:3], tokens[3] + 1, *tokens[4:]])
        found = check_exactness(lm, PROMPTS, raw=True, batch_size=batch_size, max_new_tokens=6)
        (difference,) = found.differences
        tokens = lm.generate(
            PROMPTS[1], raw=True, policy=ExitPolicy.never(), max_new_tokens=6
        ).tokens
        assert (difference.prompt, difference.place) == (1, 3)
        assert (difference.backbone, difference.lossless) == (tokens[3], tokens[3] + 1)
        assert difference.top_tokens[0] == tokens[3]
        assert difference.top_logits[0] > difference.top_logits[1]

    def test_may_be_that_one_has_ended(self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch) -> None:
        for policy, ended in ((None, "lossless"), (ExitPolicy.never(), "backbone")):
            with monkeypatch.context() as patched:
                spoil(patched, lm, lambda tokens: tokens[:4], policy)
                found = check_exactness(lm, PROMPTS[:2], raw=True, max_new_tokens=6)
            (difference,) = found.differences
            assert (difference.place, getattr(difference, ended)) == (4, None)
            assert bool(difference.top_tokens) == (ended == "lossless")


def test_a_check_that_makes_no_sense_is_refused(lm: RiverLM) -> None:
    for prompts, settings, error, part in (
        ([], {}, ConfigError, "give one prompt or more"),
        (PROMPTS, {"batch_size": 0}, ConfigError, "in batches of one or more"),
        (PROMPTS, {"temperature": 1.0}, ConfigError, "with a seed only"),
        (["a", ""], {}, ConfigError, "^prompt 2: the prompt is empty"),
        (["a", "b", "x" * 65], {"raw": True}, ContextFullError, "^prompt 3: the prompt has 65"),
        (["a"], {"heat": 1}, ConfigError, "there is no setting 'heat'"),
    ):
        with pytest.raises(error, match=part):
            check_exactness(lm, prompts, **settings)  # type: ignore[arg-type]


def test_a_check_that_is_interrupted_tells_what_it_found(
    lm: RiverLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_batch, calls = lm.generate_batch, iter(range(10))

    def interrupted(*args: Any, **settings: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return generate_batch(*args, **settings)

    monkeypatch.setattr(lm, "generate_batch", interrupted)
    found = check_exactness(lm, PROMPTS, raw=True, max_new_tokens=3)
    assert (found.prompts, found.tokens, found.interrupted) == (2, 6, True)
    assert len(lm.engine.sequences()) == 0


class TestCommand:
    def test_tells_in_words_and_in_json(self, model: str, prompts: Path) -> None:
        outcome = run("check-exact", model, "--prompts", prompts, "-n", 12, "--batch-size", 2)
        assert (outcome.exit_code, outcome.stderr) == (0, "")
        same, speed = outcome.stdout.splitlines()
        assert same == "3 of 3 prompts have the backbone's own tokens (36 in all)"
        assert re.match(
            r"backbone \d+\.\d tokens/s, lossless \d+\.\d: \d+\.\d\dx, quartiles", speed
        )
        output = run("check-exact", model, "--prompts", prompts, "-n", 4, "--json").json
        assert {field.name for field in dataclasses.fields(Exactness)} <= set(output)
        assert (output["prompts"], output["tokens"], output["differences"]) == (3, 12, [])
        assert output["drafts"]["tokens"] is None

    def test_ends_with_1_where_a_token_differs(
        self, model: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "river_llm.generate.generator.accept",
            lambda drafted, choose: [choose(0) + 1 if drafted else choose(0)],
        )
        options = ("-n", 6, "--limit", 1, "--draft-tokens", 2)
        outcome = run("check-exact", model, "--prompts", prompts, *options)
        assert outcome.exit_code == 1
        difference, same, _ = outcome.stdout.splitlines()
        assert re.fullmatch(
            r"prompt 1, token 2: the backbone has '.*', lossless mode '.*'; argmax there: "
            r"'.*' -?\d+\.\d{4}, '.*' -?\d+\.\d{4}",
            difference,
        )
        assert same.startswith("0 of 1 prompts have the backbone's own tokens")

    def test_reads_lines_and_objects(self, tmp_path: Path) -> None:
        (lines := tmp_path / "prompts.txt").write_bytes(b'one\r\n\n \ntwo  {"prompt": 3}')
        assert read_prompts(lines) == ["one", 'two  {"prompt": 3}']
        turn = {"role": "user", "content": "two"}
        entries = [{"prompt": "one\u2028"}, {"messages": [turn]}, {"turns": ["three", "no"]}]
        objects = tmp_path / "prompts.jsonl"
        objects.write_text("\n".join(json.dumps(one, ensure_ascii=False) for one in entries))
        assert read_prompts(objects) == ["one\u2028", [turn], "three"]

    @pytest.mark.parametrize(
        ("name", "content", "part"),
        [
            ("prompts.txt", b"\n \n\t\n", "holds no prompt"),
            ("prompts.jsonl", b"", "holds no prompt"),
            ("prompts.txt", b"caf\xe9", "is no UTF-8 text"),
            ("prompts.txt", None, "can't be read"),
            ("prompts.jsonl", b'{"prompt": 3}', "object 1 is no prompt"),
            ("prompts.jsonl", b'{"prompt": "a"}\n{"turns": "b"}', "object 2 is no prompt"),
            ("prompts.jsonl", b'{"messages": []}', "object 1 is no prompt"),
            ("prompts.jsonl", b"[" * 100_000, "object 1 is no prompt"),
        ],
    )
    def test_refuses_files_without_prompts(
        self, tmp_path: Path, name: str, content: bytes | None, part: str
    ) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        run("check-exact", "--prompts", tmp_path / name).check_fails(2, part)
