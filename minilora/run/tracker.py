"""What a run leaves to look at: a line or a bar in the terminal, metrics.jsonl, a model card, and what it
reports elsewhere.

On a terminal there is one bar, redrawn in place; where output goes to a file, one line every `logging_steps`.
Both hold the same:

    step 120/360  loss 0.412  lr 2.1e-03  18.2k tok/s  0.9 GiB  0:14 left
"""

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from minilora.data.examples import Dataset, Row
from minilora.lora import trainable_parameters
from minilora.loss_scale import LossScale
from minilora.model import CausalLM
from minilora.run.describe import count_parameters, describe_optimizer, describe_weights
from minilora.run.reporters import Reporter
from minilora.run.settings import TrainConfig
from minilora.system.device import Placement
from minilora.system.files import write_whole

METRICS_FILE = "metrics.jsonl"


class Tracker:
    """Shows progress and appends each record to `metrics.jsonl` at once, so that a killed run keeps what it
    had.

    A resumed run hands over the `state_dict` of its earlier life: the file then begins with what was recorded
    up to there, and no more. Without a directory nothing is shown or written, and the records are kept all
    the same. Each record goes to every one of the `reporters` too.
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
        self.path = None if directory is None else directory / METRICS_FILE
        self.total_steps, self.epoch_steps, self.logging_steps = total_steps, epoch_steps, logging_steps
        self.records: list[dict] = list(state["records"]) if state else []
        self.window: list = (
            list(state["window"]) if state else []
        )  # loss, tokens, seconds of each step since the last record
        self.seconds = state.get("seconds", 0.0) if state else 0.0  # in optimizer steps, of earlier lives too
        self.steps_here = 0  # taken by this process since `started`, for the time that is left
        self.started = 0.0
        self.bar, self.finished = None, False
        if self.path is not None:
            write_whole(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
            if sys.stderr.isatty():
                self.bar = tqdm(total=total_steps, bar_format="{percentage:3.0f}%")
        self.reporters = list(reporters) if self.path is not None else []
        for reporter in self.reporters:
            reporter.begin(self.records, (state or {}).get(reporter.service.name, {}), self.say)

    def state_dict(self) -> dict:
        """What a resumed run needs, as JSON."""
        reported = {reporter.service.name: reporter.service.state_dict() for reporter in self.reporters}
        return {"records": self.records, "window": self.window, "seconds": self.seconds} | reported

    def log(self, **record: float) -> None:
        """Write one line of metrics. `step` counts finished optimizer steps. What is not finite is left out:
        JSON cannot say it.
        """
        record = {name: value for name, value in record.items() if math.isfinite(value)}
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        for reporter in self.reporters:
            reporter.log(record)

    def step(
        self,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float,
        tokens: int,
        seconds: float,
        memory: int,
        loss_scale: LossScale,
    ) -> None:
        """Count one optimizer step: the bar moves at each, a record or line of the mean since the last comes
        every so often.

        Steps whose loss is not finite (float16 leaves them out) have no part in the mean.
        """
        if self.steps_here == 0:
            self.started = (
                time.perf_counter() - seconds
            )  # an evaluation before the first step is not repeated at every step
        self.window.append([loss, tokens, seconds])
        self.seconds += seconds
        self.steps_here += 1
        losses, counts, times = zip(*self.window, strict=True)
        finite = [value for value in losses if math.isfinite(value)]
        loss, speed = sum(finite) / len(finite) if finite else math.nan, sum(counts) / sum(times)
        left = (time.perf_counter() - self.started) / self.steps_here * (self.total_steps - step)
        text = (
            f"step {step}/{self.total_steps}  loss {loss:.4f}  lr {lr:.1e}  {short_number(speed)} tok/s  "
            f"{memory / 2**30:.2f} GiB  {minutes(left)} left"
        )
        if loss_scale.skipped:
            text += f"  {loss_scale.skipped} skipped, loss scale {loss_scale.scale:g}"
        due = step % self.logging_steps == 0 or step in (1, self.total_steps)
        if self.bar is not None:
            room = min(
                24, shutil.get_terminal_size().columns - len(text) - 8
            )  # the text goes first, and the bar has the rest
            self.bar.bar_format = f"{{percentage:3.0f}}% {f'{{bar:{room}}} ' if room > 3 else ''}{{desc}}"
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        elif due and self.path is not None:
            print(text, flush=True)
        if due:
            epoch = round(step / self.epoch_steps, 4)
            record = dict(
                step=step,
                epoch=epoch,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                tokens_per_second=speed,
                memory=memory,
            )
            record |= dict(seconds=round(self.seconds, 3))
            if loss_scale.enabled:
                record |= dict(loss_scale=loss_scale.scale, skipped_steps=loss_scale.skipped)
            self.log(**record)
            self.window.clear()

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.path is not None:
            print(text, flush=True)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """What ends a training early ends its reports: FAILED, unless they were told otherwise."""
        if kind is not None and not self.finished:
            self.finish("FAILED")

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()

    def finish(self, status: str, files: Sequence[Path] = ()) -> None:
        """Tell the reporters how it ended, FINISHED, FAILED or KILLED, and give them what came of it."""
        self.close()
        self.finished = True
        for reporter in self.reporters:
            reporter.finish(status, files)


def print_summary(
    config: TrainConfig,
    base_model: str,
    model: CausalLM,
    placement: Placement,
    processes: int,
    train_set: Dataset,
    eval_set: Dataset | None,
    total_steps: int,
    epoch_steps: int,
) -> None:
    """What is about to happen, before it happens."""
    count = count_parameters(model)
    trainable = sum(p.numel() for p in trainable_parameters(model).values())
    lora, c = config.lora_config(), model.config
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    tokens = (
        sum(len(e.input_ids) for e in train_set.examples) / len(train_set) * min(per_step, len(train_set))
    )
    targets = lora.target_modules if isinstance(lora.target_modules, str) else " ".join(lora.target_modules)
    lines = {
        "model": f"{base_model}: {c.model_type}, {short_number(count - trainable)} parameters, "
        f"{c.num_hidden_layers} layers of width {c.hidden_size}",
        "device": str(placement) + (f"; {processes} processes" if processes > 1 else ""),
        "weights": describe_weights(model),
        "adapter": f"r {lora.r}, alpha {lora.lora_alpha:g}, dropout {lora.lora_dropout:g}, on {targets}",
        "trainable": f"{trainable:,} of {count:,} parameters ({trainable / count:.2%})",
        "optimizer": describe_optimizer(config.optim, placement.device, config.loraplus_lr_ratio),
        "training": train_set.summary(),
        "held out": eval_set.summary() if eval_set else "none",
        "steps": f"{total_steps:,}, {epoch_steps:,} an epoch; {per_step} examples, about {tokens:,.0f} tokens each",
        "output": config.output_dir,
    }
    for name, text in lines.items():
        print(f"{name:<10} {text}", flush=True)


def print_answers(rows: list[Row], before: list[str], after: list[str], count: int = 4) -> None:
    """A few held-out prompts with the answers of the base model and of the adapted one."""
    for i in range(0, len(rows), max(1, len(rows) // count))[:count]:
        print(f"\n{rows[i].prompt.strip()}")
        for name, text in (
            ("base", before[i]),
            ("adapted", after[i]),
            ("expected", rows[i].completion.strip()),
        ):
            print(f"  {name:<9} {' '.join(text.split())[:110]}")


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


def write_model_card(path: Path, config: TrainConfig, base_model: str, figures: dict[str, str]) -> None:
    """A README.md that the hub shows: what the adapter is for, how to load it, and the figures of its
    training.

    The hub links to the base model if it is one of its own; a directory is named in the text alone.
    """
    on_hub = (
        re.fullmatch(r"[\w.-]+/[\w.-]+", base_model)
        and not base_model.startswith("assets/")
        and not Path(base_model).exists()
    )
    link = f"base_model: {base_model}\n" if on_hub else ""
    place = config.push_to_hub or "path/to/this/directory"
    lora = config.lora_config()
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    scaling = "alpha / sqrt(r)" if lora.use_rslora else "alpha / r"
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    write_whole(
        path,
        f"""---
{link}library_name: peft
pipeline_tag: text-generation
tags:
- lora
- minilora
---

# LoRA adapter for {base_model}

Trained with minilora. Rank {lora.r}, alpha {lora.lora_alpha:g} (scaling {scaling}), dropout {lora.lora_dropout:g}, on: {targets}.

| | |
|---|---|
{table}

![loss](loss.png)

# # Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base_model!r}), {place!r})
```

All settings are in `training_config.yaml`, all measurements in `metrics.jsonl`.
""",
    )
