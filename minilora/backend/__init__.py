"""How an operation is run. What it computes is defined in the core; nothing here changes a number.

choice.py    which form of an operation runs: PyTorch, C or Triton
native.py    the C functions, called through ctypes
native_trial.py  whether they give known bits, found out once
library.py   the C library as a file: compiled on first use, kept in a private cache
native.c     its source: quantize, dequantize, AdamW in 8 bits
elementwise.py   the C forms of RMSNorm, RoPE, SwiGLU, cross-entropy and dropout
elementwise.c    their source
elementwise_trial.py   whether they give known bits, found out once
gemv.c       a 4-bit weight times one vector
decoding.py  one token through frozen layers and their adapters
amx.c        and on a CPU with AMX: the products with a 4-bit weight
cpu_attention.py  attention over the documents of a row, on a CPU with AMX
attention.c  its source
products.py      the products with a frozen weight, and an update added to them
fused_lora.py    LoRA inside the products of all layers that share an input
segmented.py     rows of one batch that meet different adapters
stacked.py       few rows of them on a CPU: two products for all adapters
segments.py      which rows these are
tables.py        small tables on a GPU: where tensors lie
dropout.py       dropout from a seed, without a mask
triton_trial.py  whether the Triton kernels run on a GPU, found out once
kernel_trial.py  whether each of them computes its definition there, found out once
scratch.py   a buffer that all layers share
graphs.py    a GPU's work, recorded and repeated
copies.py    numbers on their way to a GPU and back, with few waits
offload.py   layer inputs on their way to CPU memory and back
documents.py     where the documents of a batch lie
attention.py     attention over documents, in the fused kernels at hand
attention_trial.py  whether a GPU's kernels of attention compute its definition, found out once
attention_mask.py   attention's mask over a cache, as numbers, once for all layers
rerun.py     what a second run of a layer needs to repeat the first one
"""
