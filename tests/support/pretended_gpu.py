"""A pretended GPU: what the code would do to one, on a machine that has none.

    with PretendedGpu(capability=(7, 5)) as gpu:
        train(...)
    assert not gpu.faults and not gpu.waits

The numbers are computed on the CPU. Each tensor's memory is marked as a GPU's or the host's, and
`tensor.device` tells PyTorch's Python and the project what is marked. Every operation and every Triton launch
is checked, and recorded with the project's line that it comes from:

    faults      tensors of two devices in one operation; a CPU tensor given to a Triton kernel; a launch for
                a GPU that is not the current one; numpy() of a GPU's tensor; a CPU generator for a GPU's draw
    waits       the host waits until the GPU is done: .item(), bool(), .tolist(), .cpu(), nonzero(), a boolean
                mask as an index, copies from memory that is not pinned, synchronize()
    launches    operations, copies and kernels that a GPU would run; an operation counts as one
    signatures  the variants of each Triton kernel that would be compiled

The fused attentions of a GPU are emulated with their contracts (fused_attentions.py).

What it cannot see: how fast anything is; memory, and when it is used again; the order of streams, which all
run at once here; that a graph's recording runs nothing; waits within a single operation of PyTorch; what
PyTorch's C++ would choose on a GPU; and what a compiled Triton kernel computes: its PyTorch definition runs
instead, or Triton's interpreter.
"""

import contextlib
import sys
from collections import Counter, defaultdict
from functools import partial
from types import SimpleNamespace

import torch

from support.fused_attentions import fused_attentions
from support.pretended_kernels import run_kernel, signature_of
from support.pretended_places import PLACES, Generator
from support.pretended_streams import Event, Graph, Stream
from support.pretended_tensors import Dispatch, Functions, backward, grad, grouped
from support.project import ROOT

PROJECT = tuple(str(ROOT / part) for part in ("minilora", "kernels", "scripts"))


