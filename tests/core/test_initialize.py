"""Where A and B start: PEFT's numbers on the same weight, and the function that the layer computes at step 0."""

import inspect
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.families import relative_error, same_model_here, transformers_model
from support.tiny import AFTER_20_STEPS, TOLERANCE, ids, tiny_model
from torch import nn

from minilora import (
    LoraConfig,
    QuantizedTensor,
    UserError,
    add_lora,
    dequantize_4bit,
    quantize_4bit,
)
from minilora.adapters.arithmetic import to_plain
from minilora.eva import InputDirections, input_directions
from minilora.initialize import CHANGE_THE_BASE, REPEATABLE, check_kind, initialize
from minilora.int8 import quantize_int8
from minilora.lora import lora_layers
from minilora.loss import causal_lm_loss

UNIT = 2.0**-24  # of float32

# LAPACK's SVD and QR are backward stable: their factors are those of a matrix within p(n) units of W, in norm
# (LAPACK Users' Guide, 4.9). p(n) is a small polynomial; for n = 48, a few tens. Two programs that call them
# on the same W get the same numbers; twice the error leaves room for another order of the products behind.
SVD = 100 * UNIT
KINDS = ("pissa", "pissa_niter_4", "olora", "loftq")


def weight(out_features=48, in_features=40, seed=0, rank=None) -> torch.Tensor:
    """A random matrix whose singular values fall by a fifth from one to the next: no two of them are close."""
    generator = torch.Generator().manual_seed(seed)
    k = min(out_features, in_features)
    U, V = (torch.linalg.qr(torch.randn(n, k, generator=generator))[0] for n in (out_features, in_features))
    S = 0.8 ** torch.arange(k)
    S[rank:] = 0 if rank is not None else S[rank:]
    return (U * S) @ V.T


def peft_layer(W: torch.Tensor, r: int, alpha: float, init, **settings):
    """PEFT's layer for the weight, freshly initialised."""
    peft = pytest.importorskip("peft")
    base = nn.Linear(W.shape[1], W.shape[0], bias=False)
    base.weight.data = W.clone()
    model = nn.Sequential()
    model.add_module("q", base)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=["q"], init_lora_weights=init, **settings)
    return peft.get_peft_model(model, config).base_model.model.q


