"""scripts/combine.py and scripts/extract.py: what they write is PEFT's sum, and the difference of two models."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import relative_error, transformers_model
from support.merging import make_adapter, make_base
from support.tiny import TOLERANCE, ids

from minilora import (
    LoraConfig,
    QuantConfig,
    add_lora,
    load_adapter,
    load_model,
    merge_lora,
    remove_lora,
    save_adapter,
    save_model,
)
from minilora.formats.weights import StoredTensors
from minilora.lora import lora_layers

# An update is compared by its product, after decompositions that LAPACK makes exact to p(n) units (Users'
# Guide, 4.9), n <= 80.
SVD = 200 * 2.0**-24


@pytest.fixture
def two(tmp_path, model_dir):
    """A base model and two adapters of different ranks and scalings on it: base, one, two."""
    make_base(tmp_path / "base", model_dir)
    make_adapter(tmp_path / "base", tmp_path / "one")
    make_adapter(
        tmp_path / "base", tmp_path / "two", r=3, use_rslora=False, target_modules=["q_proj", "o_proj"]
    )
    return tmp_path


def updates(base, adapter) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, (out, in)."""
    model = load_model(base)
    load_adapter(model, adapter)
    return {name: layer.delta_weight("default").detach() for name, layer in lora_layers(model).items()}


def printed(out: str) -> dict[str, float]:
    """Layer, or mean -> the error that was printed for it."""
    return {name: float(error) for name, error in re.findall(r"^  (\S+) +(\d\.\de[+-]\d\d)$", out, re.M)}


@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_the_sum_is_pefts_and_loads_in_peft_and_here(kind, two, call):
    peft = pytest.importorskip("peft")
    arguments = ("--adapter", f"{two / 'one'}:0.7", "--adapter", f"{two / 'two'}:-0.3")
    code, out, err = call("combine", *arguments, "--combination_type", kind, "--output", two / "new")
    assert code == 0, err
    theirs = peft.PeftModel.from_pretrained(
        transformers_model("llama-gqa", vocab_size=320), two / "one", "one"
    )
    theirs.load_adapter(two / "two", "two")
    theirs.peft_config["one"].use_rslora = False  # PEFT would keep it, and scale the sum by sqrt(r) once more
    theirs.add_weighted_adapter(["one", "two"], [0.7, -0.3], "new", combination_type=kind)
    theirs.set_adapter("new")
    found = updates(two / "base", two / "new")
    for name, delta in found.items():
        expected = theirs.base_model.model.get_submodule(name).get_delta_weight("new").detach()
        assert relative_error(delta, expected) <= SVD
    assert set(found) == set(updates(two / "base", two / "one")) | set(updates(two / "base", two / "two"))
    again = peft.PeftModel.from_pretrained(
        transformers_model("llama-gqa", vocab_size=320), two / "new"
    ).eval()
    assert relative_error(again(ids(2, 9)).logits, theirs.eval()(ids(2, 9)).logits) <= TOLERANCE


