"""Gradient checkpointing: the same bits as without it, for less memory."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import FAMILIES, same_model_here, transformers_model
from support.pretended_gpu import PretendedGpu
from support.tiny import adapted, gradients, small_model
from torch import nn

from minilora import CausalLM, LoraConfig, UserError, ops, trainable_parameters
from minilora.backend import fused_lora, products
from minilora.backend.documents import PADDING
from minilora.formats.config_json import parse_config
from minilora.linear import Linear4bit, apply_each
from minilora.lora import LoraLinear
from minilora.loss import causal_lm_loss
from minilora.quantization import quantize_4bit
from minilora.recompute import POLICIES, checkpoint, set_recompute
from minilora.system.device import choose_placement
from minilora.testing import peak_memory


@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_gives_the_gradients_of_off_to_the_bit_with_dropout_on(family, quantized, policy):
    pytest.importorskip("transformers")
    model = adapted(same_model_here(transformers_model(family)), quantized=quantized)
    (loss, expected), (again, found) = gradients(model, "off"), gradients(model, policy)
    assert loss == again and expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(g.any() for g in expected.values())


@settings(deadline=None, max_examples=15)
@given(
    targets=st.lists(
        st.sampled_from("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()),
        min_size=1,
        unique=True,
    ),
    dropout=st.sampled_from([0.0, 0.3]),
    policy=st.sampled_from(POLICIES[1:]),
    shape=st.tuples(st.integers(1, 3), st.integers(2, 40)),
)
def test_so_it_is_for_any_targets_and_shapes(targets, dropout, policy, shape):
    model = small_model(targets=targets, dropout=dropout)
    (loss, expected), (again, found) = gradients(model, "off", *shape), gradients(model, policy, *shape)
    assert loss == again and all(torch.equal(found[name], expected[name]) for name in expected)


@settings(deadline=None, max_examples=15)
@given(
    policies=st.lists(st.sampled_from(POLICIES), min_size=4, max_size=4), dropout=st.sampled_from([0.0, 0.3])
)
def test_each_layer_may_follow_a_policy_of_its_own_and_no_bit_changes(policies, dropout):
    model = small_model(layers=4, dropout=dropout)
    (loss, expected), (again, found) = gradients(model, "off"), gradients(model, policies)
    assert loss == again and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_layer_is_run_again_if_its_own_policy_says_so(monkeypatch):
    model, runs = small_model(layers=4), []
    for i, layer in enumerate(model.model.layers):
        original = layer.rerun_for_backward
        monkeypatch.setattr(
            layer,
            "rerun_for_backward",
            lambda *a, i=i, run=original, **kind: runs.append(i) or run(*a, **kind),
        )
    gradients(model, ("full", "off", "selective", "off"))
    assert runs == [2, 0]


@pytest.mark.parametrize("policy", POLICIES)
def test_packed_documents_and_accumulated_gradients_are_the_same_too(policy):
    model = small_model()
    documents = torch.tensor([[0] * 5 + [1] * 7 + [2] * 4])
    results = []
    for used in ("off", policy):
        set_recompute(model, used)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        for _ in range(2):
            model(torch.arange(16).view(1, 16), document_ids=documents).square().sum().backward()
        results.append([p.grad for p in trainable_parameters(model).values()])
    assert all(map(torch.equal, *results))


def test_full_training_of_the_weights_is_the_same_too():
    config = dict(
        model_type="llama", vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2
    )
    model = CausalLM(parse_config(config | dict(num_attention_heads=4, max_position_embeddings=64)))
    model.init_weights(std=0.1)
    (loss, expected), (again, found) = gradients(model, "off"), gradients(model, "selective")
    assert loss == again and all(torch.equal(found[name], expected[name]) for name in expected)


def test_full_grows_with_the_layers_by_one_layer_input_each():
    B, T, D = 2, 128, 64

    def peak(layers: int, policy: str) -> int:
        model = small_model(layers, D, quantized=True)
        gradients(model, policy, B, T)  # gradients and scratch exist from here on
        return peak_memory(lambda: gradients_in_place(model))

    def gradients_in_place(model: CausalLM) -> None:
        ids = torch.zeros(B, T, dtype=torch.long)
        causal_lm_loss(model, ids, ids).backward()

    growth = {policy: (peak(16, policy) - peak(4, policy)) / 12 for policy in ("off", "selective", "full")}
    layer_input = 4 * B * T * D
    # Beside its input a layer keeps the state of the random numbers: 5 kB. New gradients are no growth: they
    # are there already.
    assert layer_input <= growth["full"] <= layer_input + 8192
    # Attention's output is as large as the input here (H K = D), log-sum-exp is B H T float32.
    assert growth["selective"] == pytest.approx(growth["full"] + layer_input + 4 * B * 4 * T, rel=0.02)
    assert growth["off"] > 10 * growth["full"]


def test_the_last_product_of_a_layer_is_not_computed_again(monkeypatch):
    counts, multiply = {"products": 0}, products.multiply

    def counted(*arguments):
        counts["products"] += 1
        multiply(*arguments)

    monkeypatch.setattr(fused_lora, "multiply", counted)
    model = small_model(layers=2, quantized=True)
    gradients(model, "off")
    assert counts["products"] == 2 * 7
    gradients(model, "full")
    assert counts["products"] == 2 * 7 + 2 * (7 + 6)


def test_selective_computes_attention_once(monkeypatch):
    counts = {"attentions": 0}

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            counts["attentions"] += (
                operation.overloadpacket.__name__ == "_scaled_dot_product_flash_attention_for_cpu"
            )
            return operation(*args, **(kwargs or {}))

    model = small_model(layers=3)
    for policy, expected in (("off", 3), ("full", 6), ("selective", 3)):
        counts["attentions"] = 0
        with Count():
            gradients(model, policy)
        assert counts["attentions"] == expected, policy


def frozen_in(dtype: torch.dtype, model: CausalLM) -> CausalLM:
    """The model as it is trained on a GPU: everything that is frozen in 16 bits, the adapter in float32."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


