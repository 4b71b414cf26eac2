"""Every property of a blockwise quantizer, tried on the tensors that break quantizers.

    report = check_quantizer(my_quantize, my_dequantize, code=my_code, blocksize=64)
    print(report)

`quantizer_properties.py` says what each property is. The battery sees values alone, never symbols: so it
takes the quantizer of any library, whatever its format.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from minilora.testing.battery import check_choice
from minilora.testing.quantizer_oracles import SMALLEST
from minilora.testing.quantizer_properties import QUANTIZER
from minilora.testing.quantizer_subject import Quantizer
from minilora.testing.report import Report
from minilora.testing.strategies import DTYPES


def check_quantizer(
    quantize: Callable[[Tensor], Any],  # of a weight of any shape -> anything
    dequantize: Callable[[Any], Tensor],  # of that -> the weight's shape
    *,
    code: Tensor,  # (codes,): the values of the symbols, in units of a block's absmax
    blocksize: int | None = 64,  # values that share a scale, in memory order; None: each row has its own
    dtypes: tuple[torch.dtype, ...] = DTYPES,  # that it takes
    out_dtype: torch.dtype | None = None,  # that it gives; None: the weight's
    smallest: float = SMALLEST,  # blocks with a smaller absmax count as about zero
    scale_error: float = 0.0,  # of scales that are quantized too, in units of the tensor's largest magnitude
    ties: str = "any",  # which of two equally near codes is right: any, or the smaller
    nonfinite: str | None = None,  # NaN and infinity are "refused" with an exception, or "kept" in place
    empty: str | None = None,  # a weight without values is "refused", or "kept"
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,  # the shapes that it takes, if not all
    skip: tuple[str, ...] = (),  # properties that need not hold
    max_examples: int = 40,  # tried for each property
    shrink: bool = True,  # False: report the first counterexample, in less time
    subject: str = "quantizer",  # its name in the report
) -> Report:
    """Return a report: each property, whether it held, and the smallest counterexample if it did not.

    Properties that the arguments exclude are skipped, with the reason. Raises ValueError for a property in
    `skip`, or a choice, that does not exist.
    """
    check_choice("ties", ties, ("any", "smaller"))
    check_choice("nonfinite", nonfinite, (None, "refused", "kept"))
    check_choice("empty", empty, (None, "refused", "kept"))
    quantizer = Quantizer(
        quantize, dequantize, code.detach().double(), blocksize, dtypes, out_dtype, smallest, scale_error,
        ties, nonfinite, empty, shape,
    )  # fmt: skip
    return QUANTIZER.run(quantizer, subject, skip, max_examples, shrink)