def test_the_printed_error_is_the_distance_to_the_exact_sum(two, call):
    arguments = ("--adapter", f"{two / 'one'}:1", "--adapter", f"{two / 'two'}:2", "--svd_rank", 2)
    code, out, err = call("combine", *arguments, "--output", two / "new")
    assert code == 0, err
    one, other, new = (updates(two / "base", two / name) for name in ("one", "two", "new"))
    errors = printed(out)
    for name, delta in new.items():
        exact = one.get(name, 0) + 2 * other.get(name, torch.zeros(()))
        error = ((delta - exact).norm() / exact.norm()).item()
        assert errors[name] == pytest.approx(error, rel=0.06)  # two digits are printed
    assert errors["mean"] == pytest.approx(sum(errors[name] for name in new) / len(new), rel=0.06)
    assert f"r 2, scaling 1, {len(new)} layers" in out
    raw = json.loads((two / "new" / "adapter_config.json").read_text())
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"]) == (2, 2, False)
    assert raw["base_model_name_or_path"] == str(two / "base")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adapter", "one"], "--adapter 'one' must be ADAPTER:WEIGHT, such as one:0.5"),
        (["--adapter", "one:"], "--adapter 'one:' must be ADAPTER:WEIGHT, such as one:0.5"),
        (["--adapter", "one:nan"], "--adapter 'one:nan' must be ADAPTER:WEIGHT"),
        (["--adapter", "one:1e300"], "the sum overflows float32 in model.layers.0.mlp.down_proj; choose"),
        (["--adapter", "one:1e37"], "the sum overflows float32 in model.layers.0.mlp.down_proj; choose"),
        (["--adapter", "one:1", "--svd_rank", "0"], "--svd_rank must be at least 1, not 0"),
        (["--adapter", "one:1", "--svd_rank", "9999999"], "svd_rank 9999999 exceeds 4, the sum's rank"),
        (["--adapter", "one:1", "--svd_rank", "4", "--combination_type", "cat"], "--svd_rank holds for"),
        (["--adapter", "one:1", "--combination_type", "ties"], "argument --combination_type: invalid choice"),
        (["--adapter", "one:1", "--adapter", "two:1", "--combination_type", "linear"], "needs equal ranks"),
        (["--adapter", "one:1", "--adapter", "dora:1"], "dora is a DoRA adapter"),
        (["--adapter", "one:1", "--adapter", "vera:1"], "vera is a VeRA adapter"),
        (["--adapter", "one:1", "--adapter", "pissa:1"], "pissa started with a part of W"),
        (
            ["--adapter", "one:1", "--adapter", "copies:1"],
            "copies holds base_model.model.lm_head.weight, which",
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_in_one_line_and_nothing_is_written(
    arguments, message, two, call, monkeypatch
):
    make_adapter(two / "base", two / "dora", use_dora=True, use_rslora=False)
    make_adapter(two / "base", two / "copies", modules_to_save=["lm_head"])
    make_adapter(two / "base", two / "pissa", use_rslora=False)
    path = two / "pissa" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(init_lora_weights="pissa")))
    model = load_model(two / "base")
    add_lora(model, LoraConfig(use_vera=True))
    save_adapter(model, two / "vera")
    monkeypatch.chdir(two)
    before = sorted(two.rglob("*"))
    code, _, err = call("combine", *arguments, "--output", "new")
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert sorted(two.rglob("*")) == before


def test_adapters_of_different_bases_are_noted_and_an_output_in_the_way_is_kept(two, call):
    path = two / "two" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(base_model_name_or_path="other")))
    arguments = ("--adapter", f"{two / 'one'}:1", "--adapter", f"{two / 'two'}:1", "--output", two / "new")
    code, out, _ = call("combine", *arguments)
    assert code == 0 and "note: the adapters name different base models" in out
    assert json.loads((two / "new" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert call("combine", *arguments)[0] == 2


def test_a_pattern_for_the_layers_becomes_their_full_names(two, call):
    path = two / "one" / "adapter_config.json"
    pattern = r".*\.(q_proj|k_proj|v_proj|gate_proj|down_proj)"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(target_modules=pattern)))
    code, _, err = call("combine", "--adapter", f"{two / 'one'}:1", "--output", two / "new")
    assert code == 0, err
    assert len(updates(two / "base", two / "new")) == 15


def test_ranks_and_alphas_by_layer_are_scaled_each_by_its_own(two, call):
    ranks = dict(rank_pattern={"q_proj": 2, r"layers\.1\..*v_proj": 5}, alpha_pattern={"k_proj": 1.5})
    make_adapter(two / "base", two / "ranks", use_rslora=False, **ranks)
    arguments = ("--adapter", f"{two / 'ranks'}:0.5", "--combination_type", "cat", "--output", two / "new")
    code, _, err = call("combine", *arguments)
    assert code == 0, err
    found, expected = (updates(two / "base", two / name) for name in ("new", "ranks"))
    for name, delta in expected.items():
        assert relative_error(found[name], 0.5 * delta) <= SVD


# ---- two models ----------------------------------------------------------------------------------------------------


@pytest.fixture
def merged(two):
    """A base model and the same with an adapter of rank 4 merged into it: base, merged."""
    model = load_model(two / "base")
    load_adapter(model, two / "one")
    merge_lora(model)
    remove_lora(model)
    save_model(model, two / "merged")
    return two


