"""Merging: the written directory computes base model plus adapter, and the printed errors are correct."""

import errno
import json
import re
import shutil
from statistics import median

import pytest
import torch
from safetensors import SafetensorError
from support.adapter_kinds import KINDS, peft_model
from support.families import relative_error, transformers_model
from support.merging import adapted, change_config, change_tensors, make_adapter, make_base
from support.project import ROOT
from support.tiny import TOLERANCE, ids

from minilora import (
    QuantConfig,
    load_adapter,
    load_model,
    quantize_4bit,
    save_model,
)
from minilora.formats import weights
from minilora.formats.weights import StoredTensors
from minilora.lora import lora_layers

# TOLERANCE: a merged adapter's part is summed in another order than an unmerged one's, in float32. The error
# is eps 6e-8 times the depth of the sums, as in test_model. Observed: 1e-6.
CHOICES = {
    "original": "original weights merged",
    "dequantized": "dequantized weights merged",
    "quantized": r"\w+ weights merged, quantized",
    "adapter": "for comparison: the adapter itself",
}


INTO_FP4 = ("--into", "dequantized", "--quantization_type", "fp4", "--double_quantization", "false")


def in_transformers(directory, **options):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", **options
    ).eval()


def stored(directory) -> dict[str, torch.Tensor]:
    tensors = StoredTensors(directory)
    return {name: tensors.read(name, None, "cpu") for name in tensors.files}


def printed_errors(out: str) -> dict[str, tuple[float, float]]:
    """choice -> (worst, median)"""
    rows = {choice: re.search(rf"^  {text} +(\S+) +(\S+)", out, re.M) for choice, text in CHOICES.items()}
    return {choice: (float(row[1]), float(row[2])) for choice, row in rows.items() if row}


@pytest.fixture
def script():
    """scripts/merge.py as a module."""
    import merge

    return merge


@torch.no_grad()
def test_merged_into_the_original_weights_transformers_gives_the_logits_of_base_and_adapter_in_peft(
    merge, place
):
    peft = pytest.importorskip("peft")
    code, out, _ = merge(
        "--adapter", place / "adapter", "--output", place / "merged"
    )  # the base is the one the adapter names
    assert code == 0
    base = in_transformers(place / "base")
    before = base(ids(2, 20)).logits
    expected = peft.PeftModel.from_pretrained(base, place / "adapter").eval()(input_ids=ids(2, 20)).logits
    assert relative_error(expected, before) > 100 * TOLERANCE  # The adapter changes the logits.
    theirs = in_transformers(place / "merged")
    assert relative_error(theirs(ids(2, 20)).logits, expected) <= TOLERANCE
    assert relative_error(load_model(place / "merged")(ids(2, 20)), expected) <= TOLERANCE
    assert theirs.generation_config.max_length == 33
    assert {path.name for path in (place / "merged").iterdir()} == {
        path.name for path in (place / "base").iterdir()
    }
    (place / "ordinary").touch()
    assert {path.stat().st_mode for path in (place / "merged").iterdir()} == {
        (place / "ordinary").stat().st_mode
    }


