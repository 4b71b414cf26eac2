"""Fine-tune a Llama, Mistral or Qwen model with LoRA, from a file of examples to an adapter that PEFT, vLLM
and SGLang load.

    python scripts/train.py                                    the small model that comes with minilora learns to answer
    python scripts/train.py --model mistralai/Mistral-7B-v0.1 --dataset my.jsonl --output_dir out
    python scripts/train.py --config run.yaml --learning_rate 1e-4
    python scripts/train.py --config run.yaml --resume_from_checkpoint latest
    torchrun --nproc-per-node 2 scripts/train.py --config run.yaml
    python scripts/train.py --help                             every key, its default and its meaning

One file, read from top to bottom: plan, model, optimizer, evaluation and checkpoints, the loop, the end.
Everything cheap that can be wrong (keys, data, directories) is found before the weights are read, and nothing
is written before that.

Exit codes: 0 done, 2 a mistake of yours (one line says which), 130 interrupted by Ctrl-C or SIGTERM
(everything is saved first). torchrun makes 1 of the last two.
"""

import math
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minilora.data.chat import load_chat_template, training_clock
from minilora.data.examples import (
    Dataset,
    collate,
    document_ids,
    padding_share,
    step_batches,
    steps_per_epoch,
)
from minilora.data.packing import pack
from minilora.data.tokenizer import load_tokenizer
from minilora.formats.adapter import load_adapter, save_adapter
from minilora.formats.lint import lint_adapter, table
from minilora.formats.weights import load_model, read_config
from minilora.inference.evaluation import answers, evaluate_loss, exact_match
from minilora.lora import add_lora, remove_lora, set_adapter, trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.loss_scale import LossScale
from minilora.memory.ledger import available_memory, choose_recompute, memory_ledger, process_memory
from minilora.optim import learning_rate, make_optimizer, set_learning_rate
from minilora.recompute import set_recompute
from minilora.run.checkpoints import (
    StopSignal,
    check_same_training,
    copy_checkpoint,
    delete_old_checkpoints,
    find_checkpoint,
    list_checkpoints,
    random_state,
    sample_model,
    set_random_state,
    write_checkpoint,
)
from minilora.run.datasets import load_datasets, token_settings
from minilora.run.describe import describe_weights
from minilora.run.output_dir import SETTINGS_FILE, check_output_dir, files_of_a_run, open_output_dir
from minilora.run.plots import plot_loss, plot_training
from minilora.run.reporters import make_reporters, without_secrets
from minilora.run.settings import TrainConfig, load_train_config, manual
from minilora.run.sharing import destinations, files_to_share, send_to_all
from minilora.run.tracker import Tracker, minutes, print_answers, print_summary, write_model_card
from minilora.system.assets import DEFAULT_RUN, EMBEDDED_MODEL
from minilora.system.device import choose_placement, memory_used, return_freed_memory
from minilora.system.distributed import Processes, join_processes
from minilora.system.errors import UserError, run_script
from minilora.system.files import fingerprint
from minilora.system.hub import resolve_model


def main() -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(manual(), end="")
        return
    processes = join_processes()
    with processes.only_main_prints():
        train(load_train_config(sys.argv[1:], DEFAULT_RUN), processes)


