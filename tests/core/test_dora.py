"""DoRA against PEFT and against its equation, and LoRA-FA."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import (
    in_eval_mode,
    relative_error,
    same_model_here,
    transformers_in_4_bits,
    transformers_model,
)
from support.same_dropout import draw_as_we_do, mask_of
from support.tiny import AFTER_20_STEPS, ALL_SEVEN, TOLERANCE, gradients, ids, tiny_model
from torch import nn

from minilora import (
    LoraConfig,
    QuantConfig,
    UserError,
    add_lora,
    generate,
    load_adapter,
    load_model,
    merge_lora,
    remove_lora,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge_lora,
)
from minilora.backend import choice
from minilora.dora import Magnitude, RowNorms, row_factors
from minilora.formats.weights import StoredTensors
from minilora.linear import Linear4bit
from minilora.lora import LoraLinear, lora_layers
from minilora.loss import causal_lm_loss
from minilora.optim import make_optimizer
from minilora.quantization import quantize_4bit
from minilora.recompute import POLICIES
from minilora.testing import lora_shapes, peak_memory

DORA = dict(r=4, lora_alpha=8, target_modules=ALL_SEVEN, use_dora=True)


def randomize(model: nn.Module) -> None:
    """Give factors and magnitudes random values. Rows keep at least half of their length."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for name in layer.configs:
                for kind, parameter in layer.parts(name).items():
                    noise = torch.randn(parameter.shape, generator=generator)
                    if kind == "lora_magnitude_vector":
                        parameter.mul_(1 + 0.1 * noise.clamp(-5, 5))
                    else:
                        parameter.copy_(0.1 * noise)


def adapter_pairs(ours, theirs):
    """Yield (name, our tensor, PEFT's)."""
    for name, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        for kind, mine in layer.parts("default").items():
            yield f"{name}.{kind}", mine, getattr(twin, kind)["default"].weight


def adapt_both(ours, theirs, **lora):
    """Add the same random adapter to our model and to transformers'."""
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(task_type="CAUSAL_LM", **lora | dict(target_modules=list(ALL_SEVEN)))
    )
    draw_as_we_do(theirs, lora.get("lora_dropout", 0))
    add_lora(ours, LoraConfig(**lora))
    randomize(ours)
    with torch.no_grad():
        for _, mine, other in adapter_pairs(ours, theirs):
            other.copy_(mine)
    return ours, theirs


@pytest.fixture(
    scope="module", params=[torch.float32, torch.bfloat16], ids=["float32 files", "bfloat16 files"]
)
def directory(request, tmp_path_factory, model_dir):
    """Save a model whose widths are multiples of 64 (see test_linear). The tests compute in float32."""
    path = tmp_path_factory.mktemp("model")
    theirs = transformers_model("llama-gqa", hidden_size=64, intermediate_size=128, vocab_size=320)
    theirs.to(request.param).save_pretrained(path)
    shutil.copy(model_dir / "tokenizer.model", path)
    return path


def both_in_4_bits(directory, **lora):
    return adapt_both(
        load_model(directory, QuantConfig(), torch.float32), transformers_in_4_bits(directory), **lora
    )


def both_plain(family, **lora):
    theirs = transformers_model(family)
    return adapt_both(same_model_here(theirs), theirs, **lora)


# ---- against PEFT --------------------------------------------------------------------------------------------------


