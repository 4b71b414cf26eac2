"""The trainer as a command: what it learns, what it leaves, how it stops, and how it refuses."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from families import relative_error
from safetensors.torch import load_file

from minilora import load_adapter, load_model
from minilora.adapter import save_adapter
from minilora.data import read_rows, tokenize
from minilora.evaluation import evaluate_loss, perplexity
from minilora.tokenizer import load_tokenizer


def adapter(directory):
    return load_file(directory / "adapter_model.safetensors")


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def train(run_trainer, model_dir, dataset, tmp_path):
    """Train the tiny model into tmp_path/NAME; fails the test if the trainer does."""

    def run(name="out", **keys):
        keys = {
            "model": model_dir,
            "dataset": dataset,
            "output_dir": tmp_path / name,
            "max_steps": 4,
            "lora_dropout": 0,
            "quantization_bit": "none",
        } | keys
        code, out, err = run_trainer(*(word for key, value in keys.items() if value is not None for word in (f"--{key}", value)))
        assert code == 0, err
        return tmp_path / name, out

    return run


def test_training_lowers_the_loss_and_leaves_everything_it_should(train):
    directory, out = train(max_steps=30, learning_rate=1e-2, val_size=4, logging_steps=5, save_steps=10)
    names = {path.name for path in directory.iterdir()}
    assert names == {
        *("adapter_config.json adapter_model.safetensors tokenizer.model training_config.yaml metrics.jsonl".split()),
        *("loss.png README.md checkpoint-10 checkpoint-20 checkpoint-30".split()),
    }
    records = metrics(directory)
    losses = [r["loss"] for r in records if "loss" in r]
    assert losses[-1] < losses[0] - 0.5
    assert {"step", "epoch", "loss", "lr", "grad_norm", "tokens_per_second", "memory"} == next(
        r for r in records if "loss" in r
    ).keys()
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (directory / "README.md").read_text()
    assert card.startswith("---\nbase_model: ") and "library_name: peft" in card and "| peak memory |" in card
    for said in ("model ", "device ", "trainable ", "training ", "steps ", "supervised"):
        assert said in out


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"quantization_bit": 4}, "weights    nf4 with double quantization, 4."),
        ({"quantization_bit": 4, "quantization_type": "fp4", "double_quantization": False}, "weights    fp4, 4.50 bits a weight"),
        ({"load_in_4bit": "true", "quantization_bit": None}, "weights    nf4 with double quantization"),
        ({"quantization_bit": 8}, "weights    int8, a scale a row, 8."),
        ({"quantization_bit": "none"}, "weights    float32"),
    ],
)
def test_a_quantized_base_trains_as_well_and_says_how_it_is_stored(train, keys, said):
    directory, out = train(max_steps=20, learning_rate=1e-2, logging_steps=1, **keys)
    losses = [r["loss"] for r in metrics(directory)]
    assert losses[-1] < losses[0] - 0.5 and said in out and "| frozen weights |" in (directory / "README.md").read_text()


def test_the_same_seed_gives_the_same_adapter_and_another_one_does_not(train):
    one, again, other = (adapter(train(name, seed=seed, lora_dropout=0.1)[0]) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not all(torch.equal(one[key], other[key]) for key in one)


def test_accumulation_1x8_equals_4x2_equals_8x1_on_examples_of_very_different_lengths(train):
    runs = {}
    for batch_size, accumulation in ((1, 8), (4, 2), (8, 1)):
        keys = dict(per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, logging_steps=1)
        directory, _ = train(f"{batch_size}x{accumulation}", **keys)
        runs[batch_size] = adapter(directory), [r["loss"] for r in metrics(directory) if "loss" in r]
    for batch_size in (4, 8):
        # The losses are sums in another order: float32 rounding. The adapters went through four AdamW steps, which divide by the
        # root of tiny second moments: the bound of tests/test_lora.py after twenty.
        assert runs[batch_size][1] == pytest.approx(runs[1][1], rel=1e-6)
        for key, expected in runs[1][0].items():
            assert relative_error(runs[batch_size][0][key], expected) <= 1e-4, key


def test_a_mean_per_micro_batch_would_be_another_loss(model_dir, dataset):
    """The comparison above can fail: on these examples the mean of micro-batch means is far from the mean over tokens."""
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    examples = tokenize(read_rows(dataset), tokenizer, 1024).examples[:8]
    of_means = sum(evaluate_loss(model, [example]) for example in examples) / len(examples)
    assert abs(of_means / evaluate_loss(model, examples) - 1) > 1e-3  # a thousand times what is allowed above


@pytest.fixture
def held_out_losses(trainer, monkeypatch):
    """Let the evaluations of a run give these losses, the first one before training."""

    def script(*losses):
        remaining = iter(losses)
        monkeypatch.setattr(trainer, "evaluate_loss", lambda *_: next(remaining))

    return script


def test_the_best_adapter_is_the_one_that_is_left_and_old_checkpoints_go(train, held_out_losses):
    held_out_losses(3.0, 2.0, 1.0, 1.5, 1.2)
    keys = dict(max_steps=8, val_size=6, eval_steps=2, save_steps=3, save_total_limit=1, load_best_model_at_end=True)
    directory, out = train(**keys)
    assert "back to the adapter of step 4, held-out loss 1.0000" in out
    assert sorted(path.name for path in directory.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    best, last, left = (adapter(path) for path in (directory / "checkpoint-4", directory / "checkpoint-6", directory))
    assert all(torch.equal(best[key], value) for key, value in left.items())
    assert not all(torch.equal(last[key], value) for key, value in left.items())


def test_training_stops_early_when_the_held_out_loss_does_not_fall(train, held_out_losses):
    held_out_losses(3.0, 2.0, 2.1, 1.9, 2.0, 1.9)
    directory, out = train(max_steps=40, val_size=6, eval_steps=1, early_stopping_patience=2)
    assert "stopping early: no lower held-out loss in 2 evaluations" in out
    assert [r["step"] for r in metrics(directory) if "eval_loss" in r] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("bits", ["none", "4"])
def test_the_logged_held_out_loss_is_that_of_the_saved_adapter_in_peft(train, model_dir, dataset, bits):
    """The whole path against the usual stack: our training, their loading, their loss."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    quant = {}
    if bits == "4":
        pytest.importorskip("bitsandbytes")
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
        )
        quant = dict(quantization_config=config, dtype=torch.float32, device_map={"": "cpu"})
    directory, _ = train(max_steps=10, learning_rate=1e-2, eval_dataset=dataset, quantization_bit=bits)
    tokenizer = load_tokenizer(model_dir)
    examples = tokenize(read_rows(dataset), tokenizer, 1024).examples
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_dir, **quant)
    theirs = peft.PeftModel.from_pretrained(theirs, directory).eval()
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


