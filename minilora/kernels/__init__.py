"""The Triton kernels: a door to the folder `kernels/` at the top of the repository, where they are read.

No package at the top may have that name: it would hide the `kernels` of PyPI, which transformers and
bitsandbytes import. A wheel holds the kernels in this file's place.

swiglu.py            the one to read first: docs/kernels.md follows it down to the GPU's instructions
rms_norm.py          RMSNorm with the sum before it
rope.py              the rotation of queries and keys, in one launch
cross_entropy.py     the losses of rows of logits, and their gradient in place
dropout.py           dropout from random bits drawn in registers
dropped_products.py  LoRA's thin products with dropout inside them, on tensor cores
segmented.py         rows that meet different adapters, in one launch
operations.py        all of these by the names of their operations
nf4.py               4-bit weights: dequantize, quantize, matrix times vector
adamw_8bit.py        AdamW with 8-bit moments
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2] / "kernels")]
