"""Starts with a part of W beside a W that never changes: the base, several adapters, merging, quantized weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import relative_error
from support.tiny import TOLERANCE, ids, tiny_model

from minilora import (
    LoraConfig,
    UserError,
    add_lora,
    load_adapter,
    load_model,
    memory_ledger,
    merge_lora,
    remove_lora,
    save_adapter,
    save_model,
    set_adapter,
    trainable_parameters,
    unmerge_lora,
)
from minilora.adapters.arithmetic import to_plain
from minilora.config import QuantConfig
from minilora.initialize import initialize
from minilora.lora import lora_layers
from minilora.starts import doubled

KINDS = ["pissa", "pissa_niter_4", "olora"]


def moved(model, name, seed=0):
    """Move every trained number of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model, name).values():
            for part in layer.parts(name).values():
                part += 0.05 * torch.randn(part.shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_base_never_changes_whatever_is_added_switched_merged_and_removed(kind):
    model = tiny_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    base = model(ids(2, 9))
    add_lora(model, LoraConfig(r=4, init_lora_weights=kind), "one")
    # B A - B0 A0 is 0 up to the rounding of 8 products.
    assert relative_error(model(ids(2, 9)), base) <= TOLERANCE
    moved(model, "one")
    one = model(ids(2, 9))
    add_lora(model, LoraConfig(r=3), "two")
    moved(model, "two")
    assert relative_error(one, base) > 0.01
    set_adapter(model, None)
    assert torch.equal(model(ids(2, 9)), base)
    set_adapter(model, "one")
    assert torch.equal(model(ids(2, 9)), one)
    merge_lora(model)
    assert relative_error(model(ids(2, 9)), one) <= TOLERANCE
    unmerge_lora(model)
    remove_lora(model, "one")
    remove_lora(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, p in after.items():  # but for the rounding of a merge that was undone
        assert relative_error(p, before[name]) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_and_b_are_trained_and_their_gradients_are_those_beside_the_changed_weight(kind):
    model = tiny_model()
    torch.manual_seed(0)
    add_lora(model, LoraConfig(r=4, init_lora_weights=kind, target_modules=["q_proj"]))
    moved(model, "default")
    layer = next(iter(lora_layers(model).values()))
    A, B = (p.detach().double().requires_grad_() for p in (layer.lora_A["default"], layer.lora_B["default"]))
    W, s = layer.base_layer.weight.double(), layer.scalings["default"]
    A0, B0 = layer.frozen_A["default"].double(), -layer.frozen_B["default"].double()
    x = torch.randn(5, W.shape[1], dtype=torch.float64)
    y = x @ (W - s * B0 @ A0).T + s * (x @ A.T) @ B.T
    y.square().sum().backward()
    out = layer(x.float())
    out.square().sum().backward()
    assert relative_error(out.detach(), y.detach()) <= TOLERANCE
    for found, expected in ((layer.lora_A["default"], A), (layer.lora_B["default"], B)):
        assert relative_error(found.grad, expected.grad) <= TOLERANCE
    assert not any(p.requires_grad for p in (layer.frozen_A["default"], layer.frozen_B["default"]))


def test_a_file_holds_exactly_the_plain_adapter_of_the_arithmetic_and_is_split_again_to_the_bit(tmp_path):
    model = tiny_model()
    config = LoraConfig(r=4, lora_alpha=5.3, init_lora_weights="pissa", use_rslora=True)
    add_lora(model, config)
    starts = {n: (x.lora_A["default"].detach().clone(), x.lora_B["default"].detach().clone())
              for n, x in lora_layers(model).items()}  # fmt: skip
    moved(model, "default")
    save_adapter(model, tmp_path)
    plain, again = tiny_model(), tiny_model()
    load_adapter(plain, tmp_path)
    load_adapter(again, tmp_path, started=config)
    for name, layer in lora_layers(model).items():
        A, B = layer.parts("default").values()
        expected_A, expected_B, r, alpha = to_plain(A, B, *starts[name], 5.3, use_rslora=True)
        other = plain.get_submodule(name)
        assert torch.equal(other.lora_A["default"], expected_A) and torch.equal(
            other.lora_B["default"], expected_B
        )
        assert (other.configs["default"].r, other.configs["default"].lora_alpha) == (r, alpha)
        twin = again.get_submodule(name)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), layer.parameters(), strict=True))
        assert twin.scalings == layer.scalings and twin.configs == layer.configs


