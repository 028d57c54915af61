"""What the native engine takes from a model beside its matrices: rotary angles, their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from native_engines import CASES, long_subject, subject_of
from river_llm.engines.llama_family import describe
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from river_llm import ExitPolicy, River, RiverConfig, UnsupportedModelError
from river_llm.engines import CpuEngine
from river_llm.engines.native_model import AngleLimit, NativeModel

CONTEXT = 128  # of the tiny models
LONG_CONTEXT = 4096


def _dynamic_rope() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return tiny_model("Llama", rope_parameters=rope)


def _partial_longrope() -> PreTrainedModel:
    factors = [1 + 0.3 * place for place in range(4)]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "short_factor": factors,
        "long_factor": [3 * factor for factor in factors],
        "original_max_position_embeddings": 32,
    }
    return tiny_model("Phi3", original_max_position_embeddings=32, rope_parameters=rope)


def _gemma3_linear_rope() -> PreTrainedModel:
    kinds = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    layers = ["sliding_attention", "full_attention"] * 2
    return tiny_model("Gemma3Text", head_dim=16, layer_types=layers, rope_parameters=kinds)


def _rounded_frequencies() -> PreTrainedModel:
    return tiny_model("Llama").to(torch.bfloat16)


def _long_context() -> PreTrainedModel:
    return tiny_model("Llama", max_position_embeddings=LONG_CONTEXT)


# Beside the architectures: what their cases lack.
MORE = {
    "llama, dynamic rope": _dynamic_rope,
    "phi3, partial longrope": _partial_longrope,
    "gemma3_text, linear rope": _gemma3_linear_rope,
    "llama, frequencies in bfloat16": _rounded_frequencies,
    "llama, a long context": _long_context,
}
every_model = pytest.mark.parametrize("case", [*CASES, *MORE])
changing_model = pytest.mark.parametrize(
    "case", ["llama, dynamic rope", "phi3, longrope", "phi3, partial longrope"]
)


def model_of(case: str) -> PreTrainedModel:
    """One that tests share, where it is of `CASES`."""
    return MORE[case]() if case in MORE else subject_of(case).model


def fresh_model_of(case: str) -> PreTrainedModel:
    """One of the test's own."""
    if case in MORE:
        return MORE[case]()
    architecture, settings = CASES[case]
    return tiny_model(architecture, **settings)


def layer_types_of(model: PreTrainedModel) -> list[str | None]:
    """By rotary table."""
    return list(getattr(model.model.rotary_emb, "layer_types", None) or [None])


