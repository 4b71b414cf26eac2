"""Every key of a training run: its name, its default, its meaning; and how a file and a command line become
one.

    python scripts/train.py --config run.yaml --learning_rate 1e-4

A YAML file first, then overrides. Names are those of Hugging Face's TrainingArguments and of LLaMA-Factory;
hyphens work like underscores, and the usual short names are aliases. What only LLaMA-Factory has,
`minilora.run.llama_factory` puts into these words. A key that is not known is an error that names the nearest
one: a misspelt key that is silently ignored costs a night of training. So is a key that one place sets twice,
where YAML would take the last.
"""

import contextlib
import inspect
import math
import os
import re
import types
import typing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml

from minilora.config import LoraConfig, QuantConfig
from minilora.data.chat import TOKENIZER_TEMPLATE
from minilora.data.templates import TEMPLATES
from minilora.optim import OPTIMIZERS, SCHEDULES
from minilora.recompute import POLICIES
from minilora.run import llama_factory
from minilora.system.errors import UserError, suggestion

TRACKERS = ("mlflow", "tensorboard", "all")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The comments are the manual that --help prints."""

    # model
    model_name_or_path: str | None = None  # directory or hub id; none: the small base model that comes with minilora
    model_revision: str | None = None  # branch, tag or commit on the hub
    # data
    dataset: str | list[str] | None = None  # a file, address or hub dataset; several with weights: a.jsonl:0.7,b.json:0.3
    eval_dataset: str | list[str] | None = None  # held-out examples
    val_size: float = 0.0  # or hold out a share (below 1) or a number of the training examples
    prompt_column: str = "prompt"  # what the prompt is called in the dataset
    completion_column: str = "completion"  # what the completion is called
    messages_column: str | None = None  # what the list of messages is called; none: messages or conversations
    cutoff_len: int | None = None  # longer examples are cut, and counted; none: 1024, or what the model can where that is less
    max_samples: int | None = None  # the first examples of each dataset alone, to try something
    template: str | None = None  # alpaca, llama2, llama3, mistral, chatml, qwen3, plain, tokenizer: its own; none: its own if any
    train_on_prompt: bool = False  # learn the prompt as well
    mask_history: bool = False  # of a conversation learn the last answer alone
    packing: bool = False  # fill rows of cutoff_len with whole examples, which do not see each other
    group_by_length: bool = False  # steps of examples of like length: less padding, less chance
    # output
    output_dir: str = "outputs"  # adapter, metrics, plot, model card, checkpoints
    overwrite_output_dir: bool = False  # replace what an earlier run left there
    resume_from_checkpoint: str | None = None  # latest: go on from the newest in output_dir; or a checkpoint-N, of any run
    # quantization of the frozen weights: QLoRA
    quantization_bit: int | None = 4  # 4 or 8; none: as they are in the files, plain LoRA
    quantization_type: str = "nf4"  # nf4 or fp4, for 4 bits
    double_quantization: bool = True  # store the scales in 8 bits too: 4.127 bits a weight instead of 4.5
    # adapter
    preset: str = "standard_r8_qkvo"  # minimal_r4_qv, standard_r8_qkvo, aggressive_r16_all, high_capacity_r32_all
    lora_rank: int | None = None  # these change single settings of the preset
    lora_alpha: float | None = None  # none: the preset's, or 2 * lora_rank where that is given
    lora_dropout: float | None = None
    lora_target: str | list[str] | None = None  # layer names (q_proj,v_proj), a regular expression, or all
    use_rslora: bool = False  # scale by alpha / sqrt(r)
    use_dora: bool = False  # learn a magnitude for every row of the weight as well
    lora_fa: bool = False  # train B alone: fewer activations to keep
    # training
    per_device_train_batch_size: int = 4  # examples in one pass through the model
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 4  # passes in one optimizer step
    num_train_epochs: float = 3.0
    max_steps: int = -1  # optimizer steps; above 0 it takes the place of num_train_epochs
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"  # cosine, linear, constant, polynomial
    warmup_steps: int = 0
    warmup_ratio: float = 0.0  # or as a share of all steps
    optim: str = "adamw_torch"
    loraplus_lr_ratio: float | None = None  # LoRA+: the learning rate of B is so many times that of A
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # gradients are scaled down to this norm; 0: never
    bf16: bool | None = None  # compute in bfloat16; false: in float32, unless fp16 is true; none: in the dtype that is fast on this machine
    fp16: bool = False  # compute in float16, on a GPU
    gradient_checkpointing: str = "auto"  # off, selective, full, offload: keep less, compute it again; auto: the fastest that fits
    seed: int = 42
    # watching and saving
    logging_steps: int = 10  # steps from one record to the next, wherever they go; 1: every step
    eval_steps: int | None = None  # none: at the end of every epoch
    save_steps: int = 500
    save_total_limit: int | None = None  # keep so many checkpoints; the best one is kept beside them
    load_best_model_at_end: bool = False  # end with the adapter of the lowest evaluation loss
    early_stopping_patience: int | None = None  # stop after so many evaluations without a lower loss
    exact_match_samples: int = 0  # held-out prompts to answer before and after, and to compare with the expected completion
    report_to: str | list[str] = "none"  # mlflow, tensorboard: also record there what metrics.jsonl holds
    run_name: str | None = None  # what the run is called there; none: as its output_dir
    mlflow_tracking_uri: str | None = None  # a server or store; none: MLFLOW_TRACKING_URI, or mlflow.db beside output_dir
    # sharing
    push_to_hub: str | None = None  # a repository on the hub, owner/name, for adapter, model card and metrics; made if need be
    hub_private_repo: bool = False  # whether it is private where it has to be made
    upload: str | None = None  # an address for the same files: s3://bucket/folder
    hub_strategy: str = "end"  # when both are sent: end, or every_save, with each checkpoint too

    def __post_init__(self):
        positive = "cutoff_len per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs"
        positive += (
            " learning_rate logging_steps eval_steps save_steps save_total_limit early_stopping_patience lora_rank lora_alpha"
            " loraplus_lr_ratio max_samples"
        )
        for name in positive.split():
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"{name} must be above 0, not {value:g}")
        for (
            name
        ) in "val_size warmup_steps warmup_ratio weight_decay max_grad_norm seed exact_match_samples".split():
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be at least 0, not {getattr(self, name):g}")
        if self.seed >= 2**63:
            raise UserError(f"seed must be below 2**63, not {self.seed}")
        for name, allowed in (
            ("lr_scheduler_type", SCHEDULES),
            ("optim", OPTIMIZERS),
            ("gradient_checkpointing", ("auto", *POLICIES)),
            ("hub_strategy", ("end", "every_save")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} = {getattr(self, name)!r} is not known; choose from {', '.join(allowed)}"
                )
        if self.template not in (None, TOKENIZER_TEMPLATE, *TEMPLATES):
            raise UserError(
                f"template = {self.template!r} is not known; choose from {', '.join(TEMPLATES)}, {TOKENIZER_TEMPLATE}"
            )
        for name in self.trackers():
            if name not in TRACKERS:
                raise UserError(f"report_to = {name!r} is not known; choose from none, {', '.join(TRACKERS)}")
        for one, other in (("mask_history", "train_on_prompt"), ("packing", "group_by_length")):
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"{one} and {other} exclude each other; leave one of them out")
        if self.cutoff_len == 1:
            raise UserError("cutoff_len must be at least 2: one token to read and one to learn")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"max_steps must be above 0, or -1 for num_train_epochs, not {self.max_steps}")
        if self.warmup_ratio >= 1:
            raise UserError(
                f"warmup_ratio must be below 1, not {self.warmup_ratio:g}: the rest is for training"
            )
        if self.warmup_ratio and self.warmup_steps:
            raise UserError("warmup_steps and warmup_ratio are both set; choose one")
        if self.eval_dataset and self.val_size:
            raise UserError("eval_dataset and val_size are both set; choose one")
        if not (self.eval_dataset or self.val_size):
            for (
                name
            ) in "load_best_model_at_end early_stopping_patience eval_steps exact_match_samples".split():
                if getattr(self, name):
                    raise UserError(f"{name} needs held-out examples: set val_size or eval_dataset")
        if self.lora_fa and self.loraplus_lr_ratio is not None:
            raise UserError(
                "loraplus_lr_ratio sets B's rate apart from A's, and lora_fa does not train A: leave one of them out"
            )
        self.quant_config()
        self.lora_config()

    def quant_config(self) -> QuantConfig | None:
        """How the frozen weights are stored; None: as they are."""
        if self.quantization_bit is None:
            return None
        return QuantConfig(
            bits=self.quantization_bit,
            quant_type=self.quantization_type,
            double_quant=self.double_quantization,
        )

    def lora_config(self) -> LoraConfig:
        """The preset with this run's changes."""
        changes = dict(r=self.lora_rank, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout)
        if self.lora_rank is not None and self.lora_alpha is None:
            changes["lora_alpha"] = 2 * self.lora_rank
        if self.lora_target is not None:
            changes["target_modules"] = _targets(self.lora_target)
        changes = {k: v for k, v in changes.items() if v is not None}
        kind = dict(use_rslora=self.use_rslora, use_dora=self.use_dora, lora_fa=self.lora_fa)
        return LoraConfig.preset(self.preset, **kind, **changes)

    def trackers(self) -> list[str]:
        """Where metrics go besides metrics.jsonl."""
        names = self.report_to.split(",") if isinstance(self.report_to, str) else self.report_to
        return [name.strip() for name in names if name.strip() != "none"]

    def may_change(self) -> set[str]:
        """The keys that a resumed run may set anew: no number of its training depends on them."""
        no_schedule = self.lr_scheduler_type == "constant" and not self.warmup_ratio
        return MAY_CHANGE | ({"max_steps", "num_train_epochs"} if no_schedule else set())

    def to_yaml(self) -> str:
        """All keys, as a file that --config reads."""
        return yaml.safe_dump(asdict(self), sort_keys=False)


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
}
SWITCHES = ("use_4bit", "load_in_4bit")  # true: quantization_bit = 4, false: none
WORDS_FOR_BOOLEANS = {  # what true and false stand for, where a key takes words and people, or YAML (on, off), say these
    "resume_from_checkpoint": {True: "latest", False: None},
    "gradient_checkpointing": {True: "full", False: "off"},
}
MAY_CHANGE = (
    set(  # on resuming. Model and data are compared by what is in them, bf16 and fp16 by what comes of them
        """
    model_name_or_path model_revision dataset eval_dataset output_dir overwrite_output_dir resume_from_checkpoint bf16 fp16
    per_device_eval_batch_size gradient_checkpointing logging_steps eval_steps save_steps save_total_limit early_stopping_patience
    exact_match_samples report_to run_name mlflow_tracking_uri push_to_hub hub_private_repo upload hub_strategy
    """.split()
    )
)
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")


