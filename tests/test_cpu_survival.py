"""The native engine goes on after what comes from outside: Ctrl-C, a second thread, a fork, memory
that can't be had."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from native_engines import Subject, random_tokens, subject_of
from steps import append, begin
from tiny_core import ready_core, run_pass, run_python

from river_llm import ExitPolicy, RiverConfig, RiverError
from river_llm.engines.cpu import CpuEngine
from river_llm.engines.drafting import DraftRule

POLICY = ExitPolicy.fixed(2)
BUSY = "another thread is using this engine; give each thread its own"
THREADS = Path("/proc/self/task")
RTN = RiverConfig(group_size=32, quantizer="rtn")

linux_only = pytest.mark.skipif(not THREADS.is_dir(), reason="needs /proc")


@pytest.fixture
def subject() -> Subject:
    return subject_of("llama")


@pytest.fixture(scope="module")
def long_subject() -> Subject:
    """A model that takes thousands of tokens, so that a pass is long enough to come in between."""
    return Subject("Llama", {"max_position_embeddings": 32768}, RTN)


def wait_until_busy(engine: CpuEngine) -> None:
    """Until another thread's pass has begun."""
    while True:
        try:
            engine._core.longest_after([])
        except RuntimeError:
            return
        time.sleep(0.0005)


CALLS: dict[str, Callable[[CpuEngine], object]] = {
    "forward": lambda engine: append(engine, {0: [5, 6]}),
    "draft": lambda engine: engine.draft([0], [5], [3], DraftRule()),
    "truncate": lambda engine: engine.truncate(0, 3),
    "add_sequence": lambda engine: engine.add_sequence(),
    "drop_sequence": lambda engine: engine.drop_sequence(0),
    "read_cache": lambda engine: engine.read_cache(0, 3),
    "packed_weights": lambda engine: engine.packed_weights,
}


class TestLongPass:
    """In one thread."""

    @pytest.fixture
    def engines(self, long_subject: Subject) -> tuple[CpuEngine, CpuEngine]:
        pair = long_subject.engine(), long_subject.engine()
        for engine in pair:
            append(engine, {begin(engine)[0]: random_tokens(5, seed=4)})
        return pair

    @pytest.mark.parametrize("call", CALLS)
    def test_a_second_thread_gets_an_error_and_the_first_its_result(
        self, engines: tuple[CpuEngine, CpuEngine], call: str
    ) -> None:
        engine, alone = engines
        tokens, results = random_tokens(4000, seed=5), []

        def compute() -> None:
            step = append(engine, {0: tokens}, POLICY, logit_rows=[3999])
            results.append((step.best_tokens, step.logits))

        thread = threading.Thread(target=compute)
        thread.start()
        wait_until_busy(engine)
        with pytest.raises((RiverError, RuntimeError), match=BUSY):
            CALLS[call](engine)
        assert thread.is_alive(), "the pass was too short to come in between"
        thread.join()
        expected = append(alone, {0: tokens}, POLICY, logit_rows=[3999])
        assert torch.equal(results[0][0], expected.best_tokens)
        assert torch.equal(results[0][1], expected.logits)
        assert engine.length(0) == alone.length(0) == 4005
        assert torch.equal(append(engine, {0: [7]}).logits, append(alone, {0: [7]}).logits)

    def test_ctrl_c_undoes_the_pass(self, engines: tuple[CpuEngine, CpuEngine]) -> None:
        engine, untouched = engines
        main = threading.get_ident()

        def interrupt() -> None:
            wait_until_busy(engine)
            signal.pthread_kill(main, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            append(engine, {0: random_tokens(3000, seed=6)}, POLICY, logit_rows=[])
        thread.join()
        assert engine.length(0) == 5
        for step in ({0: [7]}, {0: random_tokens(70, seed=7)}):
            assert torch.equal(append(engine, step).logits, append(untouched, step).logits)

    def test_each_thread_with_its_own_engine(self, subject: Subject) -> None:
        engines = [subject.engine(threads=2) for _ in range(3)]
        texts = [random_tokens(40, seed) for seed in range(3)]
        logits: dict[int, torch.Tensor] = {}

        def compute(index: int) -> None:
            (sequence,) = begin(engines[index])
            logits[index] = append(engines[index], {sequence: texts[index]}, POLICY).logits

        threads = [threading.Thread(target=compute, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        alone = subject.engine()
        for index, text in enumerate(texts):
            expected = append(alone, {begin(alone)[0]: text}, POLICY).logits
            assert torch.equal(logits[index], expected)


FORK = """
import os, sys
from native_engines import CASES, Subject
from steps import append, begin
from test_cpu_survival import CALLS, RTN
from river_llm import RiverError

subject = Subject(*CASES["llama"], RTN)
engine = subject.engine(threads=2)
begin(engine)
step = append(engine, {0: [5, 6, 7]})
child = os.fork()
if child == 0:
    for call in [*CALLS.values(), lambda engine: step.logits]:
        try:
            call(engine)
            print("no error")
        except (RiverError, RuntimeError) as error:
            print("make another one after a fork" in str(error) or error)
    del engine, step
    again = subject.engine(threads=2)
    begin(again)
    append(again, {0: [5, 6, 7]})
    print("child", int(append(again, {0: [8]}).best_tokens[0]), flush=True)
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
print("parent", int(append(engine, {0: [8]}).best_tokens[0]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork_the_child_gets_an_error_and_the_parent_goes_on() -> None:
    *calls, child, parent = run_python(FORK).splitlines()
    assert calls == ["True"] * (len(CALLS) + 1)
    assert child.removeprefix("child ") == parent.removeprefix("parent ")


MEMORY = """
import resource
import torch
from native_engines import Subject, random_tokens
from steps import append, begin
from test_cpu_survival import RTN
from river_llm import RiverError

SIZES = {"max_position_embeddings": 8192, "head_dim": 128, "num_key_value_heads": 4}
subject = Subject("Llama", SIZES, RTN)
engine, untouched = subject.engine(), subject.engine()
for each in (engine, untouched):
    append(each, {begin(each)[0]: random_tokens(1100, seed=1)}, logit_rows=[])
prompt = random_tokens(6000, seed=2)
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
limits = resource.getrlimit(resource.RLIMIT_AS)
# a page of 64 tokens takes half a MiB
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (16 << 20), limits[1]))
try:
    append(engine, {0: prompt}, logit_rows=[])
    print("no error")
except (MemoryError, RiverError) as error:
    resource.setrlimit(resource.RLIMIT_AS, limits)
    print("error", engine.length(0))
more = {0: random_tokens(5, seed=3)}
print(torch.equal(append(engine, more).logits, append(untouched, more).logits))
"""


@linux_only
def test_memory_that_cannot_be_had_is_an_error_after_which_it_goes_on() -> None:
    assert run_python(MEMORY).splitlines() == ["error 1100", "True"]


@linux_only
def test_engines_leave_no_threads_and_no_memory(subject: Subject) -> None:
    before = len(list(THREADS.iterdir()))
    for _ in range(30):
        engine = subject.engine(threads=4)
        assert len(list(THREADS.iterdir())) == before + 3
        append(engine, {begin(engine)[0]: [5]})
        del engine
        assert len(list(THREADS.iterdir())) == before
    resident = []
    for _ in range(12):
        core = ready_core(threads=2)
        sequences = [0, *(core.add_sequence() for _ in range(399))]  # a page each: 6 MiB
        run_pass(core, tokens=[5] * 400, sequences=sequences)
        del core
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert resident[-1] - resident[1] < 24 << 20
