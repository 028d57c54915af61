"""llama.cpp on the very same weights, timed on its own decode calls.

Only token ids go in, and no logits are looked at: no Python loop, no sampling and no text stands
between the calls, as in llama-bench.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_llm.benchmark.arms import Clock, Timing
from river_llm.benchmark.gguf_export import write_gguf
from river_llm.benchmark.peers import INSTALL_LLAMA_CPP, llama_cpp_is_installed
from river_llm.benchmark.workload import TokenSource, Workload
from river_llm.errors import RiverError
from river_llm.exit_policy import ExitPolicy

FORMATS = ("bf16", "Q8_0", "Q4_0")

_BATCH = 2048  # tokens of one call and of one pass over the weights, as llama-bench has them
_MICRO_BATCH = 512
_CHECKED_TOKENS = 48


def build_description() -> str:
    """What llama.cpp was compiled for, in its own words: ``CPU : AVX2 = 1 | AVX512 = 1 | ...``."""
    text: str = _library().llama_print_system_info().decode()
    return text.strip(" |")


def make_gguf_files(model: PreTrainedModel, folder: Path) -> dict[str, Path]:
    """The model in each of `FORMATS` as a file in `folder`, named after a digest of all its weights
    and settings; files that are there stay.

    Quantised as `llama-quantize` does it by default: where a tied embedding is the LM head, Q4_0
    files hold it in Q6_K, or in Q8_0 where its width is no multiple of 256.

    Raises:
        UnsupportedModelError: the model is no plain Llama.
        RiverError: a file can't be written.
    """
    digest = _digest(model)
    paths = {name: folder / f"{digest}-{name}.gguf" for name in FORMATS}
    llama_cpp = _library()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            if path.exists():
                continue
            with tempfile.TemporaryDirectory(prefix=".gguf-", dir=folder) as staging:
                part = Path(staging) / path.name
                if name == "bf16":
                    write_gguf(model, part)
                else:
                    options = llama_cpp.llama_model_quantize_default_params()
                    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
                    source = str(paths["bf16"]).encode()
                    if llama_cpp.llama_model_quantize(source, str(part).encode(), options):
                        raise RiverError(f"llama.cpp can't quantise {paths['bf16']} to {name}")
                part.replace(path)
    except OSError as error:
        raise RiverError(f"can't write llama.cpp's files to {folder}: {error}") from error
    return paths


def _digest(model: PreTrainedModel) -> str:
    settings = {**model.config.to_dict(), "transformers_version": None}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


class LlamaCppArm:
    """A GGUF file under llama.cpp; see `Arm`."""

    engine = "llama.cpp"
    policy: ExitPolicy | None = None

    def __init__(
        self,
        name: str,
        path: Path,
        tokens: TokenSource,
        threads: int,
        repack: bool = True,
        clock: Clock = time.perf_counter,
    ) -> None:
        """Map the file.

        Args:
            repack: let llama.cpp lay the weights out anew for this processor, as it does by default
                (see `llama_cpp_probe`).

        Raises:
            RiverError: llama.cpp can't read it.
        """
        self.name = name
        self._llama = _library()
        self._tokens = tokens
        self._threads = threads
        self._clock = clock
        self._weight_bytes, self._position_bytes = _read_sizes(path)
        options = self._llama.llama_model_default_params()
        options.n_gpu_layers = 0
        options.use_extra_bufts = repack
        self._model = self._llama.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RiverError(f"llama.cpp can't read {path}; remove it, it is made anew")
        self._context: Any = None
        self._batch: Any = None
        self._workload: Workload | None = None

    def close(self) -> None:
        """Give its memory back."""
        self._free_context()
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def takes(self, workload: Workload) -> bool:
        """Every workload."""
        return True

    def prepare(self, workload: Workload) -> None:
        if workload != self._workload:
            self._new_context(workload.end, workload.batch)
            self._workload = workload
            if workload.context:
                self._decode(self._tokens.take(workload.batch, 0, workload.context), 0)
        memory = self._llama.llama_get_memory(self._context)
        for sequence in range(workload.batch):
            self._llama.llama_memory_seq_rm(memory, sequence, workload.context, -1)
        self._llama.llama_synchronize(self._context)

    def run(self, workload: Workload) -> Timing:
        tokens = self._tokens.take(workload.batch, workload.context, workload.tokens)
        count = workload.batch * workload.tokens
        if workload.kind == "prompt":
            start = self._clock()
            self._decode(tokens, workload.context)
            return Timing(self._clock() - start, count)
        columns = [tokens[:, index : index + 1] for index in range(workload.tokens)]
        start = self._clock()
        for index, column in enumerate(columns):
            self._decode(column, workload.context + index)
        seconds = self._clock() - start
        positions = workload.tokens * workload.context + sum(range(workload.tokens))
        read = workload.tokens * self._weight_bytes
        read += workload.batch * positions * self._position_bytes
        return Timing(seconds, count, read / count)

    def best_tokens(self, token_ids: Tensor) -> Tensor:
        """The likeliest token after each of `token_ids` `[tokens]`, int64 `[tokens]`."""
        self._workload = None
        self._new_context(len(token_ids), 1)
        vocabulary = self._llama.llama_vocab_n_tokens(
            self._llama.llama_model_get_vocab(self._model)
        )
        best = []
        for position, token in enumerate(token_ids):
            self._decode(token.view(1, 1), position)
            logits = self._llama.llama_get_logits_ith(self._context, 0)
            best.append(int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax()))
        return torch.tensor(best)

    def _decode(self, tokens: Tensor, position: int) -> None:
        """Append `[batch, tokens]` at `position`, with logits of the last column."""
        num_tokens = tokens.shape[1]
        rows = tokens.tolist()
        columns = max(1, _BATCH // len(rows))
        for first in range(0, num_tokens, columns):
            self._fill_batch([row[first : first + columns] for row in rows], position + first)
            if first + columns >= num_tokens:
                width = num_tokens - first
                for row in range(len(rows)):
                    self._batch.logits[(row + 1) * width - 1] = 1
            status = self._llama.llama_decode(self._context, self._batch)
            if status:
                raise RiverError(f"llama.cpp: llama_decode gave {status}")
        self._llama.llama_synchronize(self._context)

    def _fill_batch(self, rows: list[list[int]], position: int) -> None:
        batch = self._batch
        count = 0
        for sequence, row in enumerate(rows):
            for column, token in enumerate(row):
                batch.token[count] = token
                batch.pos[count] = position + column
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = sequence
                batch.logits[count] = 0
                count += 1
        batch.n_tokens = count

    def _new_context(self, length: int, batch: int) -> None:
        self._free_context()
        options = self._llama.llama_context_default_params()
        options.n_ctx = -(-length // 256) * 256 * batch  # of all sequences, each in whole blocks
        options.n_batch = _BATCH
        options.n_ubatch = _MICRO_BATCH
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = self._threads
        self._context = self._llama.llama_init_from_model(self._model, options)
        if not self._context:
            raise RiverError(f"llama.cpp has no memory for {length} tokens in {batch} sequences")
        self._batch = self._llama.llama_batch_init(_BATCH, 0, 1)

    def _free_context(self) -> None:
        if self._context:
            self._llama.llama_batch_free(self._batch)
            self._llama.llama_free(self._context)
            self._context = None


def same_top_share(model: PreTrainedModel, arm: LlamaCppArm, tokens: TokenSource) -> float:
    """How often llama.cpp and the model itself find the same token likeliest, on a short text."""
    token_ids = tokens.take(1, 0, _CHECKED_TOKENS)
    with torch.no_grad():
        own = model(token_ids.to(model.device)).logits[0].argmax(-1).cpu()
    return float((own == arm.best_tokens(token_ids[0])).float().mean())


def _read_sizes(path: Path) -> tuple[int, int]:
    """`(bytes of the matrices that a step reads, bytes of one position's keys and values)`."""
    reader = gguf.GGUFReader(path)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors if len(tensor.shape) > 1}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]  # else it is the LM head too
    fields = {
        name: int(reader.fields[f"llama.{name}"].contents())
        for name in ("block_count", "attention.head_count_kv", "attention.key_length")
    }
    cache = 2 * 2  # keys and values, float16
    for value in fields.values():
        cache *= value
    return sum(sizes.values()), cache


_callbacks: list[Any] = []  # llama.cpp holds no reference to what it calls


def _library() -> Any:
    """The module llama_cpp, silent.

    Raises:
        RiverError: it is not installed.
    """
    if not llama_cpp_is_installed():
        raise RiverError(f"llama.cpp needs llama-cpp-python: {INSTALL_LLAMA_CPP}")
    llama_cpp = import_module("llama_cpp")
    if not _callbacks:
        _callbacks.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
        llama_cpp.llama_log_set(_callbacks[0], ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
    return llama_cpp