def load_train_config(arguments: list[str], default_file: Path | None = None) -> TrainConfig:
    """From a command line, without the program's name. `default_file` is read if it names no config, model or
    dataset.
    """
    given = _parse_arguments(arguments)
    file = given.pop("config", None)
    if file in (True, ""):
        raise UserError("--config names no file; write --config run.yaml")
    values = _canonical(given, "the command line")
    if file is None and default_file is not None and not {"model_name_or_path", "dataset"} & values.keys():
        file = default_file
    if file is not None:
        values = _canonical(read_yaml(Path(file)), str(file)) | values
    values, notes = llama_factory.translate(values)
    for note in notes:
        print(note)
    kinds = typing.get_type_hints(TrainConfig)
    return TrainConfig(**{name: _coerce(name, value, kinds[name]) for name, value in values.items()})


def manual() -> str:
    """What --help prints: the keys with their defaults and meanings."""
    shown = []
    for section, keys in documented_keys().items():
        shown.append(f"\n{section}")
        for name, default, meaning in keys:
            shown.append(f"  --{name} {default}".ljust(42) + (f"  {meaning}" if meaning else ""))
    short = ", ".join(f"{alias} = {name}" for alias, name in ALIASES.items())
    short += "".join(f", {switch} = quantization_bit 4" for switch in SWITCHES)
    return (
        "usage: train.py [--config FILE.yaml] [--KEY VALUE ...]\n"
        + "\n".join(shown)
        + f"\n\nshort names: {short}\n"
    )


