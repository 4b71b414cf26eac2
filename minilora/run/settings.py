"""Every key of a training run with its default and its meaning, and how a file and a command line set it.

    python scripts/train.py --config run.yaml --learning_rate 1e-4

The YAML file is read first, and the command line overrides it. The names are those of Hugging Face's
TrainingArguments and of LLaMA-Factory. Hyphens work like underscores, and the usual short names are aliases.
`minilora.run.training_arguments` and `minilora.run.llama_factory` have the keys that only those have.

An unknown key is an error that names the nearest known one: a misspelled key that is silently ignored costs a
night of training. A key that is set twice in one file or one command line is an error too. Numbers have
upper limits, `LARGEST`: a typing error should end in a line, not in a machine without memory.
"""

import contextlib
import math
import re
import types
import typing
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from minilora import starts
from minilora.config import LoraConfig, QuantConfig
from minilora.data.chat import TOKENIZER_TEMPLATE
from minilora.data.new_tokens import check_new_tokens
from minilora.data.rows import parse_columns
from minilora.data.templates import TEMPLATES
from minilora.data.truncation import TRUNCATIONS
from minilora.initialize import check_kind
from minilora.memory.ranks import PARALLEL
from minilora.optim import OPTIMIZERS
from minilora.quantization import QUANT_TYPES
from minilora.recompute import POLICIES
from minilora.run import llama_factory
from minilora.run.curves import CURVES, check_settings
from minilora.run.yaml_file import read_yaml
from minilora.system.errors import ArgumentParser, UserError, suggestion
from minilora.system.redaction import Address, hide_secrets, is_address
from minilora.system.schema import shown
from minilora.wrapping import ALL_WEIGHTS

VERA_RANK = 256  # PEFT's default. A random direction is worth less than a learned one
TRACKERS = ("mlflow", "tensorboard", "wandb", "all")

# The largest value of each number. Nothing is enumerated or reserved for it before it is needed.
LARGEST = dict(
    cutoff_len=100_000_000, max_samples=1_000_000_000, val_size=1_000_000_000,
    per_device_train_batch_size=1_000_000, per_device_eval_batch_size=1_000_000,
    gradient_accumulation_steps=1_000_000, num_train_epochs=1_000_000, max_steps=1_000_000_000,
    learning_rate=1e30, loraplus_lr_ratio=1_000_000, weight_decay=1000, max_grad_norm=1_000_000_000,
    warmup_steps=1_000_000_000, warmup_ratio=1, logging_steps=1_000_000_000, eval_steps=1_000_000_000,
    save_steps=1_000_000_000, save_total_limit=1_000_000, early_stopping_patience=1_000_000_000,
    eval_delay=1_000_000_000, adam_beta1=1, adam_beta2=1, adam_epsilon=1,
    exact_match_samples=1_000_000_000, lora_rank=65_536, lora_alpha=1_000_000, seed=2**63 - 1,
)  # fmt: skip
_MAY_BE_ZERO = set(
    """
    val_size warmup_steps warmup_ratio weight_decay max_grad_norm seed exact_match_samples eval_delay
    adam_beta1 adam_beta2
    """.split()
)
_BELOW_ONE = {
    "warmup_ratio": "the rest is for training",
    "adam_beta1": "at 1 no gradient counts",
    "adam_beta2": "at 1 no gradient counts",
}
SAVE_STRATEGIES = ("steps", "epoch", "best", "no")
NEW_TOKENS = ("new_special_tokens", "add_tokens", "resize_vocab")
_NEED_HELD_OUT = (
    "load_best_model_at_end early_stopping_patience eval_steps eval_delay exact_match_samples".split()
)

