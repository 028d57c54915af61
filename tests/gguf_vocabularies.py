"""Tiny vocabularies for every way in which a GGUF file's text is cut, and the tokens that llama.cpp
makes of a few texts with them. `python tests/gguf_vocabularies.py` writes them anew, with
llama-cpp-python."""

# ruff: noqa: RUF001 (characters of many scripts are what it is about)
from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from byte_models import BYTES, byte_model, save_gguf
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from river_llm.load.gguf.pre_tokenizers import KINDS

STORED = Path(__file__).with_suffix(".json")
TEXTS = (
    "Hello, world! It's 3.14159 o'clock; they're here, I'LL go, we'd 1234567 89 x12y345.",
    "def f(x):\n    if x > 10:\n\t\treturn [x, 2*x]  # ok\n\n\n    return None\r\n\r\n"
    "print(f(42))  \n",
    "  two   blanks,\ttabs\t\t and   trailing   ",
    "Über Größe 北京大学 你好，世界！ 日本語のテキスト カタカナ 한국어 العربية "
    "ไทย Ελλάδα Русский 123４５６ ①½",
    "emoji 😀😃 👩‍👩‍👧 ❤️ 🇩🇪 zero\u200bwidth \u00a0nbsp\u3000ideographic",
    "<|im_start|>user\nHi<|im_end|>\n x<tool> y <tool>z<unk>",
    "(a+b)*c == d->e && f || !g; $5.00 €10 £3 `code` ~/path/to/file.txt https://x.org/?a=1&b=2",
    "McDonald's l'été d'accord I'm YOU'RE naïve façade",
    "हिन्दी पाठ e\u0301 q\u0323\u0307 marks",
    "iOS eBay HTTPServer aÉb",
    "\n\n1. one\n2. two\n  - three\n",
    "Yes!\n\nNo?\r\n\r\nSHE'LL go; it'S 1234 56\n\n\n  x!\n\n 'Tis a b\n",
    "",
    " ",
)
# llama.cpp has no classes of capitals and small letters, nor of marks, in these kinds' words; the
# tokenizers that they are named after have.
_MARKS, _CAPITALS = 8, 9
_OF_GPT4O = ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2", "tekken")
APPROXIMATED = {
    **dict.fromkeys(_OF_GPT4O, (_MARKS, _CAPITALS)),
    **dict.fromkeys(("tiny_aya", "cohere2moe", "youtu"), (_CAPITALS,)),
    "granite-embed-multi-97m": (_CAPITALS,),
    "kimi-k2": (_MARKS, _CAPITALS),
}
_CONTROL, _UNKNOWN, _USER_DEFINED, _BYTE = 3, 2, 4, 6
_SPECIAL = {
    "<|im_start|>": _CONTROL,
    "<|im_end|>": _CONTROL,
    "<unk>": _UNKNOWN,
    "<tool>": _USER_DEFINED,
    "  - ": _USER_DEFINED,
}


def all_kinds() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(name, `tokenizer.ggml.model`, further metadata)."""
    for pre in KINDS:
        yield pre, "gpt2", {"tokenizer.ggml.pre": pre}
    yield "llama", "llama", {}
    yield "llama without prefix", "llama", {"tokenizer.ggml.add_space_prefix": False}
    ends = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    yield "llama with EOS alone", "llama", ends
    ends = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    yield "gpt-2 with BOS and EOS", "gpt2", {"tokenizer.ggml.pre": "gpt-2", **ends}


def write_file(path: Path, model: str, metadata: dict[str, Any], merges: dict[str, Any]) -> Path:
    """A GGUF file of a model of one small layer with one of the vocabularies."""
    kind = KINDS.get(metadata.get("tokenizer.ggml.pre", ""))
    is_raw = model == "llama" or (kind is not None and kind.is_sentencepiece)
    chosen = merges["raw" if is_raw else "bytes"]
    if is_raw:
        alphabet = sorted({*"".join(text.replace(" ", "▁") for text in TEXTS)})
        pieces = {**{f"<0x{byte:02X}>": _BYTE for byte in range(256)}}
        pieces |= dict.fromkeys(alphabet, 1)
    else:
        pieces = dict.fromkeys(BYTES, 1)
    pieces |= {merge.replace(" ", ""): 1 for merge in chosen}
    tokens = {
        **_SPECIAL,
        **{piece: kind for piece, kind in pieces.items() if piece not in _SPECIAL},
    }
    scores = {merge.replace(" ", ""): -float(rank) for rank, merge in enumerate(chosen)}
    tiny = byte_model(
        vocab_size=len(tokens),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    return save_gguf(
        path,
        tiny,
        metadata={"tokenizer.ggml.unknown_token_id": 2, **metadata},
        tokens=list(tokens),
        types=list(tokens.values()),
        tokenizer=model,
        merges=chosen,
        scores=[scores.get(token, -1e6) for token in tokens] if model == "llama" else None,
    )


def tokens_of_llama_cpp(path: Path) -> list[list[int]]:
    """Of each of `TEXTS`, control tokens and those of its ends among them."""
    from llama_cpp import Llama

    model = Llama(str(path), vocab_only=True, verbose=False)
    try:
        return [model.tokenize(text.encode(), add_bos=True, special=True) for text in TEXTS]
    finally:
        model.close()


def stored_tokens(stored: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Of each kind, by its name."""
    return {name: group["tokens"] for group in stored["kinds"] for name in group["names"]}


def _merges() -> dict[str, list[str]]:
    """Merges that join over every border, so that each border that is cut at shows."""
    texts = [text for text in TEXTS if "<|" not in text]
    parts = [part for text in texts for part in (text, text[3:], text[::2])]
    merges = {}
    for name in ("bytes", "raw"):
        tokenizer = Tokenizer(models.BPE())
        if name == "bytes":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
                add_prefix_space=False, use_regex=False
            )
        else:
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
        trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False)
        tokenizer.train_from_iterator(parts * 3, trainer)
        model = json.loads(tokenizer.to_str())["model"]
        merges[name] = [" ".join(pair) for pair in model["merges"]]
    return merges


def _write(directory: Path) -> None:
    merges = _merges()
    groups: list[dict[str, Any]] = []
    for name, model, metadata in all_kinds():
        tokens = tokens_of_llama_cpp(write_file(directory / "a.gguf", model, metadata, merges))
        same = next((group for group in groups if group["tokens"] == tokens), None)
        if same is None:
            groups.append({"names": [name], "tokens": tokens})
        else:
            same["names"].append(name)
    lines = ",\n".join(json.dumps(group, separators=(",", ":")) for group in groups)
    head = json.dumps(merges, ensure_ascii=False, separators=(",", ":"))
    STORED.write_text(f'{{"merges":{head},\n"kinds":[\n{lines}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
