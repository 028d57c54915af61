"""The table of `generate --compare`: variants along one answer."""

from __future__ import annotations

from collections.abc import Callable

from river_llm import ExitPolicy, RiverLM, SamplingConfig
from river_llm.measure.comparison import COMPARED, compare_variants, compared_variants

PROMPT = [7, 8, 9]


def test_variants_follow_the_backbones_answer(make_lm: Callable[..., RiverLM]) -> None:
    lm = make_lm()
    lm.policy = ExitPolicy.fixed(2)
    variants = compared_variants(lm)
    assert list(variants.values()) == [ExitPolicy.never(), None, lm.policy, ExitPolicy.always()]
    answer = lm.generate_batch_tokens([PROMPT], SamplingConfig(8), policy=ExitPolicy.never())[
        0
    ].tokens
    seen: list[tuple[int, int]] = []
    found = compare_variants(
        lm, PROMPT, answer, variants, rounds=3, progress=lambda *done: seen.append(done)
    )
    layers = lm.engine.num_layers
    assert [one.variant for one in found] == list(variants)
    assert [one.mean_exit_layer for one in found] == [layers, layers, 2, 0]
    assert found[0].agreement == found[1].agreement == 1
    river = lm.generate_batch_tokens([PROMPT], SamplingConfig(1), policy=ExitPolicy.always())[
        0
    ].tokens
    assert 0 <= found[3].agreement <= 1 - (river[0] != answer[0]) / len(answer)
    assert all(one.tokens_per_second.lowest > 0 for one in found)
    assert seen[-1] == (12, 12)
    lm.forget_cache()  # of lossless mode's answer
    assert lm.engine.sequences() == []


def test_a_variant_runs_again_what_generation_does(lm: RiverLM, rows: list[int]) -> None:
    policy = ExitPolicy.fixed(1, second_look=0.6)
    sampling = SamplingConfig(24)
    answer = lm.generate_batch_tokens([PROMPT], sampling, policy=policy)[0].tokens
    generated = list(rows)
    assert len({*generated[1:]}) > 2  # some looks at few tokens, some at many
    rows.clear()
    (found,) = compare_variants(lm, PROMPT, answer, {"River": policy}, rounds=1)
    assert rows == generated
    assert found.agreement == 1


def test_without_a_policy_river_has_one_of_its_own(make_lm: Callable[..., RiverLM]) -> None:
    lm = make_lm()
    lm.policy = None
    assert COMPARED in compared_variants(lm).values()
