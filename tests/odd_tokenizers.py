"""Tokenizers of many kinds with the same special tokens and a chat template."""

from __future__ import annotations

from collections.abc import Callable

from byte_models import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<think>", "</think>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _sentencepiece() -> PreTrainedTokenizerBase:
    """As Llama 2 has it, and with pieces that come to the end of a text, </s>: words begin with a
    mark, unknown characters fall back to bytes."""
    pieces = ["▁", "<", "/", "s", ">", "</", "s>", "x", "a", "b", "ab", "▁ab"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("a", "b"), ("▁", "ab")]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _unigram() -> PreTrainedTokenizerBase:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("<", -3.0), ("/", -3.0), ("s>", -3.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("a", -2.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def _made(make: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    tokenizer = make()
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": SPECIAL})
    tokenizer.chat_template = CHATML
    return tokenizer


TOKENIZERS = {
    "bytes": _made(byte_tokenizer),
    "sentencepiece": _made(_sentencepiece),
    "unigram": _made(_unigram),
}
