"""Which tokens end an answer."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

from river_llm.errors import ConfigError
from river_llm.settings import is_whole_number
from river_llm.text.chat_template import Message, render_messages
from river_llm.text.control_tokens import is_bracketed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Ends of a turn or a text by their names, as llama.cpp knows them (llama-vocab.cpp) and some more.
# fmt: off
_END_NAMES = frozenset({
    "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<EOT>", "_<EOT>", "< EOT >", "[EOT]",
    "<|EOT|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<turn|>",
    "<|end_of_turn|>", "<|endofturn|>", "[|endofturn|]", "<|END_OF_TURN_TOKEN|>", "<|role_end|>",
    "<|assistant_end|>", "<end_of_utterance>", "<|endoftext|>", "<|end_of_text|>", "<|eos|>",
    "<｜end▁of▁sentence｜>", "<|end_of_sentence|>", "[EOS]", "<eos>", "</s>",  # noqa: RUF001
    "<|fim_pad|>", "<fim_pad>", "<|fim_repo|>", "<|repo_name|>", "<|file_sep|>", "<|tool_response>",
    "<|calls|>", "<|flush|>", "[e~[",
})
# fmt: on
# Texts have these too, unless they are special tokens.
_ALSO_WORDS = frozenset({"</s>", "<eos>", "[EOS]"})
END_MARKS = _END_NAMES - _ALSO_WORDS  # which no text has
# Where these are, <|end|> closes one part of a message, and further parts may follow (Harmony).
_HARMONY = frozenset({"<|return|>", "<|call|>"})

_log = logging.getLogger(__name__)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's end of a text, those of the model's generation
    config, added tokens whose name says so, and what the chat template closes an answer with."""
    ends = {tokenizer.eos_token_id, *_configured(model), *_named(tokenizer), _closing(tokenizer)}
    return frozenset(ends - {None})


def _configured(model: PreTrainedModel) -> set[int]:
    """Those of the generation config; what is no token of the model is told and left out."""
    given: Any = model.generation_config.eos_token_id if model.generation_config else None
    listed = given if isinstance(given, list | tuple) else [] if given is None else [given]
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ends = {int(one) for one in listed if is_whole_number(one) and 0 <= one < vocab_size}
    others = [one for one in listed if not is_whole_number(one) or one not in ends]
    if others:
        _log.warning(
            "eos_token_id of the generation config names what is no token of the model (%s); such "
            "ends of an answer are left out",
            ", ".join(map(repr, others)),
        )
    return ends


def _named(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    found = {
        str(token): token_id
        for token_id, token in added
        if str(token) in _END_NAMES and (token.special or str(token) not in _ALSO_WORDS)
    }
    if found.keys() >= _HARMONY:
        found.pop("<|end|>", None)
    return set(found.values())


def _closing(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands directly behind an answer in the chat template.

    Where nothing closes an answer, it is what opens the next turn: with that a model ends its own.
    None where there is no such token, no template, or one that doesn't take such messages.
    """
    question: Message = {"role": "user", "content": "What is it?"}
    answer: Message = {"role": "assistant", "content": "It is a river."}
    last = _rendering(tokenizer, [question, answer])
    inner = _rendering(tokenizer, [question, answer, question])
    added = tokenizer.added_tokens_decoder.values()
    names = [str(token) for token in added if token.special or is_bracketed(str(token))]
    longest_first = sorted(filter(str.strip, names), key=len, reverse=True)
    behind = re.compile(
        rf"{re.escape(answer['content'])}\s*({'|'.join(map(re.escape, longest_first))})"
    )
    at_end, before_turn = behind.search(last), behind.search(inner)
    closing = at_end[1] if at_end else None
    next_token = before_turn[1] if before_turn else None
    # some templates write the beginning of an answer behind the last message, whoever's it is
    if at_end and inner and closing != next_token and at_end[1] in last[: at_end.start()]:
        closing = None
    found = closing or next_token
    return None if found is None else int(tokenizer.convert_tokens_to_ids(found))


def _rendering(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str:
    """Messages as the chat template writes them; nothing where it doesn't take them."""
    try:
        return render_messages(tokenizer, messages, add_generation_prompt=False)[0]
    except ConfigError:
        return ""
