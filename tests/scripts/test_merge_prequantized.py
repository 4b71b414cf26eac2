"""Merging into a base that is quantized in its files, or was in training: only what training saw, and what is said."""

import json
import re
import shutil

import pytest
import torch
from support.families import in_eval_mode, relative_error
from support.merging import adapted, make_adapter
from support.prequantized import (
    SKIPPED,
    dequantized_by_bitsandbytes,
    quantized_by_transformers,
    read_by_transformers,
)
from support.tiny import TOLERANCE, ids

from minilora import QuantConfig, load_adapter, load_model, quantize_4bit
from minilora.formats.weights import StoredTensors
from minilora.int8 import quantize_int8
from minilora.lora import lora_layers

BATCH = ids(2, 20)


def stored(directory) -> dict[str, torch.Tensor]:
    tensors = StoredTensors(directory)
    return {name: tensors.read(name, None, "cpu") for name in tensors.files}


def printed_row(out: str, row: str) -> float:
    """The worst error in a row of the printed table."""
    return float(re.search(rf"^  {row} +(\S+)", out, re.M)[1])


@pytest.fixture
def quantized_place(tmp_path, model_dir):
    """A function: a base that transformers quantized in `base`, an adapter of it in `adapter`, the base in
    transformers.
    """

    def make(bits=4, skipped=None, targets=("q_proj", "down_proj")):
        theirs = quantized_by_transformers(tmp_path / "base", bits, skipped)
        shutil.copy(model_dir / "tokenizer.model", tmp_path / "base")
        make_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=list(targets), use_rslora=False)
        return theirs

    return make


def with_adapter(theirs, place):
    peft = pytest.importorskip("peft")
    return in_eval_mode(peft.PeftModel.from_pretrained(theirs, place / "adapter"))


