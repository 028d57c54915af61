"""A tiny language model that speaks in characters: what tests of generation run on."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from river_llm import ExitPolicy, RiverLM, attach_river
from river_llm.engines import TorchEngine

END = 96  # a special token, after 94 visible characters, the blank (94) and the line break (95)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A real tokeniser with one token for each printable ASCII character."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = {character: token for token, character in enumerate([*characters, "Ġ", "Ċ"])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", chat_template=CHAT_TEMPLATE
    )


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """The model with logits that spread as a trained one's do, so that samples depend on them."""
    model.lm_head.weight.data.mul_(20)
    return model


def tiny_lm(
    model: PreTrainedModel,
    policy: ExitPolicy | None = None,
    context_length: int = 64,
    stop_tokens: frozenset[int] = frozenset(),
) -> RiverLM:
    """`model` with a river, by default one that it never enters."""
    model.config.max_position_embeddings = context_length
    attached = attach_river(model, policy=policy or ExitPolicy.never())
    return RiverLM(TorchEngine(attached), character_tokenizer(), attached.config, stop_tokens)


def interrupt_once(model: PreTrainedModel, passes: int) -> None:
    """Raise KeyboardInterrupt within the third layer, after so many whole passes."""
    layer = model.model.layers[2].mlp
    countdown = iter(range(passes, -1, -1))

    def hook(module: nn.Module, args: tuple[object, ...]) -> None:
        if next(countdown) == 0:
            handle.remove()
            raise KeyboardInterrupt

    handle = layer.register_forward_pre_hook(hook)