def train(config: TrainConfig, processes: Processes) -> None:
    started = time.perf_counter()

    # ---- device, data, plan: everything that can be wrong without a weight in memory ---------------------------------

    return_freed_memory()
    placement = choose_placement(config.bf16, config.fp16)
    device = placement.device
    base_model = config.model_name_or_path or "assets/base"
    model_dir = resolve_model(
        config.model_name_or_path or str(EMBEDDED_MODEL), revision=config.model_revision
    )
    model_config = read_config(model_dir)
    tokenizer = load_tokenizer(model_dir)
    template = load_chat_template(config.template, tokenizer, now=training_clock)
    train_set, eval_set = load_datasets(config, model_config, tokenizer, template)
    if config.packing:
        train_set = pack(train_set, token_settings(config, model_config)["cutoff_len"], config.seed)
    asked = eval_set.rows[: config.exact_match_samples] if eval_set else []
    if any(row.prompt is None for row in asked):
        raise UserError(
            "exact_match_samples needs held-out prompts, and the held-out examples are plain text; set it to 0"
        )
    lengths = [len(example.input_ids) for example in train_set.examples]
    batching = (config.per_device_train_batch_size, config.gradient_accumulation_steps * processes.count)
    order = (config.seed, config.group_by_length)
    epoch_steps = steps_per_epoch(len(train_set), *batching)
    total_steps = (
        config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * epoch_steps)
    )
    warmup_steps = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if warmup_steps >= total_steps:
        raise UserError(
            f"warmup_steps = {warmup_steps} is not shorter than the training, which has {total_steps} steps"
        )
    eval_steps = (config.eval_steps or epoch_steps) if eval_set else None
    output_dir = Path(config.output_dir)
    training = asdict(config) | {  # what a run and the checkpoint it goes on from must have in common
        "the dtype of computing": f"{placement.dtype} on {device.type}",
        "the number of processes": processes.count,
        "the fingerprint of the model": fingerprint(sample_model(model_dir)),
        "the fingerprint of the training examples": fingerprint_of(train_set),
        "the fingerprint of the held-out examples": fingerprint_of(eval_set),
    }
    checkpoint, state = find_resumed(config, training, total_steps)
    check_output_dir(config, checkpoint)
    shares = (
        destinations(config.push_to_hub, config.hub_private_repo, config.upload) if processes.main else []
    )
    reporters = (
        make_reporters(
            config.trackers(), output_dir, asdict(config), config.run_name, config.mlflow_tracking_uri
        )
        if processes.main
        else []
    )
    for destination in shares:  # who may not write there learns it now
        destination.send({SETTINGS_FILE: without_secrets(config.to_yaml()).encode()}, "Begin training")
    ledger_of = partial(
        memory_ledger, model_config, config.lora_config(), config.quant_config(), batch_size=batching[0], length=max(lengths),
        dtype=placement.dtype, optim=config.optim, device=device.type, process=process_memory() if device.type == "cpu" else 0,
        eval_batch_size=config.per_device_eval_batch_size if eval_set else 0,
    )  # fmt: skip
    policy, reason = config.gradient_checkpointing, "as asked"
    if policy == "auto":
        policy, reason = choose_recompute(available_memory(device), ledger_of)

    # ---- model and adapter -------------------------------------------------------------------------------------------

    torch.manual_seed(config.seed)
    model = load_model(model_dir, config.quant_config(), placement.dtype, device)
    if checkpoint is None:
        add_lora(model, config.lora_config())
    else:
        load_adapter(model, checkpoint, lora_fa=config.lora_fa)
    trainable = trainable_parameters(model)
    assert all(p.dtype == torch.float32 for p in trainable.values()), (
        "adapters are float32, whatever the compute dtype"
    )
    recompute = set_recompute(model, policy)
    reason = reason if recompute == policy else f"{policy} needs a GPU"
    predicted = ledger_of(recompute=recompute).peak
    print_summary(
        config, base_model, model, placement, processes.count, train_set, eval_set, total_steps, epoch_steps
    )
    print(f"padding    {padding_share(lengths, *batching, *order):.1%} of what goes through the model")
    print(
        f"recompute  {recompute} ({reason})\nmemory     {predicted / 2**30:.2f} GiB predicted at the peak",
        flush=True,
    )

    # ---- optimizer ---------------------------------------------------------------------------------------------------

    optimizer = make_optimizer(
        config.optim, trainable, config.learning_rate, config.weight_decay, config.loraplus_lr_ratio
    )
    loss_scale = LossScale(device, enabled=placement.dtype == torch.float16)

    def optimizer_step(step: int) -> tuple[float, float, float, float, bool]:
        """One step over all its micro-batches: mean loss per supervised token, learning rate, gradient norm,
        tokens, stop now?
        """
        position = step - loss_scale.skipped  # in the schedule
        lr = learning_rate(
            position, total_steps, warmup_steps, config.learning_rate, config.lr_scheduler_type
        )
        set_learning_rate(optimizer, lr)
        batches = step_batches(lengths, step, *batching, *order)
        supervised = sum(train_set.examples[i].supervised for chosen in batches for i in chosen)
        loss, tokens = torch.zeros((), device=device), 0
        for chosen in processes.share(batches):
            examples = [train_set.examples[i] for i in chosen]
            input_ids, labels = (t.to(device) for t in collate(examples, tokenizer.pad_id))  # (B, T) each
            documents = document_ids(examples)  # (B, T), None where nothing is packed
            part = (
                causal_lm_loss(
                    model, input_ids, labels, documents if documents is None else documents.to(device)
                )
                / supervised
            )
            loss_scale.backward(part)
            loss, tokens = loss + part.detach(), tokens + input_ids.numel()
        loss, tokens, stopping = processes.sum_gradients(trainable.values(), loss, tokens, stop.asked)
        loss_scale.unscale(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), config.max_grad_norm or math.inf).item()
        assert step or norm != 0, (
            "no gradient has reached the adapter"
        )  # at step 0 it is B's alone, for A's is zero while B is
        loss_scale.step(optimizer, finite=math.isfinite(loss) and math.isfinite(norm))
        optimizer.zero_grad(set_to_none=True)
        if loss_scale.diverged:
            good = list_checkpoints(output_dir, up_to=step + 1 - loss_scale.skipped_in_a_row)
            raise UserError(
                f"loss {loss:g}, gradient norm {norm:g} at step {step + 1}: training diverged; lower learning_rate = "
                f"{config.learning_rate:g} (last good checkpoint: {good[-1] if good else 'none was saved yet'})"
            )
        return loss, lr, norm, tokens, bool(stopping)

    # ---- evaluation and checkpoints ----------------------------------------------------------------------------------

    best = {"loss": math.inf, "step": 0, "waited": 0}  # the lowest held-out loss so far; evaluations since

    def evaluate(step: int) -> bool:
        """Loss on the held-out examples, logged. Returns whether it is the lowest one yet."""
        share = processes.share(eval_set.examples)
        loss = (
            evaluate_loss(model, share, config.per_device_eval_batch_size, tokenizer.pad_id) if share else 0.0
        )
        loss = processes.mean(loss, weight=sum(example.supervised for example in share))
        tracker.log(step=step, eval_loss=loss)
        better = step > 0 and loss < best["loss"]
        tracker.say(
            f"step {step}/{total_steps}  held-out loss {loss:.4f}" + ("  (best so far)" if better else "")
        )
        best["waited"] = 0 if better else best["waited"] + 1
        if better:
            best.update(loss=loss, step=step)
        return better

    def save_checkpoint(step: int) -> Path:
        """All that a resumed run needs, in `checkpoint-<step>`. The oldest beyond `save_total_limit` go, the
        best one stays.
        """
        directory, generators = output_dir / f"checkpoint-{step}", processes.gather(random_state(device))
        if processes.main:
            state = dict(
                step=step,
                training=training,
                best=best,
                seconds=time.perf_counter() - started,
                random=generators,
            )
            state |= {
                "optimizer": optimizer.state_dict(),
                "loss_scale": loss_scale.state_dict(),
                "tracker": tracker.state_dict(),
            }
            write_checkpoint(
                directory, partial(save_adapter, model, base_model_name_or_path=base_model), state
            )
            if shares and config.hub_strategy == "every_save":
                share(step, directory)
            if config.save_total_limit is not None:
                spare = best["step"] if config.load_best_model_at_end else None
                delete_old_checkpoints(output_dir, step, config.save_total_limit, spare)
        return directory

    def figures(step: int) -> dict[str, str]:
        """What the model card says of the training so far."""
        losses = [record["loss"] for record in tracker.records if "loss" in record]
        held_out = [record["eval_loss"] for record in tracker.records if "eval_loss" in record]
        said = {
            "examples": f"{len(train_set):,}",
            "steps": f"{step} of {sum(map(len, step_batches(lengths, 0, *batching, *order)))} examples"
            + loss_scale.summary(),
            "trainable parameters": f"{sum(p.numel() for p in trainable.values()):,}",
            "final training loss": f"{losses[-1]:.4f}" if losses else "not finite",
            "computed on": str(placement),
            "frozen weights": describe_weights(model),
            "peak memory": f"{memory_used(device) / 2**30:.2f} GiB ({predicted / 2**30:.2f} GiB predicted)",
            "training time": minutes(time.perf_counter() - started),
        }
        if held_out:
            said |= {"held-out loss, base model": f"{held_out[0]:.4f}"}
            said |= {"held-out loss, lowest": f"{best['loss']:.4f} (step {best['step']})"}
        return said

    def share(step: int, adapter: Path) -> None:
        """Send an adapter and what belongs to it, in the middle of the training: what fails is a warning."""
        plot_loss(tracker.records, output_dir / "loss.png")
        write_model_card(output_dir / "README.md", config, base_model, figures(step))
        for destination in shares:
            try:
                destination.send(files_to_share(output_dir, adapter), f"Step {step} of {total_steps}")
            except UserError as error:
                tracker.say(f"warning: {error}; training goes on")

    # ---- the loop ----------------------------------------------------------------------------------------------------

    processes.wait_for_all()  # all have read what is there; now it may change
    if processes.main:
        open_output_dir(config, checkpoint)
        tokenizer.save(output_dir)
        if config.template is not None:
            template.save(output_dir)
        if checkpoint is not None and config.load_best_model_at_end and state["best"]["step"]:
            copy_checkpoint(checkpoint.with_name(f"checkpoint-{state['best']['step']}"), output_dir)
    visible = output_dir if processes.main else None
    tracker = Tracker(
        visible, total_steps, epoch_steps, config.logging_steps, state.get("tracker"), reporters
    )
    stop = StopSignal(tracker.say)
    first = step = state.get("step", 0)
    if processes.rank:
        torch.manual_seed(config.seed + processes.rank)  # every process drops out other places
    if checkpoint is not None:
        best, started = state["best"], started - state["seconds"]
        optimizer.load_state_dict(state["optimizer"])
        loss_scale.load_state_dict(state["loss_scale"])
        set_random_state(state["random"][processes.rank], device)
    model.train()
    with tracker:
        if checkpoint is None and eval_set:
            evaluate(step=0)
        for step in range(first + 1, total_steps + 1):
            start = time.perf_counter()
            loss, lr, norm, tokens, stopping = optimizer_step(step - 1)
            tracker.step(
                step, loss, lr, norm, tokens, time.perf_counter() - start, memory_used(device), loss_scale
            )
            wanted = stopping or step % config.save_steps == 0
            if eval_set and (step % eval_steps == 0 or step == total_steps):
                wanted |= evaluate(step) and config.load_best_model_at_end
                if config.early_stopping_patience and best["waited"] >= config.early_stopping_patience:
                    tracker.say(f"stopping early: no lower held-out loss in {best['waited']} evaluations")
                    break
            if wanted:
                saved = save_checkpoint(step)
            if stopping:
                processes.wait_for_all()
                tracker.finish("KILLED")
                print(
                    f"interrupted after step {step} of {total_steps}; to go on from {saved}: --resume_from_checkpoint latest"
                )
                raise KeyboardInterrupt
    stop.release()
    tracker.close()
    processes.leave()
    if not processes.main:
        return

    # ---- the end: best adapter, files, what was learned ---------------------------------------------------------------

    if config.load_best_model_at_end and 0 < best["step"] < step:
        remove_lora(model)
        load_adapter(model, output_dir / f"checkpoint-{best['step']}", lora_fa=config.lora_fa)
        print(f"back to the adapter of step {best['step']}, held-out loss {best['loss']:.4f}")
    model.eval()
    save_adapter(model, output_dir, base_model_name_or_path=base_model)
    plot_loss(tracker.records, output_dir / "loss.png")
    plot_training(tracker.records, output_dir / "training.png")
    card = figures(step)
    if asked:
        after = answers(model, tokenizer, asked, template=template)
        set_adapter(model, None)
        before = answers(model, tokenizer, asked, template=template)
        scores = exact_match(before, asked), exact_match(after, asked)
        print_answers(asked, before, after)
        print(
            f"\nexact answers to {len(asked)} held-out prompts: {scores[0]:.1%} before, {scores[1]:.1%} after"
        )
        card |= {
            f"exact answers to {len(asked)} held-out prompts": f"{scores[1]:.1%} (base model: {scores[0]:.1%})"
        }
    write_model_card(output_dir / "README.md", config, base_model, card)
    print("\n" + table(lint_adapter(output_dir, model_config)))
    tracker.finish("FINISHED", [path for path in files_of_a_run(output_dir) if path.is_file()])
    print(
        f"adapter, metrics, plot and model card are in {output_dir} ({minutes(time.perf_counter() - started)} in all)"
    )
    try:
        send_to_all(shares, files_to_share(output_dir), f"Trained for {step} steps")
    except UserError as error:
        raise UserError(f"{error}; all is in {output_dir}, and scripts/share.py sends it again") from error


