"""A script that is killed with SIGKILL, as a program: killed_scripts.py SCRIPT FOLDER ARGUMENTS.

The script begins with the files of FOLDER/old. In a copy of them, FOLDER/whole, it runs once to its end. In
another, FOLDER/killed, it is killed KILLS times, and then runs to its end. Each kill comes before a random
operation on files or the network, or, for the sweep, every second time after a random time, and the first
time when its trainer is about to save a checkpoint. Printed as JSON: what was there after each kill, how
orphans ended, and what both runs have left. For share.py, "there" is the bucket.
"""

import ctypes
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import train as trainer

from minilora.system.errors import until_end
from support.forked_trainer import start, status
from support.killing import FILE_OPERATIONS, NETWORK_OPERATIONS, Killer, tree

KILLS = 20
PR_SET_CHILD_SUBREAPER = 36
killer: Killer | None = None  # of this process, which is a child


class ForkedTrainer:
    """In place of subprocess.Popen in sweep.py: the trainer as a fork, which starts at once."""

    ends_sweep = False  # The trainer kills the sweep before its first checkpoint.

    def __init__(self, command: list[str], env: dict[str, str]):
        script = importlib.import_module(Path(command[1]).stem)
        self.pid = start(command[2:], Path("../trainer.log"), self.prepare, script, **env)

    def prepare(self) -> None:
        killer.stop()
        self.inherited = until_end.pop_all()  # What the sweep holds is not the trainer's to release.
        if self.ends_sweep:
            saving, sweep = trainer.save_checkpoint, os.getppid()
            trainer.save_checkpoint = lambda *arguments: (end(sweep), saving(*arguments))[1]

    def wait(self) -> int:
        return status(self.pid)

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def end(parent: int) -> None:
    """Kill this process's parent, and wait until the kernel has told this process."""
    if os.getppid() == parent:
        os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.001)


def orphans() -> list[int]:
    """Wait for every process that a killed one had started; how each ended."""
    ended = []
    while True:
        try:
            ended.append(os.waitstatus_to_exitcode(os.wait()[1]))
        except ChildProcessError:
            return ended


def objects():
    import boto3

    return boto3.resource("s3").Bucket("bucket").objects.all()


def bucket_tree() -> dict[str, str]:
    return {entry.key: entry.e_tag for entry in objects()}


def reset(place: Path, old: Path) -> None:
    """Begin again with the old files, and with what a kill has left of new ones."""
    for path in place.iterdir():
        if path.suffix != ".part":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(old, place, dirs_exist_ok=True)


class Runner:
    """Runs the script in a folder."""

    def __init__(self, name: str, arguments: list[str], folder: Path):
        self.script, self.arguments, self.folder = importlib.import_module(name), arguments, folder
        self.operations = NETWORK_OPERATIONS if name == "share" else FILE_OPERATIONS
        self.log = folder / "log"
        if name == "sweep":
            self.script.subprocess.Popen = ForkedTrainer
        for slow in {"share": ["s3fs"], "merge": ["minilora.formats.gguf"]}.get(name, []):
            importlib.import_module(slow)  # once, and not in every child

    def start(self, place: str, count: float = float("inf"), report: int | None = None) -> int:
        def prepare() -> None:
            global killer
            os.chdir(self.folder / place)
            killer = Killer(count, self.operations)
            if report is not None:
                main = self.script.main
                self.script.main = lambda: (main(), os.write(report, str(killer.calls).encode()))

        return start(self.arguments, self.log, prepare, self.script)

    def to_the_end(self, place: str) -> int:
        """Run, and return the number of operations that it took."""
        reading, writing = os.pipe()
        assert status(self.start(place, report=writing)) == 0, self.log.read_text()
        return int(os.read(reading, 20))

    def killed_before(self, count: int) -> int:
        return status(self.start("killed", count))

    def killed_by_its_trainer(self) -> int:
        ForkedTrainer.ends_sweep = True
        pid = self.start("killed")
        ForkedTrainer.ends_sweep = False
        return status(pid)

    def killed_after(self, seconds: float) -> int:
        pid = self.start("killed")
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return status(pid)


def main() -> None:
    name, folder, *arguments = sys.argv[1:]
    folder, chance = Path(folder), random.Random(0)
    old, killed = folder / "old", folder / "killed"
    look: Callable[[], dict[str, str]] = bucket_tree if name == "share" else lambda: tree(killed)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # Orphans become children of this process.
    runner = Runner(name, arguments, folder)
    for place in ("whole", "killed"):
        shutil.copytree(old, folder / place)
    began = time.monotonic()
    count = runner.to_the_end("whole")
    seconds = time.monotonic() - began
    if name == "share":
        whole = bucket_tree()
        objects().delete()
    else:
        whole = tree(folder / "whole")
    found, orphaned = [], []
    while len(found) < KILLS:
        if name == "sweep" and not found:
            ended = runner.killed_by_its_trainer()
        elif name == "sweep" and len(found) % 2:
            ended = runner.killed_after(chance.uniform(0, seconds))
        else:
            ended = runner.killed_before(chance.randint(1, count))
        orphaned += orphans()
        assert ended in (0, -signal.SIGKILL), runner.log.read_text()
        if ended:
            found.append(look())
        if not ended or name not in ("sweep", "share"):  # those two go on where they were killed
            reset(killed, old)
        if name == "share" and look() == whole:
            objects().delete()
    runner.to_the_end("killed")
    json.dump(dict(found=found, orphaned=orphaned, whole=whole, killed=look()), sys.stdout)


if __name__ == "__main__":
    main()
