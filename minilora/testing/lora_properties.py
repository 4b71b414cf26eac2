"""What a LoRA layer owes: one function a property, given how to make a layer and a case to make it for.

    y = x W^T + b + s dropout(x) A^T B^T          s = alpha / r, or as chosen          B = 0 at the start

Every gradient is compared with its equation in float64 (lora_oracles.py), at the scaling that the layer's own
output shows: so a wrong scaling is reported as that, and not as five other faults.
"""

from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from minilora.testing.battery import Battery, expect_close, expect_same
from minilora.testing.lora_oracles import lora_gradients, merged_reference
from minilora.testing.lora_subject import LayerCase, LayerMaker

LORA = Battery()
# A wrong gradient or mask is off by about its own size; float32 sums of at most 100 terms by 100 * 2^-24.
SMALL = 1e-4


def needs(*verbs: str):
    """Return why a property does not concern a layer without these verbs."""

    def not_for(maker: LayerMaker) -> str | None:
        missing = [verb for verb in verbs if getattr(maker, verb) is None]
        return f"no function was given for {missing[0]}" if missing else None

    return not_for


def needs_16_bits(maker: LayerMaker) -> str | None:
    """Return why a property of 16 bits does not concern a layer; None: it does."""
    return None if any(dtype.itemsize == 2 for dtype in maker.dtypes) else "16 bits are not taken"


def relative(expected: Tensor) -> float:
    """Return the bound on an error: a small share of the largest value."""
    return SMALL * float(expected.abs().max()) + 1e-12


@LORA.add("B = 0 is the base layer", LayerMaker.cases)
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker, fresh=True)
    expect_same(built.layer(built.x), built.base_output(built.x), "the base layer's output")


@LORA.add("shapes of the factors", LayerMaker.cases)
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker)
    found = tuple(built.A.shape), tuple(built.B.shape)
    expected = (case.r, case.in_features), (case.out_features, case.r)
    assert found == expected, f"A and B have the shapes {found}, not {expected}"


@LORA.add("output", LayerMaker.cases)
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker)
    expect_close(
        built.layer(built.x), built.expected(built.x), built.bound(built.x), "x W^T + b + s (x A^T) B^T"
    )


@LORA.add("scaling", lambda maker: maker.cases(bias=False))
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker, zero_base=True)
    found, expected = built.measured_scaling(), built.scaling
    assert abs(found - expected) <= SMALL * abs(expected), (
        f"the update is scaled by {found:.6g}, not {expected:.6g}"
    )


@LORA.add("update", lambda maker: maker.cases(bias=False))
def _(maker: LayerMaker, case: LayerCase) -> None:
    """Without W, the output is a multiple of (x A^T) B^T."""
    built = case.build(maker, zero_base=True)
    expected = built.measured_scaling() * built.update(built.x)
    expect_close(built.layer(built.x), expected, 2 * built.bound(built.x), "a multiple of (x A^T) B^T")


@LORA.add("bias", lambda maker: maker.cases(bias=True))
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker)
    expect_same(built.layer(torch.zeros_like(built.x)), built.bias.expand_as(built.dy), "for x = 0, the bias")


def _gradient_check(part: str):
    def check(maker: LayerMaker, case: LayerCase) -> None:
        built = case.build(maker)
        x, weight, scaling = built.x.requires_grad_(), built.weight, built.measured_scaling()
        wanted = dict(x=x, A=built.A, B=built.B)[part]
        assert wanted.requires_grad, f"{part} does not require a gradient"
        (found,) = torch.autograd.grad(built.layer(x), wanted, built.dy, allow_unused=True)
        assert found is not None, f"no gradient reaches {part}"
        gradients = lora_gradients(x.detach(), weight, built.A.detach(), built.B.detach(), scaling, built.dy)
        expected = getattr(gradients, part)
        expect_close(found, expected, relative(expected), f"the gradient of {part} by its equation")

    return check


for _part in ("x", "A", "B"):
    LORA.add(f"gradient of {_part}", LayerMaker.cases)(_gradient_check(_part))


@LORA.add("dropout in training only", lambda maker: maker.cases(lora_dropout=0.5))
def _(maker: LayerMaker, case: LayerCase) -> None:
    built, without = case.build(maker), replace(case, lora_dropout=0.0).build(maker)
    expect_close(built.layer(built.x), without.layer(built.x), built.bound(built.x), "without dropout it")


@LORA.add("dropout on the adapter's path", lambda maker: maker.cases(lora_dropout=0.5))
def _(maker: LayerMaker, case: LayerCase) -> None:
    """In training, too, B = 0 is the base layer."""
    built = case.build(maker, fresh=True)
    expect_same(built.layer.train()(built.x), built.base_output(built.x), "the base layer's output")


