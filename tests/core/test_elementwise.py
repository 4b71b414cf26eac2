"""The C forms of the decoder's element-wise operations, against their definitions, float64 and published numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import loss, ops
from minilora.backend import choice, dropout, elementwise, elementwise_trial, native, native_trial

needs_c = pytest.mark.skipif(
    not native._functions(), reason="no C compiler: the definitions are all there is"
)
DEFINITIONS = {
    "add_norm": ops.add_norm_definition,
    "add_norm_backward": ops.add_norm_backward_definition,
    "rope": ops.rope_definition,
    "swiglu": ops.swiglu_definition,
    "swiglu_backward": ops.swiglu_backward_definition,
    "cross_entropy": loss.cross_entropy_definition,
    "dropout": dropout.dropout_definition,
    "add_dropped": dropout.add_dropped_definition,
}
UNIT = {
    torch.float32: 2**-24,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}  # largest relative rounding error
TINY = {torch.float32: 2**-149, torch.bfloat16: 2**-133, torch.float16: 2**-24}  # the smallest number
FORMS = [(name, dtype) for name, known in elementwise_trial.KNOWN_BITS.items() for dtype in known]
SUM = 38  # units of 2^-24, at most, in a sum of numbers of one sign: elementwise.c derives it
SMALL = settings(max_examples=25)

dtypes = st.sampled_from(list(UNIT))
widths = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 1024, 1063, 3001]))
seeds = st.integers(0, 2**63 - 1)


def normal(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * 2).to(dtype)


def close(result: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> bool:
    return bool(((result.double() - exact).abs() <= bound).all())


def operands(name: str, dtype: torch.dtype, rows: int, width: int, seed: int = 0) -> tuple:
    """Operands of any operation. RoPE has `rows` tokens of heads of twice the width."""
    a, b, c = (normal(seed + i, dtype, rows, width) for i in range(3))
    weight, inverse = normal(seed + 3, dtype, width), normal(seed + 4, torch.float32, rows).abs()
    q, k = (
        normal(seed, dtype, 2, 3, rows, 2 * width).transpose(1, 2),
        normal(seed + 1, dtype, 2, rows, 1, 2 * width),
    )
    cos, sin = normal(seed + 2, dtype, 1, rows, 2 * width), normal(seed + 3, dtype, 1, rows, 2 * width)
    return {
        "add_norm": (a, b, weight, 1e-5),
        "add_norm_backward": (a, weight, inverse, b, c),
        "rope": (q, k, cos, sin),
        "swiglu": (a, b),
        "swiglu_backward": (a, b, c),
        "cross_entropy": (a, torch.arange(rows) % width),
        "dropout": (a, seed, 5, 30000),
        "add_dropped": (a, b, seed, 5, 30000),
    }[name]


def results(form, arguments: tuple) -> list[torch.Tensor]:
    """Everything that a form gives or changes."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    given = form(*copies)
    given = given if isinstance(given, tuple) else () if given is None else (given,)
    return [*given, copies[0]]


# ---- equal to the bit: nothing is summed, and exp is not needed -----------------------------------------------------


