"""Fine-tune a Llama, Mistral or Qwen model with LoRA, and leave an adapter that PEFT, vLLM and SGLang load.

    python scripts/train.py                                    teach the small model that comes with minilora
    python scripts/train.py --model mistralai/Mistral-7B-v0.1 --dataset my.jsonl --output_dir out
    python scripts/train.py --config run.yaml --learning_rate 1e-4
    python scripts/train.py --config run.yaml --resume_from_checkpoint latest
    torchrun --nproc-per-node 2 scripts/train.py --config run.yaml
    python scripts/train.py --help                             every key, its default and its meaning

`train` is the whole story, its parts in order. A `Plan` holds every decision. It is complete before a weight
is read, so every cheap mistake shows at once. A `Run` holds what changes while training; checkpoints save it.

Exit codes: 0 done, 2 a mistake of the user's (one line explains it), 130 interrupted by Ctrl-C, SIGTERM or
SIGHUP (after a checkpoint is saved), 128 + n ended by signal n outside the loop. torchrun turns them into 1.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.run.manual import manual
    from minilora.system.early_help import answer_help

    answer_help(manual())

import math
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.backend.choice import set_fused
from minilora.data.examples import batch_for
from minilora.formats.weights import original_weight
from minilora.inference.evaluation import answers, evaluate_loss, exact_match
from minilora.lora import add_lora, set_adapter, trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.loss_scale import LossScale
from minilora.model import CausalLM
from minilora.optim import make_optimizer, set_learning_rate
from minilora.parallel.passes import catch_up, gathered_on_reading
from minilora.recompute import set_recompute
from minilora.run import checkpoints, report
from minilora.run.divergence import explain_not_finite
from minilora.run.full import load_trained, save_trained
from minilora.run.plan import Plan, make_plan
from minilora.run.random_state import seeded
from minilora.run.settings import TrainConfig, load_train_config
from minilora.run.stop_signal import StopSignal
from minilora.run.tracker import StepMetrics, Tracker
from minilora.run.vocabulary import load_base_model
from minilora.system.assets import DEFAULT_RUN
from minilora.system.distributed import Processes, join_processes
from minilora.system.errors import run_script


def main() -> None:
    processes = join_processes()
    with processes.only_main_prints():
        train(load_train_config(sys.argv[1:], DEFAULT_RUN), processes)


def train(config: TrainConfig, processes: Processes, plan: Plan | None = None) -> None:
    started = time.perf_counter()
    plan = plan or make_plan(config, processes)  # device, examples, their order, the schedule
    report.print_plan(plan)
    model = build_model(plan)  # frozen and quantized, with an adapter to train
    report.print_model(model)
    run = start(plan, model, started)  # optimizer and loss scale, from zero or from a checkpoint
    fit(plan, run)  # steps, evaluations, checkpoints
    if processes.main or plan.sharded:
        finish(plan, run)  # adapter, metrics, pictures, model card


@dataclass
class Run:
    """Everything that changes while a model trains. A checkpoint saves it."""

    model: CausalLM
    trainable: dict[str, nn.Parameter]  # the adapter's parameters, by name
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    tracker: Tracker  # the records so far
    started: float  # on the clock of time.perf_counter; earlier by the seconds before a resume
    step: int = 0  # finished optimizer steps
    lost: list[int] = field(default_factory=list)  # steps whose loss was not finite; not saved
    # The lowest held-out loss, its step, and the number of evaluations since.
    best: dict = field(default_factory=lambda: {"loss": math.inf, "step": 0, "waited": 0})

    @property
    def seconds(self) -> float:
        """Time in this training, including the time before a resume."""
        return time.perf_counter() - self.started

    def state_dict(self) -> dict:
        """Everything but the adapter, which a checkpoint saves in a file of its own."""
        state = {"step": self.step, "best": self.best, "seconds": self.seconds}
        stateful = {"optimizer": self.optimizer, "loss_scale": self.loss_scale, "tracker": self.tracker}
        return state | {name: part.state_dict() for name, part in stateful.items()}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`. Adapter and tracker are missing: they were built from their saved state."""
        self.step, self.best, self.started = state["step"], state["best"], self.started - state["seconds"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.loss_scale.load_state_dict(state["loss_scale"])


# ---- data --------------------------------------------------------------------------------------------------


def load_batch(plan: Plan, indices: list[int]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return input_ids, labels and document_ids of a micro-batch, as the loss wants them: one row, (1, N).

    document_ids is None unless a row holds several examples. `make_plan` has read and tokenized them.
    """
    examples, pad_id = [plan.train_set.examples[i] for i in indices], plan.tokenizer.pad_id
    layout = plan.memory.rounded, plan.config.padding_free
    return batch_for(plan.placement.device, examples, pad_id, *layout)


# ---- model, LoRA, quantization, recompute ------------------------------------------------------------------


def build_model(plan: Plan) -> CausalLM:
    """Load the frozen model and put an adapter on it: a new one, an old one, or the one of the checkpoint."""
    config = plan.config
    torch.manual_seed(config.seed)
    set_fused(config.fused)
    # Every weight is quantized as soon as it is read, so the whole model never lies in memory unquantized.
    model = load_base_model(plan.model_dir, config, plan.placement, plan.model_config, plan.sharers)
    with gathered_on_reading(model):
        if adapter := plan.checkpoint or plan.start_adapter:
            load_trained(plan, model, adapter)
        else:
            add_lora(model, plan.lora, original=partial(original_weight, plan.model_dir))
    set_recompute(model, plan.memory.policies)
    return model.train()


# ---- optimizer, loss scale ---------------------------------------------------------------------------------


def start(plan: Plan, model: CausalLM, started: float) -> Run:
    """Make the optimizer and the loss scale, open the output, and restore the state of a checkpoint."""
    trainable = trainable_parameters(model)
    assert {p.dtype for p in trainable.values()} == {torch.float32}, "adapters are float32 in any dtype"
    optimizer = make_optimizer(plan.config.optim, trainable, **plan.config.optimizer_settings())
    loss_scale = LossScale(plan.placement.device, enabled=plan.placement.dtype == torch.float16)
    checkpoints.check_fits(plan.state, plan.config, plan.lora, model, optimizer, loss_scale)
    run = Run(model, trainable, optimizer, loss_scale, report.open_output(plan), started)
    if plan.checkpoint is not None:
        run.load_state_dict(plan.state)
    return run


# ---- the loop, the step, the accumulation ------------------------------------------------------------------


def fit(plan: Plan, run: Run) -> None:
    """Train to the last step, or to an early stop. A stop by signal ends the process."""
    config, tracker, total_steps = plan.config, run.tracker, plan.schedule.total_steps
    with StopSignal(tracker.say) as stop, tracker:
        if plan.checkpoint is None and plan.eval_set:
            evaluate(plan, run)
        while run.step < total_steps:
            metrics, stopping = optimizer_step(plan, run, stop)
            tracker.step(metrics, run.loss_scale)
            save = stopping or run.step % plan.save_steps == 0
            if plan.evaluates(run.step):
                save |= evaluate(plan, run) and plan.saves_best
                if config.early_stopping_patience and run.best["waited"] >= config.early_stopping_patience:
                    tracker.say(f"stopping early: no lower held-out loss in {run.best['waited']} evaluations")
                    break
            if save:
                saved = save_checkpoint(plan, run)
            if stopping:
                report.end_interrupted(plan, run, saved)
    tracker.close()
    if not plan.sharded:
        plan.processes.leave()


def optimizer_step(plan: Plan, run: Run, stop: StopSignal, accumulate=None) -> tuple[StepMetrics, bool]:
    """Take one optimizer step. Returns its metrics, and whether any process has received a stop signal."""
    began = time.perf_counter()
    lr = plan.schedule.learning_rate(run.step - run.loss_scale.skipped)  # skipped steps do not count
    set_learning_rate(run.optimizer, lr)
    loss, tokens = (accumulate or accumulate_gradients)(plan, run)
    parameters = run.trainable.values()
    loss, tokens, stopping = plan.processes.sum_gradients(parameters, loss, tokens, stop.requested)
    run.loss_scale.unscale(run.optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, plan.config.max_grad_norm or math.inf)
    loss, norm = run.loss_scale.step(run.optimizer, loss, norm)
    # At step 0 only B has a gradient: A's contains the factor B, which is still zero.
    assert run.step or norm != 0, "no gradient has reached the adapter"
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    if not (math.isfinite(loss) and math.isfinite(norm)):
        again = plan.processes.share(plan.order.batches(run.step - 1))
        explain_not_finite(plan, run, loss, norm, (load_batch(plan, batch) for batch in again))
    memory, seconds = plan.memory.measure(plan.placement.device), time.perf_counter() - began
    return StepMetrics(run.step, loss, lr, norm, tokens, seconds, *memory), bool(stopping)


def accumulate_gradients(plan: Plan, run: Run) -> tuple[Tensor, int]:
    """Add up the gradients of a step over this process's micro-batches. Returns their loss and their tokens.

    Every token's loss is divided by the supervised tokens of the whole step, of all processes. A mean per
    micro-batch instead would give more weight to the tokens of short examples.
    """
    batches = plan.order.batches(run.step)
    supervised = sum(plan.train_set.examples[i].supervised for batch in batches for i in batch)
    loss, tokens = torch.zeros((), device=plan.placement.device), 0
    for batch in seeded(batches, plan.config.seed, run.step, plan.processes):
        input_ids, labels, documents = load_batch(plan, batch)
        part = causal_lm_loss(run.model, input_ids, labels, documents) / supervised
        run.loss_scale.backward(part)
        loss, tokens = loss + part.detach(), tokens + input_ids.numel()
    catch_up(run.model, plan.processes, len(batches))
    return loss, tokens


# ---- evaluation --------------------------------------------------------------------------------------------


def evaluate(plan: Plan, run: Run, measure=None) -> bool:
    """Log the loss on the held-out examples. Returns whether it is the lowest one so far."""
    share = plan.processes.share(plan.eval_set.examples)
    how = plan.memory.eval_batch_size, plan.tokenizer.pad_id, plan.config.padding_free
    loss = (measure or evaluate_loss)(run.model, share, *how) if share else 0.0
    catch_up(run.model, plan.processes, len(plan.eval_set.examples), plan.memory.eval_batch_size)
    loss = plan.processes.mean(loss, weight=sum(example.supervised for example in share))
    run.tracker.log(step=run.step, eval_loss=loss)
    better = run.step > 0 and loss < run.best["loss"]
    mark = "  (best so far)" if better else ""
    run.tracker.say(f"step {run.step}/{plan.schedule.total_steps}  held-out loss {loss:.4f}{mark}")
    if better:
        run.best = {"loss": loss, "step": run.step, "waited": 0}
    else:
        run.best["waited"] += 1
    return better


def compare_answers(plan: Plan, model: CausalLM, ask_base=None) -> dict[str, str]:
    """Answer the held-out prompts with and without the adapter. Returns the scores, for the model card."""
    prompts, batch_size = plan.prompts, plan.memory.answer_batch_size
    ask = partial(answers, model, plan.tokenizer, prompts, batch_size, template=plan.template)
    after = ask()
    set_adapter(model, None)
    before = ask_base(ask) if ask_base else ask()
    report.report_answers(plan, before, after)
    base, adapted = exact_match(before, prompts), exact_match(after, prompts)
    title = f"exact answers to {len(prompts)} held-out prompts"
    print(f"\n{title}: {base:.1%} before, {adapted:.1%} after")
    return {title: f"{adapted:.1%} (base model: {base:.1%})"}


# ---- saving ------------------------------------------------------------------------------------------------


def save_checkpoint(plan: Plan, run: Run) -> Path:
    """Write `checkpoint-<step>`, and delete the oldest ones beyond `save_total_limit` except the best one."""
    config, directory = plan.config, plan.output_dir / f"checkpoint-{run.step}"
    if plan.processes.main:
        write, state = partial(save_trained, plan, run.model, is_checkpoint=True), run.state_dict()
        checkpoints.write_checkpoint(directory, write, state | {"training": plan.training})
        if plan.destinations and config.hub_strategy == "every_save":
            report.share_checkpoint(plan, run, directory)
        if (limit := config.save_total_limit) is not None:
            best_step = run.best["step"] if config.keeps_best else None
            checkpoints.delete_old_checkpoints(plan.output_dir, run.step, limit, best_step)
    return directory


def finish(plan: Plan, run: Run, ask_base=None) -> None:
    """Save the last adapter, or the best one if requested. Then draw, compare answers, and publish."""
    model, directory, best = run.model, plan.output_dir, run.best
    if plan.config.keeps_best and 0 < best["step"] < run.step:
        load_trained(plan, model, directory / f"checkpoint-{best['step']}")
    report.print_saved_step(plan, run)
    model.eval()
    save_trained(plan, model, directory)
    figures = report.training_figures(plan, run)
    if plan.prompts:
        figures |= compare_answers(plan, model, ask_base)  # by all processes that share the model
    plan.processes.leave()
    if plan.processes.main:
        report.draw_curves(plan, run)
        report.write_model_card(plan, figures)
        report.print_findings(plan)
        report.publish(plan, run)


if __name__ == "__main__":
    run_script(main)