def parts(layer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """PEFT's A, B and base."""
    A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
    return A, B, layer.base_layer.weight.data


@pytest.fixture
def loftq_on_cpu(monkeypatch):
    """PEFT's LoftQ, which names the GPU in its text, with the CPU in its place."""
    module = pytest.importorskip("peft.utils.loftq_utils")
    pytest.importorskip("bitsandbytes")
    for name in ("loftq_init", "_loftq_init_new"):
        source = inspect.getsource(getattr(module, name))
        assert source.count('"cuda"') == 1
        namespace = dict(vars(module))
        exec(source.replace('"cuda"', '"cpu"'), namespace)
        monkeypatch.setattr(module, name, namespace[name])
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", module.loftq_init)
    return module


# ---- the starts that leave W alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [True, "gaussian", "orthogonal"])
def test_the_starts_that_leave_w_alone_draw_pefts_numbers_from_the_same_seed(kind):
    W, r = weight(), 6
    layer = peft_layer(W, r, 12, True)
    torch.manual_seed(3)
    layer.orthogonal_init("default") if kind == "orthogonal" else layer.reset_lora_parameters("default", kind)
    torch.manual_seed(3)
    A, B, base = initialize(kind, W, r, 2.0)
    expected = parts(layer)
    assert torch.equal(A, expected[0]) and torch.equal(B, expected[1]) and base is None
    assert torch.equal(expected[2], W)  # nor does PEFT touch it


@pytest.mark.parametrize("r", [2, 8])
def test_orthogonal_starts_with_two_factors_that_are_not_zero_and_a_product_that_is(r):
    torch.manual_seed(0)
    A, B, _ = initialize("orthogonal", weight(), r, 1.0)
    assert A.norm() > 0 and B.norm() > 0
    # Each entry is a sum of r products that cancel; rows of Q are orthogonal to r units.
    assert (B @ A).abs().max() <= 4 * r * UNIT * B.abs().max() * A.abs().max() * r


def test_orthogonal_refuses_an_odd_rank_as_peft_does():
    with pytest.raises(UserError, match="even lora_rank, not 3"):
        initialize("orthogonal", weight(), 3, 1.0)
    with pytest.raises(ValueError, match="even"):
        peft_layer(weight(), 3, 3, "orthogonal")


# ---- the starts that take a part of W ------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("shape", [(48, 40), (24, 56)], ids=["tall", "wide"])
@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_0", "pissa_niter_4", "olora"])
def test_product_and_base_are_pefts(kind, shape, use_rslora):
    W, r, alpha = weight(*shape), 6, 9
    layer = peft_layer(W, r, alpha, True, use_rslora=use_rslora)
    scaling = layer.scaling["default"]
    torch.manual_seed(5)
    layer.olora_init("default") if kind == "olora" else layer.pissa_init("default", kind)
    torch.manual_seed(5)
    A, B, base = initialize(kind, W, r, scaling)
    their_A, their_B, their_base = parts(layer)
    assert A.shape == their_A.shape and B.shape == their_B.shape
    assert relative_error(B @ A, their_B @ their_A) <= SVD  # the signs of single vectors are free
    assert relative_error(base, their_base) <= SVD
    assert relative_error(their_base, W) > 0.1  # a large part was taken out


@given(
    kind=st.sampled_from(["pissa", "pissa_niter_2", "olora"]),
    shape=st.tuples(st.integers(4, 40), st.integers(4, 40), st.integers(1, 4)),
    scaling=st.floats(0.1, 16),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_base_and_adapter_together_are_w(kind, shape, scaling, seed):
    out_features, in_features, r = shape
    W = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    A, B, base = initialize(kind, W, r, scaling)
    update = scaling * B.double() @ A.double()
    # The product is a sum of r terms in float32, then one subtraction: at most r + 3 roundings, each of at most
    # the sum of all magnitudes.
    largest = W.double().abs() + scaling * B.double().abs() @ A.double().abs()
    assert ((base.double() + update - W.double()).abs() <= (r + 3) * UNIT * largest).all()


def test_pissa_takes_the_largest_singular_values_and_shares_each_between_a_and_b():
    W, r, scaling = weight(), 5, 2.0
    A, B, base = initialize("pissa", W, r, scaling)
    S = 0.8 ** torch.arange(40.0)  # those of `weight`
    torch.testing.assert_close(scaling * B.T @ B, torch.diag(S[:r]), rtol=0, atol=SVD)
    torch.testing.assert_close(scaling * A @ A.T, torch.diag(S[:r]), rtol=0, atol=SVD)
    torch.testing.assert_close(torch.linalg.svdvals(base)[: 40 - r], S[r:], rtol=0, atol=SVD)


def test_more_subspace_iterations_come_nearer_to_pissa():
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))  # flat: the hard case
    exact = initialize("pissa", W, 8, 1.0)[2].norm()
    torch.manual_seed(0)
    left = [initialize(f"pissa_niter_{n}", W, 8, 1.0)[2].norm() / exact for n in (0, 2, 8, 32)]
    # Eckart and Young: no matrix of rank 8 leaves less than the exact one.
    assert all(1 - SVD <= after <= before for before, after in zip(left, left[1:], strict=False))
    assert left[0] > 1.02 > 1.002 > left[-1]


def test_olora_has_an_orthonormal_b():
    _, B, _ = initialize("olora", weight(), 6, 2.0)
    torch.testing.assert_close(B.T @ B, torch.eye(6), rtol=0, atol=SVD)


# ---- bases in 4 bits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("alpha", [8, 16], ids=["scaling 1", "scaling 2"])
def test_loftq_is_pefts_whose_layer_forgets_the_scaling(iterations, alpha, loftq_on_cpu):
    W, r = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), 8
    layer = peft_layer(W, r, alpha, "loftq", loftq_config=dict(loftq_bits=4, loftq_iter=iterations))
    their_A, their_B, their_base = parts(layer)
    scaling = layer.scaling["default"]
    A, B, base = initialize("loftq", W, r, scaling, loftq_iter=iterations)
    assert torch.equal(base, their_base)  # as every code is
    assert relative_error(scaling * B @ A, their_B @ their_A) <= SVD
    ours = (base + scaling * B @ A - W).norm()
    theirs = (their_base + scaling * their_B @ their_A - W).norm()
    uncorrected = (their_base - W).norm()
    assert ours < 0.95 * uncorrected
    # Twice the correction: E - 2 SVD_r(E) has the singular values of E, some of them with the other sign.
    assert theirs == pytest.approx(ours if scaling == 1 else uncorrected, rel=SVD)


