"""Fine-tune a Llama, Mistral or Qwen model with LoRA, from a file of examples to an adapter that PEFT, vLLM and SGLang load.

    python scripts/train.py                                    the small model that comes with minilora learns to answer
    python scripts/train.py --model mistralai/Mistral-7B-v0.1 --dataset my.jsonl --output_dir out
    python scripts/train.py --config run.yaml --learning_rate 1e-4
    python scripts/train.py --help                             every key, its default and its meaning

One file, read from top to bottom: plan, model, optimizer, evaluation and checkpoints, the loop, the end. Everything cheap that
can be wrong (keys, data, directories) is found before the weights are read, and nothing is written before that.

Exit codes: 0 done, 2 a mistake of yours (one line says which), 130 interrupted (the adapter is saved first).
"""

import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from minilora.adapter import load_adapter, save_adapter
from minilora.config import ModelConfig
from minilora.data import Dataset, collate, read_rows, split, step_batches, steps_per_epoch, tokenize
from minilora.device import Placement, choose_placement, memory_used
from minilora.errors import UserError, run_script
from minilora.evaluation import answers, evaluate_loss, exact_match
from minilora.hub import resolve_model
from minilora.linear import count_parameters, describe_weights
from minilora.lora import add_lora, remove_lora, trainable_parameters
from minilora.loss import causal_lm_loss, count_supervised
from minilora.model import CausalLM
from minilora.optim import learning_rate, make_optimizer
from minilora.tokenizer import Tokenizer, load_tokenizer
from minilora.track import METRICS_FILE, Tracker, minutes, plot_loss, short_number, write_model_card
from minilora.train_config import TrainConfig, load_train_config, manual
from minilora.weights import load_model, read_config

ROOT = Path(__file__).resolve().parents[1]
EMBEDDED_MODEL = ROOT / "assets" / "base"
DEFAULT_RUN = ROOT / "assets" / "default.yaml"  # what runs when no config, model or dataset is named


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(manual(), end="")
        return
    train(load_train_config(sys.argv[1:], DEFAULT_RUN))


