"""LoRA inside its products equals LoRA beside them."""

import copy

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.families import relative_error
from support.tiny import ALL_SEVEN, gradients, small_model
from torch import nn

from minilora.backend import choice, fused_lora
from minilora.config import LoraConfig
from minilora.linear import Linear4bit, apply_each
from minilora.lora import LoraLinear, remove_lora, set_adapter
from minilora.quantization import quantize_4bit
from minilora.recompute import POLICIES


@pytest.fixture
def fusing(monkeypatch):
    """A function that says whether forms are fused from now on."""
    return lambda on: monkeypatch.setattr(choice, "_fused", on)


def layers_of(
    outs, width, adapted, quantized, bias, dropout, dtype=torch.float32, r=4, lora_fa=False, seed=0
) -> list[nn.Module]:
    """Frozen layers on one input; those in `adapted` with a random adapter."""
    torch.manual_seed(seed)
    layers = []
    for i, out in enumerate(outs):
        layer = nn.Linear(width, out, bias=bias).to(dtype).requires_grad_(False)
        if quantized:
            layer = Linear4bit(quantize_4bit(layer.weight.data), layer.bias)
        if i in adapted:
            layer = LoraLinear(layer)
            layer.add_adapter("a", LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, lora_fa=lora_fa))
            layer.active = "a"
            nn.init.normal_(layer.lora_B["a"], std=0.3)
            layer.lora_A["a"].requires_grad_(not lora_fa)
        layers.append(layer.train())
    return layers


def outputs_and_gradients(layers, x, dys, values=True):
    torch.manual_seed(5)
    ys = apply_each(x, *layers, values=values)
    wanted = [x, *(p for layer in layers for p in layer.parameters() if p.requires_grad)]
    wanted = [t for t in wanted if t.requires_grad]
    pairs = [(y, dy) for y, dy in zip(ys, dys, strict=True) if y.requires_grad]
    return ys, torch.autograd.grad([y for y, _ in pairs], wanted, [dy for _, dy in pairs])


@settings(max_examples=60)
@given(
    outs=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    width=st.integers(1, 50),
    adapted=st.sets(st.integers(0, 2)),
    quantized=st.booleans(),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.4]),
    lora_fa=st.booleans(),
    needs_dx=st.booleans(),
    values=st.booleans(),
    shape=st.sampled_from([(2,), (3, 5), (2, 1, 3)]),
)
def test_it_equals_the_plain_path_whatever_is_adapted(
    outs, width, adapted, quantized, bias, dropout, lora_fa, needs_dx, values, shape
):
    adapted = {i for i in adapted if i < len(outs)}
    assume(adapted or needs_dx)  # else nothing needs a gradient
    layers = layers_of(outs, width, adapted, quantized, bias, dropout, lora_fa=lora_fa)
    x = torch.randn(*shape, width).requires_grad_(needs_dx)
    dys = [torch.randn(*shape, out) for out in outs]
    ys, mine = outputs_and_gradients(layers, x, dys, values)
    choice.set_fused(False)
    try:
        plain_ys, plain = outputs_and_gradients(layers, x, dys, values)
    finally:
        choice.set_fused(True)
    assert any("FusedLora" in str(y.grad_fn) for y in ys) and not any(
        "Fused" in str(y.grad_fn) for y in plain_ys
    )
    # Sums of at most 50 + 4 products in float32 in another order, relative to the largest: 54 * 2^-24 = 3e-6.
    if values:
        assert all(
            relative_error(y.detach(), other.detach()) <= 5e-6 for y, other in zip(ys, plain_ys, strict=True)
        )
    for one, other in zip(mine, plain, strict=True):
        assert relative_error(one, other) <= 2e-5  # two or three such sums in a chain


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4-bit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_it_is_no_further_from_float64_than_the_plain_path(dtype, quantized, dropout, fusing):
    layers = layers_of((64, 32, 32), 96, {0, 2}, quantized, True, dropout, dtype, r=8)
    x, dys = (
        torch.randn(40, 96).to(dtype).requires_grad_(),
        [torch.randn(40, n).to(dtype) for n in (64, 32, 32)],
    )
    errors = []
    wide = copy.deepcopy(layers)
    for layer in wide:
        base = layer.base_layer if isinstance(layer, LoraLinear) else layer
        if quantized:  # W as the products see it
            seen = nn.Linear(96, len(base.bias))
            seen.weight.data, seen.bias.data = base.weight.dequantize(dtype).double(), base.bias.double()
            if isinstance(layer, LoraLinear):
                layer.base_layer = seen.requires_grad_(False)
            else:
                wide[wide.index(layer)] = seen.requires_grad_(False)
        layer.double()
    fusing(False)
    exact_x = x.detach().double().requires_grad_()
    exact_ys, exact = outputs_and_gradients(wide, exact_x, [dy.double() for dy in dys])
    for on in (True, False):
        fusing(on)
        ys, found = outputs_and_gradients(layers, x, dys)
        pairs = [*zip(ys, exact_ys, strict=True), *zip(found, exact, strict=True)]
        errors.append([relative_error(a.detach().double(), b.detach()) for a, b in pairs])
    unit = torch.finfo(dtype).eps / 2
    # A, B, n, g and each result are rounded once; the plain path rounds the sums of dx and of y once more.
    assert all(one <= max(other, 6 * unit) for one, other in zip(*errors, strict=True))
    assert max(errors[0]) <= 10 * unit


