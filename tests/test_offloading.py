"""Evicted backbone layers on the torch engine: the same tokens as with all layers in memory."""

from __future__ import annotations

import gc
import math
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exit_reference import decode_with_exits
from river_llm.offloading.host_store import HostStore
from side_streams import SideStream
from tiny_models import ARCHITECTURES, VOCABULARY, fake_quantised, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from river_llm import (
    ConfigError,
    ExitPolicy,
    River,
    RiverConfig,
    RiverError,
    attach_river,
    detach_river,
)
from river_llm.backbone import decoder_layers
from river_llm.engines import CpuEngine, TorchEngine
from river_llm.engines.drafting import DraftRule
from river_llm.offloading import evicted_layers, file_store
from river_llm.store import ENVIRONMENT_VARIABLE

LAYERS = 4
CONFIG = RiverConfig(group_size=32, quantizer="rtn")
PROMPTS = torch.randint(3, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(1))
PADDING = torch.tensor([[True] * 6, [False] * 3 + [True] * 3, [False] * 5 + [True]])
STEPS = 8
POLICIES = {
    "never": ExitPolicy.never(),
    "always": ExitPolicy.always(),
    "fixed": ExitPolicy.fixed(2),
    "similarity": ExitPolicy.similarity(0.9, prefill="token"),
    "sequence": ExitPolicy.similarity(0.9, prefill="sequence"),
    "minimum": ExitPolicy.similarity(0.9, batch="minimum"),
}

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def engine_of(architecture: str = "Llama", **settings: Any) -> TorchEngine:
    """With a policy under which tokens leave at every depth."""
    model = tiny_model(architecture, **ARCHITECTURES[architecture], **settings)
    engine = TorchEngine(attach_river(model, CONFIG))
    engine.policy = mixed_policy(engine)
    return engine


def mixed_policy(engine: TorchEngine, **rules: Any) -> ExitPolicy:
    """Some tokens leave after each layer: by the third of the similarities there."""
    engine.policy = ExitPolicy.never(prefill="token")
    engine.record_similarities = True
    with torch.no_grad():
        engine.model(torch.arange(3, 67).view(4, 16))
    similarities = engine.attached.router.similarities
    assert similarities is not None
    engine.record_similarities = False
    thresholds = similarities.flatten(1).quantile(2 / 3, dim=1)
    return ExitPolicy.per_layer((math.inf, *thresholds[:-1].tolist()), **rules)


