"""Bytes that PyTorch's fully_shard gathers in a forward and a backward, as a program: counted_gathers.py REPORT
FIRST... REPORT is written as JSON, for each FIRST: the bytes that a rank of two receives, and those of its shards.

A model of plain weights, each decoder layer a group and the whole model the root, with LoRA on the decoder layers
from FIRST on, which is not sharded. The two ranks are forked, and talk with gloo.
"""

import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora import CausalLM, LoraConfig, add_lora, trainable_parameters
from minilora.formats.config_json import parse_config

SIZES = dict(vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=4)
LLAMA = parse_config(dict(model_type="llama", num_attention_heads=4, num_key_value_heads=2) | SIZES)


def lora(first: int) -> LoraConfig:
    return LoraConfig(r=2, target_modules=("q_proj", "down_proj"), layers_to_transform=(*range(first, 4),))


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


def count(first: int) -> dict[str, int]:
    model = CausalLM(LLAMA)
    model.init_weights()
    add_lora(model, lora(first))
    trained = set(trainable_parameters(model).values())
    for module in (*model.model.layers, model):
        fully_shard(module, ignored_params=trained)
    shards = sum(p.to_local().nbytes for p in model.parameters() if p not in trained)
    with Gathers() as gathers:
        model(torch.arange(12).view(2, 6)).sum().backward()
    return dict(received=gathers.received, shards=shards)


def main() -> None:
    report, firsts = Path(sys.argv[1]), [int(word) for word in sys.argv[2:]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    torch.set_num_threads(1)
    other = os.fork()
    dist.init_process_group("gloo", init_method=address, rank=int(other == 0), world_size=2)
    counted = [count(first) for first in firsts]
    dist.barrier()
    dist.destroy_process_group()
    if other == 0:
        os._exit(0)
    assert os.waitpid(other, 0)[1] == 0
    report.write_text(json.dumps(counted))


if __name__ == "__main__":
    main()
