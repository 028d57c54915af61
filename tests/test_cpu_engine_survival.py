"""The native engine goes on after what comes from outside: a second thread, a fork, memory that
can't be had.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_engines import Subject, random_tokens, subject_of
from tiny_core import ready_core, run_pass, run_python
from torch import Tensor

from river_llm import ExitPolicy, RiverConfig, RiverError
from river_llm.engines import CpuEngine, StepResult

POLICY = ExitPolicy.fixed(2)
BUSY = "another thread is using this engine; give each thread its own"
THREADS = Path("/proc/self/task")
LONG_CONTEXT = {"max_position_embeddings": 32768}
ids = torch.tensor

linux_only = pytest.mark.skipif(not THREADS.is_dir(), reason="needs /proc")


@pytest.fixture
def subject() -> Subject:
    return subject_of("llama")


@pytest.fixture(scope="module")
def long_subject() -> Subject:
    """A model that takes thousands of tokens, so that a pass is long enough to come in between."""
    return Subject("Llama", LONG_CONTEXT, RiverConfig(group_size=32, quantizer="rtn"))


class Watched:
    """The native core; something happens just after a pass, before the engine counts it."""

    def __init__(self, core: Any, after_pass: Callable[[], object]) -> None:
        self._core = core
        self._after_pass = after_pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def forward(self, *args: Any) -> Any:
        result = self._core.forward(*args)
        self._after_pass()
        return result


every_verb = pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.prefill(ids([[5, 6]])),
        lambda engine: engine.decode(ids([5])),
        lambda engine: engine.verify(ids([[5, 6]])),
        lambda engine: engine.truncate(0),
        lambda engine: engine.truncate(3),
    ],
    ids=["prefill", "decode", "verify", "truncate to 0", "truncate"],
)


class TestTwoThreads:
    @every_verb
    @pytest.mark.parametrize("filled", [0, 5])
    def test_the_second_gets_an_error_and_the_first_its_result(
        self, long_subject: Subject, call: Callable[[CpuEngine], object], filled: int
    ) -> None:
        engine, alone = long_subject.engine(POLICY), long_subject.engine(POLICY)
        tokens = random_tokens(1, filled + 4000, seed=4)
        if filled:
            engine.prefill(tokens[:, :filled])
            alone.prefill(tokens[:, :filled])
        results: list[tuple[StepResult, Tensor]] = []

        def compute() -> None:
            step = engine.verify(tokens[:, filled:])
            results.append((step, step.logits[:, -1]))

        thread = threading.Thread(target=compute)
        thread.start()
        _wait_until_busy(engine)
        with pytest.raises(RiverError, match=f"^{BUSY}$"):
            call(engine)
        assert thread.is_alive(), "the pass was too short to come in between"
        thread.join()
        expected = alone.verify(tokens[:, filled:])
        assert torch.equal(results[0][0].best_tokens, expected.best_tokens)
        assert torch.equal(results[0][1], expected.logits[:, -1])
        assert engine.length == filled + 4000
        last = ids([7])
        assert torch.equal(engine.decode(last).logits, alone.decode(last).logits)

    @every_verb
    @pytest.mark.parametrize("filled", [0, 5])
    def test_the_second_gets_an_error_until_the_pass_was_counted(
        self, subject: Subject, call: Callable[[CpuEngine], object], filled: int
    ) -> None:
        engine, alone = subject.engine(POLICY), subject.engine(POLICY)
        tokens, last = random_tokens(1, filled + 4, seed=5), ids([7])
        if filled:
            engine.prefill(tokens[:, :filled])
            alone.prefill(tokens[:, :filled])
        computed, go_on = threading.Event(), threading.Event()
        core = engine._core
        engine._core = Watched(core, lambda: (computed.set(), go_on.wait(10)))
        thread = threading.Thread(target=engine.prefill, args=(tokens[:, filled:],))
        thread.start()
        assert computed.wait(10)
        engine._core = core
        try:
            with pytest.raises(RiverError, match=f"^{BUSY}$"):
                call(engine)
        finally:
            go_on.set()
            thread.join()
        alone.prefill(tokens[:, filled:])
        assert engine.length == engine._core.length(0) == filled + 4
        assert torch.equal(engine.decode(last).logits, alone.decode(last).logits)

    def test_one_after_the_other_is_no_conflict(self, subject: Subject) -> None:
        """Nor is an error in the first one's call."""
        engine, alone = subject.engine(POLICY), subject.engine(POLICY)

        def compute() -> None:
            engine.prefill(ids([[5, 6]]))
            with pytest.raises(RiverError, match="there is no token"):
                engine.decode(ids([-1]))

        thread = threading.Thread(target=compute)
        thread.start()
        thread.join()
        alone.prefill(ids([[5, 6]]))
        assert torch.equal(engine.decode(ids([7])).logits, alone.decode(ids([7])).logits)

    def test_a_verb_within_a_verb_of_the_same_thread_is_no_conflict(self, subject: Subject) -> None:
        """And a second thread is kept out until the outer one has ended."""
        engine, alone = subject.engine(POLICY), subject.engine(POLICY)
        core, tokens = engine._core, random_tokens(1, 6, seed=6)
        refusals: list[str] = []

        def intrude() -> None:
            with pytest.raises(RiverError) as caught:
                engine.decode(ids([5]))
            refusals.append(str(caught.value))

        def within() -> None:
            engine._core = core
            engine.truncate(0)
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()

        engine._core = Watched(core, within)
        engine.prefill(tokens)
        assert refusals == [BUSY]
        engine.truncate(0)
        assert torch.equal(engine.prefill(tokens).logits, alone.prefill(tokens).logits)

    def test_each_with_its_own_engine(self, subject: Subject) -> None:
        engines = [subject.engine(POLICY, threads=2) for _ in range(3)]
        prompts = [random_tokens(1, 40, seed) for seed in range(3)]
        steps: dict[int, Tensor] = {}

        def compute(index: int) -> None:
            steps[index] = engines[index].prefill(prompts[index]).logits

        threads = [threading.Thread(target=compute, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, prompt in enumerate(prompts):
            assert torch.equal(steps[index], subject.engine(POLICY).prefill(prompt).logits)


FORK = """
import os, sys
import torch
from native_engines import CASES, Subject
from river_llm import ExitPolicy, RiverConfig, RiverError

ids = torch.tensor
subject = Subject(*CASES["llama"], RiverConfig(group_size=32, quantizer="rtn"))
engine = subject.engine(ExitPolicy.fixed(2), threads=2)
empty = subject.engine(ExitPolicy.fixed(2), threads=2)
step = engine.prefill(ids([[5, 6, 7]]))
child = os.fork()
if child == 0:
    calls = [lambda: step.logits]
    for each in (engine, empty):
        calls += [
            lambda each=each: each.prefill(ids([[5]])),
            lambda each=each: each.decode(ids([5])),
            lambda each=each: each.verify(ids([[5]])),
            lambda each=each: each.truncate(0),
        ]
    for call in calls:
        try:
            call()
            print("no error")
        except RiverError as error:
            print("make another one after a fork" in str(error) or error)
    del engine, empty, step, each, call, calls
    again = subject.engine(ExitPolicy.fixed(2), threads=2)
    again.prefill(ids([[5, 6, 7]]))
    print("child", int(again.decode(ids([8])).best_tokens), flush=True)
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
print("parent", int(engine.decode(ids([8])).best_tokens))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork_the_child_gets_an_error_and_the_parent_goes_on() -> None:
    *calls, child, parent = run_python(FORK).splitlines()
    assert calls == ["True"] * 9
    assert child.removeprefix("child ") == parent.removeprefix("parent ")


MEMORY = """
import resource
import torch
from native_engines import Subject, random_tokens
from river_llm import ExitPolicy, RiverConfig, RiverError

SIZES = {"max_position_embeddings": 8192, "head_dim": 128, "num_key_value_heads": 4}
subject = Subject("Llama", SIZES, RiverConfig(group_size=32, quantizer="rtn"))
engine, untouched = (subject.engine(ExitPolicy.fixed(2)) for _ in range(2))
for each in (engine, untouched):
    each.prefill(random_tokens(1, 1100, seed=1))
prompt = random_tokens(1, 6000, seed=2)
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
limits = resource.getrlimit(resource.RLIMIT_AS)
# a page of 64 tokens takes half a MiB
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (16 << 20), limits[1]))
try:
    engine.prefill(prompt)
    print("no error")
