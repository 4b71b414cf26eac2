"""From training to merging on a base that its author quantized in part, with the settings nobody changed."""

import shutil

import pytest
import torch
from support.families import relative_error
from support.prequantized import SKIPPED, quantized_by_transformers
from support.tiny import TOLERANCE, ids

from minilora import QuantConfig, load_adapter, load_model, save_model


@pytest.mark.parametrize("bits", [4, 8])
def test_a_run_says_how_the_weights_are_stored_and_its_merged_model_is_the_trained_one(
    run_trainer, merge, call, model_dir, dataset, tmp_path, bits
):
    quantized_by_transformers(tmp_path / "base", bits, SKIPPED["some layers"])
    shutil.copy(model_dir / "tokenizer.model", tmp_path / "base")
    keys = dict(model=tmp_path / "base", dataset=dataset, output_dir=tmp_path / "out", max_steps=3)
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    code, out, err = run_trainer(*words, "--lora_target", "q_proj,down_proj,lm_head", "--learning_rate", 0.05)
    assert code == 0, err
    kind = "nf4 with double quantization" if bits == 4 else "int8, a scale a row"
    line = f"{kind} in 7 of 15 linear layers, as in the files, "
    assert line in out and line in (tmp_path / "out" / "README.md").read_text()
    model = load_model(tmp_path / "base", dtype=torch.float32)
    load_adapter(model, tmp_path / "out")
    with torch.no_grad():
        expected = model(ids(2, 20))
    code, _, err = merge("--adapter", tmp_path / "out", "--output", tmp_path / "merged")
    assert code == 0, err
    with torch.no_grad():
        assert relative_error(load_model(tmp_path / "merged")(ids(2, 20)), expected) <= TOLERANCE
    code, _, err = call("evaluate", "--adapter", tmp_path / "out", "--dataset", dataset)
    assert code == 0 and line in err


def test_8_bits_of_a_base_in_4_bits_are_refused_before_anything_is_written(train, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "base")
    save_model(load_model(model_dir, QuantConfig()), tmp_path / "base")
    directory, said = train(model=tmp_path / "base", quantization_bit=8, code=2)
    assert "are quantized to 4 bits already" in said and said.count("\n") == 1 and not directory.exists()
