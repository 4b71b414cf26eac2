"""Quantized layers and models against transformers + bitsandbytes + PEFT, and the tensors that they keep."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.families import in_eval_mode, relative_error, transformers_in_4_bits, transformers_model
from support.tiny import TOLERANCE, adapter_pairs, ids, randomize, tiny_model
from torch import nn

from minilora import (
    LoraConfig,
    QuantConfig,
    UserError,
    add_lora,
    load_model,
    merge_lora,
    save_model,
    set_adapter,
)
from minilora.backend import choice
from minilora.backend.scratch import scratch
from minilora.int8 import quantize_int8
from minilora.linear import Linear4bit, Linear8bit
from minilora.lora import lora_layers
from minilora.loss import causal_lm_loss
from minilora.quantization import gemv_4bit, quantize_4bit
from minilora.run.describe import count_parameters, describe_weights

QUANTS = {
    "nf4": QuantConfig(),
    "nf4-single": QuantConfig(double_quant=False),
    "fp4": QuantConfig(quant_type="fp4"),
    "int8": QuantConfig(bits=8),
}


def layer_of(kind: str, weight: torch.Tensor, bias: torch.Tensor | None = None):
    if kind == "int8":
        return Linear8bit(quantize_int8(weight), bias)
    return Linear4bit(quantize_4bit(weight, QUANTS[kind].quant_type, 64, QUANTS[kind].double_quant), bias)


@pytest.mark.parametrize("kind", QUANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
def test_a_quantized_layer_is_a_linear_layer_with_the_dequantized_weight(kind, dtype, biased):
    torch.manual_seed(0)
    weight, bias = torch.randn(33, 50), torch.randn(33) if biased else None
    layer = layer_of(kind, weight, bias)
    x = torch.randn(2, 7, 50, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 7, 33, dtype=dtype)
    wide = choice.product_dtype(x)  # float32 for bfloat16 on a CPU that cannot multiply it
    plain = nn.Linear(50, 33, bias=biased).to(wide)
    with torch.no_grad():
        plain.weight.copy_(layer.weight.dequantize(wide))
        if biased:
            plain.bias.copy_(bias)
    y, expected = layer(x), plain(x.to(wide)).to(dtype)
    assert torch.equal(y, expected)  # the same product of the same numbers, rounded once
    (dx,), (expected_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy)
    assert torch.equal(dx, expected_dx)


def test_bfloat16_is_multiplied_in_float32_only_on_a_cpu_without_instructions_for_it(monkeypatch):
    x = torch.zeros(1, dtype=torch.bfloat16)
    for can, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(choice, "_cpu_multiplies_bfloat16", lambda can=can: can)
        assert choice.product_dtype(x) == dtype
        assert (
            choice.product_dtype(x.half()) == torch.float16
            and choice.product_dtype(x.to("meta")) == torch.bfloat16
        )


def test_nothing_of_the_dequantized_weight_is_kept_for_backward():
    layer = layer_of("nf4", torch.randn(64, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 64, requires_grad=True))
    assert kept == []


@torch.no_grad()
def test_the_matrix_vector_product_equals_the_layer():
    torch.manual_seed(0)
    for double_quant, width in ((True, 50), (False, 50), (True, 64)):
        q, x = quantize_4bit(torch.randn(33, width), double_quant=double_quant), torch.randn(width)
        assert torch.equal(gemv_4bit(q, x), Linear4bit(q)(x))


def test_all_layers_share_one_scratch_buffer():
    big, small = (scratch(shape, torch.float32, torch.device("cpu")) for shape in ((64, 64), (8, 8)))
    assert big.data_ptr() == small.data_ptr() and big.shape == (64, 64) and small.shape == (8, 8)


def test_two_layers_in_a_row_have_right_gradients_though_they_share_the_buffer():
    torch.manual_seed(0)
    layers = [layer_of("nf4", torch.randn(40, 40)) for _ in range(3)]
    weights = [layer.weight.dequantize(torch.float32) for layer in layers]
    x = torch.randn(5, 40, requires_grad=True)
    y, expected = x, x
    for layer, weight in zip(layers, weights, strict=True):
        y, expected = layer(y).tanh(), F.linear(expected, weight).tanh()
    (dx,), (expected_dx,) = torch.autograd.grad(y.sum(), x), torch.autograd.grad(expected.sum(), x)
    assert torch.equal(y, expected) and torch.equal(dx, expected_dx)


def test_moving_the_dtype_of_a_model_leaves_the_bytes_alone():
    layer = layer_of("nf4", torch.randn(16, 16), torch.randn(16))
    packed = layer.weight.packed.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.weight.packed, packed) and layer.weight.absmax.dtype == torch.uint8
    assert layer.bias.dtype == torch.bfloat16


@pytest.fixture(params=["llama-gqa", "qwen2-bias-tied"])
def directory(request, tmp_path):
    # Widths are multiples of the block size: bitsandbytes 0.50's CPU kernel gives a block that spans two rows
    # a wrong scale.
    transformers_model(request.param, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", QUANTS)
@torch.no_grad()
def test_a_model_is_quantized_in_its_decoder_layers_only_and_computes_with_the_dequantized_weights(
    directory, kind
):
    model, plain = load_model(directory, QUANTS[kind]), load_model(directory)
    quantized = {name for name, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bit))}
    assert quantized == {
        name for name, m in plain.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    }
    for name in quantized:
        plain.get_submodule(name).weight.copy_(model.get_submodule(name).weight.dequantize(torch.float32))
    assert torch.equal(model(ids(2, 20)), plain(ids(2, 20)))
    assert count_parameters(model) == count_parameters(plain)
    assert "bits a weight" in describe_weights(model) and describe_weights(plain) == "float32"


def test_logits_and_lora_gradients_equal_transformers_bitsandbytes_and_peft(directory):
    peft = pytest.importorskip("peft")
    lora = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    config = peft.LoraConfig(task_type="CAUSAL_LM", **lora)
    theirs = in_eval_mode(peft.get_peft_model(transformers_in_4_bits(directory), config))
    ours = load_model(directory, QuantConfig())
    add_lora(ours, LoraConfig(**lora))
    randomize(ours)
    with torch.no_grad():
        for _, mine, other in adapter_pairs(ours, theirs):
            other.copy_(mine)
    batch = ids(2, 20, vocab=97)
    # Codes and scales are bit-identical (test_quantization.py). Only the order of float32 sums differs.
    assert relative_error(ours(batch), theirs(input_ids=batch).logits) <= TOLERANCE
    (causal_lm_loss(ours, batch, batch) / (2 * 19)).backward()
    theirs(input_ids=batch, labels=batch).loss.backward()
    for name, mine, other in adapter_pairs(ours, theirs):
        assert relative_error(mine.grad, other.grad) <= TOLERANCE, name


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@torch.no_grad()
def test_a_directory_quantized_by_transformers_gives_equal_logits_here_and_the_other_way_round(
    directory, tmp_path, quant_type, double_quant
):
    theirs = transformers_in_4_bits(directory, quant_type, double_quant)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert any(isinstance(m, Linear4bit) for m in ours.modules())
    expected = theirs(ids(2, 20)).logits
    assert relative_error(ours(ids(2, 20)), expected) <= TOLERANCE
    save_model(
        load_model(directory, QuantConfig(quant_type=quant_type, double_quant=double_quant)),
        tmp_path / "ours",
    )
    load = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained
    again = in_eval_mode(load(tmp_path / "ours", device_map={"": "cpu"}))
    assert relative_error(again(ids(2, 20)).logits, expected) <= TOLERANCE


@torch.no_grad()
def test_save_then_load_restores_every_bit_of_a_quantized_model(directory, tmp_path):
    model = load_model(directory, QuantConfig())
    save_model(model, tmp_path / "again")
    again = load_model(tmp_path / "again")
    assert torch.equal(again(ids(1, 9)), model(ids(1, 9)))


def test_truncated_missing_and_mixed_up_entries_are_refused_by_name(directory, tmp_path):
    from safetensors.torch import load_file, save_file

    save_model(load_model(directory, QuantConfig()), tmp_path / "q")
    path = tmp_path / "q" / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    state = f"{name}.quant_state.bitsandbytes__nf4"
    other = "model.layers.1.mlp.down_proj.weight"
    for change, said in (
        ({f"{name}.absmax": None}, f"not {name}.absmax"),
        ({state: None}, f"unexpected {name}.absmax"),
        ({state: whole[state][:-5].clone()}, f"{state} is truncated or corrupt"),
        ({name: whole[name][:-1].clone()}, f"{name} has"),
        ({f"{name}.absmax": whole[f"{name}.absmax"].float()}, f"{name}.absmax has"),
        (
            {key: whole[key.replace(name, other)].clone() for key in whole if key.startswith(name)},
            "config.json says",
        ),
    ):
        save_file({key: value for key, value in (whole | change).items() if value is not None}, path)
        with pytest.raises(UserError) as error:
            load_model(tmp_path / "q")
        assert said in str(error.value) and "\n" not in str(error.value), said


def test_lora_wraps_quantized_layers_unchanged_and_merging_into_them_is_refused():
    torch.manual_seed(0)
    model = tiny_model()
    for parent in model.model.layers:
        parent.self_attn.q_proj = layer_of("nf4", parent.self_attn.q_proj.weight)
    twin = copy.deepcopy(model)
    add_lora(model, LoraConfig(r=4, target_modules=["q_proj"]))
    assert torch.equal(model(ids(1, 9)), twin(ids(1, 9)))
    randomize(model)
    with pytest.raises(UserError, match="is quantized"):
        merge_lora(model)
    set_adapter(model, None)
    assert torch.equal(model(ids(1, 9)), twin(ids(1, 9)))
    assert all(isinstance(layer.base_layer, Linear4bit) for layer in lora_layers(model).values())


@torch.no_grad()
def test_the_compute_dtype_is_the_callers_not_the_files(directory):
    model = load_model(directory, QuantConfig(), dtype=torch.bfloat16)
    assert model(ids(1, 9)).dtype == torch.bfloat16