def compare_forward_and_gradients(ours, theirs, training):
    ours.train(training), theirs.train(training)
    batch = ids(2, 20, vocab=97)
    torch.manual_seed(5)
    loss = causal_lm_loss(ours, batch, batch) / (2 * 19)
    torch.manual_seed(5)
    expected = theirs(input_ids=batch, labels=batch).loss
    loss.backward(), expected.backward()
    assert relative_error(loss, expected) <= TOLERANCE
    pairs = list(adapter_pairs(ours, theirs))
    assert len(pairs) == len(trainable_parameters(ours)) == 3 * len(lora_layers(ours)) > 0
    for name, mine, other in pairs:
        # A magnitude's gradient is a sum over all tokens, of dy times the output: it may cancel.
        bound = 2 * TOLERANCE if "magnitude" in name else TOLERANCE
        assert other.grad.any() and relative_error(mine.grad, other.grad) <= bound, name
    ours.eval(), in_eval_mode(theirs)
    assert relative_error(ours(batch), theirs(input_ids=batch).logits) <= TOLERANCE


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window", "qwen2-bias-tied", "qwen3-qk-norm"])
def test_forward_and_every_gradient_equal_pefts(family, dropout):
    compare_forward_and_gradients(
        *both_plain(family, **DORA, lora_dropout=dropout, use_rslora=bool(dropout)), training=True
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_and_every_gradient_equal_pefts_on_a_base_in_4_bits(directory, dropout):
    compare_forward_and_gradients(*both_in_4_bits(directory, **DORA, lora_dropout=dropout), training=True)


@pytest.mark.parametrize("kind", ["plain", "4-bit"])
def test_20_adamw_steps_equal_pefts(kind, directory):
    ours, theirs = both_plain("llama-gqa", **DORA) if kind == "plain" else both_in_4_bits(directory, **DORA)
    start = {name: mine.detach().clone() for name, mine, _ in adapter_pairs(ours, theirs)}
    optimizer = make_optimizer("adamw_torch", trainable_parameters(ours), lr=1e-3, weight_decay=0.01)
    reference = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.01
    )
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        batch = torch.randint(0, 97, (2, 16), generator=generator)
        (causal_lm_loss(ours, batch, batch) / 30).backward()
        theirs(input_ids=batch, labels=batch).loss.backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    for name, mine, other in adapter_pairs(ours, theirs):
        assert relative_error(mine, other) <= AFTER_20_STEPS, name
        assert relative_error(mine, start[name]) > 20 * AFTER_20_STEPS, name  # it was trained


@torch.no_grad()
def test_merged_weights_equal_pefts_and_their_rows_have_the_magnitudes_for_lengths():
    ours, theirs = both_plain("llama-gqa", **DORA)
    unmerged = ours(ids(2, 20))
    before = {name: layer.base_layer.weight.clone() for name, layer in lora_layers(ours).items()}
    merge_lora(ours)
    assert relative_error(ours(ids(2, 20)), unmerged) <= TOLERANCE
    plain = theirs.merge_and_unload()
    for name, layer in lora_layers(ours).items():
        assert relative_error(layer.base_layer.weight, plain.get_submodule(name).weight) <= TOLERANCE
        lengths = layer.base_layer.weight.norm(dim=1)
        magnitudes = layer.lora_magnitude_vector["default"].data
        torch.testing.assert_close(lengths, magnitudes, rtol=1e-6, atol=0)  # one rounding to float32
    unmerge_lora(ours)
    for name, layer in lora_layers(ours).items():
        # One multiplication and one division in float32.
        assert relative_error(layer.base_layer.weight, before[name]) <= 1e-6
    assert relative_error(ours(ids(2, 20)), unmerged) <= TOLERANCE


@torch.no_grad()
def test_a_base_in_4_bits_is_merged_as_peft_merges_it(directory, tmp_path, call):
    ours, theirs = both_in_4_bits(directory, **DORA)
    with pytest.raises(UserError, match="is quantized"):
        merge_lora(ours)
    save_adapter(ours, tmp_path / "adapter", base_model_name_or_path=str(directory))
    for into in ("dequantized", "original"):
        code, _, err = call(
            "merge", "--adapter", tmp_path / "adapter", "--output", tmp_path / into, "--into", into
        )
        assert code == 0, err
    merged = StoredTensors(tmp_path / "dequantized")
    for name in lora_layers(ours):
        layer = theirs.base_model.model.get_submodule(name)
        base = layer.base_layer.weight
        dequantized = pytest.importorskip("bitsandbytes").functional.dequantize_4bit(
            base.data, base.quant_state
        )
        # PEFT would then quantize this sum again.
        expected = layer.lora_variant["default"].merge_safe(layer, "default", dequantized)
        weight = merged.read(f"{name}.weight", None, "cpu")
        rounding = torch.finfo(weight.dtype).eps / 2  # the sum is rounded once, to the dtype of the files
        assert relative_error(weight, expected) <= max(rounding, TOLERANCE)
    if weight.dtype != torch.float32:
        return  # rounded weights are another model
    assert relative_error(load_model(tmp_path / "dequantized")(ids(2, 20)), ours(ids(2, 20))) <= TOLERANCE
    plain = load_model(directory)
    load_adapter(plain, tmp_path / "adapter")
    assert relative_error(load_model(tmp_path / "original")(ids(2, 20)), plain(ids(2, 20))) <= TOLERANCE


