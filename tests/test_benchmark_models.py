"""The benchmark on real tiny models: random weights, our arms, the peers; and the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from river_llm import ConfigError, ExitPolicy, River, RiverConfig, UnsupportedModelError
from river_llm.attachment import attach_river
from river_llm.benchmark import bandwidth, lineup, llama_cpp_probe
from river_llm.benchmark.disturbance import busy_core, can_disturb, disturbed_core
from river_llm.benchmark.environment import describe_environment
from river_llm.benchmark.gguf_export import check_exportable
from river_llm.benchmark.random_weights import random_model, random_river
from river_llm.benchmark.step_bytes import ModelBytes
from river_llm.benchmark.transformers_peer import TransformersArm, plain_copy
from river_llm.benchmark.workload import TokenSource, Workload, make_workloads
from river_llm.engines import TorchEngine

DECODE = Workload("decode", 3)
TINY_SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


class TestMachine:
    def test_numpy_reads_where_the_core_was_not_built(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bandwidth, "_native_core", lambda: None)
        monkeypatch.setattr(bandwidth, "buffer_bytes", lambda: 1 << 20)
        bandwidth._buffer.cache_clear()
        try:
            assert bandwidth.read_bandwidth(2) > 0
            assert bandwidth.bandwidth_source() == "numpy"
        finally:
            bandwidth._buffer.cache_clear()

    def test_the_core_reads_where_it_was_built(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Core:
            @staticmethod
            def read_bandwidth(buffer_bytes: int, threads: int) -> float:
                assert buffer_bytes >= 256 << 20
                return 7.0 * threads

        monkeypatch.setattr(bandwidth, "_native_core", Core)
        assert bandwidth.read_bandwidth(2) == 14
        assert bandwidth.bandwidth_source() == "native"

    def test_the_environment_is_told(self) -> None:
        environment = describe_environment()
        assert environment["processor"]
        assert environment["cores"] >= 1
        assert environment["versions"].keys() >= {"python", "river-llm", "torch", "transformers"}

    @pytest.mark.skipif(not can_disturb(), reason="no process can be pinned to a core here")
    def test_a_busy_core_is_one_process_on_that_core_until_the_end(self) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        core = disturbed_core()
        with busy_core(core):
            affinities = [os.sched_getaffinity(int(pid)) for pid in children.read_text().split()]
            assert {core} in affinities
        assert len(children.read_text().split()) < len(affinities)


class TestRandomWeights:
    def test_layers_and_exit_layers_are_copies_in_memory_of_their_own(self) -> None:
        model = random_model(TINY_SHAPE)
        river = random_river(model, RiverConfig(4, 64, "rtn"))
        first, *others = [layer.mlp.up_proj.weight for layer in model.model.layers]
        assert first.dtype == torch.bfloat16
        assert first.detach().float().std() == pytest.approx(0.02, rel=0.1)
        for weight in others:
            assert torch.equal(weight, first)
            assert weight.data_ptr() != first.data_ptr()
        packed = [layer["mlp.up_proj"].packed for layer in river.exit_layers]
        assert len({codes.data_ptr() for codes in packed}) == 4
        built = River.build(model, RiverConfig(4, 64, "rtn"))
        assert torch.equal(built.exit_layers[3]["mlp.up_proj"].packed, packed[3])

    @pytest.mark.parametrize("tied", [True, False])
    def test_the_model_runs_with_its_river(self, tied: bool) -> None:
        model = random_model({**TINY_SHAPE, "tie_word_embeddings": tied})
        river = random_river(model, RiverConfig(4, 64, "rtn"))
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert (embedding.weight.data_ptr() == head.weight.data_ptr()) == tied
        engine = TorchEngine(attach_river(model, river, policy=ExitPolicy.fixed(2)))
        engine.prefill(torch.arange(5).unsqueeze(0))
        step = engine.decode(torch.tensor([5]))
        assert step.exit_layers.tolist() == [2]
        assert step.logits.isfinite().all()
        assert step.logits.float().std() > 0


class TestLineup:
    def make(self, model: PreTrainedModel, **settings: object) -> lineup.Lineup:
        river = River.build(model, RiverConfig(4, 64, "rtn"))
        policies = {"backbone": ExitPolicy.never(), "exit after 2": ExitPolicy.fixed(2)}
        source = TokenSource.for_model(None, 97)
        return lineup.Lineup(model, river, source, policies, "torch", **settings)  # type: ignore[arg-type]

    def test_own_arms_first_then_peers_and_the_river_comes_off_after(
        self, tiny_llama: PreTrainedModel
    ) -> None:
        made = self.make(tiny_llama)
        made.add_transformers()
        with made.arms(1) as arms:
            assert [arm.name for arm in arms] == ["backbone", "exit after 2", "transformers fp32"]
            assert [arm.engine for arm in arms] == ["torch", "torch", "transformers"]
            for arm in arms:
                arm.prepare(DECODE)
                assert arm.run(DECODE).tokens == 3
        assert not hasattr(tiny_llama, "_river_attachment")
        with made.arms(1) as arms:  # once more, with another number of threads
            assert len(arms) == 3

    def test_an_8_bit_head_is_for_the_native_engine(self, tiny_llama: PreTrainedModel) -> None:
        with pytest.raises(ConfigError, match=r"8-bit LM head .* --engine cpu"):
            self.make(tiny_llama, head_bits=[16, 8])

    def test_a_policy_that_names_too_many_layers_is_refused(
        self, tiny_llama: PreTrainedModel
    ) -> None:
        river = River.build(tiny_llama, RiverConfig(4, 64, "rtn"))
        with pytest.raises(ConfigError, match="exit layer is 5"):
            lineup.Lineup(
                tiny_llama, river, TokenSource([1]), {"too deep": ExitPolicy.fixed(5)}, "torch"
            )


class TestTransformersPeer:
    @pytest.mark.parametrize("depth", [0, 20])
    @pytest.mark.parametrize("batch", [1, 2])
    def test_every_run_begins_at_the_same_place(
        self, tiny_llama: PreTrainedModel, depth: int, batch: int
    ) -> None:
        sizes = ModelBytes.of(tiny_llama, River.build(tiny_llama, RiverConfig(4, 64, "rtn")))
        arm = TransformersArm(plain_copy(tiny_llama), TokenSource(range(97)), sizes)
        decode = Workload("decode", 3, depth, batch)
        prompt = Workload("prompt", 5, depth, batch)
        for workload in (decode, decode, prompt, prompt, decode):
            arm.prepare(workload)
            assert arm._cache.get_seq_length() == workload.context - (workload.kind == "decode")
            timing = arm.run(workload)
            assert timing.tokens == batch * workload.tokens
            assert timing.seconds > 0
        assert timing.mean_exit_layer is None
        read = sum(sizes.step([4] * batch, decode.context + index) for index in range(3))
        assert timing.bytes_per_token == read / (3 * batch)

    def test_a_copy_is_plain_and_shares_its_weights(self, tiny_llama: PreTrainedModel) -> None:
        copied = plain_copy(tiny_llama)
        attach_river(tiny_llama, RiverConfig(4, 64, "rtn"), policy=ExitPolicy.always())
        token_ids = torch.arange(9).unsqueeze(0)
        layer = copied.model.layers[0].self_attn.q_proj
        assert layer is not tiny_llama.model.layers[0].self_attn.q_proj
        assert layer.weight is tiny_llama.model.layers[0].self_attn.q_proj.weight
        with torch.no_grad():
            assert not torch.equal(copied(token_ids).logits, tiny_llama(token_ids).logits)


class TestLlamaCpp:
    def test_takes_plain_llamas_only(self, tiny_llama: PreTrainedModel) -> None:
        check_exportable(tiny_llama)
        tiny_llama.model.rotary_emb.rope_type = "dynamic"
        with pytest.raises(UnsupportedModelError, match="rotary embedding of kind dynamic"):
            check_exportable(tiny_llama)
        tiny_llama.config.model_type = "gemma3_text"
        with pytest.raises(UnsupportedModelError, match="not on gemma3_text"):
            check_exportable(tiny_llama)

    @pytest.mark.slow
    def test_runs_the_same_model_in_every_format(
        self, smollm2_bf16: PreTrainedModel, tokenizer: object, tmp_path: Path
    ) -> None:
        pytest.importorskip("llama_cpp")
        from river_llm.benchmark.llama_cpp_peer import (
            LlamaCppArm,
            make_gguf_files,
            same_top_share,
        )

        source = TokenSource.for_model(tokenizer, smollm2_bf16.config.vocab_size)  # type: ignore[arg-type]
        files = make_gguf_files(smollm2_bf16, tmp_path)
        written = {name: path.stat().st_mtime_ns for name, path in files.items()}
        make_gguf_files(smollm2_bf16, tmp_path)
        assert written == {name: path.stat().st_mtime_ns for name, path in files.items()}
        least = {"bf16": 0.95, "Q8_0": 0.9, "Q4_0": 0.3}
        river = River.build(smollm2_bf16, RiverConfig(4, 64, "rtn"))
        layers, head = sum(ModelBytes.of(smollm2_bf16, river).backbone_layers), 49152 * 576 * 2
        # of the layers and of the LM head, which Q4_0 holds in Q8_0
        bits = {"bf16": (16, 16), "Q8_0": (8.5, 8.5), "Q4_0": (4.5, 8.5)}
        for name, path in files.items():
            repack = llama_cpp_probe.runs_repacked(path)
            arm = LlamaCppArm(name, path, source, threads=1, repack=repack)
            assert same_top_share(smollm2_bf16, arm, source) >= least[name]
            of_layers, of_head = bits[name]
            assert arm._weight_bytes == (layers * of_layers + head * of_head) / 16
            for workload in make_workloads([40], [3], [0, 20], [1, 2]):
                for _ in range(2):
                    arm.prepare(workload)
                    assert arm.run(workload).tokens == workload.batch * workload.tokens
            arm.close()

    @pytest.mark.slow
    def test_scaled_rotary_embeddings_and_an_own_head_come_along(self, tmp_path: Path) -> None:
        pytest.importorskip("llama_cpp")
        from river_llm.benchmark.llama_cpp_peer import (
            LlamaCppArm,
            make_gguf_files,
            same_top_share,
        )

        rope = {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
        shape = {"tie_word_embeddings": False, "rope_parameters": rope}
        model = random_model({**TINY_SHAPE, **shape})
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(8)  # so that layers and positions matter
        files = make_gguf_files(model, tmp_path)
        source = TokenSource.for_model(None, 97)
        arm = LlamaCppArm("bf16", files["bf16"], source, threads=1, repack=False)
        assert same_top_share(model, arm, source) >= 0.9
        arm.close()

    def test_a_file_that_llama_cpp_cannot_run_fails_the_probe(self, tmp_path: Path) -> None:
        assert not llama_cpp_probe.runs_repacked(tmp_path / "none.gguf")
