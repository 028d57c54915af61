"""GGUF files as models of `transformers`: used whole, or refused."""

from river_llm.load.gguf.load import load_gguf, load_gguf_config

__all__ = ["load_gguf", "load_gguf_config"]
