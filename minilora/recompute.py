"""Gradient checkpointing by hand: compute again in backward what was not kept in forward (Chen et al. 2016,
arXiv:1604.06174).

Backward through a layer needs the activations of its forward: some 20 tensors as large as its input and more.
Keeping them for all L layers is most of the memory of training. A checkpointed layer keeps its input alone,
and its backward begins by running the layer again, this time remembering:

    forward     y = layer(x) without a graph; keep x                               memory a layer: one (B, T, D)
    backward    y = layer(x) with a graph; dx, d(parameters) = its backward; forget it   one live layer at a time

One more forward is the price: 44 instead of 30 GFLOP a token for a 7B model. Which policy pays how much of
it:

    off         keep everything, recompute nothing
    full        keep layer inputs
    selective   keep layer inputs and attention's outputs and log-sum-exps, so that attention is not computed twice
    offload     keep layer inputs in pinned CPU memory; they come back one layer ahead of their use

None of them computes the last product of a layer, down_proj, again. Its output is added to the residual
stream and leaves the layer, and no backward formula reads it: see `DecoderLayer.replay`. That is a fifth of a
layer's products, for nothing.

The second run must be the first one again, to the bit: the random state (dropout) and autocast's are saved
and restored. With them gradients are bit-identical to those of `off`.

Why not torch.utils.checkpoint: its reentrant form gives no gradient when no input needs one, as behind a
frozen embedding; its other form hooks every saved tensor. Here parameters are inputs of the autograd function
like the others, so they get gradients whatever the input needs, `torch.autograd.grad` works as well as
`backward`, and a tensor that could not get one is an error.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.system.errors import UserError, suggestion

POLICIES = ("off", "selective", "full", "offload")  # from the fastest to the most frugal


def set_recompute(model: nn.Module, policy: str) -> str:
    """Choose what the decoder's layers keep for backward. Returns the policy in effect: `offload` on a CPU is
    `full`.

    Raises UserError for an unknown policy.
    """
    if policy not in POLICIES:
        raise UserError(f"gradient_checkpointing = {policy!r} is not known{suggestion(policy, POLICIES)}")
    if policy == "offload" and not model.model.embed_tokens.weight.is_cuda:
        policy = "full"  # the inputs are in CPU memory already
    model.model.recompute = policy
    return policy


def checkpoint(
    function: Callable,
    *arguments: Any,
    replay: Callable | None = None,
    parameters: Iterable[Tensor] | None = None,
    keep_attention: bool = False,
    offload: "OffloadedInputs | None" = None,
) -> Any:
    """function(*arguments), keeping for backward only the tensors among the arguments, in nested tuples,
    lists and dicts too.

    The function returns a tensor or a tuple of tensors. `parameters` are the tensors that it uses without
    being given them and that need gradients: of an nn.Module all of its own, by default. `replay` runs in its
    stead in backward: the same computation, with any values at all where backward reads none. Raises
    RuntimeError in backward if some tensor's gradient would be lost.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    if parameters is None:
        parameters = function.parameters() if isinstance(function, nn.Module) else ()
    parameters = [p for p in parameters if p.requires_grad]
    tensors: list[Tensor] = []
    pattern = _take_tensors(arguments, tensors)
    call = _Call(function, replay or function, pattern, len(tensors), keep_attention, offload)
    return _Checkpoint.apply(call, *tensors, *parameters)


class _Call(NamedTuple):
    """What to run, and how."""

    function: Callable
    replay: Callable
    pattern: Any  # the arguments with a _Place where a tensor was
    count: int  # of those tensors
    keep_attention: bool
    offload: "OffloadedInputs | None"


