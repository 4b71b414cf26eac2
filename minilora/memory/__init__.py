"""Where the bytes of a training step go, predicted before a weight is read.

ledger.py          everything by category and moment
planner.py         which layers are recomputed, so that it fits; advice
ranks.py           several processes: the bytes of each, and whether they share one model
traffic.py         several processes: the bytes that they send, and how long a step takes
stored_layers.py   the part that depends on quantization: frozen layers, and the buffer to dequantize into
activations.py     the part that depends on tokens: what a layer and the loss hold
allocator.py       a CPU's heap and its compiled kernels: how both are kept small
"""
