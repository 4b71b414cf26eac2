"""VeRA adapters on disk: PEFT writes and we read, we write and PEFT reads, and the same function as plain LoRA."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import config_dict, relative_error, same_model_here, transformers_model
from support.tiny import TOLERANCE, ids
from support.vera import peft_vera, vectors_of

from minilora import UserError, load_adapter, save_adapter, trainable_parameters
from minilora.adapters.lint import lint_adapter
from minilora.adapters.plain import plain_factors, shared_matrices, write_plain_adapter
from minilora.adapters.save_load import read_adapter, read_adapter_config
from minilora.adapters.vera_files import SHARED_A, SHARED_B
from minilora.formats.config_json import parse_config
from minilora.lora import lora_layers

# PEFT's advice to save the projections.
pytestmark = pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")

TARGETS = ["down_proj", "q_proj", "v_proj"]


def in_features(theirs) -> dict[str, int]:
    """The input width of every adapted layer."""
    return {layer: theirs.base_model.model.get_submodule(layer).in_features for layer in vectors_of(theirs)}


def described(directory):
    """Names, shapes and dtypes of the tensors, and the configuration."""
    tensors = load_file(directory / "adapter_model.safetensors")
    raw = json.loads((directory / "adapter_config.json").read_text())
    raw["target_modules"] = sorted(raw["target_modules"])
    return {key: (t.shape, t.dtype) for key, t in tensors.items()}, raw, tensors


@pytest.fixture
def saved(tmp_path):
    """A VeRA adapter as PEFT writes it, ready to be spoiled."""
    peft_vera().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("save_projection", [True, False])
def test_files_go_both_ways_and_have_pefts_names_shapes_dtypes_and_keys(save_projection, tmp_path):
    peft = pytest.importorskip("peft")
    settings = dict(projection_prng_key=7, vera_dropout=0.1, layers_to_transform=[0, 2])
    theirs = peft_vera(save_projection=save_projection, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    config = read_adapter_config(tmp_path / "theirs")
    assert (config.r, config.projection_prng_key, config.lora_dropout, config.scaling) == (6, 7, 0.1, 1.0)
    ours = same_model_here(transformers_model("llama-gqa"))
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    names, raw, tensors = described(tmp_path / "ours")
    _, their_raw, their_tensors = described(tmp_path / "theirs")
    if not save_projection:  # we always write them, and PEFT has them in memory
        their_tensors |= {
            SHARED_A: theirs.base_model.vera_A["default"],
            SHARED_B: theirs.base_model.vera_B["default"],
        }
    assert names == {key: (t.shape, t.dtype) for key, t in their_tensors.items()}
    assert all(torch.equal(tensors[key], their_tensors[key]) for key in tensors)
    # The layers stand in the names of targets.
    different = {key for key in raw if raw[key] != their_raw[key]}
    assert raw.keys() == their_raw.keys()
    assert different <= {
        "target_modules",
        "layers_to_transform",
        "inference_mode",
        "save_projection",
        "auto_mapping",
    }
    again = peft.PeftModel.from_pretrained(transformers_model("llama-gqa"), tmp_path / "ours").eval()
    assert torch.equal(again(ids(2, 9)).logits, theirs(ids(2, 9)).logits)


@pytest.mark.parametrize("save_projection", [True, False])
def test_the_plain_lora_adapter_is_the_same_function_in_peft_and_here(save_projection, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft_vera(save_projection=save_projection, projection_prng_key=3)
    theirs.save_pretrained(tmp_path / "vera")
    adapter, base = read_adapter(tmp_path / "vera"), theirs.base_model.model
    shared = shared_matrices(adapter, in_features(theirs))
    layers = {}
    for layer in adapter.layers:
        W = base.get_submodule(layer).base_layer.weight
        A, B = layers[layer] = plain_factors(adapter, layer, W, 1.0, shared)
        delta = base.get_submodule(layer).get_delta_weight("default")
        assert (
            relative_error(B @ A, delta.detach()) <= 8 * 2**-24
        )  # the same sum of 6 products, in another order
    write_plain_adapter(tmp_path / "plain", layers, adapter.config.target_modules)
    expected = theirs(ids(2, 9)).logits
    plain = peft.PeftModel.from_pretrained(transformers_model("llama-gqa"), tmp_path / "plain").eval()
    assert relative_error(plain(ids(2, 9)).logits, expected) <= TOLERANCE
    ours = same_model_here(transformers_model("llama-gqa"))
    load_adapter(ours, tmp_path / "plain")
    assert relative_error(ours(ids(2, 9)), expected) <= TOLERANCE


def test_half_precision_vectors_are_read_as_float32(saved):
    path = saved / "adapter_model.safetensors"
    save_file({key: t.bfloat16() for key, t in load_file(path).items()}, path)
    adapter = read_adapter(saved)
    vectors = [v for parts in adapter.modules.values() for v in parts.values()]
    assert {t.dtype for t in (*vectors, *adapter.shared)} == {torch.float32}


def test_all_layers_share_the_matrices_on_a_model_that_is_moved_and_copied(saved):
    ours = same_model_here(transformers_model("llama-gqa"))
    load_adapter(ours, saved)
    ours.to("cpu").double().float()
    layers = lora_layers(ours).values()
    assert len({layer.frozen_A["default"].data_ptr() for layer in layers}) == 1
    names = [name for name, _ in ours.named_parameters() if "frozen_" in name]
    assert len(names) == 2 and not any("frozen_" in name for name in trainable_parameters(ours))


# ---- refusals ---------------------------------------------------------------------------------------------------------

Q = "base_model.model.model.layers.0.self_attn.q_proj"
SPOILED = {
    "no lambda_b": (lambda t: t.pop(f"{Q}.vera_lambda_b"), r"missing model\.layers\.0\.self_attn\.q_proj\.vera_lambda_b"),
    "short lambda_d": (lambda t: t.update({f"{Q}.vera_lambda_d": torch.ones(5)}), r"is \(5,\), not a vector of 6 numbers"),
    "a matrix": (lambda t: t.update({f"{Q}.vera_lambda_b": torch.ones(6, 2)}), r"is \(6, 2\), not a vector"),
    "empty": (lambda t: t.update({f"{Q}.vera_lambda_b": torch.ones(0)}), r"is \(0,\), not a vector"),
    "LoRA's": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(6, 2)}), "lora_A.weight is no part of a VeRA adapter"),
    "no shared A": (lambda t: t.pop("base_model.vera_A"), "missing base_model.vera_A, which save_projection announces"),
    "shared A of another rank": (lambda t: t.update({"base_model.vera_A": torch.ones(5, 80)}), r"is \(5, 80\), not of rank r = 6"),
    "NaN": (lambda t: t[f"{Q}.vera_lambda_d"].fill_(float("nan")), "infinite or NaN in places"),
    "nothing": (lambda t: [t.pop(key) for key in list(t) if "lambda" in key], "no tensor is a vera_lambda_d"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_tensors_that_do_not_fit_are_refused_by_name(case, saved):
    change, message = SPOILED[case]
    tensors = load_file(saved / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(peft_type="LOHA"), "peft_type = 'LOHA' is not supported"),
        (dict(r=0), "r must be a whole number from 1"),
        (dict(projection_prng_key=2**64), "projection_prng_key must be a whole number"),
        (dict(projection_prng_key=True), "projection_prng_key must be a whole number"),
        (dict(bias="vera_only"), "bias = 'vera_only' is not supported in a VeRA adapter"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\] is not supported"),
        (dict(vera_dropout=float("nan")), "vera_dropout must be a number"),
        (dict(invented=1), "invented = 1 is not supported"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_refused(change, message, saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(saved)
    assert str(path) in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
@settings(max_examples=60)
def test_any_json_at_any_key_is_read_or_refused_in_one_line(vera_directory, data):
    path = vera_directory / "adapter_config.json"
    original = path.read_text()
    raw = json.loads(original)
    raw[data.draw(st.sampled_from(sorted(raw)) | st.text(max_size=9))] = data.draw(ANYTHING)
    path.write_text(json.dumps(raw))
    try:
        read_adapter(vera_directory)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) <= 490
    finally:
        path.write_text(original)


@pytest.fixture(scope="module")
def vera_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vera")
    peft_vera().save_pretrained(directory)
    return directory


def test_shared_matrices_too_small_for_a_layer_are_refused(saved):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[SHARED_A] = tensors[SHARED_A][:, :40].contiguous()
    save_file(tensors, path)
    message = "too small for 80 inputs and 48 outputs"
    with pytest.raises(UserError, match=message):
        shared_matrices(read_adapter(saved), in_features(peft_vera()))
    ours = same_model_here(transformers_model("llama-gqa"))
    with pytest.raises(UserError, match=message):
        load_adapter(ours, saved)
    assert not lora_layers(ours)


def test_the_linter_says_that_peft_loads_it_and_no_server_does(saved):
    config = parse_config(config_dict(transformers_model("llama-gqa")))
    for base in (None, config):
        assert [(f.server, f.verdict) for f in lint_adapter(saved, base)] == [
            ("vLLM", "will not load"),
            ("SGLang", "will not load"),
        ]
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[f"{Q}.vera_lambda_b"] = torch.ones(47)
    save_file(tensors, path)
    found = lint_adapter(saved, config)[0]
    assert (found.server, found.verdict) == (
        "PEFT",
        "will not load",
    ) and "(47,), the model needs (48,)" in found.why
    peft = pytest.importorskip("peft")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(transformers_model("llama-gqa"), saved)