class _Checkpoint(torch.autograd.Function):
    """Run without a graph and keep the inputs; in backward run again with a graph, and go back through that."""

    @staticmethod
    def forward(ctx, call: _Call, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        arguments, parameters = tensors[: call.count], tensors[call.count :]
        ctx.call, ctx.state = call, _State(arguments)
        with _KeepAttention() if call.keep_attention else ExitStack() as attention:
            outputs = call.function(*_put_tensors(call.pattern, arguments))
        kept = ctx.attention = (
            attention.outputs if call.keep_attention else []
        )  # one list an attention: tensors and plain numbers
        if call.offload is not None:
            ctx.place, arguments = call.offload.put(arguments[0]), arguments[1:]
        attention_tensors: list[Tensor] = []
        ctx.attention = _take_tensors(kept, attention_tensors)
        ctx.save_for_backward(*arguments, *parameters, *attention_tensors)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, list(ctx.saved_tensors)
        if call.offload is not None:
            saved.insert(0, call.offload.take(ctx.place))
        needs = ctx.needs_input_grad[1:]
        arguments = [
            t.detach().requires_grad_(need) for t, need in zip(saved[: call.count], needs, strict=False)
        ]
        parameters, attention_tensors = saved[call.count : len(needs)], saved[len(needs) :]
        kept = (
            _KeepAttention(_put_tensors(ctx.attention, attention_tensors))
            if call.keep_attention
            else ExitStack()
        )
        with ctx.state.restored(), torch.enable_grad(), kept:
            outputs = call.replay(*_put_tensors(call.pattern, arguments))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        wanted = [t for t, need in zip(arguments + parameters, needs, strict=True) if need]
        _check_nothing_is_lost(outputs, wanted)
        used = [i for i, y in enumerate(outputs) if y.requires_grad]
        found = torch.autograd.grad(
            [outputs[i] for i in used], wanted, [gradients[i] for i in used], allow_unused=True
        )
        found = iter(found)
        return None, *(next(found) if need else None for need in needs)


class _State:
    """The random numbers and the autocasting that the first run saw, for the second one."""

    def __init__(self, tensors: Iterable[Tensor]):
        self.gpus = sorted({t.get_device() for t in tensors if t.is_cuda})
        self.cpu_random, self.gpu_random = (
            torch.get_rng_state(),
            [torch.cuda.get_rng_state(gpu) for gpu in self.gpus],
        )
        kinds = ["cpu"] + ["cuda"] * bool(self.gpus)
        self.autocast = {
            kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds
        }
        self.autocast_cache = torch.is_autocast_cache_enabled()

    @contextmanager
    def restored(self):
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(self.gpus))
            torch.set_rng_state(self.cpu_random)
            for gpu, state in zip(self.gpus, self.gpu_random, strict=True):
                torch.cuda.set_rng_state(state, gpu)
            for kind, (dtype, enabled) in self.autocast.items():
                stack.enter_context(torch.autocast(kind, dtype, enabled, self.autocast_cache))
            yield


class _KeepAttention(TorchDispatchMode):
    """Below autograd, where PyTorch calls a fused attention: keeps what it gives, or gives what was kept
    instead of calling it.
    """

    def __init__(self, kept: list | None = None):
        super().__init__()
        self.outputs: list = []
        self.kept = None if kept is None else iter(kept)

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        name = operation.overloadpacket.__name__
        if not name.startswith("_scaled_dot_product_") or "backward" in name:
            return operation(*arguments, **options)
        if self.kept is not None:
            return next(self.kept)
        if (
            name == "_scaled_dot_product_efficient_attention"
        ):  # gives log-sum-exps on demand only: the fifth argument
            arguments = (*arguments[:4], True, *arguments[5:])
        self.outputs.append(operation(*arguments, **options))
        return self.outputs[-1]


class OffloadedInputs:
    """The layer inputs of one forward pass, in pinned CPU memory.

    Copies run on a stream of their own beside the computing. On the way back two inputs are on the GPU at a
    time: that of the layer at work, and that of the one below it, whose copy was begun when the layer's own
    was taken.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.inputs: list[Tensor] = []  # pinned, in the order of the layers
        self.returning: dict[
            int, tuple[Tensor, torch.cuda.Event]
        ] = {}  # on the GPU, complete when the event is

    def put(self, x: Tensor) -> int:
        """Begin to copy x out; returns its place."""
        pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # until x is computed
        with torch.cuda.stream(self.stream):
            pinned.copy_(x, non_blocking=True)
        x.record_stream(self.stream)  # its memory is not given to others before the copy is done
        self.inputs.append(pinned)
        return len(self.inputs) - 1

    def take(self, place: int) -> Tensor:
        """The input again, on the GPU; begins to fetch the one before it."""
        self._begin_return(place)
        x, arrived = self.returning.pop(place)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(arrived)
        x.record_stream(stream)
        if place > 0:
            self._begin_return(place - 1)
        return x

    def _begin_return(self, place: int) -> None:
        if place not in self.returning:
            with torch.cuda.stream(self.stream):
                x = self.inputs[place].to(self.device, non_blocking=True)
                self.returning[place] = x, self.stream.record_event()


class _Place(NamedTuple):
    """Stands where a tensor was."""

    index: int


def _take_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """The nested value with places instead of its tensors, which are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _Place(len(tensors) - 1)
    return _map_nested(value, lambda inner: _take_tensors(inner, tensors))


def _put_tensors(pattern: Any, tensors: list[Tensor] | tuple[Tensor, ...]) -> Any:
    """The reverse of `_take_tensors`."""
    if isinstance(pattern, _Place):
        return tensors[pattern.index]
    return _map_nested(pattern, lambda inner: _put_tensors(inner, tensors))


def _map_nested(value: Any, function: Callable) -> Any:
    if isinstance(value, dict):
        return {key: function(inner) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))  # a named tuple takes its values one by one
    if isinstance(value, (tuple, list)):
        return type(value)(map(function, value))
    return value


def _check_nothing_is_lost(outputs: tuple[Tensor, ...], wanted: list[Tensor]) -> None:
    """Raise RuntimeError if the graph behind the outputs reaches a tensor whose gradient nobody would be
    given.
    """
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
                f"the checkpointed function uses a tensor {tuple(leaf.shape)} that needs a gradient and is neither an argument nor "
                "among its parameters; pass it, or name it in `parameters`"
            )
        todo += [before for before, _ in node.next_functions if before is not None]
