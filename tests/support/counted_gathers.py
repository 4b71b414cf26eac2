"""Bytes that PyTorch's fully_shard gathers, as a program: counted_gathers.py REPORT FOLDER... REPORT is written
as JSON: for the model in each FOLDER, with LoRA on its decoder layers from FIRST on, the bytes that a rank of two
receives in a micro-batch, and those of its shards.

Models are read in 4 bits. The two ranks are forked, and talk with gloo.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora import LoraConfig, QuantConfig, add_lora
from minilora.loss import causal_lm_loss
from minilora.recompute import set_recompute
from minilora.system.distributed import Processes

FIRST = (0, 2)


class Gathers(TorchDispatchMode):
    """Bytes that all-gathers bring from the other rank: the output of two parts less this rank's."""

    def __init__(self):
        super().__init__()
        self.received = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if "allgather" in str(operation):
            output, part = (t for t in tree_leaves(arguments[:2]) if isinstance(t, torch.Tensor))
            self.received += output.nbytes - part.nbytes
        return operation(*arguments, **options or {})


def count(folder: Path, first: int, rank: int) -> dict[str, int]:
    from minilora.parallel.loading import load_sharded

    cpu = torch.device("cpu")
    model = load_sharded(folder, QuantConfig(), torch.float32, cpu, Processes(rank, 2, cpu))
    layers = (*range(first, model.config.num_hidden_layers),)
    add_lora(model, LoraConfig(r=2, target_modules=("q_proj", "v_proj"), layers_to_transform=layers))
    set_recompute(model.train(), "full")
    ids = torch.arange(12).view(2, 6)
    causal_lm_loss(model, ids, ids).backward()  # the embedding is fetched ahead for the next micro-batch
    with Gathers() as gathers:
        causal_lm_loss(model, ids, ids).backward()
    model.gathering.close()
    shards = (p.to_local().nbytes for unit in model.gathering.units for p in unit.parameters())
    return dict(received=gathers.received, shards=sum(shards))


def main() -> None:
    report, *folders = map(Path, sys.argv[1:])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.set_num_threads(1)
    other = os.fork()
    rank = int(other == 0)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    counted = [count(folder, first, rank) for folder in folders for first in FIRST]
    dist.barrier()
    dist.destroy_process_group()
    if other == 0:
        os._exit(0)
    assert os.waitpid(other, 0)[1] == 0
    report.write_text(json.dumps(counted))


if __name__ == "__main__":
    main()
