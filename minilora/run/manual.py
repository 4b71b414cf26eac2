"""What train.py --help prints: every key with its default and its meaning, as settings.py says them.

To import the settings takes seconds, because they import torch to check themselves. So the text of their file
is read here, and of its code only three tables are evaluated, which need no import.
"""

import ast
import re
from functools import cache
from pathlib import Path

SETTINGS = Path(__file__).with_name("settings.py")


def manual() -> str:
    """The text of --help: every key with its default and meaning, by sections."""
    lines = ["usage: train.py [--config FILE.yaml] [--KEY VALUE ...]"]
    for section, keys in documented_keys().items():
        lines.append(f"\n{section}")
        for name, default, meaning in keys:
            lines.append(f"  --{name} {default}".ljust(42) + (f"  {meaning}" if meaning else ""))
    short_names = [f"{alias} = {name}" for alias, name in _tables()["ALIASES"].items()]
    short_names += [f"{switch} = quantization_bit 4" for switch in _tables()["SWITCHES"]]
    lines += ["", f"short names: {', '.join(short_names)}", ""]
    return "\n".join(lines)


def documented_keys() -> dict[str, list[tuple[str, str, str]]]:
    """{section: [(name, default, meaning and limit), ...]}, parsed from the source of TrainConfig."""
    source = _source().partition("class TrainConfig:")[2].partition("def __post_init__")[0]
    largest = _tables()["LARGEST"]
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for line in re.findall(r"^    (# .+|\w+: .+ = .+)$", source, re.MULTILINE):
        if line.startswith("# "):
            keys = sections[line[2:]] = []
        else:
            name, default, meaning = re.fullmatch(r"(\w+): .+? = (.+?)(?:  # (.+))?", line).groups(default="")
            limit = f"; at most {largest[name]:,}" if name in largest else ""
            keys.append((name, default, meaning + limit))
    return sections


@cache
def _source() -> str:
    return SETTINGS.read_text(encoding="utf-8")


@cache
def _tables() -> dict[str, dict | tuple]:
    """LARGEST, ALIASES and SWITCHES of settings.py."""
    found = {}
    for node in ast.parse(_source()).body:
        match node:
            case ast.Assign([ast.Name("LARGEST" | "ALIASES" | "SWITCHES" as name)], value):
                found[name] = eval(compile(ast.Expression(value), str(SETTINGS), "eval"), {})
    return found
