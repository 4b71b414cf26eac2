"""Train several adapters at once: in one process, on one frozen model, with one stream of batches.

    python scripts/train_together.py rank_4.yaml rank_8.yaml rank_16.yaml
    python scripts/train_together.py rank_4.yaml rank_8.yaml rank_16.yaml --resume

Each file holds the settings of a run of scripts/train.py, and each run leaves what it leaves alone: adapter,
metrics, checkpoints, pictures and model card in its own output_dir. The settings of the adapter and of its
optimizer may differ; those of the model, the data and their order may not. `sweep.py --together` sorts the
runs of a grid for it.

A batch is read once, and a copy of it goes through the model for each run, as rows with that run's adapter.
Runs that do not fit into memory together are trained in halves. A run whose loss is not finite ends without
the others, and so does one that stops early.

    --resume       go on from the newest checkpoint of each run, and begin those that have none

Checkpoints are those of scripts/train.py, which can resume each run alone. Runs that have come to the same
step go on together.

Exit codes: 0 done, 2 a mistake of the user's or a run that failed, 130 interrupted by a signal (after all
runs have saved a checkpoint).
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import train
from torch import Tensor

from minilora.backend.choice import set_fused
from minilora.formats.weights import original_weight
from minilora.inference.evaluation import evaluate_losses
from minilora.lora import add_lora, remove_lora, set_adapter
from minilora.mixed import adapters, losses_of_each
from minilora.model import CausalLM
from minilora.recompute import set_recompute
from minilora.run import report
from minilora.run.full import load_trained
from minilora.run.plan import Plan, make_plan
from minilora.run.random_state import seeded
from minilora.run.settings import load_train_config
from minilora.run.stop_signal import StopSignal
from minilora.run.together import first_difference, parts_to_train
from minilora.run.vocabulary import load_base_model
from minilora.system.distributed import Processes, join_processes
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script, summarize
from minilora.wrapping import adapter_names, train_adapters


def main() -> None:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("settings", nargs="+", type=local_path, metavar="SETTINGS")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    processes = join_processes()
    if processes.count > 1:
        raise UserError("train_together.py trains in one process; start it without torchrun")
    failed: dict[str, str] = {}
    plans = make_plans(options.settings, options.resume, processes, failed)
    for part in parts_to_train(plans):
        if len(part) > 1:
            train_part(part, failed)
        else:
            train_alone(part[0], failed)
    if failed:
        names: dict[str, list[str]] = {}  # fault -> the runs that have it
        for name, fault in failed.items():
            names.setdefault(fault, []).append(name)
        faults = [f"{', '.join(who)}: {fault}" for fault, who in names.items()]
        raise UserError(f"{len(failed)} of {len(options.settings)} runs failed: {summarize(faults)}")


def name_of(plan: Plan) -> str:
    return plan.output_dir.name


# ---- plans, and which of them go together ------------------------------------------------------------------


def make_plans(
    files: Sequence[Path], resume: bool, processes: Processes, failed: dict[str, str]
) -> list[Plan]:
    """Return the plans of all runs that can begin; the data are read for the first. Raises UserError for
    settings that cannot be trained together.
    """
    configs = [load_train_config(["--config", str(file)]) for file in files]
    if resume:
        begun = [Path(config.output_dir).exists() for config in configs]
        latest = ["latest" if there else None for there in begun]
        configs = [replace(c, resume_from_checkpoint=which) for c, which in zip(configs, latest, strict=True)]
    if difference := first_difference(configs):
        raise UserError(f"these runs cannot be trained together: {difference}")
    places = [config.output_dir for config in configs]
    if twice := [place for place in places if places.count(place) > 1]:
        raise UserError(f"output_dir {twice[0]} is that of two runs; give each its own")
    plans: list[Plan] = []
    for config in configs:
        try:
            plans.append(make_plan(config, processes, like=plans[0] if plans else None))
        except UserError as error:
            note_failure(failed, Path(config.output_dir).name, error)
    return plans


def note_failure(failed: dict[str, str], name: str, error: UserError) -> None:
    failed[name] = str(error)
    print(f"{name}  failed: {error}", flush=True)


def train_alone(plan: Plan, failed: dict[str, str]) -> None:
    try:
        train.train(plan.config, plan.processes, plan)
    except UserError as error:
        note_failure(failed, name_of(plan), error)


# ---- several runs on one model -----------------------------------------------------------------------------


@dataclass
class Member:
    """One of the runs that are trained together."""

    adapter: str  # its name on the model
    plan: Plan
    run: train.Run

    @property
    def name(self) -> str:
        return name_of(self.plan)


class Group:
    """The runs that are trained on one model, until each of them is finished or has failed."""

    def __init__(self, plans: list[Plan], failed: dict[str, str]):
        started, plan = time.perf_counter(), plans[0]
        set_fused(plan.config.fused)
        self.model = load_base_model(plan.model_dir, plan.config, plan.placement, plan.model_config)
        self.plan, self.failed, self.members = plan, failed, []
        self.base_answers: list[str] | None = None  # to the held-out prompts, which are the same for all
        for i, own in enumerate(plans):
            try:
                self.members.append(join(own, self.model, f"run{i}", started))
            except UserError as error:
                note_failure(failed, name_of(own), error)
                self.take_off(f"run{i}")
        set_recompute(self.model, plan.memory.policies)
        self.learn()

    @property
    def names(self) -> list[str]:
        return [member.adapter for member in self.members]

    @property
    def step(self) -> int:
        return self.members[0].run.step

    def learn(self) -> None:
        """Let every member's adapter learn: what a single one was asked for is over."""
        train_adapters(self.model, self.names)
        self.model.train()

    def ask_base(self, ask: Callable[[], list[str]]) -> list[str]:
        """Return the base model's answers. It is asked once."""
        if self.base_answers is None:
            self.base_answers = ask()
        return self.base_answers

    def leave(self, member: Member, error: UserError | None = None) -> None:
        """Take a member and its adapter out of the group: finished, or failed with an error."""
        if error is not None:
            note_failure(self.failed, member.name, error)
            member.run.tracker.finish("FAILED")
        self.members.remove(member)
        self.take_off(member.adapter)
        self.learn()

    def take_off(self, adapter: str) -> None:
        if adapter in adapter_names(self.model):
            remove_lora(self.model, adapter)


