"""Everything that a run decides before it reads a weight: device, data, order, schedule, checkpoint, memory.

Every cheap mistake is found here: in the settings, the data, the checkpoint to resume from, the directories
and repositories to write to. A plan writes nothing on this machine.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minilora.adapters.save_load import read_adapter_config, vocabulary_of
from minilora.config import LoraConfig, ModelConfig
from minilora.data.chat import ChatTemplate
from minilora.data.examples import ANSWER_SLACK, Dataset, Order, prompt_ids
from minilora.data.packing import pack
from minilora.data.rows import Row
from minilora.data.tokenizer import Tokenizer, has_tokenizer
from minilora.formats.weights import read_model
from minilora.memory.allocator import limit_compiled_kernels
from minilora.optim import Schedule
from minilora.parallel.choice import refusal
from minilora.run.checkpoints import find_resumed, sample_model
from minilora.run.curves import Curve, make_curve
from minilora.run.datasets import load_datasets, token_settings
from minilora.run.memory_plan import MemoryPlan, plan_memory
from minilora.run.output_dir import SETTINGS_FILE, check_inputs, check_output_dir
from minilora.run.reporters import Reporter, make_reporters
from minilora.run.settings import TrainConfig
from minilora.run.sharing import Destination, make_destinations
from minilora.run.vocabulary import choose_vocabulary, load_run_tokenizer
from minilora.system.assets import EMBEDDED_MODEL
from minilora.system.device import Placement, choose_placement
from minilora.system.distributed import Processes
from minilora.system.errors import UserError
from minilora.system.files import fingerprint
from minilora.system.hub import resolve_model
from minilora.system.locks import check_unlocked
from minilora.system.redaction import without_secrets


@dataclass(frozen=True)
class Plan:
    """The decisions of a run. None of them changes while it trains."""

    config: TrainConfig
    processes: Processes
    placement: Placement  # device and dtype
    # the model and its data
    model_dir: Path
    base_config: ModelConfig  # as the model's files say
    model_config: ModelConfig  # with the vocabulary that it has under the adapter
    lora: LoraConfig  # of the adapter to train
    start_adapter: Path | None  # the adapter to go on from; None: a new one
    tokenizer: Tokenizer
    template: ChatTemplate | None
    train_set: Dataset
    eval_set: Dataset | None
    # the steps
    order: Order
    schedule: Schedule | Curve
    memory: MemoryPlan
    # where the run begins
    training: dict  # settings and fingerprints that a run must share with the checkpoint it resumes
    checkpoint: Path | None  # None: begin at step 0
    state: dict  # saved in `checkpoint`; empty at step 0
    # where results go
    destinations: list[Destination]
    reporters: list[Reporter]

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def base_model(self) -> str:
        """The name of the base model in the adapter's files."""
        return self.config.model_name_or_path or "assets/base"

    @property
    def trains_all(self) -> bool:
        """Whether all weights are trained, and not an adapter: see `minilora.run.full`."""
        return self.config.finetuning_type == "full"

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the frozen weights: see `minilora.parallel`."""
        return self.memory.parallel == "fsdp"

    @property
    def sharers(self) -> Processes | None:
        """The processes that divide the model; None: each one holds all of it."""
        return self.processes if self.sharded else None

    @property
    def as_trained(self) -> dict:
        """What `load_adapter` must know of this run's adapter and its files do not say."""
        return dict(lora_fa=self.lora.lora_fa, lora_dropout=self.lora.lora_dropout, started=self.lora)

    @property
    def eval_steps(self) -> int:
        """Steps from one evaluation to the next: an epoch unless the settings give a number or a share."""
        return self._count(self.config.eval_steps) or self.order.steps_per_epoch

    @property
    def save_steps(self) -> int:
        """Steps from one checkpoint to the next; more than all steps where none is due by their number."""
        if self.config.save_strategy == "epoch":
            return self.order.steps_per_epoch
        if self.config.save_strategy == "steps":
            return self._count(self.config.save_steps)
        return self.schedule.total_steps + 1

    @property
    def logging_steps(self) -> int:
        """Steps from one record of the metrics to the next."""
        return self._count(self.config.logging_steps)

    @property
    def saves_best(self) -> bool:
        """Whether a checkpoint follows every evaluation with a lower loss."""
        return self.config.keeps_best or self.config.save_strategy == "best"

    def evaluates(self, step: int) -> bool:
        """Return whether the held-out examples are evaluated after `step` steps."""
        if self.eval_set is None:
            return False
        due = step % self.eval_steps == 0 or step == self.schedule.total_steps
        waited = step if self.config.eval_steps else step / self.order.steps_per_epoch
        return due and waited >= self.config.eval_delay

    def _count(self, steps: float | None) -> int | None:
        return steps if steps is None else count_steps(steps, self.schedule.total_steps)

    @property
    def prompts(self) -> list[Row]:
        """The held-out rows that the model answers before and after training."""
        return answered_rows(self.config, self.eval_set)