@pytest.mark.parametrize(
    "quant", [QuantConfig(), QuantConfig(quant_type="fp4", double_quant=False)], ids=["nf4-double", "fp4"]
)
@torch.no_grad()
def test_merged_into_dequantized_weights_it_is_the_model_that_qlora_trained(merge, place, quant):
    options = (
        () if quant == QuantConfig() else ("--quantization_type", "fp4", "--double_quantization", "false")
    )
    assert (
        merge(
            "--adapter", place / "adapter", "--output", place / "merged", "--into", "dequantized", *options
        )[0]
        == 0
    )
    expected = adapted(place, quant)(ids(2, 20))
    assert relative_error(load_model(place / "merged")(ids(2, 20)), expected) <= TOLERANCE
    assert relative_error(in_transformers(place / "merged")(ids(2, 20)).logits, expected) <= TOLERANCE
    assert (
        relative_error(adapted(place)(ids(2, 20)), expected) > 100 * TOLERANCE
    )  # Quantization changes the logits.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_files_stay_so_and_each_sum_is_rounded_once(merge, place, model_dir, dtype):
    shutil.rmtree(place / "base")
    make_base(place / "base", model_dir, dtype)
    base = stored(place / "base")
    layers = lora_layers(adapted(place))
    for into in ("original", "dequantized"):
        assert merge("--adapter", place / "adapter", "--output", place / into, "--into", into)[0] == 0
        merged = stored(place / into)
        assert merged.keys() == base.keys()
        for name, weight in merged.items():
            layer = name.removesuffix(".weight")
            quantized = into == "dequantized" and name.endswith("_proj.weight")
            before = quantize_4bit(base[name]).dequantize(torch.float32) if quantized else base[name].float()
            delta = layers[layer].delta_weight("default") if layer in layers else 0
            assert weight.dtype == dtype and torch.equal(weight, (before + delta).to(dtype)), name


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("into", ["original", "dequantized"])
@torch.no_grad()
def test_with_dtype_every_weight_is_written_in_it_and_rounded_once_from_float32(
    merge, place, model_dir, into, quantize
):
    shutil.rmtree(place / "base")
    make_base(place / "base", model_dir, torch.bfloat16)
    base, layers = stored(place / "base"), lora_layers(adapted(place))
    for dtype in (torch.float32, torch.float16):
        name_of = str(dtype).removeprefix("torch.")
        keys = (
            "--adapter",
            place / "adapter",
            "--into",
            into,
            "--dtype",
            name_of,
            *["--quantize"] * quantize,
        )
        code, out, err = merge(*keys, "--output", place / name_of)
        assert code == 0, err
        raw = json.loads((place / name_of / "config.json").read_text())
        assert {raw[key] for key in ("dtype", "torch_dtype") if key in raw} == {name_of}
        model = load_model(place / name_of)
        assert (
            model.model.norm.weight.dtype == dtype
            and in_transformers_dtype(place / name_of, quantize) == dtype
        )
        if quantize:
            weight = model.get_submodule(next(iter(layers))).weight
            assert weight.dtype == dtype
            assert raw["quantization_config"]["bnb_4bit_compute_dtype"] == name_of
            continue
        for name, weight in stored(place / name_of).items():
            layer, linear = name.removesuffix(".weight"), name.endswith("_proj.weight")
            quantized = into == "dequantized" and linear
            before = quantize_4bit(base[name]).dequantize(torch.float32) if quantized else base[name].float()
            delta = layers[layer].delta_weight("default") if layer in layers else 0
            assert weight.dtype == dtype and torch.equal(weight, (before + delta).to(dtype)), name
        worst = printed_errors(out)["dequantized"][0]
        assert worst < 1e-7 if dtype == torch.float32 else 1e-5 < worst < 2**-11  # float16's unit