@given(
    r=st.integers(1, 64), alpha=st.floats(0.1, 100), ranks=st.dictionaries(st.sampled_from("qkv"), st.integers(1, 9)),
    alphas=st.dictionaries(st.sampled_from("qkv"), st.floats(0.1, 100)), use_rslora=st.booleans(),
)  # fmt: skip
@settings(max_examples=50)
def test_twice_the_ranks_have_the_same_scaling(r, alpha, ranks, alphas, use_rslora):
    one = LoraConfig(r, alpha, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=use_rslora)
    two = doubled(one)
    for layer in "qkvo":
        scalings = [
            c.scaling_of(c.rank_pattern.get(layer, c.r), c.alpha_pattern.get(layer, c.lora_alpha))
            for c in (one, two)
        ]
        assert scalings[1] == pytest.approx(scalings[0], rel=4 * 2**-53)  # two roots, a product, a quotient
        assert two.rank_pattern.get(layer, two.r) == 2 * one.rank_pattern.get(layer, one.r)


@torch.no_grad()
def test_a_quantized_base_keeps_its_weights_and_the_start_is_that_of_the_dequantized_ones(tmp_path):
    save_model(tiny_model(), tmp_path / "base")
    model = load_model(tmp_path / "base", QuantConfig())
    packed = {
        n: m.weight.packed.clone()
        for n, m in model.named_modules()
        if hasattr(m, "in_features") and n != "lm_head"
    }
    base = model(ids(2, 9))
    add_lora(model, LoraConfig(r=4, init_lora_weights="olora"))
    assert relative_error(model(ids(2, 9)), base) <= TOLERANCE
    for name, layer in lora_layers(model).items():
        assert torch.equal(layer.base_layer.weight.packed, packed[name])
        W = layer.base_layer.weight.dequantize(torch.float32)
        A, B, _ = initialize("olora", W, 4, layer.scalings["default"])
        assert torch.equal(layer.lora_A["default"], A) and torch.equal(layer.lora_B["default"], B)


@pytest.mark.parametrize(
    "config, message",
    [
        (LoraConfig(init_lora_weights="pissa", use_dora=True), "'pissa' and use_dora exclude each other"),
        (
            LoraConfig(init_lora_weights="pissa", target_modules=["embed_tokens"]),
            "not supported on the embedding",
        ),
        (
            LoraConfig(use_vera=True, target_modules=["embed_tokens"]),
            "use_vera is not supported on the embedding",
        ),
        (LoraConfig(use_vera=True, bias="all"), "use_vera and bias exclude each other"),
        (
            LoraConfig(use_vera=True, init_lora_weights="olora"),
            "use_vera and init_lora_weights exclude each other",
        ),
        (
            LoraConfig(init_lora_weights="loftq"),
            "'loftq' makes up for quantization, but .*q_proj is not quantized",
        ),
        (LoraConfig(r=7, init_lora_weights="orthogonal"), "'orthogonal' needs an even lora_rank, not 7"),
        (LoraConfig(r=999, init_lora_weights="pissa"), "lora_rank 999 exceeds a side"),
    ],
)
def test_what_cannot_start_is_refused_and_the_model_is_as_it_was(config, message):
    model = tiny_model()
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=message):
        add_lora(model, config)
    assert [name for name, _ in model.named_parameters()] == before


def test_an_unconverted_adapter_on_a_quantized_base_is_refused_with_the_reason(tmp_path):
    import json

    save_model(tiny_model(), tmp_path / "base")
    model = tiny_model()
    add_lora(model, LoraConfig(r=4))
    save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(init_lora_weights="pissa")))
    quantized = load_model(tmp_path / "base", QuantConfig())
    with pytest.raises(
        UserError, match="took a part out of the unquantized weights, and .* is in 4 or 8 bits: load"
    ):
        load_adapter(quantized, tmp_path / "adapter")
    assert not lora_layers(quantized)


@pytest.mark.parametrize("kind", [dict(init_lora_weights="pissa"), dict(use_vera=True)])
def test_the_ledger_counts_what_is_frozen_beside_a_and_b_once_and_does_not_train_it(kind):
    model, config = tiny_model(), LoraConfig(r=6, **kind)
    ledger = memory_ledger(
        model.config, config, None, batch_size=2, length=9, dtype=torch.float32, recompute="off", device="cpu"
    )
    before = sum(p.numel() for p in model.parameters())
    add_lora(model, config)
    moment = next(iter(ledger.moments.values()))
    assert moment["adapter"] == 4 * (sum(p.numel() for p in model.parameters()) - before)
    assert moment["gradients"] == 4 * sum(p.numel() for p in trainable_parameters(model).values())
