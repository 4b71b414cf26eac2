"""finetuning_type: full. All weights learn as in transformers, and the result is a model that any program loads."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.project import ROOT, metrics
from support.tiny import TOLERANCE, ids

from minilora import UserError, load_model
from minilora.run.settings import load_train_config, make_train_config
from minilora.run.yaml_file import read_yaml

FULL = dict(
    finetuning_type="full", preset="minimal_r4_qv", lora_dropout=None, bf16="false", learning_rate=1e-3
)


def weights(directory) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(params=["untied", "tied"])
def base(request, model_dir):
    return model_dir if request.param == "untied" else ROOT / "assets" / "base"


def test_four_steps_end_with_the_weights_that_transformers_and_torch_adamw_end_with(
    base, train, trainer, monkeypatch
):
    transformers = pytest.importorskip("transformers")
    seen, load_batch = [], trainer.load_batch
    monkeypatch.setattr(
        trainer, "load_batch", lambda *arguments: seen.append(load_batch(*arguments)) or seen[-1]
    )
    directory, _ = train(
        **FULL, model=base, lr_scheduler_type="constant", padding_free="false", save_steps=4,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(4):
        batches = seen[3 * step : 3 * step + 3]
        count = sum((labels >= 0).sum() for _, labels, _ in batches)
        for input_ids, labels, _ in batches:
            logits = theirs(input_ids=input_ids).logits[:, :-1]  # padding is on the right, and masked
            (
                F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count
            ).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    ours, begun = weights(directory / "checkpoint-4"), load_model(base, dtype=torch.float32).state_dict()
    expected = dict(theirs.named_parameters())
    assert ours.keys() == expected.keys()
    for name, weight in ours.items():
        moved = (expected[name] - begun[name]).abs()
        # Where a gradient is about 0, Adam's step of 1e-3 has the sign of its rounding errors.
        off = (weight - expected[name]).abs() / moved.max()
        assert (off > 1e-3).float().mean() < 2e-3 and moved.max() > 2e-3, name


def test_the_result_is_a_model_in_the_dtype_of_its_base_that_transformers_loads(base, train):
    transformers = pytest.importorskip("transformers")
    directory, out = train(**FULL, model=base)
    assert "none: all weights are trained" in out and "(100.00%)" in out
    assert not (directory / "adapter_config.json").exists()
    stored = json.loads((base / "config.json").read_text())
    assert {str(t.dtype) for t in weights(directory).values()} == {f"torch.{stored['torch_dtype']}"}
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] == (
        "lm_head.weight" not in weights(directory)
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours, tokens = load_model(directory, dtype=torch.float32), ids(2, 9)
    with torch.no_grad():
        difference = (ours(tokens) - theirs(input_ids=tokens).logits).abs().max()
        assert difference <= TOLERANCE * ours(tokens).abs().max()
    before = load_model(base).state_dict()
    matrices = {
        name: t for name, t in ours.state_dict().items() if t.dim() == 2
    }  # bfloat16 may round a norm back
    assert all(not torch.equal(t, before[name].float()) for name, t in matrices.items())


@pytest.mark.parametrize("keys", [{}, dict(optim="adamw_8bit", gradient_checkpointing="full")], ids=str)
def test_it_resumes_bit_for_bit_on_a_tied_model_too(keys, base, train):
    keys = FULL | dict(model=base, lr_scheduler_type="constant", logging_steps=1, save_steps=2) | keys
    whole, _ = train("whole", max_steps=4, **keys)
    train("halves", max_steps=2, **keys)
    halves, _ = train("halves", max_steps=4, resume_from_checkpoint="latest", **keys)
    for folder in ("", "checkpoint-4"):
        expected, found = weights(whole / folder), weights(halves / folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(t, expected[name]) for name, t in found.items())
    losses = [[r["loss"] for r in metrics(d) if "loss" in r] for d in (whole, halves)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_every_recompute_policy_ends_with_the_same_weights(policy, train):
    off, _ = train("off", **FULL, gradient_checkpointing="off", save_steps=4)
    other, _ = train("other", **FULL, gradient_checkpointing=policy, save_steps=4)
    expected = weights(off / "checkpoint-4")
    assert all(torch.equal(t, expected[name]) for name, t in weights(other / "checkpoint-4").items())


def test_the_best_weights_are_those_of_their_checkpoint(train, trainer, monkeypatch):
    losses = iter((3.0, 2.0, 1.0, 1.5, 1.2))
    monkeypatch.setattr(trainer, "evaluate_loss", lambda *_: next(losses))
    directory, out = train(**FULL, val_size=4, eval_steps=1, load_best_model_at_end="true", max_steps=4)
    assert "back to the model of step 2" in out
    best = weights(directory / "checkpoint-2")
    assert all(torch.equal(t.float(), best[name]) for name, t in weights(directory).items())
    card = (directory / "README.md").read_text()
    assert "library_name: transformers" in card and "| held-out loss, this model | 1.0000 |" in card


def test_answers_of_the_base_model_are_compared_with_those_of_the_trained_one(train):
    _, out = train(**FULL, val_size=4, exact_match_samples=4)
    assert "exact answers to 4 held-out prompts" in out


def test_evaluate_and_chat_take_the_result_as_a_model(train, call, dataset):
    directory, _ = train(**FULL)
    code, out, err = call("evaluate", "--model", directory, "--dataset", dataset)
    assert code == 0, err
    code, _, err = call("evaluate", "--adapter", directory, "--dataset", dataset)
    assert code == 2 and "it is a model, so name it with --model" in err


def test_the_snippet_of_the_model_card_runs(train):
    pytest.importorskip("transformers")
    directory, _ = train(**FULL)
    snippet = (directory / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert "AutoModelForCausalLM" in snippet and "peft" not in snippet
    exec(compile(snippet, "card", "exec"), {})


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(quantization_bit=4), "set quantization_bit to none"),
        (dict(lora_rank=8), "lora_rank belongs to an adapter, and finetuning_type is 'full'; leave it out"),
        (dict(use_dora="true"), "use_dora belongs to an adapter"),
        (dict(init_lora_weights="pissa"), "init_lora_weights belongs to an adapter"),
        (dict(finetuning_type="fool"), "finetuning_type = 'fool'"),
        (dict(finetuning_type="freeze"), "lora trains an adapter and full all weights"),
    ],
    ids=str,
)
def test_what_full_training_cannot_do_is_refused_in_one_line(keys, message, train):
    _, err = train(code=2, **FULL | keys)
    assert message in err and err.count("\n") == 1


def test_an_output_directory_with_somebody_elses_model_is_refused_and_kept(train, tmp_path):
    other = tmp_path / "out"
    other.mkdir()
    (other / "config.json").write_text("{}")
    for overwrite in ("false", "true"):
        _, err = train(code=2, **FULL, overwrite_output_dir=overwrite)
        assert f"output_dir {other} holds a model (config.json); choose another directory" in err
    assert [p.name for p in other.iterdir()] == ["config.json"]
    directory, _ = train(lora_rank=2)  # an adapter beside it
    assert (directory / "config.json").read_text() == "{}"


def test_a_second_full_run_overwrites_the_first_only_when_told_to(train):
    first, _ = train(**FULL)
    _, err = train(code=2, **FULL)
    assert "already holds a run" in err
    before = weights(first)
    train(**FULL | dict(learning_rate=2e-3, overwrite_output_dir="true"))
    assert any(not torch.equal(t, before[name]) for name, t in weights(first).items())


def test_a_llama_factory_file_gets_its_defaults_and_the_adapters_keys_have_no_effect(capsys):
    file = dict(stage="sft", finetuning_type="full", dataset="own/d.jsonl", lora_rank=8, cutoff_len=512)
    config = make_train_config({"file": file})
    out = capsys.readouterr().out
    assert "no effect: lora_rank (finetuning_type is full)" in out
    assert (config.finetuning_type, config.lora_rank, config.quantization_bit) == ("full", None, None)
    assert (config.learning_rate, config.per_device_train_batch_size) == (5e-5, 8)
    with pytest.raises(UserError, match="adapter_name_or_path belongs to an adapter"):
        make_train_config({"file": file | dict(adapter_name_or_path="a")})


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_settings_that_a_run_saves_are_its_own_when_they_are_read_back(kind, tmp_path, capsys):
    keys = dict(preset="minimal_r4_qv", finetuning_type=kind, quantization_bit=None, learning_rate=3e-4)
    config = make_train_config({"file": keys})
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert load_train_config(["--config", str(tmp_path / "run.yaml")]) == config
    assert read_yaml(tmp_path / "run.yaml")["finetuning_type"] == kind
    assert "LLaMA-Factory" not in capsys.readouterr().out
