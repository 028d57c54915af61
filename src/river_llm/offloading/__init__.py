"""Evicted backbone layers of a model of `transformers`: where they are, how they come back."""

from river_llm.offloading.evicted_layers import EvictedLayers

__all__ = ["EvictedLayers"]
