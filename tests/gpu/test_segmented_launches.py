"""Rows that meet different adapters on a GPU: which kernels run there, and what they copy and wait for."""

import re

import pytest
import torch
from support.pretended_gpu import PretendedGpu
from support.rounding import ROUNDING, randn
from support.segmented_loop import (
    THRESHOLD,
    adapters_of,
    by_rows,
    magnitudes,
    ours,
    result_and_gradients,
    segments_of,
)
from support.tiny import randomize, tiny_model

from minilora import LoraConfig, add_lora, mixed
from minilora.backend import graphs, tables
from minilora.backend.fused_lora import Adapter
from minilora.backend.segmented import segmented_update
from minilora.inference.generation import generate

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

CUDA = torch.device("cuda", 0)


def on_gpu(adapters):
    return [a and a._replace(A=a.A.detach().to(CUDA), B=a.B.detach().to(CUDA)) for a in adapters]


def launched(record) -> set[str]:
    return {name.removeprefix("triton ") for name in record.launches if re.search("shrink|expand", name)}


@pytest.mark.parametrize(
    ("capability", "dtype", "sizes", "kernels"),
    [
        ((7, 5), torch.float16, [1, 1, 2], "rows"),
        ((7, 5), torch.float16, [40, 40, 40], None),
        ((9, 0), torch.bfloat16, [1, 1, 2], "rows"),
        ((9, 0), torch.bfloat16, [40, 1, 40], "tiles"),
        ((9, 0), torch.float32, [1, 1, 2], "rows"),
        ((9, 0), torch.float32, [40, 1, 40], None),
        ((9, 0), torch.float64, [1, 1, 2], None),
    ],
)
def test_kernels_run_where_they_are_exact_and_a_product_for_each_segment_would_be_slow(
    capability, dtype, sizes, kernels
):
    ranks, rows = [4, None, 9], sum(sizes)
    adapters = adapters_of(ranks, 16, 12, torch.float64 if dtype == torch.float64 else torch.float32)
    y, x = randn(rows, 12, dtype=dtype, seed=1), randn(rows, 16, dtype=dtype, seed=2)
    expected = by_rows(y, x, adapters, segments_of(sizes, True))
    with PretendedGpu(capability) as gpu:
        segments, there, x, mine = segments_of(sizes, True, CUDA), on_gpu(adapters), x.to(CUDA), y.to(CUDA)
        segmented_update(mine.clone(), x, there, segments)  # tries the kernels
        with gpu.during() as second:
            found = segmented_update(mine, x, there, segments).cpu()
    expected_kernels = {f"{name}_{kernels}_kernel" for name in ("shrink", "expand")} if kernels else set()
    assert launched(second) == expected_kernels
    assert not gpu.faults
    u = ROUNDING.get(dtype, 2**-24)
    assert ((found - expected).abs() <= 8 * u * expected.abs().max()).all()


def test_factors_of_two_dtypes_are_the_definitions():
    adapters = adapters_of([4, 3], 16, 12)
    adapters[0] = adapters[0]._replace(A=adapters[0].A.bfloat16(), B=adapters[0].B.bfloat16())
    with PretendedGpu((9, 0)) as gpu:
        x, y = torch.ones(4, 16).to(CUDA), torch.zeros(4, 12).to(CUDA)
        segmented_update(y, x, on_gpu(adapters), segments_of([2, 2], False))
        assert not launched(gpu)


def test_a_second_call_waits_for_nothing_and_copies_nothing():
    with PretendedGpu((9, 0)) as gpu:
        adapters, segments = on_gpu(adapters_of([4, None, 9], 16, 12)), segments_of([1, 2, 1], True, CUDA)
        x, y = torch.ones(4, 16).to(CUDA), torch.zeros(4, 12).to(CUDA)
        segmented_update(y, x, adapters, segments)
        with gpu.during() as second:
            segmented_update(y, x, adapters, segments)
        with gpu.during() as other:  # rows that are mixed otherwise: a table of rows, no table of addresses
            segmented_update(y, x, adapters, segments_of([2, 1, 1], True)._replace(order=segments.order))
    assert second.launches == {"triton shrink_rows_kernel": 1, "triton expand_rows_kernel": 1}
    assert other.launches["copy"] == 1 and not second.waits and not other.waits and not gpu.faults


def test_backward_is_four_launches_and_two_products_for_each_adapter():
    with PretendedGpu((9, 0)) as gpu:
        adapters, segments = adapters_of([4, None, 9], 16, 12), segments_of([1, 2, 1], False, CUDA)
        adapters = [a and Adapter(*(t.requires_grad_() for t in a[:2]), *a[2:]) for a in on_gpu(adapters)]
        x, y = torch.ones(4, 16).to(CUDA).requires_grad_(), torch.zeros(4, 12).to(CUDA)
        dy = torch.ones(4, 12).to(CUDA)
        for _ in range(2):
            result = segmented_update(y.clone(), x, adapters, segments)
            with gpu.during() as backward:
                result.backward(dy)
    kernels = {name: n for name, n in backward.launches.items() if "triton" in name}
    assert kernels == {"triton shrink_rows_kernel": 1, "triton expand_rows_kernel": 1}
    assert backward.launches["mm"] == 4 and not backward.waits and not gpu.faults


