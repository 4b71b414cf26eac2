"""Pictures of training runs and of their data.

The records of `metrics.jsonl` show the loss of one run, its vital signs, or the losses of several runs. A
record has a `step` and some of `loss`, `eval_loss`, `lr`, `grad_norm`, `memory`; a missing value is not
drawn. A histogram shows the lengths of the examples.

The axis of a loss fits its values, since a loss of 1.87 that falls to 1.77 is flat on an axis from 0. It is
logarithmic if the values differ by more than a factor of 20. Noisy losses are drawn pale, below their mean.

Matplotlib is imported only to draw. It draws into memory, so a picture file is complete or does not exist.
"""

import io
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from minilora.system.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#3b6ea5", "#d1662f", "#4a8f5c", "#7d5ba6"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#b0892b", "#c25b7a", "#3d9aa1", "#707070", "#8c564b", "#9aa83a")
LOSS = "loss per supervised token (nats)"
FEWEST_NOISY = 20  # values; fewer ones are no noise, whatever they do
LARGEST = 1e100  # value that is drawn: axes compute with multiples and differences of values
MOST_PALE = 4  # runs in a picture whose noise is drawn, below the mean


def plot_loss(records: list[dict], path: Path) -> None:
    """Draw training and held-out loss over the steps. Without a recorded loss nothing is written."""
    if series(records, "loss")[0]:
        figure = _figure(7, 4)
        _draw_loss(figure.subplots(), records)
        _save(figure, path)


def plot_training(records: list[dict], path: Path) -> None:
    """Draw four panels over the steps: loss, learning rate, gradient norm before clipping, memory."""
    if not series(records, "loss")[0]:
        return
    figure = _figure(10, 6)
    ((loss, rate), (norm, memory)) = figure.subplots(2, 2, sharex=True)
    _draw_loss(loss, records)
    for axes, name, label, colour, unit, from_zero in (
        (rate, "lr", "learning rate", PURPLE, 1, True),
        (norm, "grad_norm", "gradient norm", GREEN, 1, False),
        (memory, "memory", "memory (GiB)", ORANGE, 2**30, True),
    ):
        steps, values = series(records, name)
        values = [value / unit for value in values]
        axes.plot(steps, values, color=colour, linewidth=1.4, marker=_marker(steps))
        _style(axes, label, from_zero=from_zero)
    rate.ticklabel_format(axis="y", style="scientific", scilimits=(0, 0))
    for axes in (loss, rate):
        axes.set_xlabel("")
    _save(figure, path)


def plot_runs(runs: dict[str, list[dict]], path: Path) -> None:
    """Draw the losses of several named runs: training on the left, held-out on the right if there are any."""
    window = max(noise_window(series(records, "loss")[1]) for records in runs.values())
    panels = [("loss", "training loss" + (f", mean of {window} records" if window > 1 else ""))]
    if any(series(records, "eval_loss")[0] for records in runs.values()):
        panels.append(("eval_loss", "held-out loss"))
    figure = _figure(5.5 * len(panels), 4.2)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    lines = []
    for axes, (name, title) in zip(all_axes, panels, strict=True):
        for i, records in enumerate(runs.values()):
            steps, values = series(records, name)
            colour, dashes = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
            marker = "o" if name == "eval_loss" else _marker(steps)
            style = dict(color=colour, linestyle=dashes, linewidth=1.4, marker=marker, markersize=3.5)
            if name == "loss" and window > 1:
                if len(runs) <= MOST_PALE:
                    _draw_pale(axes, steps, values, colour)
                values = centred_mean(values, window)
            lines += axes.plot(steps, values, **style)
        axes.set_title(title, fontsize=11)
        _style(axes, LOSS if axes is all_axes[0] else "")
    letters = 11 * figure.get_figwidth()  # 11 letters of the legend are about an inch wide
    columns = int(letters / (max(map(len, runs)) + 6))  # a line and a gap take 6 letters
    columns = max(1, min(4, columns))
    figure.legend(lines[: len(runs)], list(runs), loc="outside lower center", ncols=columns, frameon=False)
    _save(figure, path)


