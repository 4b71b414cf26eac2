"""What an operation on a pretended GPU's tensors does: see pretended_gpu.py.

Two of PyTorch's modes see every operation. `Functions` sees the calls from Python, with their devices: .to,
.cpu(), torch.zeros(device=...). `Dispatch` sees what remains of them below autograd, the backward included.
"""

from functools import partial

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from support.pretended_places import CPU, PLACES

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "multinomial",
           "unique_consecutive", "bincount", "is_nonzero"}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_local_scalar_dense",
        "_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "resize_", "detach"}  # fmt: skip


class Functions(TorchFunctionMode):
    """Copies between devices, and tensors that are made on one."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, arguments=(), options=None):
        options, name = dict(options or {}), getattr(function, "__name__", "")
        me = arguments[0] if arguments and isinstance(arguments[0], torch.Tensor) else None
        if self.gpu.paused or name == "__get__":  # an attribute: no device is chosen there
            return function(*arguments, **options)
        special = getattr(self, f"_{name}", None) if me is not None and not me.is_meta else None
        if special is not None:
            return special(function, *arguments, **options)
        if options.keys() & {"device", "generator", "pin_memory"}:
            return self._made(function, name, me, arguments, options)
        return function(*arguments, **options)

    # ---- copies --------------------------------------------------------------------------------------------

    def _to(self, function, tensor, *arguments, **options):
        device, dtype, flags = None, options.pop("dtype", None), []
        for value in (*arguments, options.pop("device", None), options.pop("other", None)):
            if isinstance(value, torch.Tensor):
                device, dtype = PLACES.device(value), value.dtype
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, bool):
                flags.append(value)
            elif value is not None:
                device = self.gpu.device(value)
        options |= dict(zip(("non_blocking", "copy"), flags, strict=False))
        if device is not None and device.type not in ("cpu", "cuda"):
            return function(tensor, *arguments, **options)
        return self._copied(tensor, device or PLACES.device(tensor), dtype, **options)

    def _cuda(self, function, tensor, device=None, non_blocking=False):
        return self._copied(tensor, self.gpu.device(device), non_blocking=non_blocking)

    def _cpu(self, function, tensor):
        return self._copied(tensor, CPU)

    def _copied(self, tensor, device, dtype=None, non_blocking=False, copy=False, memory_format=None):
        here = PLACES.device(tensor)
        dtype = dtype or tensor.dtype
        if device == here:
            result = tensor.to(dtype, copy=copy)
            return PLACES.put(result, device) if result is not tensor else result
        what = f"a copy {here.type} -> {device.type} of {tuple(tensor.shape)}"
        if non_blocking and device.type == "cpu":
            self.gpu.fault(f"{what}, read before it has come")
        elif not (non_blocking and PLACES.is_pinned(tensor)):
            self.gpu.wait(what)
        self.gpu.launch("copy")
        with self.gpu.pause():
            return PLACES.put(tensor.to(dtype, copy=True), device)

    def _tolist(self, function, tensor):
        if PLACES.device(tensor).type == "cuda":
            self.gpu.wait("tolist()")
        return function(tensor)

    def _numpy(self, function, tensor, **options):
        if PLACES.device(tensor).type == "cuda":
            self.gpu.fault("numpy() of a GPU's tensor")
        return function(tensor, **options)

    def _pin_memory(self, function, tensor, device=None):
        if PLACES.device(tensor).type == "cuda":
            self.gpu.fault("pin_memory() of a GPU's tensor")
        return PLACES.pin(tensor.clone())

    def _is_pinned(self, function, tensor, device=None):
        return PLACES.is_pinned(tensor)

    # ---- new tensors ---------------------------------------------------------------------------------------

    def _made(self, function, name, me, arguments, options):
        here, generator = CPU if me is None else PLACES.device(me), options.get("generator")
        if generator is not None and me is not None and generator.device.type != here.type:
            self.gpu.fault(f"{name}: a generator of {generator.device} for a tensor of {here}")
        device, pinned = options.get("device"), options.pop("pin_memory", False)
        if device is not None:
            device = self.gpu.device(device)
            options["device"] = CPU if device.type == "cuda" else device
        result = function(*arguments, **options)
        if device is not None and device.type in ("cuda", "cpu"):
            for tensor in tree_iter(result):
                if isinstance(tensor, torch.Tensor) and tensor is not me:
                    PLACES.put(tensor, device)
            if name in ("tensor", "as_tensor", "asarray", "new_tensor") and device.type == "cuda":
                self.gpu.wait(f"torch.{name}: a copy cpu -> cuda of {tuple(result.shape)}")
            if device.type == "cuda" and here.type == "cpu" and name not in FREE:
                self.gpu.launch(name)
        return PLACES.pin(result) if pinned else result


class Dispatch(TorchDispatchMode):
    """Every operation below autograd: devices, waits, launches."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its compiler to skip it here: three seconds."""
        return False

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = dict(options or {})
        if self.gpu.paused:
            return operation(*arguments, **options)
        tensors = [
            t for t in tree_iter((arguments, options)) if isinstance(t, torch.Tensor) and not t.is_meta
        ]
        places = [PLACES.device(t) for t in tensors]
        device = next((place for place in places if place.type == "cuda"), None)
        if device is None:
            return operation(*arguments, **options)
        name = operation.overloadpacket.__name__
        self._check(name, arguments, options, tensors, places)
        if any(argument.name == "generator" for argument in operation._schema.arguments):
            options["generator"] = options.get("generator") or self.gpu.generators[device]
        if not operation.is_view and name not in FREE:
            self.gpu.launch(name)
        if operation == torch.ops.aten.mm.dtype:  # a GPU's alone: sums of 16-bit products in another dtype
            a, b, dtype = arguments
            operation, arguments = torch.ops.aten.mm.default, (a.to(dtype), b.to(dtype))
        result = operation(*arguments, **options)
        if self.gpu.recording and name not in FREE:
            self.gpu.recording.record(partial(operation, *arguments, **options), result)
        if name not in ("copy_", "_local_scalar_dense"):
            for tensor in tree_iter(result):
                if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                    PLACES.put(tensor, device)
        return result

    def _check(self, name, arguments, options, tensors, places) -> None:
        if name in WAITING or (name == "repeat_interleave" and options.get("output_size") is None):
            self.gpu.wait(name)
        if name in INDEXING:
            self._check_index(name, arguments)
        elif name == "copy_":
            self._check_copy(
                *arguments[:2], non_blocking=options.get("non_blocking", len(arguments) > 2 and arguments[2])
            )
        elif name != "set_":
            # A single number on the CPU is passed by value.
            where = {str(p) for t, p in zip(tensors, places, strict=True) if t.dim() or p.type == "cuda"}
            if len(where) > 1:
                self.gpu.fault(f"{name}: tensors on {' and '.join(sorted(where))}")

    def _check_index(self, name, arguments) -> None:
        here = PLACES.device(arguments[0])
        fills = len(arguments) > 2 and arguments[2].numel() == 1 and PLACES.device(arguments[2]) == CPU
        for index in (i for i in arguments[1] if i is not None):
            if index.dtype in (torch.bool, torch.uint8) and not fills:
                self.gpu.wait(f"{name} with a boolean mask")
            if PLACES.device(index) != here:
                self.gpu.wait(f"{name} with an index that lies elsewhere")

    def _check_copy(self, target, source, non_blocking) -> None:
        pinned = PLACES.is_pinned(target) or PLACES.is_pinned(source)
        if PLACES.device(target).type != PLACES.device(source).type and not (non_blocking and pinned):
            self.gpu.wait("copy_ from one device to another")


