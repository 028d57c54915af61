"""Text that exit layers are calibrated on: what the model itself writes, or a file's.

A model's own text needs no data, and is in its languages and forms by construction. Each sequence
begins with a token drawn evenly from the vocabulary, so that they differ, and goes on with samples
from the model's whole distribution (as in Liu et al. 2023, "LLM-QAT").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from river_llm.engines.step import check_logits
from river_llm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NUM_SEQUENCES = 96
NUM_TOKENS = 128  # of a sequence
_LEAST_SEQUENCES = 32  # below it the inputs of a layer have too few directions


@torch.no_grad()
def written_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> Tensor:
    """Let the model write: token ids `[96, 128]`, or shorter where its context is.

    Args:
        progress: called after each token of the sequences with (tokens done, tokens in all).

    Raises:
        LogitsError: the model's logits are no numbers.
    """
    embedding = model.get_input_embeddings().weight
    generator = torch.Generator(embedding.device).manual_seed(seed)
    first = torch.empty(NUM_SEQUENCES, 1, dtype=torch.long, device=embedding.device)
    first.random_(0, len(embedding), generator=generator)
    prefix = text_prefix(tokenizer).to(embedding.device)
    token_ids = torch.cat([prefix.expand(NUM_SEQUENCES, -1), first], dim=1)
    length = _sequence_length(model)
    cache, new = None, token_ids
    while token_ids.shape[1] < length:
        output = model(input_ids=new, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[:, -1].float()
        check_logits(logits, "calibration text: ")
        new = _sampled(logits.softmax(-1), generator)
        token_ids = torch.cat([token_ids, new], dim=1)
        if progress:
            progress(token_ids.shape[1], length)
    return token_ids


def _sampled(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token a row, `[rows, 1]`: a random number for each, not for each token of the vocabulary,
    as `torch.multinomial` takes."""
    cumulated = probabilities.cumsum(-1)
    share = torch.rand(len(probabilities), 1, device=probabilities.device, generator=generator)
    places = torch.searchsorted(cumulated, share * cumulated[:, -1:], right=True)
    return places.clamp_(max=probabilities.shape[-1] - 1)


def given_text(text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids `[sequences, tokens]` from all over a text, at most `[96, 128]`.

    Raises:
        ConfigError: it is too short.
    """
    prefix = text_prefix(tokenizer)
    token_ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    length = _sequence_length(model) - len(prefix)
    num_sequences = len(token_ids) // length
    if num_sequences < _LEAST_SEQUENCES:
        raise ConfigError(
            f"the calibration text has {len(token_ids)} tokens; give one of "
            f"{NUM_SEQUENCES * length} ({_LEAST_SEQUENCES * length} at least), or leave it out, "
            "and the model writes one"
        )
    sequences = token_ids[: num_sequences * length].view(num_sequences, length)
    taken = torch.linspace(0, num_sequences - 1, min(NUM_SEQUENCES, num_sequences)).long()
    whole = torch.cat([prefix.expand(len(taken), -1), sequences[taken]], dim=1)
    return whole.to(model.get_input_embeddings().weight.device)


def text_prefix(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What the tokenizer puts before every text, as a BOS token: `[tokens]`."""
    whole, plain = (tokenizer("a", add_special_tokens=added).input_ids for added in (True, False))
    starts = range(len(whole) - len(plain) + 1)
    end = next((i for i in starts if whole[i : i + len(plain)] == plain), 0)
    return torch.tensor(whole[:end], dtype=torch.long)


def _sequence_length(model: PreTrainedModel) -> int:
    config = model.config.get_text_config(decoder=True)
    return min(NUM_TOKENS, getattr(config, "max_position_embeddings", None) or NUM_TOKENS)
