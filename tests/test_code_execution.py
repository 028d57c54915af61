"""Programs that mean harm, each against the limit that holds it, at every level of confinement.

All of them are bounded by another limit too, so that a limit that fails costs seconds and no more.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from river_llm import ConfigError, RiverError
from river_llm.evaluation import code_execution
from river_llm.evaluation.code_execution import (
    Confinement,
    Limits,
    ProgramResult,
    check_confinement,
    run_program,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs run on Linux only")

LEVELS = {
    "all that the system allows": Confinement(),
    "without namespaces": Confinement(namespaces=False),
    "limits alone": Confinement(namespaces=False, landlock=False, syscall_filter=False),
}
SHORT = Limits(seconds=3, memory_bytes=1 << 28, processes=6, file_bytes=1 << 20)

at_every_level = pytest.mark.parametrize("level", LEVELS)


def run(
    program: str, level: str = "all that the system allows", limits: Limits = SHORT
) -> ProgramResult:
    return run_program(textwrap.dedent(program), limits, LEVELS[level])


def is_held(result: ProgramResult, what: str, level: str) -> bool:
    """Whether something was in force against it; skips the test where nothing was."""
    if result.isolation[what] == "none":
        if level == "all that the system allows" and _allows_namespaces():
            return False
        pytest.skip(f"nothing confines {what} here at this level")
    return True


def _allows_namespaces() -> bool:
    command = ["unshare", "--net", "--pid", "--fork", "true"]
    if os.getuid() != 0:
        command.insert(1, "--user")
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


def processes_with(mark: str) -> list[int]:
    """Ids of the processes whose command line has this mark."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if mark.encode() in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(int(process))
    return found


class TestVerdicts:
    def test_a_program_that_runs_to_its_end_has_passed(self) -> None:
        result = run("import math, hashlib, re, typing, collections\nprint(math.floor(2.5))")
        assert result.passed
        assert result.output == "2\n"

    @pytest.mark.parametrize(
        "program",
        [
            "assert 1 + 1 == 3",
            "raise SystemExit(0)",
            "import sys; sys.exit()",
            "import os; os._exit(0)",
            "def f(:",
            "import no_such_module",
            "print('\\ud800')",
            "x = '\udcff'",
        ],
    )
    def test_any_other_end_is_a_failure(self, program: str) -> None:
        assert run(program).outcome == "failed"

    def test_an_error_can_be_read(self) -> None:
        result = run("def check(f):\n    assert f(2) == 4, 'wrong square'\ncheck(lambda x: x)")
        assert "AssertionError: wrong square" in result.output
        assert 'File "program", line 2' in result.output

    def test_a_signal_is_told_apart(self) -> None:
        assert run("import os; os.abort()").outcome == "killed"

    def test_an_empty_program_passes(self) -> None:
        assert run("").passed

    def test_much_output_is_cut_to_its_end(self) -> None:
        result = run("for i in range(60_000):\n    print(i)")
        assert result.passed
        assert len(result.output) == 1 << 14
        assert result.output.endswith("59999\n")


