"""Random routing: which depths are drawn, and that an engine runs each token at its own."""

from __future__ import annotations

import pytest
import torch
from lossless_lm import lm_on, subject_with
from torch import Tensor

from river_llm import ConfigError, ExitPolicy
from river_llm.engines import Engine
from river_llm.errors import RiverError
from river_llm.report.random_routing import RandomRouting, with_random_routing

TOKENS = torch.tensor([[5, 17, 3, 44, 17, 3, 60, 2, 9, 33, 21, 8]])
DEPTHS = {0: 1, 1: 2, 2: 2, 4: 1}


@pytest.fixture(params=["torch", "cpu"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return lm_on(request.param).engine


def token_by_token(routing: RandomRouting) -> RandomRouting:
    return RandomRouting(depths=routing.depths, seed=routing.seed, prefill="token")


def scored(engine: Engine, routing: RandomRouting, tokens: Tensor) -> tuple[Tensor, list[int]]:
    """Logits and exit layers of a text from an empty cache."""
    routed = with_random_routing(engine)
    routed.policy = routing
    routed.truncate(0)
    step = routed.score(tokens)
    return step.logits[0], step.exit_layers[0].tolist()


def test_the_mean_depth_is_that_of_the_histogram() -> None:
    routing = RandomRouting.like({3: 700, 10: 250, 30: 50}, seed=1)
    assert routing.mean_depth == pytest.approx(6.1)
    generator = torch.Generator().manual_seed(0)
    states = torch.randint(0, 256, (20_000, 8), generator=generator).tolist()
    drawn = [routing.draw(bytes(state)) for state in states]
    spread = (0.7 * 3**2 + 0.25 * 10**2 + 0.05 * 30**2 - 6.1**2) ** 0.5
    assert sum(drawn) / len(drawn) == pytest.approx(6.1, abs=4 * spread / len(drawn) ** 0.5)
    for layer, share in ((3, 0.7), (10, 0.25), (30, 0.05)):
        assert drawn.count(layer) / len(drawn) == pytest.approx(share, abs=0.02)


def test_depths_of_a_long_text_follow_the_histogram() -> None:
    engine = lm_on("cpu", subject_with(1024)).engine
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 90, (1, 1000), generator=generator)
    _, layers = scored(engine, RandomRouting.like({1: 3, 3: 1}, seed=4), tokens)
    assert layers.count(1) + layers.count(3) == 1000
    assert layers.count(1) == pytest.approx(750, abs=55)  # four standard deviations


def test_each_token_runs_at_its_own_depth(engine: Engine) -> None:
    logits, layers = scored(engine, RandomRouting.like(DEPTHS, seed=3), TOKENS)
    assert len(set(layers)) > 2
    engine.truncate(0)
    for place, (token, layer) in enumerate(zip(TOKENS[0], layers, strict=True)):
        engine.policy = ExitPolicy.fixed(layer)
        step = engine.decode(token.unsqueeze(0))
        assert step.exit_layers.tolist() == [layer]
        assert torch.equal(step.logits[0], logits[place])


def test_the_same_text_leaves_at_the_same_depths(engine: Engine) -> None:
    routing = RandomRouting.like(DEPTHS, seed=3)
    logits, layers = scored(engine, routing, TOKENS)
    routed = with_random_routing(engine)
    routed.policy = token_by_token(routing)
    routed.truncate(0)
    routed.prefill(TOKENS[:, :5])
    routed.score(torch.tensor([[90, 91, 92]]))  # something else, taken back
    routed.rewind([3])
    routed.decode(TOKENS[:, 5])
    routed.decode(torch.tensor([1]))
    routed.truncate(6)
    step = routed.score(TOKENS[:, 6:])
    assert step.exit_layers[0].tolist() == layers[6:]
    assert torch.equal(step.logits[0], logits[6:])


def test_another_seed_or_beginning_draws_other_depths(engine: Engine) -> None:
    routing = RandomRouting.like(DEPTHS, seed=3)
    _, layers = scored(engine, routing, TOKENS)
    assert scored(engine, RandomRouting.like(DEPTHS, seed=4), TOKENS)[1] != layers
    changed = TOKENS.clone()
    changed[0, 0] = 6
    assert scored(engine, routing, changed)[1][1:] != layers[1:]


def test_a_prompt_runs_by_the_prefill_rule(engine: Engine) -> None:
    routed = with_random_routing(engine)
    routed.policy = RandomRouting.like({1: 1}, seed=0)
    assert routed.prefill(TOKENS).exit_layers.tolist() == [4]
    assert routed.decode(torch.tensor([7])).exit_layers.tolist() == [1]


def test_any_other_policy_is_the_engines_own(engine: Engine) -> None:
    routed = with_random_routing(engine)
    routed.policy = RandomRouting.like({1: 1}, seed=0)
    routed.policy = ExitPolicy.fixed(2)
    assert engine.policy == routed.policy == ExitPolicy.fixed(2)
    routed.truncate(0)
    step = routed.score(TOKENS.repeat(2, 1))
    assert step.exit_layers.unique().tolist() == [2]


def test_settings_are_the_engines_own(engine: Engine) -> None:
    routed = with_random_routing(engine)
    routed.record_similarities, routed.depth_limit = True, 2
    try:
        assert (engine.record_similarities, engine.depth_limit) == (True, 2)
        routed.policy = ExitPolicy.never()
        routed.truncate(0)
        step = routed.score(TOKENS)
        assert step.exit_layers.unique().tolist() == [2]
        assert step.similarities is not None
    finally:
        engine.record_similarities, engine.depth_limit = False, None


def test_what_can_not_be_drawn_is_told(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="no exit depths"):
        RandomRouting.like({}, seed=0)
    routed = with_random_routing(engine)
    with pytest.raises(ConfigError, match="exit layer is 9"):
        routed.policy = RandomRouting.like({9: 1}, seed=0)
    routed.policy = RandomRouting.like({1: 1}, seed=0)
    routed.truncate(0)
    with pytest.raises(ConfigError, match="one sequence at a time"):
        routed.score(TOKENS.repeat(2, 1))
    with pytest.raises(RiverError, match="nothing to score"):
        routed.score(TOKENS, [0])
    with pytest.raises(ConfigError, match="no thresholds"):
        engine.policy = RandomRouting.like({1: 1}, seed=0)
