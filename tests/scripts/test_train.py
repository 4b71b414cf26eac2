"""The trainer as a command: its learning, its files, its stops and its refusals."""

import fcntl
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from itertools import pairwise

import pytest
import torch
from support.families import in_eval_mode, relative_error, transformers_in_4_bits
from support.project import PROGRAM_ENVIRONMENT, ROOT, adapter, metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minilora import add_lora, load_adapter, load_model, save_adapter, save_model, trainable_parameters
from minilora.backend import elementwise_trial
from minilora.data.examples import tokenize
from minilora.data.rows import read_rows
from minilora.data.tokenizer import load_tokenizer
from minilora.inference.evaluation import evaluate_loss, perplexity
from minilora.lora import lora_layers
from minilora.loss import IGNORE_INDEX
from minilora.loss_scale import LossScale
from minilora.run import memory_plan, plan
from minilora.run.checkpoints import read_checkpoint
from minilora.system.device import choose_placement


def test_training_lowers_the_loss_and_writes_every_file(train):
    directory, out = train(max_steps=30, learning_rate=1e-2, val_size=4, logging_steps=5, save_steps=10)
    names = {path.name for path in directory.iterdir()}
    assert names == {
        *(
            "adapter_config.json adapter_model.safetensors tokenizer.model training_config.yaml metrics.jsonl".split()
        ),
        *("loss.png training.png README.md checkpoint-10 checkpoint-20 checkpoint-30".split()),
    }
    records = metrics(directory)
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[-1] < losses[0] - 0.5
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens_per_second", "memory", "seconds"} == next(
        r for r in records if "loss" in r
    ).keys()
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (directory / "README.md").read_text()
    assert (
        card.startswith("---\nlibrary_name: peft\n")
        and "# LoRA adapter for /" in card
        and "| peak memory |" in card
    )
    for said in ("model ", "device ", "trainable ", "training ", "steps ", "supervised"):
        assert said in out


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"quantization_bit": 4}, "weights    nf4 with double quantization, 4."),
        (
            {"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False},
            "weights    fp4, 4.50 bits a weight",
        ),
        ({"load_in_4bit": "true", "quantization_bit": None}, "weights    nf4 with double quantization"),
        ({"quantization_bit": 8}, "weights    int8, a scale a row, 8."),
        ({"quantization_bit": "none", "bf16": "false"}, "weights    float32"),
    ],
)
def test_a_quantized_base_trains_as_well_and_says_how_it_is_stored(train, keys, said):
    directory, out = train(max_steps=20, learning_rate=1e-2, logging_steps=1, **keys)
    losses = [r["loss"] for r in metrics(directory)]
    assert (
        losses[-1] < losses[0] - 0.5
        and said in out
        and "| frozen weights |" in (directory / "README.md").read_text()
    )