def in_transformers_dtype(directory, quantized) -> torch.dtype:
    """The dtype in which transformers would load a directory."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    return config.dtype


def test_a_weight_beyond_float16s_range_is_named(merge, place, model_dir):
    base = load_model(place / "base")
    base.model.norm.weight.data[0] = 1e5
    save_model(base, place / "base")
    keys = ("--adapter", place / "adapter", "--output", place / "merged", "--dtype", "float16")
    code, _, err = merge(*keys)
    assert code == 2 and "norm.weight is infinite or NaN once merged, in torch.float16" in err
    assert "choose another --dtype" in err and not (place / "merged").exists()


@pytest.mark.parametrize("std", [1, 2e-5])
def test_the_table_ends_in_what_follows_from_its_figures(merge, place, model_dir, std):
    shutil.rmtree(place / "base")
    make_base(place / "base", model_dir, torch.bfloat16)
    change_tensors(
        place, lambda tensors: tensors.update({k: t * std for k, t in tensors.items() if "lora_B" in k})
    )
    said = {}
    for name, options in {
        "original": (),
        "float32": ("--dtype", "float32"),
        "quantized": ("--quantize",),
        "gguf": (),
    }.items():
        output = place / (f"{name}.gguf" if name == "gguf" else name)
        code, out, err = merge("--adapter", place / "adapter", "--output", output, *options)
        assert code == 0, err
        said[name], errors = out, printed_errors(out)
        adapter, away = errors["adapter"][1], errors["original"][1]
        if name == "quantized":
            assert ("leave out --quantize" in out) == (errors["quantized"][1] > adapter)
            continue
        (line,) = re.findall("^--into dequantized is the model that was trained.*", out, re.M)
        assert f"--into original is {away:.1e} away" in line
        times = float(re.search(r"([\d.,]+) times", line)[1].replace(",", ""))
        assert times == pytest.approx(away / adapter, rel=0.1)
        rounds = errors["dequantized"][1] > adapter / 10 and name != "gguf"
        assert ("--dtype float32 keeps all of it" in out) == rounds
    assert ("--dtype float32 keeps" in said["original"]) == (std < 1e-3)
    assert "--dtype float32 keeps" not in said["float32"]


def test_an_adapter_smaller_than_the_rounding_of_unquantized_weights_is_told(merge, place, model_dir):
    shutil.rmtree(place / "base")
    make_base(place / "base", model_dir, torch.bfloat16)
    (place / "adapter" / "training_config.yaml").write_text("quantization_bit: null\n")
    keys = ("--adapter", place / "adapter", "--output")
    assert "--dtype" not in merge(*keys, place / "large")[1]
    change_tensors(
        place, lambda tensors: tensors.update({k: t * 1e-4 for k, t in tensors.items() if "lora_B" in k})
    )
    code, out, _ = merge(*keys, place / "small")
    assert code == 0 and "--dtype float32 keeps all of it" in out and "--into" not in out
    assert "--dtype" not in merge(*keys, place / "float32", "--dtype", "float32")[1]


@pytest.mark.parametrize("into", ["original", "dequantized"])
@torch.no_grad()
def test_the_printed_errors_are_those_of_the_weights_that_each_choice_writes(merge, place, model_dir, into):
    shutil.rmtree(place / "base")
    make_base(place / "base", model_dir, torch.bfloat16)
    code, out, _ = merge("--adapter", place / "adapter", "--output", place / "merged", "--into", into)
    assert code == 0 and CHOICES[into] in next(
        line for line in out.splitlines() if line.endswith("<- written")
    )
    merge("--adapter", place / "adapter", "--output", place / "original", "--into", "original")
    merge("--adapter", place / "adapter", "--output", place / "dequantized", "--into", "dequantized")
    assert (
        merge("--adapter", place / "adapter", "--output", place / "quantized", "--into", into, "--quantize")[
            0
        ]
        == 0
    )
    base, errors = stored(place / "base"), {choice: [] for choice in CHOICES}
    weights = {choice: stored(place / choice) for choice in ("original", "dequantized")}
    quantized = dict(load_model(place / "quantized").named_modules())
    for layer, adapter in lora_layers(adapted(place)).items():
        name, delta = f"{layer}.weight", adapter.delta_weight("default").double()
        seen = quantize_4bit(base[name]).dequantize(torch.float32).double() + delta
        written = {choice: tensors[name] for choice, tensors in weights.items()}
        written["quantized"] = quantized[layer].weight.dequantize(torch.float32)
        for choice, weight in written.items():
            errors[choice].append(((weight.double() - seen).norm() / seen.norm()).item())
        errors["adapter"].append((delta.norm() / seen.norm()).item())
    expected = {choice: (max(e), median(e)) for choice, e in errors.items()}
    printed = printed_errors(out)
    assert printed.keys() == expected.keys()
    for choice in CHOICES:
        assert printed[choice] == pytest.approx(expected[choice], rel=0.051), choice  # two digits are printed
    assert (
        expected["dequantized"][0] < 2**-8 < expected["original"][1]
    )  # bfloat16's unit: one rounding; and a quantization


@torch.no_grad()
def test_sharded_and_single_files_hold_the_same_tensors(script, merge, place, model_dir, monkeypatch):
    shutil.rmtree(place / "base")
    transformers_model("llama-gqa", vocab_size=320).save_pretrained(place / "base", max_shard_size="100KB")
    shutil.copy(model_dir / "tokenizer.model", place / "base")
    arguments = ("--adapter", place / "adapter", "--output")
    assert merge(*arguments, place / "one")[0] == 0
    monkeypatch.setattr(weights, "SHARD_BYTES", 70_000)
    assert merge(*arguments, place / "many")[0] == 0
    files = sorted(path.name for path in (place / "many").glob("*.safetensors"))
    count = len(files)
    assert count > 2 and files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    assert all((place / "many" / name).stat().st_size < 75_000 for name in files)  # and a header
    assert [path.name for path in (place / "one").glob("model*")] == ["model.safetensors"]
    one, many = stored(place / "one"), stored(place / "many")
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((place / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert torch.equal(
        in_transformers(place / "one")(ids(1, 9)).logits, in_transformers(place / "many")(ids(1, 9)).logits
    )


@pytest.mark.parametrize("into", ["original", "dequantized"])
@torch.no_grad()
def test_quantized_again_it_loads_here_with_the_logits_of_the_merged_weights_quantized(merge, place, into):
    code, out, _ = merge(
        "--adapter", place / "adapter", "--output", place / "merged", "--quantize", "--into", into
    )
    assert code == 0 and f"{into} weights merged, quantized" in out
    expected = load_model(place / "base", QuantConfig())  # layers without an adapter: as training saw them
    sums = load_model(place / "base", QuantConfig() if into == "dequantized" else None)
    for layer, adapter in lora_layers(adapted(place)).items():
        base = sums.get_submodule(layer).weight
        base = base.dequantize(torch.float32) if into == "dequantized" else base.detach()
        expected.get_submodule(layer).weight = quantize_4bit(base + adapter.delta_weight("default"))
    assert torch.equal(load_model(place / "merged")(ids(2, 20)), expected(ids(2, 20)))
    raw = json.loads((place / "merged" / "config.json").read_text())
    save_model(expected, place / "saved")
    assert (
        raw["quantization_config"]
        == json.loads((place / "saved" / "config.json").read_text())["quantization_config"]
    )
    assert stored(place / "merged").keys() == stored(place / "saved").keys()


@torch.no_grad()
def test_a_base_in_4_bits_is_merged_dequantized_and_the_output_reports_it(merge, place, model_dir):
    expected = adapted(place, QuantConfig(double_quant=False))(ids(2, 20))
    save_model(load_model(place / "base", QuantConfig(double_quant=False)), place / "in4bits")
    shutil.copy(model_dir / "tokenizer.model", place / "in4bits")
    arguments = ("--adapter", place / "adapter", "--model", place / "in4bits", "--output", place / "merged")
    for wrong in (("--into", "original"), ("--quantization_type", "nf4"), ("--double_quantization", "true")):
        code, _, err = merge(*arguments, *wrong)
        assert code == 2 and "hold 4 bits a weight: leave out --into original" in err
        assert not (place / "merged").exists()
    code, out, _ = merge(*arguments)
    assert code == 0 and "only merging into the dequantized weights is possible" in out
    assert printed_errors(out).keys() == {"dequantized", "quantized", "adapter"}
    assert "quantization_config" not in json.loads((place / "merged" / "config.json").read_text())
    assert relative_error(load_model(place / "merged")(ids(2, 20)), expected) <= TOLERANCE
    assert relative_error(in_transformers(place / "merged")(ids(2, 20)).logits, expected) <= TOLERANCE


@torch.no_grad()
def test_an_adapted_output_head_is_merged_and_never_quantized(merge, place):
    shutil.rmtree(place / "adapter")
    make_adapter(place / "base", place / "adapter", target_modules=["lm_head"])
    expected = adapted(place, QuantConfig())(ids(2, 20))
    code, out, _ = merge("--adapter", place / "adapter", "--output", place / "merged", "--quantize")
    assert code == 0 and not printed_errors(out)
    assert relative_error(load_model(place / "merged")(ids(2, 20)), expected) <= TOLERANCE


def test_an_adapter_of_the_embedded_model_finds_it(merge, tmp_path):
    make_adapter(ROOT / "assets" / "base", tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(str(ROOT / "assets" / "base"), "assets/base"))
    assert merge("--adapter", tmp_path / "adapter", "--output", tmp_path / "new" / "merged")[0] == 0
    assert load_model(tmp_path / "new" / "merged").config == load_model(ROOT / "assets" / "base").config


def test_a_merged_model_words_chats_as_training_did_and_knows_the_token_that_answers_end_with(merge, place):
    template = (
        "{% for m in messages %}{{ m.content + ('<s>' if m.role == 'assistant' else '?') }}{% endfor %}"
    )
    shutil.copy(place / "base" / "tokenizer.model", place / "adapter")
    (place / "adapter" / "chat_template.jinja").write_text(template)
    code, _, err = merge("--adapter", place / "adapter", "--output", place / "merged")
    assert code == 0, err
    assert (place / "merged" / "chat_template.jinja").read_text() == template
    generation = json.loads((place / "merged" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 1] and generation["max_length"] == 33, (
        "one token more, and all else as it was"
    )
    gguf = pytest.importorskip("gguf", reason="an extra: llama.cpp's files")
    assert merge("--adapter", place / "adapter", "--output", place / "merged.gguf")[0] == 0
    fields = gguf.GGUFReader(place / "merged.gguf").fields
    written = {
        name: fields[f"tokenizer.{name}"].contents()
        for name in ("chat_template", "ggml.eos_token_id", "ggml.eot_token_id")
    }
    assert written == {"chat_template": template, "ggml.eos_token_id": 2, "ggml.eot_token_id": 1}


def test_an_adapter_of_a_run_without_quantization_goes_into_the_original_weights(merge, place):
    (place / "adapter" / "training_config.yaml").write_text("quantization_bit: null\n")
    code, out, err = merge("--adapter", place / "adapter", "--output", place / "merged")
    assert code == 0, err
    assert "training saw the original weights, unquantized" in out and "nf4" not in out
    code, _, err = merge("--adapter", place / "adapter", "--output", place / "other", "--into", "dequantized")
    assert code == 2 and "was not trained on weights in 4 bits" in err and not (place / "other").exists()


def test_weights_are_dequantized_as_the_run_quantized_them(merge, place):
    assert merge("--adapter", place / "adapter", "--output", place / "options", *INTO_FP4)[0] == 0
    (place / "adapter" / "training_config.yaml").write_text(
        "quantization_type: fp4\ndouble_quantization: false\n"
    )
    code, out, err = merge(
        "--adapter", place / "adapter", "--output", place / "settings", "--into", "dequantized"
    )
    assert code == 0, err
    by_options, by_settings = stored(place / "options"), stored(place / "settings")
    assert "against what training saw: fp4\n" in out and all(
        torch.equal(by_options[name], by_settings[name]) for name in by_options
    )


KEY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
DAMAGE = {
    "no adapter": (lambda place: shutil.rmtree(place / "adapter"), "no such directory"),
    "no config": (lambda place: (place / "adapter" / "adapter_config.json").unlink(), "is not an adapter"),
    "DoRA": (lambda place: change_config(place, use_dora=True), "lora_magnitude_vector"),
    "no base": (lambda place: change_config(place, base_model_name_or_path=None), "give it with --model"),
    "base gone": (
        lambda place: change_config(place, base_model_name_or_path=str(place / "gone")),
        "no such directory",
    ),
    "base without tokenizer": (
        lambda place: (place / "base" / "tokenizer.model").unlink(),
        "holds no tokenizer",
    ),
    "base damaged": (
        lambda place: (place / "base" / "model.safetensors").write_bytes(b"no"),
        "truncated or corrupt",
    ),
    "layer unknown": (
        lambda place: change_tensors(
            place, lambda t: t.update({KEY.format(9, x): t[KEY.format(0, x)].clone() for x in "AB"})
        ),
        "unexpected " + KEY.format(9, "A"),
    ),
    "layer missing": (
        lambda place: change_tensors(place, lambda t: [t.pop(KEY.format(1, x)) for x in "AB"]),
        "missing " + KEY.format(1, "A"),
    ),
    "B missing": (
        lambda place: change_tensors(place, lambda t: t.pop(KEY.format(1, "B"))),
        "missing " + KEY.format(1, "B"),
    ),
    "no A or B": (
        lambda place: change_tensors(
            place, lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4)})
        ),
        "missing base_model.model.model.embed_tokens.lora_embedding_B",
    ),
    "other width": (
        lambda place: change_tensors(place, lambda t: t.update({KEY.format(0, "A"): torch.ones(4, 47)})),
        "is (4, 47), the model needs (4, 48)",
    ),
    "other rank": (lambda place: change_config(place, r=5), "not of rank r = 5"),
    "overflow": (
        lambda place: change_tensors(place, lambda t: [t[KEY.format(1, x)].fill_(1e30) for x in "AB"]),
        "model.layers.1.self_attn.q_proj.weight is infinite or NaN once merged",
    ),
    "diverged": (
        lambda place: change_tensors(place, lambda t: t[KEY.format(1, "B")].fill_(torch.inf)),
        KEY.format(1, "B") + " is infinite or NaN in places",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_failed_merge_prints_one_line_and_leaves_nothing(merge, place, case):
    damage, message = DAMAGE[case]
    damage(place)
    before = {path.name for path in place.iterdir()}
    code, _, err = merge("--adapter", place / "adapter", "--output", place / "merged")
    assert code == 2 and message in err and err.count("\n") == 1
    assert {path.name for path in place.iterdir()} == before


def test_an_output_that_exists_or_cannot_be_written_is_refused_and_kept(merge, place):
    (place / "merged").mkdir()
    code, _, err = merge("--adapter", place / "adapter", "--output", place / "merged")
    assert (
        code == 2
        and "merged exists; choose another directory" in err
        and not list((place / "merged").iterdir())
    )
    (place / "file").write_text("mine")
    (
        place / "adapter" / "adapter_model.safetensors"
    ).unlink()  # The output is checked before anything is read.
    for output in (
        place / "file",
        place / "file" / "merged",
        place / "file" / "deep" / "merged",
        place / "file" / "m.gguf",
    ):
        for key in ("--output", "--export_adapter"):
            code, _, err = merge("--adapter", place / "adapter", key, output)
            assert code == 2 and str(output) in err and err.count("\n") == 1
    assert (place / "file").read_text() == "mine"


@torch.no_grad()
def test_a_tied_output_head_with_an_adapter_becomes_a_head_of_its_own(merge, place, model_dir):
    shutil.rmtree(place / "adapter")
    make_base(place / "tied", model_dir, family="qwen2-bias-tied")
    make_adapter(place / "tied", place / "adapter", target_modules=["lm_head"])
    code, out, _ = merge("--adapter", place / "adapter", "--output", place / "merged")
    assert code == 0 and "an output head of its own, apart from the embedding" in out
    merged = in_transformers(place / "merged")
    assert not merged.config.tie_word_embeddings
    ours = load_model(place / "tied")
    load_adapter(ours, place / "adapter")
    assert relative_error(merged(ids(2, 9)).logits, ours(ids(2, 9))) <= TOLERANCE
    assert torch.equal(
        stored(place / "merged")["model.embed_tokens.weight"],
        stored(place / "tied")["model.embed_tokens.weight"],
    )


MERGED_KINDS = [
    "modules_to_save, tied",
    "modules_to_save, norms",
    "modules_to_save, a linear layer",
    "resized vocabulary, tied",
    "resized vocabulary, trained rows",
    "LoRA on both embeddings, resized",
    "rank_pattern and alpha_pattern, rslora",
    "bias, all",
    "trainable_token_indices, tied",
    "pissa",
    "olora",
    "vera",
]


@pytest.mark.parametrize("kind", MERGED_KINDS)
@torch.no_grad()
def test_any_kind_of_adapter_is_merged_into_what_peft_computes(merge, place, model_dir, kind):
    theirs = peft_model(KINDS[kind], place / "base of PEFT")
    shutil.copy(model_dir / "tokenizer.model", place / "base of PEFT")
    theirs.save_pretrained(place / "adapter of PEFT")
    code, out, _ = merge("--adapter", place / "adapter of PEFT", "--output", place / "merged")
    assert code == 0
    merged = in_transformers(place / "merged", dtype=torch.float32)
    vocab = KINDS[kind].vocab_size or 97
    assert merged.config.vocab_size == vocab
    tokens = ids(2, 15, vocab=vocab)
    expected = theirs(input_ids=tokens).logits
    assert relative_error(merged(tokens).logits, expected) <= TOLERANCE
    assert relative_error(load_model(place / "merged")(tokens), expected) <= TOLERANCE


def test_an_adapter_that_took_a_part_out_of_w_is_not_merged_into_a_quantized_base(merge, place, model_dir):
    peft_model(KINDS["pissa"], place / "base of PEFT").save_pretrained(place / "adapter of PEFT")
    shutil.copy(model_dir / "tokenizer.model", place / "base of PEFT")
    where = "--adapter", place / "adapter of PEFT", "--output", place / "merged"
    save_model(load_model(place / "base of PEFT", QuantConfig()), place / "in 4 bits")
    shutil.copy(model_dir / "tokenizer.model", place / "in 4 bits")
    for wrong in (("--into", "dequantized"), ("--model", place / "in 4 bits")):
        code, _, err = merge(*where, *wrong)
        assert code == 2 and "(init_lora_weights = 'pissa')" in err and err.count("\n") == 1
    assert not (place / "merged").exists()


def test_a_bias_that_the_base_has_no_place_for_is_refused(merge, place, model_dir):
    peft_model(KINDS["lora_bias"], place / "base of PEFT").save_pretrained(place / "adapter of PEFT")
    shutil.copy(model_dir / "tokenizer.model", place / "base of PEFT")
    code, _, err = merge("--adapter", place / "adapter of PEFT", "--output", place / "merged")
    assert code == 2 and "(lora_bias), where the base model has none" in err and err.count("\n") == 1
    assert not (place / "merged").exists()


@pytest.mark.parametrize(
    "error", [SafetensorError("No space left on device"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_full_disk_prints_one_line_and_leaves_nothing(script, merge, place, monkeypatch, error):
    save_file, calls = weights.save_file, []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) > 1:
            path.write_bytes(b"half of it")
            raise error
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(weights, "save_file", full)
    monkeypatch.setattr(weights, "SHARD_BYTES", 70_000)
    code, _, err = merge("--adapter", place / "adapter", "--output", place / "merged")
    assert code == 2 and "No space left on device" in err and err.count("\n") == 1
    assert len(calls) == 2 and {path.name for path in place.iterdir()} == {"base", "adapter"}


# ---- the adapter alone, for servers ----------------------------------------------------------------------------------


@torch.no_grad()
def test_an_exported_adapter_is_plain_lora_with_the_same_logits_in_peft_and_here(merge, place):
    peft = pytest.importorskip("peft")
    make_adapter(place / "base", place / "adapter", r=6, lora_alpha=5, use_rslora=True)
    code, out, _ = merge("--adapter", place / "adapter", "--export_adapter", place / "new" / "plain")
    assert code == 0 and "alpha 5 -> 12.2474, scaling 2.04124" in out and out.endswith("SGLang  loads\n")
    before, after = (
        json.loads((place / name / "adapter_config.json").read_text()) for name in ("adapter", "new/plain")
    )
    assert after == before | {"use_rslora": False, "lora_alpha": 5 * 6**0.5}
    expected = adapted(place)(ids(2, 20))
    model = load_model(place / "base")
    load_adapter(model, place / "new" / "plain")
    # alpha sqrt(r) / r is alpha / sqrt(r) but for the last bit of a float64: nothing of it is left in
    # float32.
    assert torch.equal(model(ids(2, 20)), expected)
    for directory in ("adapter", "new/plain"):
        theirs = peft.PeftModel.from_pretrained(in_transformers(place / "base"), place / directory).eval()
        assert relative_error(theirs(input_ids=ids(2, 20)).logits, expected) <= TOLERANCE


def test_an_export_copies_all_files_but_other_tensors(merge, place):
    for name in ("README.md", "tokenizer.model", "optimizer.safetensors"):
        (place / "adapter" / name).write_text(name)
    (place / "adapter" / "checkpoint-1").mkdir()
    assert merge("--adapter", place / "adapter", "--export_adapter", place / "plain")[0] == 0
    copied = {path.name: path.read_bytes() for path in (place / "plain").iterdir()}
    assert copied.keys() == {
        "README.md",
        "tokenizer.model",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert copied["README.md"] == b"README.md"
    assert (
        copied["adapter_model.safetensors"] == (place / "adapter" / "adapter_model.safetensors").read_bytes()
    )


def test_plain_lora_is_exported_as_it_is(merge, place):
    make_adapter(place / "base", place / "adapter", use_rslora=False)
    assert merge("--adapter", place / "adapter", "--export_adapter", place / "plain")[0] == 0
    before, after = (
        json.loads((place / name / "adapter_config.json").read_text()) for name in ("adapter", "plain")
    )
    assert after == before


@pytest.mark.parametrize("case", ["DoRA", "no config", "B missing", "other rank"])
def test_a_failed_export_prints_one_line_and_leaves_nothing(merge, place, case):
    if case == "DoRA":
        make_adapter(place / "base", place / "adapter", use_dora=True)
    else:
        DAMAGE[case][0](place)
    before = {path.name for path in place.iterdir()}
    code, _, err = merge("--adapter", place / "adapter", "--export_adapter", place / "plain")
    assert code == 2 and err.count("\n") == 1
    assert ("which plain LoRA cannot express: merge it" if case == "DoRA" else DAMAGE[case][1]) in err
    assert {path.name for path in place.iterdir()} == before


def test_an_adapter_without_weights_is_not_exported(merge, place):
    (place / "adapter" / "adapter_model.safetensors").unlink()
    code, out, err = merge("--adapter", place / "adapter", "--export_adapter", place / "plain")
    assert code == 2 and err == f"error: {place / 'adapter'} has no adapter_model.safetensors\n"
    assert not out and not (place / "plain").exists()


def test_options_of_merging_are_refused_beside_export_adapter(merge, place):
    code, _, err = merge(
        "--adapter",
        place / "adapter",
        "--export_adapter",
        place / "plain",
        "--quantize",
        "--into",
        "original",
    )
    assert code == 2 and err == "error: --export_adapter merges nothing: leave out --into, --quantize\n"
    code, _, err = merge("--adapter", place / "adapter", "--export_adapter", place / "base")
    assert code == 2 and "base exists; choose another directory" in err
    code, _, err = merge("--adapter", place / "adapter")
    assert code == 2 and "one of the arguments --output --export_adapter is required" in err


def test_a_full_disk_leaves_no_half_an_exported_adapter(script, merge, place, monkeypatch):
    def full(path, data):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(script, "write_whole", full)
    code, _, err = merge("--adapter", place / "adapter", "--export_adapter", place / "plain")
    assert code == 2 and "No space left on device" in err and err.count("\n") == 1
    assert {path.name for path in place.iterdir()} == {"base", "adapter"}
