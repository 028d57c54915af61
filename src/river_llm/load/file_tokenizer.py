"""The tokenizer of a folder's own files, where transformers leaves something of them out.

Some tokenizer classes of transformers take the vocabulary from tokenizer.json and build the rest
(normaliser, pre-tokenizer, options of the merges) as their own model has it. Where the file says
otherwise, digits, blanks and line breaks would become other tokens than the model was trained on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub

from river_llm.load.checkpoint import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Those that set BOS and EOS by the flags of tokenizer_config.json in transformers 4, whatever
# tokenizer.json says; transformers 5 drops the flags.
_CLASSES_WITH_FLAGS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_MARK = "\ufeff"  # byte order mark


def with_its_files(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer as tokenizer.json, tokenizer_config.json and chat_template.json have it.

    Args:
        source: the directory or Hub id that the tokenizer was loaded from.

    Raises:
        ModelLoadError: chat_template.json is no JSON.
    """
    own = _of_its_own_file(tokenizer, source)
    _set_flags(own, source)
    _set_chat_template(own, source)
    return own


def _file(source: str, name: str) -> Path:
    if Path(source).is_dir():
        return Path(source, name)
    return Path(str(huggingface_hub.try_to_load_from_cache(source, name)))


def _of_its_own_file(tokenizer: PreTrainedTokenizerBase, source: str) -> PreTrainedTokenizerBase:
    """The tokenizer that is read from tokenizer.json, where its class may build another one."""
    from transformers import PreTrainedTokenizerFast

    of_class = type(tokenizer)
    builds_its_own = (
        issubclass(of_class, PreTrainedTokenizerFast)
        and of_class is not PreTrainedTokenizerFast
        and of_class.__module__.startswith("transformers.")
        and _file(source, "tokenizer.json").is_file()
    )
    if not builds_its_own:
        return tokenizer
    own: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(source)
    vocabulary = own.get_vocab()
    for name, token in tokenizer.special_tokens_map.items():  # defaults of the class
        if isinstance(token, str) and token in vocabulary and getattr(own, name, None) is None:
            setattr(own, name, token)
    own.padding_side, own.model_input_names = tokenizer.padding_side, tokenizer.model_input_names
    return own


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
    elif isinstance(template, str):
        template = template.removeprefix(_MARK)
    tokenizer.chat_template = template
