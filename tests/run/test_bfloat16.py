"""Training in bfloat16 on a CPU, with or without instructions for it: it learns, resumes bit for bit, evaluates."""

import json

import pytest
import torch
from support.project import adapter, metrics

from minilora.run.settings import load_train_config

IN_BFLOAT16 = dict(
    bf16="true", lora_dropout=0.1, max_steps=12, save_steps=6, learning_rate=1e-2, logging_steps=1
)


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("bits", ["none", "4", "8"])
def test_a_run_in_bfloat16_learns_and_its_adapter_is_float32(train, bits):
    directory, out = train(**IN_BFLOAT16, quantization_bit=bits)
    losses = [record["loss"] for record in metrics(directory) if "loss" in record]
    assert "cpu, bfloat16 (requested by bf16)" in out and losses[-1] < losses[0] - 0.3
    assert {tensor.dtype for tensor in adapter(directory).values()} == {torch.float32}


def test_a_run_in_bfloat16_resumes_bit_identically(train):
    whole, _ = train("whole", **IN_BFLOAT16)
    resumed, out = train("resumed", **IN_BFLOAT16, resume_from_checkpoint=whole / "checkpoint-6")
    assert "after step 6 of 12" in out
    expected, found = adapter(whole), adapter(resumed)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "bf16, other, dtypes", [("true", "false", "float32 bfloat16"), ("false", "true", "bfloat16 float32")]
)
def test_a_run_does_not_resume_in_another_dtype(train, bf16, other, dtypes):
    here, there = dtypes.split()
    train(**IN_BFLOAT16 | dict(bf16=bf16))
    _, err = train(code=2, **IN_BFLOAT16 | dict(bf16=other), resume_from_checkpoint="latest")
    assert f"the dtype of computing is 'torch.{here} on cpu' here, 'torch.{there} on cpu' there" in err


def test_an_adapter_is_evaluated_in_the_dtype_of_this_machine_unless_the_command_line_requests_one(
    train, call, dataset, tmp_path, monkeypatch
):
    """In bfloat16 its loss is near that of float32: 8 bits of mantissa, and a mean of a few hundred tokens."""
    directory, _ = train(**IN_BFLOAT16)
    losses = []
    for variable, keys in (("float32", ()), ("bfloat16", ()), ("float32", ("--bf16", "true"))):
        monkeypatch.setenv("MINILORA_CPU_DTYPE", variable)
        arguments = ("--adapter", directory, "--dataset", dataset, "--output", tmp_path / "r.json", *keys)
        code, _, err = call("evaluate", *arguments)
        assert code == 0 and f"on cpu, {'bfloat16' if keys else variable} (" in err, err
        losses.append(json.loads((tmp_path / "r.json").read_text())["results"]["out"]["loss"])
    exact, rounded, requested = losses
    assert rounded == requested != exact and rounded == pytest.approx(exact, rel=1e-2)


def test_bf16_false_means_float32_where_the_machine_would_choose_bfloat16(train, monkeypatch):
    monkeypatch.setenv("MINILORA_CPU_DTYPE", "bfloat16")
    for keys, said in (
        (dict(bf16="false"), "float32 (requested by bf16: false)"),
        (dict(bf16="none"), "bfloat16 ("),
    ):
        _, out = train(max_steps=1, overwrite_output_dir=True, **keys)
        assert f"cpu, {said}" in out


@pytest.mark.parametrize(
    "line, bf16", [("", None), ("bf16: false", False), ("bf16: true", True), ("pure_bf16: true", True)]
)
def test_bf16_in_a_file_of_llama_factory_is_that_of_training_arguments(tmp_path, dataset, line, bf16):
    path = tmp_path / "run.yaml"
    path.write_text(f"stage: sft\nfinetuning_type: lora\nmodel_name_or_path: m\ndataset: {dataset}\n{line}\n")
    assert load_train_config(["--config", str(path)]).bf16 is bf16
