"""Continuous batching: requests join the batch when a slot is free, and leave it when their answer ends.

    submit -> waiting (at most `most_waiting`) -> a slot: its prompt is read -> one token a step -> gone

A step reads one more token of every running text, each with its own adapter (`minilora.mixed`), its own
position and its own random numbers. Waiting requests join in between, in the order in which they came: the
first one that lacks a slot or a place for its adapter holds up those behind it, so nobody waits for ever.
Orca (Yu et al. 2022, section 3.2) calls it iteration-level scheduling; S-LoRA (arXiv:2311.03285, section 4)
batches adapters so.

All of it happens in one thread, which alone touches the model. Other threads submit requests, cancel them,
and hand over functions that change the adapters. An error fails the requests that it met, and no others.
"""

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.inference.store import AdapterStore
from minilora.mixed import Mixture
from minilora.model import CausalLM
from minilora.serving.answers import Answer, Piece, Request
from minilora.serving.sampling import Sampler, next_tokens
from minilora.serving.slots import SlotCache
from minilora.system.errors import UserError, one_line

PROMPT_TOKENS = 2048  # that are read between two steps at most, padding included; or one prompt
STOPS = "the server stops"


class QueueFull(Exception):
    """As many requests wait as may wait."""


class Stopped(Exception):
    """The engine takes no more requests."""


class Row(NamedTuple):
    """A running text: row i of the batch is in slot i."""

    request: Request
    answer: Answer
    sampler: Sampler


class Job(NamedTuple):
    """A function that the engine's thread calls between two steps, once no request has the adapter."""

    function: Callable[[], object]
    adapter: str | None
    future: Future


