"""The names of the peers, and whether they are installed."""

from __future__ import annotations

from importlib.util import find_spec

PEERS = ("transformers", "llama.cpp")
INSTALL_LLAMA_CPP = "pip install 'river-llm[bench]'"


def llama_cpp_is_installed() -> bool:
    """Whether llama-cpp-python is there."""
    return find_spec("llama_cpp") is not None
