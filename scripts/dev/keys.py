"""Write docs/keys.md, docs/llama_factory.md and docs/config_fields.md: keys, example files, a model's fields.

    python scripts/dev/keys.py

The page of keys is built from the comments in `minilora/run/settings.py` and the tables in
`minilora/run/training_arguments.py` and `minilora/run/llama_factory.py`, the page of fields from the tables
by which the files are read. The page of example files is what becomes of each in
tests/run/llama_factory/examples.yaml. A test checks that all three are up to date.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import contextlib
import io
import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from minilora.adapters.peft_format import PEFT_CHANGES_NOTHING, PEFT_HONOURED, PEFT_INIT, PEFT_MUST_BE_OFF
from minilora.formats.config_fields import (
    CHANGES_NOTHING,
    CONFIG_FIELDS,
    MAX_PARAMETERS,
    QUANTIZATION_FIELDS,
    ROPE_FIELDS,
)
from minilora.formats.config_json import parse_config
from minilora.run.llama_factory import DEFAULTS, INSTEAD, NEEDED, NO_EFFECT, TRANSLATED, VALUES
from minilora.run.manual import documented_keys
from minilora.run.settings import ALIASES, SWITCHES, make_train_config
from minilora.system.assets import EMBEDDED_MODEL
from minilora.system.errors import ArgumentParser, UserError, run_script
from minilora.system.files import write_whole
from minilora.system.schema import Field

ROOT = Path(__file__).resolve().parents[2]
DOCS, EXAMPLES = ROOT / "docs", ROOT / "tests" / "run" / "llama_factory"
PAGE, FIELDS_PAGE, EXAMPLES_PAGE = DOCS / "keys.md", DOCS / "config_fields.md", DOCS / "llama_factory.md"


def main() -> None:
    ArgumentParser(help_text=__doc__).parse_args()  # it has no options
    for path, text in ((PAGE, page()), (FIELDS_PAGE, fields_page()), (EXAMPLES_PAGE, examples_page())):
        write_whole(path, text)
        print(f"written: {path}")


def page() -> str:
    """Return the page as Markdown."""
    return f"""# Every key of a training run

`python scripts/dev/keys.py` writes this page. A file sets a key as `key: value`, the command line as
`--key value`. The command line overrides the file. Hyphens work like underscores. An unknown key is an error.

{own_keys()}

## Short names

{short_names()}

## Files of Hugging Face's TrainingArguments and of LLaMA-Factory

They run as they are: most keys have the same names. A file with `stage` or `finetuning_type` counts as
LLaMA-Factory's. The keys that it omits then have LLaMA-Factory's defaults, wherever ours would give another
number:
{llama_factory_defaults()}
A name in `dataset` is looked up in `dataset_dir/dataset_info.json`.

{translated_keys()}

These keys are accepted and have no effect, because no number depends on them. The trainer prints each one:

{keys_without_effect()}

These keys would change the training. They are refused, unless they have the one value that minilora supports:

{refused_keys()}
"""


def own_keys() -> str:
    """Return a table per section of TrainConfig."""
    sections = []
    for section, keys in documented_keys().items():
        rows = [
            (f"`{name}`", f"`{default.strip(chr(34)).lower()}`", meaning) for name, default, meaning in keys
        ]
        sections.append(f"## {section[0].upper()}{section[1:]}\n\n" + table("key | default | meaning", rows))
    return "\n\n".join(sections)


def short_names() -> str:
    rows = [(f"`{alias}`", f"`{name}`") for alias, name in ALIASES.items()]
    rows += [(f"`{switch}: true`", "`quantization_bit: 4`") for switch in SWITCHES]
    return table("short | key", rows)


def llama_factory_defaults() -> str:
    pairs = ((name, "none" if value is None else value) for name, value in DEFAULTS.items())
    text = ", ".join(f"`{name}: {value}`" for name, value in pairs) + "."
    return textwrap.fill(text, 130, break_on_hyphens=False)


def translated_keys() -> str:
    rows = [(f"`{key}`", meaning) for key, meaning in TRANSLATED.items()]
    for key, words in VALUES.items():
        rows += [(f"`{key}: {word}`", f"`{own}`") for word, own in words.items()]
    return table("key | means here", rows)


def keys_without_effect() -> str:
    rows = [(", ".join(f"`{name}`" for name in names.split()), why) for why, names in NO_EFFECT.items()]
    return table("keys | why", rows)


def refused_keys() -> str:
    """Return a table with a row per key, and one last row for all that must be off without an alternative."""
    needed = {name: "off" if "none" in allowed else f"`{allowed[0]}`" for name, allowed in NEEDED.items()}
    off = [name for name, must in needed.items() if must == "off" and name not in INSTEAD]
    rows = [(f"`{name}`", must, INSTEAD.get(name, "")) for name, must in needed.items() if name not in off]
    rows.append((", ".join(f"`{name}`" for name in off), "off", "leave it out"))
    return table("key | must be | instead", rows)


# ---- the page of fields ----


def fields_page() -> str:
    """Return the page of the fields as Markdown."""
    return f"""# Every field of config.json and adapter_config.json