def plot_lengths(lengths: Sequence[int], supervised: Sequence[int], cutoff_len: int, path: Path) -> None:
    """Draw histograms of the examples' lengths before any cut, and of their numbers of learned tokens."""
    figure = _figure(10, 4)
    whole, learned = figure.subplots(1, 2)
    top = _draw_histogram(whole, lengths, "tokens of an example")
    _draw_histogram(learned, supervised, "supervised tokens of an example")
    if cutoff_len < top:
        longer = sum(length > cutoff_len for length in lengths) / len(lengths)
        label = f"cutoff_len {cutoff_len:,}: {longer:.1%} are longer"
        whole.axvline(cutoff_len, color=ORANGE, linewidth=1.4, label=label)
        whole.legend(frameon=False)
    _save(figure, path)


def series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Return the steps with a value of this name, and the values, without NaN and huge ones."""
    points = [(record["step"], record[name]) for record in records if name in record]
    points = [point for point in points if all(abs(number) <= LARGEST for number in point)]
    return [step for step, _ in points], [value for _, value in points]


def noise_window(values: Sequence[float]) -> int:
    """How many values a mean takes to show the trend of noisy ones: about the root of their number, or 1.

    Noise goes up and down many times its range, where a loss that falls crosses the range once.
    """
    way = sum(abs(b - a) for a, b in zip(values, values[1:], strict=False))
    if len(values) < FEWEST_NOISY or way <= 5 * (max(values) - min(values)):
        return 1
    return math.isqrt(len(values)) | 1  # odd: as many before a value as after it


def centred_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of the `window` values around each value, and of fewer at the two ends."""
    half, sums = window // 2, [0.0, *accumulate(values)]
    bounds = ((max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values)))
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in bounds]


def _draw_loss(axes: "Axes", records: list[dict]) -> None:
    steps, losses = series(records, "loss")
    label, window = "training", noise_window(losses)
    if window > 1:
        _draw_pale(axes, steps, losses, BLUE, label)
        label, losses = f"mean of {window} records", centred_mean(losses, window)
    axes.plot(steps, losses, color=BLUE, linewidth=1.6, marker=_marker(steps), label=label)
    steps, losses = series(records, "eval_loss")
    if steps:
        axes.plot(steps, losses, "o-", color=ORANGE, linewidth=1.4, markersize=4, label="held out")
    _style(axes, LOSS)
    axes.legend(frameon=False)


def _draw_pale(axes: "Axes", steps: list[int], values: list[float], colour: str, label: str = "") -> None:
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3, label=label or "_")  # _: not in legends


def _draw_histogram(axes: "Axes", values: Sequence[int], label: str) -> float:
    """Draw 50 bars and return the upper end of the axis. The last bar also counts all larger values."""
    percentile = sorted(values)[int(0.99 * (len(values) - 1))]
    # Without this bound a few very long examples would press all others into a single bar.
    top = max(min(1.25 * percentile, max(values)), 1)
    edges = [top * i / 50 for i in range(51)]
    bars = axes.hist([min(value, top) for value in values], edges, color=BLUE)[2]
    if beyond := sum(value > top for value in values):
        label += f"; {beyond:,} above {top:,.0f} in the last bar"
    _style(axes, "examples", xlabel=label, from_zero=True)
    axes.set_ylim(top=1.1 * max(bar.get_height() for bar in bars))
    return top


def _marker(steps: list[int]) -> str | None:
    """A dot for a single point, which has no line to show it."""
    return "o" if len(steps) == 1 else None


def _style(axes: "Axes", label: str, xlabel: str = "optimizer step", from_zero: bool = False) -> None:
    """Set labels, scales and a grid, after all lines are drawn."""
    values = [value for line in axes.lines for value in line.get_ydata()]
    axes.set(xlabel=xlabel, ylabel=label)
    if from_zero:
        axes.set_ylim(bottom=0, top=1.1 * max(values, default=0) or 1)
    elif min(values, default=0) > 0 and max(values) > 20 * min(values):
        _make_logarithmic(axes, decades=math.log10(max(values)) - math.log10(min(values)))
    else:
        axes.margins(y=0.08)
        axes.ticklabel_format(axis="y", useOffset=False)
        if min(values, default=0) >= 0:
            axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _make_logarithmic(axes: "Axes", decades: float) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    # pyplot would open windows and keep global state.
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_whole(path, picture.getvalue())
