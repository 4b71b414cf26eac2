"""Sums and differences of adapters: PEFT's numbers, the exact sum, and the nearest matrix of a rank."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.families import relative_error, transformers_model
from support.tiny import ids

from minilora import UserError
from minilora.adapters.arithmetic import (
    combine,
    distance,
    extract,
    padded,
    shortened,
    stacked,
    to_plain,
)

UNIT = 2.0**-24  # of float32
# Decompositions of LAPACK are exact for a matrix within p(n) units (Users' Guide, 4.9); here n <= 100, and a
# result is compared after two or three of them.
SVD = 200 * UNIT


def factors(r, seed, out_features=48, in_features=40):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(r, in_features, generator=generator), torch.randn(out_features, r, generator=generator)


def product(A, B, scaling=1.0):
    return scaling * B.double() @ A.double()


# ---- against PEFT ---------------------------------------------------------------------------------------------------


def peft_with(adapters: dict[str, dict]):
    """A small Llama in PEFT with random adapters of these settings."""
    peft = pytest.importorskip("peft")
    model, generator = None, torch.Generator().manual_seed(5)
    for name, changes in adapters.items():
        config = peft.LoraConfig(task_type="CAUSAL_LM", **changes)
        if model is None:
            model = peft.get_peft_model(transformers_model("llama-gqa"), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def updates_in(model, name):
    """An adapter of a PEFT model: layer -> A, B, scaling."""
    return {
        path.removeprefix("base_model.model."): (
            layer.lora_A[name].weight.detach(),
            layer.lora_B[name].weight.detach(),
            layer.scaling[name],
        )
        for path, layer in model.named_modules()
        if hasattr(layer, "lora_A") and name in layer.lora_A
    }


ONE = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
TWO = dict(r=4, lora_alpha=3, target_modules=["q_proj", "down_proj"], use_rslora=True)
WIDE = dict(r=7, lora_alpha=5, target_modules=["q_proj", "v_proj"])
CASES = {
    "linear": ([ONE, TWO], [0.7, 0.4], {}),
    "linear with a negative weight": ([ONE, TWO, ONE], [1.0, -0.5, 0.25], {}),
    "cat": ([ONE, WIDE], [0.7, 0.3], {}),
    "cat with a negative weight": ([ONE, TWO, WIDE], [0.7, -0.3, 2.0], {}),
    "svd": ([ONE, WIDE], [0.7, 0.3], {}),
    "svd of another rank": ([ONE, TWO, WIDE], [0.7, -0.3, 2.0], dict(svd_rank=5)),
}


@pytest.mark.parametrize("case", CASES)
def test_combinations_are_pefts(case):
    configs, weights, settings = CASES[case]
    combination_type, names = case.split()[0], [f"a{i}" for i in range(len(configs))]
    model = peft_with(dict(zip(names, configs, strict=True)))
    model.add_weighted_adapter(names, weights, "new", combination_type=combination_type, **settings)
    expected = updates_in(model, "new")
    found, errors = combine(
        [updates_in(model, name) for name in names], weights, combination_type, **settings
    )
    assert found.keys() == expected.keys() == errors.keys()
    for layer, (A, B) in found.items():
        their_A, their_B, scaling = expected[layer]
        assert scaling == 1 and A.shape == their_A.shape and B.shape == their_B.shape
        if combination_type == "svd":  # the signs of single vectors are free
            assert relative_error(B @ A, their_B @ their_A) <= SVD
        else:  # at most three products and two sums
            assert relative_error(A, their_A) <= 5 * UNIT and relative_error(B, their_B) <= 5 * UNIT


def test_rslora_in_the_first_adapter_scales_pefts_sum_twice_and_ours_once():
    model = peft_with(dict(a=TWO, b=ONE))
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", combination_type="cat")
    # PEFT writes alpha = r = 8, keeps use_rslora, and so scales the sum by sqrt(8).
    assert all(scaling == pytest.approx(8**0.5) for *_, scaling in updates_in(model, "new").values())
    found, _ = combine([updates_in(model, "a"), updates_in(model, "b")], [0.5, 0.5], "cat")
    for layer, (A, B) in found.items():
        exact = sum(product(*updates_in(model, n)[layer]) / 2 for n in "ab" if layer in updates_in(model, n))
        assert relative_error(product(A, B), exact) <= 10 * UNIT


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_trained_pissa_adapter_becomes_pefts_plain_one(init, use_rslora, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init,
        use_rslora=use_rslora, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(transformers_model("llama-gqa"), config).eval()
    start = {k: v[:2] for k, v in updates_in(model, "default").items()}
    start = {layer: (A.clone(), B.clone()) for layer, (A, B) in start.items()}
    model.peft_config["default"].init_lora_weights = True  # as PEFT's guide says, before the start is saved
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    trained = {k: (A.clone(), B.clone(), s) for k, (A, B, s) in updates_in(model, "default").items()}
    logits = model(ids(2, 12)).logits
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    theirs = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    raw = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    for layer, (A, B, scaling) in trained.items():
        plain_A, plain_B, r, alpha = to_plain(A, B, *start[layer], 6, use_rslora)
        assert torch.equal(plain_A, theirs[f"base_model.model.{layer}.lora_A.weight"])
        assert torch.equal(plain_B, theirs[f"base_model.model.{layer}.lora_B.weight"])
        assert r == raw["r"] and alpha == raw["lora_alpha"] and raw["init_lora_weights"] is True
        assert alpha / (r**0.5 if use_rslora else r) == pytest.approx(scaling, rel=1e-15)
    # The same function on the original weights: float32 sums in another order, as elsewhere.
    again = peft.PeftModel.from_pretrained(transformers_model("llama-gqa"), tmp_path / "plain").eval()
    assert relative_error(again(ids(2, 12)).logits, logits) <= 1e-5


# ---- against the equations -------------------------------------------------------------------------------------------


@given(
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    seed=st.integers(0, 99),
    weights=st.lists(st.integers(-40, 40).map(lambda n: n / 10), min_size=3, max_size=3),
)
@settings(max_examples=25)
def test_stacked_factors_are_the_sum_and_shortened_ones_the_nearest_of_a_rank(ranks, seed, weights):
    updates = [(*factors(r, seed + i), w) for i, (r, w) in enumerate(zip(ranks, weights, strict=False))]
    exact = sum(product(*update) for update in updates)
    size = sum(abs(w) * A.norm().item() * B.norm().item() for A, B, w in updates)  # at least the exact norm
    A, B = stacked(updates)
    assert (
        product(A, B) - exact
    ).norm() <= 2 * UNIT * size  # a rounding of each number of A, one of its weight
    r = max(1, sum(ranks) - 1)
    short = shortened(A, B, r)
    dropped = torch.linalg.svdvals(exact)[r:].norm()  # Eckart and Young
    left = (product(*short) - exact).norm().item()
    assert abs(left - dropped) <= SVD * size
    assert abs(distance(short, (A, B)) * exact.norm() - left) <= SVD * size


def test_each_way_to_combine_says_how_far_it_is_from_the_sum():
    adapters = [{"q": (*factors(3, 0), 1.0)}, {"q": (*factors(3, 1), 0.5)}]
    exact = product(*adapters[0]["q"]) * 2 + product(*adapters[1]["q"])
    for combination_type, rank in (("cat", None), ("svd", None), ("svd", 6), ("linear", None)):
        found, errors = combine(adapters, [2.0, 1.0], combination_type, rank)
        error = ((product(*found["q"]) - exact).norm() / exact.norm()).item()
        assert errors["q"] == pytest.approx(error, rel=1e-4, abs=SVD)
        assert (error < SVD) == (combination_type == "cat" or rank == 6), combination_type


def test_padding_changes_no_product_and_leaves_rows_of_zeros():
    A, B = factors(3, 0)
    wide_A, wide_B = padded(A, B, 5)
    assert wide_A.shape == (5, 40) and wide_B.shape == (48, 5) and wide_A.is_contiguous()
    assert torch.equal(wide_A[:3], A) and torch.equal(wide_B[:, :3], B)
    assert not wide_A[3:].any() and not wide_B[:, 3:].any()


# ---- from two models --------------------------------------------------------------------------------------------------


def test_a_merged_adapter_is_found_again():
    A, B = factors(4, 0)
    W = torch.randn(48, 40, generator=torch.Generator().manual_seed(9))
    tuned = (W.double() + product(A, B)).float()
    (found_A, found_B), error = extract(W, tuned, 4)
    assert found_A.shape == (4, 40) and found_B.shape == (48, 4)
    # The merged weight was rounded once; its difference to W holds that rounding.
    rounding = UNIT * (tuned.norm() + W.norm()).item()
    assert (product(found_A, found_B) - product(A, B)).norm() <= 2 * rounding + SVD * product(A, B).norm()
    assert error <= 2 * rounding / product(A, B).norm() + SVD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_the_product_and_at_most_two_percent_above_the_least(dtype):
    generator = torch.Generator().manual_seed(1)
    base, tuned = (
        torch.randn(64, 96, generator=generator).to(dtype) for _ in range(2)
    )  # flat: the hard case
    difference = tuned.double() - base.double()
    (A, B), error = extract(base, tuned, 8)
    assert error == pytest.approx(((product(A, B) - difference).norm() / difference.norm()).item(), rel=1e-5)
    least = (torch.linalg.svdvals(difference)[8:].norm() / difference.norm()).item()
    # Halko et al., corollary 10.10, with 8 more directions and 8 iterations, bounds the factor in the spectral
    # norm by (1 + 2 sqrt(64))^(1/17) = 1.18 for the worst spectrum.
    assert least * (1 - SVD) <= error <= 1.02 * least


def test_the_same_models_give_the_same_adapter_whatever_was_drawn_before():
    base, tuned = factors(40, 0)[1], factors(40, 1)[1]
    first = extract(base, tuned, 4)[0]
    torch.rand(7)
    state = torch.get_rng_state()
    again = extract(base, tuned, 4)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_equal_weights_give_an_update_of_zero():
    W = factors(40, 0)[1]
    (A, B), error = extract(W, W.clone(), 4)
    assert A.shape == (4, 40) and B.shape == (48, 4) and not A.any() and not B.any() and error == 0


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_linear_refuses_different_ranks_and_names_the_mend():
    adapters = [{"q": (*factors(3, 0), 1.0)}, {"q": (*factors(4, 1), 1.0)}]
    with pytest.raises(UserError, match="'linear' needs equal ranks, but q has 3 and 4; choose 'svd'"):
        combine(adapters, [1.0, 1.0], "linear")


def test_adapters_of_different_models_are_refused():
    adapters = [{"q": (*factors(3, 0), 1.0)}, {"q": (*factors(3, 1, in_features=8), 1.0)}]
    with pytest.raises(UserError, match=r"different models: q is \(48, 8\) and \(48, 40\)"):
        combine(adapters, [1.0, 1.0], "svd")


def test_a_way_to_combine_that_nobody_knows_is_refused():
    with pytest.raises(UserError, match="'lineer' is not known; nearest: 'linear'"):
        combine([{"q": (*factors(3, 0), 1.0)}], [1.0], "lineer")