# ---- parts of the story that are better read apart ------------------------------------------------------------------


def fingerprint_of(dataset: Dataset | None) -> str | None:
    """Changes with any token, and with any token's being learned or not."""
    parts = (
        ((e.input_ids, e.loss_mask, np.array(e.document_lengths)) for e in dataset.examples)
        if dataset
        else ()
    )
    return dataset and fingerprint(b"".join(part.tobytes() for part in example) for example in parts)


def find_resumed(config: TrainConfig, training: dict, total_steps: int) -> tuple[Path | None, dict]:
    """The checkpoint that resume_from_checkpoint asks for and its state; (None, {}) where the run starts at
    the beginning.
    """
    asked = config.resume_from_checkpoint
    if asked is None:
        return None, {}
    checkpoint, state, faults = find_checkpoint(Path(config.output_dir if asked == "latest" else asked))
    if checkpoint is None and asked != "latest":
        raise UserError(f"resume_from_checkpoint = {asked}: no checkpoint with a training_state is there")
    if checkpoint is None:
        print(f"no checkpoint in {config.output_dir} yet: starting at the beginning")
        return None, {}
    for fault in faults:
        print(f"passed over: {fault}")
    check_same_training(state["training"], training, config.may_change(), checkpoint)
    if state["step"] > total_steps:
        raise UserError(
            f"{checkpoint} is beyond the {total_steps} steps of this training; raise max_steps or num_train_epochs"
        )
    best = checkpoint.with_name(f"checkpoint-{state['best']['step']}")
    if config.load_best_model_at_end and state["best"]["step"] and not best.is_dir():
        raise UserError(
            f"{best} is missing: it holds the best adapter so far, which load_best_model_at_end will need"
        )
    print(f"going on from {checkpoint}, after step {state['step']} of {total_steps}")
    return checkpoint, state


if __name__ == "__main__":
    run_script(main)
