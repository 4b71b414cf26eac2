"""plots.py: what the axes and the lines of a picture show."""

import math
import random

import pytest

from minilora.run import plots
from minilora.run.plots import centred_mean, noise_window, plot_loss, plot_runs, plot_training


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Call a function that draws, and return the figure in place of the file."""

    def call(function, records):
        drawn = []
        monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
        function(records, tmp_path / "a.png")
        return drawn[0]

    return call


def records_of(losses, **more):
    return [{"step": i, "loss": loss} | more for i, loss in enumerate(losses, start=1)]


def noisy(count, noise=0.1, seed=0):
    generator = random.Random(seed)
    return [1.2 + 0.6 * math.exp(-6 * i / count) + generator.gauss(0, noise) for i in range(count)]


@pytest.mark.parametrize(
    "function", [plot_loss, plot_training, lambda records, path: plot_runs({"a": records}, path)]
)
def test_a_small_change_of_the_loss_fills_its_axis(draw, function):
    figure = draw(function, records_of([1.87, 1.84, 1.80, 1.79, 1.77]))
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 1.77 and top > 1.87 and 0.1 / (top - bottom) > 0.8


def test_an_axis_of_losses_ends_at_zero_and_not_below(draw):
    assert draw(plot_loss, records_of([1.0, 0.5, 0.0])).axes[0].get_ylim()[0] == 0


def test_the_learning_rate_is_linear_and_begins_at_zero_however_low_it_ends(draw):
    rates = [2e-4 * 0.5 * (1 + math.cos(math.pi * i / 50)) for i in range(50)]
    records = [{"step": i, "loss": 2.0 - i / 50, "lr": rate} for i, rate in enumerate(rates, start=1)]
    axes = draw(plot_training, records).axes[1]
    assert axes.get_ylabel() == "learning rate" and axes.get_yscale() == "linear" and axes.get_ylim()[0] == 0


def test_memory_begins_at_zero(draw):
    axes = draw(plot_training, records_of([2.0, 1.9], memory=11 * 2**30)).axes[3]
    assert axes.get_ylabel() == "memory (GiB)" and axes.get_ylim() == (0, pytest.approx(12.1))


def test_noisy_losses_are_pale_below_their_mean_and_the_legend_says_so(draw):
    losses = noisy(1000)
    axes = draw(plot_loss, records_of(losses)).axes[0]
    raw, mean = axes.lines
    assert [line.get_label() for line in axes.lines] == ["training", "mean of 31 records"]
    assert list(raw.get_ydata()) == losses and raw.get_alpha() < 0.5 and mean.get_alpha() is None
    assert raw.get_linewidth() < mean.get_linewidth()
    # Of 31 independent values, a mean has 1 / sqrt(31) of the noise; from one to the next it moves by
    # sqrt(2) / 31 of it, where the values themselves move by sqrt(2).
    moves = [
        sum((b - a) ** 2 for a, b in zip(line, line[1:], strict=False)) for line in (losses, mean.get_ydata())
    ]
    assert moves[1] < moves[0] / 20**2


@pytest.mark.parametrize(
    "losses",
    [
        [2.0 - i / 100 for i in range(100)],
        [1.0] * 100,
        noisy(19),
        [3 * math.exp(-i / 40) + 0.2 for i in range(200)],
        [4 * math.exp(-i / 5) + 0.4 + (i % 2) / 25 for i in range(60)],
    ],
    ids=["a line", "constant", "few", "a decay", "a ripple at the end of a deep fall"],
)
def test_smooth_or_few_losses_are_drawn_as_they_are(draw, losses):
    (line,) = draw(plot_loss, records_of(losses)).axes[0].lines
    assert list(line.get_ydata()) == losses and line.get_label() == "training"


def test_a_centred_mean_takes_as_many_values_before_as_after_and_keeps_a_line():
    assert centred_mean([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 3.0, 4.0, 5.0]
    line = [float(i) for i in range(10)]
    assert centred_mean(line, 5)[2:-2] == line[2:-2] and centred_mean([], 5) == []
    assert [noise_window(noisy(count)) for count in (36, 100, 400)] == [7, 11, 21]


@pytest.mark.parametrize("count, pale", [(4, 4), (12, 0)])
def test_many_runs_are_drawn_by_their_means_alone_and_the_title_says_so(draw, count, pale):
    runs = {f"run {i}": records_of(noisy(150, seed=i)) for i in range(count)}
    figure = draw(plot_runs, runs)
    (axes,) = figure.axes
    assert axes.get_title() == "training loss, mean of 13 records"
    assert sum(line.get_alpha() is not None for line in axes.lines) == pale
    bold = [line for line in axes.lines if line.get_alpha() is None]
    handles, labels = (
        figure.legends[0].legend_handles,
        [text.get_text() for text in figure.legends[0].get_texts()],
    )
    styles = [(line.get_color(), line.get_linestyle()) for line in bold]
    assert labels == list(runs) and styles == [(h.get_color(), h.get_linestyle()) for h in handles]
    assert len(set(styles)) == count


@pytest.mark.parametrize(
    "losses",
    [
        [1e17, 1e17 + 16],
        [5e-324, 1.0],
        [1e308, -1e308, 1.0],
        [1e308, 1e308],
        [1e100, -1e100],
        [1e-300, 1e100],
    ],
    ids=str,
)
def test_losses_of_any_size_are_drawn(tmp_path, losses):
    records = [dict(record, eval_loss=record["loss"], lr=record["loss"]) for record in records_of(losses)]
    for function in (plot_loss, plot_training, lambda records, path: plot_runs({"a": records}, path)):
        function(records_of([1.0, 2.0]) + records, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_runs_without_a_training_loss_are_drawn(draw):
    figure = draw(plot_runs, {"a": [{"step": 0, "eval_loss": 1.0}], "b": [{"step": 1, "loss": math.nan}]})
    assert len(figure.axes) == 2
