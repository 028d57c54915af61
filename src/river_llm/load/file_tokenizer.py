"""The tokenizer of a folder's own files, where transformers leaves something of them out.

Some tokenizer classes of transformers take the vocabulary from tokenizer.json and build the rest
(normaliser, pre-tokenizer, options of the merges) as their own model has it. Where the file says
otherwise, digits, blanks and line breaks would become other tokens than the model was trained on.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub

from river_llm.load.checkpoint import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MODEL_OPTIONS = (
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "fuse_unk",
    "byte_fallback",
    "ignore_merges",
)
# Those that set BOS and EOS by the flags of tokenizer_config.json in transformers 4, whatever
# tokenizer.json says; transformers 5 drops the flags.
_CLASSES_WITH_FLAGS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_TOKEN_OPTIONS = ("content", "single_word", "lstrip", "rstrip", "normalized")
_MARK = "\ufeff"  # byte order mark

_log = logging.getLogger(__name__)


def with_its_files(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer as tokenizer.json, tokenizer_config.json and chat_template.json have it.

    Args:
        source: the directory or Hub id that the tokenizer was loaded from.

    Raises:
        ModelLoadError: chat_template.json is no JSON.
    """
    own = _with_its_own_file(tokenizer, source)
    _set_flags(own, source)
    _set_chat_template(own, source)
    return own


def _file(source: str, name: str) -> Path:
    if Path(source).is_dir():
        return Path(source, name)
    return Path(str(huggingface_hub.try_to_load_from_cache(source, name)))


def _set_flags(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Let the tokenizer add BOS and EOS as its class did by `add_bos_token`, `add_eos_token`."""
    from transformers import PreTrainedTokenizerFast

    file = _file(source, "tokenizer_config.json")
    if not file.is_file() or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return
    settings = read_json(file)
    of_class = str(settings.get("tokenizer_class")).removesuffix("Fast")
    if of_class in _CLASSES_WITH_FLAGS and settings.keys() & {"add_bos_token", "add_eos_token"}:
        tokenizer.add_bos_token = bool(settings.get("add_bos_token", True))
        tokenizer.add_eos_token = bool(settings.get("add_eos_token", False))


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    """Take a template from chat_template.json, which older processors have, where there is no
    other, and byte order marks off."""
    template = tokenizer.chat_template
    file = _file(source, "chat_template.json")
    if not template and file.is_file():
        template = read_json(file).get("chat_template")
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, dict):
        template = {name: text.removeprefix(_MARK) for name, text in template.items()}
    tokenizer.chat_template = (
        template.removeprefix(_MARK) if isinstance(template, str) else template
    )


def _with_its_own_file(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer, or where tokenizer.json splits text otherwise, one that is read from it.

    Takes milliseconds where they agree: the vocabulary isn't read.
    """
    from transformers import PreTrainedTokenizerFast

    of_class = type(tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or "__init__" not in of_class.__dict__:
        return tokenizer
    if of_class is PreTrainedTokenizerFast or not of_class.__module__.startswith("transformers."):
        return tokenizer
    file = _file(source, "tokenizer.json")
    if not file.is_file() or _agree(tokenizer, _settings(file)):
        return tokenizer
    _log.info("%s splits text otherwise than tokenizer.json, which is taken", of_class.__name__)
    own: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(source)
    for name, token in tokenizer.special_tokens_map.items():  # defaults of the class
        has_id = isinstance(token, str) and own.convert_tokens_to_ids(token) not in (
            None,
            own.unk_token_id,
        )
        if has_id and getattr(own, name, None) is None:
            setattr(own, name, token)
    return own


def _settings(file: Path) -> dict[str, Any]:
    """What tokenizer.json holds before the vocabulary, which mostly comes last."""
    text = ""
    with file.open(encoding="utf-8") as opened:
        while '"vocab"' not in text and (piece := opened.read(1 << 16)):
            text += piece
    head = text.partition('"vocab"')[0].rstrip().removesuffix(",")
    try:
        settings: dict[str, Any] = json.loads(head + "}}")
    except ValueError:
        settings = json.loads(file.read_text(encoding="utf-8"))
    return settings


def _agree(tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]) -> bool:
    """Whether a tokenizer does with a text what a file's settings say."""
    backend = tokenizer.backend_tokenizer
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(backend, name)
        state = None if part is None else json.loads(part.__getstate__())
        is_decoder = name == "decoder"
        if _essence(state, is_decoder) != _essence(settings.get(name), is_decoder):
            return False
    of_file = settings.get("model") or {}
    options = [(getattr(backend.model, one, None), of_file.get(one)) for one in _MODEL_OPTIONS]
    if any((own or None) != (other or None) for own, other in options):
        return False
    added = backend.get_added_tokens_decoder()
    for token in settings.get("added_tokens") or []:
        own = added.get(token["id"])
        if own is None or any(getattr(own, one) != token[one] for one in _TOKEN_OPTIONS):
            return False
    return True


def _essence(state: Any, is_decoder: bool) -> Any:
    """A part's settings without those that have no effect on tokens."""
    if isinstance(state, list):
        return [_essence(one, is_decoder) for one in state]
    if not isinstance(state, dict):
        return state
    without = {"trim_offsets"}
    if is_decoder and state.get("type") == "ByteLevel":
        without |= {"add_prefix_space", "use_regex"}
    return {k: _essence(v, is_decoder) for k, v in state.items() if k not in without}
