"""Models larger than one GPU: every process keeps a part of the frozen weights. Read in this order:

shards.py        a weight cut into rows, and the layers that compute while it is whole
gathering.py     which layer is whole when: PyTorch's fully_shard, driven by the model's own course
loading.py       each rank reads, quantizes and keeps its part of the files, to the same bits
passes.py        all ranks take equally many passes through the model
choice.py        when a model is divided, and what is refused then

system/distributed.py starts the processes and sums the gradients of the adapter, divided or not.
"""
