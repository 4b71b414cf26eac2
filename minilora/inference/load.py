"""A base model together with the adapters that were trained on it.

Adapters are loaded side by side, each under a name, onto one copy of the base model; `set_adapter` switches
between them and the base alone. In NAME=DIRECTORY the name is given; otherwise it is the last part of the
directory or hub id.

Training saves its tokenizer, its chat template and its settings beside the adapter. A checkpoint-N uses those
of its run, one directory above. The first adapter's settings hold for all adapters (how weights are
quantized, how rows are formatted and cut), except for keys that the command line sets.

An adapter corrects the weights that its training saw, so its run says whether they are quantized. Where no
run says it, they stay as they are stored: a model alone is what its files hold.
"""

import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from torch import nn

from minilora.adapters.save_load import (
    ADAPTER_CONFIG_FILE,
    check_has_weights,
    load_adapter,
    read_adapter_config,
    vocabulary_of,
)
from minilora.config import ModelConfig
from minilora.data.chat import ChatTemplate, load_chat_template
from minilora.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from minilora.formats.weights import StoredTensors, read_config
from minilora.lora import set_adapter
from minilora.model import CausalLM
from minilora.run.describe import describe_weights
from minilora.run.output_dir import SETTINGS_FILE
from minilora.run.settings import SWITCHES, TrainConfig, load_train_config, parse_arguments
from minilora.run.vocabulary import load_base_model
from minilora.system.assets import EMBEDDED_MODEL
from minilora.system.device import Placement, choose_placement
from minilora.system.errors import ArgumentParser, UserError
from minilora.system.files import read_json
from minilora.system.hub import resolve_model
from minilora.system.redaction import hide_secrets, is_address, whole
from minilora.system.remote import refuse_address

BASE = "base"  # the name of the model without an adapter
QUANTIZATION_KEYS = {"quantization_bit", "quantization_type", "double_quantization", *SWITCHES}


@dataclass(frozen=True)
class InferenceSetup:
    """Everything that inference needs except the weights, so that mistakes show before a weight is read."""

    adapters: dict[str, Path]  # name -> directory; the first one is active
    config: TrainConfig  # the first adapter's run, with the keys of the command line
    base: Path
    model_config: ModelConfig  # of the base model, with the vocabulary that it has under the adapters
    tokenizer: Tokenizer
    template: ChatTemplate | None
    config_file: str | None  # that the user gave with --config

    @property
    def first_adapter(self) -> str | None:
        return next(iter(self.adapters), None)

    @property
    def files(self) -> list[Path]:
        """The files that are read: of the model, and of the adapters and their runs."""
        names = "config.json", "*.safetensors*", "*.bin*", "*.jinja", "tokenizer*", "adapter_*", SETTINGS_FILE
        directories = self.base, *self.adapters.values()
        found = [file for directory in directories for name in names for file in directory.glob(name)]
        return [*found, Path(self.config_file)] if self.config_file else found

    def load_model(self) -> CausalLM:
        """The frozen model on this machine's device, in evaluation mode, with every adapter loaded."""
        model = self.load_base()
        for name, directory in self.adapters.items():
            load_adapter(model, directory, name)
        set_adapter(model, self.first_adapter)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.describe(model)
        return model.eval()

    def load_base(self) -> CausalLM:
        """The base model on this machine's device, without the adapters."""
        placement = choose_placement(self.config.bf16, self.config.fp16)
        return load_base_model(self.base, self.config, placement, self.model_config)

    def describe(self, model: CausalLM) -> None:
        """Say what was loaded, and where."""
        placement = choose_placement(self.config.bf16, self.config.fp16)
        names = ", ".join(self.adapters) or "none"
        weights = describe_weights(model)
        # stdout carries the answers, so this line goes to stderr.
        print(f"{self.base.name}: {weights}, on {placement}; adapters: {names}", file=sys.stderr)
        self._explain_quantization(placement)

    def _explain_quantization(self, placement: Placement) -> None:
        """Say why weights are quantized on a CPU, where that saves memory and costs time."""
        quant = self.config.quant_config()
        asked = quant and self.adapters and placement.device.type == "cpu"
        if asked and not StoredTensors(self.base).prequantized:
            kind = quant.quant_type if quant.bits == 4 else "int8"
            print(
                f"the weights are in {kind}, as the adapter's settings say; --quantization_bit none leaves "
                "them as stored: faster on a CPU, more memory, slightly other answers",
                file=sys.stderr,
            )


def add_model_options(parser: ArgumentParser) -> None:
    """Add --model and --adapter, which may be repeated, to a script's options."""
    parser.add_argument("--model", "--model_name_or_path")
    parser.add_argument("--adapter", action="append", default=[])


