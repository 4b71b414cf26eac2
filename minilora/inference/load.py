"""A base model with the adapters that were trained on it, put together for whoever uses them.

Adapters are loaded side by side, each under a name, onto one copy of the base model; `set_adapter` switches
between them and the base alone. A name is what stands in front of `=` in NAME=DIRECTORY, else the last part
of the directory or hub id.

Training leaves its tokenizer, its chat template and its settings beside the adapter; those of a checkpoint-N
are the run's, one directory above. Those of the first adapter hold for all that is done with it and the
others (how the weights are quantized, how rows are worded and cut), but for keys that are given anew.
"""

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.formats.adapter import ADAPTER_CONFIG_FILE, load_adapter, read_adapter_config
from minilora.formats.weights import load_model
from minilora.linear import describe_weights
from minilora.lora import set_adapter
from minilora.model import CausalLM
from minilora.run.output_dir import SETTINGS_FILE
from minilora.run.settings import TrainConfig, load_train_config
from minilora.system.assets import EMBEDDED_MODEL
from minilora.system.device import choose_placement
from minilora.system.errors import UserError
from minilora.system.files import read_json
from minilora.system.hub import resolve_model

BASE = "base"  # what the model without an adapter is called


def find_adapters(entries: Sequence[str]) -> dict[str, Path]:
    """Name -> directory, of `DIRECTORY`, `NAME=DIRECTORY` or hub ids. Raises UserError for what is none, and
    for equal names.
    """
    found: dict[str, Path] = {}
    for entry in entries:
        name, equals, place = entry.partition("=")
        if not equals or Path(entry).is_dir():  # a directory may be called runs/lr=1e-4
            name, place = "", entry
        directory = resolve_model(place)
        read_adapter_config(directory)
        name = name or (Path(place).name or directory.resolve().name).replace(".", "-")
        if (
            name in (*found, BASE) or "." in name or hasattr(nn.ParameterDict(), name)
        ):  # what it is kept in knows keys, half, train
            fault = "may hold no dot" if "." in name else "is taken"
            raise UserError(
                f"--adapter {entry}: the name {name!r} {fault}; give another one, as in other={place}"
            )
        found[name] = directory
    return found


def find_base(asked: str | None, adapters: Iterable[Path]) -> Path:
    """The base model's directory: as asked, else the one that the adapters name, else the model that comes
    with minilora.
    """
    if asked:
        return EMBEDDED_MODEL if asked == "assets/base" else resolve_model(asked)
    named = {}
    for adapter in adapters:
        raw = read_json(adapter / ADAPTER_CONFIG_FILE)
        if not raw.get("base_model_name_or_path"):
            raise UserError(f"{adapter} does not say which model it was trained on; name it with --model")
        named[raw["base_model_name_or_path"], raw.get("revision")] = adapter
    if len(named) > 1:
        models = "; ".join(f"{adapter}: {name}" for (name, _), adapter in named.items())
        raise UserError(
            f"the adapters were trained on different models ({models}); name the one to use with --model"
        )
    name, revision = next(iter(named), ("assets/base", None))
    return EMBEDDED_MODEL if name == "assets/base" else resolve_model(name, revision)


def load_run_config(adapters: Mapping[str, Path], keys: Sequence[str], **instead: str) -> TrainConfig:
    """The settings that the first adapter was trained with, or the trainer's defaults, changed by keys of the
    command line.

    `instead` stands for keys of that training which do not hold here, unless the command line says so.
    """
    instead |= dict(
        bf16="none", fp16="false"
    )  # what is fast is this machine's affair, not that of the one that trained
    if files := [
        place / SETTINGS_FILE for place in named_adapters(adapters) if (place / SETTINGS_FILE).is_file()
    ]:
        instead["config"] = str(files[0])
    given = {key[2:].partition("=")[0].replace("-", "_") for key in keys}
    return load_train_config(
        [*(f"--{name}={value}" for name, value in instead.items() if name not in given), *keys]
    )


def load_adapted_tokenizer(base: Path, adapters: Mapping[str, Path]) -> Tokenizer:
    """The first adapter's tokenizer, where there is one, else the base model's."""
    names = ("tokenizer.json", "tokenizer.model")
    return load_tokenizer(
        next(
            (place for place in named_adapters(adapters) if any((place / name).is_file() for name in names)),
            base,
        )
    )


def named_adapters(adapters: Mapping[str, Path]) -> list[Path]:
    """Where what belongs to the first adapter lies: beside it, else, for a checkpoint, with the run's own
    adapter.
    """
    places = [*adapters.values()][:1]
    return places + [
        whole.parent for whole in map(Path.resolve, places) if re.fullmatch(r"checkpoint-\d+", whole.name)
    ]


def load_adapted(base: Path, adapters: Mapping[str, Path], config: TrainConfig) -> CausalLM:
    """The model on the device that there is, in evaluation mode, with all adapters on it and the first one
    active.
    """
    placement = choose_placement(config.bf16, config.fp16)
    model = load_model(base, config.quant_config(), placement.dtype, placement.device)
    for name, directory in adapters.items():
        load_adapter(model, directory, name)
    set_adapter(model, next(iter(adapters), None))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    names = ", ".join(adapters) or "none"
    print(
        f"{base.name}: {describe_weights(model)}, on {placement}; adapters: {names}", file=sys.stderr
    )  # stdout is for answers
    return model.eval()
