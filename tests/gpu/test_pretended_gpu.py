"""The pretended GPU sees what it says it sees, and changes no number."""

import pytest
import torch
from support.pretended_gpu import PretendedGpu

from minilora.quantization import quantize_4bit


@pytest.fixture
def gpu():
    with PretendedGpu(count=2) as gpu:
        yield gpu


def on(device: str, *shape: int) -> torch.Tensor:
    return torch.ones(shape or 4, device=device)


MIXED = {
    "a sum": lambda: on("cuda") + on("cpu"),
    "a sum with a GPU's single number": lambda: on("cpu") + torch.ones((), device="cuda"),
    "a sum over two GPUs": lambda: on("cuda:0") + on("cuda:1"),
    "a product into a CPU tensor": lambda: torch.mm(on("cuda", 2, 2), on("cuda", 2, 2), out=on("cpu", 2, 2)),
    "a list of tensors": lambda: torch._foreach_add_([on("cuda"), on("cuda")], [on("cuda"), on("cpu")]),
    "a look-up": lambda: torch.nn.functional.embedding(torch.tensor([1]), on("cuda", 4, 4)),
    "a copy to the host that is not waited for": lambda: on("cuda").to("cpu", non_blocking=True),
    "numpy": lambda: on("cuda").detach().numpy(),
    "a CPU generator": lambda: on("cuda").bernoulli_(0.5, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("kind", MIXED)
def test_tensors_of_two_devices_in_one_operation_are_a_fault(kind, gpu):
    MIXED[kind]()
    assert sum(gpu.faults.values()) == 1


def test_a_gradient_of_the_wrong_device_is_a_fault_in_backward_too(gpu):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * torch.ones(4, device="cpu")

    x = on("cuda").requires_grad_()
    Wrong.apply(x).sum().backward()
    assert sum(gpu.faults.values()) == 1
    torch.autograd.grad(Wrong.apply(x).sum(), x)
    assert sum(gpu.faults.values()) == 2


ALLOWED = {
    "one number of the CPU": lambda: on("cuda") * torch.tensor(2.0),
    "a number of Python": lambda: on("cuda") * 2.0,
    "where with a number": lambda: torch.where(on("cuda") > 0, on("cuda"), 0.0),
    "everything on the CPU": lambda: on("cpu") + on("cpu"),
    "everything on the second GPU": lambda: on("cuda:1") + on("cuda:1"),
    "an index on the same GPU": lambda: on("cuda")[torch.arange(2, device="cuda")],
    "memory that is pinned": lambda: on("cpu").pin_memory().to("cuda", non_blocking=True) + on("cuda"),
    "a pinned buffer": lambda: torch.empty(4, pin_memory=True).copy_(on("cuda"), non_blocking=True),
    "a mask that is filled with a number": lambda: on("cuda").__setitem__(on("cuda") > 0, 2.0),
    "another dtype": lambda: on("cuda").to(torch.float16) + on("cuda").half(),
    "the device that it has": lambda: on("cuda").to("cuda") + on("cuda").cuda(),
    "a draw from its own numbers": lambda: on("cuda").bernoulli_(0.5, generator=torch.Generator("cuda")),
    "a view": lambda: on("cuda")[1:].view(3, 1) + on("cuda", 3, 1),
}


@pytest.mark.parametrize("kind", ALLOWED)
def test_what_a_gpu_does_without_waiting_is_neither_a_fault_nor_a_wait(kind, gpu):
    ALLOWED[kind]()
    assert not gpu.faults and not gpu.waits


WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu"),
    "from memory that is not pinned": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "from pinned memory, blocking": lambda x: torch.ones(3).pin_memory().to("cuda"),
    "a new tensor from a list": lambda x: torch.tensor([1, 2], device="cuda"),
    "a copy over": lambda x: x.copy_(torch.zeros(4)),
    "nonzero": lambda x: x.nonzero(),
    "a mask that selects": lambda x: x[x > 0],
    "a mask that is written through": lambda x: x.__setitem__(x > 0, on("cuda")),
    "an index on the CPU": lambda x: x[torch.tensor([1])],
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "a draw of multinomial": lambda x: x.multinomial(1),
    "the GPU": lambda x: torch.cuda.synchronize(),
    "an event": lambda x: torch.cuda.Event().synchronize(),
    "a stream": lambda x: torch.cuda.current_stream().synchronize(),
}


@pytest.mark.parametrize("kind", WAITS)
def test_each_wait_of_the_host_is_seen_once(kind, gpu):
    WAITS[kind](on("cuda"))
    assert sum(gpu.waits.values()) == 1 and not gpu.faults


def test_a_wait_names_the_line_of_the_project_that_it_comes_from(gpu):
    weight = torch.randn(64, 64).to("cuda")
    with gpu.during() as loading:
        quantize_4bit(weight)  # checks that its scales are finite
    assert any("minilora/quantization.py:" in wait and "quantize_4bit" in wait for wait in loading.waits)


def test_launches_are_counted_and_views_are_none(gpu):
    x = on("cuda", 4, 4)
    with gpu.during() as record:
        (x.T[1:] @ x).view(-1).relu_().cpu()
        torch.empty(2, device="cuda"), torch.zeros(2, device="cuda"), torch.zeros_like(x)
    assert record.launches == {"mm": 1, "relu_": 1, "copy": 1, "zeros": 1, "zeros_like": 1}


def test_the_gpu_has_random_numbers_of_its_own(gpu):
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    assert torch.equal(torch.empty(5, device="cuda").uniform_().cpu(), expected)
    assert torch.equal(torch.rand(5), expected)  # the CPU's have not moved
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.empty(5, device="cuda").uniform_().cpu(), expected)