def dropout_factors(maker: LayerMaker, case: LayerCase) -> Tensor:
    """Return with which factor dropout multiplied each input: (tokens, in). A and B are the identity here, so
    a layer without a base returns s * dropout(x), and x is 1.
    """
    built = case.build(maker, zero_base=True)
    with torch.no_grad():
        built.A.copy_(torch.eye(case.r))
        built.B.copy_(torch.eye(case.r))
        scaling = built.measured_scaling()
        torch.default_generator.manual_seed(case.seed)
        return built.layer.train()(torch.ones_like(built.x)).double() / scaling


SQUARE = dict(in_features=8, out_features=8, r=8, bias=False, leading=(512,))


@LORA.add("dropout's gain", lambda maker: maker.cases(lora_dropout=0.25, **SQUARE))
def _(maker: LayerMaker, case: LayerCase) -> None:
    """What is kept is multiplied by 1 / (1 - p), so the mean stays."""
    factors = dropout_factors(maker, case)
    kept, gain = factors[factors != 0], 1 / (1 - case.lora_dropout)
    expect_close(kept, torch.full_like(kept, gain), 1e-3, "1 / (1 - p)")  # p may be rounded to a byte or two


@LORA.add("dropout's share", lambda maker: maker.cases(lora_dropout=0.25, **SQUARE))
def _(maker: LayerMaker, case: LayerCase) -> None:
    """A share p is dropped, each element on its own."""
    dropped = (dropout_factors(maker, case) == 0).double()  # (512, 8)
    p, deviation = case.lora_dropout, (0.25 * 0.75 / dropped.numel()) ** 0.5
    share = float(dropped.mean())
    assert abs(share - p) < 6 * deviation, f"{share:.1%} of the inputs are dropped, not {p:.0%}"  # 6 sigma
    spread = float(dropped.mean(dim=1).var())  # of 8 independent ones: p (1 - p) / 8
    assert spread < 2 * p * (1 - p) / 8, "inputs of a token are dropped together"  # 512 tokens know it to 6 %


@LORA.add(
    "gradients under dropout", lambda maker: maker.cases(lora_dropout=0.25, **SQUARE | dict(leading=(5,)))
)
def _(maker: LayerMaker, case: LayerCase) -> None:
    factor = dropout_factors(maker, case)
    built = case.build(maker)
    x, scaling = built.x.requires_grad_(), built.measured_scaling()
    parts = [part for part in (built.A, built.B) if part.requires_grad]
    torch.default_generator.manual_seed(case.seed)
    found = torch.autograd.grad(built.layer.train()(x), [x, *parts], built.dy, allow_unused=True)
    A, B = built.A.detach(), built.B.detach()
    expected = lora_gradients(x.detach(), built.weight, A, B, scaling, built.dy, factor)
    expected = [expected.x, *(expected.A if part is built.A else expected.B for part in parts)]
    for mine, other in zip(found, expected, strict=True):
        assert mine is not None, "a gradient is missing"
        expect_close(mine, other, 10 * relative(other), "the gradient under the same dropout")


@LORA.add(
    "distribution of A",
    lambda maker: (
        maker.cases(bias=False, leading=(1,), out_features=1, in_features=256, r=64)
        | maker.cases(bias=False, leading=(1,), out_features=1, in_features=32, r=128)
    ),
    needs("A_std"),
)
def _(maker: LayerMaker, case: LayerCase) -> None:
    """Its mean is 0 and its standard deviation as promised, whatever r is; every layer draws its own."""
    A, again = (case.build(maker, fresh=True).A.detach().double() for _ in range(2))
    expected, found = maker.A_std(case.in_features, case.r), float(A.std())
    # Of 4,096 normal numbers or more: a standard deviation is known to 1.1 %, a mean to 1.6 % of it (one
    # sigma). Six times as much never happens.
    assert abs(found / expected - 1) < 0.07, f"A has a standard deviation of {found:.4g}, not {expected:.4g}"
    assert abs(float(A.mean())) < 0.1 * expected, f"A has a mean of {float(A.mean()):.4g}, not 0"
    assert not torch.equal(A, again), "two layers have the same A"


@LORA.add("merge", LayerMaker.cases, needs("merge"))
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker)
    before = built.layer(built.x)
    maker.merge(built.layer)
    expect_close(built.layer(built.x), before, 2 * built.bound(built.x), "before merging it")


@LORA.add("merge twice", LayerMaker.cases, needs("merge"))
def _(maker: LayerMaker, case: LayerCase) -> None:
    """The second time nothing is added; it may raise."""
    built = case.build(maker)
    maker.merge(built.layer)
    once = built.layer(built.x)
    with suppress(Exception):
        maker.merge(built.layer)
    expect_same(built.layer(built.x), once, "merged once it")