def train_part(plans: list[Plan], failed: dict[str, str]) -> None:
    report.print_plans({name_of(plan): plan for plan in plans})
    group = Group(plans, failed)
    report.print_model(group.model)
    fit(group)


def join(plan: Plan, model: CausalLM, adapter: str, started: float) -> Member:
    """Put a run's adapter on the model, with the numbers that it begins with alone, and start the run."""
    torch.manual_seed(plan.config.seed)
    if stored := plan.checkpoint or plan.start_adapter:
        load_trained(plan, model, stored, adapter)
    else:
        add_lora(model, plan.lora, adapter, original=partial(original_weight, plan.model_dir))
    member = Member(adapter, plan, train.start(plan, model, started))
    member.run.tracker.share_terminal(member.name)
    return member


# ---- the loop ----------------------------------------------------------------------------------------------


def fit(group: Group) -> None:
    """Train all members to the last step or to an early stop. A stop by signal ends the process."""
    total_steps = group.plan.schedule.total_steps
    with StopSignal(print) as stop, ExitStack() as trackers:
        for member in group.members:
            trackers.enter_context(member.run.tracker)
        if group.plan.checkpoint is None and group.plan.eval_set and group.members:
            evaluate(group)
        while group.members and group.step < total_steps:
            stopping = take_step(group, stop)
            better = evaluate(group) if group.members and group.plan.evaluates(group.step) else set()
            stopped = [member for member in group.members if stops_early(member)]
            for member in [member for member in group.members if member not in stopped]:
                due = group.step % member.plan.save_steps == 0
                if stopping or due or (member.adapter in better and member.plan.saves_best):
                    save_checkpoint(group, member)
            for member in stopped:
                finish(group, member)
            if stopping and group.members:
                end_interrupted(group)
    for member in list(group.members):
        finish(group, member)


