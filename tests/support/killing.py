"""SIGKILL before a given operation on files or the network, and digests of what is left."""

import hashlib
import os
import signal
import socket
from pathlib import Path

FILE_OPERATIONS = [(os, name) for name in "fsync replace rename link mkdir rmdir unlink open".split()]
NETWORK_OPERATIONS = [(socket.socket, "send"), (socket.socket, "sendmsg")]


class Killer:
    """Counts the calls that change something, and kills this process before the one of number `count`."""

    def __init__(self, count: float, operations: list[tuple[object, str]] = FILE_OPERATIONS):
        self.calls, self.count = 0, count
        self.originals = [(owner, name, getattr(owner, name)) for owner, name in operations]
        for owner, name, function in self.originals:
            setattr(owner, name, self.counted(function))

    def counted(self, function):
        def call(*arguments, **keys):
            self.calls += 1
            if self.calls == self.count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keys)

        return call

    def stop(self) -> None:
        """Count no longer, as in a child."""
        for owner, name, function in self.originals:
            setattr(owner, name, function)


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> digest of its bytes, of every file and empty folder below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
        if path.is_file() or not any(path.iterdir())
    }
