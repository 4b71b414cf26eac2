"""LoRA against PEFT, and its algebra as properties."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import FAMILIES, relative_error, same_model_here, transformers_model
from support.same_dropout import draw_as_we_do, mask_of
from support.tiny import (
    AFTER_20_STEPS,
    CASES,
    TOLERANCE,
    adapter_pairs,
    ids,
    pair_with_peft,
    randomize,
    tiny_model,
)
from torch import nn

from minilora import (
    PRESETS,
    CausalLM,
    LoraConfig,
    UserError,
    add_lora,
    merge_lora,
    remove_lora,
    set_adapter,
    trainable_parameters,
    unmerge_lora,
)
from minilora.formats.config_json import parse_config
from minilora.lora import LoraLinear, lora_layers
from minilora.loss import causal_lm_loss
from minilora.optim import make_optimizer
from minilora.wrapping import adapter_names, match_targets

MISTRAL_7B = dict(model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=8)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window", "qwen2-bias-tied", "qwen3-qk-norm"])
def test_forward_and_every_gradient_equal_pefts(family, case):
    ours, theirs = pair_with_peft(family, **CASES[case])
    batch = ids(2, 20, vocab=97)
    logits, expected = ours(batch), theirs(input_ids=batch).logits
    assert relative_error(logits, expected) <= TOLERANCE
    labels = batch.clone()
    labels[:, :5] = -100
    (causal_lm_loss(ours, batch, labels) / (2 * 15)).backward()
    theirs(input_ids=batch, labels=labels).loss.backward()
    pairs = list(adapter_pairs(ours, theirs))
    assert len(pairs) == len(trainable_parameters(ours)) > 0
    for name, mine, other in pairs:
        assert relative_error(mine.grad, other.grad) <= TOLERANCE, name


def test_20_adamw_steps_equal_pefts():
    ours, theirs = pair_with_peft("llama-gqa", **CASES["all-linear"])
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


COUNTS = {
    "minimal_r4_qv": 1_703_936,
    "standard_r8_qkvo": 6_815_744,
    "aggressive_r16_all": 41_943_040,
    "high_capacity_r32_all": 83_886_080,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_train_exactly_so_many_parameters_of_mistral_7b(preset):
    with torch.device("meta"):
        model = CausalLM(parse_config(MISTRAL_7B))
    add_lora(model, LoraConfig.preset(preset))
    assert sum(p.numel() for p in trainable_parameters(model).values()) == COUNTS[preset]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_initialised_b_leaves_the_model_unchanged_exactly(dtype):
    model = tiny_model().to(dtype)
    before = model(ids(2, 9))
    add_lora(model, LoraConfig(target_modules="all-linear", lora_dropout=0.5))
    assert torch.equal(model.train()(ids(2, 9)), before)


def test_only_the_adapter_is_trainable_and_it_is_float32():
    model = tiny_model().bfloat16()
    add_lora(model, LoraConfig(r=4))
    trainable = trainable_parameters(model)
    assert len(trainable) == 2 * 4 * 2 and all(
        ".lora_" in name and p.dtype == torch.float32 for name, p in trainable.items()
    )
    causal_lm_loss(model, ids(2, 9), ids(2, 9)).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable.values())
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trainable)


def test_at_the_first_step_b_has_gradients_and_a_has_none():
    model = tiny_model()
    add_lora(model, LoraConfig(r=4))
    causal_lm_loss(model, ids(2, 9), ids(2, 9)).backward()
    for layer in lora_layers(model).values():
        assert layer.lora_B["default"].grad.abs().max() > 0 and layer.lora_A["default"].grad.abs().max() == 0


@pytest.mark.parametrize("in_features, r", [(16, 256), (256, 64), (1024, 16)])
def test_a_is_drawn_uniformly_up_to_one_over_the_root_of_in_whatever_its_rank(in_features, r):
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(in_features, 3))
    layer.add_adapter("a", LoraConfig(r=r))
    A = layer.lora_A["a"].double() * in_features**0.5  # uniform from -1 to 1
    # Of 4,096 uniform numbers or more the largest is above 0.99 for certain, a mean is known to 0.9 %, a mean
    # square to 0.5 % and a mean fourth power to 0.4 % (one sigma of each): five sigmas.
    assert 0.99 < A.abs().max() <= 1
    assert A.mean().item() == pytest.approx(0, abs=0.045)
    assert A.square().mean().item() == pytest.approx(1 / 3, abs=0.024)
    assert A.pow(4).mean().item() == pytest.approx(1 / 5, abs=0.021)


def test_an_adapter_that_is_removed_while_it_is_merged_stays_in_the_weights_and_bars_no_other():
    model, batch = tiny_model(), ids(1, 9)
    for name in ("first", "second"):
        add_lora(model, LoraConfig(r=2, target_modules=("q_proj", "down_proj")), name)
    randomize(model)
    set_adapter(model, "first")
    with torch.no_grad():
        adapted = model(batch)
        merge_lora(model)
        remove_lora(model, "first")
        unmerge_lora(model)  # nothing is left to take out
        assert relative_error(model(batch), adapted) <= TOLERANCE
        set_adapter(model, "second")
        assert relative_error(model(batch), adapted) > 100 * TOLERANCE  # its update is applied
        merge_lora(model)
        remove_lora(model)
    assert all(p.isfinite().all() for p in model.parameters())


shapes = st.tuples(
    st.integers(1, 33), st.integers(1, 33), st.integers(1, 40)
)  # in, out, r: r above both is allowed
alphas = st.floats(0.1, 64)


def adapted_layer(in_features, out_features, r, alpha, rslora, dtype, seed=0):
    torch.manual_seed(seed)
    layer = LoraLinear(nn.Linear(in_features, out_features, bias=bool(seed % 2)).to(dtype))
    layer.add_adapter("a", LoraConfig(r=r, lora_alpha=alpha, target_modules=("x",), use_rslora=rslora))
    layer.active = "a"
    nn.init.normal_(layer.lora_B["a"])
    return layer


@given(shapes, alphas, st.booleans(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_the_layer_is_the_equation(shape, alpha, rslora, seed):
    in_features, out_features, r = shape
    layer = adapted_layer(in_features, out_features, r, alpha, rslora, torch.float64, seed)
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    scaling = alpha / (math.sqrt(r) if rslora else r)
    A, B = layer.lora_A["a"].double(), layer.lora_B["a"].double()
    expected = x @ (layer.base_layer.weight + scaling * B @ A).T + (
        layer.base_layer.bias if layer.base_layer.bias is not None else 0
    )
    torch.testing.assert_close(
        layer(x), expected, rtol=1e-10, atol=1e-10
    )  # float64 throughout: 2^-53 times a few hundred sums


@given(
    shapes,
    alphas,
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_merge_then_unmerge_restores_the_weight_within_two_roundings(shape, alpha, rslora, dtype, seed):
    layer = adapted_layer(*shape, alpha, rslora, dtype, seed)
    weight = layer.base_layer.weight.clone()
    layer.merge()
    merged = layer.base_layer.weight.clone()
    layer.unmerge()
    # merge rounds W + D once to W's dtype, unmerge rounds that minus D once: u (|W + D| + |W'|), u = eps / 2.
    # The sums themselves are taken in float32, which adds its own rounding. (float16: 2^-24 absolute below
    # its normal range.)
    exact = weight.double() + layer.delta_weight("a").double()
    u = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps
    bound = u * (exact.abs() + layer.base_layer.weight.double().abs()) * (1 + 4 * u) + 2**-23 * (
        dtype == torch.float16
    )
    assert ((layer.base_layer.weight.double() - weight.double()).abs() <= bound).all()
    assert (
        (merged.double() - exact).abs() <= u * exact.abs() * (1 + 4 * u) + 2**-24 * (dtype == torch.float16)
    ).all()


@given(shapes, alphas, st.integers(0, 3))
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_the_update_has_rank_at_most_r_and_is_linear_in_alpha(shape, alpha, seed):
    layer = adapted_layer(*shape, alpha, False, torch.float32, seed)
    delta = layer.delta_weight("a")
    assert torch.linalg.matrix_rank(delta.double(), rtol=1e-5) <= shape[2]
    layer.add_adapter("b", LoraConfig(r=shape[2], lora_alpha=2 * alpha, target_modules=("x",)))
    layer.lora_A["b"], layer.lora_B["b"] = layer.lora_A["a"], layer.lora_B["a"]
    assert torch.equal(layer.delta_weight("b"), 2 * delta)  # doubling is exact in floating point


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_merged_logits_equal_unmerged_ones(family):
    model = same_model_here(transformers_model(family))
    add_lora(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    randomize(model)
    batch = ids(2, 20, vocab=97)
    unmerged = model(batch)
    merge_lora(model)
    assert relative_error(model(batch), unmerged) <= TOLERANCE
    unmerge_lora(model)
    assert relative_error(model(batch), unmerged) <= TOLERANCE


@torch.no_grad()
def test_merged_and_removed_is_a_plain_model_that_kept_the_adapter():
    model = tiny_model()
    names = list(dict(model.named_parameters()))
    add_lora(model, LoraConfig(r=4, target_modules="all-linear"))
    randomize(model)
    adapted = model(ids(1, 9))
    merge_lora(model)
    merge_lora(model)  # merging twice adds once
    remove_lora(model)
    assert list(dict(model.named_parameters())) == names
    assert relative_error(model(ids(1, 9)), adapted) <= TOLERANCE


@torch.no_grad()
def test_switching_between_named_adapters_gives_each_one_its_own_logits():
    batch = ids(1, 9)
    model = tiny_model()
    base = model(batch)
    add_lora(model, LoraConfig(r=2, target_modules=("q_proj",)), "first")
    add_lora(model, LoraConfig(r=5, target_modules="all-linear", use_rslora=True), "second")
    randomize(model)
    assert adapter_names(model) == ["first", "second"]
    seen = {}
    for name in ("first", "second", None, "first", None, "second"):
        set_adapter(model, name)
        logits = model(batch)
        assert torch.equal(seen.setdefault(name, logits), logits)
        trainable = trainable_parameters(model)
        assert (not trainable) if name is None else all(n.endswith("." + name) for n in trainable)
    assert torch.equal(seen[None], base)
    assert not torch.equal(seen["first"], seen["second"])
    remove_lora(model, "second")
    set_adapter(model, "first")
    assert torch.equal(model(batch), seen["first"])
    remove_lora(model)
    assert torch.equal(model(batch), base)


def test_dropout_acts_on_the_adapters_input_in_training_only():
    torch.manual_seed(0)
    layer = adapted_layer(64, 8, 4, 4.0, False, torch.float32)
    layer.configs["a"] = LoraConfig(r=4, lora_alpha=4, lora_dropout=0.5, target_modules=("x",))
    x = torch.randn(3, 64)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    mean = torch.stack([layer(x) for _ in range(4000)]).mean(0)
    layer.eval()
    # Inverted dropout keeps the expectation. 4000 draws of an update whose deviation is about its own size: 4
    # standard errors.
    update = (layer(x) - layer.base_layer(x)).abs().max()
    assert (mean - layer(x)).abs().max() < 4 * 2 * update / 4000**0.5


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
def test_under_dropout_values_and_gradients_are_those_of_autograd_through_the_same_mask(dtype, tolerance):
    # Relative to the largest. In float64 A and B are float32 still, and their gradients are rounded to it; in
    # bfloat16 some ten roundings of 2^-9 each. Half of the numbers dropped: a wrong mask or factor is off by
    # about 1.
    layer = adapted_layer(48, 20, 4, 8.0, False, dtype).train()
    layer.configs["a"] = replace(layer.configs["a"], lora_dropout=0.5)
    layer.base_layer.requires_grad_(False)
    x, dy = torch.randn(3, 7, 48).to(dtype).requires_grad_(), torch.randn(3, 7, 20).to(dtype)
    tensors = [x, *layer.parts("a").values()]
    torch.manual_seed(9)
    y = layer(x)
    torch.manual_seed(9)
    mask = mask_of(x, 0.5)  # the same draws, times 1 / (1 - p)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = wide[0] @ layer.base_layer.weight.double().T + 2.0 * (wide[0] * mask) @ wide[1].T @ wide[2].T
    found = torch.autograd.grad(y, tensors, dy), torch.autograd.grad(expected, wide, dy.double())
    assert relative_error(y.double(), expected) <= tolerance
    assert all(relative_error(mine.double(), other) <= tolerance for mine, other in zip(*found, strict=True))


def test_under_dropout_every_gradient_equals_pefts_with_the_same_draws():
    ours, theirs = pair_with_peft("llama-gqa", **CASES["all-linear"], lora_dropout=0.3)
    draw_as_we_do(theirs, 0.3)
    batch = ids(2, 20, vocab=97)
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        if model is ours:
            (causal_lm_loss(model, batch, batch) / (2 * 19)).backward()
        else:
            model(input_ids=batch, labels=batch).loss.backward()
    for name, mine, other in adapter_pairs(ours, theirs):
        assert other.grad.any() and relative_error(mine.grad, other.grad) <= TOLERANCE, name


def test_targets_by_leaf_name_full_name_suffix_regex_and_all_linear():
    model = tiny_model()
    assert match_targets(model, ["q_proj"]) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert match_targets(model, ["model.layers.1.mlp.up_proj"]) == ["model.layers.1.mlp.up_proj"]
    assert match_targets(model, ["mlp.up_proj"]) == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert match_targets(model, r"model\.layers\.0\..*[qv]_proj") == [
        f"model.layers.0.self_attn.{x}_proj" for x in "qv"
    ]
    assert len(match_targets(model, "all-linear")) == 14 and "lm_head" not in match_targets(
        model, "all-linear"
    )


@pytest.mark.parametrize(
    "targets, said",
    [
        (["q_proj", "v_porj"], "names 'v_porj', which no linear layer is called; nearest: 'v_proj'"),
        (["norm"], "names 'norm', which no linear layer is called"),
        (["model.layers.9.self_attn.q_proj"], "model.layers.9.self_attn.q_proj"),
        ("q_proj", "must match a whole name"),
        ("(", "not a regular expression"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_that_leaves_the_model_alone(targets, said):
    model = tiny_model()
    with pytest.raises(UserError) as error:
        add_lora(model, LoraConfig(target_modules=targets))
    assert said in str(error.value)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["train", "half", "keys", "eval"])
def test_a_name_that_pytorch_uses_itself_is_refused(name):
    with pytest.raises(UserError, match=f"adapter name '{name}' is a name that PyTorch uses itself"):
        add_lora(tiny_model(), LoraConfig(r=2), name)


def test_mistakes_with_named_adapters_are_refused():
    model = tiny_model()
    add_lora(model, LoraConfig(target_modules=["q_proj"]), "english")
    with pytest.raises(UserError, match="already has an adapter called 'english'"):
        add_lora(model, LoraConfig(target_modules=["q_proj"]), "english")
    with pytest.raises(UserError, match="nearest: 'english'"):
        set_adapter(model, "englsh")
    add_lora(model, LoraConfig(target_modules=["q_proj"]), "french")
    merge_lora(model)
    with pytest.raises(UserError, match="'french' is merged"):
        set_adapter(model, "english")
    with pytest.raises(UserError, match="'french' is merged"):
        add_lora(model, LoraConfig(target_modules=["q_proj"]), "german")
