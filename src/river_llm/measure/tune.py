"""The fastest setting whose loss keeps to a budget, with a certificate.

learn      on a quarter of the sequences, every setting's loss; its speed in interleaved rounds
order      the settings that no other beats in both, from strict to loose
certify    on half of them, setting after setting until one fails (`certificate`)
hold out   the rest: what the chosen one loses there, to look at
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import ROUND_CEILING, Context
from functools import partial
from statistics import fmean
from typing import Any

import torch

from river_llm.config import SamplingConfig, TuneConfig
from river_llm.errors import ConfigError
from river_llm.lm import RiverLM
from river_llm.measure.candidates import candidate_policies
from river_llm.measure.certificate import (
    Certificate,
    certify_in_order,
    least_sequences,
    smallest_budget,
)
from river_llm.measure.environment import describe_run
from river_llm.measure.pareto import pareto_front
from river_llm.measure.rounds import Spread, Timing, Workload, measure
from river_llm.measure.teacher_forcing import decode_seconds, similarities
from river_llm.measure.tune_data import (
    Example,
    Progress,
    SequenceLoss,
    Setting,
    TuneData,
    check_count,
    split_places,
)
from river_llm.river.policy import ExitPolicy
from river_llm.river.tuned import WIDTHS, QualityBudget, Tuned

_PROMPT = 16  # tokens of a text before those whose decoding is timed
_ROUND_UP = Context(prec=4, rounding=ROUND_CEILING)  # what wasn't tested isn't promised
_HOPELESS = 1.5  # times the budget: settings that lost more aren't tried on the next sequences


@dataclass(frozen=True, slots=True)
class Measured:
    """A setting, and what was measured of it.

    Attributes:
        kld: mean KL divergence from the backbone, nats a token.
        agreement: share of tokens that the backbone would have chosen.
        exit_layer: mean number of backbone layers a token.
        speed_up: times the backbone's speed, round by round.
        is_on_front: no other setting is faster and loses less.
        certificate: None: it wasn't tested.
    """

    setting: Setting
    kld: float
    agreement: float
    exit_layer: float
    speed_up: Spread
    is_on_front: bool = False
    certificate: Certificate | None = None

    @property
    def is_certified(self) -> bool:
        """Whether it was tested and passed."""
        return self.certificate is not None and self.certificate.passes

    def loss(self, budget: QualityBudget) -> float:
        """As the budget measures it."""
        return 1 - self.agreement if budget.measure == "agreement" else self.kld

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        policy = self.setting.policy
        return {
            "river": self.setting.river,
            "setting": self.setting.name,
            "policy": None if policy is None else policy.to_dict(),
            "kld": self.kld,
            "agreement": self.agreement,
            "mean_exit_layer": self.exit_layer,
            "speed_up": asdict(self.speed_up),
            "is_on_front": self.is_on_front,
            "certificate": None if self.certificate is None else asdict(self.certificate),
        }


@dataclass(frozen=True, slots=True)
class Tuning:
    """What came of it.

    Attributes:
        measured: the backbone, lossless mode, and the settings that are faster.
        slower: how many others there are.
        chosen: one of them.
        tuned: what is saved with its river.
        held_out: sequences of the held-out value.
    """

    measured: list[Measured]
    slower: int
    chosen: Measured
    tuned: Tuned
    held_out: int


def tune(
    lms: Mapping[str, RiverLM],
    data: TuneData,
    budget: QualityBudget,
    config: TuneConfig,
    widths: Mapping[str, int],
    progress: Progress,
) -> Tuning:
    """Choose a setting.

    Args:
        lms: the model with each of its rivers, by the river's folder.
        widths: bits that the engines were made with, see `Tuned`.
        progress: called with (what is done, steps done, steps in all).

    Raises:
        ConfigError: no setting is as fast as asked for.
        DataError: there are too few sequences for a certificate.
        RiverError: a sequence doesn't fit the context, or logits are no numbers.
    """
    check_count(data.name, len(data), data.tokens, sequences_to_certify(budget, config))
    learning, certifying, held_out = split_places(len(data), config.seed)
    backbone = next(iter(lms.values()))
    examples = data.examples(backbone, learning)
    settings = _settings(lms, examples)
    speeds = _speeds(settings, examples, config, partial(progress, "measuring speed"))
    settings, speeds, slower = _fast_enough(settings, speeds, budget)
    losses = _losses(data, backbone, settings, learning, partial(progress, "measuring loss"))
    measured = _mark_front(
        [
            _measured(setting, of_setting, speed)
            for setting, of_setting, speed in zip(settings, losses, speeds, strict=True)
        ],
        budget,
    )
    order = _order(measured, budget)
    tried = [measured[place].setting for place in order]
    losses = _losses(data, backbone, tried, certifying, partial(progress, "certifying"))
    tests = _tests(losses, budget, config.confidence)
    for place, test in zip(order, tests, strict=False):
        measured[place] = replace(measured[place], certificate=test)
    chosen = _choose(measured)
    (left,) = _losses(data, backbone, [chosen.setting], held_out, partial(progress, "held out"))
    tuned = _tuned(chosen, left, data, budget, config, widths)
    return Tuning(measured, slower, chosen, tuned, len(held_out))


def sequences_to_certify(budget: QualityBudget, config: TuneConfig) -> int:
    """How many are needed at least."""
    return least_sequences(budget.loss, config.confidence, budget.largest_loss)


def _settings(lms: Mapping[str, RiverLM], examples: Sequence[Example]) -> list[Setting]:
    """The backbone first, then what may be chosen."""
    (name, backbone), *_ = lms.items()
    seen = torch.cat([_similarities(backbone, example) for example in examples], 1)
    policies: list[ExitPolicy | None] = [None, *candidate_policies(seen)]
    return [
        Setting(name, backbone, ExitPolicy.never()),
        *(Setting(river, lm, policy) for river, lm in lms.items() for policy in policies),
    ]


def _similarities(backbone: RiverLM, example: Example) -> torch.Tensor:
    return similarities(backbone.engine, example.tokens)[:, example.prompt :]


class _AlongExamples:
    """Decoding along texts, another one in each round; see `rounds.Variant`."""

    def __init__(self, setting: Setting, examples: Sequence[Example]) -> None:
        self.name, self.engine = setting.name, setting.lm.engine.name
        lm = setting.lm
        self._lm = RiverLM(lm.engine, lm.tokenizer, lm.river_config)  # its answers have no end
        self._policy = setting.policy
        self._examples = examples
        self._rounds = 0

    def takes(self, workload: Workload) -> bool:
        return True

    def prepare(self, workload: Workload) -> None:
        """Its prompt is read in the run, and not timed."""

    def run(self, workload: Workload) -> Timing:
        example = self._examples[self._rounds % len(self._examples)]
        self._rounds += 1
        prompt = example.prompt or min(_PROMPT, len(example.tokens) // 2)
        if self._policy is None:
            # sampled where the text is: greedy text repeats itself, and that is easy to guess
            sampling = SamplingConfig(
                max_new_tokens=len(example.tokens) - prompt + 1,
                temperature=0.0 if example.prompt else 1.0,
                seed=self._rounds,
            )
            (answer,) = self._lm.generate_batch_tokens([example.tokens[:prompt]], sampling)
            count = len(answer.tokens) - 1  # the first is the prompt's
            return Timing(count / (answer.decode_tokens_per_second or math.inf), count)
        engine, look = self._lm.engine, self._policy.second_look
        thresholds = torch.tensor(self._policy.thresholds(engine.num_layers))
        seconds, depths = decode_seconds(engine, example.tokens, thresholds, prompt, look)
        return Timing(seconds, len(depths))


def _speeds(
    settings: Sequence[Setting],
    examples: Sequence[Example],
    config: TuneConfig,
    progress: Callable[[int, int], None],
) -> list[Spread]:
    """Of each setting, times that of the first one.

    Raises:
        ConfigError: the texts are too short.
    """
    long = [one for one in examples if len(one.tokens) - one.prompt >= 4]
    if not long:
        raise ConfigError("the answers are too short to time; give prompts with longer ones")
    variants = [_AlongExamples(setting, long) for setting in settings]
    workload = Workload("decode", max(len(one.tokens) for one in long))
    (results,) = measure(variants, [workload], config.rounds, lambda: math.nan, progress)
    return [result.times_as_fast_as(results[0]) for result in results]


def _fast_enough(
    settings: list[Setting], speeds: list[Spread], budget: QualityBudget
) -> tuple[list[Setting], list[Spread], int]:
    """What loses nothing, and the settings that are faster; how many are not.

    Raises:
        ConfigError: none is as fast as the budget wants.
    """
    best = max(range(len(settings)), key=lambda i: speeds[i].median)
    if budget.measure == "speed" and speeds[best].median < budget.value:
        raise ConfigError(
            f"no setting has {budget.value:g} times the backbone's speed; the fastest has "
            f"{speeds[best].median:.2f} ({settings[best].name}, {settings[best].river})"
        )
    exact = max(speeds[i].median for i, one in enumerate(settings) if _is_exact(one))
    asked = budget.value if budget.measure == "speed" else 0.0
    kept = [
        i
        for i, one in enumerate(settings)
        if _is_exact(one) or (speeds[i].median > exact and speeds[i].median >= asked)
    ]
    return [settings[i] for i in kept], [speeds[i] for i in kept], len(settings) - len(kept)


def _losses(
    data: TuneData,
    backbone: RiverLM,
    settings: Sequence[Setting],
    places: Sequence[int],
    progress: Callable[[int, int], None],
) -> list[list[SequenceLoss]]:
    """What settings lose; those that lose nothing aren't measured."""
    nothing = [SequenceLoss(0.0, 0.0, backbone.engine.num_layers)] * len(places)
    found = [nothing for _ in settings]
    leaving = [i for i, setting in enumerate(settings) if not _is_exact(setting)]
    if leaving:
        some = [settings[i] for i in leaving]
        for i, losses in zip(leaving, data.losses(backbone, some, places, progress), strict=True):
            found[i] = losses
    return found


