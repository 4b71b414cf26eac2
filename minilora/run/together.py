"""Which runs can be trained together: in one process, on one frozen model, with one stream of batches.

    run   1          2          3
    row   x          x          x          the same tokens, (3, N)
          W x        W x        W x        one product: W is read, and dequantized, once for all
          B1 A1 x    B2 A2 x    B3 A3 x    each row by its own adapter: see minilora/mixed.py
    loss  l1         l2         l3         backward of l1 + l2 + l3; then each run clips and steps by itself

No gradient crosses from one row to another, so each run takes the steps that it takes alone. What decides the
model, the batches and their order must be the same. What belongs to the adapter and its optimizer may differ.
With dropout, a run drops what it drops alone.

Activations are as many times as large as there are runs. The ledger is asked for all of them; runs that do
not fit together are trained in halves.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace

from minilora.data.examples import Order
from minilora.formats.weights import read_model
from minilora.memory.ledger import MARGIN, available_memory, memory_ledger
from minilora.run.memory_plan import MemoryPlan, plan_memory
from minilora.run.plan import Plan, answer_lengths
from minilora.run.settings import LARGEST, TrainConfig
from minilora.system.schema import shown

# What may differ among runs that are trained together: the adapter, its optimizer, and where results go.
MAY_DIFFER = set(
    """
    preset lora_rank lora_alpha lora_dropout lora_target additional_target use_rslora use_dora
    init_lora_weights use_vera lora_fa
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim adam_beta1 adam_beta2
    adam_epsilon loraplus_lr_ratio weight_decay max_grad_norm
    output_dir overwrite_output_dir resume_from_checkpoint run_name
    """.split()
)


def shared_settings(config: TrainConfig) -> dict[str, object]:
    """Return the settings that runs must have in common to be trained together."""
    return {key: value for key, value in asdict(config).items() if key not in MAY_DIFFER}


def groups(configs: Sequence[TrainConfig]) -> list[list[int]]:
    """Return the indices of the runs that can be trained together, in order of their first. Full training
    moves the base model itself, so such a run is alone.
    """
    found: list[list[int]] = []
    for i, config in enumerate(configs):
        fitting = (group for group in found if shared_settings(configs[group[0]]) == shared_settings(config))
        group = None if config.finetuning_type == "full" else next(fitting, None)
        if group is None:
            found.append([i])
        else:
            group.append(i)
    return found


def describe_groups(configs: Sequence[TrainConfig]) -> str:
    """Return in a line which runs are trained together, by their numbers from 1, and what divides them."""
    found, settings = groups(configs), list(map(shared_settings, configs))
    if len(found) == 1 < len(configs):
        return f"all {len(configs)} runs"
    together = [f"runs {_numbers(group)}" for group in found if len(group) > 1]
    alone = [i for group in found if len(group) == 1 for i in group]
    texts = together + ([f"alone {_numbers(alone)}"] if alone else [])
    differing = [key for key in settings[0] if any(one[key] != settings[0][key] for one in settings)]
    why = [f"{', '.join(differing)} must be the same"] if differing else []
    if any(config.finetuning_type == "full" for config in configs):
        why.append("finetuning_type 'full' trains the base model")
    return "; ".join(texts) + (f" ({'; '.join(why)})" if why else "")


def first_difference(configs: Sequence[TrainConfig]) -> str | None:
    """Return why runs cannot be trained together, in words, or None if they can."""
    first = shared_settings(configs[0])
    for config in configs:
        for key, value in shared_settings(config).items():
            if value != first[key]:
                return f"{key} is {shown(first[key])} in one and {shown(value)} in another"
    full = len(configs) > 1 and configs[0].finetuning_type == "full"
    return "finetuning_type 'full' trains the base model itself" if full else None


def _numbers(indices: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '1-3, 6'"""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ", ".join(str(r[0] + 1) if len(r) == 1 else f"{r[0] + 1}-{r[-1] + 1}" for r in runs)


# ---- steps, memory -----------------------------------------------------------------------------------------


def parts_to_train(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Return the plans in parts that begin at the same step and fit into memory."""
    parts: dict[int, list[Plan]] = {}
    for plan in plans:
        parts.setdefault(plan.state.get("step", 0), []).append(plan)
    return [fitting for part in parts.values() for fitting in parts_that_fit(part)]


def parts_that_fit(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Return the plans in parts that fit into the free memory, each with its part's memory plan.

    What does not fit is halved. A run that does not even fit alone keeps its own plan.
    """
    if len(plans) == 1:
        return [list(plans)]
    memory = memory_together(plans)
    available = available_memory(plans[0].placement.device)
    if available is None or MARGIN * memory.peak <= available:
        return [[replace(plan, memory=memory) for plan in plans]]
    print(
        f"memory     {len(plans)} runs together need {memory.peak / 2**30:.2f} of "
        f"{available / 2**30:.2f} GiB free, and a tenth should be left: in halves"
    )
    middle = -(-len(plans) // 2)
    return parts_that_fit(plans[:middle]) + parts_that_fit(plans[middle:])


def memory_together(plans: Sequence[Plan]) -> MemoryPlan:
    """Return one memory plan for runs that are trained together: of the run with the largest activations, on
    batches with a copy for every run, beside the adapters and moments of the others.
    """
    plan, count = plans[0], len(plans)
    trained = [_trained_bytes(one) for one in plans]
    longest = max(len(example.input_ids) for example in plan.eval_set.examples) if plan.eval_set else 0
    lengths = answer_lengths(plan.prompts, plan.tokenizer, plan.template)
    stored = read_model(plan.model_dir, plan.config.accepted_fields())[1]
    rows = min(count * plan.config.per_device_eval_batch_size, LARGEST["per_device_eval_batch_size"])
    found = []
    for one, own in zip(plans, trained, strict=True):
        config = replace(one.config, per_device_eval_batch_size=rows)
        order, beside = repeated(one.order, count), sum(trained) - own
        what = config, one.model_config, one.lora, one.placement, order, longest, lengths
        found.append(plan_memory(*what, stored.quantized_layers(), beside))
    memory = max(found, key=lambda each: each.peak)
    return replace(memory, eval_batch_size=max(1, memory.eval_batch_size // count))


def repeated(order: Order, count: int) -> Order:
    """Return an order whose largest micro-batch is this one's, so many times."""
    return replace(order, lengths=list(order.lengths) * count, batch_size=order.batch_size * count)


def _trained_bytes(plan: Plan) -> int:
    """Return the bytes of a run's adapter, gradients and moments."""
    device = plan.placement.device.type
    sizes = dict(batch_size=1, length=2, dtype=plan.placement.dtype, optim=plan.config.optim, device=device)
    ledger = memory_ledger(plan.model_config, plan.lora, None, recompute="full", **sizes)
    held = ledger.moments["optimizer step"]
    return held["adapter"] + held["gradients"] + held["optimizer states"]
