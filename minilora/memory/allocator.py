"""How a CPU's memory is used from step to step, beside what tensors hold: holes in the heap, and compiled
kernels.

Holes. glibc keeps freed blocks for the next step in one heap. Blocks of other sizes leave holes in it: the
heap of a training step is about half as large again as its activations. `return_freed_memory` gives every
block over 1 MiB back to the system at once. Then there are no holes, but every activation touches fresh
pages, which the kernel must clear, and steps take longer. So it is called only where
the ledger says that the heap would not fit.

Batches of many different lengths leave more holes than that, and more with every new length. Once a run has
taken more than was predicted, `return_holes` gives the free pages back after each step. They are touched once
a step then, instead of once an activation, which costs next to nothing.

Kernels. For bfloat16 products oneDNN compiles kernels for each shape, of some 256 kB each, and keeps them.
The shapes follow the number of tokens, so memory would grow with every new length. Two bounds hold it:
`limit_compiled_kernels` lets oneDNN keep only the last ones, and `padded_length` rounds lengths up, so that
there are few of them. The second is needed for fused attention, whose kernels PyTorch never drops.
"""

import ctypes
import os
import platform

import torch

from minilora.backend.choice import padded_length, product_dtype

HEAP_HOLES = 0.6  # bytes of holes a byte of activations; fitted to a 1.1B model, 1 x 512 tokens
PRODUCT_KERNELS, PRODUCT_KERNEL_BYTES = 256, 350_000  # how many oneDNN may keep, and the size of one
ATTENTION_BYTES = 8 << 20  # of the kernels of fused attention, for each length of a document
KERNELS_A_LENGTH, BASE_KERNELS = 24, 8  # shapes of products that a new length brings along; of base layers


def return_freed_memory() -> None:
    """Make glibc give freed blocks over 1 MiB back to the system at once, from now on. Elsewhere this does
    nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        M_MMAP_THRESHOLD = -3  # malloc.h; 32 MiB is where it would move by itself
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def return_holes() -> None:
    """Give the heap's free pages back to the system, now. Elsewhere than with glibc this does nothing."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def limit_compiled_kernels() -> None:
    """Let oneDNN keep at most PRODUCT_KERNELS compiled products. For a script to call before it computes
    anything.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCT_KERNELS))


def compiles_kernels(dtype: torch.dtype, device: str) -> bool:
    """Whether products in this dtype are compiled for each shape: bfloat16's on a CPU that has instructions
    for it.
    """
    return device == "cpu" and product_dtype(torch.empty(0, dtype=dtype)) == torch.bfloat16


def compiled_kernel_bytes(rows: int, documents: int, packed: bool = False) -> int:
    """Return the bytes of the kernels compiled for so many different lengths of rows, and of documents.

    packed: the base layers' products are not oneDNN's (see `linear._multiplies_packed`).
    """
    a_length = KERNELS_A_LENGTH - packed * BASE_KERNELS
    return min(PRODUCT_KERNELS, a_length * rows) * PRODUCT_KERNEL_BYTES + ATTENTION_BYTES * documents


def padded_lengths(shortest: int, longest: int) -> int:
    """Return how many different lengths `padded_length` makes of those from the shortest to the longest."""
    count, length = 0, shortest
    while length <= longest:
        count, length = count + 1, padded_length(length) + 1
    return count