# As functions of torch, backward() and grad() would switch `Functions` off for all that they call.
# These two call the engine themselves.


def backward(tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None) -> None:
    """Tensor.backward."""
    gradient = torch.ones_like(tensor) if gradient is None else gradient
    _run((tensor,), (gradient,), retain_graph, create_graph, inputs or (), True, accumulate_grad=True)


def grad(outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False, allow_unused=None):
    """torch.autograd.grad."""
    outputs, inputs = _tuple(outputs), _tuple(inputs)
    gradients = tuple(map(torch.ones_like, outputs)) if grad_outputs is None else _tuple(grad_outputs)
    return _run(
        outputs, gradients, retain_graph, create_graph, inputs, bool(allow_unused), accumulate_grad=False
    )


def _run(outputs, gradients, retain_graph, create_graph, inputs, allow_unused, accumulate_grad):
    return torch.autograd.Variable._execution_engine.run_backward(
        outputs,
        gradients,
        bool(retain_graph),
        create_graph,
        tuple(inputs),
        allow_unused,
        accumulate_grad=accumulate_grad,
    )


def _tuple(tensors) -> tuple[torch.Tensor, ...]:
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)


def grouped(lists, with_indices=False) -> dict:
    """PyTorch's grouping of tensors, whose C++ would say that they lie on the CPU."""
    groups = _group_tensors_by_device_and_dtype(lists, with_indices)
    return {(PLACES.device(found[0][0]), dtype): (found, i) for (_, dtype), (found, i) in groups.items()}
