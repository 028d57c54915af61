"""A start from a packed copy is the start that wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import (
    LENGTH,
    PROMPT,
    ROUNDED,
    WIDTHS,
    check_same_lm,
    check_same_tokenizer,
    check_same_weights,
    save_model,
    save_river,
    start,
    start_without_cache,
    starts_from_a_copy,
)
from tiny_gguf import write_tiny_gguf
from tiny_lm import character_tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from river_llm import RiverConfig, RiverFileError
from river_llm.errors import ModelLoadError
from river_llm.load.model import load_backbone
from river_llm.store import cached_folders


class TestAStart:
    @pytest.mark.parametrize("river", ["none", "a config", "a folder"])
    @pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}])
    def test_reads_what_the_one_before_has_written(
        self, river: str, settings: dict[str, Any], tmp_path: Path, loads: list[object]
    ) -> None:
        model = save_model(tmp_path / "tiny", **settings)
        of_river: Any = None
        if river == "a config":
            of_river = ROUNDED
        elif river == "a folder":
            of_river = save_river(model, tmp_path / "river", ROUNDED)
        first = start(model, of_river)
        assert len(loads) == 1
        (folder,) = cached_folders()
        assert folder.is_whole()
        assert (folder.kind, folder.source) == ("packed", model)
        second = start(model, of_river)
        assert len(loads) == 1
        assert second.river_config == (RiverConfig() if river == "none" else ROUNDED)
        check_same_lm(second, first)
        assert starts_from_a_copy(loads, model, of_river)
        assert cached_folders() == [folder]

    def test_has_answers_that_leave_the_backbone_everywhere(
        self, model: Path, loads: list[object]
    ) -> None:
        start(model)
        lm = start(model)
        assert len(loads) == 1
        exits = {e for text in "abcdefgh" for e in lm.generate(text).exit_layers}
        assert len(exits) >= 3  # else the other tests see little of the river

    def test_takes_a_relative_path_and_a_link_for_the_same_model(
        self, model: Path, loads: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = start(model)
        monkeypatch.chdir(tmp_path)
        (tmp_path / "place").mkdir()
        (tmp_path / "place" / "tiny").symlink_to(model)
        for path in ("tiny", "./tiny", Path("place/tiny")):
            lm = start(path)
            assert len(loads) == 1
            check_same_weights(lm.engine, first.engine)

    @pytest.mark.parametrize(("backbone_bits", "lm_head_bits"), WIDTHS)
    def test_has_the_bits_that_are_asked_for(
        self, model: Path, loads: list[object], backbone_bits: int, lm_head_bits: int
    ) -> None:
        bits = {"backbone_bits": backbone_bits, "lm_head_bits": lm_head_bits}
        for others in WIDTHS:
            start(model, backbone_bits=others[0], lm_head_bits=others[1])
        assert len(loads) == len(cached_folders()) == len(WIDTHS)
        assert starts_from_a_copy(loads, model, **bits)

    def test_keeps_the_copies_of_several_rivers(
        self, model: Path, loads: list[object], tmp_path: Path
    ) -> None:
        same_settings = RiverConfig(bits=4, group_size=32)
        rivers = [
            None,
            ROUNDED,
            RiverConfig(bits=4),
            RiverConfig(bits=4, quantizer="rtn"),
            same_settings,
            save_river(model, tmp_path / "one", same_settings),
            save_river(model, tmp_path / "two", ROUNDED),
        ]
        for river in rivers:
            start(model, river)
        assert len(loads) == len(cached_folders()) == len(rivers) - 1  # the third is the default
        for river in rivers:
            assert starts_from_a_copy(loads, model, river)

    def test_keeps_what_it_learns_about_drafts_beside_the_river(
        self, model: Path, loads: list[object], tmp_path: Path
    ) -> None:
        river = save_river(model, tmp_path / "river", ROUNDED)
        first = start(model, river)
        first.generate(PROMPT, mode="lossless", max_new_tokens=LENGTH)
        learnt = json.loads((river / "drafts.json").read_text())
        second = start(model, river)
        second.generate(PROMPT, mode="lossless", max_new_tokens=LENGTH)
        assert len(loads) == 1  # what is learnt is no other river
        learnt_again = json.loads((river / "drafts.json").read_text())
        assert learnt_again["entries"].keys() == learnt["entries"].keys()
        assert learnt_again != learnt

    def test_ends_answers_where_the_model_does(self, tmp_path: Path, loads: list[object]) -> None:
        model = save_model(tmp_path / "tiny")
        tokens = start_without_cache(model).generate(PROMPT, max_new_tokens=LENGTH).tokens
        ends = {"eos_token_id": [tokens[5], 96], "_from_model_config": False}
        (model / "generation_config.json").write_text(json.dumps(ends))
        for _ in range(2):
            lm = start(model)
            assert lm.stop_tokens == {tokens[5], 96}
            result = lm.generate(PROMPT, max_new_tokens=LENGTH)
            assert result.tokens == tokens[: tokens.index(tokens[5]) + 1]
        assert len(loads) == 2  # the one without a cache, and the first with

    def test_has_a_real_tokeniser_and_all_that_it_does(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, loads: list[object]
    ) -> None:
        model = save_model(tmp_path / "tiny", tokenizer=tokenizer, hidden_size=64)
        start(model)
        lm = start(model)
        assert len(loads) == 1
        expected = load_backbone(model)[1]
        check_same_tokenizer(lm.tokenizer, expected)
        texts = ["Où est la rivière ?", "\N{SNOWMAN}\N{VARIATION SELECTOR-16}", "  def f():\n\t1"]
        batch = {"padding": True, "return_tensors": "pt"}
        for text in texts:
            assert lm.tokenizer.decode(lm.tokenizer(text).input_ids) == text
        ids, expected_ids = lm.tokenizer(texts, **batch), expected(texts, **batch)
        assert torch.equal(ids.input_ids, expected_ids.input_ids)
        assert torch.equal(ids.attention_mask, expected_ids.attention_mask)

    def test_keeps_the_settings_of_a_tokeniser(self, tmp_path: Path, loads: list[object]) -> None:
        plain = character_tokenizer()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=plain.backend_tokenizer,
            eos_token="<end>",
            bos_token="<begin>",
            additional_special_tokens=["<tool>"],
            padding_side="left",
            model_max_length=77,
        )
        tokenizer.add_tokens(["river"])
        model = save_model(tmp_path / "tiny", tokenizer=tokenizer)
        start(model)
        assert starts_from_a_copy(loads, model)
        lm = start(model)
        assert not lm.tokenizer.chat_template
        assert lm.tokenizer.padding_side == "left"
        assert lm.tokenizer.tokenize("a river<tool>") == ["a", "Ġ", "river", "<tool>"]

    def test_from_a_gguf_file_reads_its_copy_too(
        self, tmp_path: Path, loads: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, river = write_tiny_gguf(tmp_path / "tiny.gguf"), RiverConfig(group_size=32)
        first = start(file, river)
        assert sorted(folder.kind for folder in cached_folders()) == ["converted", "packed"]
        assert {folder.source for folder in cached_folders()} == {file}
        check_same_weights(start(file, river).engine, first.engine)
        assert len(loads) == 1
        assert starts_from_a_copy(loads, file, river)
        write_tiny_gguf(file, seed=1)
        assert not starts_from_a_copy(loads, file, river)
        assert len(cached_folders()) == 2
        template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
        file.with_name("chat_template.jinja").write_text(template)
        assert not starts_from_a_copy(loads, file, river)
        assert len(cached_folders()) == 2

    def test_refuses_what_it_refuses_without_a_copy(self, model: Path, tmp_path: Path) -> None:
        start(model)
        with pytest.raises(RiverFileError, match=r"holds no river\.json"):
            start(model, tmp_path / "absent")
        with pytest.raises(ModelLoadError, match="there is no file or directory"):
            start(tmp_path / "absent")
        river = save_river(model, tmp_path / "river", ROUNDED)
        start(model, river)
        tensors = (river / "river.safetensors").read_bytes()
        (river / "river.safetensors").write_bytes(tensors[:-1])
        with pytest.raises(RiverFileError, match="cut short"):
            start(model, river)
        (river / "river.safetensors").unlink()
        with pytest.raises(RiverFileError):
            start(model, river)
        (model / "config.json").unlink()
        with pytest.raises(ModelLoadError, match=r"no config\.json"):
            start(model)

    def test_refuses_a_river_of_other_weights(
        self, model: Path, other: Path, tmp_path: Path
    ) -> None:
        river = save_river(other, tmp_path / "river", ROUNDED)
        start(other, river)
        for _ in range(2):
            with pytest.raises(RiverFileError, match="built for other weights"):
                start(model, river)
