"""Attention over documents against attention with a dense mask, in every form."""

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import fused_attentions
from support.pretended_gpu import PretendedGpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minilora import ops
from minilora.backend import attention as forms
from minilora.backend.attention import KeptAttention
from minilora.backend.choice import padded_length
from minilora.backend.documents import PADDING, Documents, documents_of_ids, documents_of_rows
from minilora.model import attention_mask

EMULATED = dict(fused_attentions.EMULATED)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# Both sides sum in float32, in another order. A gradient sums over at most 14 tokens and 4 heads, and each
# term has passed a product over K = 16, an exponential and another sum: sqrt(56) + 3 sqrt(16) + 3 roundings
# of 2^-24 are 1.3e-6 of the largest term. Terms may be 7 times as large as their sum.
FLOAT32 = 1e-5


def unit(dtype: torch.dtype) -> float:
    """The bound of the relative error of forward and gradients in a dtype.

    The kernels round the weights of the softmax, their gradients, and each result to 16 bits: three roundings
    of eps / 2. They add up, and a term may be 4 times as large as its sum.
    """
    return FLOAT32 if dtype == torch.float32 else 3 * 4 * torch.finfo(dtype).eps / 2


def tensors(B: int, T: int, H: int, G: int, K: int = 16, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
    """q, k, v, dy."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, heads, K, generator=generator).to(dtype) for heads in (H, G, G, H)]


def attended(q, k, v, dy, documents: Documents) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    y = ops.document_attention(*leaves, documents)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def masked(q, k, v, dy, ids: Tensor, window: int | None) -> list[Tensor]:
    """The same of the written-out attention with a dense mask, and nothing at padding."""
    leaves = [t.detach().float().requires_grad_() for t in (q, k, v)]
    mask = attention_mask(ids.shape[1], ids.shape[1], window, ids, CPU)
    y = ops.attention_reference(*(t.transpose(1, 2) for t in leaves), mask).transpose(1, 2)
    y = y * (ids != PADDING)[:, :, None, None]
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.float())]


def assert_equal(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    """Compare, relative to the largest value, or to 1: the terms of a sum are of this size although a sum of
    few may be zero, as the gradient of a document's only score.
    """
    pairs = zip(found, expected, strict=True)
    errors = [((a.float() - b).abs().max() / b.abs().max().clamp_min(1)).item() for a, b in pairs]
    assert max(errors) <= bound, errors


@st.composite
def rows_of_documents(draw) -> Tensor:
    """Document ids (B, T): runs of tokens, some of them padding, which is anywhere."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    rows = draw(st.lists(st.lists(st.integers(0, 2), min_size=T, max_size=T), min_size=B, max_size=B))
    steps = torch.tensor(rows)
    ids = (steps > 0).cumsum(1)  # another document where a step is not 0
    padding = draw(st.sets(st.integers(0, T), max_size=2))
    return ids.masked_fill(torch.isin(ids, torch.tensor(sorted(padding), dtype=torch.long)), PADDING)


HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (4, 1)])
WINDOWS = st.sampled_from([None, 1, 3, 20])


@settings(max_examples=60)
@given(rows_of_documents(), HEADS, WINDOWS)
def test_attention_over_documents_is_attention_with_a_dense_mask(ids, heads, window):
    given_tensors = tensors(*ids.shape, *heads)
    found = attended(*given_tensors, documents_of_ids(ids, CPU).within(window))
    assert_equal(found, masked(*given_tensors, ids, window), FLOAT32)
    assert all(not t[ids == PADDING].any() for t in found)


@settings(max_examples=20)
@given(rows_of_documents(), HEADS, WINDOWS)
def test_so_it_is_in_bfloat16_on_a_cpu(ids, heads, window):
    given_tensors = tensors(*ids.shape, *heads, K=32, dtype=torch.bfloat16)
    found = attended(*given_tensors, documents_of_ids(ids, CPU).within(window))
    assert_equal(found, masked(*given_tensors, ids, window), unit(torch.bfloat16))


