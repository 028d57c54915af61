"""The river on a model of `transformers`: `attach_river` and `detach_river`.

An exit layer differs from its backbone layer in nothing but the weights of its linear layers. So
the pair (backbone layer, exit layer) is one module that runs with either set of weights, row by
row: attention, norms, positions and the KV cache slot are shared because they are the same
objects. Attaching puts a routed forward on each linear layer and hooks on the decoder and its
layers; the module tree, the parameters and the model's own `generate()` stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from river_llm.backbone import (
    DecoderLayer,
    check_plain_decoder,
    decoder_layers,
    text_decoder,
)
from river_llm.checked_generate import (
    checked_batching,
    checked_generate,
    marked_prefill,
    refuse_mixed_pass,
)
from river_llm.config import RiverConfig
from river_llm.errors import ConfigError, RiverError
from river_llm.exit_policy import DEFAULT_THRESHOLD, ExitPolicy, check_is_policy
from river_llm.exit_router import ExitRouter, Route, RoutingRule
from river_llm.kernels import KernelChoice, make_kernel
from river_llm.offloading import EvictedLayers
from river_llm.ownership import NotCopied, OwnProcess
from river_llm.quantization import QuantizedMatrix
from river_llm.residency import OffloadStatistics
from river_llm.river import Progress, River
from river_llm.routed_forward import RoutedForward, device_and_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Phase = Literal["prefill", "decode"]

ATTACHED = "_river_attachment"  # the attribute of a model that names what is on it


class AttachedRiver(NotCopied):
    """A model with its exit river, as `attach_river` returns it.

    Attributes:
        model: the model, whose `forward` and `generate` now follow the exit policy.
        config: how the river is quantised.
        num_bytes: bytes of the river's weights.
        num_layers: L, the number of decoder layers.
        router: the exit decisions of the running pass.
        exit_counts: int64 `[L + 1]`, how many tokens decoded since `clear_counts` ran
            0, 1, ... L backbone layers.
        depth_limit: see `ExitRouter`; may be set at any time between passes.
        record_similarities: whether `router.similarities` are kept.
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
        self.record_similarities = False
        self._rule: RoutingRule | None = None
        self._process = OwnProcess()
        self._generates = self._reads_prompt = False
        self._turn = RLock()
        self.clear_counts()
        self._evicted = EvictedLayers(model, layers)
        self._is_river_in_memory = False
        self._linears = [linear for layer in layers for linear in layer.linears.values()]
        self._hooks: list[RemovableHandle] = []
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
        for index, layer in enumerate(layers):
            before, after = partial(self._before_layer, index), partial(self._after_layer, index)
            self._hooks += [
                layer.module.register_forward_pre_hook(before),
                layer.module.register_forward_hook(after, with_kwargs=True),
            ]
        decoder = text_decoder(model)
        self._hooks += [
            decoder.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            decoder.register_forward_hook(self._after_pass),
            model.register_state_dict_pre_hook(self._before_state_dict),
        ]
        checked: dict[str, Callable[..., Any]] = {}
        if hasattr(model, "generate"):
            checked["generate"] = checked_generate(model, self._treats_alike, self._generating)
            checked["_prefill"] = marked_prefill(model, self._reading_prompt)
        if hasattr(model, "init_continuous_batching"):
            checked["init_continuous_batching"] = checked_batching(model, self._treats_alike)
        self._own_methods = {name: model.__dict__.get(name) for name in checked}
        for name, method in checked.items():
            setattr(model, name, method)

    @property
    def policy(self) -> ExitPolicy:
        """When tokens leave the backbone; may be set at any time between passes."""
        return self._policy

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        """
        Raises:
            ConfigError: it is none, or names more layers than the model has.
        """
        check_is_policy(policy)
        self._thresholds: dict[Phase, Tensor] = {
            "prefill": torch.tensor(policy.prefill_thresholds(self.num_layers)),
            "decode": torch.tensor(policy.thresholds(self.num_layers)),
        }
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

    def weight_bytes(self) -> tuple[tuple[int, ...], int]:
        """Of each backbone layer's linear weights, and of all other weights with the river."""
        layers = tuple(self._evicted.layer_bytes)
        evicted = sum(layers[self._evicted.resident :])
        held = sum(parameter.nbytes for parameter in self.model.parameters())
        return layers, held + evicted - sum(layers) + self.num_bytes

    @property
    def depth_limit(self) -> int | None:
        return self.router.depth_limit

    @depth_limit.setter
    def depth_limit(self, limit: int | None) -> None:
        self.router.depth_limit = limit

    @property
    def resident_layers(self) -> int:
        """How many of the first backbone layers have their weights in memory."""
        return self._evicted.resident

    @property
    def offload_statistics(self) -> OffloadStatistics:
        """What evicted layers have cost so far."""
        return OffloadStatistics(
            self._evicted.resident,
            self._evicted.misses,
            self._evicted.bytes_read,
            self._evicted.seconds_waited,
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

    def clear_counts(self) -> None:
        """Set `exit_counts` to zero."""
        self.exit_counts = torch.zeros(self.num_layers + 1, dtype=torch.long)

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

    def _treats_alike(self) -> bool:
        return self.policy.treats_alike(self.num_layers)

    @contextmanager
    def _generating(self) -> Iterator[None]:
        self._process.check("river")  # a fork would wait for ever for a thread that it hasn't
        with self._turn:
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

    @contextmanager
    def routed_by(self, rule: RoutingRule) -> Iterator[None]:
        """Let tokens leave by a rule, in place of policy and phase, in the passes within."""
        self._rule = rule
        try:
            yield
        finally:
            self._rule = None
            self.abandon_pass()

    def _before_pass(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        inputs = kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            inputs = args[0]
        self._process.check("river")
        self.abandon_pass()
        batch, num_tokens = inputs.shape[:2]
        rule, self._is_decoding = self._rule, False
        if rule is None:
            phase = self.phase or self._phase_of(num_tokens, kwargs.get("past_key_values"))
            self._is_decoding = phase == "decode"
            rule = self._rule_of(phase, batch, num_tokens, kwargs.get("attention_mask"))
        self.router.begin_pass(batch, num_tokens, rule)

    def _rule_of(
        self, phase: Phase, batch: int, num_tokens: int, attention_mask: Any
    ) -> RoutingRule:
        """What policy and phase say. Tokens that an attention mask `[B, positions]` hides are
        padding."""
        by_sequence = phase == "prefill" and self.policy.prefill == "sequence"
        together = self.policy.batch == "minimum"
        places = torch.arange(num_tokens).expand(batch, num_tokens)
        sequences = torch.arange(batch).unsqueeze(1).expand(batch, num_tokens)
        is_real = None
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            is_real = attention_mask[:, -num_tokens:].bool().cpu()
        return RoutingRule(
            self._thresholds[phase],
            is_real,
            mean_groups=sequences if by_sequence else None,
            minimum_groups=(places * (not by_sequence)) if together else None,
            record_similarities=self.record_similarities,
        )

    def _phase_of(self, num_tokens: int, past_key_values: Any) -> Phase:
        if self._reads_prompt:
            return "prefill"
        if past_key_values is None or int(past_key_values.get_seq_length()) == 0:
            return "prefill"
        if num_tokens == 1:
            return "decode"
        if self._generates and not self._treats_alike():
            refuse_mixed_pass()
        return "prefill"

    def abandon_pass(self) -> None:
        """Let go of the layers that came back for a pass which was cut short."""
        self._evicted.end_pass()

    def _before_state_dict(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        if self.resident_layers < self.num_layers:
            raise RiverError("the model can't be saved while layers are evicted; keep all of them")

    def _before_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...]) -> None:
        router = self.router
        if router.route is not Route.RIVER:
            self._evicted.before_layer(index, router.least_depth, router.most_depth)

    def _after_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        new_hidden_states = output[0] if isinstance(output, tuple) else output
        self.router.after_layer(index + 1, hidden_states, new_hidden_states)
        self._evicted.after_layer(index)

    def _after_pass(self, decoder: nn.Module, args: Any, output: Any) -> None:
        self.router.end_pass()
        self._evicted.end_pass()
        if self._is_decoding:
            counts = torch.bincount(
                self.router.exit_layers.flatten(), minlength=self.num_layers + 1
            )
            self.exit_counts += counts


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
    threads, which take turns; passes of the model itself are for one thread at a time. Move the
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
            model has.
        UnsupportedModelError: a layer of the model is no plain decoder layer.
        RiverFileError: there is no such river, or it was made from other weights.
        RiverError: the model has a river already.
    """
    if hasattr(model, ATTACHED):
        raise RiverError("the model has a river already; call detach_river(model) first")
    check_is_river(river)
    policy = ExitPolicy.similarity(DEFAULT_THRESHOLD) if policy is None else policy
    check_is_policy(policy)
    layers = decoder_layers(model)
    policy.thresholds(len(layers))  # refuse it before the work of building
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


def check_is_river(river: object) -> None:
    """See that it is a river, a folder, or how to build one.

    Raises:
        ConfigError: it isn't.
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
