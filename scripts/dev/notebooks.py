"""Write the notebooks: one for the learner, with gaps, and one with the solutions, from one source each.

    python scripts/dev/notebooks.py

    --output FOLDER    default: notebooks

A source is notebooks/NAME.py, in jupytext's percent format. Lines between `# solution: begin` and
`# solution: end` are an exercise's solution. NAME.ipynb has a gap in their place, NAME_solution.ipynb has
them. A source without an exercise makes NAME.ipynb alone. The cell behind an exercise checks it. A test
checks that all notebooks are up to date.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import re
from collections.abc import Iterator
from pathlib import Path

from minilora.system.errors import ArgumentParser, UserError, local_path, run_script
from minilora.system.files import make_folder, write_whole

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
SOLUTION = re.compile(r"^( *)# solution: begin\n(.*?)^ *# solution: end\n", re.DOTALL | re.MULTILINE)
GAP = "...  # your code here"


def main() -> None:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--output", type=local_path, default="notebooks")
    folder = parser.parse_args().output
    make_folder("--output", folder)
    for source in sources():
        for name, text in twins(source):
            write_whole(folder / name, notebook(text))
            print(f"written: {folder / name}")


def sources() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.py"))


def twins(source: Path) -> Iterator[tuple[str, str]]:
    """Yield the file name and the text, in the percent format, of each notebook that a source makes."""
    text = source.read_text(encoding="utf-8")
    if "# solution:" in SOLUTION.sub("", text):
        raise UserError(f"{source} has a mark '# solution: begin' without an end, or the reverse: pair them")
    yield f"{source.stem}.ipynb", with_gaps(text)
    if SOLUTION.search(text):
        yield f"{source.stem}_solution.ipynb", solved(text)


def with_gaps(text: str) -> str:
    return SOLUTION.sub(rf"\1{GAP}\n", text)


def solved(text: str) -> str:
    return SOLUTION.sub(r"\2", text)


def notebook(text: str) -> str:
    """Return a text in the percent format as an .ipynb without outputs, the same each time."""
    try:
        import jupytext
        import nbformat
    except ImportError as error:
        message = f'{error.name} is missing: pip install -c constraints.txt -e ".[test]"'
        raise UserError(message) from error
    made = jupytext.reads(text, fmt="py:percent")
    made.metadata = nbformat.from_dict(
        dict(
            kernelspec=dict(display_name="Python 3", language="python", name="python3"),
            language_info=dict(name="python"),
        )
    )
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # nbformat draws random ones
    return nbformat.writes(made) + "\n"


if __name__ == "__main__":
    run_script(main)
