"""What the native engine takes from a model beside its matrices: rotary angles, their boundary."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from native_engines import CASES
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from river_llm import UnsupportedModelError
from river_llm.engines.llama import describe
from river_llm.engines.native_model import NativeModel, RopeBoundary

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


def fresh_model_of(case: str) -> PreTrainedModel:
    """One of the test's own."""
    if case in MORE:
        return MORE[case]()
    architecture, settings = CASES[case]
    return tiny_model(architecture, **settings)


model_of = cache(fresh_model_of)  # that tests share


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
    """Validate that every table has the model's own angles, bit for bit."""
    boundary = described.rope_boundary
    is_long = boundary is not None and end > boundary.positions
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
        boundary = described.rope_boundary
        last = CONTEXT if boundary is not None and boundary.keep_changing else 5000

        @example(0, 1)
        @example(0, CONTEXT)
        @example(CONTEXT - 1, 1)
        @example(0, 16)  # the boundary of phi3's longrope
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

    @changing_model
    @pytest.mark.parametrize("length", [17, 40, CONTEXT, CONTEXT + 1, 300])
    def test_takes_the_same_from_a_model_that_has_run_a_text(self, case: str, length: int) -> None:
        fresh, used = fresh_model_of(case), fresh_model_of(case)
        own_angles(used, 0, length)
        described = describe(used)
        check_angles(fresh, described, 0, 12)
        check_angles(fresh, described, 0, CONTEXT)

    def test_finds_the_boundary(self) -> None:
        """Of dynamic scaling in the context, of longrope in a number of its own."""
        assert describe(_dynamic_rope()).rope_boundary == RopeBoundary(CONTEXT, keep_changing=True)
        for case, positions in (("phi3, longrope", 16), ("phi3, partial longrope", 32)):
            boundary = describe(model_of(case)).rope_boundary
            assert boundary == RopeBoundary(positions, keep_changing=False)
        assert describe(model_of("llama, yarn rope")).rope_boundary is None

    @pytest.mark.parametrize(
        ("case", "how"),
        [
            *product(["llama", "phi3, longrope", "gemma3_text"], ["scaled", "shifted", "swapped"]),
            ("phi3, longrope", "long ones doubled"),
        ],
    )
    def test_refuses_angles_of_another_kind(
        self, case: str, how: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = model_of(case)
        rotary = model.model.rotary_emb
        own = rotary.forward

        def forward(x: Tensor, position_ids: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
            shifted = position_ids + (how == "shifted")
            cosines, sines = own(x, shifted, *arguments)
            if how == "scaled":
                return cosines * (1 + 2**-20), sines
            if how == "long ones doubled" and int(position_ids.max()) >= 16:
                return 2 * cosines, 2 * sines
            return (sines, cosines) if how == "swapped" else (cosines, sines)

        monkeypatch.setattr(rotary, "forward", forward)
        with pytest.raises(UnsupportedModelError, match=r"rotary angles otherwise.*--engine torch"):
            describe(model)

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


def _angles(boundary: RopeBoundary, positions: int) -> int:
    """What they are in a text of so many positions: 0, the usual ones, or others."""
    if positions <= boundary.positions:
        return 0
    return positions if boundary.keep_changing else 1


def _rows_by_definition(boundary: RopeBoundary, length: int) -> int | None:
    """The most tokens that all have, in one pass, the angles of a step of their own."""
    endless = boundary.positions + 3
    alike = [
        rows
        for rows in range(1, endless + 1)
        if all(
            _angles(boundary, length + row) == _angles(boundary, length + rows)
            for row in range(1, rows + 1)
        )
    ]
    return None if len(alike) == endless else max(alike)


@given(
    st.builds(RopeBoundary, st.integers(1, 40), st.booleans()),
    st.integers(0, 80),
    st.integers(0, 80),
)
def test_a_boundary_tells_texts_with_the_same_angles(
    boundary: RopeBoundary, length: int, other: int
) -> None:
    assert boundary.rows_like_single_steps(length) == _rows_by_definition(boundary, length)
    is_same = _angles(boundary, length) == _angles(boundary, other)
    assert boundary.is_shared_by(length, other) == is_same


@cache
def scaled_queries() -> NativeModel:
    return describe(model_of("ministral3, query scales"))


@given(st.integers(0, 40), st.integers(0, 300))
@example(15, 1)
@example(15, 2)
@example(16, 1)
def test_query_scales_are_those_of_transformers(first: int, count: int) -> None:
    described = scaled_queries()
    assert described.query_scaling == (0.3, 16)
    scales = described.query_scales(first, first + count)
    positions = torch.arange(first, first + count)
    assert torch.equal(scales, get_llama_4_attn_scale(positions.unsqueeze(0), 0.3, 16).flatten())
    assert torch.equal(scales > 1, positions >= 16)
