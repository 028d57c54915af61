"""Evicted backbone layers on the torch engine: the same tokens as with all layers in memory."""

from __future__ import annotations

import errno
import gc
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steps import append, begin
from tiny_models import ARCHITECTURES, VOCABULARY, tiny_model
from torch import Tensor, nn
from torch_engines import CONFIG, engine_of
from transformers import AutoModelForCausalLM, PreTrainedModel

from river_llm import (
    ConfigError,
    ExitPolicy,
    River,
    RiverError,
    attach_river,
    detach_river,
)
from river_llm.engines import TorchEngine
from river_llm.river.backbone import decoder_layers
from river_llm.river.offloading import FileStore, HostStore, _make_store
from river_llm.store import ENVIRONMENT_VARIABLE

LAYERS = 4
TEXTS = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1)).tolist()
NEVER = ExitPolicy.never()
DAMAGED = "evicted layers can't be read from .* cut short.*; load the model again"

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

Answer = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def mixed(engine: TorchEngine) -> Tensor:
    """Thresholds by which a third of the tokens leaves after each layer."""
    (sequence,) = begin(engine)
    similarities = append(engine, {sequence: list(range(3, 67))}, record_similarities=True)
    assert similarities.similarities is not None
    thresholds = similarities.similarities[:-1].quantile(2 / 3, dim=1)
    return torch.tensor([math.inf, *thresholds.tolist()])


def answer(engine: TorchEngine, thresholds: Tensor | ExitPolicy = NEVER) -> Answer:
    """Logits and exit layers of three texts of unequal length, in several steps."""
    sequences = begin(engine, [0, 0, 0])
    steps = [append(engine, {s: t[: 3 + s] for s, t in zip(sequences, TEXTS, strict=True)})]
    steps += [
        append(engine, {s: [TEXTS[s][place]] for s in sequences}, thresholds)
        for place in range(6, 12)
    ]
    return torch.cat([s.logits for s in steps]), torch.cat([s.exit_layers for s in steps])


def same(some: Answer, others: Answer) -> bool:
    return all(map(torch.equal, some, others))


def layer_bytes(model: PreTrainedModel) -> int:
    return sum(linear.weight.nbytes for linear in decoder_layers(model)[0].linears.values())


def in_memory(model: PreTrainedModel) -> list[bool]:
    return [
        not any(linear.weight.is_meta for linear in layer.linears.values())
        for layer in decoder_layers(model)
    ]


def interrupt(module: nn.Module, *args: object) -> None:
    raise KeyboardInterrupt


class TestTokens:
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_are_the_same_whatever_stays(self, architecture: str) -> None:
        engine = engine_of(architecture)
        thresholds = mixed(engine)
        expected = answer(engine, thresholds)
        assert len(expected[1].unique()) > 1
        for count in (4, 3, 0, 2, 4):
            engine.keep_layers(count)
            assert engine.resident_layers == count
            assert in_memory(engine.model) == [index < count for index in range(LAYERS)]
            assert same(answer(engine, thresholds), expected)

    @settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(plan=st.lists(st.integers(0, LAYERS), min_size=6, max_size=6))
    def test_are_the_same_while_the_plan_changes(self, plan: list[int]) -> None:
        engine = engine_of(dtype=torch.bfloat16)
        (sequence,) = begin(engine)
        runs = []
        for counts in ([LAYERS] * 6, plan):
            engine.truncate(sequence, 0)
            steps = []
            for place, count in enumerate(counts):
                engine.keep_layers(count)
                tokens = {sequence: TEXTS[0][2 * place : 2 * place + 2]}
                steps.append(append(engine, tokens, ExitPolicy.fixed(place % 5)).logits)
            runs.append(torch.cat(steps))
        assert torch.equal(*runs)

    def test_under_inference_mode_leave_usable_weights(self) -> None:
        engine = engine_of()
        with torch.inference_mode():
            engine.keep_layers(0)
            answer(engine)
            engine.keep_layers(LAYERS)
        weight = engine.model.model.layers[3].mlp.up_proj.weight
        assert not weight.is_inference()