def take_step(group: Group, stop: StopSignal) -> bool:
    """Take one optimizer step of every member. Returns whether a signal asks to stop."""
    began, requested = time.perf_counter(), stop.requested
    gradients = accumulate_gradients(group)
    for member in list(group.members):
        try:
            metrics, stopping = train.optimizer_step(
                member.plan, member.run, stop, lambda *_, own=gradients[member.adapter]: own
            )
        except UserError as error:
            group.leave(member, error)
            continue
        requested |= stopping
        metrics = metrics._replace(seconds=time.perf_counter() - began)
        member.run.tracker.step(metrics, member.run.loss_scale)
    return requested


def accumulate_gradients(group: Group) -> dict[str, tuple[Tensor, int]]:
    """Add up the gradients of a step of all members. Returns each one's loss and tokens, by its adapter."""
    plan, names = group.plan, group.names
    batches, device = plan.order.batches(group.step), plan.placement.device
    supervised = sum(plan.train_set.examples[i].supervised for batch in batches for i in batch)
    totals, tokens = {name: torch.zeros((), device=device) for name in names}, 0
    with adapters(group.model, names) as mixture:
        for batch in seeded(batches, plan.config.seed, group.step, plan.processes):
            input_ids, *others = train.load_batch(plan, batch)
            losses = losses_of_each(mixture, names, input_ids, *others)
            parts = {name: losses[name] / supervised for name in names}
            scales = [member.run.loss_scale.scale for member in group.members]
            sum(scale * part for scale, part in zip(scales, parts.values(), strict=True)).backward()
            totals = {name: totals[name] + part.detach() for name, part in parts.items()}
            tokens += input_ids.numel()
    return {name: (totals[name], tokens) for name in names}


# ---- evaluation, saving ------------------------------------------------------------------------------------


def evaluate(group: Group) -> set[str]:
    """Log the losses on the held-out examples. Returns the adapters of those that are the lowest so far."""
    plan, names, better = group.plan, group.names, set()
    how = plan.memory.eval_batch_size * len(names), plan.tokenizer.pad_id, plan.config.padding_free
    losses = evaluate_losses(group.model, plan.eval_set.examples, names, *how)
    for member in group.members:
        if train.evaluate(member.plan, member.run, lambda *_, own=losses[member.adapter]: own):
            better.add(member.adapter)
    return better


def stops_early(member: Member) -> bool:
    patience, waited = member.plan.config.early_stopping_patience, member.run.best["waited"]
    if not patience or waited < patience or not member.plan.evaluates(member.run.step):
        return False
    member.run.tracker.say(f"stopping early: no lower held-out loss in {waited} evaluations")
    return True


def save_checkpoint(group: Group, member: Member) -> None:
    set_adapter(group.model, member.adapter)
    train.save_checkpoint(member.plan, member.run)
    group.learn()


def finish(group: Group, member: Member) -> None:
    """Save a member's results, and take it out of the group."""
    print(f"\n---- {member.name}")
    set_adapter(group.model, member.adapter)
    error = None
    try:
        train.finish(member.plan, member.run, group.ask_base)
    except UserError as fault:
        error = fault
    group.leave(member, error)


def end_interrupted(group: Group) -> None:
    """Exit after a stop by signal, when all members have saved."""
    for member in group.members:
        member.run.tracker.finish("KILLED")
    print(f"interrupted after step {group.step} of {group.plan.schedule.total_steps}; to resume: --resume")
    sys.exit(130)


if __name__ == "__main__":
    run_script(main)