def make_plan(config: TrainConfig, processes: Processes, like: Plan | None = None) -> Plan:
    """Decide all of a run. Raises UserError for every mistake that shows without the weights.

    like: the plan of a run with the same data, which are not read again.
    """
    limit_compiled_kernels()
    check_unlocked("output_dir", Path(config.output_dir))  # before its checkpoints are read
    placement = choose_placement(config.bf16, config.fp16)
    model_dir = resolve_model(
        config.model_name_or_path or str(EMBEDDED_MODEL), revision=config.model_revision
    )
    check_inputs(config, model_dir)
    base_config, stored = read_model(model_dir, config.accepted_fields())
    start_adapter = resolve_model(config.adapter_name_or_path) if config.adapter_name_or_path else None
    lora, model_config = choose_adapter(config, start_adapter, base_config)
    if lora.init_lora_weights == "loftq" and stored.prequantized:
        raise UserError(
            f"init_lora_weights 'loftq' needs the original weights, and {model_dir} holds quantized ones"
        )
    tokenizer = load_run_tokenizer(config, start_adapter if has_tokenizer(start_adapter) else model_dir)
    lora, model_config = choose_vocabulary(config, lora, model_config, tokenizer)
    divided = config.finetuning_type, lora, base_config, model_config
    refused = refusal(*divided) if processes.count > 1 else ""
    if config.parallel == "fsdp" and refused:
        raise UserError(refused)
    if like is not None:
        template, train_set, eval_set = like.template, like.train_set, like.eval_set
    else:
        template, train_set, eval_set = load_examples(config, model_config, tokenizer)
    order = make_order(config, train_set, processes)
    schedule = make_schedule(config, order.steps_per_epoch)
    training = asdict(config) | {
        "the dtype of computing": f"{placement.dtype} on {placement.device.type}",
        "the number of processes": processes.count,
        "the fingerprint of the model": fingerprint(sample_model(model_dir)),
        "the fingerprint of the training examples": train_set.fingerprint(),
        "the fingerprint of the held-out examples": eval_set.fingerprint() if eval_set else None,
    }
    checkpoint, state = find_resumed(config, lora, training, schedule.total_steps)
    check_output_dir(config, checkpoint)
    lengths = answer_lengths(answered_rows(config, eval_set), tokenizer, template)
    longest = max(len(example.input_ids) for example in eval_set.examples) if eval_set else 0
    stored.applicable(config.quant_config())  # raises UserError for settings that contradict the files
    quantized = stored.quantized_layers()
    shape = config, model_config, lora, placement, order, longest, lengths, quantized
    memory = plan_memory(*shape, processes=processes, may_divide=not refused)
    destinations, reporters = open_services(config) if processes.main else ([], [])
    return Plan(
        config=config, processes=processes, placement=placement,
        model_dir=model_dir, base_config=base_config, model_config=model_config,
        lora=lora, start_adapter=start_adapter,
        tokenizer=tokenizer, template=template,
        train_set=train_set, eval_set=eval_set, order=order, schedule=schedule, memory=memory,
        training=training, checkpoint=checkpoint, state=state,
        destinations=destinations, reporters=reporters,
    )  # fmt: skip