def _is_exact(setting: Setting) -> bool:
    return setting.policy is None or setting.policy.kind == "never"


def _measured(setting: Setting, losses: Sequence[SequenceLoss], speed: Spread) -> Measured:
    return Measured(
        setting,
        fmean(loss.kld for loss in losses),
        1 - fmean(loss.disagreement for loss in losses),
        fmean(loss.exit_layer for loss in losses),
        speed,
    )


def _mark_front(measured: list[Measured], budget: QualityBudget) -> list[Measured]:
    points = [(one.speed_up.median, -one.loss(budget)) for one in measured]
    front = pareto_front(points)
    return [replace(one, is_on_front=i in front) for i, one in enumerate(measured)]


def _order(measured: Sequence[Measured], budget: QualityBudget) -> list[int]:
    """Which settings are tested, from strict to loose."""
    leaving = [i for i, one in enumerate(measured) if not _is_exact(one.setting)]
    if budget.measure == "speed":
        if any(_is_exact(one.setting) and one.speed_up.median >= budget.value for one in measured):
            return []
        return [min(leaving, key=lambda i: measured[i].kld)]
    tried = [
        i
        for i in leaving
        if measured[i].is_on_front and measured[i].loss(budget) <= _HOPELESS * budget.loss
    ]
    return sorted(tried, key=lambda i: measured[i].loss(budget))


