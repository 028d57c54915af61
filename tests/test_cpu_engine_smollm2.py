"""The native engine on the real SmolLM2, held against `transformers` in float32 on the same weights
of bfloat16, and its answers through RiverLM."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from exit_reference import layer_similarities
from native_engines import KERNELS, cached_states, relative_errors
from river_llm.sampling import Sampler
from test_smollm2 import PARAGRAPH
from tiny_models import fake_quantised
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from river_llm import ExitPolicy, River, RiverLM, SamplingConfig
from river_llm.engines import CpuEngine
from river_llm.load.model import load_backbone

PROMPT_LENGTH = 24


@dataclass(frozen=True)
class Subject:
    """SmolLM2 in bfloat16 and its river, the same weights in float32, and a text."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    river: River
    exact: PreTrainedModel
    quantised: PreTrainedModel
    tokens: Tensor  # [1, T]
    logits: Tensor  # [T, vocabulary] of the backbone in float32

    def engine(self, **settings: Any) -> CpuEngine:
        """A native engine of one thread, by default with the best kernels."""
        return CpuEngine(self.model, self.river, ExitPolicy.never(), threads=1, **settings)

    @contextmanager
    def quantised_from(self, exit_layer: int) -> Iterator[PreTrainedModel]:
        """The plain model in float32 whose layers from `exit_layer` on are the river's."""
        layers = self.exact.model.layers
        quantised = self.quantised.model.layers
        self.exact.model.layers = nn.ModuleList([*layers[:exit_layer], *quantised[exit_layer:]])
        yield self.exact
        self.exact.model.layers = layers


@pytest.fixture(scope="module")
def subject() -> Subject:
    model, tokenizer = load_backbone("smollm2")
    river = River.build(model)
    exact = copy.deepcopy(model).float()
    tokens = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = exact(tokens).logits[0]
    return Subject(model, tokenizer, river, exact, fake_quantised(exact, river), tokens, logits)


@pytest.fixture(scope="module")
def shared_engine(subject: Subject) -> CpuEngine:
    return subject.engine()


@pytest.fixture
def engine(shared_engine: CpuEngine) -> CpuEngine:
    """An engine with an empty cache that leaves the backbone never."""
    return _begin(shared_engine, ExitPolicy.never())


class TestEveryKernelSet:
    @pytest.fixture(scope="class", params=KERNELS)
    def of_kernels(self, subject: Subject, request: pytest.FixtureRequest) -> CpuEngine:
        return subject.engine(kernels=request.param)

    def test_gives_the_logits_of_float32(self, subject: Subject, of_kernels: CpuEngine) -> None:
        logits = _begin(of_kernels, ExitPolicy.never()).verify(subject.tokens[:, :160]).logits[0]
        _check(logits, subject.logits[:160], error=0.015, agreement=0.97)

    @torch.no_grad()
    def test_gives_the_logits_of_the_quantised_model_in_the_river(
        self, subject: Subject, of_kernels: CpuEngine
    ) -> None:
        tokens = subject.tokens[:, :64]
        _begin(of_kernels, ExitPolicy.always())
        steps = [of_kernels.prefill(tokens[:, :PROMPT_LENGTH]).logits]
        steps += [of_kernels.decode(token).logits for token in tokens[0, PROMPT_LENGTH:].split(1)]
        expected = subject.quantised(tokens).logits[0, PROMPT_LENGTH - 1 :]
        _check(torch.cat(steps), expected, error=0.01, agreement=0.95)
        backbone = subject.logits[PROMPT_LENGTH - 1 : 64]
        assert float(relative_errors(expected, backbone).mean()) > 0.1


