"""The metadata of a GGUF file, taken key by key, so that what nobody took can be told."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from river_llm.errors import ModelLoadError, UnsupportedModelError

# What only says where a file comes from and how it was made.
_PROVENANCE = ("general.", "split.", "quantize.", "imatrix.", "mradermacher.", "unsloth.")
# Values with which a setting does nothing, where an architecture doesn't have it.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            *("attention.clamp_kqv", "attention.max_alibi_bias", "attention.sliding_window"),
            *("attention.temperature_scale", "attn_logit_softcapping", "final_logit_softcapping"),
            *("router_logit_softcapping", "expert_count", "expert_used_count"),
            *("expert_shared_count", "leading_dense_block_count", "nextn_predict_layers"),
            *("pooling_type", "rope.dimension_sections", "rope.scaling.alpha"),
        ),
        (0,),
    ),
    **dict.fromkeys(
        ("embedding_scale", "residual_scale", "logit_scale", "rope.scaling.yarn_ext_factor"), (1,)
    ),
    "attention.causal": (True,),
    "use_parallel_residual": (False,),
    "rope.scaling.finetuned": (True, False),  # whether it was trained with its scaling
    "tensor_data_layout": ("Meta AI original pth",),
}
_MISSING: Any = object()


class Metadata:
    """Metadata of one architecture.

    Attributes:
        architecture: as the file names it.
    """

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        """
        Raises:
            ModelLoadError: it holds no model, but an adapter or a projector, or names no
                architecture.
            UnsupportedModelError: it is a mixture of experts.
        """
        self._path = path
        self._values = values
        self._taken: set[str] = set()
        kind = values.get("general.type", "model")
        if kind != "model":
            raise self.refusal(f"holds no model, its type is {kind!r}; give the model's")
        architecture = values.get("general.architecture")
        if not isinstance(architecture, str) or not architecture:
            raise self.refusal("names no architecture; get the file again")
        if architecture == "clip":
            raise self.refusal("holds no model, but a projector of images; give the model's")
        self.architecture = architecture
        experts = values.get(f"{architecture}.expert_count")
        if isinstance(experts, int) and experts > 0:
            raise UnsupportedModelError(
                f"{path} is a mixture of experts ({architecture} with {experts}); the river needs "
                "layers that run all of their weights for every token"
            )

    def refusal(self, reason: str) -> ModelLoadError:
        """That the file can't be used."""
        return ModelLoadError(f"{self._path} {reason}")

    def take(self, key: str, default: Any = _MISSING) -> Any:
        """The value of a key of the architecture, `attention.head_count`; of layers that have one
        each, the one that all share.

        Raises:
            ModelLoadError: it isn't there and there is no default, or layers differ.
        """
        full = f"{self.architecture}.{key}"
        self._taken.add(full)
        value = self._values.get(full, default)
        if value is _MISSING:
            raise self.refusal(f"lacks {full}; it is damaged, or was made by an old converter")
        if isinstance(value, list):
            if not value or any(other != value[0] for other in value):
                raise self.refusal(f"has layers that differ in {full}, which isn't supported")
            return value[0]
        return value

    def take_same(self, key: str, value: int) -> None:
        """Take a key that may be there if it says what is so anyway."""
        if self._values.get(f"{self.architecture}.{key}") == value:
            self.take(key)

    def take_list(self, key: str) -> list[Any] | None:
        """The same of a key that may have a value for each layer; None where it isn't there or has
        one value."""
        full = f"{self.architecture}.{key}"
        value = self._values.get(full)
        if not isinstance(value, list):
            return None
        self._taken.add(full)
        return value

    def count(self, key: str, default: Any = _MISSING) -> Any:
        """A whole number above 0, or the default.

        Raises:
            ModelLoadError: it is something else.
        """
        value = self.take(key, default)
        if value is not default and not (type(value) is int and 0 < value < 2**31):
            raise self._damaged(key, value)
        return value

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """A finite number above 0, or the default, which 0 stands for too.

        Raises:
            ModelLoadError: it is something else.
        """
        value = self.take(key, default)
        if value is default or (value == 0 and default is not _MISSING):
            return default
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._damaged(key, value)
        return float(value)

    def _damaged(self, key: str, value: Any) -> ModelLoadError:
        return self.refusal(f"has {self.architecture}.{key} = {value!r}; it is damaged")

    def check_all_taken(self, known: frozenset[str] = frozenset()) -> None:
        """Refuse a key that nobody took and that may change what the model computes; `known` are
        further ones.

        Raises:
            ModelLoadError: there is one.
        """
        prefix = f"{self.architecture}."
        for key, value in self._values.items():
            if key in self._taken or key in known or key.startswith(_PROVENANCE):
                continue
            neutral = _NEUTRAL.get(key.removeprefix(prefix), ()) if key.startswith(prefix) else ()
            values = value if isinstance(value, list) else [value]
            if neutral and all(one in neutral for one in values):
                continue
            shown = "an array" if isinstance(value, list) else repr(value)[:60]
            raise self.refusal(
                f"has {key} = {shown}, which isn't known here and may change its answers; take "
                "another file of the model, or, if you know that it does nothing, remove it: "
                f"gguf-new-metadata OLD NEW --remove-metadata {key}"
            )
