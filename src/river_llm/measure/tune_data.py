"""What settings are tuned on, and how much a setting loses there.

Either given texts: every token leaves as decoding would take it, and is compared with what the
backbone predicts at the same place. Or prompts: every setting writes its own answers, and the
backbone reads them, so that a token counts in the text that the setting has made of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from river_llm.config import SamplingConfig
from river_llm.engines import Engine, Step
from river_llm.engines.step import check_logits, check_room
from river_llm.errors import DataError
from river_llm.lm import RiverLM
from river_llm.load.calibration_text import text_prefix
from river_llm.measure.divergence import compare_logits
from river_llm.measure.teacher_forcing import ScoredText, score_texts
from river_llm.river.policy import ExitPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]  # (what is done, steps done, steps in all)

WRITTEN = "text that the model writes"
_NEVER = ExitPolicy.never()
_WRITTEN_TOGETHER, _SCORED_TOGETHER = 32, 8  # sequences at most
_LOGITS = 1 << 28  # of a setting, and of the backbone, that are held at a time, about
_SEED_OFFSET = 1_000_003  # from the seeds that calibration text is written with


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to run the model.

    Attributes:
        river: its folder, as it was given.
        lm: the model with this river.
        policy: when tokens leave the backbone; None: lossless mode.
    """

    river: str
    lm: RiverLM
    policy: ExitPolicy | None

    @property
    def name(self) -> str:
        """A few words."""
        return "lossless" if self.policy is None else self.policy.describe()


@dataclass(frozen=True, slots=True)
class Example:
    """A text, of which the first `prompt` tokens run as a prompt does and predict nothing but the
    token behind them."""

    tokens: tuple[int, ...]
    prompt: int = 0


@dataclass(frozen=True, slots=True)
class SequenceLoss:
    """Of the predictions of one text, the means.

    Attributes:
        kld: KL divergence from the backbone's prediction, nats.
        disagreement: share of tokens that aren't the backbone's argmax.
        exit_layer: backbone layers that a token ran.
    """

    kld: float
    disagreement: float
    exit_layer: float


class TuneData(Protocol):
    """Independent sequences, numbered from 0.

    Attributes:
        name: what they are, in words.
        tokens: of a sequence or answer at most.
    """

    name: str
    tokens: int

    def __len__(self) -> int: ...

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens."""
        ...

    def examples(self, backbone: RiverLM, places: Sequence[int]) -> list[Example]:
        """Some of them as the backbone has them."""
        ...

    def losses(
        self,
        backbone: RiverLM,
        settings: Sequence[Setting],
        places: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> list[list[SequenceLoss]]:
        """What each setting loses on each of these sequences; `progress` counts both."""
        ...


class Texts:
    """Given texts; see `TuneData`."""

    def __init__(self, name: str, sequences: Sequence[Sequence[int]], tokens: int) -> None:
        self.name = name
        self.tokens = tokens
        self._examples = [Example(tuple(tokens)) for tokens in sequences]

    def __len__(self) -> int:
        return len(self._examples)

    @property
    def digest(self) -> str:
        return _digest([example.tokens for example in self._examples])

    def examples(self, backbone: RiverLM, places: Sequence[int]) -> list[Example]:
        return [self._examples[place] for place in places]

    def losses(
        self,
        backbone: RiverLM,
        settings: Sequence[Setting],
        places: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> list[list[SequenceLoss]]:
        found: list[list[SequenceLoss]] = [[] for _ in settings]
        count = _scored_together(backbone.engine, self.tokens)
        for first in range(0, len(places), count):
            examples = [self._examples[i] for i in places[first : first + count]]
            reference = _predictions(backbone.engine, examples, _NEVER)  # for all settings
            for setting, losses in zip(settings, found, strict=True):
                losses += _sequence_losses(setting, examples, reference)
                progress(sum(map(len, found)), len(settings) * len(places))
        return found


class Prompts:
    """Prompts, to which answers are written greedily; see `TuneData`."""

    def __init__(self, name: str, prompts: Sequence[Sequence[int]], tokens: int) -> None:
        self.name = name
        self.tokens = tokens
        self._prompts = [tuple(prompt) for prompt in prompts]

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def digest(self) -> str:
        return _digest(self._prompts)

    def examples(self, backbone: RiverLM, places: Sequence[int]) -> list[Example]:
        return self._answers(backbone, _NEVER, places)

    def losses(
        self,
        backbone: RiverLM,
        settings: Sequence[Setting],
        places: Sequence[int],
        progress: Callable[[int, int], None],
    ) -> list[list[SequenceLoss]]:
        found: list[list[SequenceLoss]] = [[] for _ in settings]
        count = _scored_together(backbone.engine, self.tokens)
        for setting, losses in zip(settings, found, strict=True):
            assert setting.policy is not None
            for first in range(0, len(places), count):
                some = places[first : first + count]
                examples = self._answers(setting.lm, setting.policy, some)
                reference = _predictions(backbone.engine, examples, _NEVER)
                losses += _sequence_losses(setting, examples, reference)
                progress(sum(map(len, found)), len(settings) * len(places))
        return found

    def _answers(self, lm: RiverLM, policy: ExitPolicy, places: Sequence[int]) -> list[Example]:
        sampling, examples = SamplingConfig(max_new_tokens=self.tokens), []
        for first in range(0, len(places), _SCORED_TOGETHER):
            prompts = [self._prompts[i] for i in places[first : first + _SCORED_TOGETHER]]
            answers = lm.generate_batch_tokens(prompts, sampling, policy=policy)
            for prompt, answer in zip(prompts, answers, strict=True):
                examples.append(Example((*prompt, *answer.tokens), len(prompt)))
        return examples


def given_texts(
    tokenizer: PreTrainedTokenizerBase, name: str, text: str, count: int, length: int
) -> Texts:
    """At most `count` windows from all over a text."""
    prefix = text_prefix(tokenizer).tolist()
    token_ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    width = length - len(prefix)
    windows = [token_ids[i : i + width] for i in range(0, len(token_ids) - width + 1, width)]
    taken = (
        [windows[i * len(windows) // count] for i in range(count)]
        if len(windows) > count
        else windows
    )
    return Texts(name, [[*prefix, *window] for window in taken], length)


def written_texts(lm: RiverLM, count: int, length: int, seed: int, progress: Progress) -> Texts:
    """Let the backbone write: samples from its whole distribution, each behind a token that is
    drawn evenly from the vocabulary (see `load.calibration_text`).

    Raises:
        ContextFullError: they don't fit the model's context.
        LogitsError: the model's logits are no numbers.
    """
    engine, prefix = lm.engine, text_prefix(lm.tokenizer).tolist()
    check_room(length, engine.context_length)
    generator = torch.Generator().manual_seed(seed + _SEED_OFFSET)
    firsts = torch.randint(engine.vocab_size, (count,), generator=generator).tolist()
    written: list[list[int]] = []
    for begin in range(0, count, _WRITTEN_TOGETHER):
        texts = [[*prefix, token] for token in firsts[begin : begin + _WRITTEN_TOGETHER]]
        sequences = [engine.add_sequence() for _ in texts]
        try:
            new = texts
            for place in range(len(texts[0]), length):
                logits = _last_logits(engine, sequences, new)
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).tolist()
                new = drawn
                for text, tokens in zip(texts, drawn, strict=True):
                    text += tokens
                progress("writing text", begin * length + place * len(texts), count * length)
        finally:
            for sequence in sequences:
                engine.drop_sequence(sequence)
        written += texts
    return Texts(WRITTEN, written, length)


def split_places(count: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Places below `count`, shuffled: a quarter to learn from, half to certify, a quarter held
    out."""
    places = list(range(count))
    Random(seed).shuffle(places)
    quarter = count // 4
    return places[:quarter], places[quarter:-quarter], places[-quarter:]


