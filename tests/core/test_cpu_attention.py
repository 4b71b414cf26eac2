"""Attention in C on a CPU with AMX, against float64, against PyTorch's fused attention, and against itself."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import ops
from minilora.backend import cpu_attention, native, native_trial

needs_amx = pytest.mark.skipif(
    "attention_bf16" not in native._functions(), reason="this CPU has no AMX, or there is no C compiler"
)
UNIT = 2**-8  # the largest relative error of one rounding to bfloat16


def inputs(N, H, G, K, seed=0):
    """q, k, v, dy: (N, H or G, K) bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(N, heads, K, generator=generator).bfloat16() for heads in (H, G, G, H)]


def compute(q, k, v, dy, ends, window=None):
    """y, lse, dq, dk, dv, in tensors that were full of NaN."""
    y, dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, q, k, v))
    lse = torch.full((q.shape[1], len(q)), torch.nan)
    ends = torch.tensor(ends, dtype=torch.int64)
    cpu_attention.attention(q, k, v, ends, window, y, lse)
    cpu_attention.attention_backward(dy, q, k, v, y, lse, ends, window, dq, dk, dv)
    return y, lse, dq, dk, dv


def sees(N, ends, window=None):
    """(N, N): whether a query sees a key. Tokens after the last document see themselves, to have a softmax."""
    token = torch.arange(N)
    document = torch.bucketize(token, torch.tensor(ends, dtype=torch.int64), right=True)
    behind = token.view(N, 1) - token
    seen = (document.view(N, 1) == document) & (behind >= 0) & (behind < (window or N))
    return torch.where((document == len(ends)).view(N, 1), behind == 0, seen)


def exact(q, k, v, dy, ends, window=None):
    """P (H, N, N), dP, and y, lse, dq, dk, dv in float64: the equations of attention.c, for all heads."""
    heads = q.shape[1] // k.shape[1]
    q, k, v, dy = (x.double().transpose(0, 1) for x in (q, k, v, dy))  # (H or G, N, K)
    k, v = k.repeat_interleave(heads, 0), v.repeat_interleave(heads, 0)
    S = (q @ k.mT / q.shape[2] ** 0.5).masked_fill(~sees(q.shape[1], ends, window), -torch.inf)
    P, dP = S.softmax(-1), dy @ v.mT
    y = P @ v
    dS = P * (dP - (dy * y).sum(-1, keepdim=True)) / q.shape[2] ** 0.5
    results = [y, dS @ k, dS.mT @ q, P.mT @ dy]
    results[2:] = [x.unflatten(0, (-1, heads)).sum(1) for x in results[2:]]
    y, dq, dk, dv = (x.transpose(0, 1) for x in results)
    return P, dP, (y, S.logsumexp(-1), dq, dk, dv)


def bounds(q, k, v, dy, P, dP):
    """How far y, dq, dk and dv may be from exact, before they are rounded themselves.

    UNIT for a rounding of P to bfloat16, times the terms of its product. dS = P (dP - delta) is rounded once
    more, and delta comes from a y that was rounded: UNIT times sum(|dy| |y|), with |y| <= P |v|.
    A quarter more for second-order terms and for all that happens in float32: sums, 2^x (2^-18), lse.
    """
    heads, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    q, k, v, dy = (x.double().abs().transpose(0, 1) for x in (q, k, v, dy))
    k, v = k.repeat_interleave(heads, 0), v.repeat_interleave(heads, 0)
    size = (dy * (P @ v)).sum(-1, keepdim=True)
    dS = 1.25 * UNIT * P * ((dP.abs() + size) + 2 * size) * scale
    results = [1.25 * UNIT * (P @ v), dS @ k, dS.mT @ q, 1.25 * UNIT * (P.mT @ dy)]
    results[2:] = [x.unflatten(0, (-1, heads)).sum(1) for x in results[2:]]
    return [x.transpose(0, 1) for x in results]


# Documents of all lengths around a square's side (32), and some beyond a step of backward (128).
documents = st.lists(
    st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 300])), min_size=1, max_size=4
)