KERNELS = {
    "_flash_attention": ((9, 0), torch.bfloat16),
    "_efficient_attention": ((7, 5), torch.float16),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_policy_gives_the_gradients_of_off_with_each_fused_attention_of_a_gpu(kernel, policy, packed):
    capability, dtype = KERNELS[kernel]
    model = frozen_in(dtype, small_model(layers=2))
    documents = torch.tensor([[0] * 10 + [1] * 14, [0] * 20 + [PADDING] * 4]) if packed else None
    ids, results = torch.arange(48).view(2, 24), {}
    with PretendedGpu(capability) as gpu:
        model.cuda()
        with torch.no_grad():
            model(ids.cuda())  # the kernel has its trial
        for used in ("off", policy):
            set_recompute(model, used)
            model.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            with gpu.during() as record:
                causal_lm_loss(model, ids.cuda(), ids, documents).backward()
            results[used] = [p.grad for p in trainable_parameters(model).values()]
            attentions = {name: n for name, n in record.launches.items() if "attention" in name}
            forwards = 2 if used in ("off", "selective") else 4
            assert attentions == {f"{kernel}_forward": forwards, f"{kernel}_backward": 2}
        assert not gpu.faults
    assert all(map(torch.equal, *results.values())) and all(g.any() for g in results["off"])


def test_selective_takes_the_kept_outputs_though_another_kernel_would_be_chosen_in_the_second_run(
    monkeypatch,
):
    model, results, choose = small_model(layers=2, dropout=0.0), [], ops.fused_form
    ids = torch.arange(48).view(2, 24)
    for policy in ("off", "selective"):
        set_recompute(model, policy)
        model.zero_grad(set_to_none=True)
        loss = causal_lm_loss(model, ids, ids)
        monkeypatch.setattr(ops, "fused_form", lambda *_: pytest.fail("attention is computed again"))
        loss.backward()
        monkeypatch.setattr(ops, "fused_form", choose)
        results.append([p.grad for p in trainable_parameters(model).values()])
    assert all(map(torch.equal, *results)) and all(g.any() for g in results[0])


def test_gradients_come_through_a_frozen_embedding_from_the_first_layer_on():
    model = small_model()
    assert not model.model.embed_tokens.weight.requires_grad
    _, found = gradients(model, "full")
    assert all(found[name].any() for name in found if ".layers.0." in name)


def test_offload_on_a_cpu_is_full_and_says_so():
    model = small_model()
    assert [set_recompute(model, policy) for policy in POLICIES] == ["off", "selective", "full", "full"]
    assert set_recompute(model, ["off", "offload", "full"]) == ("off", "full", "full")
    with pytest.raises(UserError, match="'selektive' is not known; nearest: 'selective'"):
        set_recompute(model, "selektive")
    with pytest.raises(UserError, match="2 recompute policies are given for a model of 3 layers"):
        set_recompute(model, ("off", "full"))


def test_generation_with_a_cache_and_evaluation_recompute_nothing(monkeypatch):
    import minilora.model

    model = small_model()
    set_recompute(model, "full")
    monkeypatch.setattr(minilora.model, "checkpoint", None)
    with torch.no_grad():
        assert model(torch.zeros(1, 5, dtype=torch.long)).isfinite().all()  # and did not call None


# ---- checkpoint() by itself ----------------------------------------------------------------------------------------


def test_nested_arguments_and_several_outputs():
    def function(pair, options):
        (a, b), scale = pair, options["scale"][0]
        return a * b.sin() * scale, (a + b).relu(), b.long()

    def run(call):
        torch.manual_seed(0)
        a, b, scale = (torch.randn(5, requires_grad=True) for _ in range(3))
        first, second, whole = call(function, (a, b), {"scale": [scale], "name": "x", "none": None})
        assert not whole.is_floating_point()
        return torch.autograd.grad(first.sum() + (second**2).sum(), (a, b, scale))

    assert all(map(torch.equal, run(checkpoint), run(lambda function, *arguments: function(*arguments))))


def test_an_output_that_nothing_uses_and_an_input_that_needs_no_gradient():
    a, b = torch.randn(3, requires_grad=True), torch.randn(3)
    first, _ = checkpoint(lambda a, b: (a * b, a + b), a, b)
    first.sum().backward()
    assert torch.equal(a.grad, b) and b.grad is None


def test_a_checkpoint_within_a_checkpoint():
    layer = nn.Linear(4, 4)
    outer = nn.Sequential(layer)
    x = torch.randn(2, 4, requires_grad=True)
    plain = torch.autograd.grad(outer(outer(x)).square().sum(), (x, layer.weight))
    nested = checkpoint(lambda x: checkpoint(outer, checkpoint(outer, x)), x, parameters=layer.parameters())
    found = torch.autograd.grad(nested.square().sum(), (x, layer.weight))
    # Two uses of one weight, summed in another order: a rounding or two of the largest term.
    assert all((a - b).abs().max() <= 1e-6 * a.abs().max() for a, b in zip(plain, found, strict=True))


def test_backward_twice_through_a_kept_graph_doubles_the_gradient():
    x = torch.randn(4, requires_grad=True)
    y = checkpoint(lambda x: F.dropout(x.exp(), 0.5), x).sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * once)


