"""The tokenizer of a GGUF file is the one that its model was trained with: the tokens are
llama.cpp's of the same file, whose ids are stored in gguf_vocabularies.json."""

# ruff: noqa: RUF001 (characters of many scripts are what it is about)
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import BYTES, TOKENS, TYPES, byte_id, byte_lm, byte_model, save_gguf, speaks_only
from gguf_vocabularies import (
    APPROXIMATED,
    STORED,
    TEXTS,
    all_kinds,
    stored_tokens,
    tokens_of_llama_cpp,
    write_file,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from river_llm.errors import ModelLoadError
from river_llm.load.gguf import load_gguf
from river_llm.load.gguf.pre_tokenizers import KINDS
from river_llm.load.model import load_backbone

_KINDS = {name: (model, metadata) for name, model, metadata in all_kinds()}
_MERGES = json.loads(STORED.read_text(encoding="utf-8"))["merges"]


def _tokens(tokenizer: PreTrainedTokenizerBase, name: str) -> dict[str, list[int]]:
    """Of each text in which llama.cpp does as the tokenizer that the kind is named after."""
    left_out = APPROXIMATED.get(name, ())
    return {
        text: list(tokenizer(text).input_ids)
        for place, text in enumerate(TEXTS)
        if place not in left_out
    }


@pytest.fixture(scope="module")
def llama_cpp_tokens() -> dict[str, list[list[int]]]:
    return stored_tokens(json.loads(STORED.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", _KINDS)
def test_tokens_are_those_of_llama_cpp(
    name: str, llama_cpp_tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    file = write_file(tmp_path / "tiny.gguf", *_KINDS[name], _MERGES)
    tokenizer = load_gguf([file], torch.float32)[1]
    own = _tokens(tokenizer, name)
    expected = dict(zip(TEXTS, llama_cpp_tokens[name], strict=True))
    assert own == {text: expected[text] for text in own}
    for text in TEXTS:  # nothing gets lost
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", _KINDS)
def test_stored_tokens_are_what_llama_cpp_says(
    name: str, llama_cpp_tokens: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp")
    file = write_file(tmp_path / "tiny.gguf", *_KINDS[name], _MERGES)
    assert tokens_of_llama_cpp(file) == llama_cpp_tokens[name]


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-4o", "iOS aÉb é'll", ["i", "OS", " a", "Éb", " é'll"]),
        ("tekken", "iOS हिन्दी 12", ["i", "OS", " हिन्दी", " ", "1", "2"]),
        ("youtu", "eBay's", ["e", "Bay's"]),
        ("kimi-k2", "北京Bay ２３", ["北京", "Bay", " ", "２３"]),
    ],
)
def test_words_are_cut_where_the_kinds_own_pattern_cuts_them(
    name: str, text: str, pieces: list[str]
) -> None:
    cut = KINDS[name].pre_tokenizer().pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces


def test_smollm2_was_trained_on_single_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    expected = {  # llama.cpp's of the same file
        "Steps:\n\n1. Boil water.\n\n2. Add tea.": [
            *(21831, 42, 1116, 33, 30, 4499, 301, 913, 30, 1116, 34, 30, 5419, 7188, 30)
        ],
        "x = [\n    10,\n    20,\n]": [104, 446, 933, 2367, 33, 32, 28, 2367, 34, 32, 28, 198, 77],
        "a  5": [81, 256, 37],
    }
    assert {text: list(tokenizer(text).input_ids) for text in expected} == expected


_SPECIAL = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
_DEEPSEEK = {
    "tokens": [*TOKENS, *_SPECIAL],
    "types": [*TYPES, 3, 3, 3, 3],
    "bos": 260,
    "eos": 261,
    "pre": "deepseek-r1-qwen",
    "chat_template": "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m['content'] }}"
    "{% endfor %}<｜Assistant｜>",
}


def test_control_tokens_of_any_characters_keep_their_ids(tmp_path: Path) -> None:
    model = byte_model("Qwen2", vocab_size=264)
    metadata = {"tokenizer.ggml.add_bos_token": True}
    file = save_gguf(tmp_path / "model.gguf", model, "qwen2", metadata, **_DEEPSEEK)
    tokenizer = load_gguf([file], torch.float32)[1]
    assert len(tokenizer) == 264
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (260, 261)
    assert tokenizer("a").input_ids == [260, 3 + BYTES.index("a")]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], return_dict=True
    ).input_ids
    assert prompt == [260, 262, 3 + BYTES.index("a"), 263]
    assert tokenizer.decode(prompt) == "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>"
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "a"


@pytest.mark.parametrize(
    ("pre", "says", "has_bos"),
    [
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("qwen2", None, False),
        ("qwen2", True, True),
        ("tekken", None, True),
    ],
)
def test_a_raw_text_begins_with_bos_as_the_file_or_its_kind_says(
    pre: str, says: bool | None, has_bos: bool, tmp_path: Path
) -> None:
    metadata = {} if says is None else {"tokenizer.ggml.add_bos_token": says}
    file = save_gguf(tmp_path / "model.gguf", byte_model(), "llama", metadata, pre=pre)
    tokenizer = load_gguf([file], torch.float32)[1]
    assert tokenizer("a").input_ids == [0] * has_bos + [3 + BYTES.index("a")]


@pytest.mark.parametrize("pre", [None, "martian"])
def test_an_unknown_way_of_cutting_is_told_in_one_line(
    pre: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = save_gguf(tmp_path / "model.gguf", byte_model(), pre=pre)
    assert load_gguf([file], torch.float32)[1]("ab").input_ids == [259]
    (message,) = (record.getMessage() for record in caplog.records)
    assert "tokenizer.ggml.pre" in message
    assert "\n" not in message
    assert (pre or "missing") in message


def test_an_answer_ends_at_the_files_ends_and_at_those_beside_it(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 8}
    file = save_gguf(tmp_path / "model.gguf", byte_model(), metadata=metadata, pre="gpt-2")
    beside = tmp_path / "generation_config.json"
    beside.write_text(json.dumps({"eos_token_id": [9, 7]}))
    for _ in range(2):  # the file, then its copy
        assert load_backbone(file)[0].generation_config.eos_token_id == [1, 7, 8, 9]


@pytest.mark.parametrize("kind", [1, 4])
def test_an_end_of_turn_that_is_not_marked_as_a_control_token_ends_an_answer(
    kind: int, tmp_path: Path
) -> None:
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *TOKENS[3:]]
    model = speaks_only(byte_model(), 2)
    file = save_gguf(
        tmp_path / "model.gguf",
        model,
        tokens=tokens,
        types=[3, kind, kind, *TYPES[3:]],
        bos=1,
        eos=0,
        pre="gpt-2",
    )
    result = byte_lm(file).generate("Hi", max_new_tokens=8)
    assert (result.tokens, result.finish_reason) == ([2], "stop")


def test_an_ordinary_token_that_is_named_for_padding_stays_one(tmp_path: Path) -> None:
    metadata = {"padding": byte_id("!"), "eot": 2**32 - 1}  # the second says that there is none
    file = save_gguf(
        tmp_path / "model.gguf",
        byte_model(vocab_size=261),
        metadata={f"tokenizer.ggml.{name}_token_id": index for name, index in metadata.items()},
        tokens=[*TOKENS, "!!"],
        types=[*TYPES, 1],
        merges=["a b", "! !"],
        pre="gpt-2",
    )
    tokenizer = load_gguf([file], torch.float32)[1]
    ids = tokenizer("Hi!! a!b").input_ids
    assert 260 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Hi!! a!b"


def test_equal_scores_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", "ab", "bc"]
    file = save_gguf(
        tmp_path / "model.gguf",
        byte_model(vocab_size=8),
        tokens=tokens,
        types=[2, 3, 3, 1, 1, 1, 1, 1],
        tokenizer="llama",
        scores=[-1000.0] * 8,
        bos=1,
        eos=2,
    )
    load_gguf([file], torch.float32)
    assert "1 tokens with the score of another one" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", b"{"),
        ("generation_config.json", b'{"eos_token_id": ["a"]}'),
        ("chat_template.jinja", b"\xe9"),
    ],
)
def test_a_file_beside_it_that_cannot_be_read_is_named(
    name: str, content: bytes, tmp_path: Path
) -> None:
    file = save_gguf(tmp_path / "model.gguf", byte_model(), chat_template=None, pre="gpt-2")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=name.replace(".", r"\.") + "|end of an answer"):
        load_gguf([file], torch.float32)


