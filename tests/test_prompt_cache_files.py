"""Files of prompt caches: damage is noticed, and what is written is whole or not there."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lossless_lm import both_engines, subject_with
from prompt_caches import (
    CONTEXT,
    DOCUMENT,
    ask,
    check_refused,
    lm_with,
    save,
    token_ids_of,
)

from river_llm import (
    PromptCacheError,
)
from river_llm.prompt_cache import is_worth_keeping


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompt.safetensors"


class TestDamage:
    @both_engines
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_of_any_byte_is_noticed(self, kind: str, path: Path, data: st.DataObject) -> None:
        content = _small_file(kind)
        header = 8 + int.from_bytes(content[:8], "little")
        place = data.draw(
            st.one_of(st.integers(0, header - 1), st.integers(header, len(content) - 1))
        )
        changed = bytearray(content)
        changed[place] ^= data.draw(st.integers(1, 255))
        path.write_bytes(changed)
        lm = lm_with(kind)
        try:
            lm.load_prompt_cache(path)
        except PromptCacheError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert lm.engine.length == 0
        else:
            assert changed[place : place + 1].isspace()  # that fills the header up
            assert lm.prompt_cache_tokens == token_ids_of("A river?")

    @both_engines
    @pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
    def test_of_a_file_that_is_cut_short_is_noticed(
        self, kind: str, share: float, path: Path
    ) -> None:
        content = _small_file(kind)
        path.write_bytes(content[: int(share * len(content))])
        check_refused(lm_with(kind), path, "damaged", "delete it, or give another file")

    def test_of_a_file_that_goes_on_is_noticed(self, path: Path) -> None:
        path.write_bytes(_small_file("cpu") + b"more")
        check_refused(lm_with("cpu"), path, "damaged")

    @pytest.mark.parametrize(
        ("name", "part"),
        [("missing", "there is no prompt cache"), (".", "is no file"), ("notes.txt", "damaged")],
    )
    def test_is_what_anything_else_counts_for(self, name: str, part: str, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("Dear diary, this is no prompt cache.")
        check_refused(lm_with("cpu"), tmp_path / name, part)

    def test_a_file_of_other_tensors_is_refused(self, path: Path, tmp_path: Path) -> None:
        subject_with(CONTEXT).river.save(tmp_path / "river")
        check_refused(lm_with("cpu"), tmp_path / "river" / "river.safetensors", "another file")


@cache
def _small_file(kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "prompt"
        save(lm_with(kind), path, "A river?")
        return path.read_bytes()


class TestWriting:
    def test_replaces_an_older_file_and_keeps_its_permissions(self, path: Path) -> None:
        lm = lm_with("cpu")
        save(lm, path)
        assert path.stat().st_mode & 0o777 == _new_file_mode(path.parent)
        path.chmod(0o640)
        save(lm, path, DOCUMENT * 2)
        assert path.stat().st_mode & 0o777 == 0o640
        assert lm.load_prompt_cache(path) == len(DOCUMENT * 2)
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]

    def test_follows_a_link(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        target = tmp_path / "elsewhere" / "prompt"
        path.symlink_to(target)
        lm = lm_with("cpu")
        for prompt in (DOCUMENT, DOCUMENT * 2):
            save(lm, path, prompt)
            assert path.is_symlink()
            assert lm.load_prompt_cache(path) == len(prompt)
        assert [entry.name for entry in target.parent.iterdir()] == [target.name]

    @pytest.mark.parametrize(
        "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()]
    )
    @pytest.mark.parametrize("step", ["save_file", "os.fsync", "Path.replace"])
    def test_that_ends_early_leaves_the_old_file(
        self, error: BaseException, step: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = lm_with("cpu")
        save(lm, path)
        before = path.read_bytes()
        ask(lm, DOCUMENT * 2)
        with monkeypatch.context() as patched:

            def fail(*_: object) -> None:
                raise error

            patched.setattr(f"river_llm.prompt_cache.{step}", fail)
            is_told = isinstance(error, OSError)
            with pytest.raises(PromptCacheError if is_told else type(error)) as raised:
                lm.save_prompt_cache(path)
        if is_told:
            assert "can't write the prompt cache" in str(raised.value)
            assert "No space left on device" in str(raised.value)
        assert path.read_bytes() == before
        assert [entry.name for entry in path.parent.iterdir()] == [path.name]
        assert lm.save_prompt_cache(path) == len(DOCUMENT * 2)  # nothing is lost

    def test_never_replaces_what_is_no_prompt_cache(self, tmp_path: Path) -> None:
        lm = lm_with("cpu")
        ask(lm, DOCUMENT)
        notes = tmp_path / "notes.txt"
        notes.write_text("Dear diary")
        subject_with(CONTEXT).river.save(tmp_path / "river")
        tensors = tmp_path / "river" / "river.safetensors"
        before = tensors.read_bytes()
        for place in (notes, tensors, tmp_path, tmp_path / "river"):
            with pytest.raises(PromptCacheError, match=r"is no|another file"):
                lm.save_prompt_cache(place)
        assert notes.read_text() == "Dear diary"
        assert tensors.read_bytes() == before
        with pytest.raises(PromptCacheError, match=r"there is no folder .*nowhere to write"):
            lm.save_prompt_cache(tmp_path / "nowhere" / "prompt")

    def test_to_a_read_only_folder_is_refused(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = lm_with("cpu")
        ask(lm, DOCUMENT)
        monkeypatch.setattr("os.access", lambda *_: False)
        with pytest.raises(PromptCacheError, match="its folder is read-only"):
            lm.save_prompt_cache(path)
        assert list(path.parent.iterdir()) == []

    def test_leaves_a_read_only_file(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = lm_with("cpu")
        save(lm, path)
        before = path.read_bytes()
        ask(lm, DOCUMENT * 2)
        monkeypatch.setattr("os.access", lambda place, _: Path(place).is_dir())
        with pytest.raises(PromptCacheError, match="it is read-only; give another file"):
            lm.save_prompt_cache(path)
        assert path.read_bytes() == before
        assert lm.load_prompt_cache(path)


def _new_file_mode(directory: Path) -> int:
    other = directory / "other"
    other.touch()
    mode = other.stat().st_mode & 0o777
    other.unlink()
    return mode


class TestWorth:
    """Which prompts take the place of the one in the file."""

    def test_is_that_of_any_first_prompt(self) -> None:
        assert is_worth_keeping([1], [])
        assert not is_worth_keeping([], [])

    @pytest.mark.parametrize(
        ("common", "kept", "new", "worth"),
        [
            (1000, 20, 20, False),  # another question
            (1000, 20, 80, False),  # a longer one
            (1000, 20, 120, True),  # the document has grown
            (1000, 0, 50, False),
            (1000, 0, 70, True),
            (1000, 0, 0, False),  # a shorter prompt
            (10, 1000, 5000, False),  # another text
            (600, 500, 5000, True),
            (500, 600, 5000, False),
            (20, 30, 8000, False),
            (30, 20, 8000, True),  # the first prompt was a short try
        ],
    )
    def test_is_that_of_more_of_the_same_text(
        self, common: int, kept: int, new: int, worth: bool
    ) -> None:
        text = list(range(common))
        assert is_worth_keeping([*text, *[-1] * new], [*text, *[-2] * kept]) is worth

    @given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40))
    def test_never_makes_the_file_shorter(self, prompt: list[int], kept: list[int]) -> None:
        if is_worth_keeping(prompt, kept):
            assert len(prompt) > len(kept)
            half = -(-len(kept) // 2)
            assert prompt[:half] == kept[:half]