@settings(max_examples=20)
@given(rows_of_documents(), HEADS, WINDOWS)
def test_so_is_its_definition(ids, heads, window):
    given_tensors = tensors(*ids.shape, *heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "fused_form", lambda q, k, definition: definition)
        found = attended(*given_tensors, documents_of_ids(ids, CPU).within(window))
    assert_equal(found, masked(*given_tensors, ids, window), FLOAT32)


ON_A_GPU = {
    "flash, bfloat16": ((9, 0), torch.bfloat16, "_flash"),
    "flash, float16": ((8, 0), torch.float16, "_flash"),
    "efficient, float32": ((9, 0), torch.float32, "_efficient"),
    "efficient, float16": ((7, 5), torch.float16, "_efficient"),
}


@pytest.mark.parametrize("case", ON_A_GPU)
@settings(max_examples=10)
@given(ids=rows_of_documents(), heads=HEADS, window=WINDOWS)
def test_so_are_the_fused_attentions_of_a_gpu(case, ids, heads, window):
    capability, dtype, kernel = ON_A_GPU[case]
    given_tensors = tensors(*ids.shape, *heads, dtype=dtype)
    expected = masked(*given_tensors, ids, window)
    with PretendedGpu(capability) as gpu:
        there = [t.cuda() for t in given_tensors]
        forms.fused_form(there[0][0], there[1][0], ops.DEFINITION)  # its trial
        with gpu.during() as record:
            found = attended(*there, documents_of_ids(ids, GPU).within(window))
        assert not gpu.faults and not record.waits
    real = bool((ids != PADDING).any())
    launched = {name: n for name, n in record.launches.items() if name in EMULATED}
    assert launched == {f"{kernel}_attention_{way}": 1 for way in ("forward", "backward") if real}
    assert_equal(found, expected, unit(dtype))


@pytest.mark.parametrize("case", ON_A_GPU)
def test_rows_that_are_one_document_each_take_the_same_path(case):
    capability, dtype, kernel = ON_A_GPU[case]
    given_tensors = tensors(3, 40, 4, 2, dtype=dtype)
    expected = masked(*given_tensors, torch.zeros(3, 40, dtype=torch.long), None)
    with PretendedGpu(capability) as gpu:
        found = attended(*(t.cuda() for t in given_tensors), documents_of_rows(3, 40, GPU))
        assert gpu.launches[f"{kernel}_attention_forward"] == 2 and not gpu.faults  # one of them a trial
    assert_equal(found, expected, unit(dtype))
    assert_equal(attended(*given_tensors, documents_of_rows(3, 40, CPU)), expected, unit(dtype))


REFUSED = {
    "a head size that 8 does not divide": ((9, 0), torch.bfloat16, 12),
    "bfloat16 on a T4": ((7, 5), torch.bfloat16, 16),
    "float64": ((9, 0), torch.float64, 16),
}


@pytest.mark.parametrize("case", REFUSED)
def test_where_a_gpu_has_no_kernel_the_definition_runs(case):
    capability, dtype, K = REFUSED[case]
    ids = torch.tensor([[0] * 5 + [1] * 6 + [PADDING]])
    given_tensors = tensors(*ids.shape, 4, 2, K, dtype=dtype)
    with PretendedGpu(capability) as gpu:
        found = attended(*(t.cuda() for t in given_tensors), documents_of_ids(ids, GPU).within(3))
        assert not gpu.faults and not gpu.launches.keys() & EMULATED.keys()
    assert_equal(found, masked(*given_tensors, ids, 3), unit(dtype) if dtype != torch.float64 else FLOAT32)


def test_heads_too_wide_for_flash_attention_take_the_efficient_one():
    given_tensors = tensors(1, 9, 2, 1, 200, dtype=torch.bfloat16)
    with PretendedGpu((9, 0)) as gpu:
        attended(*(t.cuda() for t in given_tensors), documents_of_rows(1, 9, GPU))
    assert gpu.launches["_efficient_attention_forward"] == 2 and not gpu.launches["_flash_attention_forward"]