@torch.no_grad()
def test_files_go_both_ways_and_have_pefts_names_shapes_dtypes_and_keys(tmp_path):
    peft, safetensors = pytest.importorskip("peft"), pytest.importorskip("safetensors")
    ours, theirs = both_plain("llama-gqa", **DORA)
    save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    described = {}
    for side in ("ours", "theirs"):
        with safetensors.safe_open(tmp_path / side / "adapter_model.safetensors", "pt") as file:
            entries = {k: (file.get_slice(k).get_shape(), file.get_slice(k).get_dtype()) for k in file.keys()}
            described[side] = entries, file.metadata()
    assert described["ours"] == described["theirs"]
    mine, other = (
        json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")
    )
    assert sorted(mine.pop("target_modules")) == sorted(other.pop("target_modules"))
    assert mine == other
    expected = ours(ids(2, 15))
    here = same_model_here(transformers_model("llama-gqa"))
    load_adapter(here, tmp_path / "theirs", name="again")
    assert torch.equal(here(ids(2, 15)), expected)
    there = peft.PeftModel.from_pretrained(transformers_model("llama-gqa"), tmp_path / "ours").eval()
    assert relative_error(there(input_ids=ids(2, 15)).logits, expected) <= TOLERANCE


# ---- against the equation ------------------------------------------------------------------------------------------


def decomposed_layer(shape, dropout=0.0, bias=True, quantized=False, seed=0) -> LoraLinear:
    """Return a DoRA layer whose every parameter is random."""
    in_features, out_features, r = shape
    torch.manual_seed(seed)
    base = nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)
    if quantized:
        base = Linear4bit(quantize_4bit(base.weight.data), base.bias)
    layer = LoraLinear(base)
    layer.add_adapter("a", LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout, use_dora=True))
    layer.active = "a"
    with torch.no_grad():
        layer.lora_B["a"].normal_(0, 0.3 / r**0.5)
        layer.lora_magnitude_vector["a"].mul_(1 + 0.2 * torch.rand(out_features))
    return layer


def equation(layer: LoraLinear, x, seen, A, B, m):
    """y in float64 by the letter of the paper and of PEFT; autograd finds the gradients. seen: x after
    dropout.
    """
    base = layer.base_layer
    W = base.weight.dequantize(torch.float32) if isinstance(base, Linear4bit) else base.weight
    V = W.double() + layer.configs[layer.active].scaling * B @ A
    y = (m / V.norm(dim=1).detach()) * (seen @ V.T) + (x - seen) @ W.double().T
    return y if base.bias is None else y + base.bias.double()


@given(
    shape=st.tuples(st.integers(16, 80), st.integers(1, 80), st.integers(1, 8)),
    dropout=st.sampled_from([0.0, 0.4]),
    bias=st.booleans(),
    quantized=st.booleans(),
    seed=st.integers(0, 3),
)
@settings(max_examples=25, deadline=None)
def test_values_and_gradients_are_those_of_the_equation(shape, dropout, bias, quantized, seed):
    layer = decomposed_layer(shape, dropout, bias, quantized, seed).train()
    x, dy = torch.randn(3, 7, shape[0], requires_grad=True), torch.randn(3, 7, shape[1])
    tensors = [x, *layer.parts("a").values()]
    torch.manual_seed(9)
    y = layer(x)
    found = torch.autograd.grad(y, tensors, dy)
    torch.manual_seed(9)
    mask = mask_of(x, dropout)  # the same draws
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = equation(layer, wide[0], wide[0] * mask, *wide[1:])
    # Sums of at most 80 products in float32, relative to the largest: 80 * 2^-24 = 5e-6, with the two or
    # three in a chain.
    assert relative_error(y.detach(), expected.detach()) <= 2e-5
    for mine, other in zip(found, torch.autograd.grad(expected, wide, dy.double()), strict=True):
        assert relative_error(mine, other) <= 1e-4  # besides, sums over 21 tokens that may cancel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_they_are_so_to_a_few_roundings(dtype):
    layer = decomposed_layer((24, 20, 4), bias=False)
    x, dy = torch.randn(9, 24).to(dtype).requires_grad_(), torch.randn(9, 20).to(dtype)
    layer.base_layer.to(dtype)
    tensors = [x, *layer.parts("a").values()]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y, expected = layer(x), equation(layer, wide[0], wide[0], *wide[1:])
    assert y.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    # A, B, x A^T, W A^T, both products and the sum, y, dy B and its product are rounded; relative to the
    # largest entry.
    assert relative_error(y.double(), expected) <= 10 * unit
    found = torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, wide, dy.double())
    assert all(relative_error(mine.double(), other) <= 10 * unit for mine, other in zip(*found, strict=True))


