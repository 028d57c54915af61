"""River: the quantised copy of every decoder layer. Build, save, load.

On disk a river is a folder of two files: `river.safetensors` with three tensors for every linear
layer (`<layer>.<linear>.packed`, `.scales`, `.zeros`; see `quantize`), and `river.json` with the
format version, the config, the fingerprint of the backbone it was made from, and the other file's
size and a digest of samples of it; where matrices differ in width, also the bits of each, a digit
for each of `linears` in a string for each layer. Norms, biases, embeddings and LM head are the
backbone's own and in neither.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from river_llm.config import BITS, RiverConfig
from river_llm.errors import ConfigError, RiverFileError
from river_llm.river.backbone import (
    DecoderLayer,
    are_float16,
    check_in_memory,
    check_plain_decoder,
    decoder_layers,
    fingerprint,
    linear_weight,
)
from river_llm.river.bit_allocation import WIDTHS, allocate_bits, matrix_losses
from river_llm.river.calibration import calibrated_exit_layers
from river_llm.river.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    TENSORS_NAME,
    check_place,
    read_manifest,
)
from river_llm.river.quantize import QuantizedMatrix, average_bits, quantize
from river_llm.store import atomic_write, file_digest, file_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]  # (layers done, layers in all)


@dataclass(frozen=True, slots=True)
class River:
    """The exit river: for every decoder layer, its linear weights in few bits.

    Attributes:
        config: how it was quantised; with auto bits, matrices differ in width.
        exit_layers: one dict per decoder layer, from a linear layer's name inside the layer
            (`self_attn.q_proj`) to its quantised weight.
        fingerprint: of the backbone's weights that it was made from.
        model_type: the backbone's architecture, `llama`.
        source: method, and name of the checkpoint that it was imported from or of the calibration
            text.
    """

    config: RiverConfig
    exit_layers: list[dict[str, QuantizedMatrix]]
    fingerprint: str
    model_type: str
    source: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all quantised weights."""
        return sum(matrix.num_bytes for layer in self.exit_layers for matrix in layer.values())

    @property
    def average_bits(self) -> float:
        """Bits of a weight's code, see `average_bits`."""
        return average_bits(matrix for layer in self.exit_layers for matrix in layer.values())

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        config: RiverConfig | None = None,
        progress: Progress | None = None,
        calibration: Tensor | None = None,
        bits: list[dict[str, int]] | None = None,
    ) -> River:
        """Quantise a copy of every decoder layer of `model`, which stays as it is.

        Args:
            calibration: the token ids `[sequences, tokens]` that GPTQ calibrates on, as of
                `load.calibration_text`.
            bits: with auto bits, those of each layer's linear weights, by name; None: as
                `allocate_bits` gives them out, by the losses of a river of 4 bits on the
                calibration text.
            progress: called after each layer with (layers done, layers in all).

        Raises:
            UnsupportedModelError: a layer is no plain decoder layer.
            RiverError: layers are evicted.
            ConfigError: the group size doesn't divide the input width of some linear layer, GPTQ
                has no calibration text, or `bits` don't fit model or config.
        """
        config = config or RiverConfig()
        allocates = config.bits == "auto" and bits is None
        if calibration is None and (config.quantizer == "gptq" or allocates):
            what = "gptq" if config.quantizer == "gptq" else "bits auto"
            raise ConfigError(
                f"{what} needs calibration text: river-llm build, or River.build with "
                "calibration=written_text(model, tokenizer)"
            )
        layers = decoder_layers(model)
        check_in_memory(layers)
        check_plain_decoder(model, layers)
        if calibration is not None and allocates:
            narrow = replace(config, bits=WIDTHS[0], average_bits=None)
            of_narrow = cls.build(model, narrow, progress, calibration).exit_layers
            losses = matrix_losses(model, layers, of_narrow, calibration)
            bits = allocate_bits(losses, len(layers), config.average_bits or WIDTHS[0])
        bits = _matrix_bits(layers, config, bits)
        made: Iterable[dict[str, QuantizedMatrix]]
        if calibration is None or config.quantizer != "gptq":
            made = (_quantize_layer(*each, config) for each in zip(layers, bits, strict=True))
        else:
            made = calibrated_exit_layers(model, layers, config.group_size, bits, calibration)
        exit_layers = []
        for done, exit_layer in enumerate(made, start=1):
            exit_layers.append(exit_layer)
            if progress:
                progress(done, len(layers))
        return cls(config, exit_layers, fingerprint(layers), model.config.model_type)

    def check_fits(self, layers: list[DecoderLayer]) -> None:
        """Validate that this river was made from these very layers.

        Raises:
            RiverFileError: it was made from another model or from other weights.
        """
        same_shape = len(layers) == len(self.exit_layers) and all(
            list(layer.linears) == list(exit_layer)
            for layer, exit_layer in zip(layers, self.exit_layers, strict=True)
        )
        if not same_shape or fingerprint(layers) != self.fingerprint:
            what = "other weights" if same_shape else "another model"
            fix = "build one for this model: river-llm build MODEL -o DIR"
            if same_shape and are_float16(layers):
                what += ", or for these in another dtype: float16 loses small values"
                fix = f"take the dtype that it was built in, or {fix} --dtype float16"
            raise RiverFileError(
                f"this river was built for {what} "
                f"({self.model_type}, {len(self.exit_layers)} layers, {self.fingerprint[:19]}...); "
                f"{fix}"
            )

    @staticmethod
    def check_place(directory: str | Path) -> Path:
        """Where `save` would write a river: `directory`, absolute, without links.

        Raises:
            RiverFileError: something else than a river is there, or nothing can be written there.
        """
        directory = Path(directory).resolve()
        try:
            check_place(directory)
        except OSError as error:
            raise RiverFileError(f"can't write the river to {directory}: {error}") from error
        return directory

    def save(self, directory: str | Path) -> None:
        """Write the river to `directory`, whole or not at all.

        An older river at that place is replaced; a folder that holds anything else is refused.

        Raises:
            RiverFileError: the place is taken, or can't be written.
        """
        directory = River.check_place(directory)
        tensors = {
            f"{index}.{name}.{part}": getattr(matrix, part).contiguous()
            for index, layer in enumerate(self.exit_layers)
            for name, matrix in layer.items()
            for part in ("packed", "scales", "zeros")
        }
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(directory) as new:
                new.mkdir()
                save_file(tensors, new / TENSORS_NAME, metadata={"format": "pt"})
                manifest = {
                    "format_version": FORMAT_VERSION,
                    "config": self.config.to_dict(),
                    "model_type": self.model_type,
                    "num_layers": len(self.exit_layers),
                    "linears": list(self.exit_layers[0]),
                    "fingerprint": self.fingerprint,
                    "tensor_bytes": (new / TENSORS_NAME).stat().st_size,
                    "tensor_digest": file_digest(new / TENSORS_NAME),
                }
                if self.config.bits == "auto":
                    manifest["bits"] = [
                        "".join(str(matrix.bits) for matrix in layer.values())
                        for layer in self.exit_layers
                    ]
                if self.source is not None:
                    manifest["source"] = self.source
                (new / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n")
        except (OSError, safetensors.SafetensorError) as error:
            raise RiverFileError(f"can't write the river to {directory}: {error}") from error

    @classmethod
    def load(cls, directory: str | Path) -> River:
        """Read a river; its tensors are mapped from the file, not copied.

        Raises:
            RiverFileError: there is no river, it is cut short or damaged, or of another format
                version.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        rebuild = "build it again: river-llm build MODEL -o DIR"
        tensors_path = directory / TENSORS_NAME
        actual = tensors_path.stat().st_size if tensors_path.exists() else 0
        if actual != manifest["tensor_bytes"]:
            raise RiverFileError(
                f"{tensors_path} has {actual} bytes where {manifest['tensor_bytes']} belong: "
                f"it is cut short or was replaced; {rebuild}"
            )
        config = manifest["config"]
        try:
            if file_digest(tensors_path) != manifest["tensor_digest"]:
                raise RiverFileError(
                    f"{tensors_path} is damaged: its bytes are not those that were written; "
                    f"{rebuild}"
                )
            with safetensors.safe_open(tensors_path, framework="pt") as tensors:
                exit_layers = [
                    {
                        name: QuantizedMatrix(
                            tensors.get_tensor(f"{index}.{name}.packed"),
                            tensors.get_tensor(f"{index}.{name}.scales"),
                            tensors.get_tensor(f"{index}.{name}.zeros"),
                            int(bits),
                            config.group_size,
                        )
                        for name, bits in zip(manifest["linears"], of_layer, strict=True)
                    }
                    for index, of_layer in enumerate(manifest["bits"])
                ]
        except (safetensors.SafetensorError, OSError) as error:
            raise RiverFileError(f"{tensors_path} can't be read ({error}); {rebuild}") from error
        if not all(matrix.is_consistent() for layer in exit_layers for matrix in layer.values()):
            raise RiverFileError(
                f"{tensors_path} holds other bits or groups than {MANIFEST_NAME} says; {rebuild}"
            )
        origin = manifest["fingerprint"], manifest["model_type"], manifest.get("source")
        return cls(config, exit_layers, *origin)

    @staticmethod
    def identity(directory: str | Path) -> tuple[RiverConfig, dict[str, Any]]:
        """What tells a saved river from others, without reading all of it: how it was quantised,
        and JSON values.

        Raises:
            RiverFileError: there is no river, or one of another format version.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        config = manifest.pop("config")
        try:
            state = file_state(directory / TENSORS_NAME)
        except OSError as error:
            raise RiverFileError(f"{directory / TENSORS_NAME} can't be read ({error})") from error
        return config, {**manifest, "config": config.to_dict(), "tensors": state}

    def to(self, device: torch.device | str) -> River:
        """The same river with its tensors on `device`."""
        exit_layers = [
            {name: matrix.to(device) for name, matrix in layer.items()}
            for layer in self.exit_layers
        ]
        return replace(self, exit_layers=exit_layers)


def _matrix_bits(
    layers: list[DecoderLayer], config: RiverConfig, given: list[dict[str, int]] | None
) -> list[dict[str, int]]:
    """The width of every linear layer's codes, as `River.build` takes it."""
    if config.bits != "auto":
        if given is not None:
            raise ConfigError(f"the river has {config.bits} bits; bits of each matrix go with auto")
        return [dict.fromkeys(layer.linears, config.bits) for layer in layers]
    assert given is not None
    if [set(of_layer) for of_layer in given] != [set(layer.linears) for layer in layers]:
        raise ConfigError(f"bits are to be given for {', '.join(layers[0].linears)} of each layer")
    wrong = {bits for of_layer in given for bits in of_layer.values()} - {*BITS}
    if wrong:
        raise ConfigError(f"no matrix has {wrong.pop()} bits; choose among {BITS}")
    return given


def _quantize_layer(
    layer: DecoderLayer, bits: dict[str, int], config: RiverConfig
) -> dict[str, QuantizedMatrix]:
    exit_layer: dict[str, QuantizedMatrix] = {}
    name = ""
    try:
        for name, linear in layer.linears.items():
            of_matrix = replace(config, bits=bits[name], average_bits=None)
            exit_layer[name] = quantize(linear_weight(linear), of_matrix)
    except ConfigError as error:
        raise ConfigError(f"{layer.name}.{name}: {error}") from error
    return exit_layer
