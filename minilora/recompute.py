"""Gradient checkpointing by hand: backward computes again what forward did not keep (arXiv:1604.06174).

Backward through a layer needs the activations of its forward: in Mistral-7B 12.5 times as much as its input.
Keeping them for all L layers is most of the memory of training. A checkpointed layer keeps its input alone.
Its backward first runs the layer again, this time with a graph:

    forward     y = layer(x) without a graph; keep x                            memory a layer: one (Bt, T, D)
    backward    y = layer(x) with a graph; dx, d(parameters) = its backward; forget it    one live layer

The price is most of one more forward: with rows of 1024 tokens 40 instead of 29 GFLOP a token for Mistral-7B.
The policies pay different parts of it:

    off         keep everything, recompute nothing
    full        keep layer inputs
    selective   keep layer inputs and attention's outputs and log-sum-exps, so that attention runs once
    offload     keep layer inputs in pinned CPU memory; they come back one layer ahead of their use

Each layer may follow its own: `memory/planner.py` lets as many layers keep everything as there is room for.

None of them computes the last product of a layer, down_proj, again, unless DoRA reads its values. Its
output is added to the residual stream, and the gradient of a sum reads no value: see
`DecoderLayer.rerun_for_backward`. That saves 27 % of the second run's products.

The second run must repeat the first bit for bit: the random state (dropout) and autocast's are saved and
restored. With them gradients are bit-identical to those of `off`.

Why not torch.utils.checkpoint: its reentrant form gives no gradient when no input needs one, as behind a
frozen embedding; its other form hooks every saved tensor. Here parameters are inputs of the autograd
function, so they get gradients whatever the input needs, `torch.autograd.grad` works as well as `backward`,
and a tensor that could not get a gradient is an error.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.backend.attention import KeptAttention
from minilora.backend.offload import OffloadedInputs
from minilora.backend.rerun import Pattern, State, put_tensors, take_tensors
from minilora.system.errors import UserError, suggestion

POLICIES = ("off", "selective", "full", "offload")  # from the fastest to the most frugal


def set_recompute(model: nn.Module, policy: str | Sequence[str]) -> str | tuple[str, ...]:
    """Choose what layers keep for backward: one policy for all, or a sequence of one a layer.

    Returns what is in effect: on a CPU `offload` is `full`. Raises UserError for an unknown policy.
    """
    layers = len(model.model.layers)
    policies = (policy,) * layers if isinstance(policy, str) else tuple(policy)
    for name in policies:
        if name not in POLICIES:
            raise UserError(f"gradient_checkpointing = {name!r} is not known{suggestion(name, POLICIES)}")
    if len(policies) != layers:
        raise UserError(f"{len(policies)} recompute policies are given for a model of {layers} layers")
    if not model.model.embed_tokens.weight.is_cuda:  # the inputs are in CPU memory already
        policies = tuple("full" if name == "offload" else name for name in policies)
    model.model.recompute = policies
    return policies[0] if isinstance(policy, str) else policies


def checkpoint(
    function: Callable,
    *arguments: Any,
    rerun: Callable | None = None,
    parameters: Iterable[Tensor] | None = None,
    keep_attention: bool = False,
    offload: OffloadedInputs | None = None,
) -> Any:
    """Return function(*arguments), a tensor or a tuple of tensors; keep only the tensors among the arguments.

    Arguments may be nested tuples, lists and dicts. `parameters` are the tensors that the function uses
    without being given them and that need gradients; by default all parameters of an nn.Module. `rerun`
    replaces the function in backward: the same computation, with arbitrary values where backward reads none.
    With `keep_attention` both are given `kept`, a KeptAttention, for `ops.document_attention`.
    Raises RuntimeError in backward if some tensor's gradient would be lost.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    if parameters is None:
        parameters = function.parameters() if isinstance(function, nn.Module) else ()
    parameters = [p for p in parameters if p.requires_grad]
    tensors, pattern = take_tensors(arguments)
    call = _Call(function, rerun or function, pattern, len(tensors), keep_attention, offload)
    return _Checkpoint.apply(call, *tensors, *parameters)


class _Call(NamedTuple):
    """A function and how to run it, the second time too."""

    function: Callable
    rerun: Callable
    pattern: Pattern  # of the arguments
    count: int  # of the tensors among them
    keep_attention: bool
    offload: OffloadedInputs | None

    def run(self, function: Callable, arguments: Iterable[Tensor], kept: KeptAttention) -> Any:
        options = dict(kept=kept) if self.keep_attention else {}
        return function(*put_tensors(self.pattern, arguments), **options)


class _Checkpoint(torch.autograd.Function):
    """Run without a graph and keep the inputs; in backward run again with a graph, and use that."""

    @staticmethod
    def forward(ctx, call: _Call, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        arguments, parameters = tensors[: call.count], tensors[call.count :]
        ctx.call, ctx.state = call, State(arguments)
        kept = KeptAttention()
        outputs = call.run(call.function, arguments, kept)
        attention, ctx.attention = take_tensors(kept.outputs)
        if call.offload is not None and any(ctx.needs_input_grad):  # else there is no backward
            ctx.offload_index, arguments = call.offload.put(arguments[0]), arguments[1:]
        ctx.save_for_backward(*arguments, *parameters, *attention)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call, saved, needs = ctx.call, list(ctx.saved_tensors), ctx.needs_input_grad[1:]
        if call.offload is not None:
            saved.insert(0, call.offload.take(ctx.offload_index))
        arguments, parameters, attention = (
            saved[: call.count],
            saved[call.count : len(needs)],
            saved[len(needs) :],
        )
        arguments = [t.detach().requires_grad_(need) for t, need in zip(arguments, needs, strict=False)]
        kept = KeptAttention(put_tensors(ctx.attention, attention))
        with ctx.state.restored(), torch.enable_grad():
            outputs = call.run(call.rerun, arguments, kept)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [t for t, need in zip(arguments + parameters, needs, strict=True) if need]
        _check_nothing_is_lost(outputs, wanted)
        used = [i for i, y in enumerate(outputs) if y.requires_grad]
        y, dy = [outputs[i] for i in used], [gradients[i] for i in used]
        found = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        return None, *(next(found) if need else None for need in needs)


def _check_nothing_is_lost(outputs: tuple[Tensor, ...], wanted: list[Tensor]) -> None:
    """Raise RuntimeError if the graph behind the outputs reaches a tensor whose gradient would go nowhere."""
    known = {id(t) for t in wanted}
    todo, seen = [y.grad_fn for y in outputs if y.grad_fn is not None], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in known:
            raise RuntimeError(
                f"the checkpointed function uses a tensor {tuple(leaf.shape)} that needs a gradient and is "
                "neither an argument nor among its parameters; pass it, or name it in `parameters`"
            )
        todo += [before for before, _ in node.next_functions if before is not None]