class TestSurroundings:
    @at_every_level
    def test_the_environment_is_empty(self, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RIVER_LLM_SECRET", "a token")
        program = """
            import os
            assert set(os.environ) <= {"LC_CTYPE"}, os.environ  # which Python sets for itself
            assert os.listdir(".") == ["program.py"]
            import sys
            assert sys.stdin.read() == ""
            assert not any("site-packages" in path for path in sys.path)
        """
        result = run(program, level)
        assert result.passed, result.output

    @at_every_level
    def test_no_file_of_the_caller_is_open(self, level: str, tmp_path: Path) -> None:
        program = """
            import os
            for number in range(3, 64):
                try:
                    os.fstat(number)
                except OSError:
                    continue
                raise AssertionError(number)
        """
        with (tmp_path / "file").open("w") as file:
            os.set_inheritable(file.fileno(), True)
            result = run(program, level)
        assert result.passed, result.output

    @at_every_level
    def test_the_scratch_directory_is_gone_afterwards(self, level: str) -> None:
        result = run("import os\nopen('mine', 'w').write('x')\nprint(os.getcwd())", level)
        assert result.passed, result.output
        assert not Path(result.output.strip(), "mine").exists()


class TestTime:
    @at_every_level
    def test_an_endless_loop_is_ended(self, level: str) -> None:
        start = time.monotonic()
        result = run_program("while True: pass", Limits(seconds=0.5), LEVELS[level])
        assert result.outcome == "timeout"
        assert time.monotonic() - start < 10

    @at_every_level
    def test_so_is_one_that_ignores_signals_and_sleeps(self, level: str) -> None:
        program = """
            import signal, time
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGXCPU, signal.SIGALRM):
                signal.signal(number, signal.SIG_IGN)
            while True:
                try:
                    time.sleep(1)
                except BaseException:
                    pass
        """
        limits = Limits(seconds=0.5)
        result = run_program(textwrap.dedent(program), limits, LEVELS[level])
        assert result.outcome == "timeout"


class TestMemory:
    @at_every_level
    def test_one_large_block_is_refused(self, level: str) -> None:
        result = run("x = bytearray(1 << 30)", level)
        assert result.outcome == "failed"
        assert "MemoryError" in result.output

    @at_every_level
    def test_a_program_that_only_grows_is_ended(self, level: str) -> None:
        result = run("x = []\nwhile True:\n    x.append(bytearray(1 << 20))", level)
        assert result.outcome in ("failed", "memory", "killed")

    @at_every_level
    def test_several_processes_hold_no_more_than_one(self, level: str) -> None:
        program = """
            import os, time
            for _ in range(4):
                if os.fork() == 0:
                    x = bytearray(os.urandom(1 << 10) * (150 << 10))
                    time.sleep(30)
            time.sleep(30)
        """
        # on a busy machine it takes its time until they hold as much
        assert run(program, level, replace(SHORT, seconds=25)).outcome == "memory"


class TestProcesses:
    @at_every_level
    def test_a_fork_bomb_ends_without_a_trace(self, level: str) -> None:
        # bounded to 300 processes, should no limit hold it
        program = """
            import os, sys, time
            made = 0
            try:
                for _ in range(300):
                    if os.fork() == 0:
                        time.sleep(20)
                        os._exit(0)
                    made += 1
            except OSError:
                print("refused after", made)
                sys.stdout.flush()
                time.sleep(20)
            time.sleep(20)
        """
        before = len(os.listdir("/proc"))
        result = run(program, level)
        assert result.outcome in ("timeout", "processes")
        if result.outcome == "timeout":
            assert "refused after" in result.output
            assert int(result.output.split()[-1]) < SHORT.processes
        assert len(os.listdir("/proc")) < before + 100

    def test_the_kernel_itself_holds_the_number_for_root_too(self) -> None:
        program = """
            import os
            children = 0
            try:
                for _ in range(50):
                    if os.fork() == 0:
                        import time
                        time.sleep(5)
                        os._exit(0)
                    children += 1
            except BlockingIOError:
                pass
            assert children < 6, children
            print(children)
        """
        if not _allows_namespaces():
            pytest.skip("no namespaces here")
        result = run(program)
        assert result.passed, result.output

    @at_every_level
    def test_threads_count_too(self, level: str) -> None:
        program = """
            import threading, time
            for _ in range(50):
                threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        """
        result = run(program, level)
        if result.passed:
            pytest.skip("the kernel doesn't count root's threads, and namespaces are off")
        assert "can't start new thread" in result.output

    @at_every_level
    def test_one_that_detaches_itself_is_found(self, level: str) -> None:
        mark = f"river-llm-test-{os.getpid()}-{time.monotonic_ns()}"
        program = f"""
            import os, sys, time
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.execv(sys.executable, [sys.executable, "-I", "-S", "-c",
                             "import time; time.sleep(60)", "{mark}"])
                os._exit(0)
            time.sleep(0.5)
        """
        result = run(program, level)
        assert result.passed, result.output
        assert processes_with(mark) == []

    @at_every_level
    def test_the_parent_cannot_be_killed(self, level: str) -> None:
        # a stand-in for the caller: of the same user, and not in the sandbox
        victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        program = f"""
            import os, signal
            for process in ({victim.pid}, os.getppid()):
                try:
                    os.kill(process, signal.SIGTERM)
                except OSError:
                    pass
        """
        try:
            if level == "limits alone":
                pytest.skip("nothing holds a program of the same user from its processes")
            result = run(program, level)
            assert is_held(result, "processes", level)
            time.sleep(0.1)
            assert victim.poll() is None
        finally:
            victim.kill()
            victim.wait()

    @at_every_level
    def test_killing_its_guard_brings_no_success(self, level: str) -> None:
        program = "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n"
        result = run(program, level)
        assert not result.passed
        assert result.outcome in ("failed", "killed")

    def test_none_is_left_when_the_caller_is_killed(self) -> None:
        mark = f"river-llm-test-{os.getpid()}-{time.monotonic_ns()}"
        caller = start_caller(mark)
        wait_for(lambda: processes_with(mark))
        caller.kill()
        caller.wait()
        wait_for(lambda: not processes_with(mark))

    def test_none_is_left_after_ctrl_c(self) -> None:
        mark = f"river-llm-test-{os.getpid()}-{time.monotonic_ns()}"
        caller = start_caller(mark)
        wait_for(lambda: processes_with(mark))
        caller.send_signal(signal.SIGINT)
        caller.wait(timeout=30)
        assert processes_with(mark) == []


def start_caller(mark: str) -> subprocess.Popen[bytes]:
    """A process that runs a program, which can be found by its mark."""
    program = (
        "import os, sys\n"
        f"os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', '{mark}'])"
    )
    caller = (
        "from river_llm.evaluation.code_execution import Limits, run_program\n"
        f"run_program({program!r}, Limits(seconds=60))"
    )
    return subprocess.Popen([sys.executable, "-c", caller], stderr=subprocess.DEVNULL)


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


class TestFiles:
    @at_every_level
    def test_nothing_outside_is_written(self, level: str, tmp_path: Path) -> None:
        target = tmp_path / "outside"
        existing = tmp_path / "existing"
        existing.write_text("mine")
        tmp_path.chmod(0o777)
        existing.chmod(0o666)
        program = f"""
            import os
            for path in ({str(target)!r}, {str(existing)!r}, os.path.expanduser("~/x-river"),
                         "/usr/x-river", "/tmp/x-river", "../x-river"):
                try:
                    open(path, "w").write("x")
                except OSError:
                    continue
                print("wrote", path)
            try:
                os.unlink({str(existing)!r})
            except OSError:
                pass
        """
        if level == "limits alone":
            pytest.skip("nothing but permissions holds a program from files")
        result = run(program, level)
        assert is_held(result, "files", level)
        assert not target.exists()
        assert existing.read_text() == "mine"
        assert "/usr" not in result.output

    @at_every_level
    def test_nothing_of_the_caller_is_read(self, level: str, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_text("a token")
        secret.chmod(0o644)
        program = f"print(open({str(secret)!r}).read())"
        if level == "limits alone":
            pytest.skip("nothing but permissions holds a program from files")
        result = run(program, level)
        assert is_held(result, "files", level)
        assert result.outcome == "failed"
        assert "a token" not in result.output

    @at_every_level
    def test_one_large_file_is_refused(self, level: str) -> None:
        result = run("open('big', 'wb').write(bytes(8 << 20))", level)
        assert result.outcome in ("failed", "killed", "files")

    @at_every_level
    def test_many_small_files_are_ended(self, level: str) -> None:
        program = """
            import time
            for i in range(64):
                open(f"file{i}", "wb").write(bytes(1 << 17))
            time.sleep(1)
        """
        result = run(program, level)
        assert result.outcome in ("failed", "files")

    @at_every_level
    def test_open_files_are_few(self, level: str) -> None:
        result = run("files = [open('program.py') for _ in range(500)]", level)
        assert result.outcome == "failed"
        assert "Too many open files" in result.output


class TestNetwork:
    @at_every_level
    def test_no_socket_reaches_the_host(self, level: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.2)
            port = server.getsockname()[1]
            program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n"
            result = run(program, level)
            if level == "limits alone":
                assert result.isolation["network"] == "none"  # and it says so
                return
            assert is_held(result, "network", level)
            assert result.outcome == "failed"
            with pytest.raises(TimeoutError):
                server.accept()

    @at_every_level
    def test_no_packet_and_no_abstract_socket_either(self, level: str) -> None:
        name = f"\0river-llm-{os.getpid()}"
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as local,
        ):
            receiver.bind(("127.0.0.1", 0))
            receiver.settimeout(0.2)
            local.bind(name)
            local.settimeout(0.2)
            program = f"""
                import socket
                for family, address in ((socket.AF_INET, {receiver.getsockname()!r}),
                                        (socket.AF_UNIX, {name!r})):
                    try:
                        socket.socket(family, socket.SOCK_DGRAM).sendto(b"hello", address)
                    except OSError:
                        pass
            """
            if level == "limits alone":
                pytest.skip("nothing holds a program from sockets")
            result = run(program, level)
            assert is_held(result, "network", level)
            for end in (receiver, local):
                with pytest.raises(TimeoutError):
                    end.recv(16)


class TestErrors:
    @pytest.mark.parametrize("wrong", [{"seconds": 0}, {"memory_bytes": -1}, {"processes": 0}])
    def test_a_limit_of_nothing_is_refused(self, wrong: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match="give more than 0"):
            Limits(**wrong)

    def test_other_systems_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(code_execution.sys, "platform", "darwin")
        with pytest.raises(RiverError, match="Linux only"):
            run_program("")

    def test_a_supervisor_that_fails_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(code_execution, "_START", "raise OSError('no such luck')")
        with pytest.raises(RiverError, match=r"can't be confined here: .*no such luck"):
            check_confinement()

    def test_what_confines_is_told(self) -> None:
        assert set(check_confinement()) == {"files", "network", "processes"}