@given(
    lora_shapes(), st.floats(0.05, 8), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**20)
)
@settings(max_examples=50, deadline=None)
def test_the_norms_of_the_sum_are_those_of_the_sum_that_is_formed(shape, scaling, dtype, seed):
    in_features, out_features, r = shape
    generator = torch.Generator().manual_seed(seed)
    W, A, B = (
        torch.randn(*s, generator=generator)
        for s in ((out_features, in_features), (r, in_features), (out_features, r))
    )
    found = RowNorms().of_sum(W, A, B, scaling, dtype, keep=False).double()
    exact = (W.double() + scaling * B.double() @ A.double()).norm(dim=1)
    # Rounding, term by term: at most a unit for each number that is summed, of the sum of all magnitudes.
    largest = (W.double().abs() + scaling * B.double().abs() @ A.double().abs()).square().sum(1)
    unit = (in_features + 2 * r + 8) * 2**-24 + (
        0 if dtype == torch.float32 else 4 * 2**-9
    )  # A, W, their product: rounded
    assert ((found.square() - exact.square()).abs() <= unit * largest).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_new_adapter_leaves_the_model_as_it_is_to_the_bit(dtype, quantized):
    model = tiny_model().to(dtype)
    if quantized:
        for parent in model.model.layers:
            parent.self_attn.q_proj = Linear4bit(quantize_4bit(parent.self_attn.q_proj.weight))
    before = model(ids(2, 9))
    add_lora(model, LoraConfig(target_modules="all-linear", use_dora=True))
    assert torch.equal(model.train()(ids(2, 9)), before)
    assert torch.equal(model.eval()(ids(2, 9)), before)


def test_magnitudes_are_trained_in_float32_and_beside_a_model_in_16_bits():
    model = tiny_model().bfloat16()
    add_lora(model, LoraConfig(**DORA))
    randomize(model)
    trainable = trainable_parameters(model)
    magnitudes = [name for name in trainable if name.endswith(".lora_magnitude_vector.default")]
    assert len(trainable) == 3 * 14 and len(magnitudes) == 14
    causal_lm_loss(model, ids(2, 9), ids(2, 9)).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in trainable.values())


def test_a_change_of_magnitude_too_small_for_16_bits_is_not_lost():
    layer = decomposed_layer((64, 512, 4), bias=False)
    layer.base_layer.bfloat16()
    x = torch.randn(64, 64, dtype=torch.bfloat16)
    before = layer(x).float()
    with torch.no_grad():
        layer.lora_magnitude_vector["a"] *= 1 + 2**-11  # an eighth of bfloat16's step above 1
    grown = layer(x).float().abs().sum() / before.abs().sum() - 1
    # 32,768 values, each of them rounded: their sum is exact to 2^-9 / 180 of itself.
    assert grown.item() == pytest.approx(2**-11, rel=0.2)


def test_a_row_of_zeros_stays_zero_and_is_not_nan():
    layer = decomposed_layer((16, 6, 2), bias=False)
    with torch.no_grad():
        for dead in (layer.base_layer.weight, layer.lora_B["a"], layer.lora_magnitude_vector["a"]):
            dead[2] = 0
    weight = layer.base_layer.weight.clone()
    y = layer(torch.randn(5, 16))
    y.square().sum().backward()
    assert not y[:, 2].any() and all(
        p.grad.isfinite().all() and p.grad.any() for p in layer.parts("a").values()
    )
    assert not layer.lora_magnitude_vector["a"].grad[2]
    layer.merge()
    assert layer.base_layer.weight.isfinite().all()
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, weight, rtol=1e-5, atol=1e-7)


