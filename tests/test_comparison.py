"""`compare_arms` on an engine that follows a script, and on a tiny model."""

from __future__ import annotations

import copy
import statistics
from types import SimpleNamespace

import pytest
import torch
from tiny_models import fake_quantised
from torch import Tensor
from transformers import PreTrainedModel

from river_llm import ExitPolicy, River, attach_river
from river_llm.measure.comparison import compare_arms
from river_llm.engines import StepResult, TorchEngine

PROMPT = [7, 8, 9]
ANSWER = [3, 1, 4, 1, 5]
NEVER, ALWAYS, FIXED = ExitPolicy.never(), ExitPolicy.always(), ExitPolicy.fixed(2)
ARMS = {"backbone": NEVER, "full 4-bit": ALWAYS, "River": FIXED}
# For each policy: the likeliest token after the prompt and after each token but the last of the
# answer, and the exit layers of the same passes; the prompt's own doesn't count.
SCRIPT = {
    NEVER: ([3, 1, 4, 1, 5], [4, 4, 4, 4, 4]),
    ALWAYS: ([2, 1, 0, 0, 5], [0, 0, 0, 0, 0]),
    FIXED: ([3, 1, 4, 0, 5], [4, 2, 1, 3, 3]),
}
BEFORE = ExitPolicy.similarity(0.5)


class ScriptedEngine:
    """Answers by `SCRIPT`, whatever it is given, and notes what that is.

    Attributes:
        now: the time on its clock; a prefill takes 100 seconds, a decode `seconds[policy]`.
        passes: the policy and all tokens of each pass over prompt and answer.
        fails_after: so many decodes.
    """

    name, num_layers, context_length = "scripted", 4, None

    def __init__(self) -> None:
        self.policy = BEFORE
        self.now = 0.0
        self.seconds = dict.fromkeys(SCRIPT, 1.0)
        self.passes: list[tuple[ExitPolicy, list[int]]] = []
        self.fails_after: int | None = None
        self._tokens: list[int] = [1, 2]

    @property
    def length(self) -> int:
        return len(self._tokens)

    def prefill(self, token_ids: Tensor, padding_mask: Tensor | None = None) -> StepResult:
        assert self._tokens == [], "the cache of the arm before is still there"
        assert padding_mask is None
        self._tokens = token_ids[0].tolist()
        self.passes.append((self.policy, self._tokens))
        self.now += 100
        return self._step()

    def decode(self, token_ids: Tensor) -> StepResult:
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise LookupError("gone")
        assert token_ids.shape == (1,)
        self._tokens.append(int(token_ids))
        self.now += self.seconds[self.policy]
        return self._step()

    def truncate(self, length: int) -> None:
        self._tokens = self._tokens[:length]

    def _step(self) -> StepResult:
        place = len(self._tokens) - len(PROMPT)
        tokens, exit_layers = SCRIPT[self.policy]
        logits = torch.linspace(0, 1, 10).unsqueeze(0)
        logits[0, tokens[place]] = 2
        return StepResult(logits, torch.tensor([exit_layers[place]]))


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> ScriptedEngine:
    engine = ScriptedEngine()
    clock = SimpleNamespace(perf_counter=lambda: engine.now)
    monkeypatch.setattr("river_llm.measure.comparison.time", clock)
    return engine


def test_counts_agreement_and_exit_layers(engine: ScriptedEngine) -> None:
    backbone, full, river = compare_arms(engine, PROMPT, ANSWER, ARMS)
    assert [arm.name for arm in (backbone, full, river)] == list(ARMS)
    assert [arm.policy for arm in (backbone, full, river)] == [
        "never leaves",
        "leaves at once",
        "exit after 2",
    ]
    assert (backbone.agreement, full.agreement, river.agreement) == (1, 2 / 5, 4 / 5)
    assert (backbone.mean_exit_layer, full.mean_exit_layer) == (4, 0)
    assert river.mean_exit_layer == (2 + 1 + 3 + 3) / 4


def test_takes_the_arms_in_turn_along_the_same_tokens(engine: ScriptedEngine) -> None:
    compare_arms(engine, PROMPT, ANSWER, ARMS, rounds=3)
    forth = [NEVER, ALWAYS, FIXED]
    assert [policy for policy, _ in engine.passes] == [*forth, *forth[::-1], *forth]
    assert all(tokens == [*PROMPT, *ANSWER[:-1]] for _, tokens in engine.passes)


