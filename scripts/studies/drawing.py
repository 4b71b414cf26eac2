"""The look of the documents' pictures: four colours, and a figure as the bytes of a file."""

import io
from collections.abc import Callable

BLUE, ORANGE, GREY, PALE = "#3b6ea5", "#d1662f", "#707070", "#e4e4e4"


def picture_of(draw: Callable, kind: str = "png") -> bytes:
    """Return the PNG or SVG, the same bytes each time, of the figure that `draw(figure)` fills."""
    from matplotlib import pyplot

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY}
    style |= {"svg.hashsalt": "minilora", "svg.fonttype": "path"}
    with pyplot.rc_context(style):
        figure = pyplot.figure(layout=None if kind == "svg" else "constrained")
        draw(figure)
        picture = io.BytesIO()
        anonymous = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(picture, dpi=130, format=kind, metadata=anonymous, facecolor="white")
        pyplot.close(figure)
    return picture.getvalue()


def shades(count: int) -> list[tuple[float, float, float]]:
    """Return `count` blues, from a pale one to a dark one, for curves that have an order."""
    from matplotlib.colors import LinearSegmentedColormap

    blues = LinearSegmentedColormap.from_list("blues", ["#a9c6e3", BLUE, "#17324f"])
    return [blues(i / max(1, count - 1))[:3] for i in range(count)]


def plain_log_ticks(axis, steps: tuple[float, ...] = (1, 2, 5)) -> None:
    """Write 1, 2, 5, 10 and so on at a logarithmic axis, rather than powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
