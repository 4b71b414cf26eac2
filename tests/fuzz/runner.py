"""Run cases: each drives a script in a process of its own, on fresh copies of the good files.

Starting an interpreter with torch takes seconds. So this process imports every script once and computes
nothing; a pool of its children takes the cases one by one, and forks again for each. A case gets

    a folder, a home and a folder for temporary files of its own, and no variables but its own
    2 GiB of memory, a wall clock's limit, and no network: an attempt to connect is refused and noted

Memory is limited with RLIMIT_DATA, the bytes that a process may write to; torch's reserved addresses make
RLIMIT_AS useless. The peak that is reported is the resident one, with the imported libraries.
"""

import contextlib
import importlib
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from support.project import ROOT

from fuzz import place
from fuzz.case import Case
from fuzz.judge import LINE_LENGTH, Verdict, faults_of_end, faults_of_files, faults_of_text, listing
from minilora.system.errors import run_script

SCRIPTS = (
    "train train_together prepare evaluate chat serve merge memory compare sweep share lint_adapter convert combine "
    "extract experiments"
).split()
DEVELOPERS_SCRIPTS = "verify bench bench_serving pretrain pictures keys matrix notebooks check_gpu".split()
IMPORTED_LATER = (  # by the scripts while they run
    "fsspec huggingface_hub.errors huggingface_hub.hf_api matplotlib.pyplot minilora.serving.server "
    "pyarrow.parquet torch._dynamo"
).split()
SECONDS, BYTES = 10, 2 << 30
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


def run_cases(cases: list[Case], workers: int, seconds: float = SECONDS) -> Iterator[Verdict]:
    """The verdict of every case, as they come."""
    import_scripts()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as temporary:
        good = make_place(Path(temporary, "place"))
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, fork, _remember, (cases, good, Path(temporary), seconds)) as pool:
            runs = [pool.submit(_run_numbered, number) for number in range(len(cases))]
            yield from (run.result() for run in as_completed(runs))


def import_scripts() -> None:
    """Import every script once, before anything is forked. The hub's client reads its variables here."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_HOME="/nowhere")
    for name in SCRIPTS + DEVELOPERS_SCRIPTS + IMPORTED_LATER:
        importlib.import_module(name)


_shared: tuple = ()


def _remember(*shared: object) -> None:
    """Keep in a worker what it was forked with: cases hold functions, which cannot be sent to it."""
    global _shared
    _shared = shared


def _run_numbered(number: int) -> Verdict:
    cases, good, temporary, seconds = _shared
    return run_case(cases[number], good, temporary / str(number), seconds)


def make_place(folder: Path) -> Path:
    """The good files of `place.py`, in a new folder. Its programs run in children of this process."""
    good = folder / "good"
    for path in (good, folder / "home", folder / "tmp"):
        path.mkdir(parents=True)
    train, prepare = (importlib.import_module(name).main for name in ("train", "prepare"))
    for step in (
        place.make_files,
        lambda: place.make_run(train),
        lambda: place.make_prepared(prepare),
        place.make_adapter,
    ):
        pid = start(step, good, folder / "log", _environment(folder))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0, (folder / "log").read_text()
    return good


# ---- one case ----


def run_case(case: Case, good: Path, folder: Path, seconds: float = SECONDS) -> Verdict:
    """Run a case in `folder`, which is made for it and removed afterwards."""
    work, log, errors = folder / "work", folder / "stdout", folder / "stderr"
    for path in (folder, folder / "home", folder / "tmp"):
        path.mkdir()
    shutil.copytree(good, work, symlinks=True)
    _in_folder(work, case.change)
    before = listing(folder)
    main = importlib.import_module(case.command[0]).main
    began = time.monotonic()
    pid = start(
        lambda: _run_script(case, main), work, log, _environment(folder) | case.environment, errors, case
    )
    ended, usage = wait(pid, seconds if case.code else 6 * seconds)  # a good sweep starts a whole trainer
    verdict = Verdict(case.kind, case.name, "", time.monotonic() - began, usage.ru_maxrss * 1024)
    verdict.faults += [] if ended is not None else [f"hangs: killed after {seconds:g} s"]
    verdict.faults += ["leaves a process running"] if _end_group(pid) else []
    out, err = (path.read_text(encoding=case.encoding, errors="replace") for path in (log, errors))
    verdict.line = (err.strip().splitlines() or [""])[-1][:LINE_LENGTH]
    verdict.faults += [] if ended is None else faults_of_end(case, ended, err)
    verdict.faults += faults_of_text(case, out, err)
    verdict.faults += [] if case.code == 0 else faults_of_files(before, listing(folder))
    if verdict.peak > BYTES:
        verdict.faults.append(f"takes {verdict.peak / 2**30:.1f} GiB")
    if connections := (folder / "network").read_text() if (folder / "network").exists() else "":
        verdict.faults.append(f"connects: {connections.strip()[:200]}")
    shutil.rmtree(folder, ignore_errors=True)
    return verdict


def _in_folder(folder: Path, change: Callable[[], object]) -> None:
    here = os.getcwd()
    os.chdir(folder)
    try:
        change()
    finally:
        os.chdir(here)


def _environment(folder: Path) -> dict[str, str]:
    """All variables of a case."""
    paths = [str(path) for path in (ROOT, ROOT / "scripts", ROOT / "tests")]
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join(paths),  # sweep.py starts the trainer as a program
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "XDG_CACHE_HOME": str(folder.parent / "cache"),  # the C library is compiled once for all
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(folder.parent / "cache"),
        "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", tempfile.gettempdir()),
    }


def start(
    function: Callable[[], object],
    folder: Path,
    out: Path,
    environment: dict[str, str],
    err: Path | None = None,
    case: Case | None = None,
) -> int:
    """Call a function in a child that looks like a program just started. Returns its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()  # its children are killed with it
        os.umask(0o022)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
        _redirect(out, err or out, case.encoding if case else "utf-8")
        torch.set_num_threads(1)
        if case is not None:
            _limit(case, out.parent / "network")
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
    _flush_and_exit(code)