def choose_adapter(
    config: TrainConfig, start: Path | None, model_config: ModelConfig
) -> tuple[LoraConfig, ModelConfig]:
    """Return the adapter's configuration, and the model's with the vocabulary that it has under the adapter.

    The adapter to go on from decides everything but dropout, and what no file says.
    """
    if start is None:
        return config.lora_config(), model_config
    lora = replace(read_adapter_config(start), lora_fa=config.lora_fa)
    if config.lora_dropout is not None:
        lora = replace(lora, lora_dropout=config.lora_dropout)
    for name in ("use_rslora", "use_dora"):
        if getattr(config, name) and not getattr(lora, name):
            raise UserError(f"{name} is true, and {start} is an adapter without it: leave it out")
    return lora, replace(model_config, vocab_size=vocabulary_of(start, model_config.vocab_size))


def load_examples(
    config: TrainConfig, model_config: ModelConfig, tokenizer: Tokenizer
) -> tuple[ChatTemplate | None, Dataset, Dataset | None]:
    """Return the template, the training examples, packed if the settings say so, and the held-out ones."""
    template, train_set, eval_set = load_datasets(config, model_config, tokenizer)
    if config.packing:
        train_set = pack(train_set, token_settings(config, model_config)["cutoff_len"], config.seed)
    if any(row.prompt is None for row in answered_rows(config, eval_set)):
        raise UserError(
            "exact_match_samples needs prompts, but the held-out examples are plain text; set it to 0"
        )
    return template, train_set, eval_set


def answered_rows(config: TrainConfig, eval_set: Dataset | None) -> list[Row]:
    """Return the held-out rows that the model will answer."""
    return eval_set.rows[: config.exact_match_samples] if eval_set else []


def answer_lengths(
    rows: list[Row], tokenizer: Tokenizer, template: ChatTemplate | None
) -> tuple[int, int] | None:
    """Return the tokens of the longest prompt and of the longest answer that is waited for. No rows: None."""
    if not rows:
        return None
    prompt = max(len(prompt_ids(row, tokenizer, template)) for row in rows)
    return prompt, max(len(tokenizer.encode(row.completion, bos=False)) for row in rows) + ANSWER_SLACK


def make_order(config: TrainConfig, train_set: Dataset, processes: Processes) -> Order:
    """Return the order of the examples. The micro-batches of all processes together make one step."""
    return Order(
        lengths=[len(example.input_ids) for example in train_set.examples],
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps * processes.count,
        seed=config.seed,
        group_by_length=config.group_by_length,
    )


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> Schedule | Curve:
    """Return the number of steps and the learning rate of each."""
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    share = config.warmup_ratio or config.warmup_steps
    warmup = count_steps(share, steps)
    if share < 1:
        warmup = min(warmup, steps - 1)  # a warm-up to the end would begin and end at a rate of 0
    if warmup >= steps:
        raise UserError(f"warmup_steps = {warmup} is not shorter than the training, which has {steps} steps")
    curve = config.lr_scheduler_type, config.learning_rate
    return make_curve(*curve, steps, warmup, config.lr_scheduler_kwargs)


def count_steps(steps: float, total_steps: int) -> int:
    """Return a number of steps, or what a share of all steps (below 1) comes to, rounded up."""
    return math.ceil(total_steps * steps) if steps < 1 else int(steps)


def open_services(config: TrainConfig) -> tuple[list[Destination], list[Reporter]]:
    """Return the destinations of the results, and the reporters.

    Each destination receives the settings now, so a missing permission shows before the training.
    """
    destinations = make_destinations(config.push_to_hub, config.hub_private_repo, config.upload)
    reporters = make_reporters(
        config.trackers(),
        Path(config.output_dir),
        asdict(config),
        config.run_name,
        config.mlflow_tracking_uri,
    )
    settings = without_secrets(config.to_yaml()).encode()
    for destination in destinations:
        destination.send({SETTINGS_FILE: settings}, "Begin training")
    return destinations, reporters
