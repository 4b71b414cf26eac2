"""What a divided model cannot do is refused before a weight is read, in one line with the mend."""

from dataclasses import asdict, replace

import pytest
import torch

from minilora import LoraConfig, UserError
from minilora.formats.config_json import parse_config
from minilora.parallel.choice import check_sharded, choose_parallel, least
from minilora.run.checkpoints import check_same_training
from minilora.run.settings import TrainConfig, load_train_config
from minilora.system.distributed import Processes

MODEL = parse_config(
    dict(model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    | dict(num_attention_heads=4, num_key_value_heads=2)
)


@pytest.mark.parametrize(
    "targets",
    [("q_proj", "lm_head"), ("embed_tokens",), r".*(q_proj|lm_head)", r"model\.embed_tokens"],
)
def test_lora_on_the_embedding_or_the_head(targets):
    with pytest.raises(UserError, match=r"lora_target names (lm_head|model\.embed_tokens).*leave it out"):
        check_sharded(LoraConfig(r=2, lora_alpha=2, target_modules=targets), MODEL, MODEL)


@pytest.mark.parametrize("targets", [("q_proj",), "all-linear", r".*_proj"])
def test_other_targets_are_no_reason(targets):
    check_sharded(LoraConfig(r=2, lora_alpha=2, target_modules=targets), MODEL, MODEL)


def test_a_vocabulary_that_grows():
    with pytest.raises(UserError, match="need 128 rows .* the model has 64: .*set parallel to ddp"):
        check_sharded(LoraConfig(), MODEL, replace(MODEL, vocab_size=128))


@pytest.mark.parametrize(
    "words, message",
    [
        ("--parallel zero3", "parallel = 'zero3' is not known; choose from ddp, fsdp"),
        ("--fsdp_offload true", "fsdp_offload belongs to parallel = 'fsdp'"),
        (
            "--parallel fsdp --finetuning_type full --quantization_bit none",
            "finetuning_type = 'full' freezes none: set parallel to ddp",
        ),
    ],
)
def test_settings(words, message):
    with pytest.raises(UserError, match=message):
        load_train_config(words.split())


def test_one_process_has_nobody_to_divide_a_model_with(train):
    assert not choose_parallel("fsdp", Processes()) and choose_parallel("fsdp", Processes(1, 2))
    assert not choose_parallel("ddp", Processes(1, 2))
    _, out = train(parallel="fsdp", max_steps=1)
    assert "; fsdp has no effect in one process" in out


def test_the_ranks_agree_on_the_smallest_batch(monkeypatch):
    others = [{"numbers": torch.tensor([8, 16])}, {"numbers": torch.tensor([4, 64])}]
    monkeypatch.setattr(Processes, "gather", lambda self, tensors: [tensors, *others])
    assert least(Processes(0, 3), 8, 32) == (4, 16)


@pytest.mark.parametrize(
    "there, here, mend",
    [
        ((4, 1), (2, 2), None),
        ((1, 8), (4, 2), None),
        ((4, 2), (8, 1), None),
        ((4, 1), (4, 2), "set gradient_accumulation_steps to 2"),
        ((2, 2), (2, 1), "set gradient_accumulation_steps to 4"),
        ((1, 4), (1, 3), "start a number of processes that divides 4"),
    ],
)
def test_a_resume_needs_the_same_micro_batches_in_a_step(tmp_path, there, here, mend):
    def training(accumulation, processes):
        config = TrainConfig(gradient_accumulation_steps=accumulation)
        return asdict(config) | {"the number of processes": processes}

    if mend is None:
        check_same_training(training(*there), training(*here), set(), tmp_path)
    else:
        with pytest.raises(UserError, match=mend):
            check_same_training(training(*there), training(*here), set(), tmp_path)
