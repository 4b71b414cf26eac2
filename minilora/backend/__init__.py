"""How an operation is run. What it computes is defined in the core; nothing here changes a number.

choice.py    which form of an operation runs: PyTorch, C or Triton
native.py    the C functions, trusted after a trial, called through ctypes
library.py   the C library as a file: compiled on first use, kept in a private cache
native.c     its source: quantize, dequantize, AdamW in 8 bits
gemv.c       a 4-bit weight times one vector
decoding.py  one token through frozen layers and their adapters
amx.c        and on a CPU with AMX: the products with a 4-bit weight
triton_trial.py  whether the Triton kernels run on a GPU, found out once
scratch.py   a buffer that all layers share
copies.py    numbers on their way to a GPU and back, with few waits
offload.py   layer inputs on their way to CPU memory and back
attention_mask.py   attention's mask as numbers, once for all layers
rerun.py     what a second run of a layer needs to repeat the first one
attention_outputs.py  what fused attention gave in the first run, for the second one
"""
