"""A training step of a model of Mistral-7B's shape: speed beside this card's limit, memory beside the ledger.

The limit of a policy: the floating-point operations of its step, at the rate of this card's largest matrix
products. Nothing that is not a product takes time there. A step that runs out of memory is a result.
"""

import torch

from gpu_sections.card import Stopwatch
from gpu_sections.models import LORA, MISTRAL_7B, TINY, Side, measure, our_side, random_model, random_rows
from gpu_sections.section import Check
from minilora.config import QuantConfig
from minilora.data.examples import Example
from minilora.memory.ledger import MARGIN, Ledger, memory_ledger
from minilora.model import CausalLM
from minilora.recompute import set_recompute

GIB = 2**30
DOCUMENTS = 16  # in the packed row
LEAST_SECONDS = 10  # A step of 4 x 1024 tokens takes 7 s on a T4 by the limit of its products.
WORK = (  # batch, length, documents in a row; the most telling first
    (4, 1024, 1),
    (1, 4096, DOCUMENTS),
    (1, 1024, 1),
)


def steps(check: Check) -> None:
    """Every policy on every batch."""
    measure_steps(check, ("full", "selective", "off", "offload"), WORK)


def measure_steps(check: Check, policies: tuple[str, ...], work: tuple[tuple[int, int, int], ...]) -> None:
    """Report the steps of all policies on this work, each with what was predicted for it."""
    sizes = TINY | dict(num_hidden_layers=1) if check.tiny else MISTRAL_7B
    product_rate = Stopwatch(check.tiny).product_rate(check.card.dtype)
    check.note(f"a large product of this card: {product_rate / 1e12:,.0f} TFLOP/s")
    model = random_model(sizes, check.card)
    side = our_side(model, check.card)
    within = []
    for batch, length, documents in work:
        rows = random_rows(sizes, batch, length // 64 if check.tiny else length, documents)
        for policy in policies:
            if check.left < LEAST_SECONDS:
                check.note(f"no time was left for {title_of(rows)}, {policy}")
            else:
                within.append(measure_step(check, policy, model, side, rows, product_rate))
    # cuBLAS's workspace alone is more than a tiny model.
    if not check.tiny:
        check.claim(f"no step allocated more than {MARGIN} times what the ledger predicts", all(within))


def title_of(rows: list[Example]) -> str:
    packed = len(rows[0].document_lengths) > 1
    return f"{len(rows)} x {len(rows[0].input_ids)}{', packed' * packed}"


def measure_step(
    check: Check,
    policy: str,
    model: CausalLM,
    side: Side,
    rows: list[Example],
    product_rate: float,
) -> bool:
    """Report one step. Returns whether its memory was within the margin of the prediction."""
    set_recompute(model, policy)
    ledger = ledger_of(model, check.card.dtype, policy, rows)
    limit = product_rate / ledger.flop_per_token
    columns = {"batch": title_of(rows), "policy": policy}
    found = measure(side, rows, repeat=1 if check.tiny else 3)
    if found is None:
        check.row(**columns, **{"tokens/s": "out of memory", "predicted GiB": ledger.peak / GIB})
        return True
    speed = sum(len(row.input_ids) for row in rows) / found.seconds
    columns |= {"tokens/s": speed, "limit, tokens/s": limit, "share of limit": speed / limit}
    columns |= {"step, ms": 1e3 * found.seconds, "host, ms": 1e3 * found.host_seconds}
    columns |= {"allocated GiB": found.allocated / GIB, "reserved GiB": found.reserved / GIB}
    check.row(**columns, **{"predicted GiB": ledger.peak / GIB})
    return found.allocated <= MARGIN * ledger.peak


def ledger_of(model: CausalLM, dtype: torch.dtype, policy: str, rows: list[Example]) -> Ledger:
    """Return what is predicted for a step."""
    size = dict(batch_size=len(rows), length=len(rows[0].input_ids))
    how = dict(dtype=dtype, recompute=policy, optim="adamw_8bit")
    return memory_ledger(model.config, LORA, QuantConfig(), **size, **how)
