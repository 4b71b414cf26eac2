"""The kernels by the names of the operations that they compute (see `minilora.backend.choice.fastest`)."""

from .cross_entropy import cross_entropy
from .dropout import add_dropped, dropout
from .dropped_products import add_dropped_product, dropped_product, product_with_dropped
from .rms_norm import add_norm, add_norm_backward
from .rope import rope
from .segmented import expand, shrink
from .swiglu import swiglu, swiglu_backward

__all__ = [
    "add_dropped",
    "add_dropped_product",
    "add_norm",
    "add_norm_backward",
    "cross_entropy",
    "dropout",
    "dropped_product",
    "expand",
    "product_with_dropped",
    "rope",
    "shrink",
    "swiglu",
    "swiglu_backward",
]