@needs_amx
@settings(max_examples=40)
@given(
    lengths=documents,
    padding=st.sampled_from([0, 1, 40]),
    heads=st.sampled_from([(1, 1), (2, 2), (6, 2), (5, 1)]),
    K=st.sampled_from([32, 64, 96, 128]),
    window=st.sampled_from([None, None, 1, 31, 32, 33, 100, 1000]),
    seed=st.integers(0, 2**16),
)
def test_output_and_gradients_are_those_of_float64_within_the_roundings_to_bfloat16(
    lengths, padding, heads, K, window, seed
):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    last = ends[-1]
    q, k, v, dy = inputs(last + padding, *heads, K, seed)
    y, lse, *gradients = compute(q, k, v, dy, ends, window)
    P, dP, (exact_y, exact_lse, *exact_gradients) = exact(q, k, v, dy, ends, window)
    ours, exacts, limits = (y, *gradients), (exact_y, *exact_gradients), bounds(q, k, v, dy, P, dP)
    for result, expected, limit in zip(ours, exacts, limits, strict=True):
        error = (result.double() - expected).abs()[:last]
        # the result's own rounding; 1e-6 where all terms cancel, of float32 sums of numbers around 1
        assert (error <= (limit + UNIT * (expected.abs() + limit) + 1e-6)[:last]).all()
        assert (result[last:] == 0).all()
    # float32: a sum of K products, a maximum times a scale, a logarithm; 2^x is exact to 2^-18
    assert torch.allclose(lse[:, :last].double(), exact_lse[:, :last], rtol=2**-20, atol=2**-17)
    assert (lse[:, last:] == 0).all()


@needs_amx
@pytest.mark.parametrize("window", [None, 50])
def test_a_row_of_documents_is_the_reference_with_a_mask_of_documents(window):
    q, k, v, _ = inputs(200, 4, 2, 64)
    ends = [30, 31, 150, 200]
    y = compute(q, k, v, q, ends, window)[0]
    batch = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]  # (1, H or G, N, K)
    expected = ops.attention_reference(*batch, sees(200, ends, window)[None, None])[0].transpose(0, 1)
    # Both are rounded to bfloat16 once, and in ours each weight too: three units of numbers up to |v|.
    assert torch.allclose(y.float(), expected.float(), rtol=0, atol=3 * UNIT * v.abs().max().item())


@needs_amx
def test_errors_are_no_larger_than_those_of_pytorchs_fused_attention():
    q, k, v, dy = inputs(400, 2, 2, 64)
    leaves = [x.transpose(0, 1).unsqueeze(0).requires_grad_() for x in (q, k, v)]
    y = F.scaled_dot_product_attention(*leaves, is_causal=True)
    theirs = (y, *torch.autograd.grad(y, leaves, dy.transpose(0, 1).unsqueeze(0)))
    y, lse, *gradients = compute(q, k, v, dy, [400])
    _, _, (exact_y, exact_lse, *exact_gradients) = exact(q, k, v, dy, [400])
    for our, their, expected in zip((y, *gradients), theirs, (exact_y, *exact_gradients), strict=True):
        their_error = (their[0].transpose(0, 1).double() - expected).norm()
        # Both round at the same places. A tenth for chance: the errors of 51,200 numbers average to 1/226.
        assert (our.double() - expected).norm() <= 1.1 * their_error


@needs_amx
@pytest.mark.parametrize("window", [None, 40])
def test_a_document_alone_has_the_bits_that_it_has_among_others(window):
    q, k, v, dy = inputs(401, 6, 2, 96)
    ends, first = [33, 34, 300, 390], 0
    together = compute(q, k, v, dy, ends, window)
    for end in ends:
        alone = compute(*(x[first:end].contiguous() for x in (q, k, v, dy)), [end - first], window)
        for one, row in zip(alone, together, strict=True):
            assert torch.equal(one, row[:, first:end] if row.dim() == 2 else row[first:end])
        first = end


@needs_amx
def test_nan_stays_in_its_document():
    q, k, v, dy = inputs(100, 2, 1, 64)
    before = compute(q, k, v, dy, [40, 70, 90])
    for x in (q, k, v, dy):
        x[40:70] = torch.nan
        x[90:] = torch.nan  # padding
    after = compute(q, k, v, dy, [40, 70, 90])
    for x, y in zip(before, after, strict=True):
        x, y = (x.T, y.T) if x.dim() == 2 else (x, y)
        assert torch.equal(x[:40], y[:40]) and torch.equal(x[70:], y[70:]) and y[40:70].isnan().all()