@needs_c
@SMALL
@given(dtype=dtypes, B=st.integers(1, 3), T=st.integers(1, 5), H=st.integers(1, 4), G=st.integers(1, 2),
       half=st.integers(1, 40), layout=st.sampled_from(["heads first", "tokens first", "odd"]), one=st.booleans(),
       back=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_rope_has_the_bits_of_its_definition_in_any_layout(dtype, B, T, H, G, half, layout, one, back, seed):
    def heads(n):
        if layout == "heads first":
            return normal(seed, dtype, B, n, T, 2 * half).transpose(1, 2)
        if layout == "odd":  # the last dimension is not contiguous
            return normal(seed, dtype, 2 * half, B, T, n).permute(1, 2, 3, 0)
        return normal(seed, dtype, B, T, n + 1, 2 * half)[:, :, 1:]

    q, k, cos, sin = heads(H), heads(G), *normal(seed + 1, dtype, 2, 1 if one else B, T, 2 * half)
    expected = ops.rope_definition(q, k, cos, sin, back)
    for rotated, right in zip(elementwise.rope(q, k, cos, sin, back), expected, strict=True):
        assert torch.equal(rotated, right) and rotated.is_contiguous()


@needs_c
@SMALL
@given(dtype=dtypes, rows=st.integers(1, 5), width=widths, seed=seeds, stream=st.integers(0, 2**32 - 1),
       threshold=st.integers(0, 65535))  # fmt: skip
def test_dropout_has_the_bits_of_its_definition_with_its_signs_of_zero(
    dtype, rows, width, seed, stream, threshold
):
    x, y = normal(seed % 1000, dtype, 2, rows, width)
    arguments = seed, stream, threshold
    right = dropout.dropout_definition(x, *arguments)
    kept = elementwise.dropout(x, *arguments)
    assert torch.equal(kept, right) and torch.equal(kept.signbit(), right.signbit())
    sums, right = x.clone(), x.clone()
    elementwise.add_dropped(sums, y, *arguments)
    dropout.add_dropped_definition(right, y, *arguments)
    assert torch.equal(sums, right)
    in_place = x.clone()
    assert elementwise.dropout(in_place, *arguments, out=in_place) is in_place and torch.equal(in_place, kept)


@pytest.mark.parametrize(
    "counter, key, cipher",
    [  # Salmon et al. publish them with their library Random123, file kat_vectors
        ([0, 0, 0, 0], 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822,
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)  # fmt: skip
def test_philox_gives_its_published_numbers(counter, key, cipher):
    words = dropout.philox(tuple(map(torch.tensor, counter)), key)
    assert [int(word) for word in words] == cipher


@pytest.mark.parametrize(
    "form", [pytest.param(elementwise.dropout, marks=needs_c), dropout.dropout_definition]
)
def test_a_column_is_dropped_below_its_16_bits_of_the_published_cipher(form):
    halves = [
        0xE8D5,
        0x6627,
        0xC58D,
        0xE169,
        0xAC4C,
        0xBC57,
        0xDBD8,
        0x9B00,
    ]  # of counter 0 and key 0, lower first
    for column, bits in enumerate(halves):
        assert form(torch.ones(1, 8), 0, 0, bits)[0, column] == 1
        assert form(torch.ones(1, 8), 0, 0, bits + 1)[0, column] == 0


@needs_c
@pytest.mark.parametrize("p", [0.05, 0.5, 0.95])
def test_dropout_drops_its_share(p):
    n = 512 * 1024
    share = elementwise.dropout(torch.ones(512, 1024), 1234, 0, dropout.threshold_of(p)).sum() / n
    deviation = math.sqrt(
        p * (1 - p) / n
    )  # of n independent draws; one seed in two million is off by 5 of them
    assert abs(share - (1 - p)) < 5 * deviation + 2**-17  # p is rounded to a multiple of 2^-16


# ---- within a bound of float64 --------------------------------------------------------------------------------------


@needs_c
@SMALL
@given(dtype=dtypes, rows=st.integers(1, 4), width=widths, seed=st.integers(0, 99), summed=st.booleans())
def test_a_norm_is_exact_but_for_its_roundings(dtype, rows, width, seed, summed):
    x, y, weight, eps = operands("add_norm", dtype, rows, width, seed)
    h, n, inverse = elementwise.add_norm(x, y if summed else None, weight, eps)
    assert torch.equal(h, x + y) if summed else h is x
    exact = (h.double().square().mean(-1) + eps).rsqrt()
    # The sum, each square, the division, eps: half of their errors, after the root. The root and the last division.
    off = ((SUM + 1 + 1 + 1) / 2 + 2) * 2**-24
    assert close(inverse, exact, exact * off)
    exact = weight.double() * (h.double() * exact.unsqueeze(-1))
    # The product with 1 / rms, rounded in float32 and to the dtype, and the product with the weight: 3 roundings more.
    bound = exact.abs() * (off + 2**-24 + 2 * UNIT[dtype]) * (1 + 2 * UNIT[dtype])
    assert close(n, exact, bound + TINY[dtype] * (1 + weight.double().abs()))


@needs_c
@SMALL
@given(dtype=dtypes, rows=st.integers(1, 4), width=widths, seed=st.integers(0, 99), added=st.booleans())
def test_the_gradient_of_a_norm_is_exact_but_for_its_roundings(dtype, rows, width, seed, added):
    h, weight, _, dn, dh = operands("add_norm_backward", dtype, rows, width, seed)
    dh = dh if added else None
    exact_h = h.double().requires_grad_()
    inverse = (exact_h.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    (exact,) = torch.autograd.grad(exact_h * inverse * weight.double(), exact_h, dn.double())
    dx = elementwise.add_norm_backward(h, weight, inverse.detach().float().squeeze(-1), dn, dh)
    exact = exact if dh is None else exact + dh.double()
    normed, g = (h.double() * inverse).abs(), (dn.double() * weight.double()).abs()
    terms = (g + normed * (normed * g).mean(-1, keepdim=True)) * inverse + (
        0 if dh is None else dh.double().abs()
    )
    # On its way into dx a term meets the sum and at most 10 other roundings: 1 / rms three times as it was given and
    # as it is multiplied, g, the product, the division, the product with the mean, the difference, the last sum.
    bound = UNIT[dtype] * exact.abs() + (1 + UNIT[dtype]) * (SUM + 12) * 2**-24 * terms + TINY[dtype]
    assert close(dx, exact, bound.detach())


@needs_c
@SMALL
@given(dtype=dtypes, n=widths, seed=st.integers(0, 99), spread=st.sampled_from([0.1, 1.0, 20.0]))
def test_swiglu_and_its_gradients_are_exact_but_for_their_roundings(dtype, n, seed, spread):
    gate, up, dy = operands("swiglu_backward", dtype, 1, n, seed)
    gate = (gate.float() * spread).to(dtype)
    unit, tiny = UNIT[dtype], TINY[dtype]
    x, u, d = gate.double().requires_grad_(), up.double().requires_grad_(), dy.double()
    exact = x / (1 + torch.exp(-x)) * u
    exact_dgate, exact_dup = torch.autograd.grad(exact, (x, u), d)
    x, u, exact, s = x.detach(), u.detach(), exact.detach(), x.detach().sigmoid()
    # exp is off by 2 units in the last place, which are 4 of 2^-24, and 1 + exp and the division by one each.
    off = 6 * 2**-24
    # silu is rounded to the dtype, then its product is. Below -88.7 exp(-gate) is infinite, and what is lost is less
    # than gate / 2^127.
    both, least = (off + 2 * unit) * (1 + 2 * unit), tiny + x.abs() * 2**-127
    assert close(elementwise.swiglu(gate, up), exact, both * exact.abs() + least * (1 + u.abs()))
    dgate, dup = elementwise.swiglu_backward(dy, gate, up)
    assert close(dup, exact_dup, both * exact_dup.abs() + least * (1 + d.abs()))
    # dy up is rounded to the dtype. 1 - s has the error of s, whatever cancels. Six roundings to float32 follow.
    terms = (d * u).abs() * s * (1 + x.abs() * (1 - s) + x.abs() * s)
    bound = unit * exact_dgate.abs() + (1 + unit) * (
        unit * exact_dgate.abs() + (2 * off + 6 * 2**-24) * terms
    )
    assert close(dgate, exact_dgate, bound + least * (1 + 2 * x.abs()) * (1 + (d * u).abs()))


@needs_c
@SMALL
@given(rows=st.integers(1, 4), V=widths, seed=st.integers(0, 99), spread=st.sampled_from([0.1, 1.0, 30.0]))
def test_cross_entropy_and_its_gradient_are_exact_but_for_their_roundings(rows, V, seed, spread):
    logits, targets = normal(seed, torch.float32, rows, V) * spread, torch.arange(rows) * 7 % V
    z = logits.double()
    exact = torch.nn.functional.cross_entropy(z, targets, reduction="none")
    exact_dz = z.softmax(-1)
    exact_dz[range(rows), targets] -= 1
    losses = elementwise.cross_entropy(logits, targets)
    # z - max is rounded, which exp multiplies: a relative error of 2^-24 |z - max|. exp itself is off by 4 of 2^-24.
    shifted = (z - z.amax(-1, keepdim=True)).abs()
    p_off = (4 + SUM + 3 + 2 * shifted.amax(-1, keepdim=True)) * 2**-24
    # The logarithm is off by 2 units at most, and the difference is rounded.
    picked = shifted[range(rows), targets]
    assert close(losses, exact, p_off.squeeze(-1) + 2**-24 * (4 * math.log(V + 1) + 2 * picked + 2 * exact))
    assert close(logits, exact_dz, p_off * z.softmax(-1) + 2**-24 * exact_dz.abs() + 2**-149)


@needs_c
def test_exp_is_within_a_unit_and_right_at_its_ends():
    """As the gradient of two classes: p1 / p0 = exp(z1 - z0), and exp(z) alone where it is far below 1."""
    z = torch.linspace(-87, -20, 20011)
    logits = torch.stack((torch.zeros_like(z), z), dim=1)
    elementwise.cross_entropy(logits, torch.zeros(len(z), dtype=torch.int64))
    exact = z.double().exp()  # 1 + exp(z) is 1 in float32
    assert close(logits[:, 1], exact, 2 * 2**-23 * exact)
    logits = torch.tensor([[0.0, -88.5], [0.0, -103.0], [0.0, -105.0], [0.0, -3e38], [0.0, -torch.inf]])
    elementwise.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    exact = torch.tensor([-88.5, -103.0, -105.0, -3e38, -torch.inf], dtype=torch.float64).exp()
    assert close(logits[:, 1], exact, torch.tensor(2**-149))  # subnormal numbers are that far apart


# ---- a run that diverges is seen ------------------------------------------------------------------------------------

SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 0.0, -0.0, 1e-40, 95.0, -95.0])


@needs_c
@pytest.mark.parametrize("name, dtype", FORMS)
def test_nan_and_infinity_come_out_as_in_the_definition(name, dtype):
    for i, value in enumerate(SPECIAL.to(dtype)):
        for place in range(2):
            arguments = operands(name, dtype, 3, 45)
            numbers = [
                a for a in arguments if isinstance(a, torch.Tensor) and a.dtype == dtype and a.dim() > 1
            ]
            numbers[place % len(numbers)][..., -1, (i * 7) % 45] = value
            got, right = results(elementwise.FORMS[name][0], arguments), results(DEFINITIONS[name], arguments)
            for ours, theirs in zip(got, right, strict=True):
                assert torch.equal(ours.isnan(), theirs.isnan())
                assert torch.equal(ours.isinf() * ours.sign(), theirs.isinf() * theirs.sign())


# ---- threads, choice, trust -----------------------------------------------------------------------------------------


@needs_c
@pytest.mark.parametrize("name, dtype", FORMS)
def test_the_number_of_threads_does_not_change_a_bit(name, dtype, monkeypatch):
    arguments, found = operands(name, dtype, 67, 299), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "_threads", lambda n, threads=threads: threads)
        found.append(native_trial.digest(results(elementwise.FORMS[name][0], arguments)))
    assert len(set(found)) == 1


@needs_c
@pytest.mark.parametrize("name, dtype", FORMS)
def test_no_rows_are_no_trouble(name, dtype):
    arguments = operands(name, dtype, 0, 45)
    assert all(result.numel() == 0 for result in results(elementwise.FORMS[name][0], arguments))


@needs_c
def test_a_target_that_is_no_class_ends_before_memory_is_touched():
    for target in (-1, 5):
        with pytest.raises(
            IndexError, match=f"none of 5 classes: 0 to {target}|none of 5 classes: {target} to 0"
        ):
            elementwise.cross_entropy(torch.zeros(2, 5), torch.tensor([0, target]))


def test_the_definition_runs_where_it_is_asked_for_and_where_there_is_no_c_form(monkeypatch):
    definition = object()
    assert choice.fastest("swiglu", torch.empty(4, device="meta"), definition) is definition
    assert choice.fastest("swiglu", torch.empty(4, dtype=torch.float64), definition) is definition
    assert choice.fastest("cross_entropy", torch.empty(4, dtype=torch.bfloat16), definition) is definition
    monkeypatch.setenv("MINILORA_BACKEND", "torch")
    assert choice.fastest("swiglu", torch.empty(4), definition) is definition


def test_operands_of_different_dtypes_are_left_to_the_definition():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8)
    expected = ops.add_norm_definition(x, None, weight, 1e-5)
    got = elementwise.form_of("add_norm", ops.add_norm_definition)(x, None, weight, 1e-5)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name, dtype", FORMS)
