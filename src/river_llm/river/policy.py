"""When a token leaves the backbone.

Every policy comes down to one number per layer. After `l` backbone layers a token leaves if its
state transition similarity

    s[l] = cos(h[l-1], h[l])        the layer's input against its output (the paper's equation 3)

exceeds `thresholds[l]`. `thresholds[0]` stands before the first layer, where there is no
similarity yet: minus infinity there means that a token leaves at once. That vector is all an
engine needs to know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeGuard, get_args

from river_llm.config import DEFAULT_THRESHOLD
from river_llm.errors import ConfigError
from river_llm.settings import is_number, is_whole_number

PolicyKind = Literal["never", "always", "fixed", "similarity", "thresholds"]
PrefillRule = Literal["backbone", "river", "sequence", "token"]
BatchRule = Literal["sequence", "minimum"]


@dataclass(frozen=True, slots=True)
class ExitPolicy:
    """When tokens leave the backbone; made by one of the class methods.

    Attributes:
        kind: which of the class methods made it.
        exit_layer: for ``fixed``, how many backbone layers every token runs.
        threshold: for ``similarity``, the paper's tau, in [-1, 1].
        first_layer: for ``similarity``, the first layer after which tau counts (1 is the first).
        layer_thresholds: for ``thresholds``, one number for each layer count 0 ... L-1; see
            `per_layer`.
        prefill: how the prompt runs. ``"backbone"``: in full precision, all layers. ``"river"``:
            all of it through the exit layers. ``"sequence"``: the paper's sequence-level exit, a
            whole prompt leaves where the mean similarity over its tokens exceeds the threshold.
            ``"token"``: every prompt token leaves by its own similarity, as decoding would take
            it; this is how a given text is scored in one pass.
        batch: how sequences that decode together leave. ``"sequence"``: each on its own.
            ``"minimum"``: all together, by the smallest similarity (the paper's rule); padding has
            no say.
        second_look: a token that left, and whose margin is this or less, in (0, 1], runs once more
            through the whole backbone, with up to seven tokens of the answer before it: that
            overwrites their keys and values and gives the next token. The margin is 1 - p2 / p1 of
            the two most likely next tokens, before temperature and logits processors; 1 looks again
            at every token. Of a prompt, its last token only. None: there is no second look.
    """

    kind: PolicyKind = "never"
    exit_layer: int | None = None
    threshold: float | None = None
    first_layer: int = 1
    layer_thresholds: tuple[float, ...] | None = None
    prefill: PrefillRule = "backbone"
    batch: BatchRule = "sequence"
    second_look: float | None = None

    def __post_init__(self) -> None:
        for name, choices in (("kind", PolicyKind), ("prefill", PrefillRule), ("batch", BatchRule)):
            value = getattr(self, name)
            if value not in get_args(choices):
                listed = ", ".join(get_args(choices))
                raise ConfigError(f"exit policy: {name} is {value!r}; choose one of {listed}")
        if self.kind == "fixed" and not (is_whole_number(self.exit_layer) and self.exit_layer >= 0):
            raise ConfigError(
                f"exit policy: the exit layer is {self.exit_layer!r}; "
                "it must be a whole number, 0 or more"
            )
        if self.kind == "similarity" and not _is_cosine(self.threshold):
            raise ConfigError(
                f"exit policy: the threshold is {self.threshold!r}; "
                "a similarity is a cosine, so choose one in [-1, 1]"
            )
        if not (is_whole_number(self.first_layer) and self.first_layer >= 1):
            raise ConfigError(
                f"exit policy: the first layer is {self.first_layer!r}; "
                "give a whole number, layers count from 1"
            )
        if self.kind == "thresholds":
            _check_thresholds(self.layer_thresholds)
        if self.second_look is not None:
            _check_second_look(self)

    @classmethod
    def never(cls, **rules: Any) -> ExitPolicy:
        """Every token runs the whole backbone: the untouched model."""
        return cls("never", **rules)

    @classmethod
    def always(cls, **rules: Any) -> ExitPolicy:
        """Every token, the prompt's too unless `prefill` says otherwise, runs exit layers only:
        the fully quantised model."""
        return cls("always", **{"prefill": "river", **rules})

    @classmethod
    def fixed(cls, exit_layer: int, **rules: Any) -> ExitPolicy:
        """Every token leaves after `exit_layer` backbone layers."""
        return cls("fixed", exit_layer=exit_layer, **rules)

    @classmethod
    def similarity(cls, threshold: float, first_layer: int = 1, **rules: Any) -> ExitPolicy:
        """The paper's rule: leave after the first layer from `first_layer` on whose similarity
        exceeds `threshold`."""
        return cls("similarity", threshold=threshold, first_layer=first_layer, **rules)

    @classmethod
    def per_layer(cls, thresholds: tuple[float, ...], **rules: Any) -> ExitPolicy:
        """One threshold for each number of layers run, 0 to L-1.

        Entry l decides after l layers, by the similarity of layer l; there is none after the last
        layer, behind which every token leaves anyway. Plus infinity stays, minus infinity leaves.
        Entry 0 stands before the first layer, where there is no similarity, and is one of the two.

        Raises:
            ConfigError: there are none, one is no number or NaN, or entry 0 is finite.
        """
        return cls("thresholds", layer_thresholds=_floats(thresholds), **rules)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ExitPolicy:
        """From what `to_dict` gave.

        Raises:
            ConfigError: it is no policy's.
        """
        thresholds = values.get("layer_thresholds")
        of_layers = {} if thresholds is None else {"layer_thresholds": _floats(thresholds)}
        try:
            return cls(**{**values, **of_layers})
        except TypeError as error:
            raise ConfigError(f"exit policy: {error}") from error

    def treats_alike(self, num_layers: int) -> bool:
        """Whether a token leaves as it does in an answer where it stands in a prompt too."""
        if self.second_look is not None:
            return False
        if self.prefill == "token":
            return True
        thresholds = self.thresholds(num_layers)
        if self.prefill == "sequence":  # the mean of similarities decides nothing
            return not any(map(math.isfinite, thresholds))
        return set(thresholds) == {math.inf if self.prefill == "backbone" else -math.inf}

    def thresholds(self, num_layers: int) -> tuple[float, ...]:
        """One threshold for each number of layers run; entry l stands for "after l layers".

        Raises:
            ConfigError: the policy names more layers than the model has.
        """
        if self.kind == "always":
            return (-math.inf,) * num_layers
        if self.kind == "fixed":
            assert self.exit_layer is not None
            if self.exit_layer > num_layers:
                raise ConfigError(
                    f"exit policy: the exit layer is {self.exit_layer}, "
                    f"but the model has {num_layers} layers; choose one in [0, {num_layers}]"
                )
            stays = (math.inf,) * self.exit_layer
            return stays + (-math.inf,) * (num_layers - self.exit_layer)
        if self.kind == "similarity":
            assert self.threshold is not None
            if self.first_layer > num_layers:
                raise ConfigError(
                    f"exit policy: the first layer is {self.first_layer}, "
                    f"but the model has {num_layers} layers"
                )
            stays = (math.inf,) * self.first_layer
            return stays + (self.threshold,) * (num_layers - self.first_layer)
        if self.kind == "thresholds":
            assert self.layer_thresholds is not None
            if len(self.layer_thresholds) != num_layers:
                raise ConfigError(
                    f"exit policy: {len(self.layer_thresholds)} thresholds for a model "
                    f"of {num_layers} layers; give one for each number of layers run, "
                    f"0 to {num_layers - 1}"
                )
            return self.layer_thresholds
        return (math.inf,) * num_layers

    def prefill_thresholds(self, num_layers: int) -> tuple[float, ...]:
        """The same for the tokens of a prompt; with ``"sequence"``, for their mean similarity.

        Raises:
            ConfigError: the policy names more layers than the model has.
        """
        if self.prefill in ("backbone", "river"):
            return (math.inf if self.prefill == "backbone" else -math.inf,) * num_layers
        return self.thresholds(num_layers)

    def describe(self) -> str:
        """A few words for a table: ``similarity > 0.97``."""
        look = "" if self.second_look is None else f", second look {self.second_look:g}"
        return self._describe_exits() + look

    def _describe_exits(self) -> str:
        if self.kind == "fixed":
            return f"exit after {self.exit_layer}"
        if self.kind == "similarity":
            start = f" from layer {self.first_layer}" if self.first_layer > 1 else ""
            return f"similarity > {self.threshold:g}{start}"
        if self.kind == "thresholds":
            return "threshold per layer"
        return {"never": "never leaves", "always": "leaves at once"}[self.kind]

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as plain JSON values; infinite thresholds as strings."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        if self.layer_thresholds is not None:
            fields["layer_thresholds"] = [
                threshold if math.isfinite(threshold) else str(threshold)
                for threshold in self.layer_thresholds
            ]
        return fields


def check_is_policy(policy: object) -> None:
    """Validate an exit policy.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(policy, ExitPolicy):
        raise ConfigError(
            f"the exit policy is {policy!r}; give an ExitPolicy, such as "
            f"ExitPolicy.similarity({DEFAULT_THRESHOLD})"
        )


def _floats(thresholds: Any) -> tuple[float, ...]:
    try:
        return tuple(map(float, thresholds))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"exit policy: the thresholds are {thresholds!r}; give one number for each number of "
            "layers run"
        ) from error


def _check_thresholds(thresholds: tuple[float, ...] | None) -> None:
    if not thresholds or not all(is_number(t) and not math.isnan(t) for t in thresholds):
        raise ConfigError("exit policy: give one threshold per layer, and none that is NaN")
    if math.isfinite(thresholds[0]):
        raise ConfigError(
            f"exit policy: the first threshold is {thresholds[0]!r}, but it stands before the "
            "first layer, where there is no similarity; take inf (stay) or -inf (leave) for it"
        )


def _check_second_look(policy: ExitPolicy) -> None:
    if not (is_number(policy.second_look) and 0 < policy.second_look <= 1):
        raise ConfigError(
            f"exit policy: second_look is {policy.second_look!r}; "
            "it is a margin, so choose one above 0 and at most 1"
        )
    if policy.kind == "never":
        raise ConfigError(
            "exit policy: a second look is at tokens that left the backbone; it goes with a policy "
            "by which they do"
        )


def _is_cosine(value: object) -> TypeGuard[float]:
    return is_number(value) and -1 <= value <= 1  # False for NaN
