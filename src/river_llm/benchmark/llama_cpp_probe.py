"""Does llama.cpp run a file with its weights laid out anew for this processor?

A process of its own, because in some builds the AMX kernels crash at the first prompt
(github.com/ggml-org/llama.cpp/issues/20824):

    python -m river_llm.benchmark.llama_cpp_probe FILE
"""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_TOKENS = 32
_SECONDS = 300


def runs_repacked(path: Path) -> bool:
    """Whether a process that runs a prompt so comes to its end."""
    command = [sys.executable, "-m", __spec__.name, str(path)]
    try:
        finished = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False
    return finished.returncode == 0


def _run_prompt(path: str) -> int:
    """The status of a prompt's decode call."""
    llama_cpp: Any = import_module("llama_cpp")
    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_default_params()
    options.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(path.encode(), options)
    context = llama_cpp.llama_init_from_model(model, llama_cpp.llama_context_default_params())
    tokens = (llama_cpp.llama_token * _TOKENS)(*range(_TOKENS))
    status: int = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, _TOKENS))
    llama_cpp.llama_synchronize(context)
    return status


if __name__ == "__main__":
    sys.exit(_run_prompt(sys.argv[1]))