def answer(engine: TorchEngine, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits `[STEPS, B, V]` and exit layers `[STEPS, B]`, greedily."""
    engine.truncate(0)
    step = engine.prefill(PROMPTS, padding)
    steps = [step]
    for _ in range(STEPS - 1):
        step = engine.decode(step.best_tokens)
        steps.append(step)
    return torch.stack([s.logits for s in steps]), torch.stack([s.exit_layers for s in steps])


def same(some: tuple[Tensor, Tensor], others: tuple[Tensor, Tensor]) -> bool:
    return all(map(torch.equal, some, others))


def layer_bytes(model: PreTrainedModel) -> int:
    return sum(linear.weight.nbytes for linear in decoder_layers(model)[0].linears.values())


class TestTokens:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_are_the_same_whatever_stays(self, architecture: str) -> None:
        engine = engine_of(architecture)
        expected = answer(engine, PADDING)
        assert len(expected[1].unique()) > 1
        for count in (4, 3, 2, 1, 0, 2, 4):
            engine.keep_layers(count)
            assert engine.resident_layers == count
            assert same(answer(engine, PADDING), expected)

    @pytest.mark.parametrize("lazy", [False, True])
    def test_are_the_same_from_the_memory_of_a_host(
        self, lazy: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = HostStore(SideStream(lazy))
        monkeypatch.setattr(evicted_layers, "_make_store", lambda device: store)
        engine = engine_of()
        expected = answer(engine)
        for count in (3, 0, 1):
            engine.keep_layers(count)
            assert same(answer(engine), expected)

    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_are_the_same_under_every_policy(self, policy: str, dtype: torch.dtype) -> None:
        engine = engine_of(dtype=dtype)
        engine.policy = POLICIES[policy]
        expected = answer(engine)
        for count in range(LAYERS + 1):
            engine.keep_layers(count)
            assert same(answer(engine), expected)

    def test_are_the_same_while_the_plan_changes(self) -> None:
        engine = engine_of()
        logits, exit_layers = answer(engine, PADDING)
        engine.truncate(0)
        step = engine.prefill(PROMPTS, PADDING)
        for index, count in enumerate((3, 0, 4, 1, 2, 0, 3), start=1):
            engine.keep_layers(count)
            step = engine.decode(step.best_tokens)
            assert torch.equal(step.logits, logits[index])
            assert torch.equal(step.exit_layers, exit_layers[index])

    def test_are_the_same_when_drafts_are_verified(self) -> None:
        engine = engine_of()
        rule = DraftRule(exit_layer=3, vocabulary=VOCABULARY)
        results = []
        for count in (LAYERS, 1, 0):
            engine.keep_layers(count)
            engine.truncate(0)
            first = engine.prefill(PROMPTS).best_tokens
            drafts = [d.tokens for d in engine.draft(first.tolist(), [3] * 3, rule)]
            verified = engine.verify(torch.tensor(drafts))
            results.append((torch.tensor(drafts), verified.logits))
        assert same(results[0], results[1])
        assert same(results[0], results[2])

    def test_are_the_same_in_generate_of_transformers(self) -> None:
        engine = engine_of()
        settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
        expected = engine.model.generate(PROMPTS, **settings)
        for count in (2, 0):
            engine.keep_layers(count)
            assert torch.equal(engine.model.generate(PROMPTS, **settings), expected)

    def test_gradients_of_the_inputs_are_the_same(self) -> None:
        engine = engine_of()
        engine.policy = ExitPolicy.never()
        gradients = []
        for count in (LAYERS, 0):
            engine.keep_layers(count)
            inputs = engine.model.get_input_embeddings()(PROMPTS).detach().requires_grad_()
            engine.model(inputs_embeds=inputs, use_cache=False).logits.square().sum().backward()
            gradients.append(inputs.grad)
        assert torch.equal(*gradients)


class TestStatistics:
    def test_each_pass_brings_back_what_its_tokens_need(self) -> None:
        engine = engine_of()
        engine.policy = ExitPolicy.fixed(3)
        engine.prefill(PROMPTS)
        engine.keep_layers(1)
        assert engine.offload_statistics.misses == 0
        for steps in (1, 2):
            engine.decode(torch.tensor([5, 6, 7]))
            statistics = engine.offload_statistics
            assert statistics.misses == 2 * steps
            assert statistics.bytes_read == 2 * steps * layer_bytes(engine.model)
            assert statistics.seconds_waited > 0
            assert statistics.held_back == 0
            assert statistics.resident_layers == 1

    def test_misses_are_those_of_the_deepest_token(self) -> None:
        engine = engine_of()
        engine.prefill(PROMPTS)
        engine.keep_layers(2)
        misses = 0
        token = torch.tensor([5, 6, 7])
        for place in range(12):
            engine.policy = ExitPolicy.fixed(1 + place % 4)
            step = engine.decode(token)
            token = step.best_tokens
            deepest = int(step.exit_layers.max())
            misses += max(0, deepest - 2)
        statistics = engine.offload_statistics
        assert misses == 3 * (0 + 0 + 1 + 2)
        assert statistics.misses == misses
        # where the policy lets no token go deeper, nothing is read ahead
        assert statistics.bytes_read == misses * layer_bytes(engine.model)

    def test_the_prompt_counts_too(self) -> None:
        engine = engine_of()
        engine.keep_layers(1)
        engine.prefill(PROMPTS)
        assert engine.offload_statistics.misses == 3

    def test_without_evicted_layers_they_are_zero(self) -> None:
        engine = engine_of()
        answer(engine)
        statistics = engine.offload_statistics
        assert (statistics.resident_layers, statistics.misses) == (LAYERS, 0)
        assert statistics.bytes_read == statistics.seconds_waited == statistics.held_back == 0


class TestDepthLimit:
    @pytest.mark.parametrize("limit", range(LAYERS + 1))
    def test_decoded_tokens_leave_as_the_reference_lets_them(self, limit: int) -> None:
        engine = engine_of()
        thresholds = engine.policy.thresholds(LAYERS)
        detached = tiny_model("Llama")
        river = River.build(detached, CONFIG)
        tokens = PROMPTS.flatten().tolist()
        logits, wanted = decode_with_exits(detached, river, tokens, thresholds, limit)
        assert len(set(wanted)) > 2
        engine.depth_limit = limit
        engine.keep_layers(limit)
        for token, expected, want in zip(tokens, logits, wanted, strict=True):
            step = engine.decode(torch.tensor([token]))
            assert step.exit_layers.tolist() == [min(want, limit)]
            torch.testing.assert_close(step.logits[0], expected, rtol=1e-4, atol=1e-5)
        statistics = engine.offload_statistics
        assert statistics.held_back == sum(want > limit for want in wanted)
        assert statistics.misses == 0

    @pytest.mark.parametrize("limit", range(LAYERS + 1))
    def test_the_prompt_leaves_too_and_its_padding_is_not_counted(self, limit: int) -> None:
        engine = engine_of()
        detached = tiny_model("Llama")
        half_quantised = fake_quantised(detached, River.build(detached, CONFIG), limit)
        positions = (PADDING.long().cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = half_quantised(PROMPTS, attention_mask=PADDING, position_ids=positions)
        engine.depth_limit = limit
        step = engine.prefill(PROMPTS, PADDING)
        assert step.exit_layers.tolist() == [limit] * 3
        torch.testing.assert_close(step.logits, expected.logits[:, -1], rtol=1e-4, atol=1e-5)
        assert engine.offload_statistics.held_back == (10 if limit < LAYERS else 0)

    def test_what_the_policy_lets_out_is_not_held_back(self) -> None:
        engine = engine_of()
        for policy in (ExitPolicy.always(), ExitPolicy.fixed(2, prefill="token")):
            engine.policy = policy
            engine.depth_limit = 2
            answer(engine)
        assert engine.offload_statistics.held_back == 0

    def test_is_taken_off_again(self) -> None:
        engine = engine_of()
        expected = answer(engine)
        engine.depth_limit = 1
        assert not same(answer(engine), expected)
        engine.depth_limit = None
        assert same(answer(engine), expected)

    def test_verification_is_refused_and_nothing_changes(self) -> None:
        engine = engine_of()
        engine.prefill(PROMPTS)
        drafts = torch.tensor([[5, 6]] * 3)
        engine.depth_limit = 3
        with pytest.raises(RiverError, match=r"whole backbone, .* after 3 layers at the latest"):
            engine.verify(drafts)
        assert engine.length == PROMPTS.shape[1]
        engine.depth_limit = LAYERS
        assert engine.verify(drafts).exit_layers.unique().tolist() == [LAYERS]

    def test_beyond_the_model_is_refused(self) -> None:
        engine = engine_of()
        with pytest.raises(ConfigError, match="choose 0 to 4"):
            engine.depth_limit = 5
        with pytest.raises(ConfigError, match="choose 0 to 4"):
            engine.keep_layers(5)


class _Memory(bytearray):
    """Memory that can be watched."""


class TestMemory:
    def test_of_evicted_layers_at_most_two_are_there_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = engine_of(num_hidden_layers=8)
        blocks: list[weakref.ref[_Memory]] = []

        def watched(num_bytes: int) -> Tensor:
            memory = _Memory(num_bytes)
            blocks.append(weakref.ref(memory))
            return torch.frombuffer(memory, dtype=torch.uint8)

        def alive() -> int:
            return sum(block() is not None for block in blocks)

        monkeypatch.setattr(file_store, "own_block", watched)
        engine.policy = ExitPolicy.never()
        engine.keep_layers(2)
        counts = []
        for layer in engine.model.model.layers:
            layer.mlp.register_forward_hook(lambda *call: counts.append(alive()))
        answer(engine)
        assert len(counts) == len(engine.model.model.layers) * STEPS
        assert len(blocks) == 6 * STEPS
        assert max(counts) == 2
        assert alive() == 0

    def test_no_tensor_of_an_evicted_layer_is_left(self) -> None:
        def wide_tensors() -> list[Tensor]:
            gc.collect()
            return [
                item
                for item in gc.get_objects()
                if isinstance(item, Tensor)
                and 160 in item.shape
                and item.dtype == torch.float32
                and not item.is_meta
            ]

        others = wide_tensors()  # of other tests' models; kept, so that no id comes again
        known = {id(tensor) for tensor in others}
        engine = engine_of(intermediate_size=160)
        engine.keep_layers(1)
        answer(engine)
        left = [tensor for tensor in wide_tensors() if id(tensor) not in known]
        assert len(left) == 3  # gate, up and down of the layer that stays

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_the_system_gets_it_back(self) -> None:
        sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
        engine = engine_of(**sizes)
        evicted = 5 * layer_bytes(engine.model)
        assert evicted > 50e6
        engine.keep_layers(5)  # from here on nothing is copied
        engine.keep_layers(6)
        before = _anonymous_bytes()
        engine.keep_layers(1)
        # what other tests left behind makes some 15 MB of difference either way
        assert before - _anonymous_bytes() > 0.6 * evicted
        engine.policy = ExitPolicy.never()
        answer(engine)
        assert before - _anonymous_bytes() > 0.6 * evicted
        engine.keep_layers(6)
        assert abs(before - _anonymous_bytes()) < 0.4 * evicted

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_nothing_that_stays_is_in_pages_of_a_file(self, tmp_path: Path) -> None:
        folders = [tmp_path / "model", tmp_path / "river"]
        original = tiny_model("Llama")
        River.build(original, CONFIG).save(folders[1])
        original.save_pretrained(folders[0])
        expected = answer(TorchEngine(attach_river(original, CONFIG, policy=ExitPolicy.fixed(2))))

        model = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
        river = River.load(folders[1])
        engine = TorchEngine(attach_river(model, river, policy=ExitPolicy.fixed(2)))
        del river
        gc.collect()
        files = [path for folder in folders for path in folder.glob("*.safetensors")]
        assert len(files) == 2
        assert all(_is_mapped(path) for path in files)
        engine.keep_layers(3)
        gc.collect()
        assert not any(_is_mapped(path) for path in files)
        for path in files:  # in place, as a careless program would
            with path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
        assert same(answer(engine), expected)


class TestDamage:
    @pytest.fixture
    def engine(self) -> TorchEngine:
        engine = engine_of()
        engine.policy = ExitPolicy.fixed(2, prefill="token")
        engine.keep_layers(2)
        return engine

    @staticmethod
    def cut(engine: TorchEngine) -> None:
        store = engine.attached._evicted._store
        assert isinstance(store, file_store.FileStore)
        os.ftruncate(store._file.fileno(), 1000)

    def test_of_the_file_is_an_error_where_a_layer_is_needed(self, engine: TorchEngine) -> None:
        expected = answer(engine)
        length = engine.length
        self.cut(engine)
        engine.policy = ExitPolicy.never()
        with pytest.raises(RiverError, match="was cut short or changed"):
            engine.decode(torch.tensor([5, 6, 7]))
        assert engine.length == length
        engine.policy = ExitPolicy.fixed(2, prefill="token")
        assert same(answer(engine), expected)

    def test_of_the_file_lets_no_layer_come_back(self, engine: TorchEngine) -> None:
        self.cut(engine)
        with pytest.raises(RiverError, match="was cut short or changed"):
            engine.keep_layers(3)
        with pytest.raises(RiverError, match="was cut short or changed"):
            detach_river(engine.model)
        assert engine.resident_layers == 2

    def test_of_the_folder_changes_nothing(self, engine: TorchEngine, cache: Path) -> None:
        engine.policy = ExitPolicy.never()
        expected = answer(engine)
        cache.rmdir()
        assert same(answer(engine), expected)

    def test_a_layer_read_ahead_in_vain_is_no_error(self, engine: TorchEngine) -> None:
        """An error counts where the layer is needed."""
        engine.policy = ExitPolicy.never()
        expected = answer(engine)
        store = engine.attached._evicted._store
        assert isinstance(store, file_store.FileStore)
        start, layout = store._layers[3]
        store._layers[3] = 10**9, layout
        engine.policy = ExitPolicy.per_layer((math.inf, math.inf, math.inf, -1.0), prefill="token")
        exits = answer(engine)[1]
        assert exits.unique().tolist() == [3]
        store._layers[3] = start, layout
        engine.policy = ExitPolicy.never()
        assert same(answer(engine), expected)

    def test_without_a_place_for_the_file_all_layers_stay(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.write_text("no folder")
        engine = engine_of()
        expected = answer(engine)
        with pytest.raises(RiverError, match="set RIVER_LLM_CACHE"):
            engine.keep_layers(1)
        assert engine.resident_layers == LAYERS
        assert same(answer(engine), expected)
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")  # then it goes where the system's go
        engine.keep_layers(1)
        assert same(answer(engine), expected)


class TestInterrupts:
    @pytest.mark.parametrize("layer", range(LAYERS))
    @pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.down_proj"])
    def test_a_pass_cut_short_leaves_a_usable_engine(self, layer: int, part: str) -> None:
        engine = engine_of()
        engine.policy = ExitPolicy.never()
        expected = answer(engine)
        engine.keep_layers(1)
        linear = engine.model.model.layers[layer].get_submodule(part)
        handle = linear.register_forward_hook(_interrupt)
        length = engine.length
        with pytest.raises(KeyboardInterrupt):
            engine.decode(torch.tensor([5, 6, 7]))
        handle.remove()
        assert engine.length == length
        assert _in_memory(engine.model) == [True, False, False, False]
        assert same(answer(engine), expected)

    def test_a_pass_of_transformers_cut_short_leaves_a_usable_model(self) -> None:
        engine = engine_of()
        engine.policy = ExitPolicy.never()
        expected = answer(engine)
        engine.keep_layers(1)
        handle = engine.model.model.layers[2].mlp.register_forward_hook(_interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.model.generate(PROMPTS)
        handle.remove()
        engine.keep_layers(0)
        assert _in_memory(engine.model) == [False] * LAYERS
        assert same(answer(engine), expected)


class TestRiver:
    def test_detaching_brings_everything_back(self) -> None:
        model = tiny_model("Llama")
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parameters = dict(model.named_parameters())
        attached = attach_river(model, CONFIG)
        attached.keep_layers(0)
        detach_river(model)
        assert model.state_dict().keys() == state.keys()
        for name, parameter in model.named_parameters():
            assert parameter is parameters[name]
            assert torch.equal(parameter, state[name])
        with pytest.raises(RiverError, match="only while the river is attached"):
            attached.keep_layers(0)
        attach_river(model, River.build(model, CONFIG)).keep_layers(1)

    def test_evicted_layers_are_refused_where_their_weights_are_asked_for(
        self, tmp_path: Path
    ) -> None:
        engine = engine_of()
        model = engine.model
        river = River.build(model, CONFIG)
        engine.keep_layers(2)
        with pytest.raises(RiverError, match=r"model\.layers\.2 are not in memory; detach"):
            River.build(model, CONFIG)
        with pytest.raises(RiverError, match=r"model\.layers\.2 are not in memory; detach"):
            river.check_fits(decoder_layers(model))
        with pytest.raises(RiverError, match="can't be saved while layers are evicted"):
            model.save_pretrained(tmp_path / "model")
        engine.keep_layers(LAYERS)
        river.check_fits(decoder_layers(model))
        model.save_pretrained(tmp_path / "model")

    def test_the_native_engine_refuses_them(self) -> None:
        pytest.importorskip("river_llm._core", reason="the native engine was not built")
        engine = engine_of()
        river = River.build(engine.model, CONFIG)
        engine.keep_layers(2)
        with pytest.raises(RiverError, match="are evicted"):
            CpuEngine(engine.model, river, ExitPolicy.never())


@pytest.fixture
def cuda_engine() -> Iterator[TorchEngine]:
    """Layers of 25 MB, whose copies take longer than to compute them for one token."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    model = tiny_model("Llama", **sizes, dtype=torch.bfloat16).cuda()
    yield TorchEngine(attach_river(model, CONFIG, policy=ExitPolicy.never()))
    torch.cuda.empty_cache()


@needs_cuda
class TestCuda:
    def test_tokens_are_the_same_whatever_stays(self, cuda_engine: TorchEngine) -> None:
        policies = (ExitPolicy.never(), ExitPolicy.similarity(0.9), ExitPolicy.fixed(4))
        for policy in policies:
            cuda_engine.policy = policy
            cuda_engine.keep_layers(8)
            expected = answer(cuda_engine)
            for count in (5, 0, 2, 7):
                cuda_engine.keep_layers(count)
                assert same(answer(cuda_engine), expected)

    def test_memory_is_given_back(self, cuda_engine: TorchEngine) -> None:
        of_layer = layer_bytes(cuda_engine.model)
        answer(cuda_engine)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cuda_engine.keep_layers(2)
        assert before - torch.cuda.memory_allocated() >= 5.9 * of_layer
        cuda_engine.truncate(0)
        torch.cuda.reset_peak_memory_stats()
        answer(cuda_engine)
        assert before - torch.cuda.max_memory_allocated() > 3 * of_layer  # two are on their way
        cuda_engine.keep_layers(8)
        assert abs(before - torch.cuda.memory_allocated()) < 0.5 * of_layer

    def test_waits_are_measured(self, cuda_engine: TorchEngine) -> None:
        cuda_engine.keep_layers(0)
        answer(cuda_engine)
        statistics = cuda_engine.offload_statistics
        assert statistics.misses == 8 * STEPS
        assert statistics.bytes_read == 8 * STEPS * layer_bytes(cuda_engine.model)
        assert statistics.seconds_waited > 0

    def test_an_interrupt_leaves_a_usable_engine(self, cuda_engine: TorchEngine) -> None:
        expected = answer(cuda_engine)
        cuda_engine.keep_layers(1)
        handle = cuda_engine.model.model.layers[3].mlp.register_forward_hook(_interrupt)
        with pytest.raises(KeyboardInterrupt):
            cuda_engine.decode(torch.tensor([5, 6, 7]))
        handle.remove()
        assert same(answer(cuda_engine), expected)


def _in_memory(model: PreTrainedModel) -> list[bool]:
    return [
        not any(linear.weight.is_meta for linear in layer.linears.values())
        for layer in decoder_layers(model)
    ]


def _interrupt(module: nn.Module, *args: object) -> None:
    raise KeyboardInterrupt


def _anonymous_bytes() -> int:
    """Of the process, that are in memory and belong to no file."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon:")]
    return 1024 * int(line.split()[1])


def _is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()
