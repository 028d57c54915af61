"""`score_text` against untouched and hand-quantised models, in float64."""

from __future__ import annotations

import copy
import math
import statistics

import numpy
import pytest
import torch
from exit_reference import decode_with_exits
from tiny_lm import sharpened
from tiny_models import fake_quantised
from torch import Tensor
from transformers import PreTrainedModel

from river_llm import ExitPolicy, River, RiverConfig, attach_river
from river_llm.attachment import AttachedRiver
from river_llm.engines import TorchEngine
from river_llm.measure.divergence import TextScore, score_text

_generator = torch.Generator().manual_seed(3)
# The longest is scored in more than one piece.
WINDOWS = [
    torch.randint(0, 97, (length,), generator=_generator).tolist() for length in (300, 2, 17, 40)
]
CONFIG = RiverConfig(bits=3)
THRESHOLDS = (math.inf, 0.935, 0.92, 0.88)  # tokens leave after any of the layers
NEVER, ALWAYS, MIXED = ExitPolicy.never(), ExitPolicy.always(), ExitPolicy.per_layer(THRESHOLDS)


@pytest.fixture
def tiny_llama(tiny_llama: PreTrainedModel) -> PreTrainedModel:
    """Sharpened: the divergence is far above the rounding of float32."""
    return sharpened(tiny_llama)


@pytest.fixture
def river(tiny_llama: PreTrainedModel) -> River:
    return River.build(tiny_llama, CONFIG)


@pytest.fixture
def attached(tiny_llama: PreTrainedModel, river: River) -> AttachedRiver:
    return attach_river(copy.deepcopy(tiny_llama), river, policy=MIXED)


@torch.no_grad()
def plain_logits(model: PreTrainedModel) -> Tensor:
    """Logits for all predicted tokens of `WINDOWS`, each window on its own."""
    return torch.cat([model(torch.tensor([window])).logits[0, :-1] for window in WINDOWS])


def losses(logits: Tensor, windows: list[list[int]] = WINDOWS) -> list[float]:
    """Negative log-likelihood of every predicted token, float64."""
    targets = [token for window in windows for token in window[1:]]
    rows = logits.double().log_softmax(-1)
    return [-float(row[target]) for row, target in zip(rows, targets, strict=True)]


def divergences(reference: Tensor, logits: Tensor) -> list[float]:
    """KL divergence of every predicted token, float64."""
    p, q = reference.double().softmax(-1), logits.double().softmax(-1)
    return [float(value) for value in (p * (p / q).log()).sum(-1)]


def check(
    score: TextScore, reference: Tensor, logits: Tensor, exit_layers: list[int], rel: float = 1e-4
) -> None:
    """Every field of the score against these logits."""
    nll, kld = losses(logits), divergences(reference, logits)
    count = sum(len(window) - 1 for window in WINDOWS)
    assert score.num_tokens == count == len(nll) == len(kld) == len(exit_layers)
    perplexity = math.exp(statistics.fmean(nll))
    assert score.perplexity == pytest.approx(perplexity, rel=rel)
    error = perplexity * statistics.stdev(nll) / math.sqrt(count)
    assert score.perplexity_error == pytest.approx(error, rel=rel)
    assert score.mean_kld == pytest.approx(statistics.fmean(kld), rel=rel)
    assert score.mean_kld_error == pytest.approx(statistics.stdev(kld) / math.sqrt(count), rel=rel)
    assert score.median_kld == pytest.approx(statistics.median(kld), rel=rel)
    assert score.kld_99 == pytest.approx(numpy.quantile(kld, 0.99), rel=rel)
    assert score.kld_999 == pytest.approx(numpy.quantile(kld, 0.999), rel=rel)
    assert score.max_kld == pytest.approx(max(kld), rel=rel)
    same = sum(bool(a == b) for a, b in zip(reference.argmax(-1), logits.argmax(-1), strict=True))
    assert score.same_top == pytest.approx(same / count)
    assert score.mean_exit_layer == pytest.approx(statistics.fmean(exit_layers))


def test_the_backbone_against_itself_is_nought(
    attached: AttachedRiver, tiny_llama: PreTrainedModel
) -> None:
    score = score_text(attached, WINDOWS, {"backbone": NEVER})["backbone"]
    assert score.mean_kld == score.mean_kld_error == score.max_kld == 0
    assert score.median_kld == score.kld_99 == score.kld_999 == 0
    assert score.same_top == 1
    assert score.mean_exit_layer == 4
    nll = losses(plain_logits(tiny_llama))
    assert score.num_tokens == len(nll) == 299 + 1 + 16 + 39
    assert score.perplexity == pytest.approx(math.exp(statistics.fmean(nll)), rel=1e-5)