@pytest.mark.parametrize(
    ("narrow", "error", "agreement"),
    [({"lm_head_bits": 8}, 0.02, 0.96), ({"backbone_bits": 8}, 0.04, 0.94)],
    ids=["8-bit LM head", "8-bit backbone"],
)
def test_8_bits_are_near_the_model(
    subject: Subject, engine: CpuEngine, narrow: dict[str, int], error: float, agreement: float
) -> None:
    eight_bits = subject.engine(**narrow)
    tokens = subject.tokens[:, :200]
    logits = eight_bits.verify(tokens).logits[0]
    _check(logits, subject.logits[:200], error, agreement, doubt=0.08)
    assert eight_bits._core.weight_bytes < engine._core.weight_bytes
    assert not torch.equal(logits, engine.verify(tokens).logits[0])


@pytest.mark.parametrize("exit_layer", [1, 3, 15, 29])
@torch.no_grad()
def test_a_fixed_exit_is_a_model_quantised_from_there(
    subject: Subject, engine: CpuEngine, exit_layer: int
) -> None:
    tokens = subject.tokens[:, : PROMPT_LENGTH + 12]
    engine.policy = ExitPolicy.fixed(exit_layer)
    cache = DynamicCache()
    subject.exact(tokens[:, :PROMPT_LENGTH], past_key_values=cache)
    engine.prefill(tokens[:, :PROMPT_LENGTH])
    logits, expected = [], []
    for token in tokens[0, PROMPT_LENGTH:].split(1):
        step = engine.decode(token)
        logits.append(step.logits)
        assert step.exit_layers.tolist() == [exit_layer]
        with subject.quantised_from(exit_layer) as hybrid:
            expected.append(hybrid(token.view(1, 1), past_key_values=cache).logits[0])
    _check(torch.cat(logits), torch.cat(expected), error=0.015, agreement=0.9)
    parts = ("keys", "values")
    written = [torch.stack([getattr(layer, part)[0] for layer in cache.layers]) for part in parts]
    states = cached_states(engine).flatten(2)
    assert float(relative_errors(states, torch.stack(written).flatten(2)).max()) < 0.015


def test_exits_and_similarities_are_those_of_float32(subject: Subject, engine: CpuEngine) -> None:
    """Every token behind a prompt of backbone tokens, so that no exit depends on another."""
    end, threshold = PROMPT_LENGTH + 48, 0.97
    tokens = subject.tokens[:, :end]
    exact = layer_similarities(subject.exact, tokens[0].tolist())[:, PROMPT_LENGTH:].float()
    engine.record_similarities = True
    engine.prefill(tokens[:, :PROMPT_LENGTH])
    similarities, exit_layers = [], []
    for place in range(PROMPT_LENGTH, end):
        engine.policy = ExitPolicy.similarity(threshold, first_layer=2)
        exit_layers.append(engine.decode(tokens[:, place]).exit_layers)
        engine.truncate(place)
        engine.policy = ExitPolicy.never()
        step = engine.decode(tokens[:, place])
        assert step.similarities is not None
        similarities.append(step.similarities)
    errors = (torch.cat(similarities, 1) - exact).abs()
    assert float(errors.max()) < 0.006
    assert float(errors[exact > 0.9].max()) < 0.001
    layers = torch.arange(2, subject.model.config.num_hidden_layers).unsqueeze(1)
    above = exact[layers.flatten() - 1] > threshold  # after each of these layers
    expected = torch.where(above.any(0), 2 + above.int().argmax(0), len(layers) + 2)
    near = (exact[layers.flatten() - 1] - threshold).abs() < 0.001
    clear = ~(near & (layers <= expected)).any(0)
    assert float(clear.float().mean()) > 0.75
    assert torch.equal(torch.cat(exit_layers)[clear], expected[clear])
    assert len(expected[clear].unique()) > 5