@dataclass
class Counts:
    """What the engine has done since it began."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    errors: int = 0  # requests that met one


class Engine:
    """See the module's docstring. `start` begins the thread; tests call `step` themselves."""

    def __init__(self, model: CausalLM, store: AdapterStore, cache: SlotCache, most_waiting: int = 256):
        self.model, self.store, self.cache, self.most_waiting = model, store, cache, most_waiting
        self.waiting: deque[Request] = deque()
        self.rows: list[Row] = []
        self.jobs: list[Job] = []
        self.counts = Counts()
        self._mixture: Mixture | None = None
        self._chosen: list[str | None] = []  # adapters of the rows in the mixture
        self._changed = threading.Condition()
        self._stop_at: float | None = None  # time.monotonic() from which on nothing runs
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ---- from any thread ----

    def submit(self, request: Request) -> None:
        """Let a request wait for its answer. Raises QueueFull, and Stopped."""
        with self._changed:
            if self._stop_at is not None:
                raise Stopped
            if len(self.waiting) >= self.most_waiting:
                raise QueueFull
            self.waiting.append(request)
            self._changed.notify()

    def call(self, function: Callable[[], object], adapter: str | None = None) -> Future:
        """Let the engine's thread call a function between two steps; once no request has the `adapter`."""
        job = Job(function, adapter, Future())
        with self._changed:
            if self._stop_at is not None:
                raise Stopped
            self.jobs.append(job)
            self._changed.notify()
        return job.future

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float = 0.0, wait: bool = True) -> int:
        """Take no more requests; finish the others within so many seconds, then fail them. Waits for that.

        A second call never gives them longer. Returns how many answers were wanted when it was called.
        """
        with self._changed:
            self._stop_at = min(self._stop_at or math.inf, time.monotonic() + seconds)
            wanted = len(self.rows) + len(self.waiting)
            self._changed.notify()
        if wait and self._thread.ident is not None:
            self._thread.join()
        return wanted

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._stop_at is None

    # ---- the engine's thread ----

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self.step()
            except Exception as error:  # a mistake in this file: what there is fails, what comes does not
                self._fail(self._drop_all(), error)
        for request in self._drop_all():
            _tell(request, Piece("", 0, error=STOPS))
        for job in self.jobs:
            job.future.set_exception(Stopped())
        self._unmix()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do. Returns whether to go on."""
        with self._changed:
            while not (self.waiting or self.rows or self.jobs or self._stop_at):
                self._changed.wait()
            has_work = bool(self.waiting or self.rows or self.jobs)
            return self._stop_at is None or (has_work and time.monotonic() < self._stop_at)

    @torch.no_grad()
    def step(self) -> None:
        """Drop cancelled requests, change adapters, let requests join, and read a token of every text."""
        self._drop_cancelled()
        self._run_jobs()
        joining = self._admit()
        if joining:
            self._guarded(self._read_prompts, joining)
        if self.rows:
            self._guarded(self._read_tokens, [row.request for row in self.rows])
        self.counts.steps += 1

    def _drop_all(self) -> list[Request]:
        with self._changed:
            requests = [row.request for row in self.rows] + [*self.waiting]
            self.waiting.clear()
        self.rows, self.cache.lengths = [], []
        return requests

    def _drop_cancelled(self) -> None:
        for i in reversed(range(len(self.rows))):
            if self.rows[i].request.cancelled:
                _tell(self._remove(i).request, Piece("", 0, "cancelled"))
        with self._changed:
            gone = [request for request in self.waiting if request.cancelled]
            for request in gone:
                self.waiting.remove(request)
        for request in gone:
            _tell(request, Piece("", 0, "cancelled"))

    def _run_jobs(self) -> None:
        with self._changed:
            used = {row.request.adapter for row in self.rows} | {request.adapter for request in self.waiting}
            ready = [job for job in self.jobs if job.adapter is None or job.adapter not in used]
            self.jobs = [job for job in self.jobs if job not in ready]
        for job in ready:
            if not job.future.set_running_or_notify_cancel():
                continue
            self._unmix()
            try:
                job.future.set_result(job.function())
            except Exception as error:
                job.future.set_exception(error)

    def _admit(self) -> list[Request]:
        """Take the requests off the queue that join now, their adapters on the device."""
        joining: list[Request] = []
        adapters, longest = {row.request.adapter for row in self.rows}, 0
        while len(self.rows) + len(joining) < self.cache.slots:
            with self._changed:
                request = self.waiting[0] if self.waiting else None
                if request is None:
                    break
                longest = max(longest, len(request.prompt))
                fits = len({*adapters, request.adapter} - {None}) <= self.store.on_device
                if not fits or (joining and longest * (len(joining) + 1) > PROMPT_TOKENS):
                    break
                self.waiting.popleft()
            if self._bring(request, adapters):
                adapters.add(request.adapter)
                joining.append(request)
        return joining

    def _bring(self, request: Request, others: set[str | None]) -> bool:
        """Bring a request's adapter onto the device beside others. If that fails, so does the request."""
        names = [*others, request.adapter]
        try:
            if self.store.changes(names):
                self._unmix()
                self.store.use(names)
                self.model.eval()
            else:
                self.store.use([request.adapter])  # for the order in which adapters make room
        except Exception as error:
            self._fail([request], error)
            return False
        return True

    def _read_prompts(self, joining: Sequence[Request]) -> None:
        """Read the prompts of requests that join, and tell the first token of each."""
        self._mix([request.adapter for request in joining])
        logits = self.cache.read_prompts(self.model, [request.prompt for request in joining])
        for request in joining:
            room = self.cache.max_length - len(request.prompt)
            answer = Answer(request, min(request.settings.max_new_tokens, room))
            sampler = Sampler(request.settings, request.prompt, logits.shape[1], logits.device)
            self.rows.append(Row(request, answer, sampler))
        self.counts.prompt_tokens += sum(len(request.prompt) for request in joining)
        self._extend(self.rows[-len(joining) :], logits)

    def _read_tokens(self, running: Sequence[Request]) -> None:
        """Read the last token of every text, and tell the next one."""
        self._mix([request.adapter for request in running])
        logits = self.cache.read_tokens(self.model, [row.answer.tokens[-1] for row in self.rows])
        self._extend(self.rows, logits)

    def _extend(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Choose a token for each row, logits (rows, V), and tell it. Answers that end leave."""
        tokens = next_tokens(logits, [row.sampler for row in rows])
        self.counts.generation_tokens += len(tokens)
        for row, token in zip(list(rows), tokens, strict=True):
            try:
                piece = row.answer.add(token)
            except Exception as error:  # an adapter may bring a tokenizer that is broken
                self._remove(self.rows.index(row))
                self._fail([row.request], error)
                continue
            if piece.is_last:
                self._remove(self.rows.index(row))
            _tell(row.request, piece)

    def _guarded(self, read: Callable[[Sequence[Request]], None], requests: Sequence[Request]) -> None:
        """Read for some requests. An error ends all of them, and nothing else."""
        try:
            read(requests)
        except Exception as error:
            for i in reversed(range(len(self.rows))):
                if self.rows[i].request in requests:
                    self._remove(i)
            del self.cache.lengths[len(self.rows) :]  # of prompts that were read, but have no row yet
            self._unmix()
            self._fail(requests, error)

    def _fail(self, requests: Sequence[Request], error: Exception) -> None:
        self.counts.errors += len(requests)
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        print(f"error: {one_line(reason)}; requests that met it: {len(requests)}", file=sys.stderr)
        for request in requests:
            _tell(request, Piece("", 0, error=one_line(reason)))

    def _remove(self, i: int) -> Row:
        """Free slot i; the last row moves there, as its keys and values do."""
        row, self.rows[i] = self.rows[i], self.rows[-1]
        self.rows.pop()
        self.cache.remove(i)
        return row

    def _mix(self, adapters: Sequence[str | None]) -> None:
        if self._mixture is None:
            self._mixture, self._chosen = Mixture(self.model), []
        if adapters != self._chosen:
            self._mixture.choose(adapters)
            self._chosen = list(adapters)

    def _unmix(self) -> None:
        if self._mixture is not None:
            self._mixture.remove()
            self._mixture = None


def _tell(request: Request, piece: Piece) -> None:
    with suppress(RuntimeError):  # the loop of whoever asked is closed
        request.tell(piece)
