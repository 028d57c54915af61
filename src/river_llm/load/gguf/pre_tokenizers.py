"""How a BPE tokenizer's text is cut before its merges, by `tokenizer.ggml.pre`.

A kind is what the tokenizer.json of the model that it is named after says; the names are
llama.cpp's (src/llama-vocab.cpp). The table is pre_tokenizers.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True, slots=True)
class PreTokenization:
    """One kind of cutting.

    Attributes:
        patterns: applied in order, each to what the ones before it left; what one matches and what
            lies between its matches are pieces.
        ignore_merges: a piece that is a token is one, whatever the merges say.
        add_bos: a raw text begins with BOS, unless the file says otherwise.
        is_sentencepiece: blanks are ▁, and unknown characters are bytes <0x..>, in place of GPT-2's
            letters for bytes.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    is_sentencepiece: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Of the tokenizers package."""
        splits: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(Regex(one), "isolated") for one in self.patterns
        ]
        if not self.is_sentencepiece:
            splits.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(splits)


def _kinds() -> dict[str, PreTokenization]:
    kinds = {}
    for row in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")):
        names, patterns = row.pop("names"), tuple(row.pop("patterns"))
        kinds.update(dict.fromkeys(names, PreTokenization(patterns, **row)))
    return kinds


KINDS = _kinds()