# Keys that a resumed run may change. Model and data are compared by their contents instead of their names,
# bf16 and fp16 by the dtype that they lead to.
MAY_CHANGE = set(
    """
    model_name_or_path model_revision accept_config_fields dataset eval_dataset output_dir
    overwrite_output_dir resume_from_checkpoint bf16 fp16 per_device_eval_batch_size
    gradient_checkpointing logging_steps eval_steps eval_delay save_strategy save_steps save_total_limit
    early_stopping_patience exact_match_samples report_to run_name mlflow_tracking_uri push_to_hub
    hub_private_repo upload hub_strategy parallel fsdp_offload
    """.split()
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. --help prints these comments, where "none:" gives the effect of an unset key."""

    # model
    model_name_or_path: str | None = None  # directory or hub id; none: the small model included in minilora
    model_revision: str | None = None  # branch, tag or commit on the hub; none: the hub's main branch
    accept_config_fields: str | list[str] | None = None  # unknown fields of config.json that are harmless
    new_special_tokens: str | list[str] | None = None  # add and train these tokens: <call>,</call>
    add_tokens: str | list[str] | None = None  # the same for plain tokens; special ones decode to nothing
    resize_vocab: bool = False  # also train tokens of the tokenizer for which the model has no rows yet
    # data
    dataset: str | list[str] | None = None  # file, address or hub id; mixed by weight: a.json:0.7,b.json:0.3
    eval_dataset: str | list[str] | None = None  # held-out examples, named in the same way
    val_size: int | float = 0  # or hold out part of dataset: a share (below 1) or a number of examples
    prompt_column: str = "prompt"  # name of the column that holds the prompt
    completion_column: str = "completion"  # name of the column that holds the completion
    messages_column: str | None = None  # name of the column of messages; none: messages or conversations
    columns: str | list[str] | None = None  # names of Alpaca's columns: instruction=task,output=solution
    text_column: str = "text"  # name of the column of plain text, of which every token is learned
    cutoff_len: int | None = None  # cut examples to this many tokens; none: min(1024, the model's limit)
    max_samples: int | None = None  # use only this many examples of each dataset, the first ones; none: all
    truncation: str = "end"  # what cutoff_len cuts: the end; or keep_answer: prompts before answers
    template: str | None = None  # words the rows: a name (see templates.py); tokenizer or none: its own
    train_on_prompt: bool = False  # learn the prompt too
    mask_history: bool = False  # learn only the last answer of a conversation
    padding_free: bool = True  # the examples of a pass end to end in one row; false: padded to the longest
    packing: bool = False  # fill rows of cutoff_len with whole examples, which do not attend to each other
    group_by_length: bool = False  # put examples of similar length into one step: less padding, less random
    # output
    output_dir: str = "outputs"  # directory for adapter, metrics, plots, model card and checkpoints
    overwrite_output_dir: bool = False  # delete the results of an earlier run there
    resume_from_checkpoint: str | None = None  # latest: the newest in output_dir; or the path of a checkpoint
    # quantization of the frozen weights: QLoRA
    quantization_bit: int | None = 4  # 4 or 8; none: as stored, plain LoRA; a quantized model stays as it is
    quantization_type: str = "nf4"  # nf4 or fp4, if quantization_bit is 4
    double_quantization: bool = True  # store the scales in 8 bits too: 4.127 bits a weight, not 4.5
    # adapter
    finetuning_type: str = "lora"  # full: train all weights, without an adapter and without quantization
    preset: str = "standard_r8_qkvo"  # others: minimal_r4_qv, aggressive_r16_all, high_capacity_r32_all
    lora_rank: int | None = None  # rank of the update, r; none: the preset's
    lora_alpha: float | None = None  # the update is scaled by alpha / r; none: 2 * lora_rank or the preset's
    lora_dropout: float | None = None  # dropout on the adapter's input in training; none: the preset's
    lora_target: str | list[str] | None = None  # q_proj,v_proj:16 (its rank), a regex or all; none: preset's
    additional_target: str | list[str] | None = None  # train these whole, in a copy: embed_tokens,lm_head
    adapter_name_or_path: str | None = None  # go on from this adapter, directory or hub id, and its settings
    use_rslora: bool = False  # rsLoRA: scale by alpha / sqrt(r)
    use_dora: bool = False  # DoRA: also learn a magnitude for each row of the weight
    init_lora_weights: str = "true"  # A random, B 0; or gaussian orthogonal pissa pissa_niter_16 olora loftq
    use_vera: bool = False  # VeRA: train two vectors a layer beside matrices that all share; lora_rank is 256
    lora_fa: bool = False  # LoRA-FA: train only B, so fewer activations are kept
    # training
    per_device_train_batch_size: int = 4  # examples in one training pass on each device
    per_device_eval_batch_size: int = 8  # examples in one evaluation pass on each device
    gradient_accumulation_steps: int = 4  # passes in one optimizer step
    num_train_epochs: float = 3.0  # passes over the training examples; may be a fraction
    max_steps: int = -1  # optimizer steps; above 0 it overrides num_train_epochs
    learning_rate: float = 2e-4  # the peak, after the warm-up
    lr_scheduler_type: str = "cosine"  # cosine, linear, constant, polynomial; others in docs/training.md
    lr_scheduler_kwargs: dict[str, float] | None = None  # {min_lr_rate: 0.1} of cosine_with_min_lr, ...
    warmup_steps: int | float = 0  # steps over which the learning rate rises from 0; below 1: a share of all
    warmup_ratio: float = 0.0  # the same as a share of all steps
    optim: str = "adamw_torch"  # adamw_torch, adamw_8bit, adamw_bnb_8bit or paged_adamw_8bit
    adam_beta1: float = 0.9  # AdamW's mean of the gradients keeps this share at each step
    adam_beta2: float = 0.999  # the same for the mean of their squares
    adam_epsilon: float = 1e-8  # added to the root of that mean, by which AdamW divides
    loraplus_lr_ratio: float | None = None  # LoRA+: learning rate of B divided by A's; none: both are equal
    weight_decay: float = 0.0  # AdamW's decoupled weight decay
    max_grad_norm: float = 1.0  # scale larger gradients down to this norm; 0: never
    bf16: bool | None = None  # compute in bfloat16; false: in float32; none: in the dtype that is fast here
    fp16: bool = False  # compute in float16, on a GPU only
    fused: bool = True  # LoRA inside its products, one kernel an operation; false: plain definitions
    gradient_checkpointing: str = "auto"  # off, selective, full, offload: less memory; auto: first that fits
    parallel: str = "auto"  # under torchrun: ddp, each process holds the model; fsdp, a part; auto: what fits
    fsdp_offload: bool = False  # with fsdp: keep that part in the CPU's memory
    seed: int = 42  # seed of adapter, dropout, split and order of the examples
    # watching and saving
    logging_steps: int | float = 10  # steps between two records of the metrics; below 1: a share of all steps
    eval_steps: int | float | None = None  # the same between two evaluations; none: one after each epoch
    eval_delay: float = 0.0  # no evaluation after fewer steps, or epochs if eval_steps is none
    save_strategy: str = "steps"  # steps, epoch, best (whenever the evaluation loss is the lowest) or no
    save_steps: int | float = 500  # steps between two checkpoints; below 1: a share of all steps
    save_total_limit: int | None = None  # number of newest checkpoints to keep beside the best one; none: all
    load_best_model_at_end: bool = False  # end with the adapter of the lowest evaluation loss
    early_stopping_patience: int | None = None  # stop after so many without a lower loss, at the lowest
    exact_match_samples: int = 0  # held-out prompts answered before and after training, and compared exactly
    report_to: str | list[str] = "none"  # mlflow, tensorboard, wandb or all: also send the metrics there
    run_name: str | None = None  # name of the run in MLflow and W&B; none: the name of output_dir
    mlflow_tracking_uri: str | None = None  # server; none: MLFLOW_TRACKING_URI or mlflow.db beside output_dir
    # sharing
    push_to_hub: str | None = None  # owner/name of a hub repository for adapter, model card and metrics
    hub_private_repo: bool = False  # make that repository private, if the run has to create it
    upload: str | None = None  # address that receives the same files: s3://bucket/folder
    hub_strategy: str = "end"  # when to send to both: end, or every_save (with the adapter of the checkpoint)

    def __post_init__(self):
        """Raise UserError for the first value that cannot be right. Hides the secrets of addresses."""
        self._check_texts()
        self._check_ranges()
        self._check_choices()
        self._check_schedule()
        self._check_held_out()
        self._check_exclusive_keys()
        parse_columns(self.columns)  # these check their own fields
        self.quant_config()
        self.lora_config()
        self.new_tokens()

    def _check_texts(self) -> None:
        for name, value in vars(self).items():
            texts = value if isinstance(value, list) else [value]
            if any(isinstance(text, str) and not text.strip() for text in texts):
                raise UserError(f"{name} is empty; give it a value, or leave it out")
            if any(isinstance(text, str) and "\0" in text for text in texts):
                raise UserError(f"{name} = {value!r} holds a zero byte, which no name has")
            if name == "output_dir" and isinstance(value, str) and is_address(value):
                raise UserError(
                    f"output_dir = {Address(value)} is an address; name a path on this machine: upload sends "
                    "the results on"
                )
            hidden = [hide_secrets(text) for text in texts]
            object.__setattr__(self, name, hidden if isinstance(value, list) else hidden[0])

    def _check_ranges(self) -> None:
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if value is None or (name == "max_steps" and value <= 0):  # _check_schedule looks at the latter
                continue
            if value <= 0 and name not in _MAY_BE_ZERO:
                raise UserError(f"{name} must be above 0, not {_shown(value)}")
            if value < 0:
                raise UserError(f"{name} must be at least 0, not {_shown(value)}")
            if value > largest:
                raise UserError(f"{name} must be at most {largest:,}, not {_shown(value)}")
            if value >= 1 and name in _BELOW_ONE:
                raise UserError(f"{name} must be below 1, not {_shown(value)}: {_BELOW_ONE[name]}")
            if value > 1 and name in SHARES and value != int(value):
                raise UserError(f"{name} must be a whole number or a share below 1, not {_shown(value)}")
        if self.cutoff_len == 1:
            raise UserError("cutoff_len must be at least 2: one token to read and one to learn")

    def _check_choices(self) -> None:
        _check_choice("quantization_type", self.quantization_type, QUANT_TYPES)
        _check_choice("lr_scheduler_type", self.lr_scheduler_type, CURVES)
        _check_choice("finetuning_type", self.finetuning_type, ("lora", "full"))
        _check_choice("optim", self.optim, OPTIMIZERS)
        _check_choice("parallel", self.parallel, ("auto", *PARALLEL))
        _check_choice("gradient_checkpointing", self.gradient_checkpointing, ("auto", *POLICIES))
        _check_choice("save_strategy", self.save_strategy, SAVE_STRATEGIES)
        _check_choice("hub_strategy", self.hub_strategy, ("end", "every_save"))
        _check_choice("truncation", self.truncation, TRUNCATIONS)
        if self.template is not None:
            _check_choice("template", self.template, (*TEMPLATES, TOKENIZER_TEMPLATE))
        for name in self.trackers():
            _check_choice("report_to", name, ("none", *TRACKERS))

    def _check_schedule(self) -> None:
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(
                f"max_steps must be above 0, or -1 for num_train_epochs, not {_shown(self.max_steps)}"
            )
        check_settings(self.lr_scheduler_type, self.learning_rate, self.lr_scheduler_kwargs)
        if self.warmup_ratio and self.warmup_steps:
            raise UserError("warmup_steps and warmup_ratio are both set; choose one")

    def _check_held_out(self) -> None:
        if self.eval_dataset and self.val_size:
            raise UserError("eval_dataset and val_size are both set; choose one")
        if self.eval_dataset or self.val_size:
            return
        if self.save_strategy == "best":
            raise UserError("save_strategy = 'best' needs held-out examples: set val_size or eval_dataset")
        for name in _NEED_HELD_OUT:
            if getattr(self, name):
                raise UserError(f"{name} needs held-out examples: set val_size or eval_dataset")

    def _check_exclusive_keys(self) -> None:
        self._check_start()
        self._check_adapter_to_go_on_from()
        self._check_full_training()
        for one, other in (("mask_history", "train_on_prompt"), ("packing", "group_by_length")):
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"{one} and {other} exclude each other; leave one of them out")
        if self.fsdp_offload and self.parallel != "fsdp":
            raise UserError("fsdp_offload belongs to parallel = 'fsdp': set that, or leave it out")
        if self.lora_fa and self.loraplus_lr_ratio is not None:
            raise UserError(
                "loraplus_lr_ratio gives B another learning rate than A, but lora_fa does not train A; "
                "leave one of them out"
            )

    def _check_start(self) -> None:
        """Raise UserError for keys that do not go with the way in which the adapter starts."""
        if self.init_lora_weights == "loftq" and self.quantization_bit is None:
            raise UserError("init_lora_weights = 'loftq' makes up for quantization: set quantization_bit")
        for name in ("lora_alpha", "loraplus_lr_ratio"):
            if self.use_vera and getattr(self, name) is not None:
                raise UserError(f"{name} has no meaning for VeRA, which trains no A and no B; leave it out")

    def _check_adapter_to_go_on_from(self) -> None:
        """Raise UserError for a key that only a new adapter has."""
        if self.adapter_name_or_path is None:
            return
        adapters = "lora_rank lora_alpha lora_target additional_target init_lora_weights use_vera"
        for name in (*adapters.split(), *NEW_TOKENS):
            if getattr(self, name) not in (None, False, "true"):
                raise UserError(
                    f"{name} is decided by the adapter that adapter_name_or_path names; leave it out"
                )

    def _check_full_training(self) -> None:
        """Raise UserError for a key that has no meaning where all weights are trained."""
        if self.finetuning_type != "full":
            return
        if self.quantization_bit is not None:
            raise UserError(
                "finetuning_type = 'full' trains all weights, which cannot be quantized: set "
                "quantization_bit to none"
            )
        if self.parallel == "fsdp":
            raise UserError(
                "parallel = 'fsdp' divides frozen weights, and finetuning_type = 'full' freezes none: set "
                "parallel to ddp"
            )
        for name in llama_factory.ADAPTER_KEYS:
            if getattr(self, name) not in (None, False, "true"):
                raise UserError(f"{name} belongs to an adapter, and finetuning_type is 'full'; leave it out")

    def optimizer_settings(self) -> dict[str, object]:
        """The settings of `make_optimizer`, as it and torch.optim name them."""
        rates = dict(lr=self.learning_rate, loraplus_lr_ratio=self.loraplus_lr_ratio)
        adam = dict(betas=(self.adam_beta1, self.adam_beta2), eps=self.adam_epsilon)
        return rates | adam | dict(weight_decay=self.weight_decay)

    def quant_config(self) -> QuantConfig | None:
        """The quantization of the frozen weights, or None if they stay as they are stored."""
        if self.quantization_bit is None:
            return None
        return QuantConfig(
            bits=self.quantization_bit,
            quant_type=self.quantization_type,
            double_quant=self.double_quantization,
        )

    def lora_config(self) -> LoraConfig:
        """The preset, with the settings that this run overrides. Full training: copies of all modules."""
        if self.finetuning_type == "full":
            return LoraConfig(r=1, lora_alpha=1, modules_to_save=ALL_WEIGHTS)
        overrides = dict(r=self.lora_rank, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout)
        if self.lora_rank is not None and self.lora_alpha is None:
            overrides["lora_alpha"] = 2 * self.lora_rank
        if self.lora_target is not None:
            overrides["target_modules"], ranks = parse_targets(self.lora_target)
            overrides["rank_pattern"] = {re.escape(name): rank for name, rank in ranks.items()}
            if self.lora_alpha is None:
                overrides["alpha_pattern"] = {re.escape(name): 2 * rank for name, rank in ranks.items()}
        if self.additional_target is not None:
            overrides["modules_to_save"] = _names(self.additional_target)
        overrides = {name: value for name, value in overrides.items() if value is not None}
        if self.use_vera:
            overrides.setdefault("r", VERA_RANK)
        variant = dict(use_rslora=self.use_rslora, use_dora=self.use_dora, lora_fa=self.lora_fa)
        variant |= dict(use_vera=self.use_vera, init_lora_weights=check_kind(self.init_lora_weights))
        lora = LoraConfig.preset(self.preset, **variant, **overrides)
        starts.check(lora)
        return lora

    def new_tokens(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tokens to add: those that are text, and special ones."""
        plain, special = (tuple(_parts(value)) for value in (self.add_tokens, self.new_special_tokens))
        check_new_tokens(plain + special)
        return plain, special

    @property
    def keeps_best(self) -> bool:
        """Whether the run ends with the adapter of the lowest held-out loss, as every early stop does."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    def trackers(self) -> list[str]:
        """The names in `report_to`: the services that get the metrics besides metrics.jsonl."""
        return [name for name in _names(self.report_to) if name != "none"]

    def accepted_fields(self) -> tuple[str, ...]:
        """The names in `accept_config_fields`."""
        return _names(self.accept_config_fields or [])

    def may_change(self) -> set[str]:
        """The keys that a resumed run may change, because no number of its training depends on them."""
        # Every other schedule depends on the total number of steps, and so does a warm-up ratio.
        shares = self.warmup_ratio or 0 < self.warmup_steps < 1
        constant_rate = self.lr_scheduler_type == "constant" and not shares
        return MAY_CHANGE | ({"max_steps", "num_train_epochs"} if constant_rate else set())

    def names_an_address(self) -> bool:
        """Whether a setting holds an address, whose host and path may be nobody else's business."""
        lists = (value if isinstance(value, list) else [value] for value in vars(self).values())
        return any(isinstance(text, Address) for texts in lists for text in texts)

    def to_yaml(self) -> str:
        """All keys, as the text of a file that --config reads."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


# Each is a number or, below 1, a share.
SHARES = {field.name for field in fields(TrainConfig) if str(field.type).startswith("int | float")}


def _shown(value: object) -> str:
    """A value for a message; 0.0 as 0."""
    return f"{value:g}" if isinstance(value, float) else shown(value)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} = {value!r} is not known; choose from {', '.join(choices)}")


def parse_targets(lora_target: str | list[str]) -> tuple[tuple[str, ...] | str, dict[str, int]]:
    """The targets, and the ranks of those that are written as NAME:RANK.

    The targets are a tuple of layer names, "all-linear", or a regular expression as it is. A text with any
    character that no list of names has (such as * or a bracket) is a regular expression.
    """
    if isinstance(lora_target, str):
        if lora_target in ("all", "all-linear"):
            return "all-linear", {}
        if not re.fullmatch(r"[\w\s.,:-]+", lora_target):
            return lora_target, {}
    named = [name.partition(":") for name in _names(lora_target)]
    for name, colon, rank in named:
        if colon and not (rank.isdecimal() and 0 < int(rank) <= LARGEST["lora_rank"]):
            raise UserError(
                f"lora_target names {name}:{rank}; its rank must be from 1 to {LARGEST['lora_rank']:,}"
            )
    return tuple(name for name, _, _ in named), {name: int(rank) for name, colon, rank in named if colon}


def _parts(value: str | list[str] | None) -> list[str]:
    """A list as it is, or the parts of a text between commas, without the spaces around them."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value or []


def _names(text: str | list[str]) -> tuple[str, ...]:
    """A list of names, or the names in a text, divided by commas or blanks."""
    names = re.split(r"[\s,]+", text) if isinstance(text, str) else text
    return tuple(name for name in names if name)


# ---- from a file and a command line to a TrainConfig -------------------------------------------------------

ALIASES = {
    "model": "model_name_or_path",
    "data": "dataset",
    "output": "output_dir",
    "lora_r": "lora_rank",
    "r": "lora_rank",
    "target_modules": "lora_target",
    "max_length": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "activation_checkpointing": "gradient_checkpointing",
}
SWITCHES = ("use_4bit", "load_in_4bit")  # true: quantization_bit = 4, false: none
BOOLEAN_SHORTHANDS = {  # these keys take words; true and false (on and off in YAML) stand for two of them
    "resume_from_checkpoint": {True: "latest", False: None},
    "gradient_checkpointing": {True: "full", False: "off"},
}
# In TrainingArguments a null stands for the default of these.
_NULL_IS_DEFAULT = {"gradient_checkpointing", "hub_private_repo", "output_dir", "report_to", "warmup_ratio"}
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")  # on and off as in YAML


def load_train_config(arguments: list[str], default_file: Path | None = None) -> TrainConfig:
    """The run that a command line (without the program's name) describes, together with its --config file.

    `default_file` is read if the command line names no config, model or dataset.
    """
    arguments_given = parse_arguments(arguments)
    file = arguments_given.pop("config", None)
    if file in (True, ""):
        raise UserError("--config names no file; write --config run.yaml")
    if file is not None and is_address(file):
        raise UserError(f"--config {Address(file)} is an address; name a file on this machine")
    names = {ALIASES.get(key, key) for key in arguments_given}
    if file is None and default_file is not None and not {"model_name_or_path", "dataset"} & names:
        file = default_file
    sources = {str(file): read_yaml(Path(file))} if file is not None else {}
    return make_train_config(sources | {"the command line": arguments_given})


def parse_with_keys(parser: ArgumentParser) -> tuple[Namespace, list[str]]:
    """Return a script's own options, and the arguments that are a training run's keys.

    Raises UserError for a name that is neither.
    """
    options, arguments = parser.parse_known_args()
    given = parse_arguments(arguments)
    given.pop("config", None)
    llama_factory.refuse_other_training(given)
    _refuse_unknown(given, "the command line", parser.names)
    return options, arguments


def make_train_config(sources: dict[str, dict[str, object]]) -> TrainConfig:
    """The run that the keys of several sources describe, by the sources' names. Later ones override earlier.

    Prints which keys have no effect, and which defaults are another trainer's.
    """
    given = {key: value for source in sources.values() for key, value in source.items()}
    llama_factory.refuse_other_training(given)  # before a key that is unknown because of it
    values: dict[str, object] = {}
    for source, keys in sources.items():
        values |= _canonical(keys, source)
    values, notes = llama_factory.translate(values)
    for note in notes:
        print(note)
    annotations = typing.get_type_hints(TrainConfig)
    return TrainConfig(**{name: _coerce(name, value, annotations[name]) for name, value in values.items()})


def parse_arguments(arguments: list[str]) -> dict[str, object]:
    """The keys of a command line: `--key value`, `--key=value`, or `--flag` alone for true."""
    values: dict[str, object] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word!r} is not a key; write --key value, for example --config run.yaml")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = True if not rest or rest[0].startswith("--") else rest.pop(0)
        key = key.replace("-", "_")
        if key in values:
            raise UserError(f"{key} is set twice in the command line; leave one of them out")
        values[key] = value
    return values