def test_a_merged_layer_may_move_to_another_device_before_it_is_unmerged():
    layer = decomposed_layer((16, 6, 2), bias=False)
    layer.merge()
    layer.to("meta")  # a device that every machine has; an operation with a CPU tensor fails there too
    layer.unmerge()
    assert layer.merged is None and layer.base_layer.weight.is_meta


def test_norms_that_rounding_would_make_imaginary_are_small_and_real():
    W = torch.randn(5, 8)
    norms = RowNorms().of_sum(W, W, -torch.eye(5), 1.0, torch.float32, keep=False)  # V = 0
    assert norms.isfinite().all() and (norms > 0).all() and (norms <= 1e-2 * W.norm(dim=1)).all()


def test_where_an_adapter_takes_all_of_a_row_away_its_factor_stays_below_the_root_of_2_to_the_23():
    # ||V||^2 is a difference of numbers as large as ||W||^2, known to 2^-23 of it: no smaller norm means
    # anything, and m / ||V|| would blow rounding up without a floor.
    W = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    norms = RowNorms().of_sum(W, W, -torch.eye(200), 1.0, torch.float32, keep=False)  # V = 0
    assert (norms >= 0.99 * 2**-11.5 * W.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_magnitudes_is_summed_in_float32_in_16_bits_too(dtype):
    generator = torch.Generator().manual_seed(0)
    y, dy = (torch.randn(512, 6, generator=generator).to(dtype) for _ in range(2))
    magnitude = torch.rand(6, generator=generator).add(0.5).requires_grad_()
    norms = torch.rand(6, generator=generator).add(0.5)
    output = Magnitude.apply(y.clone().requires_grad_().clone(), magnitude, norms)
    output.backward(dy)
    products = dy.double() * output.detach().double()
    expected = products.sum(0) / magnitude.detach().double()
    # Products of 16-bit numbers are exact in float32, and 512 of them add up to within 512 units of 2^-24 of
    # their magnitudes; rounded to 16 bits, each would be off by 2^-9 or 2^-12.
    bound = 512 * 2**-24 * products.abs().sum(0) / magnitude.detach().double()
    assert ((magnitude.grad.double() - expected).abs() <= bound).all()


@given(lora_shapes(32, 8), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_merge_then_unmerge_restores_the_weight_within_two_roundings(shape, dtype, seed):
    layer = decomposed_layer(shape, seed=seed)
    layer.base_layer.to(dtype)
    weight = layer.base_layer.weight.clone()
    V = weight.float() + layer.delta_weight("a")
    factors = row_factors(V, layer.lora_magnitude_vector["a"])
    layer.merge()
    merged = layer.base_layer.weight.clone()
    # In units of what is rounded: once to W's dtype, and a few roundings to float32. (float16: 2^-24 below
    # its normal range.)
    u, tiny = torch.finfo(dtype).eps / 2 + 4 * 2**-24, 2**-24 * (dtype == torch.float16)
    assert ((merged.double() - (V * factors).double()).abs() <= u * (V * factors).abs() + tiny).all()
    layer.unmerge()
    back = layer.base_layer.weight
    assert (
        (back.double() - weight.double()).abs()
        <= 2 * u * (V.abs() + back.float().abs()) + tiny * (1 + 1 / factors)
    ).all()


# ---- what is kept, and when it is computed -------------------------------------------------------------------------


def kept_numbers(model, **lora) -> int:
    """Count the numbers that forward keeps for backward: each storage once, without the parameters."""
    model = copy.deepcopy(model)
    add_lora(model, LoraConfig(**lora))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        hidden = model.model(ids(2, 10))
    assert hidden.requires_grad
    return sum(
        t.untyped_storage().nbytes() // t.element_size() for pointer, t in kept.items() if pointer not in own
    )


def test_dora_keeps_the_outputs_of_its_layers_and_of_gate_and_up_none_that_swiglu_does_not_keep(monkeypatch):
    monkeypatch.setattr(choice, "_fused", False)  # DoRA has no fused form: plain beside plain
    model, tokens, (D, HK, GK) = tiny_model(), 20, (24, 24, 12)
    lora = kept_numbers(model, r=2, target_modules=ALL_SEVEN)
    dora = kept_numbers(model, r=2, target_modules=ALL_SEVEN, use_dora=True)
    outputs = HK + GK + D + D  # q, k, o and down; attention keeps v's anyway
    norms = 2 * (24 + 12 + 12 + 24 + 40 + 40 + 24)
    assert dora - lora == 2 * tokens * outputs + norms


def test_lora_fa_keeps_no_inputs():
    model, tokens, (D, F_) = tiny_model(), 20, (24, 40)
    lora = kept_numbers(model, r=2, target_modules=ALL_SEVEN)
    frozen = kept_numbers(model, r=2, target_modules=ALL_SEVEN, lora_fa=True)
    # q, k and v share one input; gate and up share one; down has its own. Attention keeps o's input anyway.
    assert lora - frozen == 2 * tokens * (D + D + F_)


def test_lora_fa_keeps_of_a_layer_only_what_has_r_columns():
    layer = LoraLinear(nn.Linear(64, 32).requires_grad_(False))
    layer.add_adapter("a", LoraConfig(r=4, lora_fa=True))
    layer.active = "a"
    layer.lora_A["a"].requires_grad_(False)
    kept, x = [], torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert sorted(tuple(t.shape) for t in kept) == [(4, 64), (5, 4), (32, 4)]  # A, x A^T, B


def test_no_tensor_as_large_as_the_weight_is_made():
    layer = decomposed_layer((512, 512, 2), quantized=True)
    x = torch.randn(8, 512)
    layer(x).sum().backward()  # allocates the buffer to dequantize into, and ||W||^2
    weight, buffer = layer.base_layer.weight, torch.empty(512, 512)
    # The C code has no temporaries. Without a compiler the definition runs, and has some.
    temporaries = peak_memory(lambda: weight.dequantize(out=buffer))
    assert peak_memory(lambda: layer(x).sum().backward()) - temporaries < 4 * 512 * 512 / 4


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("targets", [("down_proj",), ALL_SEVEN])
def test_every_recompute_policy_gives_the_gradients_of_off_to_the_bit(targets, quantized, dropout):
    model = same_model_here(transformers_model("llama-gqa"))  # with biases, on down_proj too
    if quantized:
        for name, layer in list(model.model.layers.named_modules()):
            if isinstance(layer, nn.Linear):
                model.model.layers.set_submodule(
                    name, Linear4bit(quantize_4bit(layer.weight.data), layer.bias.data)
                )
    add_lora(
        model, LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets, use_dora=True)
    )
    randomize(model)
    loss, expected = gradients(model.train(), "off")
    assert all(g.any() for g in expected.values())
    for policy in POLICIES[1:]:
        again, found = gradients(model, policy)
        assert loss == again and expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), policy


