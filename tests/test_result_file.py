"""Result files: whole or not, cut anywhere, of another run, of two writers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_llm import ResultFileError
from river_llm.evaluation.result_file import FORMAT_VERSION, ResultWriter, read_result

RUN = {"task": "sums", "policy": {"kind": "similarity", "threshold": 0.97}, "data": "sha256:1"}


def write_whole(path: Path, items: int = 3) -> bytes:
    with ResultWriter(path, RUN) as writer:
        writer.begin_part({"command": "first"})
        for identity in range(items):
            writer.add_items([{"id": identity, "correct": True, "answer": "é\ud800\n"}])
        writer.end({"items": items})
    return path.read_bytes()


class TestWhole:
    def test_what_was_written_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "sums.jsonl"
        write_whole(path)
        result = read_result(path)
        assert result.summary == {"items": 3}
        assert list(result.items) == [0, 1, 2]
        assert result.run["task"] == "sums"
        assert [part["command"] for part in result.parts] == ["first"]

    @given(st.data())
    def test_a_file_cut_anywhere_is_never_whole_and_goes_on(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        path = tmp_path_factory.mktemp("cut") / "sums.jsonl"
        whole = write_whole(path)
        cut = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:cut])
        if whole[:cut].count(b"\n"):
            assert read_result(path).summary is None
        with ResultWriter(path, RUN) as writer:
            known = dict(writer.result.items)
            assert list(known) == list(range(len(known)))
            writer.begin_part({"command": "second"})
            writer.add_items([{"id": i, "correct": True} for i in range(3) if i not in known])
            writer.end({"items": 3})
        result = read_result(path)
        assert list(result.items) == [0, 1, 2]
        assert result.summary == {"items": 3}

    def test_more_items_may_follow_later(self, tmp_path: Path) -> None:
        path = tmp_path / "sums.jsonl"
        write_whole(path)
        with ResultWriter(path, RUN) as writer:
            writer.begin_part({"command": "second"})
            writer.add_items([{"id": 3, "correct": False}])
            assert read_result(path).summary is None
            writer.end({"items": 4})
        assert len(read_result(path).items) == 4
        assert len(read_result(path).parts) == 2

    def test_opening_a_whole_file_changes_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "sums.jsonl"
        whole = write_whole(path)
        with ResultWriter(path, RUN) as writer:
            assert writer.result.summary == {"items": 3}
        assert path.read_bytes() == whole


class TestOtherRuns:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"task": "products"}, r'task is "sums" there and "products" here'),
            (
                {"policy": {"kind": "similarity", "threshold": 0.9}},
                r"policy\.threshold is 0\.97 there and 0\.9 here",
            ),
            ({"shots": 8}, "shots is null there and 8 here"),
        ],
    )
    def test_are_refused_and_left_alone(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        path = tmp_path / "sums.jsonl"
        whole = write_whole(path)
        with pytest.raises(ResultFileError, match=f"{message}.*--output another folder"):
            ResultWriter(path, {**RUN, **change})
        assert path.read_bytes() == whole

    def test_restart_begins_anew(self, tmp_path: Path) -> None:
        path = tmp_path / "sums.jsonl"
        write_whole(path)
        with ResultWriter(path, {**RUN, "shots": 8}, restart=True) as writer:
            assert writer.result.items == {}
        assert read_result(path).run["shots"] == 8


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


FIRST = line(kind="run", format_version=FORMAT_VERSION)


class TestDamage:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (FIRST + b"{oh\n" + line(kind="item", id=1), "line 2: this is no line"),
            (FIRST + b"[1]\n", "line 2: this is no line"),
            (FIRST + line(id=1), "line 2: this is no line"),
            (FIRST + line(kind="item", id="x"), "line 2: item 'x'"),
            (FIRST + line(kind="item", id=1) * 2, "line 3: item 1 .*twice"),
            (FIRST + line(kind="else"), "line 2: there is no kind 'else'"),
            (FIRST + line(kind="summary", items=2), "line 2: the summary is of 2"),
            (FIRST + line(kind="summary", items=0) + line(kind="part"), "line 3: nothing may"),
            (FIRST + FIRST, "line 2: a result begins"),
            (line(kind="item", id=1), "line 1: a result begins"),
            (line(kind="run", format_version=9), "has format version 9"),
            (b"my notes, without an end", "is no result file"),
        ],
    )
    def test_is_told_with_its_line_and_left_alone(
        self, tmp_path: Path, content: bytes, message: str
    ) -> None:
        path = tmp_path / "sums.jsonl"
        path.write_bytes(content)
        with pytest.raises(ResultFileError, match=message):
            read_result(path)
        with pytest.raises(ResultFileError, match=message):
            ResultWriter(path, {})
        assert path.read_bytes() == content

    def test_a_file_that_is_not_there_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(ResultFileError, match="can't be read: No such file"):
            read_result(tmp_path / "none.jsonl")

    def test_a_folder_that_cannot_be_made_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(ResultFileError, match="can't be written"):
            ResultWriter(tmp_path / "file" / "sums.jsonl", RUN)


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    code = (
        "from pathlib import Path\n"
        "from river_llm.evaluation.result_file import ResultWriter\n"
        f"ResultWriter(Path({str(path)!r}), {{}}, restart=True)\n"
    )
    with ResultWriter(path, RUN):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is being written by another process" in other.stderr
    assert read_result(path).run["task"] == "sums"
