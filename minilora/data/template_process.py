"""Chat templates of strangers, rendered in a process of their own, which may be ended at any time.

    this process                                      the other process: jinja_sandbox.serve
    {"source": ..., "messages": [...], ...}   --->
                                              <---    {"text": "<s>[INST] Hi"} or {"error": "..."}

One process renders all conversations, a few tens of microseconds each. It starts with the first of them, sees
no variable of the environment, belongs to another session (so Ctrl-C in the terminal does not reach it), and
ends when the pipe is closed: when this process ends, in whatever way.

A template that exceeds a limit ends its process. It is not tried again: thousands of conversations would
wait for the limit each.
"""

import atexit
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from pathlib import Path

import jinja2
import markupsafe

from minilora.data import jinja_sandbox
from minilora.data.jinja_sandbox import SECONDS, TemplateError, decode, encode, longest_text

_PROGRAM = "import sys; sys.path += sys.argv[1:]; import jinja_sandbox; jinja_sandbox.serve()"
# The loader of programs reads these, where Python itself lies in an unusual place.
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


def check_apart(source: str) -> None:
    """Raise TemplateError if a template is not valid Jinja."""
    _renderer(os.getpid()).ask(source, {})


def render_apart(source: str, messages: Sequence[dict], now: datetime, **variables: object) -> str:
    """Return the text that a template writes, as `jinja_sandbox.render` does, within the limits.

    `now` is the time for templates that print the date. Raises TemplateError.
    """
    return _renderer(os.getpid()).ask(source, {"messages": messages, "now": now.isoformat(), **variables})


class _Renderer:
    """The process, its pipes, and the templates that it no longer renders."""

    def __init__(self):
        self.owner = os.getpid()
        self._process: subprocess.Popen | None = None
        self._source = ""  # of the template that the process has
        self._refused: dict[str, str] = {}  # source -> the limit that this template exceeds
        self._lock = threading.Lock()  # one request at a time

    def ask(self, source: str, request: dict) -> str:
        """Return the text for a request. Raises TemplateError."""
        with self._lock:
            if source in self._refused:
                raise TemplateError(self._refused[source])
            reply = self._exchange(source, request)
        if "error" in reply:
            raise TemplateError(reply["error"])
        return reply["text"]

    def _exchange(self, source: str, request: dict) -> dict:
        """Send a request and return the reply, or an error if the process has ended instead."""
        if self._process is not None and self._process.poll() is not None:  # someone has killed it
            self.stop()
        if self._process is None:
            self._start()
        try:
            line = encode(request if source == self._source else {"source": source, **request})
            self._process.stdin.write(line + b"\n")
            self._process.stdin.flush()
            # Only a template that has left the sandbox writes more.
            reply = self._process.stdout.readline(8 * longest_text(len(line)))
            self._source = source
            if reply.endswith(b"\n"):
                return decode(reply)
        except RecursionError:
            return {"error": "cannot read a conversation that is nested too deeply"}
        except (BrokenPipeError, ValueError):  # it has ended before, or its reply is no JSON
            pass
        except BaseException:  # Ctrl-C, for example: the reply to this request must not answer the next one
            self.stop()
            raise
        self._refused[source] = _reason(self.stop())
        return {"error": self._refused[source]}

    def _start(self) -> None:
        packages = (str(Path(package.__file__).parents[1]) for package in (jinja2, markupsafe))
        folders = dict.fromkeys([str(Path(jinja_sandbox.__file__).parent), *packages])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _PROGRAM, *folders],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,
            )
        except OSError as error:
            raise TemplateError(
                f"needs a process of its own, which cannot start: {error.strerror}"
            ) from error
        self._source = ""

    def stop(self) -> int:
        """End the process and return its exit code: negative, if a signal has ended it."""
        process, self._process = self._process, None
        if process is None or self.owner != os.getpid():  # a fork does not end its parent's process
            return 0
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # a request that could not be written
                pipe.close()
        return process.wait()


@lru_cache(maxsize=1)
def _renderer(process_id: int) -> _Renderer:
    """Return the renderer of this process. A fork needs another, because replies to it would mix."""
    renderer = _Renderer()
    atexit.register(renderer.stop)
    return renderer


def _reason(exit_code: int) -> str:
    """Return why the process has ended, to complete "the chat template NAME ..."."""
    if exit_code == -getattr(signal, "SIGPROF", 0):
        return f"computes for more than {SECONDS:g} seconds; choose another with --template"
    return f"has ended the process that renders it (exit code {exit_code}); choose another with --template"