def test_autocast_is_restored_in_backward():
    layer, x = nn.Linear(8, 8), torch.randn(3, 8, requires_grad=True)
    seen = []

    def function(x):
        seen.append(layer(x).dtype)
        return layer(x).float()

    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(function, x, parameters=layer.parameters())
    y.sum().backward()
    assert seen == [torch.bfloat16, torch.bfloat16] and layer.weight.grad is not None


@pytest.mark.parametrize("cached", [True, False])
def test_autocasts_cache_is_on_in_backward_if_it_was_in_forward(cached):
    x, seen = torch.randn(3, 8, requires_grad=True), []

    def function(x):
        seen.append(torch.is_autocast_cache_enabled())
        return x * 2

    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
        y = checkpoint(function, x)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=not cached):
        y.sum().backward()
    assert seen == [cached, cached]


def test_a_gradient_that_would_be_lost_is_an_error_and_not_a_silence():
    hidden, x = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    y = checkpoint(lambda x: x * hidden, x)
    with pytest.raises(
        RuntimeError, match=r"uses a tensor \(3,\) that needs a gradient and is neither an argument nor"
    ):
        y.sum().backward()


@pytest.mark.parametrize("needed", [False, True])
def test_only_inputs_that_backward_will_ask_for_are_offloaded(needed):
    """Below the lowest adapter, no layer has a backward."""
    offloaded = []
    offload = SimpleNamespace(put=lambda x: offloaded.append(x) or 0, take=lambda index: offloaded[index])
    x = torch.ones(3, requires_grad=needed)
    y = checkpoint(torch.exp, x, offload=offload)
    assert len(offloaded) == needed and y.requires_grad == needed
    if needed:
        y.sum().backward()
        assert torch.equal(x.grad, x.detach().exp())


