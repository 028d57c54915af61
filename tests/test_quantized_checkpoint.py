"""Checkpoints that are quantised already become rivers: what each format says that a weight is, the
river's matrices are, and everything else is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_models import Packed, byte_lm, byte_model, logits_cosine, save_folder, save_gguf
from command_line import run
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from packed_checkpoints import (
    AWQ,
    GPTQ,
    SCALE_PLACES,
    SIZES,
    Rounded,
    blocks_of,
    in_kind,
    random_rows,
    save_checkpoint,
    wide_model,
    write_folder,
)
from safetensors.torch import load_file
from tiny_models import fake_quantised
from transformers import PreTrainedModel

from river_llm import ExitPolicy, River, RiverConfig
from river_llm.errors import ModelLoadError
from river_llm.load.gguf.file import GGUFTensor
from river_llm.load.model import load_backbone
from river_llm.load.quantized import Import, check_checkpoint, import_river
from river_llm.load.quantized.against_backbone import in_river
from river_llm.load.quantized.gguf_checkpoint import decode
from river_llm.river.backbone import decoder_layers
from river_llm.river.quantize import QuantizedMatrix, quantize

Kind = GGMLQuantizationType


def compressed(bits: int = 4, **settings: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "symmetric": False}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        **settings,
    }


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return byte_model(**SIZES)


def matrices(imported: Import) -> dict[str, QuantizedMatrix]:
    return {
        f"model.layers.{index}.{name}": matrix
        for index, layer in enumerate(imported.river.exit_layers)
        for name, matrix in layer.items()
    }


def check_holds(matrix: QuantizedMatrix, weight: Rounded) -> None:
    """The codes are the checkpoint's, and the values its values but for a rounding of scales."""
    assert matrix.is_consistent()
    assert torch.equal(matrix.codes(), torch.from_numpy(weight.codes).byte())
    groups = weight.values().view(len(weight.codes), -1, matrix.group_size)
    error = (matrix.dequantize().view(groups.shape) - groups).abs()
    assert (error <= 2**-7 * groups.abs().amax(-1, keepdim=True) + 1e-12).all()


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize(
    ("settings", "bits", "group_size"),
    [
        (GPTQ, 4, 32),
        (GPTQ, 2, 64),
        (GPTQ, 3, 32),
        (GPTQ, 8, 128),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, 4, 64),
        (AWQ, 4, 32),
        (AWQ, 4, 64),
        (compressed(), 4, 32),
        (compressed(3), 3, 64),
        (compressed(8), 8, 128),
        (compressed(zeros="int8"), 4, 32),
    ],
)
def test_codes_stay_and_mean_what_their_format_says(
    settings: dict[str, Any],
    bits: int,
    group_size: int,
    is_symmetric: bool,
    model: PreTrainedModel,
    tmp_path: Path,
) -> None:
    held = save_checkpoint(tmp_path / "c", model, settings, bits, group_size, is_symmetric)
    imported = import_river(model, tmp_path / "c")
    assert imported.num_requantized == 0
    assert imported.river.config.group_size == group_size
    assert imported.river.config.bits == bits
    for name, matrix in matrices(imported).items():
        check_holds(matrix, held[name])
    imported.river.check_fits(decoder_layers(model))


@pytest.mark.parametrize("group_size", [-1, 16])
def test_groups_wider_than_a_rivers_are_split_and_smaller_ones_quantised_anew(
    group_size: int, model: PreTrainedModel, tmp_path: Path
) -> None:
    held = save_checkpoint(tmp_path / "c", model, GPTQ, 4, group_size)
    imported = import_river(model, tmp_path / "c")
    if group_size == -1:
        assert imported.river.config.group_size == 128
        for name, matrix in matrices(imported).items():
            check_holds(matrix, held[name])
        return
    assert imported.river.config.group_size == 32
    assert imported.num_requantized == 28
    for name, matrix in matrices(imported).items():
        values = held[name].values()
        own = model.get_submodule(name).weight.detach().double()
        assert (matrix.dequantize() - values).norm() < 0.1 * (values - own).norm()


_HELD = dict(zip(SCALE_PLACES, (4, 5, 8, 4, 5, 4, 5), strict=False))  # bits of those that stay


