"""Control tokens, and text that only spells one: a user's text stays text.

Before a chat template is rendered, a *mark*, a character that none of its inputs has, goes behind
the first character of whatever spells a control token there. What is still whole in the rendering
is the template's own. The rendering is then encoded in one piece by a copy of the tokenizer that
spells its control tokens otherwise, so that blanks, word borders and flags of tokens count as ever.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError, nodes
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from river_llm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode's noncharacters, which no text for others has
MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
# Of a model's reasoning and its use of tools: an answer's text shows them, and templates look for
# them there.
_MARKER = re.compile(r"think|thought|reason|tool|function|call|python_tag", re.IGNORECASE)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_NONE = re.compile(r"(?!)")  # matches nowhere


class ControlTokens:
    """What a tokenizer takes for control tokens: its special tokens, and further added tokens that
    the chat template writes itself, as DeepSeek's openings of a turn are.

    Attributes:
        markers: the special tokens that an answer's text shows, with their spelling.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        literals = _literal_text(tokenizer.chat_template)
        added = [
            token
            for token in tokenizer.added_tokens_decoder.values()
            if token.content.strip() and not _BYTE_TOKEN.fullmatch(token.content)
        ]
        special = {token.content for token in added if token.special}
        further = {token.content for token in added if is_bracketed(token.content)}
        texts = special | {text for text in further if text in literals}
        nonce = secrets.token_hex(8)  # nobody can type what the copy spells them by
        self._spellings = {text: f"[{nonce}.{i}]" for i, text in enumerate(sorted(texts))}
        self._any = _any_of(texts)
        self._beginnings = _beginning_of_any(texts)
        # An answer's text shows added tokens that aren't special ones: there they were tokens.
        answered = {text for text in special if not _MARKER.search(text)}
        self._beginnings_in_answers = _beginning_of_any(answered)
        self.markers = {
            token_id: token.content
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.content in special - answered
        }
        self._copy: Tokenizer | None = None

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ControlTokens:
        """Those of a tokenizer as it is now."""
        state = (len(tokenizer), str(tokenizer.chat_template))
        known = _known.get(tokenizer)
        if known is None or known[0] != state:
            known = _known[tokenizer] = (state, cls(tokenizer))
        return known[1]

    def mark(self, value: Any, mark: str, is_answer: bool = False) -> Any:
        """A text, or all texts in lists and dicts, with a mark in whatever spells a control token;
        of an answer of the model, the markers that it shows stay whole."""
        if isinstance(value, str):
            beginnings = self._beginnings_in_answers if is_answer else self._beginnings
            return beginnings.sub(lambda found: found.group() + mark, value)
        if isinstance(value, Mapping):
            return {key: self.mark(part, mark, is_answer) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(part, mark, is_answer) for part in value]
        return value

    def encode(self, tokenizer: PreTrainedTokenizerBase, rendering: str, mark: str) -> list[int]:
        """The tokens of a rendering, without those that the tokenizer puts around a text. Control
        tokens with a mark in them, or behind their only character, are text.

        Raises:
            ConfigError: the tokenizer is one in Python, which has no such copy.
        """
        own = re.compile(f"({self._any.pattern})(?!{mark}|{re.escape(_escaped(mark))})")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ConfigError(
                "a text spells a control token, and a tokenizer in Python can't take it for text; "
                "leave it out, or set allow_control_tokens"
            )
        if self._copy is None:
            self._copy = _respelled(backend, self._spellings)
        text = own.sub(lambda found: self._spellings[found.group()], rendering)
        return list(self._copy.encode(without_mark(text, mark), add_special_tokens=False).ids)


_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, ControlTokens]] = WeakKeyDictionary()


def unused_mark(*values: Any) -> str:
    """A mark that none of these texts has, nor texts within them.

    Raises:
        ConfigError: they have all of them.
    """
    written = "".join(map(repr, values))  # which escapes marks as JSON does
    for mark in MARKS:
        if _escaped(mark) not in written:
            return mark
    raise ConfigError("the messages hold all of Unicode's noncharacters; leave one of them out")


def without_mark(text: str, mark: str) -> str:
    """A text as it was before it was marked, and maybe written as JSON since."""
    return text.replace(mark, "").replace(_escaped(mark), "")


def _escaped(mark: str) -> str:
    return f"\\u{ord(mark):x}"


def _literal_text(chat_template: object) -> str:
    """What chat templates write themselves."""
    templates = chat_template.values() if isinstance(chat_template, dict) else [chat_template]
    written: list[str] = []
    for template in templates:
        if not isinstance(template, str):
            continue
        try:
            tree = _compile_jinja_template(template).environment.parse(template)
        except TemplateError:  # said where it is rendered
            continue
        written += (node.data for node in tree.find_all(nodes.TemplateData))
        constants = (node.value for node in tree.find_all(nodes.Const))
        written += (value for value in constants if isinstance(value, str))
    return "\0".join(written)


def is_bracketed(text: str) -> bool:
    """Whether it is no word or sign that a template may write as well."""
    return any(map(str.isalnum, text)) and not text[0].isalnum() and not text[-1].isalnum()


def _any_of(texts: set[str]) -> re.Pattern[str]:
    """The longest of these texts."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else _NONE


def _beginning_of_any(texts: set[str]) -> re.Pattern[str]:
    """The first character of every one of these texts, also where they overlap."""
    alternatives = [f"{re.escape(one[0])}(?={re.escape(one[1:])})" for one in sorted(texts)]
    return re.compile("|".join(alternatives)) if alternatives else _NONE


def _respelled(backend: Tokenizer, spellings: Mapping[str, str]) -> Tokenizer:
    """A tokenizer whose tokens have the same ids, and some of them another spelling.

    In its model too, and without the merges that lead there: some vocabularies come to a control
    token by pieces of plain text.
    """
    respelled = spellings.get
    description = json.loads(backend.to_str())
    description["truncation"] = description["padding"] = None
    for token in description["added_tokens"]:
        token["content"] = respelled(token["content"], token["content"])
    model = description["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {respelled(text, text): token for text, token in model["vocab"].items()}
    else:  # of a unigram model
        model["vocab"] = [[respelled(text, text), score] for text, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = respelled(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if spellings.keys().isdisjoint((left, right, left + right))
        ]
    return Tokenizer.from_str(json.dumps(description))
