"""Every property of a LoRA layer, tried on layers of many shapes.

    report = check_lora_layer(MyLora)  # MyLora(base, r, lora_alpha, lora_dropout)
    print(report)

`lora_properties.py` says what each property is. The battery calls the layer and reads its two factors; it
knows nothing else of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.testing.lora_properties import LORA
from minilora.testing.lora_subject import LayerMaker, alpha_over_r, find_factors
from minilora.testing.report import Report
from minilora.testing.strategies import DTYPES


def check_lora_layer(
    make_layer: Callable[[nn.Linear, int, float, float], nn.Module],  # of base, r, lora_alpha, lora_dropout
    *,
    factors: Callable[[nn.Module], tuple[Tensor, Tensor]] = find_factors,  # A (r, in), B (out, r)
    merge: Callable[[nn.Module], Any] | None = None,  # None: the layer's own `merge`, if it has one
    unmerge: Callable[[nn.Module], Any] | None = None,  # None: the layer's own `unmerge`, if it has one
    switch: Callable[[nn.Module, bool], Any] | None = None,  # None: its `enable_adapters`, if it has it
    scaling: Callable[[int, float], float] = alpha_over_r,  # rsLoRA: alpha / sqrt(r)
    A_std: Callable[[int, int], float] | None = lambda in_features, r: (3 * in_features) ** -0.5,  # None: any
    dtypes: tuple[torch.dtype, ...] = DTYPES,  # of the base layer and x
    skip: tuple[str, ...] = (),  # properties that need not hold
    max_examples: int = 30,  # tried for each property
    shrink: bool = True,  # False: report the first counterexample, in less time
    subject: str = "LoRA layer",  # its name in the report
) -> Report:
    """Return a report: each property, whether it held, and the smallest counterexample if it did not.

    `make_layer` is given a trainable nn.Linear and freezes it. Properties of verbs that the layer lacks are
    skipped, with the reason. Raises ValueError for a property in `skip` that does not exist.
    """
    probe = make_layer(nn.Linear(2, 3), 1, 1.0, 0.0)
    maker = LayerMaker(
        make=make_layer,
        factors=factors,
        merge=merge or _own(probe, "merge"),
        unmerge=unmerge or _own(probe, "unmerge"),
        switch=switch or _own(probe, "enable_adapters"),
        scaling=scaling,
        A_std=A_std,
        dtypes=dtypes,
    )
    return LORA.run(maker, subject, skip, max_examples, shrink)


def _own(layer: nn.Module, verb: str) -> Callable | None:
    """Return a function that calls the layer's own method, if it has one of this name."""
    return (lambda layer, *values: getattr(layer, verb)(*values)) if hasattr(layer, verb) else None
