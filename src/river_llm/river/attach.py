"""The river on a model of `transformers`: `attach_river` and `detach_river`.

An exit layer differs from its backbone layer in nothing but the weights of its linear layers. So
the pair (backbone layer, exit layer) is one module that runs with either set of weights, row by
row: attention, norms, positions and the KV cache slot are shared because they are the same
objects. Attaching puts a routed forward on each linear layer and hooks on the decoder and its
layers; the module tree, the parameters and the model's own `generate()` stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from river_llm.config import DEFAULT_THRESHOLD, RiverConfig
from river_llm.errors import ConfigError, RiverError
from river_llm.ownership import NotCopied, ProcessLock
from river_llm.river.backbone import (
    DecoderLayer,
    check_plain_decoder,
    decoder_layers,
    text_decoder,
)
from river_llm.river.checked_generate import (
    MIXED_PASS,
    checked_batching,
    checked_generate,
    marked_prefill,
)
from river_llm.river.kernels import KernelChoice, make_kernel
from river_llm.river.offloading import EvictedLayers
from river_llm.river.policy import ExitPolicy, check_is_policy
from river_llm.river.quantize import QuantizedMatrix
from river_llm.river.residency import OffloadStatistics
from river_llm.river.river import Progress, River
from river_llm.river.routed_forward import RoutedForward, device_and_dtype
from river_llm.river.router import ExitRouter, Phase, Route, RoutingRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTACHED = "_river_attachment"  # the attribute of a model that names what is on it


class AttachedRiver(NotCopied):
    """A model with its exit river, as `attach_river` returns it.

    Attributes:
        model: the model, whose `forward` and `generate` now follow the exit policy.
        config: how the river is quantised.
        num_bytes: bytes of the river's weights.
        num_layers: L, the number of decoder layers.
        router: the exit decisions of the running pass, and the limit to its depth.
        exit_counts: int64 `[L + 1]`, how many tokens that were decoded by the policy since
            `clear_counts` ran 0, 1, ... L backbone layers.
        phase: ``"prefill"`` or ``"decode"`` to say what the next passes are; None, the default,
            takes a pass over one token with a filled cache as decode, any other as prefill, and in
            the model's `generate` its reading of the prompt as prefill.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        river: River,
        layers: list[DecoderLayer],
        policy: ExitPolicy,
        kernel: KernelChoice,
    ) -> None:
        self.model = model
        self.config = river.config
        self.num_bytes = river.num_bytes
        self.num_layers = len(layers)
        self.router = ExitRouter(self.num_layers)
        self.policy = policy
        self.phase: Phase | None = None
        self._rule: RoutingRule | None = None
        self._is_decoding = self._generates = self._reads_prompt = False
        self._lock = ProcessLock("river")  # of the thread in `generate`
        self.clear_counts()
        self._evicted = EvictedLayers(model, layers)
        self._is_river_in_memory = False
        self._linears = [linear for layer in layers for linear in layer.linears.values()]
        self._kernels = [
            make_kernel(matrix, *device_and_dtype(linear), kernel)
            for layer, exit_layer in zip(layers, river.exit_layers, strict=True)
            for linear, matrix in zip(layer.linears.values(), exit_layer.values(), strict=True)
        ]
        forwards = [
            RoutedForward(linear, kernel, self.router)
            for linear, kernel in zip(self._linears, self._kernels, strict=True)
        ]
        for linear, forward in zip(self._linears, forwards, strict=True):
            linear.forward = forward
        self._hooks = self._hook([layer.module for layer in layers])
        self._own_methods = self._replace_methods()

    def _hook(self, layers: list[nn.Module]) -> list[RemovableHandle]:
        decoder = text_decoder(self.model)
        hooks = [
            decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            decoder.register_forward_hook(self._after_pass),
            self.model.register_state_dict_pre_hook(self._before_state_dict),
        ]
        for index, layer in enumerate(layers):
            before, after = partial(self._before_layer, index), partial(self._after_layer, index)
            hooks += [
                layer.register_forward_pre_hook(before),
                layer.register_forward_hook(after, with_kwargs=True),
            ]
        return hooks

    def _replace_methods(self) -> dict[str, Any]:
        """Let the model's `generate` refuse what it can't do; what stood there before, by name."""
        model, checked = self.model, {}
        if hasattr(model, "generate"):
            checked["generate"] = checked_generate(model, self._treats_alike, self._generating)
            checked["_prefill"] = marked_prefill(model, self._reading_prompt)
        if hasattr(model, "init_continuous_batching"):
            checked["init_continuous_batching"] = checked_batching(model, self._treats_alike)
        own = {name: model.__dict__.get(name) for name in checked}
        for name, method in checked.items():
            setattr(model, name, method)
        return own

    @property
    def policy(self) -> ExitPolicy:
        """When tokens leave the backbone; may be set at any time between passes."""
        return self._policy

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        """
        Raises:
            ConfigError: it is none, names more layers than the model has, or has a second look.
        """
        _check_policy(policy, self.num_layers)
        self._policy = policy

    @property
    def matrices(self) -> list[QuantizedMatrix]:
        """The river's weights, layer after layer; none once it is detached."""
        return [kernel.matrix for kernel in self._kernels]

    @property
    def last_exit_layers(self) -> Tensor:
        """How many backbone layers each token of the last pass ran, int64 `[B, T]`."""
        return self.router.exit_layers

    @property
    def mean_exit_layer(self) -> float:
        """Mean number of backbone layers per decoded token since `clear_counts`; NaN if none."""
        layers = torch.arange(self.num_layers + 1)
        return float((self.exit_counts * layers).sum() / self.exit_counts.sum())

    def clear_counts(self) -> None:
        """Set `exit_counts` to zero."""
        self.exit_counts = torch.zeros(self.num_layers + 1, dtype=torch.long)

    def weight_bytes(self) -> tuple[tuple[int, ...], int]:
        """Of each backbone layer's linear weights, and of all other weights with the river."""
        layers = tuple(self._evicted.layer_bytes)
        evicted = sum(layers[self.resident_layers :])
        held = sum(parameter.nbytes for parameter in self.model.parameters())
        return layers, held + evicted - sum(layers) + self.num_bytes

    @property
    def resident_layers(self) -> int:
        """How many of the first backbone layers have their weights in memory."""
        return self._evicted.resident

    @property
    def offload_statistics(self) -> OffloadStatistics:
        """What evicted layers have cost so far."""
        evicted = self._evicted
        return OffloadStatistics(
            evicted.resident,
            evicted.misses,
            evicted.bytes_read,
            evicted.seconds_waited,
            self.router.depth_capped,
        )

    def keep_layers(self, count: int) -> None:
        """Keep the weights of the first `count` backbone layers in memory, evict the others, which
        come back one by one where a pass needs them. May be called between passes, up and down.

        Evicted layers go to a temporary file in the cache directory (a CPU) or to the host's
        memory (CUDA). Weights may not be changed from then on until the river is detached.

        Raises:
            ConfigError: the model has fewer layers.
            RiverError: there is no room for evicted layers, they can't be brought back, or the
                river is detached.
        """
        if getattr(self.model, ATTACHED, None) is not self:
            raise RiverError("layers can be evicted only while the river is attached")
        self._evicted.keep(count)
        if count < self.num_layers and not self._is_river_in_memory:
            for kernel in self._kernels:
                kernel.take_into_memory()
            self._is_river_in_memory = True

    def detach(self) -> None:
        """Take the river off; the model is then bit for bit what it was.

        Raises:
            RiverError: evicted layers can't be brought back; the river stays.
        """
        self._evicted.keep(self.num_layers)
        for hook in self._hooks:
            hook.remove()
        for linear in self._linears:
            linear.__dict__.pop("forward", None)
        self._hooks, self._linears, self._kernels = [], [], []
        if getattr(self.model, ATTACHED, None) is self:
            delattr(self.model, ATTACHED)
            for name, own in self._own_methods.items():
                self.model.__dict__.pop(name, None)
                if own is not None:
                    setattr(self.model, name, own)

    @contextmanager
    def routed_by(self, rule: RoutingRule) -> Iterator[None]:
        """Let tokens leave by a rule, in place of policy and phase, in the passes within."""
        self._rule = rule
        try:
            yield
        finally:
            self._rule = None
            self._evicted.end_pass()  # if it was cut short

    def _treats_alike(self) -> bool:
        return self.policy.treats_alike(self.num_layers)

    @contextmanager
    def _generating(self) -> Iterator[None]:
        with self._lock:
            before, self._generates = self._generates, True
            try:
                yield
            finally:
                self._generates = before

    @contextmanager
    def _reading_prompt(self) -> Iterator[None]:
        before, self._reads_prompt = self._reads_prompt, True
        try:
            yield
        finally:
            self._reads_prompt = before

    def _phase_of(self, num_tokens: int, past_key_values: Any) -> Phase:
        if self._reads_prompt:
            return "prefill"
        if past_key_values is None or int(past_key_values.get_seq_length()) == 0:
            return "prefill"
        if num_tokens == 1:
            return "decode"
        if self._generates and not self._treats_alike():
            raise RiverError(MIXED_PASS)
        return "prefill"

    def _before_pass(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        self._lock.check_process()
        self._evicted.end_pass()
        inputs = next(
            given
            for given in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
            if given is not None
        )
        batch, num_tokens = inputs.shape[:2]
        rule, self._is_decoding = self._rule, False
        if rule is None:
            phase = self.phase or self._phase_of(num_tokens, kwargs.get("past_key_values"))
            self._is_decoding = phase == "decode"
            mask = kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 2:  # [B, positions]; it hides padding
                is_real = mask[:, -num_tokens:].bool().cpu()
            else:
                is_real = torch.ones(batch, num_tokens, dtype=torch.bool)
            rule = RoutingRule.of_policy(self.policy, self.num_layers, phase, is_real)
        self.router.begin_pass(batch, num_tokens, rule)

    def _after_pass(self, decoder: nn.Module, args: Any, output: Any) -> None:
        self.router.end_pass()
        self._evicted.end_pass()
        if self._is_decoding:
            exit_layers = self.last_exit_layers.flatten()
            self.exit_counts += torch.bincount(exit_layers, minlength=self.num_layers + 1)

    def _before_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self.router.route is not Route.RIVER:
            self._evicted.before_layer(index)

    def _after_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        new_hidden_states = output[0] if isinstance(output, tuple) else output
        self.router.after_layer(index + 1, hidden_states, new_hidden_states)
        self._evicted.after_layer(index)

    def _before_state_dict(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        if self.resident_layers < self.num_layers:
            raise RiverError("the model can't be saved while layers are evicted; keep all of them")


def attach_river(
    model: PreTrainedModel,
    river: str | Path | River | RiverConfig | None = None,
    *,
    policy: ExitPolicy | None = None,
    kernel: KernelChoice = "auto",
    progress: Progress | None = None,
) -> AttachedRiver:
    """Let `model` run with an exit river until `detach_river(model)`.

    The model's `forward` and `generate` then follow `policy`. `generate` may be called by several
    threads, one at a time; passes of the model itself are for one thread at a time. Move the
    model to its device and dtype before; afterwards its weights may not be moved.

    Args:
        river: the folder of a river that was saved, a river built or loaded before, or how to
            build one; by default 4-bit HQQ in groups of 64.
        policy: when tokens leave the backbone; by default the paper's rule with
            `DEFAULT_THRESHOLD`.
        kernel: the product with quantised weights, see `kernels`.
        progress: called while a river is built with (layers done, layers in all).

    Raises:
        ConfigError: the river or the policy is none, or the policy names more layers than the
            model has, or has a second look.
        UnsupportedModelError: a layer of the model is no plain decoder layer.
        RiverFileError: there is no such river, or it was made from other weights.
        RiverError: the model has a river already.
    """
    if hasattr(model, ATTACHED):
        raise RiverError("the model has a river already; call detach_river(model) first")
    check_is_river(river)
    policy = ExitPolicy.similarity(DEFAULT_THRESHOLD) if policy is None else policy
    layers = decoder_layers(model)
    _check_policy(policy, len(layers))  # before the work of building
    if isinstance(river, str | Path):
        river = River.load(river)
    if isinstance(river, River):
        check_plain_decoder(model, layers)
        river.check_fits(layers)
    else:
        river = River.build(model, river, progress)
    attached = AttachedRiver(model, river, layers, policy, kernel)
    setattr(model, ATTACHED, attached)
    return attached


def _check_policy(policy: ExitPolicy, num_layers: int) -> None:
    check_is_policy(policy)
    policy.thresholds(num_layers)
    if policy.second_look is not None:
        raise ConfigError(
            "a second look runs a token twice, which a model's own passes don't; take RiverLM for "
            "it, or leave second_look out"
        )


def check_is_river(river: object) -> None:
    """Validate a river, the folder of one, or how to build one.

    Raises:
        ConfigError: it is none of them.
    """
    if river is not None and not isinstance(river, str | Path | River | RiverConfig):
        raise ConfigError(
            f"the river is {river!r}; give the folder of one, a River, or a RiverConfig to build "
            "one by"
        )


def detach_river(model: PreTrainedModel) -> None:
    """Undo `attach_river`: the model is then bit for bit what it was. Does nothing without one.

    Raises:
        RiverError: evicted layers can't be brought back; the river stays.
    """
    attached = getattr(model, ATTACHED, None)
    if attached is not None:
        attached.detach()
