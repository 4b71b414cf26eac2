"""Checks of a learner's code in a notebook: one line that says what is wrong, in place of a traceback.

    with check("the update has rank r"):
        assert torch.linalg.matrix_rank(update) == r, "its rank is another"

prints `right: the update has rank r`, or raises NotYet, of which Jupyter shows the message alone.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


class NotYet(AssertionError):
    """What an exercise still lacks, in a line, or in the table of a report."""

    def _render_traceback_(self) -> list[str]:  # IPython shows these lines
        return [str(self)]


@contextmanager
def check(name: str) -> Iterator[None]:
    """Say that the code within the `with` block runs, or raise NotYet with the reason why it does not."""
    try:
        yield
    except Exception as error:
        raise NotYet(f"not yet: {name}: {_reason(error)}") from None
    print(f"right: {name}")


def _reason(error: Exception) -> str:
    """Return the error's own words. An error that is no failed check says where in the notebook it arose."""
    text = str(error).strip()
    cells = [frame for frame in traceback.extract_tb(error.__traceback__) if "ipykernel" in frame.filename]
    if isinstance(error, AssertionError):
        return text or f"this does not hold: {cells[-1].line if cells else error!r}"
    place = f", in line {cells[-1].lineno} of its cell: {cells[-1].line}" if cells else ""
    what = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}{place}"
    if "NoneType" in text or "ellipsis" in text:
        return f"something is None: is the cell above filled in? ({what})"
    return what
