"""A loss or a gradient that is not finite: is float16 at fault, or the training, and in which layer?

    the loss is not finite     an activation overflowed in forward. The loss scale S multiplies the loss only
                               afterwards, so no smaller S can mend it. float16 skips one such step, of a
                               single bad row, and ends the run after three in a row.
    only gradients are not     they overflowed in backward. `loss_scale.py` skips the step and halves S.

A run pays nothing for the answer while all is well: it has the loss on the host once a step anyway. When it
must end, the step's micro-batches go through the model once more, with a hook on every layer. The optimizer
has not taken the step, so the same numbers overflow again.

The frozen model goes first, without its adapter. If it overflows alone, no learning rate is at fault: float16
ends at 65,504, and models trained in bfloat16 may exceed that. Otherwise the adapter has diverged.
"""

import math
from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor, nn

from minilora.lora import set_adapter
from minilora.loss import causal_lm_loss
from minilora.loss_scale import LossScale
from minilora.model import CausalLM
from minilora.parallel.choice import least
from minilora.parallel.passes import catch_up, gathering_of
from minilora.run import checkpoints
from minilora.run.plan import Plan
from minilora.run.tracker import Tracker
from minilora.system.distributed import Processes
from minilora.system.errors import UserError

ALONE = Processes()
HEAD = "the output of lm_head"
LOST_IN_A_ROW = 3  # steps whose forward overflows, after which a run in float16 ends


class Run(Protocol):
    """The part of `scripts/train.py`'s Run that is read here."""

    model: CausalLM
    trainable: dict[str, nn.Parameter]  # by names that end with the adapter's
    loss_scale: LossScale
    tracker: Tracker
    step: int
    lost: list[int]


def explain_not_finite(
    plan: Plan, run: Run, loss: float, norm: float, micro_batches: Iterable[tuple[Tensor | None, ...]]
) -> None:
    """Say that a step was skipped because forward overflowed; raise UserError if training cannot go on.

    Called after a step whose loss or gradient norm is not finite. micro_batches: this process's of that step,
    as arguments of `causal_lm_loss` behind the model.
    """
    if not math.isfinite(loss):
        run.lost.append(run.step)
    last = range(run.step - LOST_IN_A_ROW + 1, run.step + 1)
    if run.loss_scale.diverged or run.lost[-LOST_IN_A_ROW:] == list(last):
        raise UserError(_reason(plan, run, loss, norm, list(micro_batches)))
    if not math.isfinite(loss):
        run.tracker.say(f"step {run.step}: loss {loss:g}: an activation overflows float16; step skipped")


def _reason(plan: Plan, run: Run, loss: float, norm: float, micro_batches: list) -> str:
    """Return the line for the user: what is not finite, where it begins, and what helps."""
    adapter = next(iter(run.trainable)).rpartition(".")[2]
    others = plan.processes, len(plan.order.batches(run.step - 1))
    set_adapter(run.model, None)
    if place := first_not_finite(run.model, micro_batches, *others):
        return f"loss {loss:g} at step {run.step}: {place} {_without_adapter(plan)}"
    set_adapter(run.model, adapter)
    place = first_not_finite(run.model, micro_batches, *others)
    good = checkpoints.list_checkpoints(plan.output_dir, up_to=run.step - run.loss_scale.skipped_in_a_row)
    return (
        f"loss {loss:g}, gradient norm {norm:g} at step {run.step}: training diverged; "
        f"lower learning_rate = {plan.config.learning_rate:g} "
        f"(last good checkpoint: {good[-1] if good else 'none was saved yet'}"
        + (f"; not finite first: {place})" if place else ")")
    )


def _without_adapter(plan: Plan) -> str:
    """Return the end of the line where the frozen model is not finite by itself."""
    if plan.placement.dtype != torch.float16:
        return "is not finite without the adapter too; check that layer's weights"
    first = "leave out fp16 and take" if plan.config.fp16 else "take"
    return (
        "is beyond float16's range (65,504) without the adapter too, so training slower does not help; "
        f"{first} --bf16 true (fast on GPUs of compute capability 8 and newer) or --bf16 false (float32)"
    )


@torch.no_grad()
def first_not_finite(
    model: CausalLM,
    micro_batches: Iterable[tuple[Tensor | None, ...]],
    processes: Processes = ALONE,
    items: int = 0,  # micro-batches of all processes
) -> str | None:
    """Return where a forward pass first has an inf or a nan, as `the output of NAME`, or None.

    `the input of NAME` is the place if all layers before it are finite, and a sum or product of them is not.
    Processes that train together call it together, and all return the first place of any of them.
    """
    found: list[str] = []
    layers = {name: layer for name, layer in model.named_modules() if name and "base_layer" not in name}
    hooks = [layer.register_forward_hook(_watch(name, found)) for name, layer in layers.items()]
    try:
        for arguments in micro_batches:
            loss = causal_lm_loss(model, *arguments)
            if not (found or loss.isfinite()):
                # Without an adapter the loss takes the head's weight and does not call the head.
                found.append(HEAD)
            if found and gathering_of(model) is None:
                break  # processes that share the model take equally many passes
        catch_up(model, processes, items, eval_batch_size=1)
    finally:
        for hook in hooks:
            hook.remove()
    places = [f"the {part} of {name}" for name in layers for part in ("input", "output")] + [HEAD]
    (first,) = least(processes, places.index(found[0]) if found else len(places))
    return places[first] if first < len(places) else None


def _watch(name: str, found: list[str]) -> Callable[[nn.Module, tuple, Tensor], None]:
    """Return a hook that notes a layer's input or output if it is the first that is not finite."""

    def look(_: nn.Module, inputs: tuple, output: Tensor) -> None:
        for part, x in ("input", inputs[0]), ("output", output):
            if not found and not x.isfinite().all():
                found.append(f"the {part} of {name}")

    return look
