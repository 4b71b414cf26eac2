"""Write docs/keys.md: every key of the trainer with its default and meaning, and what LLaMA-Factory's other
keys mean here.

    python scripts/dev/keys.py

The page is made of the comments in `minilora/run/settings.py` and of the tables in
`minilora/run/llama_factory.py`; a test compares.
"""

import textwrap
from pathlib import Path

from minilora.run.llama_factory import DEFAULTS, INSTEAD, NEEDED, NO_EFFECT, TRANSLATED, VALUES
from minilora.run.settings import ALIASES, SWITCHES, documented_keys
from minilora.system.errors import run_script
from minilora.system.files import write_whole

PAGE = Path(__file__).resolve().parents[2] / "docs" / "keys.md"


def main() -> None:
    write_whole(PAGE, page())
    print(f"written: {PAGE}")


def page() -> str:
    """The page as Markdown."""
    sections = []
    for section, keys in documented_keys().items():
        rows = [
            (f"`{name}`", "`" + default.strip('"').lower() + "`", meaning) for name, default, meaning in keys
        ]
        sections.append(f"## {section[0].upper()}{section[1:]}\n\n" + table("key | default | meaning", rows))
    own = "\n\n".join(sections)
    aliases = [(f"`{alias}`", f"`{name}`") for alias, name in ALIASES.items()]
    aliases += [(f"`{switch}: true`", "`quantization_bit: 4`") for switch in SWITCHES]
    translated = [(f"`{key}`", meaning) for key, meaning in TRANSLATED.items()]
    translated += [
        (f"`{key}: {word}`", f"`{own}`") for key, words in VALUES.items() for word, own in words.items()
    ]
    defaults = ", ".join(
        f"`{name}: {'none' if value is None else value}`" for name, value in DEFAULTS.items()
    )
    defaults = textwrap.fill(defaults + ".", 130, break_on_hyphens=False)
    off = ", ".join(
        f"`{name}`" for name, allowed in NEEDED.items() if "none" in allowed and name not in INSTEAD
    )
    needed = {name: "off" if "none" in allowed else f"`{allowed[0]}`" for name, allowed in NEEDED.items()}
    refused = [
        (f"`{name}`", must, INSTEAD.get(name, ""))
        for name, must in needed.items()
        if name in INSTEAD or must != "off"
    ]
    return f"""# Every key of a training run

Written by `python scripts/dev/keys.py`. A file has them as `key: value`, the command line as `--key value`; hyphens work like
underscores, and the command line wins. A key that is not here is an error.

{own}

# # Short names

{table("short | key", aliases)}

# # LLaMA-Factory's files

They run as they are: most keys are the same ones. A file with `stage` or `finetuning_type` is taken for one of them, and what it
leaves out has LLaMA-Factory's defaults where they would change a number:
{defaults}
A name in `dataset` is looked up in `dataset_dir/dataset_info.json`.

{table("key | means here", translated)}

Accepted without an effect, as no number depends on them; the trainer prints which it found:

{table("keys | why", [(", ".join(f"`{name}`" for name in names.split()), why) for why, names in NO_EFFECT.items()])}

Refused, unless they ask for what is done here anyway, as the training would be another one:

{table("key | must be | instead", [*refused, (off, "off", "")])}
"""


def table(head: str, rows: list[tuple[str, ...]]) -> str:
    """Markdown; a bar within a cell is escaped."""
    lines = [head, " | ".join("---" for _ in head.split("|"))]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


if __name__ == "__main__":
    run_script(main)