@pytest.mark.parametrize("policy", POLICIES[:3])
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "4-bit"])
def test_a_model_has_the_loss_and_the_gradients_of_the_plain_path(policy, quantized, fusing):
    model = small_model(quantized=quantized)
    results = []
    for on in (True, False):
        fusing(on)
        results.append(gradients(model, policy))
    (loss, mine), (plain_loss, plain) = results
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert mine.keys() == plain.keys()
    assert torch.equal(mine.pop("random state"), plain.pop("random state"))  # as many draws
    for name, gradient in mine.items():
        assert plain[name].any() and relative_error(gradient, plain[name]) <= 1e-5, name


def test_a_new_adapter_changes_no_bit_of_the_base(fusing):
    fusing(True)
    for dtype in (torch.float32, torch.bfloat16):
        layers = layers_of((64, 32), 96, {0, 1}, True, False, 0.0, dtype)
        for layer in layers:
            nn.init.zeros_(layer.lora_B["a"])
        x = torch.randn(5, 96).to(dtype)
        for layer, y in zip(layers, apply_each(x, *layers), strict=True):
            assert torch.equal(y, layer.base_layer(x))


def kept_by(layers, x) -> list[torch.Tensor]:
    """What the layers keep for backward, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        apply_each(x, *layers)
    return list(kept.values())


@pytest.mark.parametrize("lora_fa", [False, True])
def test_neighbours_keep_one_x_and_no_mask_under_dropout(lora_fa):
    x = torch.randn(50, 48, requires_grad=True)
    layers = layers_of((20, 20, 20), 48, {0, 1, 2}, True, False, 0.5, lora_fa=lora_fa)
    of_its_size = [t for t in kept_by(layers, x) if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in of_its_size] == [x.data_ptr()] * (not lora_fa)


def test_outputs_that_are_not_used_get_no_product_and_their_adapters_zeros(fusing):
    fusing(True)
    layers = layers_of((8, 9, 7), 6, {0, 2}, False, False, 0.0)
    x = torch.randn(4, 6, requires_grad=True)
    q, _, _ = apply_each(x, *layers)
    q.sum().backward()
    assert layers[0].lora_A["a"].grad.any()
    assert not layers[2].lora_B["a"].grad.any() and not layers[2].lora_A["a"].grad.any()
    expected = layers[0].base_layer.weight.sum(0) + 2.0 * layers[0].lora_B["a"].sum(0) @ layers[0].lora_A["a"]
    torch.testing.assert_close(x.grad, expected.detach().expand(4, 6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "why", ["a hook", "DoRA", "autocast", "other scalings", "a trained base", "a layer of one's own"]
)
def test_the_plain_path_runs_where_the_fused_one_cannot(why, monkeypatch):
    layers = layers_of((8, 9), 6, {0, 1}, False, False, 0.0)
    x = torch.randn(4, 6)
    monkeypatch.setattr(fused_lora._FusedLora, "apply", lambda *_: pytest.fail("the fused path ran"))
    seen = []
    if why == "a hook":
        layers[1].register_forward_hook(lambda *_: seen.append(1))
        expected = layers[1](x)
        seen.clear()
    elif why == "DoRA":
        layers = layers_of((8, 9), 6, {0, 1}, False, False, 0.0)
        for layer in layers:
            layer.configs.pop("a"), layer.lora_A.pop("a"), layer.lora_B.pop("a")
            layer.add_adapter("a", LoraConfig(r=4, use_dora=True))
    elif why == "other scalings":
        layers[0].scalings["a"] /= 2
    elif why == "a trained base":
        layers[0] = nn.Linear(6, 8)
    elif why == "a layer of one's own":
        layers[0] = nn.Sequential(nn.Linear(6, 8)).requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        outputs = apply_each(x, *layers)
    assert [y.shape[-1] for y in outputs] == [8, 9]
    if why == "a hook":
        assert seen == [1] and torch.equal(outputs[1], expected)


def test_a_switched_off_adapter_leaves_the_base_alone():
    model = small_model(layers=2, quantized=True, dropout=0.0)
    batch = torch.arange(12).view(2, 6)
    set_adapter(model, None)
    switched_off = model(batch)
    remove_lora(model)
    assert torch.equal(switched_off, model(batch))


def test_every_projection_of_a_layer_is_fused(monkeypatch):
    groups, apply = [], fused_lora._FusedLora.apply

    def counted(x, call, *tensors):
        groups.append((len(call.parts), len(call.adapted)))
        return apply(x, call, *tensors)

    monkeypatch.setattr(fused_lora._FusedLora, "apply", counted)
    model = small_model(layers=1, targets=list(ALL_SEVEN))
    model(torch.arange(12).view(2, 6))
    assert groups == [(3, 3), (1, 1), (2, 2), (1, 1)]
    groups.clear()
    small_model(layers=1, targets=["q_proj", "v_proj"])(torch.arange(12).view(2, 6))
    assert groups == [(3, 2), (2, 0)]
