"""Small tables of whole numbers on a GPU: where tensors lie, and which rows a program takes.

A kernel that works on many tensors reads their addresses from a table. The host writes it and orders a copy,
so tables are kept for the next call. A table is known by all that it is made of, so it is never out of date.
An adapter that lies elsewhere, or a batch that is mixed otherwise, asks for another one.

While a graph is recorded no table can be made. The graph would repeat the copy, out of memory that by then is
somebody else's. A function runs once before it is recorded (graphs.py), and that run makes its tables.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minilora.backend.copies import to_device

_MOST = 8192  # PyTorch gives out 512 bytes at least: 4 MiB
_tables: dict[tuple, Tensor] = {}


class NoTable(Exception):
    """A graph is being recorded, and a table is not there yet."""


def table(rows_of: Callable[..., Sequence[Sequence[int]]], key: tuple, device: torch.device) -> Tensor:
    """Return the rows rows_of(*key), a function of the key alone, as an int64 matrix on a device.

    The host does not wait. Raises NoTable if the table is new while a graph is recorded.
    """
    found = _tables.get((rows_of, key, device))
    if found is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise NoTable
        if len(_tables) >= _MOST:
            _tables.clear()
        found = to_device(torch.tensor(rows_of(*key), dtype=torch.int64, device="cpu"), device)
        _tables[rows_of, key, device] = found
    return found


def tables() -> list[Tensor]:
    """Return the tables of today, for a graph that will read them without asking again."""
    return list(_tables.values())


def cache_clear() -> None:
    """Free the tables."""
    _tables.clear()