def test_takes_five_rounds_by_default(engine: ScriptedEngine) -> None:
    compare_arms(engine, PROMPT, ANSWER, ARMS)
    assert len(engine.passes) == 5 * 3


def test_speed_is_that_of_decoding_alone(engine: ScriptedEngine) -> None:
    """Four decodes in each round; their seconds change from round to round."""
    seconds = {NEVER: [4, 1, 8, 2, 2], ALWAYS: [1, 1, 1, 1, 1], FIXED: [0.5, 2, 0.25, 1, 16]}

    def next_round(done: int, total: int) -> None:
        for policy, rounds in seconds.items():
            engine.seconds[policy] = rounds[min(done // 3, 4)]

    next_round(0, 15)
    results = compare_arms(engine, PROMPT, ANSWER, ARMS, progress=next_round)
    for arm, rounds in zip(results, seconds.values(), strict=True):
        speeds = [1 / step for step in rounds]
        assert arm.decode_tokens_per_second == statistics.median(speeds)
        assert (arm.slowest, arm.fastest) == (min(speeds), max(speeds))


def test_tells_its_progress(engine: ScriptedEngine) -> None:
    told: list[tuple[int, int]] = []
    compare_arms(engine, PROMPT, ANSWER, ARMS, rounds=2, progress=lambda *done: told.append(done))
    assert told == [(n, 6) for n in range(1, 7)]


@pytest.mark.parametrize("fails_after", [None, 0, 6])
def test_leaves_the_policy_and_an_empty_cache(
    engine: ScriptedEngine, fails_after: int | None
) -> None:
    engine.fails_after = fails_after
    if fails_after is None:
        compare_arms(engine, PROMPT, ANSWER, ARMS)
    else:
        with pytest.raises(LookupError):
            compare_arms(engine, PROMPT, ANSWER, ARMS)
        assert engine.passes[-1][0] == [NEVER, ALWAYS][fails_after // 4]
    assert engine.policy is BEFORE
    assert engine.length == 0


def test_two_tokens_are_enough(engine: ScriptedEngine) -> None:
    (arm,) = compare_arms(engine, PROMPT, ANSWER[:2], {"River": FIXED}, rounds=1)
    assert (arm.agreement, arm.mean_exit_layer) == (1, 2)
    assert arm.slowest == arm.decode_tokens_per_second == arm.fastest == 1


class TestOnAModel:
    @pytest.fixture
    def answer(self, tiny_llama: PreTrainedModel) -> list[int]:
        """The untouched model's greedy answer."""
        generated = tiny_llama.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False)
        answer: list[int] = generated[0, len(PROMPT) :].tolist()
        assert len(answer) == 16
        return answer

    def test_the_backbone_agrees_with_its_own_answer(
        self, tiny_llama: PreTrainedModel, answer: list[int]
    ) -> None:
        engine = TorchEngine(attach_river(copy.deepcopy(tiny_llama)))
        arm = compare_arms(engine, PROMPT, answer, {"backbone": NEVER}, rounds=2)[0]
        assert (arm.agreement, arm.mean_exit_layer) == (1, 4)
        wrong = [*answer[:8], (answer[8] + 1) % 97, *answer[9:]]
        arm = compare_arms(engine, PROMPT, wrong, {"backbone": NEVER}, rounds=1)[0]
        assert arm.agreement < 1

    def test_the_quantised_model_agrees_where_it_would(
        self, tiny_llama: PreTrainedModel, answer: list[int]
    ) -> None:
        river = River.build(tiny_llama)
        tokens = torch.tensor([[*PROMPT, *answer]])
        with torch.no_grad():
            logits = fake_quantised(tiny_llama, river)(tokens).logits[0, len(PROMPT) - 1 : -1]
        agreement = float((logits.argmax(-1) == torch.tensor(answer)).double().mean())
        assert 0 < agreement < 1
        engine = TorchEngine(attach_river(tiny_llama, river, policy=BEFORE))
        full, fixed = compare_arms(
            engine, PROMPT, answer, {"full": ALWAYS, "fixed": FIXED}, rounds=1
        )
        assert full.agreement == agreement
        assert (full.mean_exit_layer, fixed.mean_exit_layer) == (0, 2)
        assert (engine.policy, engine.length) == (BEFORE, 0)