@torch.no_grad()
def test_generation_computes_norms_once_and_training_every_time(monkeypatch):
    import minilora.dora

    calls, dequantized = [], minilora.dora.dequantized
    monkeypatch.setattr(minilora.dora, "dequantized", lambda *a: calls.append(1) or dequantized(*a))
    model = tiny_model()
    add_lora(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    randomize(model)
    generate(model, ids(1, 5), max_new_tokens=6, temperature=0.0)
    assert len(calls) == 2  # layers
    with torch.enable_grad():
        for _ in range(3):
            model(ids(1, 5))
    assert len(calls) == 2 + 3 * 2


@torch.no_grad()
def test_norms_that_were_kept_are_forgotten_when_what_they_are_of_changes():
    layer = decomposed_layer((16, 8, 2)).eval()
    x = torch.randn(3, 16)

    def is_right() -> bool:
        wide = [p.double() for p in layer.parts(layer.active).values()]
        return relative_error(layer(x), equation(layer, x.double(), x.double(), *wide)) <= 1e-5

    assert is_right() and is_right()
    layer.lora_A["a"].mul_(2)
    assert is_right()
    layer.lora_B["a"].add_(0.3)
    assert is_right()
    layer.base_layer.weight.mul_(3)
    assert is_right()
    other = nn.Parameter(torch.randn(8, 2))
    while other._version < layer.lora_B["a"]._version:
        other.mul_(0.5)
    layer.lora_B["a"] = other  # another tensor, written to as often
    assert is_right()
    layer.merge()
    layer.unmerge()
    assert is_right()
    layer.add_adapter("b", LoraConfig(r=2, use_dora=True))
    layer.active = "b"
    assert is_right()
    layer.lora_B["b"].data.add_(
        0.3
    )  # PyTorch's version counter misses this write, as it may miss an optimizer kernel's
    with torch.enable_grad():
        layer(x)
    assert is_right()


# ---- several adapters, and LoRA-FA ---------------------------------------------------------------------------------


@torch.no_grad()
def test_dora_and_lora_take_turns_on_one_model(tmp_path):
    batch, model = ids(1, 9), tiny_model()
    base, names = model(batch), list(dict(model.named_parameters()))
    add_lora(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), "lora")
    add_lora(model, LoraConfig(r=3, target_modules="all-linear", use_dora=True), "dora")
    randomize(model)
    seen = {}
    for name in ("dora", "lora", None, "dora", "lora"):
        set_adapter(model, name)
        logits = model(batch)
        assert torch.equal(seen.setdefault(name, logits), logits)
        assert all(n.endswith(f".{name}") for n in trainable_parameters(model))
        if name is not None:
            merge_lora(model)
            assert relative_error(model(batch), logits) <= TOLERANCE
            unmerge_lora(model)
            save_adapter(model, tmp_path / name, name)
            for layer in lora_layers(model).values():  # float32 does not always come back to the bit
                layer.base_layer.weight.copy_(tiny_weight(layer, model))
    assert torch.equal(seen[None], base) and not torch.equal(seen["lora"], seen["dora"])
    set_adapter(model, "dora")
    merge_lora(model)
    remove_lora(model)
    assert list(dict(model.named_parameters())) == names
    assert relative_error(model(batch), seen["dora"]) <= TOLERANCE
    fresh = tiny_model()
    load_adapter(fresh, tmp_path / "dora")
    assert torch.equal(fresh(batch), seen["dora"])