def test_flash_attention_that_is_switched_off_is_not_called():
    given_tensors = tensors(1, 9, 2, 1, dtype=torch.float16)
    with PretendedGpu((9, 0)) as gpu:
        torch.backends.cuda.enable_flash_sdp(False)
        try:
            attended(*(t.cuda() for t in given_tensors), documents_of_rows(1, 9, GPU))
        finally:
            torch.backends.cuda.enable_flash_sdp(True)
    assert gpu.launches["_efficient_attention_forward"] == 2 and not gpu.launches["_flash_attention_forward"]


WRONG = {
    "fails": lambda *arguments, **options: 1 / 0,
    "knows no window": lambda *arguments, window_size_left, **options: EMULATED["_flash_attention_forward"](
        *arguments[:8], True, False, window_size_left=-1, window_size_right=0
    ),
    "sees a key too many": lambda *arguments, window_size_left, **options: EMULATED[
        "_flash_attention_forward"
    ](*arguments, window_size_left=window_size_left + 1, **options),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_does_not_pass_its_trial_is_not_used_and_one_line_says_so(wrong, monkeypatch, capfd):
    ids = torch.tensor([[0] * 5 + [1] * 30])
    given_tensors = tensors(*ids.shape, 4, 2, dtype=torch.bfloat16)
    monkeypatch.setitem(fused_attentions.EMULATED, "_flash_attention_forward", WRONG[wrong])
    with PretendedGpu((9, 0)) as gpu:
        for _ in range(2):
            found = attended(*(t.cuda() for t in given_tensors), documents_of_ids(ids, GPU).within(3))
    assert gpu.launches["_flash_attention_forward"] == 1  # the trial's
    assert_equal(found, masked(*given_tensors, ids, 3), unit(torch.bfloat16))
    said = [line for line in capfd.readouterr().err.splitlines() if "attention is slower" in line]
    assert len(said) == 1 and "'flash'" in said[0]


# ---- a CPU -------------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), WINDOWS)
def test_a_document_has_the_bits_that_it_has_alone(lengths, window):
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).unsqueeze(0)
    given_tensors = tensors(*ids.shape, 4, 2)
    together = attended(*given_tensors, documents_of_ids(ids, CPU).within(window))
    for document in range(len(lengths)):
        own = [t[:, ids[0] == document] for t in given_tensors]
        alone = attended(*own, documents_of_rows(1, lengths[document], CPU).within(window))
        assert all(torch.equal(a[:, ids[0] == document], b) for a, b in zip(together, alone, strict=True))


class Operators(TorchDispatchMode):
    """The sizes of queries that PyTorch's attention of the CPU is called with, and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.queries, self.largest = [], 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation.overloadpacket.__name__ == "_scaled_dot_product_flash_attention_for_cpu":
            self.queries.append(tuple(arguments[0].shape))
        result = operation(*arguments, **(options or {}))
        found = result if isinstance(result, tuple) else (result,)
        self.largest = max([self.largest, *(t.numel() for t in found if isinstance(t, Tensor))])
        return result


PACKED = [3, 20, 20, 17, 31, 40]


def calls(dtype: torch.dtype, compiled: bool, monkeypatch) -> tuple[list[tuple], list[Tensor]]:
    """What is called, and the results, where a CPU compiles bfloat16's attention or not."""
    monkeypatch.setattr(forms, "product_dtype", lambda q: q.dtype if compiled else torch.float32)
    monkeypatch.setattr(forms.cpu_attention, "takes", lambda q, k: False)
    ids = torch.arange(len(PACKED)).repeat_interleave(torch.tensor(PACKED)).unsqueeze(0)
    given_tensors = tensors(*ids.shape, 4, 2, dtype=dtype)
    with Operators() as seen:
        found = attended(*given_tensors, documents_of_ids(ids, CPU))
    assert_equal(found, masked(*given_tensors, ids, None), unit(dtype))
    return seen.queries, found


def test_documents_of_one_length_that_follow_each_other_are_one_call(monkeypatch):
    expected = [(1, 4, 3, 16), (2, 4, 20, 16), *((1, 4, n, 16) for n in (17, 31, 40))]
    for dtype, compiled in ((torch.float32, True), (torch.bfloat16, False)):
        assert calls(dtype, compiled, monkeypatch)[0] == expected


