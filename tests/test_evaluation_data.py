"""Items out of files and of the Hub's rows, and what is said of those that are wrong."""

from __future__ import annotations

import functools
import gzip
import io
import ssl
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from evaluation_items import ITEMS, write_items
from huggingface_hub import constants

from river_llm import ConfigError, DataError, MissingExtraError
from river_llm.evaluation import data
from river_llm.evaluation.data import (
    DataSource,
    HubSource,
    Record,
    data_directory,
    digest,
    read_json_lines,
    read_records,
)
from river_llm.evaluation.tasks import TASKS, TEXT_TASKS, check_task
from river_llm.evaluation.tasks.choice import CHOICE_TASKS
from river_llm.evaluation.tasks.generation import GENERATION_TASKS
from river_llm.evaluation.tasks.task import ChoiceTask

SOURCE = DataSource("sums*.jsonl", HubSource("org/sums", None, "test"))
CHOICES = {task.name: task for task in CHOICE_TASKS}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_items(tmp_path / "data", ITEMS)


class TestFiles:
    def test_every_task_finds_its_own(self, directory: Path) -> None:
        counts = {
            task.name: len(read_records(task.source, directory))
            for task in (*CHOICE_TASKS, *GENERATION_TASKS)
        }
        assert counts["gsm8k"] == 5
        assert counts["arc_challenge"] == 3  # not the file of examples
        assert counts["blimp"] == 6  # two files
        assert set(counts) | set(TEXT_TASKS) == set(TASKS)

    def test_a_packed_file_is_read_too(self, tmp_path: Path) -> None:
        (tmp_path / "sums.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}'))
        assert [r.fields for r in read_records(SOURCE, tmp_path)] == [{"a": 1}, {"a": 2}]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"a": 1}\n{"a": \n', r"sums\.jsonl, line 2: this is no JSON"),
            (b'{"a": 1}\n\n[1]\n', r"sums\.jsonl, line 3: this is no JSON object"),
            (b"\n \n", r"sums\.jsonl is empty"),
            (b'{"a": "\xe9"}', r"sums\.jsonl is no UTF-8 text"),
        ],
    )
    def test_a_line_that_is_none_is_named(
        self, tmp_path: Path, content: bytes, message: str
    ) -> None:
        (tmp_path / "sums.jsonl").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_records(SOURCE, tmp_path)

    def test_a_damaged_packed_file_is_named(self, tmp_path: Path) -> None:
        whole = gzip.compress(b'{"a": 1}\n' * 1000)
        (tmp_path / "sums.jsonl.gz").write_bytes(whole[:-20])
        with pytest.raises(DataError, match="can't be read"):
            read_records(SOURCE, tmp_path)

    def test_a_file_that_is_not_there_is_named_with_the_mend(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"has no file sums\*\.jsonl; put it there, or"):
            read_records(SOURCE, tmp_path)

    def test_two_files_for_one_are_refused(self, tmp_path: Path) -> None:
        write_items(tmp_path, {"sums_a.jsonl": [{}], "sums_b.jsonl": [{}]})
        with pytest.raises(DataError, match=r"several files .*: sums_a\.jsonl, sums_b\.jsonl"):
            read_records(SOURCE, tmp_path)

    def test_the_directory_may_come_from_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(data.ENVIRONMENT_VARIABLE, raising=False)
        assert data_directory(None) is None
        monkeypatch.setenv(data.ENVIRONMENT_VARIABLE, str(tmp_path))
        assert data_directory(None) == tmp_path
        with pytest.raises(DataError, match="no data directory"):
            data_directory(tmp_path / "none")

    def test_the_digest_is_of_the_content(self, tmp_path: Path) -> None:
        write_items(tmp_path, {"a.jsonl": [{"x": 1, "y": 2}], "b.jsonl": [{"y": 2, "x": 1}]})
        first, second = (list(read_json_lines(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
        assert digest(first) == digest(second) != digest([*first, *second])


class TestFields:
    @pytest.mark.parametrize(
        ("task", "change", "message"),
        [
            ("arc_easy", {"question": None}, "question is no text"),
            ("arc_easy", {"answer": 3}, "answer is 3, but there are 3 choices"),
            ("arc_easy", {"answer": -1}, "answer is -1"),
            ("arc_easy", {"answer": True}, "answer is no whole number"),
            ("arc_easy", {"choices": ["a"]}, "choices is no list of two"),
            ("arc_easy", {"choices": ["a", 2]}, "choices is no list of two"),
            ("arc_easy", {"choices": ["a", " "], "answer": 0}, "a choice is empty"),
            ("boolq", {"answer": "yes"}, "answer is no true or false"),
            ("winogrande", {"question": "no blank"}, "no blank"),
            ("winogrande", {"question": "at the end _"}, "no blank"),
            ("mmlu", {"choices": ["a"] * 11}, "11 choices"),
        ],
    )
    def test_a_wrong_one_is_named_with_its_line(
        self, directory: Path, task: str, change: dict[str, Any], message: str
    ) -> None:
        record = read_records(CHOICES[task].source, directory)[0]
        with pytest.raises(DataError, match=f"line 1: .*{message}"):
            CHOICES[task].question(Record({**record.fields, **change}, record.place))

    def test_a_missing_one_is_named(self) -> None:
        with pytest.raises(DataError, match="here: passage is missing"):
            CHOICES["boolq"].question(Record({"question": "x"}, "here"))


class TestQuestions:
    """The forms that lm-eval made common."""

    def question(self, task: str, directory: Path) -> Any:
        record = read_records(CHOICES[task].source, directory)[0]
        return CHOICES[task].question(record)

    def test_of_arc(self, directory: Path) -> None:
        question = self.question("arc_easy", directory)
        assert question.contexts == ("Question: What follows on 0?\nAnswer:",) * 3
        assert question.choices == (" 2", " 1", " nothing at all")
        assert question.answer == 1

    def test_of_boolq(self, directory: Path) -> None:
        question = self.question("boolq", directory)
        assert question.contexts[0] == "Water is wet.\nQuestion: is water wet?\nAnswer:"
        assert question.choices[question.answer] == " yes"

    def test_of_winogrande(self, directory: Path) -> None:
        question = self.question("winogrande", directory)
        assert question.contexts == (
            "The cup fell on the table and the cup",
            "The cup fell on the table and the table",
        )
        assert set(question.choices) == {" broke at once."}

    def test_of_mmlu(self, directory: Path) -> None:
        question = self.question("mmlu", directory)
        assert question.contexts[0] == "0 + 1 = ?\nA. 0\nB. 1\nC. 2\nD. none\nAnswer:"
        assert question.choices == (" A", " B", " C", " D")
        assert question.heading.endswith("about sums.\n\n")

    def test_of_blimp(self, directory: Path) -> None:
        question = self.question("blimp", directory)
        assert question.contexts == ("", "")
        assert (question.answer, question.group) == (0, "one")


HUB_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hellaswag": (
        {
            "activity_label": "Cooking",
            "ctx_a": "A man [substeps] cooks.",
            "ctx_b": "he",
            "endings": ["eats. [title] Then", "sleeps."],
            "label": "1",
        },
        {
            "context": "Cooking: A man cooks. He",
            "endings": ["eats.. Then", "sleeps."],
            "label": 1,
        },
    ),
    "arc_easy": (
        {
            "question": "Why?",
            "choices": {"text": ["a", "b"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        {"question": "Why?", "choices": ["a", "b"], "answer": 1},
    ),
    "openbookqa": (
        {
            "question_stem": "Why?",
            "choices": {"text": ["a", "b"], "label": ["A", "B"]},
            "answerKey": " A",
        },
        {"question": "Why?", "choices": ["a", "b"], "answer": 0},
    ),
    "winogrande": (
        {"sentence": "x _ y", "option1": "a", "option2": "b", "answer": "2"},
        {"question": "x _ y", "choices": ["a", "b"], "answer": 1},
    ),
    "ifeval": (
        {"key": 1, "kwargs": [{"num_words": None, "relation": "at least"}]},
        {"key": 1, "kwargs": [{"relation": "at least"}]},
    ),
}


IS_HUB_REACHED = data._is_hub_reached
HOST = constants.ENDPOINT
ANSWERS: dict[str, tuple[Exception | None, bool]] = {
    "an answer": (None, True),
    "a refusal": (urllib.error.HTTPError(HOST, 403, "forbidden", Message(), None), True),
    "another certificate": (urllib.error.URLError(ssl.SSLError("unknown issuer")), True),
    "no name": (urllib.error.URLError(OSError("no such host")), False),
    "no answer": (TimeoutError("timed out"), False),
}


class TestHub:
    @pytest.fixture
    def library(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        library = SimpleNamespace(asked=[])

        def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
            library.asked.append((name, config, split))
            return list(library.rows)

        library.load_dataset = load_dataset
        library.get_dataset_config_names = lambda name: ["two", "one"]
        monkeypatch.setattr(data, "import_extra", lambda module, purpose: library)
        monkeypatch.setattr(data, "_is_hub_reached", lambda: True)
        return library

    @pytest.mark.parametrize("task", HUB_ROWS)
    def test_rows_become_what_the_files_hold(self, library: SimpleNamespace, task: str) -> None:
        row, expected = HUB_ROWS[task]
        library.rows = [row]
        source = TASKS[task]
        assert source is not None
        (record,) = read_records(source.source, None)
        assert dict(record.fields) == expected

    def test_all_parts_are_joined(self, library: SimpleNamespace) -> None:
        library.rows = [{"UID": "x"}]
        assert len(read_records(CHOICES["blimp"].source, None)) == 2
        assert [asked[1] for asked in library.asked] == ["one", "two"]

    def test_a_row_of_another_form_is_refused(self, library: SimpleNamespace) -> None:
        library.rows = [{"nothing": 1}]
        with pytest.raises(DataError, match="allenai/ai2_arc, row 0: not as expected"):
            read_records(CHOICES["arc_easy"].source, None)

    def test_without_a_network_the_mend_is_told(
        self, library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def offline(*_: object, **__: object) -> None:
            raise ConnectionError("no route\nto host")

        library.load_dataset = offline
        with pytest.raises(DataError, match=r"no route to host\); without a network, --data-dir"):
            read_records(SOURCE, None)

    @pytest.mark.parametrize(("error", "is_reached"), ANSWERS.values(), ids=ANSWERS)
    def test_a_hub_that_is_not_reached_is_asked_once(
        self,
        library: SimpleNamespace,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception | None,
        is_reached: bool,
    ) -> None:
        offline: list[bool] = []
        asked: list[str] = []

        def ask(request: urllib.request.Request, timeout: float) -> io.BytesIO:
            asked.append(request.full_url)
            if error is not None:
                raise error
            return io.BytesIO()

        def load_dataset(*_: object, **__: object) -> list[dict[str, Any]]:
            offline.append(constants.HF_HUB_OFFLINE)
            return [{"n": 1}]  # from the cache, for example

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(data, "_is_hub_reached", functools.cache(IS_HUB_REACHED.__wrapped__))
        monkeypatch.setattr("urllib.request.urlopen", ask)
        library.load_dataset = load_dataset
        for _ in range(2):
            assert len(read_records(SOURCE, None)) == 1
        assert offline == [not is_reached] * 2
        assert asked == [constants.ENDPOINT]
        assert not constants.HF_HUB_OFFLINE

    @pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()], ids=repr)
    def test_whatever_comes_between_the_hub_stays_online(
        self, library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: BaseException
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(data, "_is_hub_reached", lambda: False)
        library.load_dataset = fail
        with pytest.raises((DataError, KeyboardInterrupt)):
            read_records(SOURCE, None)
        assert not constants.HF_HUB_OFFLINE

    def test_without_the_library_the_mend_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(module: str, purpose: str) -> None:
            raise MissingExtraError(f"{purpose} needs {module}")

        monkeypatch.setattr(data, "import_extra", missing)
        with pytest.raises(MissingExtraError, match="org/sums of the Hub needs datasets"):
            read_records(SOURCE, None)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "near"), [("gsm8", "gsm8k"), ("arc-easy", "arc_easy"), ("MMLU", "mmlu")]
    )
    def test_the_nearest_are_told(self, name: str, near: str) -> None:
        with pytest.raises(ConfigError, match=f"no task '{name}'; did you mean .*{near}"):
            check_task(name)

    def test_where_none_is_near_all_are(self) -> None:
        with pytest.raises(ConfigError, match=r"there are gsm8k, .*, kld"):
            check_task("xxxxxxxx")

    def test_every_task_has_a_name(self) -> None:
        for name in TASKS:
            check_task(name)
        assert all(isinstance(task, ChoiceTask) for task in CHOICE_TASKS)