class PretendedGpu:
    """`count` pretended GPUs of one kind. See the module's docstring for what is recorded."""

    def __init__(
        self,
        capability: tuple[int, int] = (7, 5),
        count: int = 1,
        memory: int = 15 << 30,
        interpreted: bool = False,  # run Triton kernels in Triton's interpreter, not as their definitions
    ):
        self.capability, self.memory, self.interpreted = capability, memory, interpreted
        self.devices = [torch.device("cuda", i) for i in range(count)]
        self.faults: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.signatures: dict[str, set] = defaultdict(set)
        self.generators = {device: Generator(device) for device in self.devices}
        self.default_streams = {device: Stream(self, device) for device in self.devices}
        self.streams = dict(self.default_streams)  # the current one of each device
        self.current, self.paused = 0, False
        self.recording: Graph | None = None

    # ---- records -------------------------------------------------------------------------------------------

    def fault(self, what: str) -> None:
        self.faults[f"{what}  <- {project_line()}"] += 1

    def wait(self, what: str) -> None:
        if self.recording:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        self.waits[f"{what}  <- {project_line()}"] += 1

    def launch(self, name: str) -> None:
        self.launches[name] += 1

    @contextlib.contextmanager
    def during(self):
        """Yield a record: in the end, the block's faults, waits and launches, and its first-seen variants."""
        before = {name: Counter(getattr(self, name)) for name in ("faults", "waits", "launches")}
        record, known = SimpleNamespace(), self._variants()
        yield record
        for name, counts in before.items():
            setattr(record, name, getattr(self, name) - counts)
        record.variants = self._variants() - known

    def _variants(self) -> set[tuple]:
        return {(name, *one) for name, found in self.signatures.items() for one in found}

    @contextlib.contextmanager
    def pause(self):
        """Let the block's operations run on the CPU, unmarked and unrecorded."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    # ---- devices -------------------------------------------------------------------------------------------

    def device(self, given) -> torch.device:
        """Return the device with its index: "cuda" is the current one."""
        if given is None or isinstance(given, int):
            return self.devices[self.current if given is None else given]
        given = torch.device(given)
        return self.devices[self.current] if given == torch.device("cuda") else given

    def set_device(self, device) -> None:
        self.current = self.device(device).index or 0

    def _exchange_device(self, index: int) -> int:
        """Make another GPU the current one, unless the index is -1; return the one that was."""
        before, self.current = self.current, self.current if index < 0 else index
        return before

    @contextlib.contextmanager
    def _in_stream(self, stream):
        if stream is None:
            yield
            return
        before = self.streams[stream.device]
        self.streams[stream.device] = stream
        try:
            yield
        finally:
            self.streams[stream.device] = before

    # ---- Triton --------------------------------------------------------------------------------------------

    def launch_kernel(self, kernel, *arguments, grid, warmup=False, **options) -> None:
        """Check the launch of a Triton kernel, and compute what it would."""
        name = kernel.fn.__name__
        for tensor in [a for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor)]:
            device = PLACES.device(tensor)
            if device.type != "cuda":
                self.fault(f"a CPU tensor {tuple(tensor.shape)} given to the Triton kernel {name}")
            elif device.index != self.current:
                self.fault(f"{name} launched for {device} while cuda:{self.current} is the current device")
        self.launch(f"triton {name}")
        self.signatures[name].add(signature_of(kernel, arguments, options))
        run = partial(run_kernel, kernel, grid, arguments, options, self.interpreted)
        with self.pause():
            run()
        if self.recording:
            self.recording.record(run)

    # ---- PyTorch's names -----------------------------------------------------------------------------------

    def __enter__(self) -> "PretendedGpu":
        self.stack = contextlib.ExitStack()
        for name, value in self._cuda_functions().items():
            self._patch(torch.cuda, name, value)
        for name, value in self._tensor_attributes().items():
            self._patch(torch.Tensor, name, value)
        self._patch(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        self._patch(torch.autograd, "grad", grad)
        self._patch(torch, "Generator", Generator)
        for module in map(sys.modules.get, ("torch.nn.utils.clip_grad", "torch.optim.optimizer")):
            self._patch(module, "_group_tensors_by_device_and_dtype", grouped)
        self._patch(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        with contextlib.suppress(ImportError):
            from triton.runtime.jit import JITFunction

            self._patch(JITFunction, "run", lambda kernel, *a, **k: self.launch_kernel(kernel, *a, **k))
        self._forget()
        self.stack.callback(self._forget)
        self.stack.enter_context(fused_attentions())
        self.stack.enter_context(Functions(self))
        self.stack.enter_context(Dispatch(self))
        return self

    def __exit__(self, *error) -> None:
        self.stack.close()

    def _patch(self, owner, name: str, value) -> None:
        own = name in vars(owner)
        before = vars(owner).get(name)
        setattr(owner, name, value)
        self.stack.callback(lambda: setattr(owner, name, before) if own else delattr(owner, name))

    def _forget(self) -> None:
        """Clear what the project remembers of the device: its capability, its streams."""
        for name, module in list(sys.modules.items()):
            if name.startswith("minilora.") and not name.startswith("minilora.backend.native"):
                for value in list(vars(module).values()):
                    getattr(value, "cache_clear", lambda: None)()
        from minilora.backend import scratch

        scratch.release()

    def _tensor_attributes(self) -> dict:
        where = lambda t: torch._C.TensorBase.device.__get__(t) if self.paused else PLACES.device(t)  # noqa: E731
        return {
            "device": property(where),
            "is_cuda": property(lambda t: where(t).type == "cuda"),
            "is_cpu": property(lambda t: where(t).type == "cpu"),
            "get_device": lambda t: where(t).index if where(t).type == "cuda" else -1,
            "record_stream": lambda t, stream: None,
            "backward": backward,
        }

    def _cuda_functions(self) -> dict:
        name, generators = f"a pretended GPU {self.capability}", self.generators
        nothing = lambda *_, **__: None  # noqa: E731
        return dict(
            is_available=lambda: True, is_initialized=lambda: True, init=nothing, _lazy_init=nothing,
            device_count=lambda: len(self.devices), current_device=lambda: self.current,
            set_device=self.set_device, _exchange_device=self._exchange_device,
            _maybe_exchange_device=self._exchange_device, get_device_name=lambda device=None: name,
            get_device_capability=lambda device=None: self.capability, is_bf16_supported=lambda *_, **__: True,
            get_device_properties=lambda device=None: SimpleNamespace(
                name=name, total_memory=self.memory, major=self.capability[0], minor=self.capability[1],
                multi_processor_count=40,
            ),
            Event=lambda *_, **__: Event(self), Stream=lambda device=None, **_: Stream(self, self.device(device)),
            current_stream=lambda device=None: self.streams[self.device(device)],
            default_stream=lambda device=None: self.default_streams[self.device(device)],
            stream=self._in_stream, synchronize=lambda device=None: self.wait("synchronize() of a GPU"),
            CUDAGraph=type("CUDAGraph", (Graph,), dict(gpu=self)),
            is_current_stream_capturing=lambda: self.recording is not None,
            mem_get_info=lambda device=None: (self.memory, self.memory),
            max_memory_allocated=lambda device=None: 1 << 20, memory_allocated=lambda device=None: 1 << 20,
            max_memory_reserved=lambda device=None: 2 << 20, memory_reserved=lambda device=None: 2 << 20,
            memory_stats=lambda device=None: {}, reset_peak_memory_stats=nothing, empty_cache=nothing,
            get_rng_state=lambda device=None: generators[self.device(device)].get_state(),
            set_rng_state=lambda state, device=None: generators[self.device(device)].set_state(state),
            manual_seed=lambda seed: generators[self.device(None)].manual_seed(seed),
            manual_seed_all=lambda seed: [generator.manual_seed(seed) for generator in generators.values()],
        )  # fmt: skip


def project_line() -> str:
    """Return the innermost line of the project on the stack: file:line, and its function."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(PROJECT):
        frame = frame.f_back
    if frame is None:
        return "a test"
    file = frame.f_code.co_filename.removeprefix(f"{ROOT}/")
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"
