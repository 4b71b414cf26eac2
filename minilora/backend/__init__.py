"""How an operation is run. What it computes is defined in the core; nothing here changes a number.

choice.py    PyTorch, C or Triton: which form of an operation runs, and the trial that a form must pass
native.py    the C library: compiled on first use, called through ctypes
native.c     its source: quantize, dequantize, AdamW in 8 bits
offload.py   layer inputs on their way to CPU memory and back
"""