def train(config: TrainConfig) -> None:
    started = time.perf_counter()

    # ---- device, data, plan: everything that can be wrong without a weight in memory ---------------------------------

    placement = choose_placement(config.bf16, config.fp16)
    device = placement.device
    base_model = config.model_name_or_path or "assets/base"
    model_dir = resolve_model(config.model_name_or_path or str(EMBEDDED_MODEL), revision=config.model_revision)
    model_config = read_config(model_dir)
    tokenizer = load_tokenizer(model_dir)
    train_set, eval_set = load_datasets(config, model_config, tokenizer)
    lengths = [len(example.input_ids) for example in train_set.examples]
    batching = (config.per_device_train_batch_size, config.gradient_accumulation_steps)
    epoch_steps = steps_per_epoch(len(train_set), *batching)
    total_steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * epoch_steps)
    warmup_steps = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if warmup_steps >= total_steps:
        raise UserError(f"warmup_steps = {warmup_steps} is not shorter than the training, which has {total_steps} steps")
    eval_steps = (config.eval_steps or epoch_steps) if eval_set else None
    output_dir = Path(config.output_dir)
    check_output_dir(output_dir, config.overwrite_output_dir)

    # ---- model and adapter -------------------------------------------------------------------------------------------

    torch.manual_seed(config.seed)
    model = load_model(model_dir, config.quant_config(), placement.dtype, device)
    add_lora(model, config.lora_config())
    trainable = trainable_parameters(model)
    assert all(p.dtype == torch.float32 for p in trainable.values()), "adapters are float32, whatever the compute dtype"
    print_summary(config, base_model, model, placement, train_set, eval_set, total_steps, epoch_steps)

    # ---- optimizer ---------------------------------------------------------------------------------------------------

    optimizer = make_optimizer(config.optim, trainable.values(), config.learning_rate, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=placement.dtype == torch.float16)  # keeps small float16 gradients from 0

    def optimizer_step(step: int) -> tuple[float, float, int]:
        """One step over all its micro-batches: mean loss per supervised token, gradient norm, tokens read."""
        lr = learning_rate(step, total_steps, warmup_steps, config.learning_rate, config.lr_scheduler_type)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = [
            collate([train_set.examples[i] for i in chosen], tokenizer.pad_id)
            for chosen in step_batches(lengths, step, *batching, config.seed)
        ]
        supervised = sum(count_supervised(labels) for _, labels in batches)
        total = torch.zeros((), device=device)
        for input_ids, labels in batches:  # (B, T) each
            loss = causal_lm_loss(model, input_ids.to(device), labels.to(device)) / supervised
            scaler.scale(loss).backward()
            total += loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), config.max_grad_norm or math.inf)
        if not math.isfinite(total) or not (scaler.is_enabled() or math.isfinite(norm)):
            tracker.close()
            last = (checkpoints(output_dir) or ["none was saved yet"])[-1]
            raise UserError(
                f"loss {total:g}, gradient norm {norm:g} at step {step + 1}: training diverged; lower learning_rate = "
                f"{config.learning_rate:g} (last checkpoint: {last})"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return total.item(), norm.item(), sum(input_ids.numel() for input_ids, _ in batches)

    # ---- evaluation and checkpoints ----------------------------------------------------------------------------------

    best = {"loss": math.inf, "step": 0, "waited": 0}  # the lowest held-out loss so far; evaluations since

    def evaluate(step: int) -> None:
        """Loss on the held-out examples, logged; keeps the best adapter if it will be wanted at the end."""
        loss = evaluate_loss(model, eval_set.examples, config.per_device_eval_batch_size, tokenizer.pad_id)
        tracker.log(step=step, eval_loss=loss)
        better = step > 0 and loss < best["loss"]
        tracker.say(f"step {step}/{total_steps}  held-out loss {loss:.4f}" + ("  (best so far)" if better else ""))
        best["waited"] = 0 if better else best["waited"] + 1
        if better:
            best.update(loss=loss, step=step)
            if config.load_best_model_at_end:
                save_checkpoint(step)

    def save_checkpoint(step: int) -> Path:
        """The adapter as it is now, in `checkpoint-<step>`; the oldest ones beyond `save_total_limit` go, the best one stays."""
        directory = output_dir / f"checkpoint-{step}"
        save_adapter(model, directory, base_model_name_or_path=base_model)
        if config.save_total_limit is not None:
            for old in checkpoints(output_dir)[: -config.save_total_limit]:
                if not (config.load_best_model_at_end and old.name == f"checkpoint-{best['step']}"):
                    shutil.rmtree(old)
        return directory

    # ---- the loop ----------------------------------------------------------------------------------------------------

    open_output_dir(output_dir, config)
    tokenizer.save(output_dir)
    asked = eval_set.rows[: config.exact_match_samples] if config.exact_match_samples else []
    before = answers(model, tokenizer, asked) if asked else []  # B is zero: these are the base model's own
    tracker = Tracker(output_dir, total_steps, epoch_steps, config.logging_steps)
    stop = StopSignal(tracker)
    if eval_set:
        evaluate(step=0)
    model.train()
    for step in range(1, total_steps + 1):
        start = time.perf_counter()
        loss, norm, tokens = optimizer_step(step - 1)
        lr, seconds = optimizer.param_groups[0]["lr"], time.perf_counter() - start
        tracker.step(step, loss, lr, norm, tokens, seconds, memory_used(device))
        if eval_set and (step % eval_steps == 0 or step == total_steps):
            evaluate(step)
            if config.early_stopping_patience and best["waited"] >= config.early_stopping_patience:
                tracker.say(f"stopping early: no lower held-out loss in {best['waited']} evaluations")
                break
        if step % config.save_steps == 0:
            save_checkpoint(step)
        if stop.asked:
            saved = save_checkpoint(step)
            tracker.close()
            print(f"interrupted after step {step} of {total_steps}; adapter saved in {saved}")
            raise KeyboardInterrupt
    stop.release()
    tracker.close()

    # ---- the end: best adapter, files, what was learnt ---------------------------------------------------------------

    if config.load_best_model_at_end and 0 < best["step"] < step:
        remove_lora(model)
        load_adapter(model, output_dir / f"checkpoint-{best['step']}")
        print(f"back to the adapter of step {best['step']}, held-out loss {best['loss']:.4f}")
    model.eval()
    save_adapter(model, output_dir, base_model_name_or_path=base_model)
    plot_loss(tracker.records, output_dir / "loss.png")
    figures = {
        "examples": f"{len(train_set):,}",
        "steps": f"{step} of {sum(map(len, step_batches(lengths, 0, *batching, config.seed)))} examples",
        "trainable parameters": f"{sum(p.numel() for p in trainable.values()):,}",
        "final training loss": f"{[r['loss'] for r in tracker.records if 'loss' in r][-1]:.4f}",
        "computed on": str(placement),
        "frozen weights": describe_weights(model),
        "peak memory": f"{memory_used(device) / 2**30:.2f} GiB",
        "training time": minutes(time.perf_counter() - started),
    }
    if eval_set:
        held_out = [r["eval_loss"] for r in tracker.records if "eval_loss" in r]
        figures |= {"held-out loss, base model": f"{held_out[0]:.4f}"}
        figures |= {"held-out loss, lowest": f"{best['loss']:.4f} (step {best['step']})"}
    if asked:
        after = answers(model, tokenizer, asked)
        scores = exact_match(before, asked), exact_match(after, asked)
        print_answers(asked, before, after)
        print(f"\nexact answers to {len(asked)} held-out prompts: {scores[0]:.1%} before, {scores[1]:.1%} after")
        figures |= {f"exact answers to {len(asked)} held-out prompts": f"{scores[1]:.1%} (base model: {scores[0]:.1%})"}
    write_model_card(output_dir / "README.md", config, base_model, figures)
    print(f"adapter, metrics, plot and model card are in {output_dir} ({minutes(time.perf_counter() - started)} in all)")


# ---- parts of the story that are better read apart ------------------------------------------------------------------


def load_datasets(config: TrainConfig, model_config: ModelConfig, tokenizer: Tokenizer) -> tuple[Dataset, Dataset | None]:
    """Training and held-out examples, tokenized and checked."""
    if config.dataset is None:
        raise UserError("dataset is missing; name a .jsonl, .json or .txt file with --dataset FILE")
    limit = model_config.max_position_embeddings
    cutoff_len = config.cutoff_len or min(1024, limit)
    if cutoff_len > limit:
        raise UserError(f"cutoff_len = {cutoff_len} is more than the {limit} positions of the model; set --cutoff_len {limit}")

    def tokenized(rows: list, file: str) -> Dataset:
        dataset = tokenize(rows, tokenizer, cutoff_len, config.train_on_prompt)
        if not dataset.examples:
            raise UserError(
                f"{file}: no token to learn is left in any of its {len(rows)} examples; raise cutoff_len = {cutoff_len}"
            )
        if (largest := max(int(e.input_ids.max()) for e in dataset.examples)) >= model_config.vocab_size:
            raise UserError(
                f"the tokenizer gives token {largest}, the model knows {model_config.vocab_size}: they are not of one model"
            )
        return dataset

    def rows_of(name: str) -> list:
        path = Path(name)
        if not path.exists() and (ROOT / name).exists() and name.startswith("assets/"):
            path = ROOT / name  # the examples that come with minilora are found from every working directory
        return read_rows(path, config.prompt_column, config.completion_column)

    rows, held_out = rows_of(config.dataset), []
    if config.eval_dataset:
        held_out = rows_of(config.eval_dataset)
    elif config.val_size:
        rows, held_out = split(rows, config.val_size, config.seed)
    train_set = tokenized(rows, config.dataset)
    eval_set = tokenized(held_out, config.eval_dataset or config.dataset) if held_out else None
    if config.exact_match_samples and any(row.prompt is None for row in held_out):
        raise UserError("exact_match_samples needs held-out prompts with completions, not plain text")
    return train_set, eval_set


def check_output_dir(directory: Path, overwrite: bool) -> None:
    """Refuse a directory that holds another run or cannot be written, without writing anything."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"output_dir {directory}: {existing} is a file, not a directory")
    if not os.access(existing, os.W_OK):
        raise UserError(f"output_dir {directory} cannot be written: no permission in {existing}")
    if not overwrite and (found := files_of_a_run(directory)):
        raise UserError(
            f"output_dir {directory} already holds a run ({found[0].name}); choose another or add --overwrite_output_dir"
        )


def files_of_a_run(directory: Path) -> list[Path]:
    """What a run writes under names that another one would overwrite."""
    names = f"training_config.yaml {METRICS_FILE} adapter_config.json adapter_model.safetensors loss.png README.md"
    return [path for name in names.split() if (path := directory / name).exists()] + checkpoints(directory)


def open_output_dir(directory: Path, config: TrainConfig) -> None:
    """Make the directory, clear what an earlier run left (and nothing else), and write down this run's settings."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in files_of_a_run(directory):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (directory / "training_config.yaml").write_text(config.to_yaml())
    except OSError as error:
        raise UserError(f"output_dir {directory} cannot be written: {error.strerror}") from error


def checkpoints(directory: Path) -> list[Path]:
    """The `checkpoint-<step>` folders, oldest first."""
    found = [path for path in directory.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


class StopSignal:
    """Ctrl-C asks the loop to stop after the step it is in, so that what is saved is whole; a second Ctrl-C stops at once."""

    def __init__(self, tracker: Tracker):
        self.asked, self.tracker = False, tracker
        signal.signal(signal.SIGINT, self)

    def __call__(self, signum: int, frame: object) -> None:
        self.asked = True
        self.release()
        self.tracker.say("stopping after this step; Ctrl-C again to stop at once without saving")

    def release(self) -> None:
        """Give Ctrl-C its usual meaning back."""
        signal.signal(signal.SIGINT, signal.default_int_handler)


def print_summary(
    config: TrainConfig,
    base_model: str,
    model: CausalLM,
    placement: Placement,
    train_set: Dataset,
    eval_set: Dataset | None,
    total_steps: int,
    epoch_steps: int,
) -> None:
    """What is about to happen, before it happens."""
    count = count_parameters(model)
    trainable = sum(p.numel() for p in trainable_parameters(model).values())
    lora, c = config.lora_config(), model.config
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    tokens = sum(len(e.input_ids) for e in train_set.examples) / len(train_set) * min(per_step, len(train_set))
    targets = lora.target_modules if isinstance(lora.target_modules, str) else " ".join(lora.target_modules)
    lines = {
        "model": f"{base_model}: {c.model_type}, {short_number(count - trainable)} parameters, "
        f"{c.num_hidden_layers} layers of width {c.hidden_size}",
        "device": str(placement),
        "weights": describe_weights(model),
        "adapter": f"r {lora.r}, alpha {lora.lora_alpha:g}, dropout {lora.lora_dropout:g}, on {targets}",
        "trainable": f"{trainable:,} of {count:,} parameters ({trainable / count:.2%})",
        "training": train_set.summary(),
        "held out": eval_set.summary() if eval_set else "none",
        "steps": f"{total_steps:,}, {epoch_steps:,} an epoch; {per_step} examples, about {tokens:,.0f} tokens each",
        "output": config.output_dir,
    }
    for name, text in lines.items():
        print(f"{name:<10} {text}", flush=True)


def print_answers(rows: list, before: list[str], after: list[str], count: int = 4) -> None:
    """A few held-out prompts with the answers of the base model and of the adapted one."""
    for i in range(0, len(rows), max(1, len(rows) // count))[:count]:
        print(f"\n{rows[i].prompt.strip()}")
        for name, text in (("base", before[i]), ("adapted", after[i]), ("expected", rows[i].completion.strip())):
            print(f"  {name:<9} {' '.join(text.split())[:110]}")


if __name__ == "__main__":
    run_script(main)