def test_a_recorded_update_reads_its_tables_and_a_new_one_is_recorded_without_a_table():
    with PretendedGpu((9, 0)) as gpu:
        segments = segments_of([1, 2, 1], True, CUDA)
        mixtures = [on_gpu(adapters_of(ranks, 16, 12)) for ranks in ([4, None, 9], [3, 5, None])]
        x, y = torch.ones(4, 16).to(CUDA), torch.zeros(4, 12).to(CUDA)
        expected = [segmented_update(torch.zeros(4, 12).to(CUDA), x, m, segments).cpu() for m in mixtures]
        tables.cache_clear()
        segmented_update(y, x, mixtures[0], segments)
        for mixture, right in zip(mixtures, expected, strict=True):
            known = len(tables.tables())
            replay = graphs.recorded(lambda m=mixture: segmented_update(y, x, m, segments), CUDA)
            assert len(tables.tables()) == known
            tables.cache_clear()  # the graph holds its tables
            y.zero_()
            replay()
            # The definition rounds in other places: six roundings, as above.
            assert (y.cpu() - right).abs().max() <= 8 * ROUNDING[torch.float32] * right.abs().max()
            segmented_update(y, x, mixtures[0], segments)
        assert gpu.launches["a graph"] == 2 and not gpu.faults


def answer(model):
    """24 new tokens behind four prompts, of two adapters and the base model."""
    prompt = (torch.arange(4 * 9).view(4, 9) % 61).to(model.model.norm.weight.device)
    with mixed.adapters(model, ["b", None, "a", "b"]):
        everywhere = torch.ones(4, 9, dtype=torch.long)
        return generate(model, prompt, everywhere, max_new_tokens=24, eos_token_ids=()).cpu()


def test_answers_of_several_adapters_by_a_recorded_token_are_those_of_a_cpu():
    model = tiny_model()
    for name, r in (("a", 3), ("b", 8)):
        add_lora(model, LoraConfig(r=r, target_modules="all-linear"), name)
    randomize(model)
    expected = answer(model.eval())
    with PretendedGpu((9, 0)) as gpu:
        assert torch.equal(answer(model.cuda()), expected)
    assert gpu.launches["a graph"] == 22 and "shrink_rows_kernel" in launched(gpu) and not gpu.faults


def test_the_oldest_tables_make_room(monkeypatch):
    monkeypatch.setattr(tables, "_MOST", 3)
    tables.cache_clear()
    for i in range(10):
        found = tables.table(list, (((i, 2 * i),),), torch.device("cpu"))
        assert found.tolist() == [[i, 2 * i]] and 1 <= len(tables.tables()) <= 3
        assert tables.table(list, (((i, 2 * i),),), torch.device("cpu")) is found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("rows", [1, 50])
def test_rows_and_gradients_on_the_gpu_are_those_of_a_loop_over_rows(rows, dtype):
    sizes, ranks = [rows, 2 * rows, rows], [8, 16, None]
    adapters = adapters_of(ranks, 256, 128, threshold=THRESHOLD)
    y, x, dy = (randn(4 * rows, n, dtype=dtype, seed=n) for n in (128, 256, 129))
    dy = dy[:, :128]
    right = result_and_gradients(by_rows, y, x, adapters, segments_of(sizes, True), dy)
    terms = result_and_gradients(
        by_rows, y.abs(), x.abs(), magnitudes(adapters), segments_of(sizes, True), dy.abs()
    )
    there = [a and Adapter(*(t.requires_grad_() for t in a[:2]), *a[2:]) for a in on_gpu(adapters)]
    found = result_and_gradients(
        ours, y.to(CUDA), x.to(CUDA), there, segments_of(sizes, True, CUDA), dy.to(CUDA)
    )
    # As above; TF32 is off by default in PyTorch's own products. Sums have up to 256 terms.
    for mine, expected, bound in zip(found, right, terms, strict=True):
        assert ((mine.cpu() - expected).abs() <= (6 * ROUNDING[dtype] + 2**-15) * bound).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_recorded_update_on_the_gpu_is_the_one_that_was_not_recorded(dtype, monkeypatch):
    monkeypatch.setattr(graphs, "_problem", "")
    adapters, segments = on_gpu(adapters_of([4, None, 9], 256, 128)), segments_of([1, 2, 1], True, CUDA)
    x, y = randn(4, 256, dtype=dtype, seed=1).to(CUDA), torch.zeros(4, 128, dtype=dtype, device=CUDA)
    expected = segmented_update(y.clone(), x, adapters, segments)
    replay = graphs.recorded(lambda: segmented_update(y, x, adapters, segments), CUDA)
    tables.cache_clear()
    y.zero_()
    replay()
    assert not graphs._problem and torch.equal(y, expected)