def test_where_a_cpu_compiles_attention_it_sees_rounded_lengths_alone(monkeypatch):
    seen, _ = calls(torch.bfloat16, True, monkeypatch)
    assert seen == [(1, 4, 16, 16), (4, 4, 32, 16), (1, 4, 48, 16)]
    assert {shape[2] for shape in seen} == {padded_length(n) for n in PACKED}


def test_no_dense_mask_is_made():
    T, K = 256, 16
    ids = (torch.arange(T) // 8).unsqueeze(0)
    given_tensors = tensors(1, T, 2, 1, K)
    with Operators() as seen:
        attended(*given_tensors, documents_of_ids(ids, CPU).within(5))
    assert seen.largest == T * 2 * K < T * T  # nothing is larger than q


def test_what_padding_holds_reaches_nothing():
    ids = torch.tensor([[PADDING, 0, 0, PADDING], [1, 1, 1, 1]])
    given_tensors = tensors(2, 4, 2, 1)
    documents = documents_of_ids(ids, CPU)
    expected = attended(*given_tensors, documents)
    for t in given_tensors:
        t[ids == PADDING] = torch.nan
    assert all(map(torch.equal, attended(*given_tensors, documents), expected))


# ---- where documents lie -----------------------------------------------------------------------------------


def test_documents_are_runs_of_ids_and_end_with_a_row():
    documents = documents_of_ids(torch.tensor([[7, 7, 2, -1], [2, 2, 7, 7]]), CPU)
    assert documents.lengths == (2, 1, 2, 2) and documents.longest == 2 and documents.tokens == 7
    assert documents.cumulative.tolist() == [0, 2, 3, 5, 7] and documents.ends.tolist() == [2, 3, 5, 7]
    assert documents.cumulative.dtype == torch.int32
    assert documents.places.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert documents.positions.tolist() == [[0, 1, 0, 0], [0, 1, 0, 1]]


@given(rows_of_documents())
def test_tokens_come_back_to_their_places_and_padding_is_zero(ids):
    documents = documents_of_ids(ids, CPU)
    x = torch.randn(*ids.shape, 2, 3)
    expected = x * (ids != PADDING)[:, :, None, None]
    assert torch.equal(documents.put(documents.take(x), *ids.shape), expected)


def test_padding_at_the_end_copies_no_tokens():
    x = torch.randn(2, 4, 1, 1)
    documents = documents_of_ids(torch.tensor([[0, 0, 1, 1], [0, 0, PADDING, PADDING]]), CPU)
    assert documents.take(x).data_ptr() == x.data_ptr()
    whole = documents_of_rows(2, 4, CPU)
    assert whole.put(whole.take(x), 2, 4).data_ptr() == x.data_ptr()


def test_a_window_as_long_as_the_longest_document_is_none():
    documents = documents_of_ids(torch.tensor([[0, 0, 0, 1]]), CPU)
    assert [documents.within(w).window for w in (None, 2, 3, 4)] == [None, 2, None, None]


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_the_host_waits_for_document_ids_of_a_gpu_alone_and_once(where):
    ids = torch.tensor([[0, 0, 1, PADDING], [0, 1, 1, 1]])
    with PretendedGpu() as gpu:
        there = ids.to(where)
        with gpu.during() as record:
            documents = documents_of_ids(there, GPU)
        assert sum(record.waits.values()) == (where == "cuda") and not gpu.faults
        assert {t.device for t in (documents.cumulative, documents.positions, documents.places)} == {GPU}


# ---- outputs that a first run kept -------------------------------------------------------------------------


@pytest.mark.parametrize("case", ON_A_GPU)
def test_a_second_run_reads_the_log_sum_exps_of_the_first_whatever_form_is_chosen_then(case, monkeypatch):
    capability, dtype, _ = ON_A_GPU[case]
    ids = torch.tensor([[0] * 10 + [1] * 14, [0] * 3 + [PADDING] * 21])
    with PretendedGpu(capability) as gpu:
        q, k, v, dy = (t.cuda() for t in tensors(2, 24, 4, 2, dtype=dtype))
        documents = documents_of_ids(ids, GPU)
        expected = attended(q, k, v, dy, documents)
        kept = KeptAttention()
        with torch.no_grad():  # as the first run of a checkpointed layer
            first = ops.document_attention(q, k, v, documents, kept)
        monkeypatch.setattr(ops, "fused_form", lambda q, k, definition: definition)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        with gpu.during() as record:
            again = ops.document_attention(*leaves, documents, KeptAttention(kept.outputs))
        assert not record.launches.keys() & EMULATED.keys()
        found = [again.detach(), *torch.autograd.grad(again, leaves, dy)]
    assert torch.equal(first, expected[0]) and all(map(torch.equal, found, expected))


def test_kept_outputs_are_used_up_once():
    q, k, v, _ = tensors(1, 4, 2, 1)
    first, documents = KeptAttention(), documents_of_rows(1, 4, CPU)
    ops.document_attention(q, k, v, documents, first)
    second = KeptAttention(first.outputs)
    ops.document_attention(q, k, v, documents, second)
    with pytest.raises(StopIteration):
        ops.document_attention(q, k, v, documents, second)


# ---- PyTorch's operators -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EMULATED)
def test_the_emulated_kernels_take_the_arguments_of_pytorchs_operators(name):
    schema = getattr(torch.ops.aten, name).default._schema.arguments
    ours = inspect.signature(EMULATED[name]).parameters.values()
    expected = [(a.name, a.kwarg_only) for a in schema]
    # Older versions of PyTorch have fewer arguments at the end.
    assert [(p.name, p.kind == p.KEYWORD_ONLY) for p in ours][: len(expected)] == expected


CUMULATIVE = {
    "another dtype": lambda cumulative: cumulative.long(),
    "another device": lambda cumulative: cumulative.cpu(),
}


@pytest.mark.parametrize("wrong", CUMULATIVE)
@pytest.mark.parametrize("case", ON_A_GPU)
def test_the_emulated_kernels_refuse_cumulative_lengths_of(case, wrong):
    capability, dtype, _ = ON_A_GPU[case]
    with PretendedGpu(capability):
        given_tensors = [t.cuda() for t in tensors(1, 8, 2, 2, dtype=dtype)]
        right = documents_of_rows(1, 8, GPU)
        bad = Documents(right.lengths, CUMULATIVE[wrong](right.cumulative), right.positions, None)
        with pytest.raises(RuntimeError, match="cumulative lengths must"):
            attended(*given_tensors, bad)


@pytest.mark.parametrize("case", ON_A_GPU)
def test_a_longest_length_that_is_too_small_would_leave_tokens_unwritten(case):
    capability, dtype, _ = ON_A_GPU[case]
    with PretendedGpu(capability):
        q, k, v, _ = (t.cuda() for t in tensors(1, 8, 2, 2, dtype=dtype))
        right = documents_of_rows(1, 8, GPU)
        short = Documents((5,), right.cumulative, right.positions, None)
        rows = [t[0] for t in (q, k, v)]
        y, _ = forms.fused_form(*rows[:2], ops.DEFINITION).forward(*rows, short)
        assert y[5:].isnan().all() and not y[:5].isnan().any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("window", [None, 1, 40, 200])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("K", [64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kernels_of_this_gpu_compute_the_definition(dtype, K, heads, window):
    lengths = [1, 130, 64, 3, 257]
    row = [i for i, n in enumerate(lengths) for _ in range(n)] + [PADDING] * 57
    ids = torch.tensor([row, [0] * 300 + [PADDING] * 100 + [1] * 112])
    given_tensors = [t.cuda() for t in tensors(*ids.shape, *heads, K, dtype)]
    documents = documents_of_ids(ids, GPU).within(window)
    rows = [documents.take(t.float()) for t in given_tensors]
    y, lse = ops.document_attention_definition(*rows[:3], documents)
    expected = [y, *ops.document_attention_backward_definition(rows[3], *rows[:3], y, lse, documents)]
    expected = [documents.put(t, *ids.shape) for t in expected]
    found = attended(*given_tensors, documents)
    if dtype != torch.float32:
        assert_equal(found, expected, unit(dtype))
    else:  # the efficient kernel multiplies float32 in tensor cores' TF32, of 11 significand bits
        assert_equal(found, expected, 3 * 4 * 2**-11)
