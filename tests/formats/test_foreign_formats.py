"""Formats of weights that are not read: each is refused by its name, with what to take instead."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import tiny_model

from minilora import UserError, load_model, save_model

TAKE = "take the model that it was made from"
Q = "model.layers.0.self_attn.q_proj."


@pytest.fixture
def directory(tmp_path):
    save_model(tiny_model(), tmp_path)
    return tmp_path


def refusal(directory) -> str:
    with pytest.raises(UserError) as error:
        load_model(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


def change_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_method_that_transformers_knows_is_told_by_name(directory):
    """A new version of transformers may know more of them: then this table gets a line."""
    from transformers.utils.quantization_config import QuantizationMethod

    for method in QuantizationMethod:
        if method.value in ("bitsandbytes", "gemma"):  # gemma is a model's own
            continue
        change_config(directory, quantization_config={"quant_method": method.value, "bits": 4})
        message = refusal(directory)
        assert TAKE in message and f"{method.value!r}" not in message, (
            "a name for people, not the field's value"
        )


@pytest.mark.parametrize(
    "config, said",
    [
        (
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
            "quantization_config is of GPTQ;",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "quantization_config is of AWQ;"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            "quantization_config is of FP8 in blocks;",
        ),
        ({"quant_method": "exl2", "bits": 4.0}, "quantization_config is of ExLlamaV2;"),
        ({"quant_method": "brand-new"}, "quantization_config is of 'brand-new';"),
        ({"bits": 4}, "quantization_config is of an unnamed method;"),
    ],
)
def test_quantization_config_names_the_format(directory, config, said):
    change_config(directory, quantization_config=config)
    assert said in refusal(directory) and TAKE in refusal(directory)


def test_mlx_and_old_compressed_tensors_have_a_field_of_their_own(directory):
    change_config(directory, quantization={"group_size": 64, "bits": 4})
    assert "quantization is of MLX;" in refusal(directory)
    change_config(directory, quantization=None, compression_config={"format": "pack-quantized"})
    assert "compression_config is of compressed-tensors (vLLM);" in refusal(directory)


# What each program writes beside, or in the place of, q_proj.weight.
TENSORS = {
    "GPTQ": "qweight qzeros scales g_idx",
    "AWQ": "qweight qzeros scales",
    "compressed-tensors (vLLM)": "weight_packed weight_scale weight_shape",
    "FP8 in blocks": "weight weight_scale_inv",
    "NVIDIA's ModelOpt": "weight weight_scale weight_scale_2 input_scale",
    "scaled weights such as FP8": "weight weight_scale",
    "MLX": "weight scales biases",
    "HQQ": "W_q meta",
    "EETQ": "weight weight_scales",
    "AQLM": "codebooks codes scales",
    "VPTQ": "centroids indices",
    "QuIP#": "Qidxs SU SV",
    "ExLlamaV2": "q_weight q_scale q_groups q_invperm",
    "ExLlamaV3": "trellis suh svh",
    "Quanto": "weight._data weight._scale",
}


@pytest.mark.parametrize("name", TENSORS)
def test_the_names_of_tensors_tell_the_format_where_no_config_does(directory, name):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors[Q + "weight"]
    save_file(tensors | {Q + leaf: torch.zeros(2) for leaf in TENSORS[name].split()}, path)
    message = refusal(directory)
    assert f", as in {name}; only bitsandbytes" in message and Q in message and TAKE in message


@pytest.mark.parametrize("has_config", [True, False])
def test_a_directory_of_gguf_files_is_told(directory, has_config):
    (directory / "model.safetensors").rename(directory / "model-Q4_K_M.gguf")
    if not has_config:
        (directory / "config.json").unlink()
    message = refusal(directory)
    assert "model-Q4_K_M.gguf is GGUF, llama.cpp's format" in message and TAKE in message


def test_metas_own_files_are_told(directory):
    (directory / "model.safetensors").rename(directory / "consolidated.00.pth")
    assert "consolidated.00.pth has a layout of its own: take the model in Hugging Face's" in refusal(
        directory
    )
