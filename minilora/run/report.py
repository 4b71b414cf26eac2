"""Where a run's output goes and what people read of it: summary, figures, pictures, answers, uploads."""

import sys
from pathlib import Path
from typing import NoReturn, Protocol

from minilora.adapters.lint import findings_text, lint_adapter
from minilora.config import LoraConfig
from minilora.data.chat import TOKENIZER_TEMPLATE
from minilora.data.examples import Order
from minilora.lora import trainable_parameters
from minilora.loss_scale import LossScale
from minilora.model import CausalLM
from minilora.run.answers import write_answers
from minilora.run.checkpoints import best_checkpoint, copy_checkpoint
from minilora.run.datasets import describe_template
from minilora.run.describe import (
    count_parameters,
    describe_optimizer,
    describe_targets,
    describe_weights,
)
from minilora.run.memory_plan import ANSWERS_AT_A_TIME
from minilora.run.model_card import write_model_card
from minilora.run.output_dir import KEPT_HERE, files_of_a_run, open_output_dir
from minilora.run.plan import Plan
from minilora.run.plots import plot_loss, plot_training
from minilora.run.sharing import files_to_share, send_to_all
from minilora.run.tracker import Tracker, minutes
from minilora.system.errors import UserError
from minilora.system.terminal import visible


class Run(Protocol):
    """The part of `scripts/train.py`'s Run that reports read."""

    model: CausalLM
    loss_scale: LossScale
    tracker: Tracker
    step: int
    best: dict

    @property
    def seconds(self) -> float: ...


# ---- at the start ------------------------------------------------------------------------------------------


def print_plan(plan: Plan) -> None:
    """Print what is decided before a weight is read, a line for each part of it."""
    _print_lines(_plan_lines(plan))


def print_plans(plans: dict[str, Plan]) -> None:
    """Print the plans of runs that are trained together, by name: what they have in common once."""
    lines = {name: _plan_lines(plan) for name, plan in plans.items()}
    common = set.intersection(*(set(one.items()) for one in lines.values()))
    first = next(iter(lines.values()))
    _print_lines({key: text for key, text in first.items() if (key, text) in common})
    for name, one in lines.items():
        own = [text for key, text in one.items() if (key, text) not in common and key != "output"]
        _print_lines({"run": "; ".join([name, *own])})


def _plan_lines(plan: Plan) -> dict[str, str]:
    config, order, processes = plan.config, plan.order, plan.processes.count
    lora, c = plan.lora, plan.model_config
    memory = plan.memory
    way = f"{memory.parallel} ({memory.why_parallel})" if processes > 1 else memory.why_parallel
    tokens = sum(order.lengths) / len(order.lengths) * min(order.examples_per_step, len(order.lengths))
    return {
        "model": f"{plan.base_model}: {c.model_type}, {c.num_hidden_layers} layers of width {c.hidden_size}",
        "device": str(plan.placement) + (f"; {processes} processes" if processes > 1 else ""),
        "adapter": "none: all weights are trained"
        if plan.trains_all
        else f"{describe_kind(lora)}, dropout {lora.lora_dropout:g}, on {describe_targets(lora)}",
        "optimizer": describe_optimizer(config.optim, plan.placement.device, config.loraplus_lr_ratio),
        "template": describe_template(plan.template, plan.tokenizer, plan.train_set.rows),
        "training": plan.train_set.summary(),
        "held out": plan.eval_set.summary() if plan.eval_set else "none",
        "steps": f"{plan.schedule.total_steps:,}, {order.steps_per_epoch:,} an epoch; "
        f"{order.examples_per_step} examples, about {tokens:,.0f} tokens each",
        "output": config.output_dir,
        "padding": describe_padding(order, plan.memory.rounded, config.padding_free),
        "parallel": way,
        "recompute": f"{plan.memory.recompute} ({plan.memory.reason})",
        "memory": f"{plan.memory.peak / 2**30:.2f} GiB predicted at the peak" + _smaller_batches(plan),
    }  # fmt: skip


