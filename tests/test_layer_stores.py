"""Where evicted layers are kept, and how they come back, beside a model of a few plain matrices."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from river_llm.offloading.file_store import FileStore
from river_llm.offloading.host_store import HostStore
from river_llm.offloading.layer_store import LayerStore, Layout
from side_streams import SideStream
from torch import Tensor, nn

from river_llm.backbone import DecoderLayer
from river_llm.errors import ConfigError, RiverError
from river_llm.offloading import EvictedLayers, evicted_layers

LAYERS = 6
WEIGHTS_BYTES = 4 * (5 * 7 + 3 * 5)
DAMAGED = "the file of evicted layers in .* was cut short or changed .*; load the model again"

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STORES: dict[str, Callable[[Path], LayerStore]] = {
    "file": FileStore,
    "host, early": lambda _: HostStore(SideStream()),
    "host, late": lambda _: HostStore(SideStream(lazy=True)),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LayerStore:
    return STORES[request.param](tmp_path)


@pytest.fixture
def weights() -> list[Tensor]:
    """Of several dtypes and orders in memory, none a multiple of 64 bytes."""
    torch.manual_seed(0)
    return [
        torch.randn(3, 7),
        torch.randn(5, 3).T,
        torch.randn(3, 3).bfloat16(),
        torch.randn(4, 4)[:3, 1:],
        torch.randn(1, 1).half(),
    ]


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(some, others, strict=True))


class TestStores:
    def test_give_back_what_they_were_given(self, store: LayerStore, weights: list[Tensor]) -> None:
        others = [weight + 1 for weight in weights[:2]]
        assert 3 not in store
        store.put(3, weights)
        store.put(0, others)
        assert 3 in store
        assert 0 in store
        assert 1 not in store
        arriving = [store.fetch(0), store.fetch(3)]
        assert _equal(store.read(3), weights)
        assert _equal(arriving[1].weights(), weights)
        assert _equal(arriving[0].weights(), others)
        assert _equal(store.read(0), others)

    def test_keep_the_order_in_memory_and_align_each_weight(
        self, store: LayerStore, weights: list[Tensor]
    ) -> None:
        store.put(0, weights)
        for back, weight in zip(store.read(0), weights, strict=True):
            assert back.stride() == torch.empty_like(weight).stride()
            assert back.storage_offset() * back.element_size() % 64 == 0

    def test_what_was_read_to_stay_is_not_overwritten(
        self, store: LayerStore, weights: list[Tensor]
    ) -> None:
        for index in range(4):
            store.put(index, [weight + index for weight in weights])
        stays = store.read(0)
        for index in (1, 2, 3):
            arrival = store.fetch(index)
            arrival.weights()
            arrival.release()
        assert _equal(stays, weights)

    def test_a_layer_that_nobody_waited_for_does_not_disturb_the_next(
        self, store: LayerStore, weights: list[Tensor]
    ) -> None:
        store.put(0, weights)
        store.put(1, [weight + 1 for weight in weights])
        store.fetch(0).release()
        assert _equal(store.fetch(1).weights(), [weight + 1 for weight in weights])
        store.fetch(0).release()
        store.end_pass()
        assert _equal(store.fetch(0).weights(), weights)


class TestFileStore:
    def test_leaves_nothing_in_the_folder_and_needs_nothing_there(
        self, tmp_path: Path, weights: list[Tensor]
    ) -> None:
        directory = tmp_path / "new" / "cache"
        store = FileStore(directory)
        store.put(0, weights)
        assert list(directory.iterdir()) == []
        shutil.rmtree(directory)
        assert _equal(store.fetch(0).weights(), weights)

    @pytest.mark.parametrize("size", [0, 100])
    def test_a_file_that_is_cut_short_is_an_error(
        self, tmp_path: Path, weights: list[Tensor], size: int
    ) -> None:
        store = FileStore(tmp_path)
        store.put(0, weights)
        os.ftruncate(store._file.fileno(), size)
        with pytest.raises(RiverError, match=DAMAGED):
            store.fetch(0).weights()
        with pytest.raises(RiverError, match=DAMAGED):
            store.read(0)

    @pytest.mark.parametrize("place", [0, 10**4])
    def test_a_file_that_is_changed_is_an_error(
        self, tmp_path: Path, weights: list[Tensor], place: int
    ) -> None:
        store = FileStore(tmp_path)
        store.put(0, weights)
        descriptor = store._file.fileno()
        os.utime(descriptor, ns=(0, store._state[1] - 10**9))  # a second ago
        store._state = store._state_now()
        assert _equal(store.read(0), weights)
        os.pwrite(descriptor, b"x", place)
        with pytest.raises(RiverError, match=DAMAGED):
            store.fetch(0).weights()

    def test_a_disk_that_fails_is_an_error(self, tmp_path: Path, weights: list[Tensor]) -> None:
        store = FileStore(tmp_path)
        store.put(0, weights)
        store._file.close()
        store._file = _Failing(errno.EIO)  # type: ignore[assignment]
        with pytest.raises(RiverError, match=r"can't be read from .*; load the model again"):
            store.fetch(0).weights()

    def test_a_full_disk_is_an_error_that_loses_nothing(
        self, tmp_path: Path, weights: list[Tensor]
    ) -> None:
        store = FileStore(tmp_path)
        store.put(0, weights)
        file = store._file
        store._file = _Full(file)  # type: ignore[assignment]
        with pytest.raises(RiverError, match=r"can't be written to .*\(No space left.*make room"):
            store.put(1, weights)
        assert 1 not in store
        store._file = file
        assert _equal(store.read(0), weights)
        store.put(1, [weight + 1 for weight in weights])
        assert _equal(store.read(1), [weight + 1 for weight in weights])
        assert _equal(store.read(0), weights)

    def test_a_folder_that_cannot_be_made_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(RiverError, match=r"can't be written to .*RIVER_LLM_CACHE"):
            FileStore(tmp_path / "file" / "cache")

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_in_a_forked_process_is_an_error_and_not_a_wait(
        self, tmp_path: Path, weights: list[Tensor]
    ) -> None:
        store = FileStore(tmp_path)
        store.put(3, weights)
        child = os.fork()
        if child == 0:  # whatever comes, pytest must not go on here
            try:
                store.read(3)
            except RiverError as error:
                os._exit(7 if "forked" in str(error) else 8)
            finally:
                os._exit(9)
        deadline = time.monotonic() + 30
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        assert os.waitstatus_to_exitcode(done[1]) == 7
        assert _equal(store.read(3), weights)

    def test_is_gone_with_its_file_and_thread(self, tmp_path: Path, weights: list[Tensor]) -> None:
        store = FileStore(tmp_path)
        store.put(0, weights)
        descriptor, gone = store._file.fileno(), weakref.ref(store)
        (thread,) = store._thread._threads
        del store
        gc.collect()
        assert gone() is None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
        thread.join(timeout=10)
        assert not thread.is_alive()


class _Failing:
    """A file whose disk fails."""

    def __init__(self, code: int) -> None:
        self.code = code

    def seek(self, *args: object) -> None:
        raise OSError(self.code, os.strerror(self.code))


class _Full:
    """A file whose disk has room for 100 bytes more."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.room = 100

    def write(self, block: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.file.write(block[: self.room])
        self.room -= written
        return int(written)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class TestHostStore:
    def test_a_pass_takes_turns_with_two_blocks(self, weights: list[Tensor]) -> None:
        stream = SideStream()
        store = HostStore(stream)
        for index in range(5):
            store.put(index, weights)
        ahead = store.fetch(0)
        for index in range(5):
            running, ahead = ahead, store.fetch(min(index + 1, 4))
            assert _equal(running.weights(), weights)
            running.release()
        assert len(stream.blocks) == 2
        store.end_pass()
        store.fetch(0)
        assert len(stream.blocks) == 3

    def test_a_block_is_not_shared_by_layers_of_other_sizes(self, weights: list[Tensor]) -> None:
        store = HostStore(SideStream())
        store.put(0, weights)
        store.put(1, weights[:2])
        for index, expected in ((0, weights), (1, weights[:2]), (0, weights)):
            arrival = store.fetch(index)
            assert _equal(arrival.weights(), expected)
            arrival.release()


@pytest.mark.parametrize("lazy", [False, True])
class TestSideStreamsOfTheTests:
    """They see what goes wrong."""

    def test_where_a_copy_does_not_wait_for_the_computation(
        self, lazy: bool, weights: list[Tensor]
    ) -> None:
        stream = SideStream(lazy)
        store = HostStore(stream)
        store.put(0, weights)
        before = stream.mark()
        arrival = store.fetch(0)
        used = arrival.weights()
        stream.mark()
        assert _equal(used, weights)
        with pytest.raises(AssertionError, match="while it is in use"):
            stream.copy(stream.blocks[0], stream.blocks[0], before)

    def test_where_a_block_counts_as_free_too_early(
        self, lazy: bool, weights: list[Tensor]
    ) -> None:
        stream = SideStream(lazy)
        store = HostStore(stream)
        store.put(0, weights)
        arrival = store.fetch(0)
        used = arrival.weights()
        too_early = stream.mark()
        stream.mark()
        assert _equal(used, weights)
        with pytest.raises(AssertionError, match="while it is in use"):
            stream.copy(stream.blocks[0], stream.blocks[0], too_early)

    def test_where_the_computation_does_not_wait_for_a_copy(
        self, lazy: bool, weights: list[Tensor]
    ) -> None:
        stream = SideStream(lazy)
        store = HostStore(stream)
        store.put(0, weights)
        store.fetch(0)
        stream._in_use.append(stream.blocks[0])
        with pytest.raises(AssertionError, match="while it is in use"):
            stream.mark()


class Layers:
    """Two linear layers in each of `LAYERS` layers, and their weights as they were."""

    def __init__(self, store: LayerStore) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleList(
            nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)) for _ in range(LAYERS)
        )
        self.parameters = [[part.weight for part in layer] for layer in self.model]
        self.values = [[p.detach().clone() for p in layer] for layer in self.parameters]
        layers = [
            DecoderLayer(f"layers.{index}", layer, dict(layer.named_children()))
            for index, layer in enumerate(self.model)
        ]
        self.evicted = EvictedLayers(self.model, layers)  # type: ignore[arg-type]
        self.evicted._store = store

    def weights(self, index: int) -> list[Tensor]:
        return [part.weight for part in self.model[index]]

    def are_in_memory(self) -> list[bool]:
        return [not any(weight.is_meta for weight in self.weights(i)) for i in range(LAYERS)]

    def run(self, depth: int, least: int, most: int, stop_in: int | None = None) -> None:
        """One pass, cut short in a layer if that is named."""
        for index in range(depth):
            self.evicted.before_layer(index, least, most)
            assert _equal(self.weights(index), self.values[index])
            if index == stop_in:
                return
            self.evicted.after_layer(index)
        self.evicted.end_pass()


