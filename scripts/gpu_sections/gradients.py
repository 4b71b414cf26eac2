"""Does every recompute policy give the gradients of `off`, in this card's 16-bit dtype, packed and not?

The second run of a layer repeats the first to the bit, but some of PyTorch's attentions sum their gradients
with atomic additions, in no fixed order. So `off` runs twice: as far as it repeats itself, so far the others
must repeat it. Where it does to the bit, they must too.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from gpu_sections.models import LORA, TINY, mean_loss, random_model, random_rows
from gpu_sections.section import Check
from minilora.data.examples import batch_for
from minilora.lora import add_lora, trainable_parameters
from minilora.model import CausalLM
from minilora.recompute import POLICIES, set_recompute

# Large enough for the attention that a 7B model takes: heads of 128, hundreds of tokens.
SIZES = TINY | dict(vocab_size=512, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4)
SIZES |= dict(num_attention_heads=8, num_key_value_heads=2)
FACTOR = 4  # Two orders of summation may differ by some multiple of what two others did.


def gradients(check: Check) -> None:
    """Compare every policy with `off`, packed and not, with dropout."""
    sizes = TINY if check.tiny else SIZES
    model = random_model(sizes, check.card)
    add_lora(model, replace(LORA, lora_dropout=0.1))
    model.train()
    for parameter in trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.02)  # B too: behind zeros A has no gradient
    for name, documents in {"causal": 1, "packed": 4}.items():
        rows = random_rows(sizes, 2, 32 if check.tiny else 512, documents)
        compare_policies(check, model, name, batch_for(check.card.device, rows, pad_id=0))


def compare_policies(check: Check, model: CausalLM, rows: str, batch: tuple[Tensor | None, ...]) -> None:
    """Report each policy's difference from `off`."""
    loss, wanted = run(model, "off", batch)
    repeated, allowed, unlike = "off, again", 0.01, []  # allowed: of the first repetition
    for policy in (repeated, *POLICIES[1:]):
        value, found = run(model, "off" if policy == repeated else policy, batch)
        worst = max(relative_difference(a, b) for a, b in zip(found, wanted, strict=True))
        check.row(**{"rows": rows, "policy": policy, "loss": value, "worst relative difference": worst})
        if not (value == loss and worst <= allowed):
            unlike.append(policy)
        if policy == repeated:
            allowed = FACTOR * worst
    text = f"{rows}: all have the loss of `off`, and its gradients as exactly as `off` repeats them"
    check.claim(text + f"; not so: {'; '.join(unlike)}" * bool(unlike), not unlike)


def run(model: CausalLM, policy: str, batch: tuple[Tensor | None, ...]) -> tuple[float, list[Tensor]]:
    """Return the loss and every gradient under a policy, with the dropout of one seed."""
    set_recompute(model, policy)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    loss = mean_loss(model, *batch)
    # Scaled, as a float16 run does: gradients neither vanish nor overflow.
    (1024 * loss).backward()
    return loss.item(), [p.grad.clone() for p in trainable_parameters(model).values()]


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return |a - b| / |b| in the norm; infinite if either is not finite."""
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return ((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny)).item()
