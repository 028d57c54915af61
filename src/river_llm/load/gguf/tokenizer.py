"""The tokenizer of a GGUF file: the one that its model was trained with, with the file's own ids.

Two kinds of vocabulary are known: BPE with merges ("gpt2", "gemma4"), whose text is cut before by
the rule that `tokenizer.ggml.pre` names, and SentencePiece's BPE with scores ("llama").
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from river_llm.errors import ModelLoadError
from river_llm.load.gguf.file import GGUFContent
from river_llm.load.gguf.pre_tokenizers import KINDS, PreTokenization
from river_llm.text.stop_tokens import END_MARKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BPE_KINDS = ("gpt2", "gemma4")
_SENTENCEPIECE = "llama"
_BLANK = "▁"  # SentencePiece's
_PREFIX = "tokenizer.ggml."
_TEMPLATE = "tokenizer.chat_template"
# By the key that holds their id.
_IDS = ("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "cls")
_NO_ID = 2**32 - 1  # -1, as some write that there is none
_INFILLING = [f"fim_{part}" for part in ("pre", "suf", "mid", "pad", "rep", "sep")]
_INFILLING += ["prefix", "suffix", "middle"]
_KNOWN = {"tokenizer.huggingface.json", "tokenizer.chat_templates", _TEMPLATE}
_KNOWN |= {f"{_PREFIX}{name}_token_id" for name in (*_IDS, *_INFILLING)}
_KNOWN |= {
    f"{_PREFIX}{key}"
    for key in (
        *("model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges"),
        *("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix"),
        *("remove_extra_whitespaces", "eos_token_ids"),
    )
}

_log = logging.getLogger(__name__)


class GGUFTokenizer:
    """What a GGUF file says of its tokenizer.

    Attributes:
        known_keys: of the metadata, that are honoured here.
        bos_id: of the token that begins a text; None: there is none.
        end_ids: of the tokens that end a text or a turn.
    """

    def __init__(self, content: GGUFContent) -> None:
        """
        Raises:
            ModelLoadError: there is no vocabulary, it is damaged, or of a kind that isn't known.
        """
        self._content = content
        self._metadata = content.metadata
        kind = self._get("model")
        if kind not in (*_BPE_KINDS, _SENTENCEPIECE):
            raise self._refusal(
                f"has a tokenizer of the kind {kind!r}, which isn't known here (gpt2, llama and "
                "gemma4 are)"
                if kind
                else "has no tokenizer"
            )
        self._tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self._strings("tokens"))]
        self._vocabulary = {token: index for index, token in enumerate(self._tokens)}
        if len(self._vocabulary) != len(self._tokens):
            twice = next(t for i, t in enumerate(self._tokens) if self._vocabulary[t] != i)
            raise self._refusal(f"has the token {twice!r} twice in its vocabulary; it is damaged")
        self._types = self._token_types()
        self._cutting = self._pre_tokenization(kind) if kind in _BPE_KINDS else None
        self._ids = {name: self._token_id(name) for name in _IDS}
        if self._cutting is None:  # as SentencePiece numbers them
            for default, name in enumerate(("unknown", "bos", "eos")):
                if self._ids[name] is None and default < len(self._tokens):
                    self._ids[name] = default
        templates = {key for key in content.metadata if key.startswith(f"{_TEMPLATE}.")}
        self.known_keys = frozenset(_KNOWN | templates)
        self.bos_id = self._ids["bos"]
        more = self._get("eos_token_ids", [])  # Ollama's
        ends = [self._ids[name] for name in ("eos", "eot", "eom")]
        ends += [self.check_id(end) for end in (more if isinstance(more, list) else [more])]
        self.end_ids = [end for end in dict.fromkeys(ends) if end is not None]
        for key in ("add_sep_token", "remove_extra_whitespaces"):
            if self._flag(key, False):
                raise self._refusal(f"has {_PREFIX}{key} = true, which isn't known here")

    def token_settings(self) -> dict[str, int | None]:
        """Ids of special tokens for a model's configuration."""
        return {
            f"{name}_token_id": self._ids[key]
            for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }

    def check_fits(self, num_embeddings: int) -> None:
        """Validate that each token has an embedding.

        Raises:
            ModelLoadError: some have none.
        """
        if len(self._tokens) > num_embeddings:
            raise self._refusal(
                f"has {len(self._tokens)} tokens and embeddings of {num_embeddings}; it is damaged"
            )

    def build(self) -> PreTrainedTokenizerFast:
        """The tokenizer of `transformers`.

        Raises:
            ModelLoadError: its merges or scores can't be read.
        """
        from transformers import PreTrainedTokenizerFast

        cutting = self._cutting
        tokenizer = Tokenizer(self._sentencepiece() if cutting is None else self._bpe(cutting))
        if cutting is not None:
            tokenizer.pre_tokenizer = cutting.pre_tokenizer()
        if cutting is None or cutting.is_sentencepiece:
            has_prefix = cutting is None and self._flag("add_space_prefix", True)
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend(_BLANK)] * has_prefix + [normalizers.Replace(" ", _BLANK)]
            )
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
                + [decoders.Strip(" ", 1, 0)] * has_prefix
            )
        else:
            tokenizer.decoder = decoders.ByteLevel()
        self._add_whole_tokens(tokenizer)
        self._add_ends(tokenizer)
        names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        special = {
            f"{name}_token": self._tokens[index]
            for key, name in names.items()
            if (index := self._ids[key]) is not None and self._is_control(index)
        }
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            clean_up_tokenization_spaces=False,
            chat_template=self._chat_template(),
            **special,
        )

    def _get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{_PREFIX}{key}", default)

    def _flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._refusal(f"has {_PREFIX}{key} = {value!r}; it is damaged")
        return value

    def _refusal(self, reason: str) -> ModelLoadError:
        return ModelLoadError(f"{self._content.path} {reason}")

    def _strings(self, key: str) -> list[str]:
        values = self._get(key)
        if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
            raise self._refusal(f"has no {_PREFIX}{key}; it is damaged, or has no vocabulary")
        return values

    def _token_types(self) -> list[int]:
        types = self._get("token_type", [TokenType.NORMAL] * len(self._tokens))
        if not isinstance(types, list) or len(types) != len(self._tokens):
            raise self._refusal("doesn't say of each token which type it has; it is damaged")
        changed = (TokenType.NORMAL, TokenType.USER_DEFINED)  # as some files mark ends of a turn
        return [
            TokenType.CONTROL if kind in changed and token in END_MARKS else kind
            for token, kind in zip(self._tokens, types, strict=True)
        ]

    def _is_control(self, index: int) -> bool:
        """Whether a token is more than a piece of text: some files name an ordinary one, such as
        "!", as the token that pads."""
        kind, token = self._types[index], self._tokens[index]
        is_bracketed = token[:1] + token[-1:] in ("<>", "[]") and len(token) > 2
        return kind in (TokenType.CONTROL, TokenType.UNKNOWN) or is_bracketed

    def check_id(self, index: Any) -> int | None:
        """An id that a list of ends holds; None stays None.

        Raises:
            ModelLoadError: it is no token.
        """
        if index is None or (type(index) is int and 0 <= index < len(self._tokens)):
            return index
        raise self._refusal(f"names {index!r} as the end of an answer, which is no token of it")

    def _token_id(self, name: str) -> int | None:
        index = self._get(f"{name}_token_id")
        if index is None or index == _NO_ID:
            return None
        if isinstance(index, int) and 0 <= index < len(self._tokens):
            return index
        key, size = f"{_PREFIX}{name}_token_id", len(self._tokens)
        if name == "eos":
            raise self._refusal(f"has {key} = {index!r}, of {size} tokens; it is damaged")
        path = self._content.path
        _log.warning("%s has %s = %r, and %d tokens; it is taken for none", path, key, index, size)
        return None

    def _pre_tokenization(self, kind: str) -> PreTokenization:
        name = "gemma4" if kind == "gemma4" else self._get("pre")
        if name in KINDS:
            return KINDS[name]
        known = f"which is {name!r} and isn't known here" if name else "which is missing"
        _log.warning(
            "%s: how text is cut before it becomes tokens stands in %spre, %s; a common way is "
            "taken, and answers may be worse; take a file from a newer converter",
            self._content.path,
            _PREFIX,
            known,
        )
        return KINDS["default"]

    def _bpe(self, cutting: PreTokenization) -> BPE:
        merges = []
        for merge in self._strings("merges"):
            first, _, second = merge[1:].partition(" ")  # the first may begin with a blank
            first = merge[:1] + first
            if self._vocabulary.keys() >= {first, second, first + second}:
                merges.append((first, second))
        return BPE(
            self._vocabulary,
            merges,
            ignore_merges=cutting.ignore_merges,
            byte_fallback=cutting.is_sentencepiece,
            fuse_unk=False,
        )

    def _sentencepiece(self) -> BPE:
        """SentencePiece joins the neighbours whose whole has the best score: merges in that order,
        each token split wherever both parts are tokens."""
        scores = self._get("scores")
        if not isinstance(scores, list) or len(scores) != len(self._tokens):
            raise self._refusal("has no score for each token; it is damaged")
        left_out = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)
        parts = {
            token: (-scores[index], index)
            for token, index in self._vocabulary.items()
            if self._types[index] not in left_out
        }
        merges = sorted(
            (*rank, end, token)
            for token, rank in parts.items()
            for end in range(1, len(token))
            if token[:end] in parts and token[end:] in parts
        )
        # SentencePiece takes the leftmost of equally good pairs, which no order of merges says
        ranks = {one[:2] for one in merges if self._types[one[1]] == TokenType.NORMAL}
        equal = len(ranks) - len({score for score, _ in ranks})
        if equal:
            _log.warning(
                "%s has %d tokens with the score of another one, so that some texts may become "
                "other tokens than the model was trained on; take a file from a newer converter",
                self._content.path,
                equal,
            )
        unknown = self._ids["unknown"]
        return BPE(
            self._vocabulary,
            [(token[:end], token[end:]) for *_, end, token in merges],
            unk_token=None if unknown is None else self._tokens[unknown],
            byte_fallback=True,
            fuse_unk=False,
        )

    def _add_whole_tokens(self, tokenizer: Tokenizer) -> None:
        """Control tokens and those that a user has defined are found in the text before anything
        else."""
        name = str(self._metadata.get("general.name", "")).lower()
        strips = "phi-3" in name or "phi3" in name  # its own tokenizer takes blanks behind them
        named = {self._ids[key] for key in ("bos", "eos", "unknown", "padding")}
        added: dict[bool, list[AddedToken]] = {True: [], False: []}
        for index, (token, kind) in enumerate(zip(self._tokens, self._types, strict=True)):
            is_control = kind in (TokenType.CONTROL, TokenType.UNKNOWN)
            is_control |= index in named and self._is_control(index)
            if is_control or kind == TokenType.USER_DEFINED:
                strip = strips and token not in ("<unk>", "<s>", "<|endoftext|>")
                one = AddedToken(token, special=is_control, normalized=False, rstrip=strip)
                added[is_control].append(one)
        # at once: each call goes through all that were added before
        tokenizer.add_special_tokens(added[True])
        tokenizer.add_tokens(added[False])

    def _add_ends(self, tokenizer: Tokenizer) -> None:
        """A raw text's BOS and EOS, as the file or its kind says."""
        has_bos = self._cutting is None or self._cutting.add_bos
        bos = self._ids["bos"] if self._flag("add_bos_token", has_bos) else None
        eos = self._ids["eos"] if self._flag("add_eos_token", False) else None
        if bos is None and eos is None:
            return
        before, after = ([] if one is None else [self._tokens[one]] for one in (bos, eos))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(self._tokens[one], one) for one in {bos, eos} if one is not None],
        )

    def _chat_template(self) -> str | dict[str, str] | None:
        templates = {
            key.removeprefix(f"{_TEMPLATE}."): template
            for key, template in self._metadata.items()
            if key.startswith(f"{_TEMPLATE}.")
        }
        if _TEMPLATE in self._metadata:
            templates = {"default": self._metadata[_TEMPLATE], **templates}
        beside = self._content.path.with_name("chat_template.jinja")
        if "default" not in templates and beside.is_file():
            try:
                templates = {"default": beside.read_text(encoding="utf-8-sig"), **templates}
            except UnicodeDecodeError as error:
                raise ModelLoadError(f"{beside} is no UTF-8 text; convert it") from error
        if not all(isinstance(template, str) for template in templates.values()):
            raise self._refusal("has a chat template that is no text; it is damaged")
        return templates["default"] if templates.keys() == {"default"} else templates or None