def test_the_known_bits_are_those_of_the_definitions(name, dtype):
    bits = native_trial.digest(elementwise_trial.TRIALS[name](DEFINITIONS[name], dtype))
    assert bits == elementwise_trial.KNOWN_BITS[name][dtype]


@pytest.mark.parametrize("relative", [-(2**-20), 2**-20])  # four times the error of exp in C
def test_no_right_exp_changes_the_known_bits(relative):
    def off(x):
        return torch.exp(x.double()) * (1 + relative)

    def silu(gate):
        return (gate.double() / (1 + off(-gate.double()))).to(gate.dtype)

    def backward(dy, gate, up):
        x, s = gate.double(), 1 / (1 + off(-gate.double()))
        return ((dy * up).double() * s * (1 + x * (1 - s))).to(gate.dtype), silu(gate) * dy

    def cross_entropy(logits, targets):
        z = logits.double()
        z = z - z.amax(-1, keepdim=True)
        sums = off(z).sum(-1, keepdim=True)
        picked = z.gather(1, targets.unsqueeze(1))
        logits.copy_((z.exp() / sums).scatter_add(1, targets.unsqueeze(1), torch.full_like(picked, -1.0)))
        return (sums.log() - picked).squeeze(1).float()

    known, trials = elementwise_trial.KNOWN_BITS, elementwise_trial.TRIALS
    for dtype in UNIT:
        assert (
            native_trial.digest(trials["swiglu"](lambda gate, up: silu(gate) * up, dtype))
            == known["swiglu"][dtype]
        )
        assert (
            native_trial.digest(trials["swiglu_backward"](backward, dtype)) == known["swiglu_backward"][dtype]
        )
    bits = native_trial.digest(trials["cross_entropy"](cross_entropy, torch.float32))
    assert bits == known["cross_entropy"][torch.float32]