def test_loftq_in_8_bits_is_pefts(loftq_on_cpu):
    W = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    layer = peft_layer(W, 8, 8, "loftq", loftq_config=dict(loftq_bits=8, loftq_iter=2))
    their_A, their_B, their_base = parts(layer)
    A, B, base = initialize(
        "loftq", W, 8, 1.0, lambda w: quantize_int8(w.half()), loftq_iter=2
    )  # as bitsandbytes
    assert relative_error(base.dequantize(torch.float32), their_base) <= 2 * UNIT  # (data absmax) / 127
    # What 8 bits lose is 1/250 of W, so that roundings of W's size are 250 times as large beside it.
    assert relative_error(B @ A, their_B @ their_A) <= 250 * SVD


def test_one_iteration_of_loftq_on_qloras_base_is_pefts_replace_lora_weights_loftq(loftq_on_cpu):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    W, r = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)), 8
    stored = bitsandbytes.nn.Params4bit(W.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    their_A, their_B = loftq_on_cpu._loftq_init_new(stored, W, num_bits=4, reduced_rank=r)
    A, B, base = initialize("loftq", W, r, 1.0, quantize_4bit)  # doubly quantized, as bitsandbytes does it
    assert isinstance(base, QuantizedTensor)
    assert torch.equal(base.packed, quantize_4bit(W).packed)  # QLoRA's base is unchanged
    assert relative_error(B @ A, their_B @ their_A) <= SVD


@pytest.mark.parametrize("kind", ["pissa", "olora", "pissa_niter_8"])
def test_a_quantized_base_holds_what_the_adapter_leaves(kind):
    W, r = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)), 8
    torch.manual_seed(0)
    A, B, base = initialize(kind, W, r, 2.0, quantize_4bit)
    left = W - 2.0 * B @ A
    assert torch.equal(base.packed, quantize_4bit(left).packed)
    assert torch.equal(dequantize_4bit(base), dequantize_4bit(quantize_4bit(left)))


def test_olora_on_a_base_in_4_bits_is_pefts():
    peft, bitsandbytes = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    W, r = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)), 8
    base = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    base.weight = bitsandbytes.nn.Params4bit(W.clone(), requires_grad=False, quant_type="nf4")
    model = nn.Sequential()
    model.add_module("q", base.to("cpu"))
    config = peft.LoraConfig(r=r, lora_alpha=16, target_modules=["q"], init_lora_weights="olora")
    layer = peft.get_peft_model(model, config).base_model.model.q
    their_A, their_B, packed = parts(layer)
    # The original weight is gone: QR, difference and the second quantization see what 4 bits kept of it.
    A, B, ours = initialize("olora", dequantize_4bit(quantize_4bit(W)), r, 2.0, quantize_4bit)
    assert relative_error(B @ A, their_B @ their_A) <= SVD
    assert torch.equal(ours.packed.flatten(), packed.flatten())
    theirs = bitsandbytes.functional.dequantize_4bit(packed, layer.base_layer.weight.quant_state)
    assert torch.equal(dequantize_4bit(ours), theirs)


def test_qpissa_loses_less_than_qlora_and_loftq_less_with_each_iteration():
    W, r = weight(64, 128), 16  # PiSSA's paper, section 4: the residual has less to lose
    start = (dequantize_4bit(quantize_4bit(W)) - W).norm()

    def lost(kind, **settings):
        A, B, base = initialize(kind, W, r, 2.0, quantize_4bit, **settings)
        return (base.dequantize(torch.float32) + 2.0 * B @ A - W).norm() / start

    assert lost("pissa") < 0.5
    fitted = [lost("loftq", loftq_iter=n) for n in (1, 2, 5)]
    assert 1 > fitted[0] > fitted[1] > fitted[2]


# ---- a whole model ------------------------------------------------------------------------------------------------


def model_with_widths_of_64():
    """bitsandbytes dequantizes other widths wrongly on a CPU (see test_linear)."""
    return transformers_model("llama-gqa", hidden_size=64, intermediate_size=128)


