"""The command `minilora NAME ...`: runs the script of that name, as `python scripts/NAME.py ...` does.

The scripts are files beside this package in a clone, and inside of it in a wheel. Python runs them in this
process, under the name __main__, so a script cannot tell how it was started. `python -m minilora NAME ...` is
the same command, for torchrun and wherever the command is on no path.
"""

import minilora.system.interrupts  # noqa: F401, I001  first, for Ctrl-C during the other imports

import ast
import runpy
import sys

from minilora.system.assets import SCRIPTS
from minilora.system.errors import UserError, run_script, suggestion


def main() -> None:
    """Run the script that the command line names. Without one, or after --help, list them all."""
    word, *arguments = sys.argv[1:] or ["--help"]
    name = word.replace("-", "_")
    if name not in names():
        run_script(lambda: list_or_refuse(word))
        return
    sys.path.insert(0, str(SCRIPTS))
    sys.argv = [str(SCRIPTS / f"{name}.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def names() -> list[str]:
    """The scripts that are commands."""
    return sorted(path.stem for path in SCRIPTS.glob("*.py"))


def list_or_refuse(word: str) -> None:
    """Print the list of commands for --help. Raises UserError for any other word: it is no command."""
    if word not in ("--help", "-h"):
        raise UserError(f"minilora {word!r} is no command{suggestion(word.replace('-', '_'), names())}")
    print("usage: minilora COMMAND [ARGUMENTS]; minilora COMMAND --help says what it does, and how\n")
    for name in names():
        source = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")
        print(f"  {name:<16}{ast.get_docstring(ast.parse(source)).splitlines()[0]}")


if __name__ == "__main__":
    main()
