"""Inspection, comparison and text scores, against models that are quantised by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import fake_quantised, tiny_model
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from river_llm import ExitPolicy, River, RiverConfig, attach_river
from river_llm.attachment import AttachedRiver
from river_llm.comparison import compare_arms
from river_llm.engines import StepResult, TorchEngine
from river_llm.evaluation.divergence import score_text
from river_llm.inspection import inspect_text

CONFIG = RiverConfig(group_size=32)
WINDOWS = torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(2)).tolist()
MIXED = ExitPolicy.per_layer((math.inf, 0.45, 0.8, 0.85))


@pytest.fixture
def plain() -> PreTrainedModel:
    return tiny_model("Llama")


@pytest.fixture
def quantised(plain: PreTrainedModel) -> PreTrainedModel:
    return fake_quantised(plain, River.build(plain, CONFIG))


@pytest.fixture
def attached() -> AttachedRiver:
    return attach_river(tiny_model("Llama"), CONFIG)


class TestInspection:
    def test_similarities_are_those_of_the_untouched_layers(
        self, attached: AttachedRiver, plain: PreTrainedModel
    ) -> None:
        states: list[tuple[Tensor, Tensor]] = []
        for layer in plain.model.layers:
            layer.register_forward_hook(lambda m, args, out: states.append((args[0], out)))
        _logits(plain, WINDOWS[0])
        inspection = inspect_text(attached, WINDOWS[0])
        for measured, (before, after) in zip(inspection.similarities, states, strict=True):
            dot = (before[0].double() * after[0].double()).sum(-1)
            expected = dot / before[0].double().norm(dim=-1) / after[0].double().norm(dim=-1)
            torch.testing.assert_close(measured.double(), expected, rtol=1e-5, atol=1e-6)

    def test_cosines_are_those_of_two_separate_models(
        self, attached: AttachedRiver, plain: PreTrainedModel, quantised: PreTrainedModel
    ) -> None:
        caches = [DynamicCache(), DynamicCache()]
        for model, cache in zip((plain, quantised), caches, strict=True):
            with torch.no_grad():
                model(torch.tensor([WINDOWS[0]]), past_key_values=cache, use_cache=True)
        inspection = inspect_text(attached, WINDOWS[0])
        for index in range(4):
            backbone, river = (cache.layers[index] for cache in caches)
            for name, cosines in (
                ("keys", inspection.key_cosine),
                ("values", inspection.value_cosine),
            ):
                a, b = getattr(backbone, name)[0, :, 1:], getattr(river, name)[0, :, 1:]
                expected = F.cosine_similarity(a, b, dim=-1).mean()
                assert float(cosines[index]) == pytest.approx(float(expected), abs=1e-5)
                assert float(expected) < 0.9999

    def test_exits_are_those_of_decoding(self, attached: AttachedRiver) -> None:
        attached.policy = MIXED
        inspection = inspect_text(attached, WINDOWS[0])
        assert len(inspection.exit_layers.unique()) > 1
        _, exit_layers = _decode(attached, WINDOWS[0])
        assert inspection.exit_layers.tolist() == exit_layers

    def test_the_policy_is_put_back(self, attached: AttachedRiver) -> None:
        attached.policy = MIXED
        inspect_text(attached, WINDOWS[0])
        with pytest.raises(IndexError):
            inspect_text(attached, [10**6, 1])
        assert attached.policy is MIXED
        assert not attached.router.record_similarities


class TestTextScore:
    def test_backbone_against_itself_is_nought_and_the_plain_models_perplexity(
        self, attached: AttachedRiver, plain: PreTrainedModel
    ) -> None:
        score = score_text(attached, WINDOWS, {"backbone": ExitPolicy.never()})["backbone"]
        assert (score.mean_kld, score.max_kld, score.same_top) == (0, 0, 1)
        assert (score.mean_exit_layer, score.num_tokens) == (4, 3 * 19)
        losses = torch.cat(
            [
                F.cross_entropy(
                    _logits(plain, window)[:-1], torch.tensor(window[1:]), reduction="none"
                )
                for window in WINDOWS
            ]
        ).double()
        assert score.perplexity == pytest.approx(float(losses.mean().exp()), rel=1e-5)
        error = float(losses.std()) / math.sqrt(len(losses))
        assert score.perplexity_error == pytest.approx(score.perplexity * error, rel=1e-4)

    def test_full_quantisation_diverges_as_by_hand(
        self, attached: AttachedRiver, plain: PreTrainedModel, quantised: PreTrainedModel
    ) -> None:
        score = score_text(attached, WINDOWS, {"full": ExitPolicy.always()})["full"]
        p, q = (
            torch.cat([_logits(model, window)[:-1] for window in WINDOWS]).double().softmax(-1)
            for model in (plain, quantised)
        )
        divergence = (p * (p.log() - q.log())).sum(-1)
        assert score.mean_kld == pytest.approx(float(divergence.mean()), rel=1e-3)
        assert score.max_kld == pytest.approx(float(divergence.max()), rel=1e-3)
        assert score.median_kld == pytest.approx(float(divergence.quantile(0.5)), rel=1e-3)
        assert score.same_top == pytest.approx(
            float((p.argmax(-1) == q.argmax(-1)).double().mean())
        )
        assert 0 < score.same_top < 1
        assert score.mean_exit_layer == 0

    def test_exits_are_scored_as_decoding_takes_them(self, attached: AttachedRiver) -> None:
        score = score_text(attached, WINDOWS, {"mixed": MIXED})["mixed"]
        losses, depths = [], []
        attached.policy = MIXED
        for window in WINDOWS:
            logits, exit_layers = _decode(attached, window)
            losses.append(F.cross_entropy(logits[:-1], torch.tensor(window[1:])))
            depths += exit_layers[:-1]
        assert len(set(depths)) > 1
        assert score.mean_exit_layer == pytest.approx(sum(depths) / len(depths))
        perplexity = float(torch.stack(losses).mean().exp())
        assert score.perplexity == pytest.approx(perplexity, rel=1e-4)

    def test_the_policy_is_put_back(self, attached: AttachedRiver) -> None:
        attached.policy = MIXED
        with pytest.raises(IndexError):
            score_text(attached, [[10**6, 1]], {"full": ExitPolicy.always()})
        assert attached.policy is MIXED


class ScriptedEngine:
    """Says what it is told, and writes down what it is asked."""

    name, num_layers, context_length = "scripted", 4, None

    def __init__(self) -> None:
        self.policy = ExitPolicy.never()
        self.length = 0
        self.policies_by_pass: list[str] = []

    def prefill(self, token_ids: Tensor, padding_mask: Tensor | None = None) -> StepResult:
        self.policies_by_pass.append(self.policy.kind)
        self.length = token_ids.shape[1]
        return self._step()

    def decode(self, token_ids: Tensor) -> StepResult:
        self.length += 1
        return self._step()

    def truncate(self, length: int) -> None:
        self.length = min(length, self.length)

    def _step(self) -> StepResult:
        """The backbone says 0, 1, 2 ...; the river is wrong at every second place."""
        token = self.length - 3
        wrong = self.policy.kind == "always" and token % 2 == 1
        logits = nn.functional.one_hot(torch.tensor([8 if wrong else token]), 9).float()
        return StepResult(logits, torch.tensor([0 if self.policy.kind == "always" else token]))


class TestComparison:
    def test_takes_turns_and_counts_agreement_and_depth(self) -> None:
        engine = ScriptedEngine()
        arms = {"backbone": ExitPolicy.never(), "full": ExitPolicy.always()}
        backbone, full = compare_arms(engine, [5, 6, 7], [0, 1, 2, 3], arms, rounds=3)
        assert engine.policies_by_pass == ["never", "always"] * 3
        assert (backbone.agreement, full.agreement) == (1, 0.5)
        assert (backbone.mean_exit_layer, full.mean_exit_layer) == ((1 + 2 + 3) / 3, 0)
        assert full.slowest <= full.decode_tokens_per_second <= full.fastest
        assert engine.length == 0
        assert engine.policy.kind == "never"

    def test_the_backbone_agrees_with_its_own_answer(self, attached: AttachedRiver) -> None:
        attached.policy = ExitPolicy.never()
        prompt = torch.tensor([WINDOWS[0]])
        answer = attached.model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 20:]
        arms = {"backbone": ExitPolicy.never(), "full": ExitPolicy.always()}
        results = compare_arms(TorchEngine(attached), WINDOWS[0], answer.tolist(), arms, rounds=1)
        assert results[0].agreement == 1
        assert results[1].agreement < 1


def _logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def _decode(attached: AttachedRiver, tokens: list[int]) -> tuple[Tensor, list[int]]:
    """Logits and exit layers of the tokens given one by one, none of them as a prompt."""
    engine = TorchEngine(attached)
    engine.policy = replace(attached.policy, prefill="backbone")
    steps = [engine.decode(torch.tensor([token])) for token in tokens]
    logits = torch.cat([step.logits for step in steps])
    return logits, [int(step.exit_layers) for step in steps]
