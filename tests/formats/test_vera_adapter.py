"""VeRA adapters on disk: PEFT writes and we read, we write and PEFT reads, and the same function as plain LoRA."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import relative_error, same_model_here, transformers_model
from support.tiny import TOLERANCE, ids
from support.vera import peft_vera, vectors_of

from minilora import UserError, load_adapter
from minilora.formats.plain_adapter import write_plain_adapter
from minilora.formats.vera_adapter import VeraAdapter, read_vera, write_vera

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
    theirs = peft_vera(
        save_projection=save_projection, projection_prng_key=7, d_initial=0.2, vera_dropout=0.1
    )
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = read_vera(tmp_path / "theirs")
    assert (adapter.r, adapter.projection_prng_key, adapter.d_initial, adapter.vera_dropout) == (
        6,
        7,
        0.2,
        0.1,
    )
    assert (adapter.projections is None) == (not save_projection)
    write_vera(tmp_path / "ours", adapter)
    names, raw, tensors = described(tmp_path / "ours")
    their_names, their_raw, their_tensors = described(tmp_path / "theirs")
    assert names == their_names and raw == their_raw
    assert all(torch.equal(tensors[key], their_tensors[key]) for key in tensors)
    again = peft.PeftModel.from_pretrained(transformers_model("llama-gqa"), tmp_path / "ours").eval()
    assert torch.equal(again(ids(2, 9)).logits, theirs(ids(2, 9)).logits)


def test_an_adapter_that_we_make_has_all_of_pefts_keys(tmp_path):
    theirs = peft_vera(save_projection=False)
    theirs.save_pretrained(tmp_path / "theirs")
    vectors = {layer: tuple(v.detach() for v in pair) for layer, pair in vectors_of(theirs).items()}
    write_vera(tmp_path / "ours", VeraAdapter(r=6, target_modules=TARGETS, vectors=vectors))
    raw, their_raw = described(tmp_path / "ours")[1], described(tmp_path / "theirs")[1]
    only = {key for key in raw if raw[key] != their_raw[key]}
    assert raw.keys() == their_raw.keys() and only <= {"task_type", "inference_mode", "auto_mapping"}


@pytest.mark.parametrize("save_projection", [True, False])
def test_the_plain_lora_adapter_is_the_same_function_in_peft_and_here(save_projection, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = peft_vera(save_projection=save_projection, projection_prng_key=3)
    theirs.save_pretrained(tmp_path / "vera")
    adapter = read_vera(tmp_path / "vera")
    layers = adapter.as_plain_lora(in_features(theirs))
    for layer, (A, B) in layers.items():
        delta = theirs.base_model.model.get_submodule(layer).get_delta_weight("default")
        assert (
            relative_error(B @ A, delta.detach()) <= 8 * 2**-24
        )  # the same sum of 6 products, in another order
    write_plain_adapter(tmp_path / "plain", layers, adapter.target_modules)
    expected = theirs(ids(2, 9)).logits
    plain = peft.PeftModel.from_pretrained(transformers_model("llama-gqa"), tmp_path / "plain").eval()
    assert relative_error(plain(ids(2, 9)).logits, expected) <= TOLERANCE
    ours = same_model_here(transformers_model("llama-gqa"))
    load_adapter(ours, tmp_path / "plain")
    assert relative_error(ours(ids(2, 9)), expected) <= TOLERANCE


def test_half_precision_vectors_are_read_as_float32(saved):
    path = saved / "adapter_model.safetensors"
    save_file({key: t.bfloat16() for key, t in load_file(path).items()}, path)
    adapter = read_vera(saved)
    assert {v.dtype for pair in adapter.vectors.values() for v in pair} == {torch.float32}
    assert {t.dtype for t in adapter.projections} == {torch.float32}


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
        read_vera(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(peft_type="LORA"), "peft_type = 'LORA' is not supported"),
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
        read_vera(saved)
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
        read_vera(vera_directory)
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
    adapter, widths = read_vera(saved), in_features(peft_vera())
    A, B = adapter.projections
    with pytest.raises(UserError, match=r"too small for 80 inputs and 48 outputs"):
        replace(adapter, projections=(A[:, :40], B)).as_plain_lora(widths)


def test_a_failed_write_leaves_no_half_file(saved, tmp_path, monkeypatch):
    adapter = read_vera(saved)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minilora.system.files.os.replace", full)
    with pytest.raises(OSError):
        write_vera(tmp_path / "new", adapter)
    assert not list((tmp_path / "new").glob("adapter_*"))