def test_without_gradients_it_is_a_plain_call():
    with torch.no_grad():
        assert checkpoint(lambda x: x + 1, torch.ones(1)).item() == 2


@pytest.mark.parametrize("kind", ["plain", "4-bit", "LoRA on plain", "LoRA on 4-bit", "trained"])
def test_a_replayed_layer_has_the_gradients_of_the_layer_and_no_values(kind):
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    if kind != "trained":
        layer.requires_grad_(False)
    if "4-bit" in kind:
        layer = Linear4bit(quantize_4bit(layer.weight.data), layer.bias.data)
    if "LoRA" in kind:
        layer = LoraLinear(layer)
        layer.add_adapter("default", LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0))
        layer.active = "default"
        nn.init.normal_(layer.lora_B["default"])
    wanted = [torch.randn(5, 64, requires_grad=True), *(p for p in layer.parameters() if p.requires_grad)]
    dy = torch.randn(5, 32)
    expected = torch.autograd.grad(layer(wanted[0]), wanted, dy)
    (replayed,) = apply_each(wanted[0], layer, values=False)
    assert all(map(torch.equal, torch.autograd.grad(replayed, wanted, dy), expected))
    if kind in ("plain", "4-bit"):
        assert not replayed.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [16, 32])  # flash attention and cuDNN's take 16 bits alone
@pytest.mark.parametrize("policy", [*POLICIES[1:], ("full", "offload", "selective", "off", "offload", "off")])
def test_every_policy_gives_the_gradients_of_off_on_the_gpu(policy, bits, packed):
    """In some kernels, attention's backward adds in no fixed order: `off` is not quite equal to itself."""
    dtype = choose_placement().dtype if bits == 16 else torch.float32
    model = frozen_in(dtype, small_model(layers=6, quantized=True)).cuda()
    documents = (torch.arange(128, device="cuda") // 50).expand(2, 128) if packed else None
    results = []
    for used in ("off", "off", policy):
        assert set_recompute(model, used) == used
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        ids = torch.arange(256, device="cuda").view(2, 128) % 97
        causal_lm_loss(model, ids, ids, documents).backward()
        results.append([p.grad.clone() for p in trainable_parameters(model).values()])
    expected, again, found = results
    noise = max((a - b).norm() / a.norm() for a, b in zip(expected, again, strict=True))
    error = max((a - b).norm() / a.norm() for a, b in zip(expected, found, strict=True))
    assert error <= 4 * noise + torch.finfo(dtype).eps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_offload_keeps_no_layer_input_on_the_gpu():
    peaks = {}
    for policy in ("full", "offload"):
        model = small_model(layers=24, width=256, quantized=True).cuda()
        set_recompute(model, policy)
        ids = torch.zeros(4, 512, dtype=torch.long, device="cuda")
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            causal_lm_loss(model, ids, ids).backward()
        peaks[policy] = torch.cuda.max_memory_allocated()
    layer_input = 4 * 4 * 512 * 256
    assert peaks["full"] - peaks["offload"] > 20 * layer_input  # all but the two or three at hand