def describe_kind(lora: LoraConfig) -> str:
    """Return an adapter's size, and where it starts if that is no matter of course."""
    if lora.use_vera:
        return f"VeRA, r {lora.r}"
    start = "" if lora.init_lora_weights is True else f", starts with {lora.init_lora_weights}"
    return f"r {lora.r}, alpha {lora.lora_alpha:g}{start}"


def describe_padding(order: Order, rounded: bool, padding_free: bool) -> str:
    """Return how much of what the model reads is padding, in words."""
    share = order.padding_share(rounded, padding_free)
    if padding_free and share == 0:
        return "none: the examples of a pass lie end to end in one row"
    return f"{share:.1%} of all tokens that go through the model"


def _smaller_batches(plan: Plan) -> str:
    """Return which batches are smaller than usual to fit, else an empty text."""
    said, memory = "", plan.memory
    if plan.eval_set and memory.eval_batch_size < plan.config.per_device_eval_batch_size:
        said += f"; {memory.eval_batch_size} held-out examples at a time"
    if plan.prompts and memory.answer_batch_size < ANSWERS_AT_A_TIME:
        said += f"; {memory.answer_batch_size} answers at a time"
    return said


def print_model(model: CausalLM) -> None:
    """Print how the weights are stored and how many of them learn."""
    count = count_parameters(model)
    trainable = sum(p.numel() for p in trainable_parameters(model).values())
    _print_lines({
        "weights": describe_weights(model),
        "trainable": f"{trainable:,} of {count:,} parameters ({trainable / count:.2%})",
    })  # fmt: skip


def _print_lines(lines: dict[str, str]) -> None:
    for name, text in lines.items():
        if text:
            print(f"{name:<10} {text}", flush=True)


def open_output(plan: Plan) -> Tracker:
    """Write settings, tokenizer and chat template to output_dir. Returns the tracker that records there.

    Only the main process writes; the trackers of the others keep their records in memory.
    """
    config, directory = plan.config, plan.output_dir
    plan.processes.wait_for_all()  # every process has read its files; from here on they may change
    if plan.processes.main:
        open_output_dir(config, plan.checkpoint)
        plan.tokenizer.save(directory)
        if plan.template is not None and plan.template.name != TOKENIZER_TEMPLATE:
            plan.template.save(directory)
        best = best_checkpoint(plan.checkpoint, plan.state) if plan.checkpoint is not None else None
        if best is not None and config.keeps_best:
            copy_checkpoint(best, directory)
    return Tracker(
        directory if plan.processes.main else None,
        plan.schedule.total_steps,
        plan.order.steps_per_epoch,
        plan.logging_steps,
        plan.state.get("tracker"),
        plan.reporters,
    )


# ---- during the run, and at its end ------------------------------------------------------------------------


def saved_step(plan: Plan, run: Run) -> int:
    """The step of the adapter that a finished run saves: the best one if requested, else the last."""
    best = run.best["step"]
    return best if plan.config.keeps_best and 0 < best < run.step else run.step


def training_figures(plan: Plan, run: Run, step: int | None = None) -> dict[str, str]:
    """The rows of the model card's table, for the adapter of `step`; None: the one that the run ends with."""
    step = saved_step(plan, run) if step is None else step
    this = "this model" if plan.trains_all else "this adapter"
    losses = [record["loss"] for record in run.tracker.records if "loss" in record]
    held_out = {r["step"]: r["eval_loss"] for r in run.tracker.records if "eval_loss" in r}
    used, reserved = run.tracker.peak(*plan.memory.measure(plan.placement.device))
    first_step = sum(len(batch) for batch in plan.order.batches(0))
    figures = {
        "examples": f"{len(plan.train_set.rows):,}",
        "steps": f"{run.step} of {first_step} examples{run.loss_scale.summary()}",
        this: f"of step {step}" + ", the lowest held-out loss" * (step == run.best["step"]),
        "trainable parameters": f"{sum(p.numel() for p in trainable_parameters(run.model).values()):,}",
        "final training loss": f"{losses[-1]:.4f}" if losses else "not finite",
        "computed on": str(plan.placement),
        "original weights" if plan.trains_all else "frozen weights": describe_weights(run.model),
        "peak memory": f"{used / 2**30:.2f} GiB ({plan.memory.peak / 2**30:.2f} GiB predicted)",
        "training time": minutes(run.seconds),
    }
    if accepted := plan.config.accepted_fields():
        figures["fields of config.json declared harmless"] = ", ".join(accepted)
    if reserved is not None:
        figures["peak memory reserved of the GPU"] = f"{reserved / 2**30:.2f} GiB"
    if held_out:
        figures["held-out loss, base model"] = f"{held_out[min(held_out)]:.4f}"
        if step in held_out:
            figures[f"held-out loss, {this}"] = f"{held_out[step]:.4f}"
        figures["held-out loss, lowest"] = f"{run.best['loss']:.4f} (step {run.best['step']})"
    return figures


