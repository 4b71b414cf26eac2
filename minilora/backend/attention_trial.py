"""Does a GPU's fused attention compute its definition? It tries, once for each dtype and head size.

The kernels are PyTorch's, but not through the interface that PyTorch documents. Another version may want
other arguments, or a build may lack them. So they attend over a few short documents first, with a window and
grouped heads, and output and gradients are compared. If they fail, one line says why, and the definition
runs: right, and slow for long documents.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from minilora.backend.documents import Documents, documents_of_ids
from minilora.backend.library import warn
from minilora.system.errors import one_line

LENGTHS, WINDOW = (40, 1, 23), 17
BOUND = 2**-5  # eight roundings to bfloat16. A key too many or too few for a window changes a fifth.


class Form(NamedTuple):
    """One way to compute attention. See attention.py for what the two functions take and return."""

    name: str  # for people
    forward: Callable
    backward: Callable


@lru_cache
def passed(form: Form, definition: Form, device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether a form can be used there."""
    problem = _problem(form, definition, device, dtype, head_size)
    if problem:
        warn(f"attention is slower here, without the kernel '{form.name}': {problem}")
    return not problem


def _problem(form: Form, definition: Form, device: torch.device, dtype: torch.dtype, K: int) -> str:
    """Attend. Return '' if the results are the definition's, else what happened."""
    ids = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS)).unsqueeze(0)
    documents, generator = documents_of_ids(ids, device).within(WINDOW), torch.Generator().manual_seed(0)
    rows = [torch.randn(sum(LENGTHS), heads, K, generator=generator) for heads in (2, 1, 1, 2)]
    rows = [t.to(device, dtype) for t in rows]
    try:
        found = _results(form, *rows, documents)
    except Exception as error:  # whatever a kernel or an installation may raise
        return f"{type(error).__name__}: {one_line(str(error))}"
    expected = _results(definition, *(t.float() for t in rows), documents)
    right = all((a - b).norm() <= BOUND * b.norm() for a, b in zip(found, expected, strict=True))
    return "" if right else "a trial gave other numbers than the definition"


def _results(form: Form, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, documents: Documents) -> list[Tensor]:
    y, lse = form.forward(q, k, v, documents)
    return [t.float() for t in (y, *form.backward(dy, q, k, v, y, lse, documents))]
