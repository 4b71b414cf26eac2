"""config.json in both spellings: honoured, known to change nothing, or refused by name."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import FAMILIES, config_dict, relative_error, transformers_model

from minilora import CausalLM, LoraConfig, UserError
from minilora.config import RopeConfig
from minilora.formats.config_fields import CONFIG_FIELDS, ROPE_FIELDS
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


@pytest.mark.parametrize("mlp_bias", [False, True])
@pytest.mark.parametrize("attention_bias", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Ministral", "Qwen2", "Qwen3", "SmolLM3"])
def test_biases_are_where_transformers_has_them_whatever_the_fields_say(family, attention_bias, mlp_bias):
    import transformers

    sizes = dict(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    sizes |= dict(num_key_value_heads=2, head_dim=4, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    fields = dict(attention_bias=attention_bias, mlp_bias=mlp_bias)
    theirs = getattr(transformers, family + "ForCausalLM")(
        getattr(transformers, family + "Config")(**sizes | fields)
    )
    with torch.device("meta"):
        ours = CausalLM(parse_config(config_dict(theirs) | fields))
    expected = {name: tuple(p.shape) for name, p in theirs.named_parameters()}
    assert {name: tuple(p.shape) for name, p in ours.named_parameters()} == expected
    assert parse_config(to_config_json(ours.config)) == ours.config


CLASSES = dict(qwen2="Qwen2Config", qwen3="Qwen3Config", ministral="MinistralConfig", smollm3="SmolLM3Config")
KINDS = st.sampled_from(["full_attention", "sliding_attention"])


@settings(deadline=None, max_examples=150)
@given(
    model_type=st.sampled_from([*CLASSES]),
    layers=st.integers(1, 5),
    window=st.sampled_from(["absent", None, 1, 6]),
    switch=st.sampled_from(["absent", False, True]),
    first=st.sampled_from(["absent", 0, 2, 4, 9]),
    types=st.none() | st.lists(KINDS, min_size=5, max_size=5),
    rope=st.none() | st.lists(st.integers(0, 1), min_size=5, max_size=5),
    interval=st.sampled_from(["absent", 1, 2, 4]),
)
def test_windows_and_rope_of_every_layer_are_those_of_transformers(
    model_type, layers, window, switch, first, types, rope, interval
):
    transformers = pytest.importorskip("transformers")
    raw = dict(sliding_window=window, use_sliding_window=switch, max_window_layers=first)
    raw |= dict(no_rope_layers=rope, no_rope_layer_interval=interval) if model_type == "smollm3" else {}
    raw = {name: value for name, value in raw.items() if value != "absent"}
    raw |= dict(layer_types=types and types[:layers], num_hidden_layers=layers, head_dim=4, pad_token_id=None)
    raw = LLAMA | raw | dict(model_type=model_type, num_key_value_heads=2, architectures=None)
    theirs = getattr(transformers, CLASSES[model_type]).from_dict({**raw})
    switched_off = model_type == "smollm3" and switch is not True
    narrow = [kind == "sliding_attention" for kind in theirs.layer_types]
    if any(narrow) and (theirs.sliding_window is None or switched_off):
        # transformers fails on such a mask. SmolLM3's has the window in its mask and not in its attention.
        with pytest.raises(UserError, match="layer_types holds 'sliding_attention', and there is no window"):
            parse_config(raw)
        return
    config = parse_config(raw)
    assert config.layer_windows == tuple(theirs.sliding_window if is_narrow else None for is_narrow in narrow)
    assert config.layer_rope == tuple(map(bool, getattr(theirs, "no_rope_layers", ())))[:layers]
    assert parse_config(to_config_json(config)) == config


def test_a_mistral_with_layer_types_is_read_as_transformers_auto_model_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    raw = config_dict(transformers_model("mistral-window")) | dict(layer_types=kinds)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert type(theirs).__name__ == "MinistralForCausalLM"
    ours = CausalLM(read_config_file(tmp_path / "config.json")).eval()
    ours.load_state_dict(theirs.state_dict())
    assert ours.config.layer_windows == (7, None, 7)
    assert parse_config(to_config_json(ours.config)) == ours.config
    tokens = torch.arange(40).unsqueeze(0)
    with torch.no_grad():  # float32 sums in another order, as in test_model
        assert relative_error(ours(tokens), theirs(tokens).logits) <= 1e-5


def test_absent_fields_mean_the_same_as_in_transformers():
    transformers = pytest.importorskip("transformers")
    classes = CLASSES | dict(llama="LlamaConfig", mistral="MistralConfig")
    for model_type, name in classes.items():
        theirs = getattr(transformers, name)()
        sizes = dict(hidden_size=128, num_attention_heads=32, num_hidden_layers=1)
        ours = parse_config(LLAMA | sizes | dict(model_type=model_type, architectures=None))
        same = ["max_position_embeddings", "tie_word_embeddings", "rms_norm_eps"]
        assert all(getattr(ours, field) == getattr(theirs, field) for field in same)
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"] and ours.rope.rope_type == "default"
        if model_type != "llama":  # whose default is as many as query heads
            assert ours.num_key_value_heads == theirs.num_key_value_heads
        window = getattr(theirs, "sliding_window", None)
        assert ours.layer_windows == (window,)


YARN, LONGROPE = (
    dict(rope_type="yarn", factor=4.0),
    dict(rope_type="longrope", short_factor=[1.0, 1], long_factor=[2, 3]),
)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rope_scaling=dict(rope_type="yarn")), "rope_scaling of type 'yarn' lacks factor"),
        (dict(rope_scaling=dict(rope_type="dynamic", factor=None)), "of type 'dynamic' lacks factor"),
        (dict(rope_scaling=dict(rope_type="longrope")), "'longrope' lacks long_factor, short_factor"),
        (dict(rope_parameters=YARN | dict(long_factor=[2.0])), "rope_parameters.long_factor = [2.0] is not"),
        (dict(rope_scaling=YARN | dict(beta_fast=-1)), "rope_scaling.beta_fast must be a number from 0"),
        (
            dict(rope_scaling=YARN | dict(attention_factor=0)),
            "attention_factor must be a number above 0 and up to",
        ),
        (dict(rope_scaling=YARN | dict(truncate=None)), "rope_scaling.truncate must be true or false"),
        (dict(rope_scaling=YARN | dict(mscale=float("inf"))), "rope_scaling.mscale must be a number"),
        (dict(rope_scaling=YARN, rope_theta=1), "'yarn': rope_theta must be above 1"),
        (
            dict(rope_scaling=dict(type="yarn", factor=None, original_max_position_embeddings=4096)),
            "'yarn': max_position_embeddings = 2048 is below original_max_position_embeddings = 4096",
        ),
        (dict(rope_scaling=dict(type="dynamic", factor=2), head_dim=2), "head_dim must be at least 4, not 2"),
        (
            dict(rope_scaling=LONGROPE | dict(long_factor=[1.0])),
            "long_factor has 1 numbers for head_dim / 2 = 2",
        ),
        (dict(rope_scaling=LONGROPE | dict(short_factor=[1, 0])), "short_factor must be a list of numbers"),
        (dict(rope_scaling=LONGROPE | dict(short_factor=[1, "2"])), "short_factor must be a list of numbers"),
        (
            dict(rope_scaling=LONGROPE | dict(short_factor=[1, True])),
            "short_factor must be a list of numbers",
        ),
        (
            dict(rope_scaling=LONGROPE | dict(original_max_position_embeddings=1)),
            "original_max_position_embeddings must be at least 2, not 1",
        ),
        (dict(no_rope_layers=[1, 0]), "no_rope_layers = [1, 0] is a field of model_type 'smollm3'"),
        (dict(model_type="smollm3", no_rope_layers=[1]), "no_rope_layers has 1 entries"),
        (dict(model_type="smollm3", no_rope_layers=[1, 2]), "no_rope_layers must be a list of whole numbers"),
        (
            dict(model_type="smollm3", no_rope_layer_interval=0),
            "no_rope_layer_interval must be a whole number",
        ),
        (dict(model_type="mistral", layer_types=["full_attention"]), "layer_types has 1 entries"),
        (
            dict(model_type="mistral", layer_types=["chunked_attention"] * 2),
            "layer_types holds ['chunked_att",
        ),
    ],
)
def test_rope_and_layers_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(UserError) as error:
        parse_config(LLAMA | dict(architectures=None, num_key_value_heads=4) | changes)
    assert message in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="gemma2"), "model_type = 'gemma2'"),
        (dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(rope_scaling=dict(rope_type="ntk", factor=4.0)), "'ntk'"),
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
        (dict(quantization_config={"quant_method": "gptq"}), "quantization_config is of GPTQ"),
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


def test_an_unknown_field_is_accepted_by_name_and_the_error_names_the_key():
    raw = LLAMA | dict(flavour="vanilla", colour="blue")
    with pytest.raises(
        UserError, match="unknown field flavour = 'vanilla'.* name it in accept_config_fields"
    ):
        parse_config(raw, ["colour"])
    assert parse_config(raw, ["flavour", "colour"]) == parse_config(LLAMA)


@pytest.mark.parametrize("name", ["partial_rotary_factor", "sliding_window", "hidden_act", "model_type"])
def test_no_declaration_overrides_a_field_whose_meaning_is_known(name):
    for raw in (LLAMA, LLAMA | {name: "anything"}):
        with pytest.raises(UserError, match=f"{name}"):
            parse_config(raw, [name])
    with pytest.raises(UserError, match="accept_config_fields names partial_rotary_factor, whose meaning is"):
        parse_config(LLAMA | {"partial_rotary_factor": 1.0}, ["partial_rotary_factor"])


def test_a_declaration_of_a_field_that_is_not_there_is_a_slip():
    with pytest.raises(UserError, match="accept_config_fields names flavor, a field that is not there"):
        parse_config(LLAMA | dict(flavour="vanilla"), ["flavour", "flavor"])


def test_a_field_that_is_known_to_change_nothing_may_be_declared_all_the_same():
    """Settings of an older run name it; it was unknown then."""
    assert parse_config(LLAMA | dict(use_cache=True), ["use_cache"]) == parse_config(LLAMA)


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


# ---- files as they are on the hub, shortened by what changes nothing -----------------------------------------

_LLAMA = dict(architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, attention_dropout=0.0,
              hidden_act="silu", pretraining_tp=1, rope_scaling=None, use_cache=True)  # fmt: skip
_MISTRAL = dict(architectures=["MistralForCausalLM"], model_type="mistral", attention_dropout=0.0, hidden_act="silu",
                hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-05, bos_token_id=1,
                eos_token_id=2, tie_word_embeddings=False, torch_dtype="bfloat16")  # fmt: skip
_QWEN2 = dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", attention_dropout=0.0, hidden_act="silu",
              hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
              num_key_value_heads=4, max_window_layers=28, rms_norm_eps=1e-06, use_sliding_window=False,
              tie_word_embeddings=False, torch_dtype="bfloat16")  # fmt: skip
_LLAMA31_ROPE = dict(factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0,
                     original_max_position_embeddings=8192, rope_type="llama3")  # fmt: skip
HUB = {
    "SmolLM2-135M": (
        _LLAMA | dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                      num_attention_heads=9, num_key_value_heads=3, rms_norm_eps=1e-05, rope_theta=100000,
                      rope_interleaved=False, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
                      max_position_embeddings=8192, is_llama_config=True, torch_dtype="bfloat16"),
        dict(head_dim=64, num_key_value_heads=3, eos_token_ids=(0,), dtype="bfloat16"),
    ),
    "TinyLlama-1.1B": (
        _LLAMA | dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                      num_attention_heads=32, num_key_value_heads=4, rms_norm_eps=1e-05, rope_theta=10000.0,
                      tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
                      max_position_embeddings=2048, torch_dtype="bfloat16"),
        dict(head_dim=64, tie_word_embeddings=False),
    ),
    "Llama-2-7b": (
        _LLAMA | dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-05,
                      tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
                      max_position_embeddings=4096, torch_dtype="float16"),
        dict(dtype="float16", max_position_embeddings=4096),
    ),
    "the first Llama, as converted in 2023": (
        dict(architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=32000, hidden_size=4096,
             intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-06,
             bos_token_id=0, eos_token_id=1, pad_token_id=-1, max_sequence_length=2048, hidden_act="silu",
             max_position_embeddings=2048, torch_dtype="float16", transformers_version="4.28.1"),
        dict(num_key_value_heads=32, pad_token_id=None),
    ),
    "Llama-3.1-8B-Instruct": (
        _LLAMA | dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-05, rope_theta=500000.0,
                      rope_scaling=_LLAMA31_ROPE, mlp_bias=False, bos_token_id=128000,
                      eos_token_id=[128001, 128008, 128009], max_position_embeddings=131072,
                      tie_word_embeddings=False, torch_dtype="bfloat16"),
        dict(eos_token_ids=(128001, 128008, 128009)),
    ),
    "Mistral-7B-v0.1": (
        _MISTRAL | dict(vocab_size=32000, rope_theta=10000.0, sliding_window=4096),
        dict(layer_windows=(4096,) * 32),
    ),
    "Mistral-7B-Instruct-v0.2": (
        _MISTRAL | dict(vocab_size=32000, rope_theta=1000000.0, sliding_window=None),
        dict(layer_windows=(None,) * 32),
    ),
    "Mistral-7B-v0.3": (
        _MISTRAL | dict(vocab_size=32768, rope_theta=1000000.0, sliding_window=None, head_dim=128),
        dict(vocab_size=32768),
    ),
    "Qwen2-7B-Instruct": (
        _QWEN2 | dict(vocab_size=152064, bos_token_id=151643, eos_token_id=151645, rope_theta=1000000.0,
                      sliding_window=131072, max_position_embeddings=32768),
        dict(layer_windows=(None,) * 28, qkv_bias=True),
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (
        _QWEN2 | dict(vocab_size=152064, bos_token_id=151643, eos_token_id=151643, rope_theta=10000,
                      sliding_window=4096, max_position_embeddings=131072, use_mrope=False),
        dict(layer_windows=(None,) * 28, max_position_embeddings=131072),
    ),
    "Qwen2.5-7B-Instruct, with its card's YaRN": (
        _QWEN2 | dict(vocab_size=152064, bos_token_id=151643, eos_token_id=151645, rope_theta=1000000.0,
                      sliding_window=131072, max_position_embeddings=32768,
                      rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn")),
        dict(rope=RopeConfig(1000000.0, "yarn", 4.0, original_max_position_embeddings=32768,
                             attention_factor=1 + 0.1 * math.log(4))),
    ),
    "Ministral-8B-Instruct-2410": (
        _MISTRAL | dict(vocab_size=131072, rope_theta=100000000.0, sliding_window=32768, head_dim=128,
                        intermediate_size=12288, num_hidden_layers=36),
        dict(layer_windows=(32768,) * 36),
    ),
    "SmolLM3-3B": (
        dict(architectures=["SmolLM3ForCausalLM"], model_type="smollm3", vocab_size=128256, hidden_size=2048,
             intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=4,
             attention_bias=False, attention_dropout=0.0, mlp_bias=False, hidden_act="silu", use_cache=False,
             max_position_embeddings=65536, max_window_layers=28, no_rope_layer_interval=4,
             no_rope_layers=[1, 1, 1, 0] * 9, layer_types=["full_attention"] * 36, rope_scaling=None,
             rope_theta=5000000.0, sliding_window=None, use_sliding_window=False, rms_norm_eps=1e-06,
             pretraining_tp=2, bos_token_id=128000, eos_token_id=128012, pad_token_id=128004,
             torch_dtype="bfloat16"),
        dict(layer_rope=(True, True, True, False) * 9, tie_word_embeddings=True, head_dim=128,
             layer_windows=(None,) * 36),
    ),
    "Qwen3-0.6B": (
        dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=151936, hidden_size=1024,
             intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
             head_dim=128, attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
             eos_token_id=151645, hidden_act="silu", max_position_embeddings=40960, max_window_layers=28,
             rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, sliding_window=None,
             use_sliding_window=False, tie_word_embeddings=True, torch_dtype="bfloat16"),
        dict(head_dim=128, qk_norm=True, tie_word_embeddings=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_a_file_of_the_hub_is_read_as_it_is_meant(name):
    raw, expected = HUB[name]
    config = parse_config(json.loads(json.dumps(raw)))
    assert {field: getattr(config, field) for field in expected} == expected
    for field in "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split():
        assert getattr(config, field) == raw[field]
    theta = raw.get("rope_theta", 10000)
    assert config.rope.theta == theta and type(config.rope.theta) is float
    if raw.get("rope_scaling") == _LLAMA31_ROPE:
        assert config.rope == RopeConfig(theta=500000.0, **_LLAMA31_ROPE)


# ---- files that nobody would write by hand -------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("num_hidden_layers", 10**7, "num_hidden_layers must be a whole number from 1 to 10,000, not 10000000"),
        ("hidden_size", 10**18, "hidden_size must be a whole number from 1 to 1,000,000, not 10000000000"),
        ("vocab_size", -5, "vocab_size must be a whole number from 1 to 10,000,000, not -5"),
        ("hidden_size", 16.0, "hidden_size must be a whole number from 1 to 1,000,000, not 16.0"),
        ("num_hidden_layers", True, "num_hidden_layers must be a whole number from 1 to 10,000, not True"),
        ("rope_theta", 0, "rope_theta must be a number from 1 to 1,000,000,000,000 or null, not 0"),
        ("rope_theta", True, "rope_theta must be a number from 1"),
        ("rope_theta", float("nan"), "rope_theta must be a number from 1"),
        ("rope_theta", float("inf"), "rope_theta must be a number from 1"),
        ("rope_theta", 10**400, "rope_theta must be a number from 1"),
        ("rms_norm_eps", "1e-6", "rms_norm_eps must be a number from 0 to 1, not '1e-6'"),
        ("rms_norm_eps", -1e-6, "rms_norm_eps must be a number from 0 to 1, not -1e-06"),
        ("rms_norm_eps", None, "rms_norm_eps must be a number from 0 to 1, not None"),
        ("tie_word_embeddings", "false", "tie_word_embeddings must be true or false, not 'false'"),
        ("attention_bias", 0, "attention_bias must be true or false, not 0"),
        ("attention_dropout", False, "attention_dropout must be 0.0 or null, not False"),
        ("eos_token_id", [1, "2"], "eos_token_id must be a whole number or a list of whole numbers"),
        ("eos_token_id", 1.0, "eos_token_id must be a whole number or a list of whole numbers"),
        ("sliding_window", 0, "sliding_window must be a whole number from 1 to 2,147,483,648 or null, not 0"),
        ("dtype", "float8", "dtype = 'float8' is not supported; it must be 'float32' or 'bfloat16'"),
        ("architectures", "LlamaForCausalLM", "architectures must be a list of texts or null"),
        ("layer_types", [1, 2], "layer_types must be a list of texts or null, not [1, 2]"),
        ("auto_map", "x", "auto_map must be an object or null, not 'x'"),
        ("quantization_config", [], "quantization_config must be an object or null, not []"),
        ("quantization_config", {"load_in_4bit": 1}, "quantization_config.load_in_4bit must be true or false"),
        ("rope_scaling", {"rope_type": "linear", "factor": -2.0}, "rope_scaling.factor must be a number"),
        ("rope_scaling", {"rope_type": ["linear"]}, "rope_scaling.rope_type must be 'default' or 'linear'"),
        ("rope_scaling", _LLAMA31_ROPE | {"low_freq_factor": 4}, "high_freq_factor must be above low_freq"),
        ("num_attention_heads", 32, "num_attention_heads = 32 is more than hidden_size = 16"),
        ("num_experts", "\x1b[2J" * 100, "unknown field num_experts = '\\x1b[2J"),
    ],
)  # fmt: skip
def test_a_value_that_is_no_value_of_its_field_is_one_line_that_names_both(field, value, said):
    with pytest.raises(UserError) as error:
        parse_config(LLAMA | {field: value})
    assert said in str(error.value) and len(str(error.value)) <= 500 and str(error.value).isprintable()


def test_sizes_that_are_possible_alone_and_absurd_together_are_refused_before_the_model_is_built():
    # A layer has 2 (H + G) K D + 3 F D weights: here 16 * 250,000 * 10^6 + 3 * 10^7 * 10^6 = 3.4e13.
    big = dict(hidden_size=1_000_000, intermediate_size=10_000_000, num_hidden_layers=10_000)
    with pytest.raises(UserError, match=r"ask for 3\.4e\+17 parameters; at most 1e\+13"):
        parse_config(LLAMA | big)


@pytest.mark.parametrize("raw", [[], None, "llama", 3, {}, {"model_type": None}])
def test_a_file_that_is_no_object_or_names_no_family_is_one_line(raw):
    with pytest.raises(UserError, match="it must hold a JSON object|the key model_type is missing"):
        parse_config(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
ROPES = [None, {}, {"rope_type": "linear", "factor": 2.0}, LLAMA3_SCALING, YARN, LONGROPE]
# What ModelConfig may hold, written down apart from the table.
STRICT = dict(
    model_type=str, vocab_size=int, hidden_size=int, intermediate_size=int, num_hidden_layers=int,
    num_attention_heads=int, num_key_value_heads=int, head_dim=int, layer_windows=tuple, rope=RopeConfig,
    rms_norm_eps=float, max_position_embeddings=int, tie_word_embeddings=bool, qkv_bias=bool, o_bias=bool,
    mlp_bias=bool, qk_norm=bool, dtype=str, eos_token_ids=tuple, layer_rope=tuple,
)  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(base=st.sampled_from([LLAMA, QWEN]), data=st.data())
def test_any_json_at_any_field_is_read_strictly_or_refused_in_one_line(base, data):
    field = data.draw(st.sampled_from([*CONFIG_FIELDS]) | st.text(max_size=300))
    value = data.draw(JSON)
    if field in ("rope_scaling", "rope_parameters") and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from([*ROPE_FIELDS]))
        value = dict(data.draw(st.sampled_from(ROPES)) or {}) | {inner: value}
    try:
        config = parse_config(base | {field: value})
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) <= 500 and str(error).isprintable()
        return
    assert all(type(getattr(config, name)) is kind for name, kind in STRICT.items())
    written = getattr(config, field, None)
    read_past = base is QWEN and field == "mlp_bias"  # as in transformers
    if value is not None and field in STRICT and STRICT[field] in (int, str, bool) and not read_past:
        assert type(value) is type(written) and value == written
    assert math.isfinite(config.rms_norm_eps) and math.isfinite(config.rope.theta) and config.rope.theta >= 1