`python scripts/dev/keys.py` writes this page from the tables by which the files are read, in
`minilora/formats/config_fields.py` and `minilora/adapters/peft_format.py`. A value that a table does not
allow is refused in one line, before anything is written. Nothing is coerced: `"false"` is not false, `true`
is not 1, `32.0` is no whole number. Only where a fraction is meant, the whole number `1000000` is read as
`1000000.0`.

## config.json

{field_table(CONFIG_FIELDS)}

The sizes together may ask for {MAX_PARAMETERS:.0e} parameters at most.

Within `rope_scaling` and `rope_parameters`:

{field_table(ROPE_FIELDS)}

Within `quantization_config`:

{field_table(QUANTIZATION_FIELDS)}

These fields change nothing here, and any value is accepted:

{names(sorted(CHANGES_NOTHING))}

So are names that begin with `_`. Every other field is refused, unless it is off: null, false, 0 or empty.

## adapter_config.json

{field_table(PEFT_HONOURED)}

`{PEFT_INIT}` may be true, false, or the name of an initialisation that kept the base weights.

These keys change nothing:

{field_table(PEFT_CHANGES_NOTHING)}

These ask for something that is not implemented, and must be off:

{names(PEFT_MUST_BE_OFF)}

Every other key is refused, unless it is off.
"""


def field_table(fields: Mapping[str, Field]) -> str:
    """Return a table with a row per field."""
    rows = []
    for name, field in fields.items():
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
        default = "required" if field.required else default
        rows.append((f"`{name}`", field.allowed(), default, field.meaning))
    return table("field | allowed | absent | meaning", rows)


def names(fields: Iterable[str]) -> str:
    return textwrap.fill(", ".join(f"`{name}`" for name in fields) + ".", 130, break_on_hyphens=False)


# ---- the page of example files ----


def examples_page() -> str:
    """Return what becomes of LLaMA-Factory's example files, as Markdown."""
    examples = yaml.safe_load((EXAMPLES / "examples.yaml").read_text(encoding="utf-8"))
    outcomes = {name: outcome(name, examples) for name in examples["files"]}
    refused: dict[str, list[str]] = {}
    for name, (error, _) in outcomes.items():
        if error:
            refused.setdefault(error, []).append(f"`{name}`")
    runs = {name: keys for name, (error, keys) in outcomes.items() if not error}
    accepted_rows = [(f"`{name}`", ", ".join(f"`{key}`" for key in keys)) for name, keys in runs.items()]
    refused_rows = [(", ".join(files), error) for error, files in refused.items()]
    return f"""# LLaMA-Factory's example files

`python scripts/dev/keys.py` writes this page. It reads the keys and values of the files in LLaMA-Factory's
folder `examples` as `python scripts/train.py --config FILE.yaml` does, and then looks at the kind of the
model that each names. [keys.md](keys.md) says what becomes of every key.

## These run as they are: {len(runs)}

Their datasets are looked up in `data/dataset_info.json`, as LLaMA-Factory does. The trainer prints the keys
without an effect, each with its reason.

{table("file | keys without effect", accepted_rows)}

## These are refused: {len(outcomes) - len(runs)}

Each is refused in one line, by its first obstacle: another kind of training, another kind of model, then the
rest. A model is looked at last, because its config.json has to be fetched.

{table("files | the line", refused_rows)}
"""


def outcome(name: str, examples: dict) -> tuple[str, list[str]]:
    """Return the line that refuses an example file, or "", and its keys that have no effect."""
    given = {"dataset_dir": str(EXAMPLES / "data")} | examples["files"][name]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = make_train_config({name: given})
        model_type, _, method = examples["models"][config.model_name_or_path].partition(" ")
        parse_config(
            json.loads((EMBEDDED_MODEL / "config.json").read_text(encoding="utf-8"))
            | {"model_type": model_type, "architectures": None}
            | ({"quantization_config": {"quant_method": method}} if method else {})
        )
    except UserError as error:
        return str(error).replace(f"{EXAMPLES}/", ""), []
    without_effect = {key for keys in NO_EFFECT.values() for key in keys.split()}
    return "", [key for key in given if key in without_effect]


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table. A bar inside a cell is escaped."""
    lines = [head, " | ".join("---" for _ in head.split("|"))]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    run_script(main)