@given(kind=st.sampled_from(sorted(_HELD)), seed=st.integers(0, 10**6))
def testblocks_of_gguf_mean_what_its_package_says(kind: Kind, seed: int) -> None:
    data = random_rows(kind, (3, 512), seed)
    before = data.copy()
    weight = decode(GGUFTensor("w", (3, 512), kind, data))
    assert np.array_equal(data, before)
    expected = torch.from_numpy(dequantize(data, kind))
    assert weight.bits == _HELD[kind]
    assert torch.allclose(weight.dequantize(), expected, rtol=1e-5, atol=1e-6)
    groups = expected.view(3, -1, 32)
    error = (weight.rounded(32).dequantize().view(groups.shape) - groups).abs()
    # an offset that is large beside the steps is rounded too
    largest = torch.maximum(groups.abs().amax(-1), weight.zeros.abs()).unsqueeze(-1)
    assert (error <= 2**-7 * largest).all()


class TestGGUF:
    @pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q8_0])
    @pytest.mark.parametrize("architecture", ["Llama", "Phi3", "Gemma3Text"])
    def test_a_file_of_a_model_is_its_river(
        self, kind: Kind, architecture: str, tmp_path: Path
    ) -> None:
        settings = {"Phi3": {"pad_token_id": 0}, "Gemma3Text": {"head_dim": 16}}
        model = byte_model(architecture, **settings.get(architecture, {}))
        known = {"Llama": "llama", "Phi3": "phi3", "Gemma3Text": "gemma3"}

        file = save_gguf(
            tmp_path / "m.gguf", model, known[architecture], pack=in_kind(kind), pre="gpt-2"
        )
        imported = import_river(model, file)
        assert imported.num_requantized == 0
        assert imported.least_cosine > 0.99  # queries and keys in the model's order
        assert imported.river.config.bits == _HELD[kind]
        assert imported.river.config.group_size == 32

    @pytest.mark.parametrize("kind", SCALE_PLACES)
    def test_a_file_is_the_river_of_itself(self, kind: Kind, tmp_path: Path) -> None:
        file = save_gguf(tmp_path / "m.gguf", wide_model(), pack=blocks_of(kind), pre="gpt-2")
        model, _ = load_backbone(file)
        imported = import_river(model, file)
        assert imported.num_requantized == (0 if kind in _HELD else 28)
        assert imported.river.config.bits == _HELD.get(kind, 8)
        assert imported.least_cosine > 0.9999

    def test_kinds_may_be_mixed_in_a_file_and_in_a_weight(self, tmp_path: Path) -> None:
        kinds = {"attn_v": Kind.Q6_K, "attn_output": Kind.Q5_K, "ffn_gate": Kind.F32}

        def pack(name: str, weight: np.ndarray) -> Packed | None:
            kind = kinds.get(name.split(".")[-2], Kind.Q4_K)
            return None if kind == Kind.F32 else blocks_of(kind)(name, weight)

        file = save_gguf(tmp_path / "m.gguf", wide_model(), pack=pack, pre="gpt-2")
        model, _ = load_backbone(file)
        imported = import_river(model, file)
        assert imported.num_requantized == 8
        bits = {name: matrix.bits for name, matrix in imported.river.exit_layers[1].items()}
        assert bits == {
            "self_attn.q_proj": 4,
            "self_attn.k_proj": 4,
            "self_attn.v_proj": 8,
            "self_attn.o_proj": 5,
            "mlp.gate_proj": 8,
            "mlp.up_proj": 4,
            "mlp.down_proj": 4,
        }
        assert imported.least_cosine > 0.9999


