"""Progress of a run: a line or a bar in the terminal, records in metrics.jsonl, and reporters of the records.

A terminal shows one bar, redrawn in place. Output to a file gets one line every `logging_steps`. Both show

    step 120/360  loss 0.412  lr 2.1e-03  18.2k tok/s  0.9 GiB  0:14 left

On a GPU the memory in use stands beside what PyTorch has reserved of it: 5.9 of 6.4 GiB.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from minilora.loss_scale import LossScale
from minilora.run.reporters import Reporter
from minilora.system.files import write_whole

METRICS_FILE = "metrics.jsonl"


class StepMetrics(NamedTuple):
    """The measurements of one optimizer step."""

    step: int  # finished steps, this one included
    loss: float  # mean per supervised token
    lr: float
    grad_norm: float  # before clipping
    tokens: float  # that went through the model, padding included
    seconds: float
    memory: int  # peak bytes so far
    reserved: int | None = None  # on a GPU the peak of what PyTorch has taken of it, holes included


class Tracker:
    """Shows progress and appends each record to `metrics.jsonl` at once, so a killed run keeps its records.

    A resumed run passes the `state_dict` saved in its checkpoint: the file then starts with the records up to
    there. Without a directory nothing is shown or written, but the records are kept. Every record also goes
    to each of the `reporters`.
    """

    def __init__(
        self,
        directory: Path | None,
        total_steps: int,
        epoch_steps: int,
        logging_steps: int,
        state: dict | None = None,
        reporters: Sequence[Reporter] = (),
    ):
        state = state or {}
        self.path = None if directory is None else directory / METRICS_FILE
        self.total_steps, self.epoch_steps, self.logging_steps = total_steps, epoch_steps, logging_steps
        self.records: list[dict] = list(state.get("records", []))
        self.window: list = list(state.get("window", []))  # [loss, tokens, seconds] of steps not yet recorded
        self.seconds = state.get("seconds", 0.0)  # in optimizer steps, including those before a resume
        # Peak bytes of all processes of this training, in use and reserved.
        self.memory, self.reserved = state.get("memory", 0), state.get("reserved", 0)
        self.own_steps = 0  # steps of this process, since `started`: they predict the time left
        self.started = 0.0
        self.bar, self.finished = None, False
        self.label = ""  # before every line
        if self.path is not None:
            write_whole(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
            if sys.stderr.isatty():
                self.bar = tqdm(total=total_steps, bar_format="{percentage:3.0f}%")
        self.reporters = list(reporters) if self.path is not None else []
        for reporter in self.reporters:
            reporter.begin(self.records, state.get(reporter.service.name, {}), self.say)

    def state_dict(self) -> dict:
        """The state that a resumed run needs, as JSON."""
        reported = {reporter.service.name: reporter.service.state_dict() for reporter in self.reporters}
        peak = {"memory": self.memory, "reserved": self.reserved}
        return {"records": self.records, "window": self.window, "seconds": self.seconds} | peak | reported

    def peak(self, memory: int, reserved: int | None) -> tuple[int, int | None]:
        """Note the peak bytes of this process. Returns those of the training, also before a resume."""
        self.memory = max(self.memory, memory)
        self.reserved = max(self.reserved, reserved or 0)
        return self.memory, None if reserved is None else self.reserved

    def log(self, **record: float) -> None:
        """Write one line of metrics, without values that JSON cannot express: infinities and NaN.

        `step` counts finished optimizer steps.
        """
        record = {name: value for name, value in record.items() if math.isfinite(value)}
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        for reporter in self.reporters:
            reporter.log(record)

    def step(self, metrics: StepMetrics, loss_scale: LossScale) -> None:
        """Count one optimizer step: move the bar, and every `logging_steps` record the mean over these steps.

        Steps without a finite loss, which float16 skips, do not enter the mean.
        """
        if self.own_steps == 0:
            # Not at construction: the evaluation before the first step is not repeated at every step.
            self.started = time.perf_counter() - metrics.seconds
        self.own_steps += 1
        self.peak(metrics.memory, metrics.reserved)
        self.seconds += metrics.seconds
        self.window.append([metrics.loss, metrics.tokens, metrics.seconds])
        losses, tokens, seconds = zip(*self.window, strict=True)
        finite = [loss for loss in losses if math.isfinite(loss)]
        loss, speed = sum(finite) / len(finite) if finite else math.nan, sum(tokens) / sum(seconds)
        due = metrics.step % self.logging_steps == 0 or metrics.step in (1, self.total_steps)
        self._show(self._line(metrics, loss, speed, loss_scale), metrics.step, due)
        if due:
            record = dict(step=metrics.step, epoch=round(metrics.step / self.epoch_steps, 4), loss=loss)
            record |= dict(lr=metrics.lr, grad_norm=metrics.grad_norm, tokens_per_second=speed)
            record |= dict(memory=metrics.memory, seconds=round(self.seconds, 3))
            if metrics.reserved is not None:
                record |= dict(memory_reserved=metrics.reserved)
            if loss_scale.enabled:
                record |= dict(loss_scale=loss_scale.scale, skipped_steps=loss_scale.skipped)
            self.log(**record)
            self.window.clear()

    def _line(self, metrics: StepMetrics, loss: float, speed: float, loss_scale: LossScale) -> str:
        seconds_per_step = (time.perf_counter() - self.started) / self.own_steps
        left = seconds_per_step * (self.total_steps - metrics.step)
        reserved = "" if metrics.reserved is None else f" of {metrics.reserved / 2**30:.2f}"
        line = (
            f"step {metrics.step}/{self.total_steps}  loss {loss:.4f}  lr {metrics.lr:.1e}  "
            f"{short_number(speed)} tok/s  {metrics.memory / 2**30:.2f}{reserved} GiB  {minutes(left)} left"
        )
        if loss_scale.skipped:
            line += f"  {loss_scale.skipped} skipped, loss scale {loss_scale.scale:g}"
        return line

    def _show(self, line: str, step: int, due: bool) -> None:
        if self.bar is not None:
            # The line comes first; the bar gets the remaining columns, if there are enough.
            width = min(24, shutil.get_terminal_size().columns - len(line) - 8)
            self.bar.bar_format = f"{{percentage:3.0f}}% {f'{{bar:{width}}} ' if width > 7 else ''}{{desc}}"
            self.bar.set_description_str(line, refresh=False)
            self.bar.update(step - self.bar.n)
        elif due and self.path is not None:
            print(self.label + line, flush=True)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(self.label + text)
        elif self.path is not None:
            print(self.label + text, flush=True)

    def share_terminal(self, label: str) -> None:
        """Print lines that begin with a label, and no bar: another run prints between them."""
        if self.bar is not None:
            self.bar.leave = False
            self.close()
        self.bar, self.label = None, f"{label}  "

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        """Report FAILED if an exception ends the training and `finish` has not reported another status."""
        if error_type is not None and not self.finished:
            self.finish("FAILED")

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()

    def finish(self, status: str, files: Sequence[Path] = ()) -> None:
        """Give the reporters the final status, FINISHED, FAILED or KILLED, and the run's files."""
        self.close()
        self.finished = True
        for reporter in self.reporters:
            reporter.finish(status, files)


def short_number(value: float) -> str:
    """1234567 -> '1.2M', 18200 -> '18.2k', 950 -> '950'."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f}{letter}"
    return f"{value:.0f}"


def minutes(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
