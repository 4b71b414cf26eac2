"""config.json in both spellings: honoured, known to change nothing, or refused by name."""

import json

import pytest
from support.families import FAMILIES, config_dict, transformers_model

from minilora import LoraConfig, UserError
from minilora.formats.config_json import parse_config, read_config_file, to_config_json

LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=32,
             num_hidden_layers=2, num_attention_heads=4)  # fmt: skip
QWEN = LLAMA | dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", num_key_value_heads=2, num_hidden_layers=4
)
LLAMA3_SCALING = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_written_by_transformers_is_read_and_written_back_as_the_same_model(family):
    config = parse_config(config_dict(transformers_model(family)))
    assert parse_config(to_config_json(config)) == config


def test_the_old_and_the_new_spelling_give_the_same_model():
    old = LLAMA | dict(rope_theta=5e5, rope_scaling=LLAMA3_SCALING, torch_dtype="bfloat16")
    older = LLAMA | dict(
        rope_theta=5e5, rope_scaling={"type": "llama3"} | LLAMA3_SCALING, torch_dtype="bfloat16"
    )
    new = LLAMA | dict(rope_parameters=LLAMA3_SCALING | {"rope_theta": 5e5}, dtype="bfloat16")
    assert parse_config(old) == parse_config(older) == parse_config(new)
    assert parse_config(new).dtype == "bfloat16"


def test_absent_and_null_key_value_heads_mean_the_same_as_in_transformers():
    assert parse_config(LLAMA).num_key_value_heads == 4
    mistral = LLAMA | dict(
        architectures=["MistralForCausalLM"], model_type="mistral", num_attention_heads=16, hidden_size=64
    )
    assert parse_config(mistral).num_key_value_heads == 8
    assert parse_config(mistral | dict(num_key_value_heads=None)).num_key_value_heads == 16
    assert parse_config(mistral).layer_windows == (4096, 4096)
    assert parse_config(mistral | dict(sliding_window=None)).layer_windows == (None, None)


def test_windows_follow_use_sliding_window_max_window_layers_and_layer_types():
    windows = lambda **changes: parse_config(QWEN | changes).layer_windows  # noqa: E731
    assert windows(sliding_window=8) == (None,) * 4
    assert windows(sliding_window=8, use_sliding_window=True, max_window_layers=3) == (None, None, None, 8)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert windows(sliding_window=8, use_sliding_window=True, layer_types=kinds) == (None, 8, None, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="gemma2"), "model_type 'gemma2'"),
        (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "'yarn'"),
        (dict(rope_scaling=dict(rope_type="linear")), "lacks factor"),
        (dict(rope_scaling=dict(rope_type="linear", factor=2.0, beta_fast=32)), "beta_fast"),
        (
            dict(rope_parameters=dict(rope_theta=1e4, rope_type="default", partial_rotary_factor=0.5)),
            "partial_rotary_factor",
        ),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(attention_dropout=0.1), "attention_dropout"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
        (dict(residual_multiplier=0.22), "residual_multiplier"),
        (dict(num_experts=8), "num_experts"),
        (dict(sliding_window=128), "sliding_window"),
        (dict(layer_types=["sliding_attention"] * 2), "layer_types"),
        (dict(auto_map={"AutoModelForCausalLM": "modeling_x.X"}), "auto_map"),
        (dict(quantization_config={"quant_method": "gptq"}), "quantization_config is of gptq"),
        (
            dict(quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
            "bitsandbytes in 8 bits",
        ),
        (dict(num_key_value_heads=3), "num_key_value_heads = 3"),
        (dict(head_dim=5), "head_dim = 5"),
        (dict(hidden_size=0), "hidden_size"),
        (dict(hidden_size="16"), "hidden_size"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_name(changes, message):
    with pytest.raises(UserError) as error:
        parse_config(LLAMA | changes)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_size_is_named():
    with pytest.raises(UserError, match="intermediate_size is missing"):
        parse_config({k: v for k, v in LLAMA.items() if k != "intermediate_size"})


def test_bookkeeping_fields_and_switched_off_features_are_accepted():
    harmless = dict(initializer_range=0.02, use_cache=True, pretraining_tp=1, transformers_version="4.40.0", _name_or_path="x",
                    rope_interleaved=False, final_logit_softcapping=None, is_llama_config=True, temperature=0.6)  # fmt: skip
    assert parse_config(LLAMA | harmless) == parse_config(LLAMA)


def test_a_broken_config_file_names_the_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{not json")
    with pytest.raises(UserError, match="config.json is not valid JSON"):
        read_config_file(path)
    path.write_text(json.dumps(LLAMA | dict(hidden_act="gelu")))
    with pytest.raises(UserError, match="config.json: hidden_act"):
        read_config_file(path)


@pytest.mark.parametrize(
    "field, value",
    [("r", 0), ("r", -1), ("r", 2.5), ("lora_alpha", 0), ("lora_dropout", 1.0), ("target_modules", [])],
)
def test_an_impossible_adapter_is_refused(field, value):
    with pytest.raises(UserError):
        LoraConfig(**{field: value})


def test_scaling_is_alpha_over_r_and_rslora_over_its_root():
    assert LoraConfig(r=16, lora_alpha=32).scaling == 2.0
    assert LoraConfig(r=16, lora_alpha=32, use_rslora=True).scaling == 8.0


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="nearest: 'standard_r8_qkvo'"):
        LoraConfig.preset("standard_r8_qkv")