def both_started(kind, **settings):
    """The same model, here and in PEFT, after the same start on every layer of three kinds."""
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "v_proj", "down_proj"]
    plain = model_with_widths_of_64()
    ours = same_model_here(plain)
    config = dict(r=4, lora_alpha=4, target_modules=targets)
    theirs = peft.get_peft_model(
        plain, peft.LoraConfig(**config, init_lora_weights=kind, task_type="CAUSAL_LM", **settings)
    )
    add_lora(ours, LoraConfig(**config))
    loftq_iter = settings.get("loftq_config", {}).get("loftq_iter", 1)
    for layer in lora_layers(ours).values():
        W = layer.base_layer.weight.data
        A, B, base = initialize(kind, W, 4, 1.0, loftq_iter=loftq_iter)
        layer.lora_A["default"].data, layer.lora_B["default"].data = A, B
        layer.base_layer.weight.data = base
    return ours, theirs.eval()


STARTS = {"pissa": {}, "olora": {}, "loftq": dict(loftq_config=dict(loftq_bits=4, loftq_iter=2))}


@pytest.mark.parametrize("kind", STARTS)
def test_20_adamw_steps_from_a_part_of_w_are_pefts(kind, loftq_on_cpu):
    ours, theirs = both_started(kind, **STARTS[kind])
    # AdamW's first steps are the signs of gradients. A gradient that is zero but for rounding, 1e-9 here, may have
    # any sign: an eps far above that makes its steps small instead of full.
    how = dict(lr=1e-3, weight_decay=0.01, eps=1e-5)
    optimizer, reference = (
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **how)
        for model in (ours, theirs)
    )
    start = {name: layer.delta_weight("default").detach() for name, layer in lora_layers(ours).items()}
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        batch = torch.randint(0, 97, (2, 16), generator=generator)
        (causal_lm_loss(ours, batch, batch) / 30).backward()
        theirs(input_ids=batch, labels=batch).loss.backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    for name, layer in lora_layers(ours).items():
        expected = theirs.base_model.model.get_submodule(name).get_delta_weight("default").detach()
        assert relative_error(layer.delta_weight("default").detach(), expected) <= AFTER_20_STEPS, name
        assert relative_error(start[name], expected) > 20 * AFTER_20_STEPS, name  # it was trained


@torch.no_grad()
@pytest.mark.parametrize("kind", STARTS)
def test_an_adapter_that_peft_trained_from_a_part_of_w_is_applied_by_repeating_the_start(
    kind, loftq_on_cpu, tmp_path
):
    peft = pytest.importorskip("peft")
    ours, theirs = both_started(kind, **STARTS[kind])
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.add_(0.05 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    expected = theirs(ids(2, 12)).logits
    again = peft.PeftModel.from_pretrained(model_with_widths_of_64(), tmp_path).eval()
    assert relative_error(again(ids(2, 12)).logits, expected) <= TOLERANCE  # PEFT repeats it, too
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    plain = same_model_here(model_with_widths_of_64())
    for name, layer in lora_layers(ours).items():
        A, B = (tensors[f"base_model.model.{name}.{part}.weight"] for part in ("lora_A", "lora_B"))
        A0, B0 = (factor.detach().clone() for factor in layer.parts("default").values())
        layer.lora_A["default"].data, layer.lora_B["default"].data = A, B
        plain_A, plain_B, r, alpha = to_plain(A, B, A0, B0, 4)
        plain.get_submodule(name).weight += alpha / r * plain_B @ plain_A
    assert relative_error(ours(ids(2, 12)), expected) <= TOLERANCE
    # Beside the original W the plain adapter is the same function, but for what LoftQ's 4 bits lose.
    assert (relative_error(plain(ids(2, 12)), expected) <= TOLERANCE) == (kind != "loftq")


# ---- EVA -----------------------------------------------------------------------------------------------------------


def test_directions_of_inputs_are_those_of_pefts_incremental_pca():
    pca = pytest.importorskip("peft.utils.incremental_pca").IncrementalPCA(4, lowrank=True, lowrank_seed=42)
    directions, generator = InputDirections(4), torch.Generator().manual_seed(0)
    mixing = weight(32, 32) * 10
    for n in (20, 33, 8, 50):
        x = torch.randn(n, 32, generator=generator) @ mixing + 1.0
        pca.partial_fit(x)
        directions.update(x)
        torch.testing.assert_close(
            directions.directions.to(pca.components_.dtype), pca.components_, rtol=0, atol=SVD
        )
    A, B, base = initialize("eva", weight(24, 32), 4, 1.0, directions=directions.directions)
    assert torch.equal(A, directions.directions.float()) and not B.any() and base is None


def test_directions_of_inputs_converge_to_the_principal_components_of_all_of_them():
    generator, directions = torch.Generator().manual_seed(0), InputDirections(3)
    x = torch.randn(4000, 16, generator=generator) * (0.5 ** torch.arange(16))
    for batch in x.split(200):
        assert not directions.converged or directions.seen > 200
        directions.update(batch)
    assert directions.converged
    principal = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:3]
    assert (directions.directions.float() @ principal.T).diagonal().abs().min() > 0.999