class TestStatistics:
    @pytest.mark.parametrize("kept", range(LAYERS + 1))
    def test_count_what_the_deepest_token_of_a_pass_needs(self, kept: int) -> None:
        engine = engine_of()
        a, b = begin(engine, [0, 0])
        engine.keep_layers(kept)
        statistics = engine.offload_statistics
        assert (statistics.resident_layers, statistics.misses) == (kept, 0)
        misses = 0
        for depth in (3, 0, 2, 4, 1):
            rows = torch.full((3, LAYERS), -math.inf)
            rows[1, :depth] = math.inf
            append(engine, {a: [5, 6], b: TEXTS[0][:1]}, rows)
            misses += max(0, depth - kept)
        statistics = engine.offload_statistics
        assert statistics.misses == misses
        assert statistics.bytes_read == misses * layer_bytes(engine.model)
        assert (statistics.seconds_waited > 0) == (misses > 0)
        engine.keep_layers(LAYERS)
        engine.keep_layers(1)  # is no miss
        assert engine.offload_statistics.misses == misses

    @pytest.mark.parametrize("limit", range(LAYERS + 1))
    def test_of_a_depth_limit_tell_the_capped_tokens(self, limit: int) -> None:
        engine = engine_of()
        expected = answer(engine, ExitPolicy.fixed(limit))[0][12:]  # behind the prompts
        engine.keep_layers(limit)
        before = engine.offload_statistics
        engine.depth_limit = limit
        exits = answer(engine)[1]
        assert exits.unique().tolist() == [limit]
        cost = engine.offload_statistics.since(before)
        assert (cost.misses, cost.depth_capped) == (0, 0 if limit == LAYERS else 12 + 18)
        answer(engine, ExitPolicy.always())
        assert engine.offload_statistics.depth_capped == cost.depth_capped + 12 * (limit < LAYERS)
        engine.depth_limit = None
        assert torch.equal(answer(engine, ExitPolicy.fixed(limit))[0][12:], expected)

    def test_more_layers_than_there_are_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"5 layers are to stay, .* choose 0 to 4"):
            engine_of().keep_layers(5)