@pytest.mark.parametrize("skipped", SKIPPED)
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_it_is_the_model_of_peft_and_no_other_tensor_changes(merge, quantized_place, tmp_path, bits, skipped):
    theirs = quantized_place(bits, SKIPPED[skipped])
    dequantized = dequantized_by_bitsandbytes(theirs)
    code, out, err = merge("--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert code == 0, err
    before, after = stored(tmp_path / "base"), stored(tmp_path / "merged")
    layers = lora_layers(adapted(tmp_path))
    for name, weight in after.items():
        layer = name.removesuffix(".weight")
        if layer not in layers:
            assert torch.equal(weight, dequantized.get(layer, before[name])), name
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert f"the base model's files hold {bits} bits a weight in {len(dequantized)} layers" in out
    assert printed_row(out, "dequantized weights merged ") == 0
    plain = [name for name in layers if name not in dequantized]
    said = "adapted layers that training saw unquantized: " + "; ".join(plain) + ": exactly their weights"
    assert (said in out) == bool(plain) and ("training saw unquantized" in out) == bool(plain)
    expected = with_adapter(theirs, tmp_path)(input_ids=BATCH).logits
    for logits in (
        read_by_transformers(tmp_path / "merged")(BATCH).logits,
        load_model(tmp_path / "merged")(BATCH),
    ):
        assert relative_error(logits, expected) <= TOLERANCE


@pytest.mark.parametrize("skipped", SKIPPED)
@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_quantized_again_the_same_layers_are_quantized_and_only_the_adapted_ones_change(
    merge, quantized_place, tmp_path, bits, skipped
):
    dequantized = dequantized_by_bitsandbytes(quantized_place(bits, SKIPPED[skipped]))
    code, _, err = merge("--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", "--quantize")
    assert code == 0, err
    before, after = stored(tmp_path / "base"), stored(tmp_path / "merged")
    assert before.keys() == after.keys()
    layers = lora_layers(adapted(tmp_path))
    for name, tensor in after.items():
        if not any(name.startswith(f"{layer}.") for layer in layers):
            assert torch.equal(tensor, before[name]), name
    ours, theirs = load_model(tmp_path / "merged"), read_by_transformers(tmp_path / "merged")
    assert dequantized_by_bitsandbytes(theirs).keys() == dequantized.keys()
    for name, layer in layers.items():
        weight = dequantized.get(name, before.get(f"{name}.weight")) + layer.delta_weight("default")
        if name in dequantized:
            weight = quantize_int8(weight) if bits == 8 else quantize_4bit(weight)
            weight = weight.dequantize(torch.float32)
        mine = ours.get_submodule(name).weight
        assert torch.equal(mine.dequantize(torch.float32) if name in dequantized else mine, weight), name
    assert relative_error(ours(BATCH), theirs(BATCH).logits) <= TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
@torch.no_grad()
def test_an_adapter_on_a_quantized_head_is_merged_into_what_training_saw(
    merge, quantized_place, tmp_path, bits
):
    theirs = quantized_place(bits, [], targets=("lm_head", "q_proj"))
    assert merge("--adapter", tmp_path / "adapter", "--output", tmp_path / "merged")[0] == 0
    expected = with_adapter(theirs, tmp_path)(input_ids=BATCH).logits
    assert relative_error(load_model(tmp_path / "merged")(BATCH), expected) <= TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gguf_file_holds_the_merged_directory_s_tensors_in_float16(merge, quantized_place, tmp_path, bits):
    gguf = pytest.importorskip("gguf", reason="an extra: llama.cpp's files")
    quantized_place(bits, SKIPPED["some layers"])
    for output in ("merged", "merged.gguf"):
        assert merge("--adapter", tmp_path / "adapter", "--output", tmp_path / output)[0] == 0
    found = {
        t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "merged.gguf").tensors
    }
    expected = stored(tmp_path / "merged")
    for ours, theirs in (
        ("mlp.down_proj", "ffn_down"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.up_proj", "ffn_up"),
    ):
        for i in range(2):  # q and k have their rows in another order
            weight = expected[f"model.layers.{i}.{ours}.weight"].half()
            assert torch.equal(found[f"blk.{i}.{theirs}.weight"], weight), (ours, i)


@pytest.mark.parametrize("bits", [4, 8])
def test_options_that_ask_for_weights_the_files_do_not_hold_are_refused(
    merge, quantized_place, tmp_path, bits
):
    quantized_place(bits)
    for wrong in (("--into", "original"), ("--quantization_type", "nf4"), ("--double_quantization", "true")):
        code, _, err = merge("--adapter", tmp_path / "adapter", "--output", tmp_path / "merged", *wrong)
        assert code == 2 and f"hold {bits} bits a weight: leave out --into original" in err
        assert err.count("\n") == 1 and not (tmp_path / "merged").exists()


@torch.no_grad()
def test_a_base_that_only_its_config_calls_quantized_is_merged_as_the_plain_one_it_is(merge, place):
    path = place / "base" / "config.json"
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    path.write_text(json.dumps(json.loads(path.read_text()) | quantized))
    expected = adapted(place, QuantConfig())(BATCH)  # which loads it as it is
    code, out, err = merge("--adapter", place / "adapter", "--output", place / "merged")
    assert code == 0 and "training saw the original weights, unquantized" in out, err
    assert relative_error(load_model(place / "merged")(BATCH), expected) <= TOLERANCE
    assert merge("--adapter", place / "adapter", "--output", place / "again", "--quantize")[0] == 0
    assert read_by_transformers(place / "again")(BATCH).logits.isfinite().all()


# ---- a plain base that training quantized to 8 bits, or not at all -------------------------------------------


@torch.no_grad()
def test_a_run_in_8_bits_merges_into_the_int8_weights_that_it_saw(merge, place):
    (place / "adapter" / "training_config.yaml").write_text("quantization_bit: 8\n")
    expected = adapted(place, QuantConfig(bits=8))(BATCH)
    code, out, err = merge(
        "--adapter", place / "adapter", "--output", place / "merged", "--into", "dequantized"
    )
    assert code == 0 and "relative error against what training saw: int8\n" in out, err
    assert relative_error(load_model(place / "merged")(BATCH), expected) <= TOLERANCE
    code, out, _ = merge("--adapter", place / "adapter", "--output", place / "original")
    assert code == 0 and "unquantized" not in out and printed_row(out, "original weights merged") > 1e-4
    assert merge("--adapter", place / "adapter", "--output", place / "again", "--quantize")[0] == 0
    again = read_by_transformers(place / "again")
    assert all(type(layer).__name__ != "Linear4bit" for layer in again.modules())
    assert len(dequantized_by_bitsandbytes(again)) == 21
    assert relative_error(load_model(place / "again")(BATCH), again(BATCH).logits) <= TOLERANCE


@torch.no_grad()
def test_an_unquantized_run_that_is_written_quantized_is_compared_with_unquantized_weights(merge, place):
    (place / "adapter" / "training_config.yaml").write_text("quantization_bit: null\n")
    code, out, err = merge("--adapter", place / "adapter", "--output", place / "merged", "--quantize")
    assert code == 0, err
    assert "against what training saw: unquantized weights; quantized: nf4, double quantization\n" in out
    assert printed_row(out, "original weights merged ") == 0 and "dequantized weights merged" not in out
    base, worst = load_model(place / "base"), 0.0
    load_adapter(base, place / "adapter")
    for layer in lora_layers(base).values():
        weight = layer.base_layer.weight + layer.delta_weight("default")
        error = (quantize_4bit(weight).dequantize() - weight).norm() / weight.norm()
        worst = max(worst, error.item())
    assert printed_row(out, "original weights merged, quantized") == pytest.approx(worst, rel=0.051)
