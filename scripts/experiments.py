"""Repeat the experiments of docs/experiments.md: measure, draw, and write their tables.

    python scripts/experiments.py                                list the studies and their questions
    python scripts/experiments.py rank_and_rate                  one study, in minutes
    python scripts/experiments.py rank_and_rate forgetting       several
    python scripts/experiments.py all                            all of them
    python scripts/experiments.py rank_and_rate --quick          few settings and steps, to try it

    --output FOLDER    default: docs/experiments, with --quick outputs/experiments
    --redraw           draw the figures that are there, and measure nothing

A study writes <study>.json, the figures with their settings and seeds, and <study>.png. If the folder is the
repository's own, the study's table in docs/experiments.md is written anew, too. Its sentences are not; the
tests say which of them the new figures contradict. The studies train the small model of assets/, and need no
network and no GPU. Each is a file of scripts/studies/.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401, I001  first, for Ctrl-C during the other imports

    import sys
    from pathlib import Path

    from minilora.system.early_help import answer_help

    answer_help(__doc__)
    sys.path.append(str(Path(__file__).resolve().parent / "dev"))  # for world.py

import argparse
import json
import os
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType

from studies.drawing import picture_of

from minilora.system.errors import ArgumentParser, UserError, local_path, run_script, suggestion
from minilora.system.files import make_folder, read_json, write_whole

STUDIES = (  # in the order of docs/experiments.md
    "rank_and_rate",
    "singular_values",
    "equal_budgets",
    "forgetting",
    "merging",
    "stored_bits",
    "live_bytes",
    "small_gradients",
    "eight_bit_adam",
    "which_zero",
)
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "experiments.md"


def main() -> None:
    options = parse_options()
    if not options.names:
        print("\n".join(f"{name:<17}{question(study(name))}" for name in STUDIES))
    for name in options.names:
        if options.redraw:
            redraw(name, options.output)
        else:
            print(f"{name}: {question(study(name))}", flush=True)
            figures = {"study": name, "quick": options.quick} | study(name).measure(options.quick)
            write_whole(options.output / f"{name}.json", json.dumps(figures, indent=1) + "\n")
            report(name, figures, options.output)


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("names", nargs="*", metavar="STUDY")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--redraw", action="store_true")
    parser.add_argument("--output", type=local_path)
    options = parser.parse_args()
    for name in options.names:
        if name not in (*STUDIES, "all"):
            raise UserError(f"no study is called {name!r}{suggestion(name, STUDIES)}")
    options.names = STUDIES if "all" in options.names else options.names
    folder = options.output or Path("outputs/experiments" if options.quick else "docs/experiments")
    if options.quick and is_the_repositorys(folder):
        raise UserError(f"--output {folder} holds the figures of whole studies: leave --quick out")
    if options.names and not options.redraw:
        make_folder("--output", folder)
    options.output = folder
    return options


def is_the_repositorys(folder: Path) -> bool:
    """Whether the tables of docs/experiments.md belong to the figures of this folder."""
    return os.path.realpath(folder) == str(DOCUMENT.with_suffix(""))


def study(name: str) -> ModuleType:
    return import_module(f"studies.{name}")


def question(module: ModuleType) -> str:
    """Return the first line of a study's docstring."""
    return module.__doc__.partition("\n")[0]


def redraw(name: str, folder: Path) -> None:
    """Report the figures that a folder has of a study. Raises UserError if they are no such figures."""
    path = folder / f"{name}.json"
    figures = read_json(path)
    if not isinstance(figures, dict) or figures.get("study") != name:
        raise UserError(f"{path} holds no figures of {name}: leave --redraw out to measure them")
    try:
        report(name, figures, folder)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} lacks figures of {name} ({error!r}): measure them again") from error


def report(name: str, figures: dict, folder: Path) -> None:
    """Draw the picture of a study, print its table, and put it into the document if that is its place."""
    import matplotlib

    matplotlib.use("Agg")
    picture, table = picture_of(partial(study(name).draw, figures=figures)), study(name).table(figures)
    write_whole(folder / f"{name}.png", picture)
    if is_the_repositorys(folder):
        text = DOCUMENT.read_text(encoding="utf-8")
        write_whole(DOCUMENT, with_table(text, name, table))
    print(f"\n{table}\n\n{folder / name}.json, {folder / name}.png\n", flush=True)


def with_table(text: str, name: str, table: str) -> str:
    """Return the document with a study's table between its two marks."""
    before, begin, rest = text.partition(f"<!-- table: {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not (begin and end):
        raise UserError(f"{DOCUMENT} has no marks for the table: <!-- table: {name} --> and <!-- end -->")
    return f"{before}{begin}{table}\n{end}{after}"


if __name__ == "__main__":
    run_script(main)
