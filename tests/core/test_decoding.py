"""One token through frozen layers: a packed weight times one vector in C, its adapter inside, against float64."""

import os
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.backend import decoding, native, native_trial
from minilora.config import LoraConfig
from minilora.linear import Linear4bit, apply_each
from minilora.lora import LoraLinear
from minilora.quantization import BLOCK_SIZES, gemv_4bit, quantize_4bit

DTYPES = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of one rounding: half of eps
in_c = {dtype: native_trial.is_trusted("gemv", dtype) for dtype in DTYPES}
needs_c = pytest.mark.skipif(not in_c[torch.float32], reason="no C compiler")


def product(q, x, bias=None, update=None):
    out = torch.full((q.shape[0],), torch.nan, dtype=x.dtype)
    native.gemv(q, x, out, bias, update)
    return out


def whole_number_product(q, x, out, bias=None, update=None):
    """What `native_trial.gemv_trial` asks for, in whole numbers."""
    symbols = torch.stack([q.packed >> 4, q.packed & 15], dim=1).view(q.shape).long()
    scales = q.absmax
    if q.nested_absmax is not None:
        scales = q.nested_code[scales.long()] * q.nested_absmax[torch.arange(len(scales)) // 256] + q.offset
    W = q.code.long()[symbols] * scales.long().repeat_interleave(q.blocksize)[: symbols.numel()].view(q.shape)
    y = W @ x.long()
    if bias is not None:
        y = y + bias.long()
    if update is not None:
        y = y + update[1].long() @ update[0].long()
    assert y.abs().max() < 65504  # float32 holds it, so it is rounded only once, and float16 has no infinity
    out.copy_(y.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_known_bits_of_the_product_are_those_of_whole_numbers(dtype):
    for _ in range(3):  # arguments of C that were freed too early would change now and then
        bits = native_trial.digest(native_trial.gemv_trial(whole_number_product, dtype))
        assert bits == native_trial.KNOWN_BITS[f"gemv_{native._NAMES[dtype]}"]


def random_weight(generator, out, in_, quant_type="nf4", blocksize=64, double_quant=True):
    return quantize_4bit(torch.randn(out, in_, generator=generator), quant_type, blocksize, double_quant)


def assert_is_product(y, W, x, bias, update):
    """y is W x + bias + B n, summed in float32 and rounded once to its dtype."""
    n, B = (torch.zeros(0), torch.zeros(len(W), 0)) if update is None else update
    bias = torch.zeros(len(W)) if bias is None else bias
    W, x, n, B, bias = (t.double() for t in (W, x, n, B, bias))
    exact, terms = W @ x + B @ n + bias, W.abs() @ x.abs() + B.abs() @ n.abs() + bias.abs()
    # Without FMA a term of W x is rounded in 8 products and 8 sums of its step of 32, twice at each scale, in the sum of
    # 4 lanes, and with update and bias; its scale three times in W. B n has one sum for 4 elements, and a tail of 3.
    roundings = 16 + len(x) / 16 + 4 + 2 + 3 + len(n)
    u = DTYPES[y.dtype]
    smallest = 2**-25 if y.dtype == torch.float16 else 0  # half the distance of subnormal numbers
    bound = u * exact.abs() + (1 + u) * roundings * 2**-24 * terms + smallest
    assert ((y.double() - exact).abs() <= bound).all()


@needs_c
@settings(deadline=None, max_examples=60)
@given(
    dtype=st.sampled_from([dtype for dtype in DTYPES if in_c[dtype]] or list(DTYPES)),
    out=st.integers(1, 70),
    in_=st.integers(1, 80).map(
        lambda n: 32 * n
    ),  # up to more steps than have their scales dequantized together
    blocksize=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    biased=st.booleans(),
    rank=st.sampled_from([0, 1, 3, 8, 16, 21, 64]),
    seed=st.integers(0, 2**16),
)
def test_the_product_is_that_of_the_dequantized_weight_summed_in_float32_and_rounded_once(
    dtype, out, in_, blocksize, quant_type, double_quant, biased, rank, seed
):
    generator = torch.Generator().manual_seed(seed)
    q = random_weight(generator, out, in_, quant_type, blocksize, double_quant)
    x = torch.randn(in_, generator=generator).to(dtype)
    n, B, bias = (torch.randn(*shape, generator=generator) for shape in ((rank,), (out, rank), (out,)))
    bias, update = bias if biased else None, (n, B) if rank else None
    y = product(q, x, bias, update)
    assert_is_product(y, q.dequantize(torch.float32), x, bias, update)


@needs_c
def test_the_number_of_threads_does_not_change_a_bit(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q, x = random_weight(generator, 1003, 512), torch.randn(512, generator=generator)
    expected = product(q, x)
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "_threads", lambda n, threads=threads: threads)
        assert torch.equal(product(q, x), expected)


@needs_c
def test_a_forked_process_multiplies_too_though_the_threads_of_openmp_are_not_there():
    q, x = quantize_4bit(torch.randn(1024, 512)), torch.randn(512)
    expected, out = product(q, x), torch.empty(1024)
    child = os.fork()
    if child == 0:  # no operation of PyTorch's that would take several threads: it would wait for ever
        signal.alarm(60)
        native.gemv(q, x, out)
        os._exit(0 if native_trial.digest([out]) == native_trial.digest([expected]) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_not_lost(dtype):
    q, x = quantize_4bit(torch.ones(3, 64)), torch.ones(64, dtype=dtype)
    for value in (torch.inf, -torch.inf):
        x[40] = value
        assert (gemv_4bit(q, x) == value).all()
    x[40] = torch.nan
    assert gemv_4bit(q, x).isnan().all()


# ---- layers ------------------------------------------------------------------------------------------------


def layers_of(outs, in_, adapted, quantized, biased, dtype=torch.float32, dropout=0.0) -> list[nn.Module]:
    """Frozen layers on one input; those in `adapted` have a random adapter."""
    torch.manual_seed(0)
    layers = []
    for i, out in enumerate(outs):
        layer = nn.Linear(in_, out, bias=biased).to(dtype).requires_grad_(False)
        if i in quantized:
            layer = Linear4bit(quantize_4bit(layer.weight.data), layer.bias)
        if i in adapted:
            layer = LoraLinear(layer)
            layer.add_adapter("a", LoraConfig(r=5, lora_alpha=7, lora_dropout=dropout))
            layer.active = "a"
            nn.init.normal_(layer.lora_B["a"], std=0.3)
        layers.append(layer)
    return layers


def exact_output(layer, x):
    """layer(x) in float64, and the sum of magnitudes that it sums."""
    base = layer.base_layer if isinstance(layer, LoraLinear) else layer
    W = base.weight if isinstance(base.weight, torch.Tensor) else base.weight.dequantize(torch.float32)
    W, x = W.double(), x.double()
    y, terms = W @ x, W.abs() @ x.abs()
    if base.bias is not None:
        y, terms = y + base.bias.double(), terms + base.bias.double().abs()
    if isinstance(layer, LoraLinear):
        A, B, scaling = layer.lora_A["a"].double(), layer.lora_B["a"].double(), layer.configs["a"].scaling
        y, terms = y + scaling * B @ (A @ x), terms + scaling * B.abs() @ (A.abs() @ x.abs())
    return y, terms


subsets = st.sets(st.integers(0, 2))


@settings(deadline=None, max_examples=40)
@given(
    outs=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    in_=st.sampled_from([32, 50, 96]),
    adapted=subsets,
    quantized=subsets,
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    shape=st.sampled_from([(), (1,), (1, 1)]),
)
def test_layers_that_share_one_row_give_what_they_give_alone(
    outs, in_, adapted, quantized, biased, dtype, shape
):
    layers = layers_of(outs, in_, adapted, quantized, biased, dtype)
    x = torch.randn(*shape, in_).to(dtype)
    with torch.no_grad():
        ys = apply_each(x, *layers)
        alone = [layer(x) for layer in layers]
    for layer, y, one in zip(layers, ys, alone, strict=True):
        exact, terms = exact_output(layer, x.view(-1))
        # In 16 bits: W may be rounded, the product, and the sum with the update. In float32, and in each of these
        # besides: the orders of two sums, of 96 and 5 terms, and three more roundings.
        bound = (3 * DTYPES[dtype] if dtype != torch.float32 else 0) * terms + (96 + 5 + 3) * 2**-24 * terms
        assert y.dtype == dtype and y.shape == (*shape, len(exact)) and torch.equal(y, one)
        assert ((y.double().view(-1) - exact).abs() <= bound).all()


@needs_c
@pytest.mark.parametrize(
    "shape, rows, gradient, backend, packed",
    [
        ((33, 64), 1, False, None, True),
        ((33, 50), 1, False, None, False),  # 50 is no multiple of 32
        ((33, 64), 2, False, None, False),
        ((33, 64), 1, True, None, False),
        ((33, 64), 1, False, "torch", False),
    ],
)
def test_a_packed_weight_meets_one_row_without_a_gradient(
    monkeypatch, shape, rows, gradient, backend, packed
):
    monkeypatch.delenv("MINILORA_BACKEND", raising=False)
    if backend:
        monkeypatch.setenv("MINILORA_BACKEND", backend)
    seen, gemv = [], native.gemv
    monkeypatch.setattr(native, "gemv", lambda *a: seen.append(a[4]) or gemv(*a))
    (layer,) = layers_of(shape[:1], shape[1], {0}, {0}, biased=True)
    with torch.set_grad_enabled(gradient):
        layer(torch.randn(rows, shape[1]))
        layer.base_layer(torch.randn(rows, shape[1]))
    assert [update is not None for update in seen] == ([True, False] if packed else [])


class Casts(TorchDispatchMode):
    """Counts the numbers in tensors that are copied to another dtype."""

    def __init__(self):
        super().__init__()
        self.numbers = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.numbers.append(args[0].numel())
        return function(*args, **(kwargs or {}))


@needs_c
def test_neither_A_nor_B_is_cast_and_x_once_for_all_layers(monkeypatch):
    monkeypatch.delenv("MINILORA_BACKEND", raising=False)
    layers = layers_of([40, 24, 24], 64, {0, 1, 2}, {0, 1, 2}, biased=False, dtype=torch.bfloat16)
    x = torch.randn(1, 1, 64).bfloat16()
    with torch.no_grad(), Casts() as casts:
        apply_each(x, *layers)
    assert casts.numbers == [64]


@torch.no_grad()
def test_a_layer_that_drops_or_is_watched_goes_its_own_way(monkeypatch):
    monkeypatch.setattr(decoding, "multiply_vector", None)  # would raise
    x = torch.randn(1, 64)
    (layer,) = layers_of([40], 64, {0}, set(), biased=False, dropout=0.5)
    drawn = [layer.train()(x) for _ in range(2)]
    assert not torch.equal(*drawn)
    seen = []
    layer.eval().register_forward_hook(lambda *_: seen.append(1))
    monkeypatch.undo()
    apply_each(x, layer)
    assert seen == [1]