def test_tensors_say_where_they_are_until_the_end():
    with PretendedGpu(count=2) as gpu:
        x = torch.ones(2).cuda(1)
        assert x.is_cuda and x.device == torch.device("cuda", 1) and not x.cpu().is_cuda
        assert torch.ones_like(x).device == x[:1].view(1, 1).device == x.to(torch.float16).device == x.device
        with gpu.pause():
            assert x.device.type == "cpu"
    assert x.device.type == "cpu" and not torch.cuda.is_available()


triton = pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")


def kernel_arguments(device: str, n: int = 4096) -> tuple:
    """What dequantizes ones in blocks of 64."""
    code, out = torch.arange(16.0, device=device), torch.zeros(n, device=device)
    packed = torch.full((n // 2,), 0x11, dtype=torch.uint8, device=device)
    return packed, torch.ones(n // 64, device=device), code, None, None, None, out, n, n // 2


def dequantize(arguments: tuple) -> torch.Tensor:
    from minilora.kernels.nf4 import dequantize_kernel

    dequantize_kernel[(1,)](*arguments, BLOCKSIZE=64, GROUP=4, TILE=4096)
    return arguments[6]


@pytest.mark.parametrize("interpreted", [False, True])
def test_a_kernel_is_counted_and_computes(interpreted):
    with PretendedGpu(interpreted=interpreted) as gpu:
        assert (dequantize(kernel_arguments("cuda")) == 1).all()
        assert gpu.launches["triton dequantize_kernel"] == 1 and not gpu.faults


def test_a_cpu_tensor_given_to_a_kernel_is_a_fault(gpu):
    arguments = kernel_arguments("cuda")
    dequantize((*arguments[:2], arguments[2].cpu(), *arguments[3:]))
    assert [fault.split("  <-")[0] for fault in gpu.faults] == [
        "a CPU tensor (16,) given to the Triton kernel dequantize_kernel"
    ]


def test_a_kernel_on_another_gpu_than_the_current_one_is_a_fault(gpu):
    arguments = kernel_arguments("cuda:1")
    with torch.cuda.device(1):
        dequantize(arguments)
    assert not gpu.faults
    dequantize(arguments)
    assert all("while cuda:0 is the current device" in fault for fault in gpu.faults) and gpu.faults


def test_another_size_is_another_variant_of_a_kernel_only_where_triton_compiles_one(gpu):
    for n in (4096, 2048):
        dequantize(kernel_arguments("cuda", n))
    assert len(gpu.signatures["dequantize_kernel"]) == 1
    dequantize((*kernel_arguments("cuda", 4096)[:7], 4096 - 2, 2047))  # 16 divides neither
    assert len(gpu.signatures["dequantize_kernel"]) == 2
    unaligned = list(kernel_arguments("cuda", 2048))
    unaligned[6] = torch.zeros(2049, device="cuda")[1:]
    dequantize(tuple(unaligned))
    assert len(gpu.signatures["dequantize_kernel"]) == 3