def tiny_weight(layer: LoraLinear, model: nn.Module) -> torch.Tensor:
    """Return the initial weight of a layer of `tiny_model()`."""
    name = next(n for n, m in model.named_modules() if m is layer)
    return tiny_model().get_submodule(name).weight


@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_fa_trains_b_with_the_gradients_of_lora_and_leaves_a_alone(use_dora, tmp_path):
    results = {}
    for lora_fa in (False, True):
        model = tiny_model()
        add_lora(model, LoraConfig(r=3, target_modules=ALL_SEVEN, use_dora=use_dora, lora_fa=lora_fa))
        randomize(model)
        causal_lm_loss(model, ids(2, 9), ids(2, 9)).backward()
        results[lora_fa] = {
            n: p.grad for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad
        }
    assert results[True].keys() == {name for name in results[False] if ".lora_A." not in name}
    assert all(torch.equal(gradient, results[False][name]) for name, gradient in results[True].items())
    set_adapter(model, None)
    set_adapter(model, "default")
    assert trainable_parameters(model).keys() == results[True].keys()
    save_adapter(model, tmp_path)
    for lora_fa in (False, True):
        again = tiny_model()
        load_adapter(again, tmp_path, lora_fa=lora_fa)
        assert trainable_parameters(again).keys() == results[lora_fa].keys()
        assert torch.equal(again(ids(1, 9)), model(ids(1, 9)))


@pytest.mark.parametrize("policy", POLICIES[1:3])
def test_lora_fa_recomputes_to_the_same_bits(policy):
    model = tiny_model(vocab_size=97)
    add_lora(model, LoraConfig(r=3, lora_dropout=0.1, target_modules=ALL_SEVEN, lora_fa=True))
    randomize(model)
    (loss, expected), (again, found) = gradients(model.train(), "off"), gradients(model, policy)
    assert loss == again and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("key", ["use_dora", "use_rslora", "lora_fa"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(key):
    with pytest.raises(UserError, match=f"{key} must be true or false, not 'no'"):
        LoraConfig(**{key: "no"})
