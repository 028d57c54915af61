"""The model under test with its river and its tokens, from a name or a shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from river_llm.backbone import decoder_layers
from river_llm.benchmark.random_weights import SHAPES, random_model, random_river
from river_llm.benchmark.workload import TokenSource
from river_llm.config import RiverConfig
from river_llm.load.model import load_backbone
from river_llm.river import Progress, River


@dataclass(frozen=True, slots=True)
class Subject:
    """What is timed.

    Attributes:
        name: as tables have it; it says so where the weights are random.
        is_random: whether they are.
        tokens: what is run.
    """

    name: str
    is_random: bool
    model: PreTrainedModel
    river: River
    tokens: TokenSource

    @property
    def context_length(self) -> int | None:
        """The most tokens that a sequence may hold; None if there is no limit."""
        config = self.model.config.get_text_config(decoder=True)
        length: int | None = getattr(config, "max_position_embeddings", None)
        return length


def load_subject(
    name: str,
    river: Path | RiverConfig,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    check: Callable[[PreTrainedModel], object] | None = None,
) -> Subject:
    """A model on the CPU and its river, loaded or built; `check` may refuse the model before.

    Raises:
        ModelLoadError, UnsupportedModelError, RiverFileError, ConfigError: see `errors`.
    """
    model, tokenizer = load_backbone(name, dtype, "cpu", trust_remote_code)
    if check is not None:
        check(model)
    if isinstance(river, RiverConfig):
        made = River.build(model, river, progress)
    else:
        made = River.load(river)
        made.check_fits(decoder_layers(model))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return Subject(name, False, model, made, TokenSource.for_model(tokenizer, vocabulary))


def random_subject(shape: str, config: RiverConfig) -> Subject:
    """A model of one of `SHAPES` with random weights, and its river.

    Raises:
        ConfigError: the group size doesn't divide the input width of some linear layer.
    """
    model = random_model(SHAPES[shape])
    river = random_river(model, config)
    tokens = TokenSource.for_model(None, model.config.vocab_size)
    return Subject(f"{shape} (random weights)", True, model, river, tokens)
