"""The models that the arms run on, each loaded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from river_llm.exit_policy import ExitPolicy
from river_llm.report.arms import Arm, Variant
from river_llm.report.random_routing import with_random_routing
from river_llm.river_lm import RiverLM

Progress = Callable[[str, int, int], None]  # (what is done, so many of it, of so many)


class Models:
    """Loads a variant when an arm first needs it, and keeps it: speeds are measured in turn."""

    def __init__(
        self, load: Callable[[Variant], RiverLM], loaded: Mapping[Variant, RiverLM] | None = None
    ) -> None:
        """`loaded` are there already."""
        self._load = load
        self._loaded = dict(loaded or {})

    def of(self, arm: Arm) -> RiverLM:
        """The model that an arm runs on, whatever its policy is now."""
        if arm.variant not in self._loaded:
            self._loaded[arm.variant] = self._load(arm.variant)
        return self._loaded[arm.variant]

    def release(self) -> None:
        """Let go of all of them, for memory to be measured."""
        self._loaded.clear()

    @contextmanager
    def running(self, arm: Arm) -> Iterator[RiverLM]:
        """The model with the arm's policy, and an engine that can take it."""
        lm = self.of(arm)
        engine = lm.engine
        try:
            if arm.kind == "random":
                lm.engine = with_random_routing(engine)
            lm.policy = arm.policy
            yield lm
        finally:
            engine.truncate(0)
            engine.policy = ExitPolicy.never()
            lm.engine = engine
            lm.forget_cache()