def test_the_river_diverges_as_the_quantised_model_does(
    attached: AttachedRiver, tiny_llama: PreTrainedModel, river: River
) -> None:
    score = score_text(attached, WINDOWS, {"full": ALWAYS})["full"]
    reference = plain_logits(tiny_llama)
    logits = plain_logits(fake_quantised(tiny_llama, river))
    check(score, reference, logits, [0] * len(logits))
    assert score.mean_kld > 0.01
    assert 0 < score.same_top < 1
    assert score.median_kld < score.mean_kld < score.kld_99 < score.kld_999 < score.max_kld


@pytest.mark.parametrize("exit_layer", [1, 3])
def test_a_fixed_exit_is_the_model_with_the_layers_behind_quantised(
    attached: AttachedRiver, tiny_llama: PreTrainedModel, river: River, exit_layer: int
) -> None:
    arms = {"fixed": ExitPolicy.fixed(exit_layer)}
    score = score_text(attached, WINDOWS, arms)["fixed"]
    logits = plain_logits(fake_quantised(tiny_llama, river, exit_layer))
    check(score, plain_logits(tiny_llama), logits, [exit_layer] * len(logits))


def test_exits_by_similarity_are_those_of_slow_decoding(
    attached: AttachedRiver, tiny_llama: PreTrainedModel, river: River
) -> None:
    score = score_text(attached, WINDOWS, {"River": MIXED})["River"]
    decoded = [decode_with_exits(tiny_llama, river, w, THRESHOLDS) for w in WINDOWS]
    logits = torch.cat([window_logits[:-1] for window_logits, _ in decoded])
    exit_layers = [layer for _, layers in decoded for layer in layers[:-1]]
    assert set(exit_layers) == {1, 2, 3, 4}
    check(score, plain_logits(tiny_llama), logits, exit_layers)


@pytest.mark.parametrize(
    "policy",
    [
        ExitPolicy.similarity(0.93),
        ExitPolicy.similarity(0.92, 2, prefill="sequence"),
        ExitPolicy.similarity(0.9, prefill="river"),
    ],
    ids=lambda policy: policy.describe(),
)
def test_exits_are_those_of_the_engines_decoding(
    attached: AttachedRiver, tiny_llama: PreTrainedModel, policy: ExitPolicy
) -> None:
    score = score_text(attached, WINDOWS, {"River": policy})["River"]
    engine = TorchEngine(attached)
    engine.policy, engine.context_length = policy, None
    logits, exit_layers = [], []
    for window in WINDOWS:
        engine.truncate(0)
        for token in window[:-1]:
            step = engine.decode(torch.tensor([token]))
            logits.append(step.logits[0])
            exit_layers.append(int(step.exit_layers[0]))
    assert len(set(exit_layers)) > 1
    check(score, plain_logits(tiny_llama), torch.stack(logits), exit_layers)


def test_arms_do_not_disturb_each_other(attached: AttachedRiver) -> None:
    arms = {"full": ALWAYS, "River": MIXED, "backbone": NEVER}
    together = score_text(attached, WINDOWS, arms)
    assert list(together) == list(arms)
    for name, policy in arms.items():
        assert score_text(attached, WINDOWS, {name: policy})[name] == together[name]


def test_every_window_stands_on_its_own(attached: AttachedRiver) -> None:
    """Their mean is weighted by their predicted tokens, in whichever order they come."""
    whole = score_text(attached, WINDOWS, {"River": MIXED})["River"]
    singles = [score_text(attached, [window], {"River": MIXED})["River"] for window in WINDOWS]
    for name in ("mean_kld", "same_top", "mean_exit_layer"):
        total = sum(getattr(single, name) * single.num_tokens for single in singles)
        assert getattr(whole, name) == pytest.approx(total / whole.num_tokens, rel=1e-5)
    nll = sum(math.log(single.perplexity) * single.num_tokens for single in singles)
    assert math.log(whole.perplexity) == pytest.approx(nll / whole.num_tokens, rel=1e-5)
    assert whole.max_kld == max(single.max_kld for single in singles)


def test_one_predicted_token_has_no_standard_error(attached: AttachedRiver) -> None:
    score = score_text(attached, [WINDOWS[1]], {"full": ALWAYS})["full"]
    assert score.num_tokens == 1
    assert math.isnan(score.perplexity_error)
    assert math.isnan(score.mean_kld_error)
    assert score.mean_kld == score.median_kld == score.max_kld > 0


def test_tells_its_progress(attached: AttachedRiver) -> None:
    told: list[tuple[int, int]] = []
    score_text(attached, WINDOWS, {"full": ALWAYS}, lambda *done: told.append(done))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_leaves_the_policy_after_an_error_too(attached: AttachedRiver) -> None:
    score_text(attached, WINDOWS, {"full": ALWAYS})
    assert attached.policy is MIXED

    def fail(done: int, total: int) -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError):
        score_text(attached, WINDOWS, {"full": ALWAYS}, fail)
    assert attached.policy is MIXED