@pytest.fixture
def layers(store: LayerStore) -> Layers:
    return Layers(store)


class TestEvictedLayers:
    def test_each_number_of_layers_is_in_memory_as_asked(self, layers: Layers) -> None:
        for count in (6, 4, 0, 2, 2, 6, 0, 6):
            layers.evicted.keep(count)
            assert layers.evicted.resident == count
            assert layers.are_in_memory() == [index < count for index in range(LAYERS)]
            for index in range(count):
                assert _equal(layers.weights(index), layers.values[index])

    def test_what_is_evicted_has_no_memory_and_comes_back_into_its_own_parameter(
        self, layers: Layers
    ) -> None:
        layers.evicted.keep(2)
        for parameters in layers.parameters[2:]:
            assert [p.untyped_storage().nbytes() for p in parameters] == [0, 0]
        layers.run(LAYERS, LAYERS, LAYERS)
        assert layers.are_in_memory() == [True] * 2 + [False] * 4
        layers.evicted.keep(LAYERS)
        for index in range(LAYERS):
            for weight, parameter in zip(
                layers.weights(index), layers.parameters[index], strict=True
            ):
                assert weight is parameter

    @pytest.mark.parametrize("count", [-1, 7])
    def test_more_layers_than_there_are_is_refused(self, layers: Layers, count: int) -> None:
        with pytest.raises(ConfigError, match=f"{count} layers are to stay, .* choose 0 to 6"):
            layers.evicted.keep(count)

    def test_biases_stay(self, layers: Layers) -> None:
        layers.evicted.keep(0)
        assert all(not part.bias.is_meta for layer in layers.model for part in layer)

    # (layers that stay, layers run, surely, possibly) -> misses, layers read
    @pytest.mark.parametrize(
        ("resident", "depth", "least", "most", "misses", "read"),
        [
            (6, 6, 6, 6, 0, 0),
            (2, 6, 6, 6, 4, 4),
            (0, 6, 6, 6, 6, 6),
            (2, 2, 1, 6, 0, 0),  # nothing is read for a token that may leave before
            (2, 3, 1, 6, 1, 2),  # the layer behind a miss is read ahead
            (2, 3, 1, 3, 1, 1),  # where a token may get so far
            (2, 3, 3, 3, 1, 1),
            (2, 6, 1, 6, 4, 4),
            (4, 3, 3, 6, 0, 0),
            (0, 0, 0, 0, 0, 0),
        ],
    )
    def test_misses_and_bytes_are_counted(
        self,
        layers: Layers,
        resident: int,
        depth: int,
        least: int,
        most: int,
        misses: int,
        read: int,
    ) -> None:
        layers.evicted.keep(resident)
        for passes in (1, 2):
            layers.run(depth, least, most)
            assert layers.evicted.misses == passes * misses
            assert layers.evicted.bytes_read == passes * read * WEIGHTS_BYTES
        layers.evicted.keep(LAYERS)
        layers.evicted.keep(1)  # is no miss
        assert layers.evicted.misses == 2 * misses

    def test_a_weight_that_is_not_there_is_refused(self, layers: Layers) -> None:
        class Odd(nn.Linear):
            def __init__(self) -> None:
                super().__init__(7, 5)
                self._hidden = self._parameters.pop("weight")

            @property
            def weight(self) -> Tensor:  # type: ignore[override]
                return self._hidden

        layers.evicted._layers[4].linears["0"] = Odd()
        with pytest.raises(RiverError, match=r"layers\.4\.0 has no weight of its own on cpu"):
            layers.evicted.keep(3)
        assert layers.evicted.resident == 5

    def test_an_error_while_layers_are_evicted_leaves_each_where_it_is(
        self, layers: Layers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put = layers.evicted._store.put  # type: ignore[union-attr]

        def full(index: int, weights: list[Tensor]) -> None:
            if index == 3:
                raise KeyboardInterrupt
            put(index, weights)

        with monkeypatch.context() as patch:
            patch.setattr(layers.evicted._store, "put", full)
            with pytest.raises(KeyboardInterrupt):
                layers.evicted.keep(1)
        assert layers.evicted.resident == 4
        layers.run(LAYERS, LAYERS, LAYERS)
        assert layers.evicted.misses == 2
        layers.evicted.keep(1)
        layers.run(LAYERS, LAYERS, LAYERS)
        layers.evicted.keep(LAYERS)
        assert layers.are_in_memory() == [True] * LAYERS

    @pytest.mark.parametrize("stop_in", range(LAYERS))
    def test_a_pass_that_is_cut_short_leaves_nothing_in_memory(
        self, layers: Layers, stop_in: int
    ) -> None:
        layers.evicted.keep(2)
        layers.run(LAYERS, LAYERS, LAYERS, stop_in=stop_in)
        layers.evicted.end_pass()
        assert layers.are_in_memory() == [True] * 2 + [False] * 4
        layers.run(LAYERS, LAYERS, LAYERS)

    def test_weights_that_came_back_under_inference_mode_are_usable_outside(
        self, layers: Layers
    ) -> None:
        with torch.inference_mode():
            layers.evicted.keep(0)
            layers.run(LAYERS, LAYERS, LAYERS)
            layers.evicted.keep(LAYERS)
        weight = layers.weights(5)[0]
        assert not weight.is_inference()
        layers.model[5](torch.randn(1, 7)).sum().backward()
        assert weight.grad is not None

    def test_there_is_no_store_for_other_devices(self) -> None:
        with pytest.raises(RiverError, match="on a CPU or on CUDA, not on meta"):
            evicted_layers._make_store(torch.device("meta"))


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, int, int, int, int | None]:
    """Layers that stay; of a pass its depth, least and most, and where it is cut short."""
    depth = draw(st.integers(0, LAYERS))
    least, most = draw(st.integers(0, depth)), draw(st.integers(depth, LAYERS))
    stop_in = draw(st.none() | st.integers(0, LAYERS))
    return draw(st.integers(0, LAYERS)), depth, least, most, stop_in


@pytest.mark.parametrize("lazy", [False, True])
@given(passes=st.lists(plans(), max_size=8))
def test_no_plan_brings_wrong_weights_or_a_race(
    passes: list[tuple[int, int, int, int, int | None]], lazy: bool
) -> None:
    stream = SideStream(lazy=lazy)
    layers = Layers(HostStore(stream))
    for resident, depth, least, most, stop_in in passes:
        layers.evicted.keep(resident)
        before = len(stream.blocks)
        layers.run(depth, least, most, stop_in)
        assert len(stream.blocks) - before <= 2
    layers.evicted.keep(LAYERS)
    for index in range(LAYERS):
        assert _equal(layers.weights(index), layers.values[index])


def test_a_layout_copies_nothing_when_it_is_viewed(weights: list[Tensor]) -> None:
    layout = Layout.of(weights)
    block = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    layout.write(weights, block)
    assert _equal(layout.views(block), weights)
    block.zero_()
    assert all(not view.any() for view in layout.views(block))
