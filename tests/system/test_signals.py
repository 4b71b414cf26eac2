"""Signals and errors of the system end a script in one line, after it has cleaned up."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.project import PROGRAM_ENVIRONMENT

from minilora.system.errors import run_script
from minilora.system.signals import Terminated, handled, terminating

# A script that writes an output, and waits in the middle of it.
WAITING = """
import sys, time
from pathlib import Path
from minilora.system.errors import run_script
from minilora.system.outputs import whole_output

def main():
    with whole_output("--output", Path(sys.argv[1])) as part:
        part.write_text("half")
        print("half", flush=True)
        time.sleep(60)

run_script(main)
"""


def program(code: str, *arguments: object, **options) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=PROGRAM_ENVIRONMENT)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **pipes | options)


@pytest.mark.parametrize(
    "number, said",
    [
        (signal.SIGINT, "interrupted\n"),
        (signal.SIGTERM, "ended by SIGTERM\n"),
        (signal.SIGHUP, "ended by SIGHUP\n"),
    ],
)
def test_a_signal_is_one_line_and_128_plus_its_number_and_leaves_nothing(tmp_path, number, said):
    with program(WAITING, tmp_path / "out") as process:
        assert process.stdout.readline() == "half\n" and list(tmp_path.iterdir())
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and err == said and not list(tmp_path.iterdir())


def test_a_hangup_that_nohup_ignores_does_not_end_a_script(tmp_path):
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731  as nohup does
    with program(WAITING, tmp_path / "out", preexec_fn=ignore) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        process.terminate()
        assert process.communicate(timeout=60)[1] == "ended by SIGTERM\n"


def test_the_processes_of_torchrun_that_do_not_write_end_at_once(tmp_path):
    with program(WAITING, tmp_path / "out", env=PROGRAM_ENVIRONMENT | {"RANK": "1"}) as process:
        process.stdout.readline()
        process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM


def test_handlers_are_restored_and_a_thread_sets_none():
    numbers = [signal.SIGINT, *terminating()]
    before = [signal.getsignal(number) for number in numbers]
    inside = []

    def use():
        with handled(dict.fromkeys(numbers, lambda *_: None)):
            inside.append([signal.getsignal(number) for number in numbers])

    use()
    assert [signal.getsignal(number) for number in numbers] == before != inside[0]
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert inside[1] == before


def out_of_memory(kind: str) -> BaseException:
    import torch

    if kind == "CPU":
        try:
            torch.empty(10**15)
        except RuntimeError as error:
            return error
    if kind == "GPU":
        return torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has\n a total ..."
        )
    return MemoryError()


@pytest.mark.parametrize(
    "error, said",
    [
        (lambda: OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (lambda: OSError(errno.ENOSPC, "No space left on device", "in", None, "out"), "out: No space left on device"),
        (lambda: OSError("a library's own\nwords"), "a library's own words"),
        (lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer"),
        (lambda: OSError(errno.EMFILE, "Too many open files", "a"), "a: too many open files; raise the limit, such as `ulimit -n 4096`"),
        (lambda: out_of_memory("Python"), "out of memory; see docs/out_of_memory.md"),
        (lambda: out_of_memory("CPU"), "out of memory, 4000000000000000 bytes were asked for; see docs/out_of_memory.md"),
        (lambda: out_of_memory("GPU"), "the GPU is out of memory, 20.00 GiB were asked for; see docs/out_of_memory.md"),
    ],
    ids="EIO rename text reset EMFILE memory CPU GPU".split(),
)  # fmt: skip
def test_an_error_of_the_system_is_one_line_and_2(error, said, capsys):
    def main():
        raise error()

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == 2 and capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize("error", [RecursionError("maximum recursion depth exceeded"), RuntimeError("a bug")])
def test_other_runtime_errors_are_bugs_and_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(RuntimeError):
        run_script(main)


def test_output_on_a_full_disk_is_one_line():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    code = "from minilora.system.errors import run_script; run_script(lambda: print('x'))"
    with open("/dev/full", "w") as full, program(code, stdout=full) as process:
        assert process.communicate(timeout=60)[1] == "error: No space left on device\n"
    assert process.returncode == 2


# ---- a child ends with its parent ------------------------------------------------------------------------------

PARENT = """
import subprocess, sys, time
from minilora.system.children import tied_environment
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=tied_environment())
print("started", flush=True)
time.sleep(float(sys.argv[2]))
"""
CHILD = """
import os, sys, time
from minilora.system.errors import run_script
{system}
time.sleep({starting})
def main():
    print(os.getpid(), flush=True)
    time.sleep(60)
run_script(main)
"""


@pytest.mark.parametrize("system", ["", "sys.platform = 'darwin'"], ids=["Linux", "another system"])
@pytest.mark.parametrize("starting", [0, 1], ids=["a running child", "a child that is still starting"])
def test_a_child_ends_when_its_parent_is_killed(system, starting):
    with program(PARENT, CHILD.format(system=system, starting=starting), 60) as parent:
        for _ in range(1 if starting else 2):
            parent.stdout.readline()
        parent.kill()
        # The child holds the other ends of both pipes; they close when it ends.
        assert parent.communicate(timeout=30)[1] == "ended by SIGTERM\n"


def test_a_script_without_such_a_parent_outlives_it():
    code = (
        PARENT.replace("tied_environment()", "None")
        .replace("time.sleep(float", "os._exit(int")
        .replace("import sub", "import os, sub")
    )
    with program(code, CHILD.format(system="", starting=0), 0) as parent:
        child, _ = sorted(parent.stdout.readline() for _ in range(2))  # its number, "started"
        parent.wait()
        time.sleep(0.3)
        os.kill(int(child), signal.SIGKILL)  # raises if it is gone


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted\n"), (signal.SIGTERM, 143, "ended by SIGTERM\n")],
)
def test_a_signal_that_a_library_turns_into_an_error_of_its_own_is_no_other_error(number, code, said, capsys):
    """As safetensors does while it reads a tensor: the error does not say what it came from."""

    def main():
        with contextlib.suppress(KeyboardInterrupt, Terminated):
            os.kill(os.getpid(), number)
            time.sleep(1)
        raise ValueError("could not determine the shape")

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == code and capsys.readouterr().err == said


def test_a_ctrl_c_that_was_answered_long_ago_is_no_reason(monkeypatch):
    def main():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_script(main)
    with pytest.raises(ValueError, match="a bug"):  # nor is one of an earlier script in this process
        run_script(lambda: int("a bug"))


@pytest.mark.parametrize(
    "error, code, said",
    [(KeyboardInterrupt(), 130, "interrupted"), (Terminated(15), 143, "ended by SIGTERM")],
)
def test_a_signal_that_falls_into_the_definition_of_a_class_is_no_other_error(error, code, said, capsys):
    class Interrupted:
        def __set_name__(self, owner, name):  # Python raises a RuntimeError in place of its exception
            raise error

    def main():
        class Imported:
            attribute = Interrupted()

        return Imported

    with pytest.raises(SystemExit) as end:
        run_script(main)
    assert end.value.code == code and capsys.readouterr().err == said + "\n"