def test_directions_of_a_models_layers_are_those_that_peft_finds():
    eva = pytest.importorskip("peft.tuners.lora.eva")
    import peft
    from torch.utils.data import DataLoader

    theirs, generator = transformers_model("llama-gqa"), torch.Generator().manual_seed(4)
    batches = [torch.randint(0, 97, (2, 40), generator=generator) for _ in range(6)]
    rows = [dict(input_ids=row, attention_mask=torch.ones_like(row)) for batch in batches for row in batch]
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj", "k_proj", "down_proj"], init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0, tau=0.9), task_type="CAUSAL_LM",
    )  # fmt: skip
    expected = eva.get_eva_state_dict(theirs, DataLoader(rows, batch_size=2), config, show_progress_bar=False)
    ours = same_model_here(theirs)
    add_lora(ours, LoraConfig(r=3, target_modules=["q_proj", "k_proj", "down_proj"]))
    found = input_directions(lora_layers(ours), 3, itertools.cycle(batches), ours, tau=0.9)
    assert found.keys() == expected.keys()
    for name, directions in found.items():
        # The inputs differ by float32 sums, 1e-6. A direction turns by that over the relative gap to the next
        # singular value, here above 1/20: an angle of 2e-5, a cosine of 1 - 2e-10.
        assert torch.cosine_similarity(directions.double(), expected[name].double()).min() > 1 - 1e-9, name
    assert not any(layer._forward_pre_hooks for layer in lora_layers(ours).values())
    assert torch.equal(found["model.layers.0.self_attn.q_proj"], found["model.layers.0.self_attn.k_proj"])


def test_directions_without_enough_tokens_are_refused():
    model = tiny_model()
    add_lora(model, LoraConfig(r=8))
    with pytest.raises(UserError, match="no batch has 8 tokens for model.layers.0.self_attn.q_proj"):
        input_directions(lora_layers(model), 8, [ids(1, 5)], model)


def test_eva_without_directions_is_refused():
    with pytest.raises(UserError, match="'eva' needs the directions"):
        initialize("eva", weight(), 4, 1.0)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["corda", "lora_ga", "mica"])
def test_kinds_that_are_not_supported_are_refused_by_name_and_reason(kind):
    with pytest.raises(UserError, match=f"'{kind}' is not supported, since it"):
        initialize(kind, weight(), 4, 1.0)


@pytest.mark.parametrize(
    "kind", ["pisa", "pissa_niter_", "pissa_niter_N", "pissa_niter_99999", "", False, "pissa_niter_٣"]
)
def test_kinds_that_nobody_knows_are_refused(kind):
    with pytest.raises(UserError, match="is not known"):
        check_kind(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_beyond_the_weights_sides_is_refused(kind):
    with pytest.raises(UserError, match=r"lora_rank 41 exceeds a side of a \(48, 40\) weight"):
        initialize(kind, weight(), 41, 1.0)


def test_loftq_without_an_iteration_is_refused():
    with pytest.raises(UserError, match="loftq_iter must be at least 1, not 0"):
        initialize("loftq", weight(), 4, 1.0, loftq_iter=0)


def test_every_kind_that_changes_the_base_is_tried_here():
    assert set(REPEATABLE) == set(STARTS)
    assert {kind.replace("4", "N") for kind in KINDS} == set(CHANGE_THE_BASE)
