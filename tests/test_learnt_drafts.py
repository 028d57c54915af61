"""What was learnt about drafts, in its file beside the river."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from river_llm import River, RiverConfig
from river_llm.lossless.learnt_drafts import read_learnt, write_learnt


class TestLearntDrafts:
    def test_come_back_under_their_key(self, tmp_path: Path) -> None:
        assert read_learnt(tmp_path, "a") is None
        write_learnt(tmp_path, "a", {"rate": 1.5})
        write_learnt(tmp_path, "b", {"rate": 2.5})
        write_learnt(tmp_path, "a", {"rate": 3.5})
        assert read_learnt(tmp_path, "a") == {"rate": 3.5}
        assert read_learnt(tmp_path, "b") == {"rate": 2.5}
        assert read_learnt(tmp_path, "c") is None
        assert [path.name for path in tmp_path.iterdir()] == ["drafts.json"]

    @pytest.mark.parametrize(
        "damage",
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"null",
            b"[]",
            b'{"format_version": 2, "entries": {"a": {"rate": 1}}}',
            b'{"format_version": 1, "entries": [5]}',
            b'{"format_version": 1, "entries": {"a": 7}}',
            b'{"entries": {"a": {"rate": 1}}}',
        ],
    )
    def test_out_of_a_damaged_file_are_none_and_are_written_anew(
        self, tmp_path: Path, damage: bytes
    ) -> None:
        (tmp_path / "drafts.json").write_bytes(damage)
        assert read_learnt(tmp_path, "a") is None
        write_learnt(tmp_path, "a", {"rate": 1.5})
        assert read_learnt(tmp_path, "a") == {"rate": 1.5}

    def test_stay_as_they_were_where_nothing_can_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_learnt(tmp_path, "a", {"rate": 1.5})

        def refuse(*args: object, **kwargs: object) -> None:
            raise PermissionError("read-only file system")

        for name in ("tempfile.mkdtemp", "pathlib.Path.replace"):
            with monkeypatch.context() as patched:
                patched.setattr(name, refuse)
                write_learnt(tmp_path, "a", {"rate": 2.5})
            assert read_learnt(tmp_path, "a") == {"rate": 1.5}
            assert [path.name for path in tmp_path.iterdir()] == ["drafts.json"]
        write_learnt(tmp_path / "nowhere", "a", {"rate": 2.5})
        assert not (tmp_path / "nowhere").exists()

    def test_go_where_the_river_goes(self, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
        river = River.build(tiny_llama, RiverConfig(group_size=32, quantizer="rtn"))
        river.save(tmp_path / "river")
        write_learnt(tmp_path / "river", "a", {"rate": 1.5})
        River.load(tmp_path / "river")
        river.save(tmp_path / "river")
        assert read_learnt(tmp_path / "river", "a") is None
        assert len(River.load(tmp_path / "river").exit_layers) == 4

    def test_are_readable_by_those_who_can_read_the_river(
        self, tiny_llama: PreTrainedModel, tmp_path: Path
    ) -> None:
        river = River.build(tiny_llama, RiverConfig(group_size=32, quantizer="rtn"))
        river.save(tmp_path / "river")
        write_learnt(tmp_path / "river", "a", {"rate": 1.5})
        modes = {path.stat().st_mode for path in (tmp_path / "river").iterdir()}
        assert len(modes) == 1