def test_the_same_seed_gives_the_same_adapter_and_another_one_does_not(train):
    one, again, other = (
        adapter(train(name, seed=seed, lora_dropout=0.1)[0]) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_pain_5_accumulation_1x8_equals_4x2_equals_8x1_on_examples_of_very_different_lengths(train):
    runs = {}
    for batch_size, accumulation in ((1, 8), (4, 2), (8, 1)):
        keys = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
        keys |= dict(logging_steps=1, bf16="false")
        directory, _ = train(f"{batch_size}x{accumulation}", **keys)
        runs[batch_size] = adapter(directory), [r["loss"] for r in metrics(directory) if "loss" in r]
    for batch_size in (4, 8):
        # The losses are the same sums in another order: float32 rounding. The adapters took four AdamW steps,
        # which divide by the root of tiny second moments: the bound of tests/core/test_lora.py for twenty.
        assert runs[batch_size][1] == pytest.approx(runs[1][1], rel=1e-6)
        for key, expected in runs[1][0].items():
            assert relative_error(runs[batch_size][0][key], expected) <= 1e-4, key


def test_a_mean_per_micro_batch_would_be_another_loss(model_dir, dataset):
    """The test above can fail: on these examples a mean of micro-batch means is far from a mean over tokens."""
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    examples = tokenize(read_rows(dataset), tokenizer, 1024).examples[:8]
    of_means = sum(evaluate_loss(model, [example]) for example in examples) / len(examples)
    assert abs(of_means / evaluate_loss(model, examples) - 1) > 1e-3  # a thousand times the bound above


@pytest.fixture
def held_out_losses(trainer, monkeypatch):
    """Make the evaluations of a run return these losses; the first one is before training."""

    def script(*losses):
        remaining = iter(losses)
        monkeypatch.setattr(trainer, "evaluate_loss", lambda *_: next(remaining))

    return script


def test_the_best_adapter_is_the_result_and_old_checkpoints_are_deleted(train, held_out_losses):
    held_out_losses(3.0, 2.0, 1.0, 1.5, 1.2)
    keys = dict(
        max_steps=8, val_size=6, eval_steps=2, save_steps=3, save_total_limit=1, load_best_model_at_end=True
    )
    directory, out = train(**keys)
    assert "back to the adapter of step 4, held-out loss 1.0000" in out
    assert sorted(path.name for path in directory.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    best, last, left = (
        adapter(path) for path in (directory / "checkpoint-4", directory / "checkpoint-6", directory)
    )
    assert all(torch.equal(best[key], value) for key, value in left.items())
    assert not all(torch.equal(last[key], value) for key, value in left.items())


def test_training_stops_early_when_the_held_out_loss_does_not_fall(train, held_out_losses):
    held_out_losses(3.0, 2.0, 2.1, 1.9, 2.0, 1.9)
    directory, out = train(max_steps=40, val_size=6, eval_steps=1, early_stopping_patience=2)
    assert "stopping early: no lower held-out loss in 2 evaluations" in out
    assert [r["step"] for r in metrics(directory) if "eval_loss" in r] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("bits", ["none", "4"])
def test_the_logged_held_out_loss_is_that_of_the_saved_adapter_in_peft(train, model_dir, dataset, bits):
    """The whole path against PEFT: trained here, loaded there, and the loss computed there."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    directory, _ = train(
        max_steps=10, learning_rate=1e-2, eval_dataset=dataset, quantization_bit=bits, bf16="false"
    )
    tokenizer = load_tokenizer(model_dir)
    examples = tokenize(read_rows(dataset), tokenizer, 1024).examples
    load = transformers.AutoModelForCausalLM.from_pretrained if bits == "none" else transformers_in_4_bits
    theirs = in_eval_mode(peft.PeftModel.from_pretrained(load(model_dir), directory))
    total = tokens = 0.0
    with torch.no_grad():
        for example in examples:
            ids = torch.from_numpy(example.input_ids).long()[None]
            labels = ids.clone()
            labels[0, : example.prompt_length] = -100
            total += theirs(input_ids=ids, labels=labels).loss.item() * example.supervised
            tokens += example.supervised
    last = [r["eval_loss"] for r in metrics(directory) if "eval_loss" in r][-1]
    assert last == pytest.approx(total / tokens, rel=1e-5)  # float32 sums in another order


def test_loss_and_perplexity_do_not_depend_on_the_batch_size(model_dir, dataset):
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    examples = tokenize(read_rows(dataset), tokenizer, 1024).examples
    losses = [evaluate_loss(model, examples, batch_size) for batch_size in (1, 5, 24)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)  # float32 sums in another order
    assert perplexity(model, examples) == pytest.approx(math.exp(losses[0]), rel=1e-6)


def test_exact_match_is_counted_before_and_after_and_shown(train, dataset):
    directory, out = train(max_steps=2, eval_dataset=dataset, exact_match_samples=5)
    assert "exact answers to 5 held-out prompts: 0.0% before" in out and "  expected" in out
    assert "exact answers to 5 held-out prompts" in (directory / "README.md").read_text()


def test_pain_9_cut_and_dropped_examples_are_counted_and_reported(train, dataset, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(
        dataset.read_text() + json.dumps({"prompt": "the old fox " * 20, "completion": "x"}) + "\n"
    )
    _, out = train(dataset=path, cutoff_len=24)
    said = re.search(
        r"^training +(\d+) examples, .+; cut at cutoff_len: (\d+) \(.+\), \d+ tokens lost; dropped .+: (\d+) \(4.0%\)$",
        out,
        re.MULTILINE,
    )
    kept, cut, dropped = map(int, said.groups())
    assert (kept, dropped) == (24, 1) and 0 < cut < 24


@pytest.fixture
def endless(model_dir, dataset, tmp_path):
    """Start trainers in tmp_path/out that would train for days; kills them at the end."""
    started = []

    def start(**options):
        command = [sys.executable, ROOT / "scripts" / "train.py", "--model", model_dir, "--dataset", dataset]
        command += ["--output_dir", tmp_path / "out", "--max_steps", 10**6, "--quantization_bit", "none"]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=PROGRAM_ENVIRONMENT)
        started.append(subprocess.Popen([*map(str, command)], **pipes | options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_of_two_trainers_in_one_output_dir_one_trains_and_the_other_names_its_process(endless, tmp_path):
    both = [endless(), endless()]
    while all(process.poll() is None for process in both):
        time.sleep(0.1)
    refused, other = sorted(both, key=lambda process: process.returncode is None)
    said = f"error: output_dir {tmp_path / 'out'} is used by process {other.pid}, which is still running; "
    assert refused.communicate()[1] == said + "wait for it, stop it, or choose another output_dir\n"
    assert refused.returncode == 2 and other.poll() is None
    other.send_signal(signal.SIGTERM)
    assert "Traceback" not in other.communicate(timeout=60)[1] and not (tmp_path / "out" / ".lock").exists()


def test_a_trainer_whose_terminal_closes_saves_a_checkpoint(endless, tmp_path):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))

    def own_terminal():
        fcntl.ioctl(theirs, termios.TIOCSCTTY)

    process = endless(
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=own_terminal
    )
    os.close(theirs)
    seen = b""
    while not re.search(rb"step \d+/", seen):
        seen += os.read(ours, 4096)
    os.close(ours)  # the kernel sends SIGHUP
    assert process.wait(timeout=60) == 130
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    assert not (tmp_path / "out" / ".lock").exists() and read_checkpoint(checkpoint)["step"] >= 1


def test_ctrl_c_saves_the_adapter_and_exits_130(model_dir, dataset, tmp_path):
    command = [
        sys.executable,
        ROOT / "scripts" / "train.py",
        "--model",
        model_dir,
        "--dataset",
        dataset,
        "--output_dir",
        tmp_path / "out",
    ]
    process = subprocess.Popen([*map(str, command), "--max_steps", "100000", "--logging_steps", "1"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    log = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "interrupted after step" in out
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    load_adapter(load_model(model_dir), checkpoint)


def test_the_trainer_explains_itself_from_any_working_directory(tmp_path):
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "--learning_rate" in run.stdout


# ---- precision ---------------------------------------------------------------------------------------------


@pytest.fixture
def bfloat16_model(model_dir, tmp_path):
    """The tiny model in bfloat16, as most models are published."""
    save_model(load_model(model_dir, dtype=torch.bfloat16), tmp_path / "bfloat16")
    (tmp_path / "bfloat16" / "tokenizer.model").write_bytes((model_dir / "tokenizer.model").read_bytes())
    return tmp_path / "bfloat16"


class NoBfloat16(TorchDispatchMode):
    """Fails at the first operation that makes a bfloat16 tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16]
        assert not made, f"{function} made a bfloat16 tensor"
        return result


@pytest.mark.parametrize(
    "keys", [{}, {"quantization_bit": 4, "gradient_checkpointing": "full", "optim": "adamw_8bit"}]
)
def test_pain_1_adapters_of_a_bfloat16_model_are_float32_under_the_float16_scaler_and_nothing_is_bfloat16(
    train, trainer, bfloat16_model, in_float16, monkeypatch, keys
):
    in_float16()
    load, watched = trainer.load_base_model, []

    def load_and_watch(*arguments, **settings):
        model = load(*arguments, **settings)
        for (
            operation,
            dtypes,
        ) in elementwise_trial.KNOWN_BITS.items():  # the C forms' trials compare in bfloat16
            assert [elementwise_trial.is_trusted(operation, dtype) for dtype in dtypes]
        watched.append(NoBfloat16().__enter__())
        return model

    monkeypatch.setattr(trainer, "load_base_model", load_and_watch)
    try:
        directory, out = train(
            model=bfloat16_model, max_steps=8, learning_rate=1e-2, logging_steps=1, val_size=4, **keys
        )
    finally:
        watched[0].__exit__(None, None, None)
    assert "device     cpu, float16 (a test)" in out
    assert all(tensor.dtype == torch.float32 for tensor in adapter(directory).values())
    records = [record for record in metrics(directory) if "loss" in record]
    assert records[-1]["loss"] < records[0]["loss"] - 0.1 and records[-1]["skipped_steps"] == 0


def test_pain_2_every_trainable_is_float32_before_the_first_step_or_there_is_none(
    trainer, train, monkeypatch, in_float16
):
    in_float16()

    def add_half(model, config, **settings):
        add_lora(model, config, **settings)
        for layer in lora_layers(model).values():
            layer.lora_A.half()

    monkeypatch.setattr(trainer, "add_lora", add_half)
    monkeypatch.setattr(trainer, "make_optimizer", lambda *_: pytest.fail("too late"))
    with pytest.raises(AssertionError, match="adapters are float32"):
        train()


def test_pain_3_a_t4_gets_float16_though_pytorch_says_that_it_supports_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    placement = choose_placement()
    assert placement.dtype == torch.float16 and "only emulates bfloat16" in str(placement)


def test_a_loss_scale_that_is_far_too_large_finds_its_place_and_training_goes_on(train, in_float16):
    in_float16(scale=2.0**30)
    directory, out = train(max_steps=40, learning_rate=1e-2, logging_steps=1, save_steps=1, warmup_steps=10)
    records = metrics(directory)
    skipped = records[-1]["skipped_steps"]
    assert (
        5 <= skipped <= 25
        and records[-1]["loss_scale"] == 2.0 ** (30 - skipped)
        and f"  {skipped} skipped, loss scale" in out
    )
    taken = [
        after["skipped_steps"] == before["skipped_steps"]
        for before, after in pairwise([{"skipped_steps": 0}, *records])
    ]
    # A skipped step changes nothing, and the learning rate does not advance: 0, 0, ..., 0.001, 0.002.
    steps = [adapter(directory / f"checkpoint-{step}") for step in range(1, 41)]
    for i in range(1, 40):
        moved = any(not torch.equal(steps[i][key], tensor) for key, tensor in steps[i - 1].items())
        assert moved == (taken[i] and records[i]["lr"] > 0)
        assert ("grad_norm" in records[i]) == taken[i]
    rates = [record["lr"] for record, was_taken in zip(records, taken, strict=True) if was_taken]
    assert rates[:11] == pytest.approx([i / 1000 for i in range(11)])
    assert records[-1]["loss"] < records[0]["loss"] - 0.5
    assert (
        f"; {skipped} skipped, with numbers beyond float16's range |" in (directory / "README.md").read_text()
    )


def test_steps_that_overflow_for_ever_end_the_run_and_the_last_good_checkpoint_is_named(
    train, trainer, in_float16, monkeypatch
):
    in_float16()
    original, calls = trainer.causal_lm_loss, iter(range(10_000))

    def overflow_in_backward(*arguments):
        loss = original(*arguments)
        if next(calls) >= 3 * 3:
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    monkeypatch.setattr(trainer, "causal_lm_loss", overflow_in_backward)
    # 24 examples make three micro-batches in every step.
    keys = dict(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    directory, err = train(code=2, max_steps=100, save_steps=1, logging_steps=1, **keys)
    # 16 halvings lead from 65536 to 1; the 17th goes below.
    assert (
        "gradient norm nan at step 20: training diverged; lower learning_rate" in err
        and "loss nan" not in err
        and "not finite first" not in err
        and err.count("\n") == 1
    )
    assert f"(last good checkpoint: {directory / 'checkpoint-3'})" in err
    last = metrics(directory)[-1]
    assert last["skipped_steps"] == 16 and "grad_norm" not in last  # JSON has no nan
    good = adapter(directory / "checkpoint-3")
    for step in range(4, 20):
        assert all(
            torch.equal(adapter(directory / f"checkpoint-{step}")[key], tensor)
            for key, tensor in good.items()
        )


# ---- what is learned ---------------------------------------------------------------------------------------


@pytest.fixture
def batches(trainer, monkeypatch):
    """The input_ids and labels of every micro-batch that the trainer computes a loss of."""
    seen, original = [], trainer.causal_lm_loss

    def loss(model, input_ids, labels, document_ids):
        seen.append((input_ids, labels))
        return original(model, input_ids, labels, document_ids)

    monkeypatch.setattr(trainer, "causal_lm_loss", loss)
    return seen


def test_pain_6_the_end_token_is_learned_even_where_it_is_the_padding(train, batches, monkeypatch):
    load = plan.load_run_tokenizer

    def with_eos_as_padding(*arguments):
        tokenizer = load(*arguments)
        tokenizer.pad_id = tokenizer.eos_id
        return tokenizer

    monkeypatch.setattr(plan, "load_run_tokenizer", with_eos_as_padding)
    train(padding_free="false")
    padded = 0
    for ids, labels in batches:
        for row, targets in zip(ids.tolist(), labels.tolist(), strict=True):
            last = max(i for i, label in enumerate(targets) if label != IGNORE_INDEX)
            assert targets[last] == row[last] == 2 and 2 not in row[:last]  # EOS, once
            assert set(row[last:]) == {2}
            padded += len(row) - 1 - last
    assert padded > 0


def test_pain_7_the_prompt_is_read_and_not_learned_unless_requested(train, batches, model_dir, examples):
    train(padding_free="false")
    tokenizer = load_tokenizer(model_dir)
    prompts = [tokenizer.encode(example["prompt"]) for example in examples]
    for ids, labels in batches:
        for row, targets in zip(ids.tolist(), labels.tolist(), strict=True):
            prompt = max((p for p in prompts if row[: len(p)] == p), key=len)
            assert (
                targets[: len(prompt)] == [IGNORE_INDEX] * len(prompt)
                and targets[len(prompt)] != IGNORE_INDEX
            )
    batches.clear()
    train("all", train_on_prompt=True, padding_free="false")
    assert all((labels[:, 1] != IGNORE_INDEX).all() for _, labels in batches)


@pytest.mark.parametrize("policy", ["off", "selective", "full", "offload"])
def test_pain_12_every_b_has_a_gradient_at_step_1_behind_the_frozen_embedding_whatever_is_recomputed(
    train, trainer, monkeypatch, policy
):
    trainable, first = {}, {}

    def remember(model):
        trainable.update(trainable_parameters(model))
        return trainable

    class Watched(LossScale):
        def step(self, optimizer, loss, norm):
            if not first:
                first.update({name: parameter.grad.clone() for name, parameter in trainable.items()})
            return super().step(optimizer, loss, norm)

    monkeypatch.setattr(trainer, "trainable_parameters", remember)
    monkeypatch.setattr(trainer, "LossScale", Watched)
    _, out = train(gradient_checkpointing=policy, preset="aggressive_r16_all")
    taken = "full (offload needs a GPU)" if policy == "offload" else f"{policy} (as requested)"
    assert f"recompute  {taken}\n" in out
    assert len(first) == 2 * 2 * 7  # A and B of 7 linear layers in 2 decoder layers
    for name, gradient in first.items():
        assert bool(gradient.any()) == ("lora_B" in name), name  # A's are zero while B is


def test_pain_12_a_run_in_which_no_gradient_reaches_the_adapter_ends_at_step_1(train, trainer, monkeypatch):
    original = trainer.causal_lm_loss
    monkeypatch.setattr(trainer, "causal_lm_loss", lambda *arguments: original(*arguments) * 0)
    with pytest.raises(AssertionError, match="no gradient has reached the adapter"):
        train()


def test_auto_takes_the_fastest_policy_that_fits_and_says_why(train, monkeypatch):
    _, out = train(gradient_checkpointing="auto")
    assert re.search(r"recompute  off \(needs [\d.]+ of [\d.]+ GiB free\)\n", out)
    assert re.search(r"memory     [\d.]+ GiB predicted at the peak\n", out)
    monkeypatch.setattr(memory_plan, "available_memory", lambda device: 1000)
    directory, out = train("tight", gradient_checkpointing="auto")
    assert re.search(
        r"recompute  full \(even full needs [\d.]+ GiB; 0.00 GiB are free, and a tenth should be left\)", out
    )
    assert re.search(
        r"\| peak memory \| [\d.]+ GiB \([\d.]+ GiB predicted\) \|", (directory / "README.md").read_text()
    )


@pytest.mark.parametrize("policy", ["selective", "full", "offload"])
def test_recomputing_changes_no_bit_of_the_adapter_with_dropout_on(train, policy):
    keys = dict(lora_dropout=0.2, learning_rate=1e-2, quantization_bit=4)
    plain, recomputed = (
        adapter(train("off", **keys)[0]),
        adapter(train("on", gradient_checkpointing=policy, **keys)[0]),
    )
    assert all(torch.equal(plain[key], recomputed[key]) for key in plain)


# ---- refusals: one line, exit code 2, nothing written ------------------------------------------------------


@pytest.fixture
def refused(run_trainer, model_dir, dataset, tmp_path):
    """Run with a mistake, check that nothing is written, and return the only line on stderr."""

    def run(**keys):
        output = keys.pop("output_dir", tmp_path / "out")
        keys = {"model": model_dir, "dataset": dataset, "max_steps": 2} | keys
        before = sorted(map(str, tmp_path.rglob("*")))
        words = [word for key, value in keys.items() if value is not None for word in (f"--{key}", value)]
        code, _, err = run_trainer(*words, "--output_dir", output)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, (code, err)
        assert sorted(map(str, tmp_path.rglob("*"))) == before
        return err

    return run


def test_no_such_model_and_a_directory_without_config(refused, tmp_path):
    assert "no such directory" in refused(model=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(model=tmp_path / "empty")


def copy_model(model_dir, target):
    target.mkdir()
    for path in model_dir.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_truncated_weights_and_a_tensor_of_the_wrong_shape(refused, model_dir, tmp_path):
    broken = copy_model(model_dir, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors is truncated or corrupt" in refused(model=broken)
    wrong = copy_model(model_dir, tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"intermediate_size": 129}))
    assert "mlp.gate_proj.weight is (128, 64), config.json says (129, 64)" in refused(model=wrong)


def test_a_model_without_a_tokenizer_or_with_another_models(refused, model_dir, tmp_path):
    bare = copy_model(model_dir, tmp_path / "bare")
    (bare / "tokenizer.model").unlink()
    assert "holds no tokenizer" in refused(model=bare)
    small = copy_model(model_dir, tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    assert "they do not belong to one model" in refused(model=small)


def test_an_unknown_key_and_impossible_values(refused):
    assert "nearest: 'learning_rate'" in refused(learning_rte=1)
    assert "lora_rank must be above 0" in refused(lora_rank=0)
    assert "learning_rate must be above 0" in refused(learning_rate=-1)
    assert "warmup_steps = 5 is not shorter than the training, which has 2 steps" in refused(warmup_steps=5)
    assert "names 'v_porj', which no linear layer is called; nearest: 'v_proj'" in refused(
        lora_target="q_proj,v_porj"
    )
    assert "cutoff_len = 1000 is more than the 256 positions of the model" in refused(cutoff_len=1000)
    assert "quantization_bit must be 4, 8 or none" in refused(quantization_bit=3)
    assert "choose from nf4, fp4" in refused(quantization_type="int4")
    if not torch.cuda.is_available():
        assert "fp16 needs a GPU" in refused(fp16=True)


def test_a_dataset_that_is_missing_empty_malformed_or_without_the_columns(refused, tmp_path):
    path = tmp_path / "d.jsonl"
    assert "dataset is missing" in refused(dataset=None)
    assert "does not exist" in refused(dataset=path)
    path.write_text("")
    assert "is empty" in refused(dataset=path)
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    assert "d.jsonl, line 2: not valid JSON" in refused(dataset=path)
    path.write_text('{"question": "a", "answer": "b"}\n')
    assert "it has question, answer" in refused(dataset=path)


def test_pain_7_no_supervised_token_at_all_is_an_error(refused, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "the old fox " * 50, "completion": "x"}) + "\n")
    assert "no token to learn is left in any of its 1 examples; raise cutoff_len = 20" in refused(
        dataset=path, cutoff_len=20
    )


def test_an_output_directory_that_is_a_file_or_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file, not a directory" in refused(output_dir=tmp_path / "file" / "out")
    assert "cannot be written" in refused(output_dir="/proc/minilora")


def test_an_output_directory_that_holds_another_run(train, refused, tmp_path):
    directory, _ = train("out")
    (directory / "notes.txt").write_text("mine")
    assert "already holds a run" in refused(output_dir=directory)
    train("out", overwrite_output_dir=True)
    assert (directory / "notes.txt").read_text() == "mine"


def test_a_training_that_diverges_says_so_and_names_the_last_checkpoint(
    run_trainer, model_dir, dataset, tmp_path, monkeypatch
):
    words = [
        "--model",
        model_dir,
        "--dataset",
        dataset,
        "--output_dir",
        tmp_path / "out",
        "--learning_rate",
        "1e30",
        "--max_grad_norm",
        "0",
    ]
    code, _, err = run_trainer(*words, "--max_steps", 50, "--save_steps", 1)
    assert (
        code == 2
        and "training diverged; lower learning_rate = 1e+30 (last good checkpoint: " in err
        and err.count("\n") == 1
    )


def test_an_adapter_saved_twice_is_the_same_file(train, model_dir, tmp_path):
    directory, _ = train()
    model = load_model(model_dir)
    load_adapter(model, directory)
    save_adapter(model, tmp_path / "again")
    assert all(
        torch.equal(adapter(tmp_path / "again")[key], value) for key, value in adapter(directory).items()
    )