class TestRiverLM:
    """Text from the native engine."""

    PROMPT = "The river rises in the mountains, and on its way to the sea it"

    @pytest.fixture(scope="class")
    def lm(self, subject: Subject) -> RiverLM:
        return RiverLM.from_pretrained(
            "smollm2", subject.river, ExitPolicy.never(), engine="cpu", threads=1
        )

    def test_greedy_tokens_are_those_of_float32_after_the_same_text(
        self, subject: Subject, engine: CpuEngine, lm: RiverLM
    ) -> None:
        assert isinstance(lm.engine, CpuEngine)
        lm.policy = ExitPolicy.never()
        prompt = subject.tokenizer(self.PROMPT).input_ids
        result = lm.generate(self.PROMPT, raw=True, max_new_tokens=80)
        assert len(result.tokens) >= 64
        with torch.no_grad():
            expected = subject.exact(torch.tensor([[*prompt, *result.tokens]])).logits[0]
        logits = engine.verify(torch.tensor([[*prompt, *result.tokens]])).logits[0]
        logits, expected = logits[len(prompt) - 1 : -1], expected[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == result.tokens
        _check(logits, expected, error=0.015, agreement=0.97)
        assert result.text == subject.tokenizer.decode(result.tokens, skip_special_tokens=True)

    @pytest.mark.parametrize(
        "sampling",
        [
            {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "seed": 7},
            {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.2, "seed": 8},
            {"repetition_penalty": 1.3},
        ],
        ids=["sampled", "sampled with penalty", "greedy with penalty"],
    )
    def test_tokens_are_what_the_sampler_of_the_torch_engine_makes_of_the_logits(
        self, subject: Subject, engine: CpuEngine, lm: RiverLM, sampling: dict[str, Any]
    ) -> None:
        lm.policy = engine.policy = ExitPolicy.similarity(0.97)
        result = lm.generate(self.PROMPT, raw=True, max_new_tokens=24, **sampling)
        sampler = Sampler(SamplingConfig(**sampling))
        token_ids: list[int] = subject.tokenizer(self.PROMPT).input_ids
        step = engine.prefill(torch.tensor([token_ids]))
        for place, token in enumerate(result.tokens):
            assert sampler.choose(token_ids, step.logits[0], place) == token
            token_ids.append(token)
            step = engine.decode(torch.tensor([token]))

    def test_a_seed_gives_the_same_text_again(self, lm: RiverLM) -> None:
        lm.policy = ExitPolicy.similarity(0.97)
        texts = [
            lm.generate(self.PROMPT, raw=True, max_new_tokens=24, temperature=1.0, seed=seed).text
            for seed in (1, 1, 2)
        ]
        assert texts[0] == texts[1] != texts[2]

    def test_prompts_of_a_batch_get_the_answers_that_they_get_alone(self, lm: RiverLM) -> None:
        prompts = [self.PROMPT, "def fibonacci(n):", "Once upon a time there was a lighthouse"]
        lm.policy = ExitPolicy.similarity(0.97, prefill="token")
        together = lm.generate_batch(prompts, raw=True, max_new_tokens=24)
        alone = [lm.generate(prompt, raw=True, max_new_tokens=24) for prompt in prompts]
        assert [row.tokens for row in together] == [row.tokens for row in alone]
        assert [row.exit_layers for row in together] == [row.exit_layers for row in alone]


def _begin(engine: CpuEngine, policy: ExitPolicy) -> CpuEngine:
    """The engine with an empty cache."""
    engine.truncate(0)
    engine.policy = policy
    engine.record_similarities = False
    return engine


def _check(
    logits: Tensor, expected: Tensor, error: float, agreement: float, doubt: float = 0.03
) -> None:
    """Hold logits `[tokens, vocabulary]` against those of float32.

    Args:
        error: relative L2 of all of them together.
        agreement: share of tokens with the same greedy token.
        doubt: greedy tokens have to agree where the two largest logits differ by more than this
            many times their root mean square.
    """
    whole = float((logits - expected).norm() / expected.norm())
    assert whole < error, f"relative L2 {whole:.4f}"
    same = logits.argmax(-1) == expected.argmax(-1)
    assert float(same.float().mean()) >= agreement
    largest = expected.topk(2, dim=-1).values
    margin = (largest[:, 0] - largest[:, 1]) / expected.square().mean(-1).sqrt()
    assert float((margin > doubt).float().mean()) > 0.5, "too few tokens to compare"
    assert bool(same[margin > doubt].all())