def _canonical(given: dict[str, object], source: str) -> dict[str, object]:
    """The same settings under the keys' full names. Raises UserError for an unknown or repeated key.

    `source` is the file or "the command line", for messages.
    """
    _refuse_unknown(given, source)
    values: dict[str, object] = {}
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if key in SWITCHES:
            name, value = "quantization_bit", 4 if _coerce(key, value, bool) else None
        if name in BOOLEAN_SHORTHANDS and str(value).lower() in _TRUE + _FALSE:
            value = BOOLEAN_SHORTHANDS[name][str(value).lower() in _TRUE]
        # TrainingArguments writes the old name of activation_checkpointing into its file, too.
        if name in values and not (name == "gradient_checkpointing" and values[name] == value):
            raise UserError(f"{name} is set twice in {source}, once as {key!r}")
        if name in _NULL_IS_DEFAULT and value in (None, "null", []):
            continue
        if isinstance(value, str) and not value.strip() and name not in llama_factory.MAY_BE_EMPTY:
            raise UserError(f"{key} is empty in {source}; give it a value, or leave it out")
        values[name] = value
    return values


def _refuse_unknown(given: Iterable[str], source: str, options: Iterable[str] = ()) -> None:
    """Raise UserError for a key that no training run has. options: what else may be meant."""
    known = {field.name for field in fields(TrainConfig)} | llama_factory.KEYS
    known |= ALIASES.keys() | set(SWITCHES)
    for key in given:
        if key not in known:
            nearest = suggestion(key, [*known, *options], "docs/keys.md has them all")
            raise UserError(f"unknown key {key!r} in {source}{nearest}")


