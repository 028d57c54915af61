"""Who runs: the model's engines with their exit policies, and the peers on the same weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from river_llm.attachment import AttachedRiver, attach_river, detach_river
from river_llm.backbone import decoder_layers, fingerprint
from river_llm.benchmark import llama_cpp_peer
from river_llm.benchmark.arms import Arm, EngineArm, EngineSession
from river_llm.benchmark.bandwidth import last_level_cache_bytes
from river_llm.benchmark.gguf_export import check_exportable
from river_llm.benchmark.llama_cpp_probe import runs_repacked
from river_llm.benchmark.step_bytes import ModelBytes
from river_llm.benchmark.transformers_peer import TransformersArm, plain_copy
from river_llm.benchmark.workload import TokenSource
from river_llm.engines import CpuEngine, Engine, EngineChoice, TorchEngine
from river_llm.engines.choice import why_not_native
from river_llm.errors import ConfigError
from river_llm.exit_policy import ExitPolicy
from river_llm.river import River

_SAME_MODEL_SHARE = 0.9  # of likeliest tokens; what is left is rounding at near ties


class Lineup:
    """Makes the arms anew for each number of threads.

    Attributes:
        fingerprint: of the model's weights.
        engine: ``cpu`` or ``torch``.
        notes: what a reader of the figures has to know.
        same_top: for each of llama.cpp's files, how often it finds the same token likeliest as the
            model itself.
        llama_cpp_build: the instructions that it was compiled for; None if it doesn't run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        river: River,
        tokens: TokenSource,
        policies: Mapping[str, ExitPolicy],
        engine: EngineChoice = "auto",
        head_bits: Sequence[int] = (16,),
        threads: Sequence[int] = (1,),
        kv_bits: Sequence[int] = (16,),
    ) -> None:
        """Take over `model`.

        Args:
            policies: the arms by name; the first one is the backbone.
            engine: see `make_engine`.
            head_bits: 16 and 8: every arm with either LM head; 8 on the native engine only.
            threads: that `arms` will be asked for.
            kv_bits: 16 and 8: every arm with either KV cache.

        Raises:
            ConfigError: a policy names more layers than there are, or 8 bits are not to be had.
        """
        layers = decoder_layers(model)
        for policy in policies.values():
            policy.thresholds(len(layers))
        self.fingerprint = fingerprint(layers)
        self.notes: list[str] = []
        self.same_top: dict[str, float] = {}
        self.llama_cpp_build: str | None = None
        reason = why_not_native(model, min(kv_bits)) if engine == "auto" else None
        self.engine = "torch" if engine == "torch" or reason else "cpu"
        if reason:
            self.notes.append(f"PyTorch computes: {reason}")
        if self.engine == "torch" and set(head_bits) != {16}:
            raise ConfigError("an 8-bit LM head is for the native engine; take --engine cpu")
        self._model, self._river, self._tokens = model, river, tokens
        self._policies = dict(policies)
        self._widths = list(itertools.product(head_bits, kv_bits))
        self._sizes = {bits: ModelBytes.of(model, river, bits) for bits in (16, 8)}
        cache = last_level_cache_bytes()
        if cache is not None and self._sizes[16].step([0], 0) < cache:
            self.notes.append(
                f"a step's weights can stay in the processor's cache of {cache >> 20} MiB, so more "
                "than 100 % of the memory's limit can be reached"
            )
        # the engine's packed weights and the model's own at once only where there are more to make
        self._free_model = len(self._widths) == len(threads) == 1
        self._plain_model: PreTrainedModel | None = None
        self._gguf_files: dict[str, Path] = {}
        self._repack: dict[str, bool] = {}

    def add_transformers(self) -> None:
        """Let transformers' own `generate()` run beside."""
        self._plain_model = plain_copy(self._model)

    def add_llama_cpp(self, folder: Path) -> None:
        """Let llama.cpp run beside, in bfloat16, Q8_0 and Q4_0, from files in `folder`.

        Raises:
            UnsupportedModelError: the model is no plain Llama.
            RiverError: llama-cpp-python is not installed, or a file can't be written.
        """
        check_exportable(self._model)
        self.llama_cpp_build = llama_cpp_peer.build_description()
        self._gguf_files = llama_cpp_peer.make_gguf_files(self._model, folder)
        for name, path in self._gguf_files.items():
            self._repack[name] = runs_repacked(path)
            if not self._repack[name]:
                self.notes.append(
                    f"llama.cpp {name} runs without weights laid out for this processor: with them "
                    "this build of it crashes"
                )
            arm = self._llama_cpp_arm(name, torch.get_num_threads())
            self.same_top[arm.name] = llama_cpp_peer.same_top_share(self._model, arm, self._tokens)
            arm.close()
            if name == "bf16" and self.same_top[arm.name] < _SAME_MODEL_SHARE:
                self.notes.append(
                    f"llama.cpp is not running the same model: only "
                    f"{100 * self.same_top[arm.name]:.0f} % of its likeliest tokens are the model's"
                )

    @contextmanager
    def arms(self, threads: int) -> Iterator[list[Arm]]:
        """The arms, to run with so many threads; they end with the context.

        Raises:
            ConfigError: the native engine can't be had.
        """
        torch.set_num_threads(threads)
        with ExitStack() as ending:
            arms: list[Arm] = []
            attached = None
            if self.engine == "torch":
                attached = attach_river(self._model, self._river)
                ending.callback(detach_river, self._model)
            for head_bits, kv_bits in self._widths:
                engine = self._make_engine(threads, head_bits, kv_bits, attached)
                session = EngineSession(engine, self._tokens, self._sizes[kv_bits])
                suffix = "" if head_bits == 16 else f", {head_bits}-bit head"
                suffix += "" if kv_bits == 16 else f", {kv_bits}-bit KV cache"
                for name, policy in self._policies.items():
                    arms.append(EngineArm(name + suffix, session, policy))
            if self._plain_model is not None:
                arms.append(TransformersArm(self._plain_model, self._tokens, self._sizes[16]))
            for name in self._gguf_files:
                peer = self._llama_cpp_arm(name, threads)
                ending.callback(peer.close)
                arms.append(peer)
            yield arms

    def _make_engine(
        self, threads: int, head_bits: int, kv_bits: int, attached: AttachedRiver | None
    ) -> Engine:
        if attached is not None:
            return TorchEngine(attached, kv_bits)
        return CpuEngine(
            self._model,
            self._river,
            ExitPolicy.never(),
            threads=threads,
            lm_head_bits=head_bits,
            kv_bits=kv_bits,
            free_model=self._free_model,
        )

    def _llama_cpp_arm(self, name: str, threads: int) -> llama_cpp_peer.LlamaCppArm:
        path = self._gguf_files[name]
        repack = self._repack[name]
        return llama_cpp_peer.LlamaCppArm(
            f"llama.cpp {name}", path, self._tokens, threads, repack=repack
        )
