"""Which tokens end an answer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from river_llm.chat_template import Message, render_messages
from river_llm.errors import ConfigError

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
})
# fmt: on
# Where these are, <|end|> closes one part of a message, and further parts may follow (Harmony).
_HARMONY = frozenset({"<|return|>", "<|call|>"})


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: the tokenizer's end of a text, those of the model's generation
    config, special tokens whose name says so, and what the chat template closes an answer with."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    listed = configured if isinstance(configured, list | tuple) else [configured]
    ends = {tokenizer.eos_token_id, *listed, *_named(tokenizer), _closing(tokenizer)}
    return frozenset(ends - {None})


def _named(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    special = {str(token): token_id for token_id, token in added if token.special}
    names = _END_NAMES & special.keys()
    if names >= _HARMONY:
        names -= {"<|end|>"}
    return {special[name] for name in names}


def _closing(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands directly behind an answer in the chat template.

    Where nothing closes an answer, it is what opens the next turn: with that a model ends its own.
    None where there is no such token, no template, or one that doesn't take such messages.
    """
    question: Message = {"role": "user", "content": "What is it?"}
    answer: Message = {"role": "assistant", "content": "It is a river."}
    try:
        last, inner = (
            render_messages(tokenizer, messages, add_generation_prompt=False)[0]
            for messages in ([question, answer], [question, answer, question])
        )
    except ConfigError:
        return None
    names = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    behind = re.compile(
        rf"{re.escape(answer['content'])}\s*({'|'.join(map(re.escape, filter(str.strip, names)))})"
    )
    at_end, before_turn = behind.search(last), behind.search(inner)
    closing = at_end[1] if at_end else None
    next_token = before_turn[1] if before_turn else None
    # some templates write the beginning of an answer behind the last message, whoever's it is
    if at_end and closing != next_token and at_end[1] in last[: at_end.start()]:
        closing = None
    found = closing or next_token
    return None if found is None else int(tokenizer.convert_tokens_to_ids(found))