class TestMemory:
    def test_one_evicted_layer_is_there_at_a_time(self) -> None:
        engine = engine_of()
        engine.keep_layers(1)
        counts: list[int] = []
        for layer in engine.model.model.layers:
            layer.mlp.register_forward_hook(lambda *_: counts.append(sum(in_memory(engine.model))))
        begin(engine)
        append(engine, {0: [5]})
        assert counts == [1, 2, 2, 2]

    @on_linux
    def test_the_system_gets_it_back(self) -> None:
        engine = engine_of(hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
        evicted = 5 * layer_bytes(engine.model)
        assert evicted > 50e6
        engine.keep_layers(5)  # from here on nothing is copied
        engine.keep_layers(6)
        before = anonymous_bytes()
        engine.keep_layers(1)
        # what other tests left behind makes some 15 MB of difference either way
        assert before - anonymous_bytes() > 0.6 * evicted
        answer(engine)
        assert before - anonymous_bytes() > 0.6 * evicted
        engine.keep_layers(6)
        assert abs(before - anonymous_bytes()) < 0.4 * evicted

    @on_linux
    def test_nothing_that_stays_is_in_pages_of_a_file(self, tmp_path: Path) -> None:
        folders = [tmp_path / "model", tmp_path / "river"]
        original = tiny_model("Llama")
        River.build(original, CONFIG).save(folders[1])
        original.save_pretrained(folders[0])
        expected = answer(TorchEngine(attach_river(original, CONFIG)), ExitPolicy.fixed(2))
        model = AutoModelForCausalLM.from_pretrained(folders[0]).eval()
        engine = TorchEngine(attach_river(model, folders[1]))
        files = [path for folder in folders for path in folder.glob("*.safetensors")]
        maps = Path("/proc/self/maps")
        assert [str(path) in maps.read_text() for path in files] == [True, True]
        engine.keep_layers(3)
        gc.collect()
        assert [str(path) in maps.read_text() for path in files] == [False, False]
        for path in files:  # in place, as a careless program would
            with path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
        assert same(answer(engine, ExitPolicy.fixed(2)), expected)


class TestErrors:
    def test_of_the_file_are_errors_where_a_layer_is_needed(self) -> None:
        engine = engine_of()
        shallow = ExitPolicy.fixed(2)
        engine.keep_layers(2)
        (sequence,) = begin(engine)
        expected = append(engine, {sequence: [5, 6]}, shallow).logits
        store = engine.attached._evicted._store
        assert isinstance(store, FileStore)
        os.ftruncate(store._file.fileno(), 1000)
        with pytest.raises(RiverError, match=DAMAGED):
            append(engine, {sequence: [7]})
        for bring_back in (lambda: engine.keep_layers(3), lambda: detach_river(engine.model)):
            with pytest.raises(RiverError, match=DAMAGED):
                bring_back()
        assert (engine.length(sequence), engine.resident_layers) == (2, 2)
        engine.truncate(sequence, 0)
        assert torch.equal(append(engine, {sequence: [5, 6]}, shallow).logits, expected)

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

    @pytest.mark.parametrize("layer", range(LAYERS))
    def test_and_ctrl_c_leave_a_usable_engine(self, layer: int) -> None:
        engine = engine_of()
        expected = answer(engine)
        engine.keep_layers(1)
        handle = engine.model.model.layers[layer].mlp.down_proj.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            append(engine, {0: [5]})
        assert in_memory(engine.model) == [True, False, False, False]
        with pytest.raises(KeyboardInterrupt):
            engine.model.generate(torch.tensor(TEXTS))
        handle.remove()
        engine.keep_layers(0)
        assert in_memory(engine.model) == [False] * LAYERS
        assert same(answer(engine), expected)

    def test_a_weight_on_another_device_is_refused(self) -> None:
        engine = engine_of()
        engine.model.model.layers[2].to("meta")
        with pytest.raises(RiverError, match=r"layers\.2\.\S+ has no weight of its own on cpu"):
            engine.attached.keep_layers(1)
        assert engine.resident_layers == 3

    def test_other_devices_have_no_store(self) -> None:
        with pytest.raises(RiverError, match="on a CPU or on CUDA, not on meta"):
            _make_store(torch.device("meta"))


class TestFileStore:
    @pytest.fixture
    def weights(self) -> list[Tensor]:
        """Of several dtypes and orders in memory, none a multiple of 64 bytes."""
        torch.manual_seed(0)
        parts = [torch.randn(3, 7), torch.randn(5, 3).T, torch.randn(3, 3).bfloat16()]
        return [*parts, torch.randn(1, 1).half()]

    def test_gives_back_what_it_was_given(self, tmp_path: Path, weights: list[Tensor]) -> None:
        store = FileStore(tmp_path / "new")
        store.put(3, weights)
        store.put(0, [weight + 1 for weight in weights[:2]])
        assert list((tmp_path / "new").iterdir()) == []
        for index, expected in ((3, weights), (0, [weight + 1 for weight in weights[:2]])):
            for back, weight in zip(store.read(index), expected, strict=True):
                assert torch.equal(back, weight)
                assert (back.dtype, back.stride()) == (weight.dtype, weight.stride())
                assert back.storage_offset() * back.element_size() % 64 == 0

    def test_loses_nothing_on_a_full_disk(self, tmp_path: Path, weights: list[Tensor]) -> None:
        class Full:
            room = 100

            def write(self, block: memoryview) -> int:
                if self.room == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written = file.write(block[: self.room])
                self.room -= written
                return int(written)

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

        store = FileStore(tmp_path)
        store.put(0, weights)
        file, store._file = store._file, Full()  # type: ignore[assignment]
        with pytest.raises(RiverError, match=r"can't be written to .*\(No space left.*make room"):
            store.put(1, weights)
        store._file = file
        store.put(1, [weight + 1 for weight in weights])
        assert all(map(torch.equal, store.read(1), [weight + 1 for weight in weights]))
        assert all(map(torch.equal, store.read(0), weights))


class TestRiver:
    def test_detaching_brings_everything_back(self, tmp_path: Path) -> None:
        model = tiny_model("Llama")
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parameters = dict(model.named_parameters())
        river = River.build(model, CONFIG)
        attached = attach_river(model, river)
        attached.keep_layers(2)
        for ask in (lambda: River.build(model), lambda: river.check_fits(decoder_layers(model))):
            with pytest.raises(RiverError, match=r"model\.layers\.2 are not in memory; detach"):
                ask()
        with pytest.raises(RiverError, match="can't be saved while layers are evicted"):
            model.save_pretrained(tmp_path / "model")
        detach_river(model)
        for name, parameter in model.named_parameters():
            assert parameter is parameters[name]
            assert torch.equal(parameter, state[name])
        with pytest.raises(RiverError, match="only while the river is attached"):
            attached.keep_layers(0)
        attach_river(model, river).keep_layers(1)


@needs_cuda
class TestCuda:
    @pytest.fixture
    def engine(self) -> Iterator[TorchEngine]:
        """Layers of 25 MB, whose copies take longer than to compute them for one token."""
        sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4}
        model = tiny_model("Llama", **sizes, dtype=torch.bfloat16).cuda()
        yield TorchEngine(attach_river(model, CONFIG))
        torch.cuda.empty_cache()

    def test_tokens_are_the_same_and_memory_is_given_back(self, engine: TorchEngine) -> None:
        of_layer = layer_bytes(engine.model)
        policies = (NEVER, ExitPolicy.similarity(0.9), ExitPolicy.fixed(2))
        expected = [answer(engine, policy) for policy in policies]
        begin(engine)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for count in (3, 0, 1):
            engine.keep_layers(count)
            torch.cuda.synchronize()
            assert before - torch.cuda.memory_allocated() >= (3.9 - count) * of_layer
            assert all(same(answer(engine, p), e) for p, e in zip(policies, expected, strict=True))
        assert isinstance(engine.attached._evicted._store, HostStore)
        engine.keep_layers(LAYERS)
        begin(engine)
        assert abs(before - torch.cuda.memory_allocated()) < 0.5 * of_layer

    def test_waits_are_measured(self, engine: TorchEngine) -> None:
        engine.keep_layers(0)
        answer(engine)
        statistics = engine.offload_statistics
        assert statistics.misses == 4 * 7
        assert statistics.bytes_read == 4 * 7 * layer_bytes(engine.model)
        assert statistics.seconds_waited > 0


def anonymous_bytes() -> int:
    """Of the process, that are in memory and belong to no file."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("RssAnon:")]
    return 1024 * int(line.split()[1])