@needs_amx
def test_the_number_of_threads_does_not_change_a_bit(monkeypatch):
    tensors, ends = inputs(500, 10, 2, 64), [300, 320, 490]
    expected = compute(*tensors, ends)
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "_threads", lambda n, threads=threads: threads)
        for _ in range(3):
            assert all(map(torch.equal, compute(*tensors, ends), expected))


@needs_amx
def test_large_scores_do_not_overflow():
    q, k, v, dy = inputs(64, 1, 1, 32)
    ours = compute(100 * q, 100 * k, v, dy, [64])
    assert all(x.isfinite().all() for x in ours)
    # exp(30000) is infinite. The weights are 0 and 1 nearly everywhere, and y is one of v's rows.
    scores = (q[:, 0].double() @ k[:, 0].double().T).masked_fill(~sees(64, [64]), -torch.inf)
    assert (ours[0] == v[scores.argmax(-1)]).all(-1).double().mean() > 0.9


@needs_amx
def test_a_row_without_documents_and_a_row_without_tokens_are_zeros():
    assert all((x == 0).all() for x in compute(*inputs(40, 2, 1, 32), []))
    assert all((x == 0).all() for x in compute(*inputs(40, 2, 1, 32), [0, 0]))
    assert all(x.numel() == 0 for x in compute(*inputs(0, 2, 1, 32), []))


@needs_amx
@pytest.mark.parametrize("ends", [[50, 40], [30, 41], [-1, 40]])
def test_documents_that_end_outside_of_the_row_or_out_of_order_are_refused(ends):
    with pytest.raises(AssertionError, match="documents end in order"):
        compute(*inputs(40, 2, 1, 32), ends)


@needs_amx
@pytest.mark.parametrize(
    "H, G, K, dtype, taken",
    [
        (4, 2, 64, torch.bfloat16, True),
        (4, 3, 64, torch.bfloat16, False),
        (4, 2, 80, torch.bfloat16, False),
        (4, 2, 288, torch.bfloat16, False),
        (4, 2, 64, torch.float32, False),
    ],
)
def test_it_takes_bfloat16_heads_of_multiples_of_32_numbers_in_whole_groups(H, G, K, dtype, taken):
    assert cpu_attention.takes(torch.empty(3, H, K, dtype=dtype), torch.empty(3, G, K, dtype=dtype)) == taken


@needs_amx
def test_the_compiled_functions_give_the_known_bits():
    assert cpu_attention.is_trusted()


@needs_amx
def test_other_bits_are_one_line_and_the_compiled_functions_are_not_taken(monkeypatch, capsys):
    caches = cpu_attention.is_trusted, native._warn_once
    monkeypatch.setattr(cpu_attention, "KNOWN_BITS", "other bits")
    try:
        for cache in caches:
            cache.cache_clear()
        assert not cpu_attention.takes(*(torch.empty(3, 2, 64, dtype=torch.bfloat16) for _ in "qk"))
        assert not cpu_attention.is_trusted()
        assert capsys.readouterr().err.count("\n") == 1
    finally:
        for cache in caches:
            cache.cache_clear()


def test_the_known_bits_are_those_of_exact_sums():
    def forward(q, k, v, ends, window, y, lse):
        y.copy_(exact(q, k, v, q, ends.tolist(), window)[2][0])
        y[ends[-1] :] = 0

    def backward(dy, q, k, v, y, lse, ends, window, dq, dk, dv):
        P, dP, (_, _, *exacts) = exact(q, k, v, dy, ends.tolist(), window)
        assert set(P[:, : ends[-1]].unique().tolist()) == {0, 0.5, 1}
        dS = P * (dP - (P * dP).sum(-1, keepdim=True))
        assert torch.equal(dS, dS.bfloat16().double()) and dS.any()  # so its rounding changes nothing
        scale = 1 / torch.tensor(96.0).sqrt()  # float32, as in C
        for out, result in zip((dq, dk, dv), exacts, strict=True):
            factor = 96**0.5 if out is not dv else 1
            whole = (result * factor * 4).round() / 4  # sums before the scale: multiples of a quarter
            assert torch.allclose(whole, result * factor, rtol=0, atol=1e-6) and whole.abs().max() < 2**22
            out.copy_(whole.float() * (scale if out is not dv else 1))
            out[ends[-1] :] = 0

    assert native_trial.digest(cpu_attention.trial(forward, backward)) == cpu_attention.KNOWN_BITS