def test_a_merged_adapter_is_taken_out_again(merged, call):
    arguments = ("--base", merged / "base", "--tuned", merged / "merged", "--lora_rank", 4)
    code, out, err = call("extract", *arguments, "--output", merged / "new")
    assert code == 0, err
    found, expected = (updates(merged / "base", merged / name) for name in ("new", "one"))
    base = StoredTensors(merged / "base")
    for name, delta in found.items():
        if name not in expected:
            assert not delta.any()
            continue
        # The merged weight was rounded to float32 once: at most a unit of its own size.
        size = base.read(f"{name}.weight", None, "cpu").norm() + expected[name].norm()
        assert (delta - expected[name]).norm() <= 2 * 2.0**-24 * size + SVD * expected[name].norm()
    assert len(found) == 21 and "other tensors differ" not in out
    adapted, plain = load_model(merged / "base"), load_model(merged / "merged")
    load_adapter(adapted, merged / "new")
    with torch.no_grad():
        assert relative_error(adapted(ids(2, 9)), plain(ids(2, 9))) <= TOLERANCE


def test_the_printed_errors_are_those_of_the_adapter_and_other_differences_are_named(merged, call):
    path = merged / "merged" / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(1)
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        tensors[name] += 0.1 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, path, metadata={"format": "pt"})
    arguments = ("--base", merged / "base", "--tuned", merged / "merged", "--lora_rank", 4)
    code, out, err = call(
        "extract", *arguments, "--lora_target", "q_proj,down_proj", "--output", merged / "new"
    )
    assert code == 0, err
    found, base = updates(merged / "base", merged / "new"), StoredTensors(merged / "base")
    errors, differences = printed(out), {}
    for name, delta in found.items():
        exact = tensors[f"{name}.weight"] - base.read(f"{name}.weight", None, "cpu")
        differences[name] = ((delta - exact).norm() / exact.norm()).item()
        assert errors[name] == pytest.approx(differences[name], rel=0.06, abs=1e-5)
    assert max(differences, key=differences.get) == "model.layers.0.self_attn.q_proj"
    assert differences["model.layers.0.self_attn.q_proj"] > 0.1
    # k, v and gate have an adapter of their own in `merged`, in 3 layers.
    noted = re.search("note: other tensors differ, too, and are left out: (.*)", out)[1].split(", ")
    assert set(noted) == {"3 k_proj.weight", "3 v_proj.weight", "3 gate_proj.weight", "1 norm.weight"}
    raw = json.loads((merged / "new" / "adapter_config.json").read_text())
    assert raw["target_modules"] == ["down_proj", "q_proj"] and raw["lora_alpha"] == raw["r"] == 4


def test_a_base_in_4_bits_is_compared_as_it_computes(merged, call):
    save_model(load_model(merged / "base", QuantConfig()), merged / "four")
    arguments = ("--base", merged / "four", "--tuned", merged / "merged", "--lora_rank", 8)
    code, out, err = call("extract", *arguments, "--output", merged / "new")
    assert code == 0, err
    found, tuned, errors = (
        updates(merged / "base", merged / "new"),
        load_model(merged / "merged"),
        printed(out),
    )
    four = load_model(merged / "four")
    for name, delta in found.items():
        exact = tuned.get_submodule(name).weight - four.get_submodule(name).weight.dequantize(torch.float32)
        assert errors[name] == pytest.approx(((delta - exact).norm() / exact.norm()).item(), rel=0.06)
    assert "other tensors differ" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tuned", "base"], "base has the weights of base in every layer that is adapted"),
        (["--tuned", "merged", "--lora_rank", "0"], "--lora_rank must be at least 1, not 0"),
        (
            ["--tuned", "merged", "--lora_rank", "25"],
            "--lora_rank 25 exceeds a side of model.layers.0.self_attn.k_proj",
        ),
        (["--tuned", "merged", "--lora_target", "q_porj"], "names 'q_porj', which no linear layer is called"),
        (["--tuned", "other"], "model.layers.0.self_attn.q_proj.weight is (96, 96)"),
        (["--tuned", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_extracted_is_refused_in_one_line_and_nothing_is_written(
    arguments, message, merged, call, monkeypatch
):
    transformers_model("llama-gqa", vocab_size=320, hidden_size=96).save_pretrained(merged / "other")
    monkeypatch.chdir(merged)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(merged.rglob("*"))
    code, _, err = call("extract", "--base", "base", *arguments, "--output", "new")
    assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert sorted(merged.rglob("*")) == before


def test_weights_that_diverged_are_refused(merged, call):
    path = merged / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    code, _, err = call(
        "extract", "--base", merged / "base", "--tuned", merged / "merged", "--output", merged / "new"
    )
    assert code == 2 and "model.layers.1.mlp.up_proj.weight in" in err and "infinite or NaN" in err
    assert not (merged / "new").exists()