def documented_keys() -> dict[str, list[tuple[str, str, str]]]:
    """Section: (name, default, meaning) of each key, as they stand in this file."""
    source = inspect.getsource(TrainConfig).partition("def __post_init__")[0]
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for line in re.findall(r"^    (# .+|\w+: .+ = .+)$", source, re.MULTILINE):
        if line.startswith("# "):
            keys = sections[line[2:]] = []
        else:
            keys.append(re.fullmatch(r"(\w+): .+? = (.+?)(?:  # (.+))?", line).groups(default=""))
    return sections


def _parse_arguments(arguments: list[str]) -> dict[str, object]:
    """`--key value`, `--key=value`, and `--flag` alone for true."""
    given: dict[str, object] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word!r} is not a key; write --key value, for example --config run.yaml")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = True if not rest or rest[0].startswith("--") else rest.pop(0)
        key = key.replace("-", "_")
        if key in given:
            raise UserError(f"{key} is set twice in the command line; leave one of them out")
        given[key] = value
    return given


def read_yaml(path: Path) -> dict:
    """The keys of a file, with underscores. Raises UserError naming the file."""
    if not os.path.isfile(path):  # Path's own method raises for a name that is too long
        raise UserError(f"config {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        values, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a day that no month has is a ValueError
        raise UserError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path} must hold `key: value` lines")
    keys = [str(key.value).replace("-", "_") for key, _ in tree.value]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"config {path} sets {twice[0]} twice; leave one of them out")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _canonical(given: dict[str, object], place: str) -> dict[str, object]:
    """Aliases replaced by the names they stand for; unknown and doubled keys refused."""
    known = {field.name for field in fields(TrainConfig)} | llama_factory.KEYS
    values: dict[str, object] = {}
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if key in SWITCHES:
            name, value = "quantization_bit", 4 if _coerce(key, value, bool) else None
        if name in WORDS_FOR_BOOLEANS and str(value).lower() in _TRUE + _FALSE:
            value = WORDS_FOR_BOOLEANS[name][str(value).lower() in _TRUE]
        if name not in known:
            raise UserError(
                f"unknown key {key!r} in {place}{suggestion(key, known | ALIASES.keys() | set(SWITCHES))}"
            )
        if name in values:
            raise UserError(f"{name} is set twice in {place}, once as {key!r}")
        values[name] = value
    return values


