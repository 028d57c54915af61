"""What each matrix costs, against the measured loss; and the knapsack, against all ways."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, VOCABULARY, fake_quantised, mixed_bits, tiny_model
from transformers import PreTrainedModel

from river_llm import River, RiverConfig
from river_llm.config import BITS
from river_llm.errors import ConfigError
from river_llm.river.backbone import decoder_layers
from river_llm.river.bit_allocation import WIDTHS, MatrixLoss, allocate_bits, matrix_losses

NARROW = RiverConfig(4, 32, "rtn")
LINEARS = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
THREE = RiverConfig(3, 32, "rtn")
AUTO = RiverConfig("auto", 32, "rtn")
FOUR_BITS = dict.fromkeys(LINEARS, 4)
TEXT = torch.randint(VOCABULARY, (16, 64), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def divergence(model: PreTrainedModel, river: River) -> float:
    log_p = model(TEXT).logits.log_softmax(-1)
    log_q = fake_quantised(model, river)(TEXT).logits.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "Phi3", "Gemma3Text"])
def test_losses_of_matrices_add_up_to_that_of_the_river(architecture: str) -> None:
    model = tiny_model(architecture, **ARCHITECTURES[architecture])
    before = {name: value.requires_grad for name, value in model.named_parameters()}
    river = River.build(model, NARROW)
    losses = matrix_losses(model, decoder_layers(model), river.exit_layers, TEXT)
    expected = divergence(model, river)
    assert sum(one.loss for one in losses) == pytest.approx(expected, rel=0.5)
    assert {(one.layer, name) for one in losses for name in one.names} == {
        (index, name) for index, layer in enumerate(river.exit_layers) for name in layer
    }
    assert before == {name: value.requires_grad for name, value in model.named_parameters()}


def test_what_shares_inputs_shares_bits(tiny_llama: PreTrainedModel) -> None:
    river = River.build(tiny_llama, NARROW)
    losses = matrix_losses(tiny_llama, decoder_layers(tiny_llama), river.exit_layers, TEXT)
    assert sorted(one.names for one in losses if one.layer == 0) == [
        ("mlp.down_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("self_attn.o_proj",),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ]


def test_of_one_average_the_allocated_bits_lose_least(tiny_llama: PreTrainedModel) -> None:
    """Against those that spend the same bits where they save least."""
    layers = decoder_layers(tiny_llama)
    narrow = River.build(tiny_llama, NARROW)
    losses = matrix_losses(tiny_llama, layers, narrow.exit_layers, TEXT)
    worst = [MatrixLoss(one.layer, one.names, one.num_weights, 1 / one.loss) for one in losses]
    config = RiverConfig("auto", 32, "rtn", average_bits=5.0)
    best = River.build(tiny_llama, config, calibration=TEXT)
    other = River.build(tiny_llama, config, bits=allocate_bits(worst, len(layers), 5.0))
    assert best.average_bits == pytest.approx(other.average_bits, abs=0.2)
    assert best.average_bits <= 5
    assert divergence(tiny_llama, best) < 0.8 * divergence(tiny_llama, other)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.floats(0, 10)), min_size=1, max_size=5),
    st.floats(4, 8),
)
def test_allocation_is_nearly_the_best(sizes: list[tuple[int, float]], average: float) -> None:
    """A greedy knapsack loses at most the one step that it had no room for."""
    losses = [MatrixLoss(i, ("w",), size, loss) for i, (size, loss) in enumerate(sizes)]
    total = sum(size for size, _ in sizes)

    def bits(widths: tuple[int, ...]) -> float:
        return sum(width * size for width, (size, _) in zip(widths, sizes, strict=True)) / total

    def loss(widths: tuple[int, ...]) -> float:
        return sum(
            one.loss * (15 / (2**width - 1)) ** 2 for width, one in zip(widths, losses, strict=True)
        )

    allocated = allocate_bits(losses, len(losses), average)
    widths = tuple(layer["w"] for layer in allocated)
    assert bits(widths) <= average + 1e-9
    within = [w for w in product(WIDTHS, repeat=len(sizes)) if bits(w) <= average]
    assert loss(widths) <= min(map(loss, within)) + max(one.loss for one in losses) + 1e-9


@pytest.mark.parametrize("average", [4.0, 8.0])
def test_at_the_ends_all_are_of_one_width(average: float) -> None:
    losses = [MatrixLoss(0, ("a", "b"), 3, 1.0), MatrixLoss(1, ("c",), 2, 0.0)]
    width = int(average)
    assert allocate_bits(losses, 2, average) == [{"a": width, "b": width}, {"c": width}]


def test_what_is_no_number_is_refused(tiny_llama: PreTrainedModel) -> None:
    layers, exit_layers = decoder_layers(tiny_llama), River.build(tiny_llama, NARROW).exit_layers
    exit_layers[1]["mlp.up_proj"].scales[3] = torch.inf
    with pytest.raises(ConfigError, match="costs is no finite number"):
        matrix_losses(tiny_llama, layers, exit_layers, TEXT)
    tiny_llama.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ConfigError, match="logits are no numbers"):
        matrix_losses(tiny_llama, layers, exit_layers, TEXT)


def test_a_river_gives_each_matrix_its_bits(tiny_llama: PreTrainedModel) -> None:
    bits = mixed_bits(tiny_llama)
    river = River.build(tiny_llama, AUTO, bits=bits)
    uniform = {width: River.build(tiny_llama, RiverConfig(width, 32, "rtn")) for width in BITS}
    total = weights = 0
    for index, layer in enumerate(river.exit_layers):
        for name, matrix in layer.items():
            width = bits[index][name]
            assert matrix.bits == width
            assert torch.equal(matrix.packed, uniform[width].exit_layers[index][name].packed)
            total += width * matrix.shape[0] * matrix.shape[1]
            weights += matrix.shape[0] * matrix.shape[1]
    assert river.average_bits == total / weights


@pytest.mark.parametrize(
    ("config", "bits", "message"),
    [
        (AUTO, None, "bits auto needs calibration text"),
        (THREE, [FOUR_BITS] * 4, "the river has 3 bits; bits of each matrix go with auto"),
        (AUTO, [FOUR_BITS] * 3, "bits are to be given for self_attn.q_proj, .* of each layer"),
        (AUTO, [*[FOUR_BITS] * 3, {"mlp.up_proj": 4}], "bits are to be given for"),
        (AUTO, [*[FOUR_BITS] * 3, FOUR_BITS | {"mlp.up_proj": 7}], "no matrix has 7 bits"),
    ],
)
def test_refuses_bits_that_do_not_fit(
    config: RiverConfig,
    bits: list[dict[str, int]] | None,
    message: str,
    tiny_llama: PreTrainedModel,
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        River.build(tiny_llama, config, bits=bits)
