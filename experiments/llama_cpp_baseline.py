"""llama.cpp on the very same weights, timed on its own decode calls.

Only token ids go in, and no logits are looked at: no Python loop, no sampling and no text stands
between the calls, as in llama-bench.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch
from gguf_export import write_gguf
from torch import Tensor
from transformers import PreTrainedModel

from river_llm.measure.bench import Text
from river_llm.measure.rounds import Timing, Workload

FORMATS = ("bf16", "Q8_0", "Q4_0")

_BATCH = 2048  # tokens of one call and of one pass over the weights, as llama-bench has them
_MICRO_BATCH = 512
_CHECKED_TOKENS = 48

# It holds no reference to what it calls.
_silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


def build_description() -> str:
    """What llama.cpp was compiled for, in its own words: ``CPU : AVX2 = 1 | AVX512 = 1 | ...``."""
    return llama_cpp.llama_print_system_info().decode().strip(" |")


def make_gguf_files(model: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """The model in each of `FORMATS` as a file in `folder`.

    Quantised as `llama-quantize` does it by default: where a tied embedding is the LM head, Q4_0
    files hold it in Q6_K, or in Q8_0 where its width is no multiple of 256.
    """
    paths = {name: folder / f"{name}.gguf" for name in FORMATS}
    write_gguf(model, paths["bf16"])
    for name in FORMATS[1:]:
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
        source, target = (str(paths[which]).encode() for which in ("bf16", name))
        if llama_cpp.llama_model_quantize(source, target, options):
            raise SystemExit(f"llama.cpp can't quantise {paths['bf16']} to {name}")
    return paths


def runs_repacked(path: Path) -> bool:
    """Whether a process comes to its end that runs a prompt with the weights laid out anew for this
    processor: in some builds the AMX kernels crash (github.com/ggml-org/llama.cpp/issues/20824)."""
    command = [sys.executable, __file__, str(path)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class LlamaCppBaseline:
    """A GGUF file under llama.cpp; see `river_llm.measure.rounds.Variant`."""

    engine = "llama.cpp"

    def __init__(
        self, name: str, path: Path, text: Text, threads: int, repack: bool = True
    ) -> None:
        """Map the file.

        Args:
            repack: lay the weights out anew for this processor, which is its default.
        """
        self.name = name
        self._text, self._threads = text, threads
        self._weight_bytes, self._position_bytes = _read_sizes(path)
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = repack
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise SystemExit(f"llama.cpp can't read {path}")
        self._context: Any = None
        self._workload: Workload | None = None

    def takes(self, workload: Workload) -> bool:
        """Every workload."""
        return True

    def prepare(self, workload: Workload) -> None:
        if workload != self._workload:
            self._new_context(workload.end, workload.batch)
            self._workload = workload
            if workload.context:
                self._decode(self._text.tokens(workload.batch, 0, workload.context), 0)
        memory = llama_cpp.llama_get_memory(self._context)
        for sequence in range(workload.batch):
            llama_cpp.llama_memory_seq_rm(memory, sequence, workload.context, -1)
        llama_cpp.llama_synchronize(self._context)

    def run(self, workload: Workload) -> Timing:
        tokens = self._text.tokens(workload.batch, workload.context, workload.tokens)
        count, positions = tokens.numel(), range(workload.context, workload.end)
        is_prompt = workload.kind == "prompt"
        start = time.perf_counter()
        for place, column in enumerate([tokens] if is_prompt else tokens.split(1, dim=1)):
            self._decode(column, workload.context + place)
        seconds = time.perf_counter() - start
        if is_prompt:
            return Timing(seconds, count)
        read = workload.tokens * self._weight_bytes
        read += workload.batch * sum(positions) * self._position_bytes
        return Timing(seconds, count, read / count)

    def same_top_share(self, model: PreTrainedModel) -> float:
        """How often llama.cpp's argmax is that of the model itself, on a short text."""
        token_ids = self._text.tokens(1, 0, _CHECKED_TOKENS)
        with torch.no_grad():
            own = model(token_ids).logits[0].argmax(-1).tolist()
        self._workload = None
        self._new_context(_CHECKED_TOKENS, 1)
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        same = 0
        for place, best in enumerate(own):
            self._decode(token_ids[:, place : place + 1], place)
            logits = llama_cpp.llama_get_logits_ith(self._context, 0)
            same += int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax()) == best
        return same / _CHECKED_TOKENS

    def close(self) -> None:
        """Give its memory back."""
        self._free_context()
        llama_cpp.llama_model_free(self._model)

    def _decode(self, tokens: Tensor, position: int) -> None:
        """Append `[batch, tokens]` at `position`, with logits of the last column."""
        pieces = tokens.split(max(1, _BATCH // len(tokens)), dim=1)
        for piece in pieces:
            width = piece.shape[1]
            for place, token in enumerate(piece.flatten().tolist()):
                sequence, column = divmod(place, width)
                self._batch.token[place] = token
                self._batch.pos[place] = position + column
                self._batch.n_seq_id[place] = 1
                self._batch.seq_id[place][0] = sequence
                self._batch.logits[place] = piece is pieces[-1] and column == width - 1
            self._batch.n_tokens = piece.numel()
            position += width
            if status := llama_cpp.llama_decode(self._context, self._batch):
                raise SystemExit(f"llama.cpp: llama_decode gave {status}")
        llama_cpp.llama_synchronize(self._context)

    def _new_context(self, length: int, batch: int) -> None:
        self._free_context()
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = -(-length // 256) * 256 * batch  # of all sequences, each in whole blocks
        options.n_batch, options.n_ubatch, options.n_seq_max = _BATCH, _MICRO_BATCH, batch
        options.n_threads = options.n_threads_batch = self._threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise SystemExit(f"llama.cpp has no memory for {length} tokens in {batch} sequences")
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)

    def _free_context(self) -> None:
        if self._context:
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None


def _read_sizes(path: Path) -> tuple[int, int]:
    """`(bytes of the matrices that a step reads, bytes of one position's keys and values)`."""
    reader = gguf.GGUFReader(path)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors if len(tensor.shape) > 1}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]  # else it is the LM head too
    cache = 2 * 2  # keys and values, float16
    for name in ("block_count", "attention.head_count_kv", "attention.key_length"):
        cache *= int(reader.fields[f"llama.{name}"].contents())
    return sum(sizes.values()), cache


if __name__ == "__main__":  # see `runs_repacked`
    probed, prompt = (
        LlamaCppBaseline("", Path(sys.argv[1]), Text(None, 32), 1),
        Workload("prompt", 32),
    )
    probed.prepare(prompt)
    probed.run(prompt)