def test_dropped_and_cut_examples_are_reported(train):
    _, out = train(cutoff_len=30)
    assert "cut at cutoff_len:" in out


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
        [sys.executable, str(ROOT / "scripts" / "train.py"), "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0 and "--learning_rate" in run.stdout


# ---- refusals: one line, exit code 2, nothing written --------------------------------------------------------------------------


@pytest.fixture
def refused(run_trainer, model_dir, dataset, tmp_path):
    """Run with a mistake; returns the one line on stderr and checks that nothing was written."""

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
    assert "they are not of one model" in refused(model=small)


def test_an_unknown_key_and_impossible_values(refused):
    assert "nearest: 'learning_rate'" in refused(learning_rte=1)
    assert "lora_rank must be above 0" in refused(lora_rank=0)
    assert "learning_rate must be above 0" in refused(learning_rate=-1)
    assert "warmup_steps = 5 is not shorter than the training, which has 2 steps" in refused(warmup_steps=5)
    assert "names 'v_porj', which no linear layer is called; nearest: 'v_proj'" in refused(lora_target="q_proj,v_porj")
    assert "cutoff_len = 1000 is more than the 256 positions of the model" in refused(cutoff_len=1000)
    assert "quantization_bit must be 4 or 8" in refused(quantization_bit=3)
    assert "choose nf4 or fp4" in refused(quantization_type="int4")
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


def test_no_supervised_token_at_all(refused, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "the old fox " * 50, "completion": "x"}) + "\n")
    assert "no token to learn is left in any of its 1 examples; raise cutoff_len = 20" in refused(dataset=path, cutoff_len=20)


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


def test_a_training_that_diverges_says_so_and_names_the_last_checkpoint(run_trainer, model_dir, dataset, tmp_path, monkeypatch):
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
    assert code == 2 and "training diverged; lower learning_rate = 1e+30 (last checkpoint: " in err and err.count("\n") == 1


def test_an_adapter_saved_twice_is_the_same_file(train, model_dir, tmp_path):
    directory, _ = train()
    model = load_model(model_dir)
    load_adapter(model, directory)
    save_adapter(model, tmp_path / "again")
    assert all(torch.equal(adapter(tmp_path / "again")[key], value) for key, value in adapter(directory).items())
