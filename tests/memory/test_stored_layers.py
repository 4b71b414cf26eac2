"""A base that its author quantized is counted as it is in its files: to the byte, from their headers."""

import json
import re

import memory
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.prequantized import SKIPPED, quantized_by_transformers
from support.tiny import tiny_model

from minilora import LoraConfig, QuantConfig, add_lora, load_model, save_model
from minilora.formats.bnb import to_bitsandbytes
from minilora.formats.weights import StoredTensors, read_config
from minilora.int8 import quantize_int8
from minilora.linear import Linear4bit, Linear8bit, QuantizedLinear
from minilora.lora import trainable_parameters
from minilora.memory.activations import widths_of
from minilora.memory.ledger import memory_ledger
from minilora.memory.stored_layers import InFiles, dequantized_bytes, stored_layers
from minilora.quantization import dynamic_code, quantize_4bit, quantize_dynamic

LORA = LoraConfig(r=3, target_modules=("q_proj", "down_proj"))


def ledger_of(directory, **changes):
    in_files = StoredTensors(directory).quantized_layers()
    sizes = dict(batch_size=1, length=8, dtype=torch.bfloat16, recompute="off") | changes
    return memory_ledger(read_config(directory), LORA, QuantConfig(), **sizes, in_files=in_files)


def stored_bytes(model) -> tuple[int, int]:
    """Bytes of quantized weights with their scales, and of all others but the adapter's."""
    quantized = sum(m.weight.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
    return quantized, sum(p.nbytes for name, p in model.named_parameters() if ".lora_" not in name)


@pytest.mark.parametrize("skipped", SKIPPED)
@pytest.mark.parametrize("bits, double_quant", [(4, True), (4, False), (8, False)])
def test_weights_and_scales_are_counted_to_the_byte(tmp_path, bits, double_quant, skipped):
    options = dict(bnb_4bit_use_double_quant=double_quant)
    quantized_by_transformers(tmp_path / "base", bits, SKIPPED[skipped], **options)
    model = load_model(tmp_path / "base", QuantConfig(), torch.bfloat16)
    quantized, others = stored_bytes(model)
    counted = ledger_of(tmp_path / "base").bytes
    held = counted["linear weights"] + counted["scales"] + counted["embeddings, head, norms"]
    assert held == quantized + others
    plain = sum(m.weight.nbytes for m in model.modules() if type(m) is torch.nn.Linear)
    head = 0 if skipped == "nothing" else model.lm_head.weight.nbytes
    assert counted["linear weights"] + counted["scales"] == quantized + plain - head
    add_lora(model, LORA)
    assert counted["adapter"] == sum(p.nbytes for p in trainable_parameters(model).values())


def test_scales_in_nested_blocks_of_another_size_are_counted_as_the_float32_that_they_become(tmp_path):
    model = tiny_model(hidden_size=128)
    layer = model.model.layers[0].mlp.up_proj
    layer_name = "model.layers.0.mlp.up_proj"
    model.model.layers[0].mlp.up_proj = Linear4bit(quantize_4bit(layer.weight, blocksize=32))
    save_model(model, tmp_path)
    change_nested_blocks(tmp_path, f"{layer_name}.weight", 64)
    read = load_model(tmp_path).get_submodule(layer_name).weight
    assert read.nested_absmax is None and read.absmax.dtype == torch.float32
    in_files = StoredTensors(tmp_path).quantized_layers()
    assert in_files == {layer_name: InFiles(4, read.absmax.nbytes)}


def change_nested_blocks(directory, name: str, size: int):
    """Quantize a weight's scales again in nested blocks of `size`, as no version of bitsandbytes writes them."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    entries = to_bitsandbytes(quantize_4bit(torch.randn(40, 128), blocksize=32, double_quant=False), name)
    absmax, offset = entries[f"{name}.absmax"], entries[f"{name}.absmax"].mean()
    indices, nested = quantize_dynamic(absmax - offset, dynamic_code(), size)
    key = f"{name}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(entries[key].tolist())) | {
        "nested_blocksize": size, "nested_dtype": "float32", "nested_offset": offset.item(),
    }  # fmt: skip
    entries |= {f"{name}.absmax": indices, f"{name}.nested_absmax": nested}
    entries[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    save_file(tensors | entries, path)


def test_a_quantized_head_is_counted_where_its_logits_are_computed_twice(tmp_path):
    model = tiny_model()
    save_model(model, tmp_path / "plain")
    model.lm_head = Linear8bit(quantize_int8(model.lm_head.weight))
    save_model(model, tmp_path / "head")
    plain, head = (ledger_of(tmp_path / name, length=64, batch_size=4) for name in ("plain", "head"))
    losses = [ledger.moments["loss"]["hidden and logits"] for ledger in (plain, head)]
    adapted = memory_ledger(
        read_config(tmp_path / "plain"), LoraConfig(r=3, target_modules=("lm_head",)), None,
        batch_size=4, length=64, dtype=torch.bfloat16, recompute="off",
    )  # fmt: skip
    assert losses[0] < losses[1] == adapted.moments["loss"]["hidden and logits"]
    assert plain.flop_per_token == head.flop_per_token


def test_the_buffer_is_as_large_as_the_layer_that_needs_most():
    shapes = {"a": (64, 32), "b": (64, 64), "c": (16, 16)}
    widths = widths_of(tiny_model().config, torch.bfloat16, "cuda")
    for in_files, expected in (
        ({"a": InFiles(4, 0)}, 2 * 64 * 32),  # b stays plain, and is multiplied as it is
        ({"a": InFiles(4, 0), "c": InFiles(8, 0)}, max(2 * 64 * 32, 6 * 16 * 16)),
        ({"a": InFiles(4, 0), "b": InFiles(8, 0)}, 6 * 64 * 64),
        ({}, 0),
    ):
        layers = stored_layers(shapes, None, in_files, number=2)
        assert dequantized_bytes(layers, widths, None, use_dora=False) == expected


def test_memory_py_counts_a_local_directory_as_it_is(call, tmp_path):
    quantized_by_transformers(tmp_path / "base", 8, SKIPPED["some layers"])
    code, out, err = call(
        "memory", "--model", tmp_path / "base", "--gpu", "1", "--picture", tmp_path / "m.png"
    )
    assert code == 0 and "7 layers quantized as in the files" in out, err
    counted = ledger_of(tmp_path / "base", dtype=torch.float16, length=64).bytes["linear weights"]
    printed = re.search(r"^linear weights +(\S+)", out, re.M)[1]
    assert float(printed) == pytest.approx(counted / memory.GB, abs=0.0005)  # three digits are printed