def share_checkpoint(plan: Plan, run: Run, checkpoint: Path) -> None:
    """Send a checkpoint's adapter, loss curve and model card. A failed upload only prints a warning."""
    plot_loss(run.tracker.records, plan.output_dir / "loss.png")
    write_model_card(plan, training_figures(plan, run, run.step))
    files = files_to_share(plan.output_dir, checkpoint)
    for destination in plan.destinations:
        try:
            destination.send(files, f"Step {run.step} of {plan.schedule.total_steps}")
        except UserError as error:
            run.tracker.say(f"warning: {error}; training continues")


def end_interrupted(plan: Plan, run: Run, checkpoint: Path) -> NoReturn:
    """Exit after a stop by signal, when all processes have saved: say how to resume."""
    plan.processes.wait_for_all()
    run.tracker.finish("KILLED")
    print(f"interrupted after step {run.step} of {plan.schedule.total_steps}; ", end="")
    print(f"to resume from {checkpoint}: --resume_from_checkpoint latest")
    sys.exit(130)


def print_saved_step(plan: Plan, run: Run) -> None:
    """Print which step's adapter or model is saved, if another step had the lowest held-out loss."""
    best = run.best
    if not 0 < best["step"] < run.step:
        return
    trained = "model" if plan.trains_all else "adapter"
    if saved_step(plan, run) == best["step"]:
        print(f"back to the {trained} of step {best['step']}, held-out loss {best['loss']:.4f}")
        return
    print(
        f"saved is the {trained} of step {run.step}; step {best['step']} had the lowest held-out loss, "
        f"{best['loss']:.4f}: --load_best_model_at_end ends with that one"
    )


def draw_curves(plan: Plan, run: Run) -> None:
    """Draw loss.png and training.png."""
    plot_loss(run.tracker.records, plan.output_dir / "loss.png")
    plot_training(run.tracker.records, plan.output_dir / "training.png")


def print_findings(plan: Plan) -> None:
    """Print which programs load the adapter that was saved. A model loads anywhere."""
    if not plan.trains_all:
        print("\n" + findings_text(lint_adapter(plan.output_dir, plan.base_config)))


def publish(plan: Plan, run: Run) -> None:
    """Tell the reporters that the run is finished, and send the results to all destinations."""
    directory = plan.output_dir
    files = [path for path in files_of_a_run(directory) if path.is_file() and path.name not in KEPT_HERE]
    run.tracker.finish("FINISHED", files)
    trained = "model" if plan.trains_all else "adapter"
    print(f"{trained}, metrics, plot and model card are in {directory} ({minutes(run.seconds)} in all)")
    try:
        send_to_all(plan.destinations, files_to_share(directory), f"Trained for {run.step} steps")
    except UserError as error:
        raise UserError(f"{error}; all is in {directory}, and scripts/share.py sends it again") from error


def report_answers(plan: Plan, before: list[str], after: list[str], count: int = 4) -> None:
    """Write the answers of the base model and of the adapted one to answers.jsonl, and print a few.

    Processes that share a model have all answered; the main one writes.
    """
    if not plan.processes.main:
        return
    rows = plan.prompts
    write_answers(plan.output_dir, rows, before, after)
    for i in range(0, len(rows), max(1, len(rows) // count))[:count]:
        print(f"\n{visible(rows[i].prompt.strip())}")
        for name, text in ("base", before[i]), ("adapted", after[i]), ("expected", rows[i].completion):
            print(f"  {name:<9} {visible(' '.join(text.split())[:110])}")