def test_a_norm_that_was_rounded_otherwise_changes_nothing(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    held = save_checkpoint(tmp_path / "c", model, GPTQ)
    weights = load_file(tmp_path / "c" / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("norm.weight"):
            weights[name] = (weight * 1.004).half()
    write_folder(tmp_path / "c", model, GPTQ, weights)
    imported = import_river(model, tmp_path / "c")
    for name, matrix in matrices(imported).items():
        check_holds(matrix, held[name])


def test_a_checkpoint_of_the_hub_is_read_from_its_cache(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    save_checkpoint(folder, model, GPTQ)
    check_checkpoint("org/name")
    assert import_river(model, "org/name").river.source == "gptq: org/name"


def test_layers_that_a_checkpoint_has_in_full_are_quantised(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "c", model, GPTQ)
    weights = load_file(tmp_path / "c" / "model.safetensors")
    name = "model.layers.2.mlp.up_proj"
    weights = {key: weight for key, weight in weights.items() if not key.startswith(name)}
    weights[f"{name}.weight"] = model.get_submodule(name).weight.detach()
    write_folder(tmp_path / "c", model, GPTQ, weights)
    imported = import_river(model, tmp_path / "c")
    assert imported.num_requantized == 1
    assert imported.river.exit_layers[2]["mlp.up_proj"].bits == 8
    assert imported.river.config.bits == "auto"


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_both_engines_run_an_imported_river(engine: str, tmp_path: Path) -> None:
    if engine == "cpu":
        pytest.importorskip("river_llm._core", reason="the native engine was not built")
    kinds = in_kind(Kind.Q4_0, attn_v=Kind.Q8_0, ffn_down=Kind.Q5_0, attn_output=Kind.Q5_1)
    model = byte_model()
    folder = save_folder(tmp_path / "model", model)
    file = save_gguf(tmp_path / "m.gguf", model, pack=kinds, pre="gpt-2")
    river = import_river(model, file).river
    river.save(tmp_path / "river")
    lm = byte_lm(folder, river=tmp_path / "river", engine=engine)
    expected = fake_quantised(model.float(), river)
    assert logits_cosine(lm, expected, policy=ExitPolicy.always()) > 0.9995
    assert logits_cosine(lm, model, policy=ExitPolicy.always()) < 0.9995


def test_smollm2s_own_file_is_the_river_of_itself(smollm2: PreTrainedModel) -> None:
    imported = import_river(smollm2, "smollm2")
    assert imported.num_requantized == 0
    assert imported.river.config.bits == 4
    assert imported.least_cosine > 0.99999
    ids = torch.arange(1000, 1200).unsqueeze(0)
    with torch.no_grad():
        own = smollm2(ids).logits.log_softmax(-1)
        other = fake_quantised(smollm2, imported.river)(ids).logits.log_softmax(-1)
    assert (own.exp() * (own - other)).sum(-1).mean() < 3e-4


class TestCommandLine:
    def test_builds_a_river_from_a_checkpoint(self, model: PreTrainedModel, tmp_path: Path) -> None:
        folder = save_folder(tmp_path / "model", model)
        save_checkpoint(tmp_path / "c", model, GPTQ)
        outcome = run("build", folder, "--from", tmp_path / "c", "-o", tmp_path / "r")
        assert outcome.exit_code == 0, outcome.stderr
        assert "4 bits in groups of 32 (gptq" in outcome.stderr
        assert "least cosine with the backbone 0.99" in outcome.stderr
        river = River.load(tmp_path / "r")
        assert river.config.quantizer == "imported"
        assert river.source == f"gptq: {tmp_path / 'c'}"

    @pytest.mark.parametrize(
        "options",
        [("--bits", 4), ("--quantizer", "hqq"), ("--calibrate", "x"), ("--group-size", 64)],
    )
    def test_takes_no_settings_beside_a_checkpoint(
        self, options: tuple[object, ...], tmp_path: Path
    ) -> None:
        outcome = run("build", "smollm2", "--from", "x", "-o", tmp_path / "r", *options)
        outcome.check_fails(2, f"{options[0]} doesn't go with --from")

    def test_nothing_else_is_imported(self, tmp_path: Path) -> None:
        outcome = run("build", "smollm2", "--quantizer", "imported", "-o", tmp_path / "r")
        outcome.check_fails(2, "--quantizer imported is what --from CHECKPOINT makes")


def test_outputs_with_factors_of_their_own_are_refused() -> None:
    own = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    coarse = quantize(own, RiverConfig(2, 32, "rtn")).dequantize()
    assert in_river(coarse, own, 32).cosine > 0.7
    factors = torch.linspace(0.6, 1.6, 64).unsqueeze(1)
    with pytest.raises(ModelLoadError, match="outputs that are multiples of the backbone's"):
        in_river(own * factors, own, 32)
