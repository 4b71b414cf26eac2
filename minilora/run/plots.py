"""Pictures of training runs, drawn from the records of `metrics.jsonl`: the loss of one, its vital signs, the
losses of several; and of the lengths of what they are trained on.

A record has a `step` and some of `loss`, `eval_loss`, `lr`, `grad_norm`, `memory`; what a run did not record
is not drawn. Matplotlib is imported when something is drawn, and draws into memory: a picture appears whole
or not at all.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minilora.system.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#3b6ea5", "#d1662f", "#4a8f5c", "#7d5ba6"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#b0892b", "#c25b7a", "#3d9aa1", "#707070", "#8c564b", "#9aa83a")
LOSS = "loss per supervised token (nats)"


def plot_loss(records: list[dict], path: Path) -> None:
    """Training and held-out loss over the steps. Nothing is drawn before the first record."""
    if series(records, "loss")[0]:
        figure = _figure(7, 4)
        _draw_loss(figure.subplots(), records)
        _save(figure, path)


def plot_training(records: list[dict], path: Path) -> None:
    """Four panels over one axis of steps: loss, learning rate, norm of the gradients before clipping, memory."""
    if not series(records, "loss")[0]:
        return
    figure = _figure(10, 6)
    ((loss, rate), (norm, memory)) = figure.subplots(2, 2, sharex=True)
    _draw_loss(loss, records)
    for axes, name, label, colour, unit in (
        (rate, "lr", "learning rate", PURPLE, 1),
        (norm, "grad_norm", "gradient norm", GREEN, 1),
        (memory, "memory", "memory (GiB)", ORANGE, 2**30),
    ):
        steps, values = series(records, name)
        axes.plot(
            steps,
            [value / unit for value in values],
            color=colour,
            linewidth=1.4,
            marker="o" if len(steps) == 1 else None,
        )
        _dress(axes, label)
    rate.yaxis.set_major_formatter("{x:g}")
    for axes in (loss, rate):
        axes.set_xlabel("")
    _save(figure, path)


def plot_runs(runs: dict[str, list[dict]], path: Path) -> None:
    """The losses of several runs, by name: training on the left and, where any run has them, held-out ones on
    the right.
    """
    kinds = [("loss", "training loss")]
    if any(series(records, "eval_loss")[0] for records in runs.values()):
        kinds.append(("eval_loss", "held-out loss"))
    figure = _figure(5.5 * len(kinds), 4.2)
    panels = figure.subplots(1, len(kinds), squeeze=False)[0]
    lines = []
    for axes, (name, title) in zip(panels, kinds, strict=True):
        for i, records in enumerate(runs.values()):
            steps, values = series(records, name)
            style = dict(
                color=COLOURS[i % len(COLOURS)],
                linestyle=("-", "--", ":")[i // len(COLOURS) % 3],
                linewidth=1.4,
            )
            lines += axes.plot(
                steps,
                values,
                marker="o" if name == "eval_loss" or len(steps) == 1 else None,
                markersize=3.5,
                **style,
            )
        axes.set_title(title, fontsize=11)
        _dress(axes, LOSS if axes is panels[0] else "")
    columns = int(
        11 * figure.get_figwidth() / (max(map(len, runs)) + 6)
    )  # eleven letters of the legend take an inch
    figure.legend(
        lines[: len(runs)],
        list(runs),
        loc="outside lower center",
        ncols=max(1, min(4, columns)),
        frameon=False,
    )
    _save(figure, path)


def plot_lengths(lengths: Sequence[int], supervised: Sequence[int], cutoff_len: int, path: Path) -> None:
    """How long examples are, before any is cut, and how many of their tokens are learned. The last bar gathers
    a long tail.
    """
    figure = _figure(10, 4)
    whole, learned = figure.subplots(1, 2)
    over = sum(length > cutoff_len for length in lengths) / len(lengths)
    for axes, values, label in (
        (whole, lengths, "tokens of an example"),
        (learned, supervised, "supervised tokens of an example"),
    ):
        top = (
            sorted(values)[int(0.99 * (len(values) - 1))] * 1.25
        )  # a few very long ones would make the others a single bar
        top = max(min(top, max(values)), 1)
        edges = [top * i / 50 for i in range(51)]
        bars = axes.hist([min(value, top) for value in values], edges, color=BLUE)[2]
        beyond = sum(value > top for value in values)
        _dress(
            axes,
            "examples",
            xlabel=label + (f"; {beyond:,} above {top:,.0f} in the last bar" if beyond else ""),
        )
        axes.set_ylim(top=1.1 * max(bar.get_height() for bar in bars))
        if axes is whole and cutoff_len < top:
            axes.axvline(
                cutoff_len,
                color=ORANGE,
                linewidth=1.4,
                label=f"cutoff_len {cutoff_len:,}: {over:.1%} are longer",
            )
            axes.legend(frameon=False)
    _save(figure, path)


def series(records: list[dict], name: str) -> tuple[list[int], list[float]]:
    """The steps at which this was recorded, and its values; what is infinite or not a number is no point of a
    line.
    """
    points = [(record["step"], record[name]) for record in records if name in record]
    points = [point for point in points if all(map(math.isfinite, point))]
    return [step for step, _ in points], [value for _, value in points]


def _draw_loss(axes: "Axes", records: list[dict]) -> None:
    steps, losses = series(records, "loss")
    axes.plot(
        steps, losses, color=BLUE, linewidth=1.4, marker="o" if len(steps) == 1 else None, label="training"
    )
    steps, losses = series(records, "eval_loss")
    if steps:
        axes.plot(steps, losses, "o-", color=ORANGE, linewidth=1.4, markersize=4, label="held out")
    _dress(axes, LOSS)
    axes.legend(frameon=False)


def _dress(axes: "Axes", label: str, xlabel: str = "optimizer step") -> None:
    """Labels, scales and a grid, once all lines are drawn. Logarithmic where a linear scale could not show
    how the ends differ.
    """
    values = [value for line in axes.lines for value in line.get_ydata()]
    wide = min(values, default=0) > 0 and max(values) / min(values) > 20
    axes.set(xlabel=xlabel, ylabel=label, yscale="log" if wide else "linear")
    if wide:
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(bottom=0, top=1.1 * max(values, default=0) or 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(width, height), layout="constrained"
    )  # without pyplot: no window and no global state
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    write_whole(path, picture.getvalue())
