"""What a divided model cannot do is refused before a weight is read, in one line with the mend."""

import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from minilora import LoraConfig, UserError
from minilora.formats.config_json import parse_config
from minilora.parallel import loading
from minilora.parallel.choice import least, refusal
from minilora.run import memory_plan
from minilora.run.checkpoints import check_same_training
from minilora.run.memory_plan import choose_way
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
    why = refusal("lora", LoraConfig(r=2, lora_alpha=2, target_modules=targets), MODEL, MODEL)
    assert re.search(r"lora_target names (lm_head|model\.embed_tokens).*leave it out", why)


@pytest.mark.parametrize("targets", [("q_proj",), "all-linear", r".*_proj"])
def test_other_targets_are_no_reason(targets):
    assert not refusal("lora", LoraConfig(r=2, lora_alpha=2, target_modules=targets), MODEL, MODEL)


def test_processors_under_an_old_pytorch(monkeypatch):
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    why = refusal("lora", LoraConfig(), MODEL, MODEL)
    if torch.cuda.is_available():
        assert not why
    else:
        assert re.search("^PyTorch .* install 2.7 or newer .*, or set ddp", why)


def test_rows_of_8_bits_that_fill_no_words():
    files = SimpleNamespace(directory="model")
    loading._in_8_bits(files, "up_proj.weight", torch.Size([8, 644]), torch.float32)
    with pytest.raises(UserError, match="down_proj.weight in model has 642 inputs.* or parallel to ddp"):
        loading._in_8_bits(files, "down_proj.weight", torch.Size([8, 642]), torch.float32)


def test_a_vocabulary_that_grows():
    why = refusal("lora", LoraConfig(), MODEL, replace(MODEL, vocab_size=128))
    assert re.search("need 128 rows .* the model has 64: .*set parallel to ddp", why)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--parallel zero3", "parallel = 'zero3' is not known; choose from auto, ddp, fsdp"),
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
    _, out = train(parallel="fsdp", max_steps=1)
    assert "parallel   fsdp, which has no effect in one process" in out
    _, out = train(max_steps=1, overwrite_output_dir=True)
    assert "parallel " not in out


class Predicted:
    """A ledger of so many bytes."""

    def __init__(self, peak):
        self.peak, self.policies, self.recompute = peak, (), "full"

    def fits(self, memory):
        return self.peak <= memory


@pytest.mark.parametrize(
    "parallel, free, may_divide, way, why",
    [
        ("ddp", 1, True, "ddp", "as requested"),
        ("fsdp", 10**9, True, "fsdp", "as requested"),
        ("auto", 100, True, "ddp", "free"),
        ("auto", 50, True, "fsdp", "ddp would need"),
        ("auto", 10, True, "fsdp", "even fsdp needs"),
        ("auto", 50, False, "ddp", "cannot divide the model"),
        ("auto", None, True, "ddp", "does not tell"),
    ],
)
def test_auto_takes_ddp_where_it_fits_and_fsdp_where_it_does_not(parallel, free, may_divide, way, why):
    def ledger_of(parallel="ddp", processes=1, recompute="", offload=False):
        return Predicted({"ddp": 90, "fsdp": 90 // processes}[parallel])

    config = TrainConfig(parallel=parallel, gradient_checkpointing="full")
    found = choose_way(config, ledger_of, free, Processes(0, 2), may_divide)
    assert found[0] == way and why in found[1]


def test_processes_on_one_cpu_share_its_memory_and_take_the_least_of_all(monkeypatch):
    monkeypatch.setattr(memory_plan, "available_memory", lambda device: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    others = [{"numbers": torch.tensor([300])}]
    monkeypatch.setattr(Processes, "gather", lambda self, tensors: [tensors, *others])
    cpu = torch.device("cpu")
    assert memory_plan.free_memory(cpu, Processes()) == 1000
    assert memory_plan.free_memory(cpu, Processes(0, 2)) == 300
    others[0]["numbers"][0] = 900
    assert memory_plan.free_memory(cpu, Processes(0, 2)) == 500


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