def _run_script(case: Case, main: Callable[[], None]) -> None:
    sys.argv = [f"{case.command[0]}.py", *case.command[1:]]
    run_script(main)


def _redirect(out: Path, err: Path, encoding: str) -> None:
    """Standard input, output and error as a program has them, from and to files."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, path, mode in ((0, os.devnull, os.O_RDONLY), (1, out, flags), (2, err, flags)):
        descriptor = os.open(path, mode)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding=encoding)
    sys.stdout = _writer(1, encoding=encoding, errors="strict")
    sys.stderr = _writer(2, encoding=encoding, errors="backslashreplace", line_buffering=True)


def _writer(descriptor: int, **settings: object) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(io.FileIO(descriptor, "w", closefd=False)), **settings)


def _limit(case: Case, network: Path) -> None:
    """The limits of a case, and a watch over what would leave this machine."""
    note = os.open(network, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def watch(event: str, arguments: tuple) -> None:
        if event in NETWORK and not isinstance(
            arguments[-1], str | bytes
        ):  # a text: a socket of this machine
            os.write(note, f"{event} {arguments[1:]}\n".encode())
            raise PermissionError(f"no network: {event}")

    sys.addaudithook(watch)
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if case.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case.file_size, case.file_size))
    if case.descriptors is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (case.descriptors, case.descriptors))


def _flush_and_exit(code: int) -> None:
    """End without the exit handlers of the parent; with code 120, as Python does, if this cannot be written."""
    with contextlib.suppress(BaseException):
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            code = 120
            traceback.print_exc()
    os._exit(code)


def wait(pid: int, seconds: float) -> tuple[int | None, resource.struct_rusage]:
    """The exit code of a child, or None if it was killed at the end of its time; and what it used."""
    deadline, ended = time.monotonic() + seconds, 0
    while not ended and time.monotonic() < deadline:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        time.sleep(0 if ended else 0.005)
    if ended:
        return os.waitstatus_to_exitcode(status), usage
    os.killpg(pid, signal.SIGKILL)
    return None, os.wait4(pid, 0)[2]


def _end_group(pid: int) -> bool:
    """End the processes that a child left, and return whether there was one a second after its end."""
    deadline = time.monotonic() + 1
    try:
        while time.monotonic() < deadline:
            os.killpg(pid, 0)
            time.sleep(0.02)
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