@pytest.mark.parametrize(
    ("metadata", "tokens", "message"),
    [
        ({"tokenizer.ggml.eos_token_ids": [1, 260]}, TOKENS, "names 260 as the end"),
        ({"tokenizer.ggml.add_sep_token": True}, TOKENS, "add_sep_token = true"),
        ({}, [*TOKENS, "more"], "has 261 tokens and embeddings of 260"),
        ({}, [*TOKENS[:-1], "<s>"], "has the token '<s>' twice"),
        ({"tokenizer.ggml.add_bos_token": "no"}, TOKENS, "add_bos_token = 'no'"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_refused(
    metadata: dict[str, Any], tokens: list[str], message: str, tmp_path: Path
) -> None:
    types = [*TYPES, 1][: len(tokens)]
    file = save_gguf(
        tmp_path / "a.gguf", byte_model(), "llama", metadata, tokens=tokens, types=types, pre="mpt"
    )
    with pytest.raises(ModelLoadError, match=message):
        load_gguf([file], torch.float32)


def test_an_unknown_kind_of_vocabulary_is_named(tmp_path: Path) -> None:
    file = save_gguf(tmp_path / "model.gguf", byte_model(), tokenizer="t5")
    with pytest.raises(ModelLoadError, match=r"of the kind 't5', which isn't known here"):
        load_gguf([file], torch.float32)


def test_a_tokenizer_is_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    file = write_file(tmp_path / "tiny.gguf", *_KINDS["deepseek-v3"], _MERGES)
    tokenizer = load_gguf([file], torch.float32)[1]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert [again(text) for text in TEXTS] == [tokenizer(text) for text in TEXTS]
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_templates_by_name_and_one_beside_the_file_are_found(tmp_path: Path) -> None:
    metadata = {"tokenizer.chat_template.tool_use": "tools"}
    file = save_gguf(tmp_path / "model.gguf", byte_model(), "llama", metadata, pre="gpt-2")
    template = load_gguf([file], torch.float32)[1].chat_template
    assert template["tool_use"] == "tools"
    assert "assistant" in template["default"]
    (tmp_path / "chat_template.jinja").write_text("beside")
    assert load_gguf([file], torch.float32)[1].chat_template == template
    save_gguf(file, byte_model(), chat_template=None, pre="gpt-2")
    assert load_gguf([file], torch.float32)[1].chat_template == "beside"