@LORA.add("unmerge", LayerMaker.cases, needs("merge", "unmerge"))
def _(maker: LayerMaker, case: LayerCase) -> None:
    _check_unmerge(maker, case)


@LORA.add(
    "unmerge in 16 bits",
    lambda maker: maker.cases(dtype=torch.bfloat16),
    lambda maker: needs("merge", "unmerge")(maker) or needs_16_bits(maker),
)
def _(maker: LayerMaker, case: LayerCase) -> None:
    _check_unmerge(maker, case)


def _check_unmerge(maker: LayerMaker, case: LayerCase) -> None:
    """W comes back. With B = 0, the output for the identity matrix is W^T + b.

    Each way rounds the sum, and perhaps the update before, to W's dtype: u = eps / 2 of each, after float32's
    own sums of r + 4 roundings.
    """
    built = case.build(maker)
    merged = merged_reference(built.weight, built.A.detach(), built.B.detach(), built.scaling)
    maker.merge(built.layer)
    maker.unmerge(built.layer)
    with torch.no_grad():
        built.B.zero_()
        back = built.layer(torch.eye(case.in_features, dtype=case.dtype)).T.double()
    expected = built.base_output(torch.eye(case.in_features, dtype=case.dtype)).T.double()
    update = (built.scaling * (built.A.double().abs().T @ case.build(maker).B.double().abs().T).T).detach()
    u = torch.finfo(case.dtype).eps / 2 + (case.r + 4) * 2**-24
    sizes = merged.abs() + back.abs() + 2 * update + expected.abs()
    expect_close(back, expected, 2 * u * sizes, "the weight before merging")


@LORA.add("frozen base", LayerMaker.cases)
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker)
    trained = [p for p in built.layer.parameters() if p.requires_grad]
    assert not any(p.requires_grad for p in built.base.parameters()), (
        "the base layer's parameters are trainable"
    )
    if trained:
        (built.layer(built.x) * built.dy).sum().backward()
        torch.optim.SGD(trained, lr=1.0).step()
    expect_same(built.base.weight, built.weight, "before a step W")


@LORA.add("trained factors", LayerMaker.cases)
def _(maker: LayerMaker, case: LayerCase) -> None:
    """A step moves A and B."""
    built = case.build(maker)
    trained = [p for p in built.layer.parameters() if p.requires_grad]
    before = built.A.detach().clone(), built.B.detach().clone()
    assert trained, "nothing requires a gradient"
    (built.layer.train()(built.x) * built.dy).sum().backward()
    torch.optim.SGD(trained, lr=1.0).step()
    for name, now, was in zip("AB", maker.factors(built.layer), before, strict=True):
        assert not torch.equal(now, was), f"a step leaves {name} as it was"


@LORA.add("train and eval keep the weight", LayerMaker.cases)
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker)
    for mode in (True, False):
        built.layer.train(mode)
        expect_same(built.base.weight, built.weight, f"before train({mode}) W")


@LORA.add("switch", LayerMaker.cases, needs("switch"))
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker)
    adapted = built.layer(built.x)
    maker.switch(built.layer, False)
    expect_same(built.layer(built.x), built.base_output(built.x), "the base layer's output")
    maker.switch(built.layer, True)
    expect_same(built.layer(built.x), adapted, "before it was switched off and on it")


@LORA.add("leading dimensions", lambda maker: maker.cases(leading=(6,)))
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker)
    expected, bound = built.layer(built.x), built.bound(built.x)
    for leading in ((1, 6), (2, 3), (3, 1, 2)):
        y = built.layer(built.x.view(*leading, -1))
        assert y.shape[:-1] == leading, f"x has the shape {(*leading, case.in_features)}, y {tuple(y.shape)}"
        expect_close(y.reshape(6, -1), expected, 2 * bound, "as a matrix it")
    expect_close(built.layer(built.x[0]), expected[0], 2 * bound[0], "for one vector it")


@LORA.add(
    "16 bits",
    lambda maker: maker.cases(dtype=torch.bfloat16) | maker.cases(dtype=torch.float16),
    needs_16_bits,
)
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker)
    y = built.layer(built.x)
    assert y.dtype == case.dtype, f"x is {case.dtype}, and y {y.dtype}"
    expect_close(y, built.expected(built.x), built.bound(built.x), "x W^T + b + s (x A^T) B^T")


@LORA.add("not contiguous", LayerMaker.cases)
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker)
    strided = torch.stack([built.x, built.x + 1], dim=-1)[..., 0]
    expect_close(
        built.layer(strided), built.layer(built.x), 2 * built.bound(built.x), "for a contiguous x it"
    )


@LORA.add("input unchanged", LayerMaker.cases)
def _(maker: LayerMaker, case: LayerCase) -> None:
    built = case.build(maker)
    before = built.x.clone()
    built.layer.train()(built.x)
    expect_same(built.x, before, "before the call x")