except (MemoryError, RiverError) as error:
    resource.setrlimit(resource.RLIMIT_AS, limits)
    print("error", engine.length, engine._core.length(0))
more = random_tokens(1, 5, seed=3)
print(torch.equal(engine.prefill(more).logits, untouched.prefill(more).logits))
print(engine.length)
"""


@linux_only
def test_memory_that_cannot_be_had_is_an_error_after_which_it_goes_on() -> None:
    assert run_python(MEMORY).split("\n")[:3] == ["error 1100 1100", "True", "1105"]


class TestEnd:
    @linux_only
    def test_engines_leave_no_threads(self, subject: Subject) -> None:
        before = len(list(THREADS.iterdir()))
        for _ in range(30):
            engine = subject.engine(POLICY, threads=4)
            assert len(list(THREADS.iterdir())) == before + 3
            engine.decode(ids([5]))
            del engine
            assert len(list(THREADS.iterdir())) == before

    @linux_only
    def test_engines_leave_no_memory(self) -> None:
        def resident() -> int:
            return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

        for repeat in range(12):
            core = ready_core(threads=2)
            core.resize(400)  # a page of the cache for each: 6 MiB
            run_pass(core, tokens=[5] * 400, sequences=list(range(400)))
            del core
            if repeat == 1:
                first = resident()
        assert resident() - first < 24 << 20

    def test_an_engine_that_nobody_holds_goes_at_once(self, subject: Subject) -> None:
        engine = subject.engine(POLICY)
        step = engine.prefill(ids([[5, 6]]))
        gone = weakref.ref(engine)
        del engine
        assert gone() is not None  # for its logits
        _ = step.logits
        assert gone() is None


def _wait_until_busy(engine: CpuEngine) -> None:
    """Until another thread's pass has begun."""
    while True:
        try:
            engine._core.logits()
        except RuntimeError:
            return
        time.sleep(0.0005)
