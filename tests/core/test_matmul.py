"""The product with packed 4-bit weights on a CPU with AMX, against float64 and against itself."""

import os
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.backend import choice, native, native_trial, products
from minilora.linear import Linear4bit
from minilora.quantization import BLOCK_SIZES, quantize_4bit

needs_amx = pytest.mark.skipif(
    not native_trial.is_trusted("matmul", torch.bfloat16),
    reason="this CPU has no AMX, or there is no C compiler",
)


def product(q, x, backward=False, bias=None, update=None):
    out = torch.full((len(x), q.shape[1 if backward else 0]), torch.nan, dtype=torch.bfloat16)
    native.matmul(q, x, out, bias, update, backward)
    return out


def whole_number_product(q, x, out, bias=None, update=None, backward=False, add=False):
    """What `native_trial.matmul_trial` asks for, in whole numbers."""
    symbols = torch.stack([q.packed >> 4, q.packed & 15], dim=1).view(-1, q.blocksize).long()
    W = (q.code.long()[symbols] * q.absmax.long().view(-1, 1)).view(q.shape)
    y = x.long() @ (W if backward else W.T)
    if bias is not None:
        y = y + bias.long()
    if update is not None:
        narrow, matrix = (t.long() for t in update)
        y = y + narrow @ (matrix if backward else matrix.T)
    if add:
        y = y + out.long()
    assert y.abs().max() < 2**24  # float32 holds it, and so rounds it to bfloat16 only once
    out.copy_(y.float())


def test_the_known_bits_of_the_product_are_those_of_whole_numbers():
    for _ in range(3):  # arguments of C that were freed too early would change now and then
        bits = native_trial.digest(native_trial.matmul_trial(whole_number_product, torch.bfloat16))
        assert bits == native_trial.KNOWN_BITS["matmul_bf16"]


@needs_amx
@settings(deadline=None)
@given(
    rows=st.one_of(st.integers(0, 70), st.integers(1000, 1100)),
    out=st.integers(1, 12).map(lambda n: 32 * n),
    in_=st.integers(1, 12).map(lambda n: 32 * n),
    blocksize=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    double_quant=st.booleans(),
    biased=st.booleans(),
    rank=st.sampled_from([0, 1, 8, 31, 32, 33, 70]),
    seed=st.integers(0, 2**16),
)
def test_products_are_those_of_the_dequantized_weight_summed_in_float32_and_rounded_once(
    rows, out, in_, blocksize, quant_type, double_quant, biased, rank, seed
):
    generator = torch.Generator().manual_seed(seed)
    q = quantize_4bit(torch.randn(out, in_, generator=generator), quant_type, blocksize, double_quant)
    W = q.dequantize(torch.bfloat16).double()
    bias = torch.randn(out, generator=generator) if biased else None
    x = torch.randn(rows, in_, generator=generator).bfloat16()
    dy = torch.randn(rows, out, generator=generator).bfloat16()
    n = torch.randn(rows, rank + 5, generator=generator).bfloat16()[:, 5:]  # a part of a wider one
    B, A = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((out, rank), (rank, in_)))
    forward, back = ((n, B), (n, A)) if rank else (None, None)
    y, dx = product(q, x, bias=bias, update=forward), product(q, dy, backward=True, update=back)
    exact_y = x.double() @ W.T + n.double() @ B.double().T + (0 if bias is None else bias.double())
    terms = x.double().abs() @ W.abs().T + (0 if bias is None else bias.double().abs())
    terms += n.double().abs() @ B.double().abs().T
    exact_dx, terms_dx = dy.double() @ W + n.double() @ A.double(), dy.double().abs() @ W.abs()
    terms_dx += n.double().abs() @ A.double().abs()
    twice = dx.clone()
    native.matmul(q, dy, twice, backward=True, add=True)
    for result, exact, terms, summed in (  # noqa: B020
        (y, exact_y, terms, in_ + rank),
        (dx, exact_dx, terms_dx, out + rank),
        (twice, dx.double() + dy.double() @ W, dx.double().abs() + dy.double().abs() @ W.abs(), out + 1),
    ):
        # 2^-8: one rounding to bfloat16. 2^-24 a term: the worst of any order of float32 sums.
        bound = 2**-8 * exact.abs() + (1 + 2**-8) * summed * 2**-24 * terms
        assert ((result.double() - exact).abs() <= bound).all()


