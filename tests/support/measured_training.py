"""Train a random quantized model in a process of its own, with one recompute policy after the other, and
print the memory it took.

    python tests/support/measured_training.py '{"config": {...}, "lora": {...}, "dtype": "float32",
    "batch_size": 2, "length": 512}'

The system tells the peak of a process since its start, so the policies come in the order of their need.
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from minilora import CausalLM, LoraConfig, ModelConfig, add_lora, quantize_4bit, trainable_parameters
from minilora.backend import scratch
from minilora.formats.config_json import parse_config
from minilora.linear import Linear4bit
from minilora.loss import causal_lm_loss
from minilora.memory.allocator import limit_compiled_kernels, return_freed_memory
from minilora.memory.planner import split
from minilora.optim import make_optimizer
from minilora.recompute import set_recompute
from minilora.system.device import memory_used


def recompute_policies(layers: int) -> dict[str, str | tuple[str, ...]]:
    """Return names and what to recompute: a policy, or one for each layer. Each needs more than those before."""
    return {
        "full": "full",
        "selective": "selective",
        "all but one": split(layers, layers - 1, 0),
        "off": "off",
    }


def random_model(config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    """Weight after weight, as `load_model` does it, so that building is not the peak."""
    with torch.device("meta"):
        model = CausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        layer, value = model.get_submodule(parent), torch.ones(parameter.shape)
        if parameter.ndim == 2:
            value.normal_(0, 0.02, generator=generator)
        if isinstance(layer, nn.Linear) and parent != "lm_head":
            model.set_submodule(parent, Linear4bit(quantize_4bit(value)))
        else:
            setattr(layer, leaf, nn.Parameter(value.to(dtype), requires_grad=False))
    return model


def peaks(config: dict, lora: dict, dtype: str, batch_size: int, length: int) -> dict[str, int]:
    """Bytes by policy."""
    model = random_model(parse_config(config), getattr(torch, dtype))
    add_lora(model, LoraConfig(**lora))
    model.train()
    trainable, found = trainable_parameters(model), {}
    optimizer = make_optimizer("adamw_8bit", trainable, lr=1e-4, weight_decay=0.0)
    for parameter in trainable.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # now there are moments, as in all steps but the first
    optimizer.zero_grad(set_to_none=True)
    for name, policy in recompute_policies(config["num_hidden_layers"]).items():
        set_recompute(model, policy)
        for _ in range(2):  # the second micro-batch finds the gradients of the first
            input_ids = torch.randint(0, config["vocab_size"], (batch_size, length))
            (causal_lm_loss(model, input_ids, input_ids) / input_ids.numel()).backward()
        nn.utils.clip_grad_norm_(trainable.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found[name] = memory_used(torch.device("cpu"))
    return found


def main() -> None:
    return_freed_memory()
    limit_compiled_kernels()
    torch.set_num_threads(2)  # each packs matrices in memory of its own
    case = json.loads(sys.argv[1])
    peaks(
        **case
        | dict(config=case["config"] | dict(vocab_size=1000, num_hidden_layers=1), batch_size=1, length=64)
    )  # a warm-up
    scratch.release()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )  # PyTorch and other libraries
    print(json.dumps(peaks(**case) | {"process": resident}))


if __name__ == "__main__":
    main()
