"""How fast a model of Mistral-7B's shape answers: tokens a second at batch 1, also with an adapter, and at 8.

At batch 1 every token reads all weights once and does little else. So the limit is the bytes of the weights,
and of the adapter's A and B, at the rate at which this card copies memory.
"""

import time

import torch
from torch import nn

from gpu_sections.card import Stopwatch, empty_memory
from gpu_sections.models import LORA, MISTRAL_7B, TINY, random_ids, random_model
from gpu_sections.section import Check
from minilora.inference.generation import generate_stream
from minilora.linear import QuantizedLinear
from minilora.lora import add_lora, set_adapter

PROMPT, NEW = 128, 32  # tokens


def decode(check: Check) -> None:
    """Time the tokens after the first one."""
    sizes, prompt, new = (TINY, 8, 3) if check.tiny else (MISTRAL_7B, PROMPT, NEW)
    model = random_model(sizes, check.card)
    add_lora(model, LORA)
    rate = Stopwatch(check.tiny).copy_rate()
    for batch, adapter in ((1, None), (1, "default"), (8, None)):
        empty_memory()
        set_adapter(model, adapter)
        limit = rate / weight_bytes(model, adapter)
        ids = random_ids(sizes, batch, prompt).to(check.card.device)
        for _ in range(2):  # the first time warms up
            first, others = seconds_of_answer(model, ids, new)
        check.row(
            **{"batch": f"{batch}, with an adapter" if adapter else batch},
            **{"tokens/s": batch * (new - 1) / others, "limit, tokens/s": batch * limit},
            **{"ms a token": 1e3 * others / (new - 1), "prompt, ms": 1e3 * first},
            **{"allocated GiB": torch.cuda.max_memory_allocated() / 2**30},
        )


def seconds_of_answer(model: nn.Module, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Return the seconds to the first of `new` tokens, and those of all others."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    stream = generate_stream(model, ids, max_new_tokens=new, eos_token_ids=())
    next(stream)
    torch.cuda.synchronize()
    first = time.perf_counter()
    for _ in stream:
        pass
    torch.cuda.synchronize()
    return first - began, time.perf_counter() - first


def weight_bytes(model: nn.Module, adapter: str | None) -> int:
    """Return the bytes that a token reads: the layers and the head, but one row of the embedding."""
    quantized = sum(m.weight.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
    unread = ("embed_tokens",) if adapter else ("embed_tokens", "lora_")
    named = model.named_parameters()
    return quantized + sum(p.nbytes for name, p in named if not any(part in name for part in unread))