def _tests(
    losses: Sequence[Sequence[SequenceLoss]], budget: QualityBudget, confidence: float
) -> list[Certificate]:
    """Up to the first that fails; where a speed was asked for, at the smallest budget."""
    values = [
        [one.disagreement if budget.measure == "agreement" else one.kld for one in of_setting]
        for of_setting in losses
    ]
    if budget.measure == "speed":
        found = [smallest_budget(of_setting, confidence) for of_setting in values]
        return [one for one in found if one is not None]
    return list(certify_in_order(values, budget.loss, confidence, budget.largest_loss))


def _choose(measured: Sequence[Measured]) -> Measured:
    """The fastest of those that are certified, or lose nothing."""
    allowed = [one for one in measured if _is_exact(one.setting) or one.is_certified]
    return max(allowed, key=lambda one: one.speed_up.median)


def _tuned(
    chosen: Measured,
    held_out: Sequence[SequenceLoss],
    data: TuneData,
    budget: QualityBudget,
    config: TuneConfig,
    widths: Mapping[str, int],
) -> Tuned:
    test, setting = chosen.certificate, chosen.setting
    certified = None
    if test is not None and budget.measure == "speed":
        certified = f"kld={float(_ROUND_UP.create_decimal(test.budget)):g}"
    elif test is not None:
        certified = budget.describe()
    is_agreement = budget.measure == "agreement"
    left = [loss.disagreement if is_agreement else loss.kld for loss in held_out]
    return Tuned(
        policy=setting.policy,
        budget=budget.describe(),
        certified=certified,
        confidence=config.confidence,
        sequences=0 if test is None else test.sequences,
        tokens=data.tokens,
        cut_sequences=0 if test is None else test.cut_sequences,
        loss=0.0 if test is None else test.mean_loss,
        held_out_loss=None if test is None else fmean(left),
        speed_up=chosen.speed_up.median,
        data=data.name,
        data_digest=data.digest,
        seed=config.seed,
        widths={name: widths[name] for name in WIDTHS},
        engine=setting.lm.engine.name,
        run=describe_run(),
    )