def _coerce(name: str, value: object, annotation: object) -> object:
    """A value from YAML or the command line, converted to the type of its key.

    YAML reads 1e-4 as text, so text is parsed here in either case.
    """
    accepted = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    if value is None or (value in ("none", "null") and type(None) in accepted):
        if type(None) in accepted:
            return None
        raise UserError(f"{name} has no value")
    if list[str] in accepted and isinstance(value, list):
        if not value or not all(isinstance(entry, str) for entry in value):
            raise UserError(f"{name} must be text or a list of texts, not {value!r}")
        return value
    if dict[str, float] in accepted:
        return _parse_numbers(name, value)
    if bool in accepted:
        return _parse_boolean(name, value)
    if int in accepted or float in accepted:
        number = _parse_number(name, value, whole=float not in accepted)
        return int(number) if int in accepted and number == int(number) else number
    if isinstance(value, (bool, list, dict)):
        raise UserError(f"{name} must be text, not {value!r}")
    return str(value)


def _parse_numbers(name: str, value: object) -> dict[str, float] | None:
    """{setting: number} as it is, or from a text as YAML would read it; None for an empty one."""
    with contextlib.suppress(Exception):  # PyYAML raises every type; the text stays a text then
        value = yaml.safe_load(value) if isinstance(value, str) and len(value) <= 1000 else value
    if not isinstance(value, dict):
        raise UserError(f"{name} must be settings such as {{min_lr_rate: 0.1}}, not {_shown(value)}")
    return {
        str(key): _parse_number(f"{name}: {key}", part, whole=False) for key, part in value.items()
    } or None


def _parse_boolean(name: str, value: object) -> bool:
    word = str(value).lower()
    if word not in _TRUE + _FALSE:
        raise UserError(f"{name} must be true or false, not {value!r}")
    return word in _TRUE


def _parse_number(name: str, value: object, whole: bool) -> int | float:
    try:
        if isinstance(value, bool):
            raise TypeError
        if whole and isinstance(value, int | str):
            with contextlib.suppress(ValueError):  # 1e3 is a whole number too, and is parsed below
                return int(value)  # keeps all digits, where a float has 16
        number = float(value)  # type: ignore[arg-type]
        if not math.isfinite(number) or (whole and not number.is_integer()):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{name} must be a {'whole ' if whole else ''}number, not {_shown(value)}") from error
    return int(number) if whole else number