def _coerce(name: str, value: object, kind: object) -> object:
    """A value from YAML or the command line as the type that the key has. YAML reads 1e-4 as text, so text is
    parsed here.
    """
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None or (value in ("none", "null") and type(None) in kinds):
        if type(None) in kinds:
            return None
        raise UserError(f"{name} has no value")
    if list[str] in kinds and isinstance(value, list):
        if not value or not all(isinstance(entry, str) for entry in value):
            raise UserError(f"{name} must be text or a list of texts, not {value!r}")
        return value
    if bool in kinds:
        word = str(value).lower()
        if word in _TRUE + _FALSE:
            return word in _TRUE
        raise UserError(f"{name} must be true or false, not {value!r}")
    if int in kinds or float in kinds:
        try:
            return _number(value, whole=float not in kinds)
        except (TypeError, ValueError, OverflowError) as error:
            kind = "number" if float in kinds else "whole number"
            raise UserError(f"{name} must be a {kind}, not {value!r}") from error
    if isinstance(value, (bool, list, dict)):
        raise UserError(f"{name} must be text, not {value!r}")
    return str(value)


def _number(value: object, whole: bool) -> int | float:
    """Raises ValueError, TypeError or OverflowError. Whole numbers keep all their digits: a float has 16 of
    them.
    """
    if isinstance(value, bool):
        raise TypeError
    if whole and isinstance(value, int | str):
        with contextlib.suppress(ValueError):  # 1e3 is a whole number too
            return int(value)
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number) or (whole and not number.is_integer()):
        raise ValueError
    return int(number) if whole else number


def _targets(value: str | list[str]) -> tuple[str, ...] | str:
    """Names separated by commas, `all` or `all-linear`, or, where it has characters that no name has, a
    regular expression.
    """
    if isinstance(value, list):
        return tuple(value)
    if value in ("all", "all-linear"):
        return "all-linear"
    if re.fullmatch(r"[\w\s.,-]+", value):
        return tuple(name for name in re.split(r"[\s,]+", value) if name)
    return value
