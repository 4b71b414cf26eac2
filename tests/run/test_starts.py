"""A run whose adapter starts with a part of W, or is VeRA: it learns, resumes bit for bit, and saves what servers load."""

import json

import pytest
import torch
from support.families import relative_error
from support.project import adapter, metrics
from support.tiny import TOLERANCE, ids

from minilora import QuantConfig, load_adapter, load_model
from minilora.lora import lora_layers

# Two targets of different ranks, and rsLoRA: the scaling alpha / sqrt(r) must survive the doubling to the bit.
PISSA = dict(init_lora_weights="pissa", lora_target="q_proj:3,v_proj", lora_rank=4, use_rslora=True)
KINDS = {
    "pissa": PISSA | dict(quantization_bit=4, lora_dropout=0.1),
    "pissa_niter_4": PISSA | dict(init_lora_weights="pissa_niter_4"),
    "olora": PISSA | dict(init_lora_weights="olora", lora_fa=True, gradient_checkpointing="full"),
    "loftq": dict(init_lora_weights="loftq", quantization_bit=4),
    "vera": dict(use_vera=True, lora_rank=16, quantization_bit=4, lora_dropout=0.1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_bit_for_bit_and_ends_with_the_adapter_that_its_last_checkpoint_holds(kind, train):
    keys = KINDS[kind] | dict(learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, save_steps=3)
    whole, _ = train("whole", max_steps=6, **keys)
    train("halves", max_steps=3, **keys)
    halves, _ = train("halves", max_steps=6, resume_from_checkpoint="latest", **keys)
    expected, found = adapter(whole), adapter(halves)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    losses = [[r["loss"] for r in metrics(d) if "loss" in r] for d in (whole, halves)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_its_file_is_plain_lora_of_twice_the_rank_which_peft_loads_onto_the_original_base(
    kind, train, model_dir
):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    directory, out = train(**PISSA | dict(init_lora_weights=kind, quantization_bit="none", bf16="false"))
    assert f"starts with {kind}" in out
    raw = json.loads((directory / "adapter_config.json").read_text())
    assert raw["init_lora_weights"] is True and raw["r"] == 8 and raw["rank_pattern"] == {"q_proj": 6}
    ours = load_model(model_dir)
    load_adapter(ours, directory)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, directory).eval()
    with torch.no_grad():
        assert relative_error(ours(ids(2, 9)), theirs(input_ids=ids(2, 9)).logits) <= TOLERANCE


def test_the_best_adapter_is_the_one_of_its_checkpoint_and_counts_the_trained_numbers(
    train, trainer, monkeypatch
):
    losses = iter((3.0, 2.0, 1.0, 1.5, 1.2))
    monkeypatch.setattr(trainer, "evaluate_loss", lambda *_: next(losses))
    directory, out = train(**PISSA, val_size=4, eval_steps=1, load_best_model_at_end="true", max_steps=4)
    assert "back to the adapter of step 2" in out
    best = adapter(directory / "checkpoint-2")
    assert all(torch.equal(tensor, best[key]) for key, tensor in adapter(directory).items())
    trained = out.split("trainable  ")[1].split(" of")[0]
    assert f"| trainable parameters | {trained} |" in (directory / "README.md").read_text()


def test_loftq_starts_nearer_to_the_original_weights_than_qlora_does(train, model_dir):
    directory, _ = train(init_lora_weights="loftq", quantization_bit=4, learning_rate=1e-30, max_steps=1)
    original, quantized = load_model(model_dir), load_model(model_dir, QuantConfig())
    load_adapter(quantized, directory)
    for name, layer in lora_layers(quantized).items():
        lost = original.get_submodule(name).weight - layer.base_layer.weight.dequantize(torch.float32)
        # The nearest matrix of rank 8 to what is lost (Eckart and Young): the singular values that remain.
        least = torch.linalg.svdvals(lost.double())[8:].norm()
        assert (lost - layer.delta_weight("default").detach()).norm() <= least * (1 + 1e-4)
        assert least < lost.norm() * 0.95


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(init_lora_weights="pisa"), "init_lora_weights 'pisa' is not known; nearest: 'pissa'"),
        (dict(init_lora_weights="corda"), "'corda' is not supported, since it needs the covariance"),
        (dict(init_lora_weights="eva"), "'eva' reads inputs of the layers first"),
        (dict(init_lora_weights="loftq"), "'loftq' makes up for quantization: set quantization_bit"),
        (dict(init_lora_weights="pissa", use_dora="true"), "'pissa' and use_dora exclude each other"),
        (
            dict(init_lora_weights="pissa", lora_rank=1000, lora_target="k_proj"),
            "lora_rank 1000 exceeds a side",
        ),
        (dict(use_vera="true", lora_fa="true"), "use_vera and lora_fa exclude each other"),
        (dict(use_vera="true", lora_alpha=3), "lora_alpha has no meaning for VeRA"),
        (dict(use_vera="true", lora_target="q_proj:3"), "use_vera and rank_pattern exclude each other"),
    ],
)
def test_what_cannot_start_is_refused_in_one_line_before_anything_is_written(keys, message, train):
    directory, err = train(code=2, **keys)
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not directory.exists()