@needs_c
@pytest.mark.parametrize("name, dtype", FORMS)
def test_the_compiled_forms_are_trusted(name, dtype):
    assert elementwise_trial.is_trusted(name, dtype)


@needs_c
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_form_with_other_bits_is_refused_in_one_line(name, monkeypatch, capsys):
    def wrong(*arguments, **options):
        given = DEFINITIONS[name](*arguments, **options)
        last = given[-1] if isinstance(given, tuple) else arguments[0] if given is None else given
        last *= 1 + 2**-7  # one unit of bfloat16
        return given

    caches = elementwise_trial.is_trusted, native._warn_once
    monkeypatch.setitem(elementwise.FORMS, name, (wrong, ()))
    try:
        for cache in caches:
            cache.cache_clear()
        assert not any(
            elementwise_trial.is_trusted(name, dtype) for dtype in elementwise_trial.KNOWN_BITS[name]
        )
        assert choice.fastest(name, torch.empty(4), wrong) is wrong
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "other bits than PyTorch; set CC" in said
    finally:
        for cache in caches:
            cache.cache_clear()


# ---- gradients of the model's operations, in whichever form they run ------------------------------------------------


def gradients(function, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    # Gradients that are whole numbers, other ones for each output.
    dys = [elementwise_trial.whole_numbers(3 + i, *y.shape).to(y.dtype) for i, y in enumerate(outputs)]
    return torch.autograd.grad(outputs, leaves, dys)


@pytest.mark.parametrize("width", [8, 45, 1063])
def test_gradients_are_those_of_autograd_through_the_plain_formulas(width):
    def add_norm(x, y, weight):
        h = x + y
        return h, h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def rope(q, k):
        def turned(x):
            return x * cos.to(x).unsqueeze(2) + torch.cat((-x[..., width:], x[..., :width]), -1) * sin.to(
                x
            ).unsqueeze(2)

        return turned(q), turned(k)

    angles = torch.randn(1, 3, width).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    x, y, weight = torch.randn(3, width), torch.randn(3, width), torch.randn(width)
    q, k = torch.randn(2, 2, 3, 2 * width).transpose(1, 2), torch.randn(2, 3, 1, 2 * width)
    cases = [
        (lambda *t: ops.add_norm(*t, 1e-5), add_norm, (x, y, weight)),
        (lambda q, k: ops.rope(q, k, cos, sin), rope, (q, k)),
        (ops.swiglu, lambda gate, up: gate / (1 + torch.exp(-gate)) * up, (x, y)),
    ]
    for function, formula, tensors in cases:
        exact = gradients(formula, [t.double() for t in tensors])
        for ours, right in zip(gradients(function, tensors), exact, strict=True):
            # Some 50 roundings of terms that are at most 8 times the largest gradient.
            assert close(ours, right, 50 * 2**-24 * 8 * right.abs().max())