@torch.no_grad()
def own_angles(
    model: PreTrainedModel, first: int, end: int, layer_type: str | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[positions, rotary_dim / 2]` by the model's own rotary embedding."""
    arguments = () if layer_type is None else (layer_type,)
    positions = torch.arange(first, end).unsqueeze(0)
    cosines, sines = model.model.rotary_emb(torch.zeros(1), positions, *arguments)
    half = cosines.shape[-1] // 2
    assert torch.equal(cosines[..., :half], cosines[..., half:])
    assert torch.equal(sines[..., :half], sines[..., half:])
    return cosines[0, :, :half], sines[0, :, :half]


def check_angles(model: PreTrainedModel, described: NativeModel, first: int, end: int) -> None:
    """See that every table has the model's own angles, bit for bit."""
    limit = described.angle_limit
    is_long = limit is not None and end > limit.positions
    layer_types = layer_types_of(model)
    assert len(described.rotary) == len(layer_types)
    for table, layer_type in zip(described.rotary, layer_types, strict=True):
        own = own_angles(model, first, end, layer_type)
        for expected, actual in zip(own, table.angles(first, end, is_long), strict=True):
            assert actual.dtype == torch.float32
            assert torch.equal(actual, expected)


class TestAngles:
    @every_model
    def test_are_the_models_own(self, case: str) -> None:
        model = model_of(case)
        described = describe(model)
        limit = described.angle_limit
        last = CONTEXT if limit is not None and limit.keep_changing else 5000

        @example(0, 1)
        @example(0, CONTEXT)
        @example(CONTEXT - 1, 1)
        @example(0, 16)  # the limit of phi3's longrope
        @example(0, 17)
        @example(15, 1)
        @example(16, 1)
        @example(15, 2)
        @example(0, 33)
        @example(2040, 20)
        @given(st.integers(0, last - 1), st.integers(1, 200))
        def check(first: int, count: int) -> None:
            if first < last:
                check_angles(model, described, first, min(first + count, last))

        check()

    @pytest.mark.parametrize("case", ["llama", "phi3, longrope", "gemma3_text"])
    def test_of_an_engine_are_those_across_the_blocks_that_it_computes(self, case: str) -> None:
        subject = long_subject(case)
        described = describe(subject.model)
        check_angles(subject.model, described, 0, 2048)
        check_angles(subject.model, described, 2048, 2150)

    def test_of_longrope_change_for_every_position_behind_the_limit(self) -> None:
        (table,) = describe(model_of("phi3, longrope")).rotary
        for short, long in zip(table.angles(1, 16), table.angles(1, 16, True), strict=True):
            assert not torch.equal(short, long)

    def test_of_a_table_without_a_limit_are_the_same_behind_it(self) -> None:
        (table,) = describe(model_of("llama")).rotary
        for short, long in zip(table.angles(0, 9), table.angles(0, 9, True), strict=True):
            assert torch.equal(short, long)

    def test_of_gemma3_differ_by_the_kind_of_layer(self) -> None:
        described = describe(model_of("gemma3_text"))
        first, second = (table.angles(1, 9)[0] for table in described.rotary)
        assert not torch.equal(first, second)
        model = model_of("gemma3_text")
        kinds = layer_types_of(model)
        for parts, kind in zip(described.layers, model.config.layer_types, strict=True):
            assert kinds[parts["rope"]] == kind

    def test_take_part_of_a_head_where_the_model_does(self) -> None:
        assert describe(model_of("llama")).shape["rotary_dim"] == 16
        assert describe(model_of("phi3, partial rotary")).shape["rotary_dim"] == 8

    def test_are_left_out_where_the_model_leaves_them_out(self) -> None:
        model = model_of("smollm3")
        without = [not layer.self_attn.use_rope for layer in model.model.layers]
        assert any(without)
        assert not all(without)
        assert [parts["rope"] == -1 for parts in describe(model).layers] == without


class TestDescribe:
    @every_model
    def test_leaves_the_model_computing_as_before(self, case: str) -> None:
        model = model_of(case)
        layer_types = layer_types_of(model)
        ranges = [(0, 1), (0, 16), (0, 17), (0, 5), (40, 90), (0, CONTEXT), (3, 9)]
        wanted = [own_angles(model, *r, kind) for r in ranges for kind in layer_types]
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        describe(model)
        for name, value in model.named_buffers():
            assert value.dtype == buffers[name].dtype
            assert torch.equal(value, buffers[name])
        got = [own_angles(model, *r, kind) for r in ranges for kind in layer_types]
        for (cosines, sines), (own_cosines, own_sines) in zip(wanted, got, strict=True):
            assert torch.equal(cosines, own_cosines)
            assert torch.equal(sines, own_sines)

    @every_model
    def test_gives_the_same_again(self, case: str) -> None:
        model = model_of(case)
        first, second = describe(model), describe(model)
        assert first.shape == second.shape
        assert first.angle_limit == second.angle_limit
        for table, again in zip(first.rotary, second.rotary, strict=True):
            assert table.scaling == again.scaling
            assert torch.equal(table.frequencies, again.frequencies)

    @changing_model
    @pytest.mark.parametrize("length", [17, 40, CONTEXT, CONTEXT + 1, 300])
    def test_takes_the_same_from_a_model_that_has_run_a_text(self, case: str, length: int) -> None:
        fresh, used = fresh_model_of(case), fresh_model_of(case)
        own_angles(used, 0, length)
        described = describe(used)
        check_angles(fresh, described, 0, 12)
        check_angles(fresh, described, 0, CONTEXT)

    def test_takes_the_dynamic_limit_from_the_context_and_longropes_from_its_own(self) -> None:
        assert describe(_dynamic_rope()).angle_limit == AngleLimit(CONTEXT, keep_changing=True)
        for case, positions in (("phi3, longrope", 16), ("phi3, partial longrope", 32)):
            limit = describe(model_of(case)).angle_limit
            assert limit == AngleLimit(positions, keep_changing=False)
        assert describe(model_of("llama, yarn rope")).angle_limit is None

    @pytest.mark.parametrize("case", ["llama", "phi3, longrope", "gemma3_text"])
    @pytest.mark.parametrize("way", ["scaled", "shifted", "swapped", "turned the other way"])
    def test_refuses_angles_of_another_kind(
        self, case: str, way: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = model_of(case)
        rotary = model.model.rotary_emb
        own = rotary.forward

        def forward(x: Tensor, position_ids: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
            if way == "shifted":
                position_ids = position_ids + 1
            cosines, sines = own(x, position_ids, *arguments)
            if way == "scaled":
                return cosines * (1 + 2**-20), sines
            if way == "swapped":
                return sines, cosines
            return (cosines, -sines) if way == "turned the other way" else (cosines, sines)

        monkeypatch.setattr(rotary, "forward", forward)
        with pytest.raises(UnsupportedModelError, match="rotary angles otherwise"):
            describe(model)
        river = River.build(model, RiverConfig(group_size=32, quantizer="rtn"))
        with pytest.raises(UnsupportedModelError, match="--engine torch"):
            CpuEngine(model, river, ExitPolicy.never())

    @pytest.mark.parametrize("rope_type", ["longrope", "dynamic"])
    def test_knows_or_refuses_changing_angles_of_one_kind_of_layer(self, rope_type: str) -> None:
        factors = [1 + 0.3 * place for place in range(8)]
        changing = {
            "rope_type": rope_type,
            "rope_theta": 1e4,
            "factor": 4.0,
            "short_factor": factors,
            "long_factor": [2 * factor for factor in factors],
            "original_max_position_embeddings": 16,
        }
        model = tiny_model(
            "Gemma3Text",
            head_dim=16,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_parameters={
                "full_attention": changing,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        )
        try:
            described = describe(model)
        except UnsupportedModelError:
            return
        for end in (9, 16, 17, CONTEXT):
            check_angles(model, described, 0, end)

    def test_refuses_angles_that_are_others_behind_the_limit_alone(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = model_of("phi3, longrope")
        rotary = model.model.rotary_emb
        own = rotary.forward

        def forward(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
            cosines, sines = own(x, position_ids)
            return (cosines, sines) if int(position_ids.max()) < 16 else (2 * cosines, 2 * sines)

        monkeypatch.setattr(rotary, "forward", forward)
        with pytest.raises(UnsupportedModelError, match="rotary angles otherwise"):
            describe(model)


def _angles(limit: AngleLimit, positions: int) -> int:
    """What they are in a text of so many positions: 0, the usual ones, or others."""
    if positions <= limit.positions:
        return 0
    return positions if limit.keep_changing else 1


def _rows_by_definition(limit: AngleLimit, length: int) -> int | None:
    """The most tokens that all have, in one pass, the angles of a step of their own."""
    endless = limit.positions + 3
    alike = [
        rows
        for rows in range(1, endless + 1)
        if all(
            _angles(limit, length + row) == _angles(limit, length + rows)
            for row in range(1, rows + 1)
        )
    ]
    return None if len(alike) == endless else max(alike)


class TestAngleLimit:
    @given(st.integers(1, 40), st.booleans(), st.integers(0, 80))
    def test_gives_the_rows_of_one_pass_by_its_definition(
        self, positions: int, keep_changing: bool, length: int
    ) -> None:
        limit = AngleLimit(positions, keep_changing)
        assert limit.rows_like_single_steps(length) == _rows_by_definition(limit, length)

    @given(st.integers(1, 40), st.booleans(), st.integers(0, 80), st.integers(0, 80))
    def test_is_crossed_where_angles_differ_on_the_way(
        self, positions: int, keep_changing: bool, length: int, more: int
    ) -> None:
        limit = AngleLimit(positions, keep_changing)
        met = {_angles(limit, end) for end in range(length, length + more + 1)}
        assert limit.is_crossed(length, length + more) == (len(met) > 1)


class TestQueryScales:
    @given(st.integers(1, 300))
    @example(15)
    @example(16)
    @example(17)
    def test_are_those_of_transformers(self, positions: int) -> None:
        described = describe(model_of("ministral3, query scales"))
        assert described.query_scaling == (0.3, 16)
        scales = described.query_scales(positions)
        assert scales is not None
        expected = get_llama_4_attn_scale(torch.arange(positions).unsqueeze(0), 0.3, 16)
        assert torch.equal(scales, expected.flatten())
        assert bool((scales[:16] == 1).all())
        assert bool((scales[16:] > 1).all())

    @pytest.mark.parametrize("case", [case for case in CASES if "ministral3" not in case])
    def test_are_none_for_other_models(self, case: str) -> None:
        assert describe(model_of(case)).query_scales(100) is None