def check_count(name: str, count: int, tokens: int, certifying: int) -> None:
    """Validate that half of so many sequences are `certifying`.

    Raises:
        DataError: they aren't.
    """
    needed = 2 * certifying
    if count < needed:
        raise DataError(
            f"{name}: {count} sequences of {tokens} tokens; a certificate at this confidence needs "
            f"{needed}, half of them to certify, {needed * tokens} tokens in all: give more, or "
            "lower --confidence"
        )


def _last_logits(engine: Engine, sequences: list[int], new: list[list[int]]) -> Tensor:
    """Float32 `[sequences, vocabulary]`, on the CPU, behind new tokens, as many of each."""
    width = len(new[0])
    owners = [sequence for sequence in sequences for _ in range(width)]
    ends = range(width - 1, len(owners), width)
    never = torch.tensor(_NEVER.thresholds(engine.num_layers))
    tokens = [token for of_sequence in new for token in of_sequence]
    logits = engine.forward(Step(tokens, owners, never, ends)).logits.float().cpu()
    check_logits(logits)
    return logits


def _scored_together(engine: Engine, tokens: int) -> int:
    """How many texts, with so many predicted tokens each, are scored side by side."""
    return max(1, min(_SCORED_TOGETHER, _LOGITS // (max(1, tokens) * engine.vocab_size)))


def _sequence_losses(
    setting: Setting,
    examples: Sequence[Example],
    reference: Sequence[tuple[Tensor, list[int]]],
) -> list[SequenceLoss]:
    assert setting.policy is not None
    found = _predictions(setting.lm.engine, examples, setting.policy)
    losses = []
    for example, (logits, exits), (of_backbone, _) in zip(examples, found, reference, strict=True):
        targets = torch.tensor(example.tokens[-len(logits) :])
        _, kld, same = compare_logits(logits, of_backbone, targets)
        mean_exit = sum(exits) / len(exits)
        losses.append(SequenceLoss(max(0.0, float(kld.mean())), 1 - float(same.mean()), mean_exit))
    return losses


def _predictions(
    engine: Engine, examples: Sequence[Example], policy: ExitPolicy
) -> list[tuple[Tensor, list[int]]]:
    """Logits `[predicted tokens, vocabulary]` along texts, and the layers that ran for each."""
    decoding = torch.tensor(policy.thresholds(engine.num_layers))
    reading = torch.tensor(policy.prefill_thresholds(engine.num_layers))
    texts = []
    for example in examples:
        tokens = example.tokens[:-1]
        rows = decoding.repeat(len(tokens), 1)
        rows[: example.prompt] = reading
        texts.append(ScoredText(tokens, rows, max(0, example.prompt - 1)))
    return score_texts(engine, texts, policy.second_look)


def _digest(sequences: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps(sequences).encode()).hexdigest()