@needs_amx
@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 70), row=st.integers(0, 69), backward=st.booleans())
def test_a_row_does_not_depend_on_its_neighbours_not_even_on_nan(rows, row, backward):
    q, row = quantize_4bit(torch.randn(96, 64)), row % rows
    x = torch.randn(rows, 96 if backward else 64).bfloat16()
    alone = product(q, x[row : row + 1], backward)
    x[torch.arange(rows) != row] = torch.nan
    together = product(q, x, backward)
    assert torch.equal(together[row : row + 1], alone)
    assert together[torch.arange(rows) != row].isnan().all()


@needs_amx
def test_the_number_of_threads_does_not_change_a_bit(monkeypatch):
    q, x = quantize_4bit(torch.randn(1024, 512)), torch.randn(100, 512).bfloat16()
    expected = product(q, x)
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "_threads", lambda n, threads=threads: threads)
        assert torch.equal(product(q, x), expected)


@needs_amx
def test_a_forked_process_multiplies_too_though_the_threads_of_openmp_are_not_there():
    q, x = quantize_4bit(torch.randn(1024, 512)), torch.randn(100, 512).bfloat16()
    expected, out = product(q, x), torch.empty(100, 1024, dtype=torch.bfloat16)
    assert native._threads(q.shape.numel()) == min(4, torch.get_num_threads())
    child = os.fork()
    if child == 0:  # no operation of PyTorch's that would take several threads: it would wait for ever
        signal.alarm(60)
        native.matmul(q, x, out)
        os._exit(0 if native_trial.digest([out]) == native_trial.digest([expected]) else 1)
    assert os.waitpid(child, 0)[1] == 0


@needs_amx
@pytest.mark.parametrize(
    "shape, dtype, packed",
    [
        ((64, 96), torch.bfloat16, True),
        ((64, 96), torch.float32, False),
        ((64, 80), torch.bfloat16, False),  # 80 is no multiple of 32
    ],
)
def test_a_layer_multiplies_its_packed_weight_where_the_kernel_takes_it(monkeypatch, shape, dtype, packed):
    monkeypatch.delenv("MINILORA_BACKEND", raising=False)
    directions = []
    monkeypatch.setattr(choice, "_cpu_multiplies_bfloat16", lambda: True)  # not where oneDNN's ISA is capped
    monkeypatch.setattr(native, "matmul", lambda *a, **k: directions.append(k.get("backward", False)))
    layer, x = Linear4bit(quantize_4bit(torch.randn(shape))), torch.randn(2, 3, shape[1], dtype=dtype)
    layer(x.requires_grad_()).sum().backward()
    assert directions == ([False, True] if packed else [])
    monkeypatch.setenv("MINILORA_BACKEND", "torch")
    directions.clear()
    layer(x).sum().backward()
    assert directions == []


@needs_amx
def test_packed_and_dequantized_products_agree_in_a_layer(monkeypatch):
    monkeypatch.setattr(choice, "_cpu_multiplies_bfloat16", lambda: True)
    layer = Linear4bit(quantize_4bit(torch.randn(64, 96)), torch.randn(64).bfloat16())
    x = torch.randn(2, 96, 5).bfloat16().transpose(1, 2).requires_grad_()  # not contiguous
    dy = torch.randn(2, 64, 5).bfloat16().transpose(1, 2)
    results = []
    for takes in (True, False):
        monkeypatch.setattr(products, "multiplies_packed", lambda weight, rows, takes=takes: takes)
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        results.append((y, dx))
    for ours, other in zip(*results, strict=True):
        # 2^-7 is one step of bfloat16, by which two roundings may differ. Before that the float32 sums of 96
        # terms, some 60 together, are up to 2 x 96 x 2^-24 x 60 apart.
        assert torch.allclose(ours.float(), other.float(), rtol=2**-7, atol=7e-4)