def prepare_inference(
    model: str | None,  # as in --model
    adapter_entries: Sequence[str],  # as in --adapter
    keys: Sequence[str],  # the trainer's keys on the command line
    now: Callable[[], datetime] = datetime.now,  # the clock for templates that print the date
) -> InferenceSetup:
    """Find the adapters and their base model, and read everything but weights. Raises UserError."""
    adapters = find_adapters(adapter_entries)
    config = load_run_config(adapters, keys)
    base = find_base(model, adapters.values())
    tokenizer = load_adapted_tokenizer(base, adapters)
    template = load_chat_template(config.template, tokenizer, now=now)
    config_file = parse_arguments(keys).get("config")
    model_config = read_config(base, config.accepted_fields())
    vocab_size = max((vocabulary_of(d, 0) for d in adapters.values()), default=0) or model_config.vocab_size
    model_config = replace(model_config, vocab_size=vocab_size)
    return InferenceSetup(adapters, config, base, model_config, tokenizer, template, config_file)


def find_adapters(entries: Sequence[str]) -> dict[str, Path]:
    """Name -> directory, for entries such as DIRECTORY, NAME=DIRECTORY or a hub id.

    Raises UserError for a directory without an adapter, and for a name that cannot be used.
    """
    adapters: dict[str, Path] = {}
    for entry in entries:
        name, equals, source = whole(entry).partition("=")
        if not equals or is_address(name) or Path(entry).is_dir():  # a directory may be called runs/lr=1e-4
            name, source = "", whole(entry)
        source = hide_secrets(source)
        directory = resolve_model(source)
        read_adapter_config(directory)  # raises UserError if there is no adapter
        check_has_weights(directory)  # before the base model is loaded, which may take minutes
        name = name or (Path(source).name or directory.resolve().name).replace(".", "-")
        # Adapters are kept in a ParameterDict, whose own attributes (keys, half, ...) cannot be names in it.
        taken = name in (*adapters, BASE) or hasattr(nn.ParameterDict(), name)
        if taken or "." in name:
            problem = "contains a dot" if "." in name else "is taken"
            raise UserError(
                f"--adapter {entry}: the name {name!r} {problem}; choose another one, as in other={source}"
            )
        adapters[name] = directory
    return adapters


def find_base(model: str | None, adapters: Iterable[Path]) -> Path:
    """The base model's directory: `model`, else the one that the adapters name, else minilora's own model.

    Raises UserError if an adapter names an address: its author does not choose where this machine connects.
    """
    if model:
        return EMBEDDED_MODEL if model == "assets/base" else resolve_model(model)
    named = {}
    for adapter in adapters:
        raw = read_json(adapter / ADAPTER_CONFIG_FILE)
        if not raw.get("base_model_name_or_path"):
            raise UserError(f"{adapter} does not name the model it was trained on; give it with --model")
        refuse_address(raw["base_model_name_or_path"], str(adapter / ADAPTER_CONFIG_FILE), "--model")
        named[raw["base_model_name_or_path"], raw.get("revision")] = adapter
    if len(named) > 1:
        models = "; ".join(f"{adapter}: {name}" for (name, _), adapter in named.items())
        raise UserError(
            f"the adapters were trained on different models ({models}); choose the base model with --model"
        )
    name, revision = next(iter(named), ("assets/base", None))
    return EMBEDDED_MODEL if name == "assets/base" else resolve_model(name, revision)


def load_run_config(adapters: Mapping[str, Path], keys: Sequence[str]) -> TrainConfig:
    """The settings of the first adapter's training run, or the trainer's defaults, changed by `keys`.

    Two of them do not travel. The best dtype depends on the machine that runs the model, not on the one that
    trained it. And without a run, weights are quantized only if `keys` say so.
    """
    given = parse_arguments(keys)
    values = dict(bf16="none", fp16="false")
    files = [directory / SETTINGS_FILE for directory in run_directories(adapters)]
    if file := next(filter(Path.exists, files), None):
        values["config"] = str(file)
    elif "config" not in given and not QUANTIZATION_KEYS & given.keys():
        values["quantization_bit"] = "none"
    words = [f"--{name}={value}" for name, value in values.items() if name not in given]
    return load_train_config([*words, *keys])


def load_adapted_tokenizer(base: Path, adapters: Mapping[str, Path]) -> Tokenizer:
    """The tokenizer saved with the first adapter's run, or else the base model's."""
    for directory in run_directories(adapters):
        if has_tokenizer(directory):
            return load_tokenizer(directory)
    return load_tokenizer(base)


def run_directories(adapters: Mapping[str, Path]) -> list[Path]:
    """The directories that may hold the first adapter's tokenizer and settings, the first choice first.

    They are the adapter's own directory and, for a checkpoint-N, the output directory of its run above it.
    """
    directories = [*adapters.values()][:1]
    checkpoints = [
        path for path in map(Path.resolve, directories) if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return directories + [path.parent for path in checkpoints]
