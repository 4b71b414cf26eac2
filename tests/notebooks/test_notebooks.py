"""The notebooks: every solution passes its check, every gap fails it in a line, and the twins are one text."""

import copy
import re

import nbformat
import pytest
from nbclient import NotebookClient
from support.project import PROGRAM_ENVIRONMENT, ROOT

import notebooks

SOURCES = notebooks.sources()
ON_COLAB, *EXERCISES = SOURCES
CHECK = "with check("
# Longer than any of them. The report of a battery names a property a line, so it is longer; no gap shows one.
LONGEST_LINE = 400
# A warning is an error in a notebook's kernel, too, from the moment on in which the libraries are imported.
STRICT = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", module=r"(transformers|peft|ipykernel)\\..*")  # their own business
"""


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_notebooks_are_what_their_source_makes_and_hold_no_outputs(source):
    for name, text in notebooks.twins(source):
        found = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        assert found == nbformat.reads(notebooks.notebook(text), as_version=4), "run scripts/dev/notebooks.py"
        nbformat.validate(found)
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in found.cells)


def test_there_is_no_notebook_without_a_source():
    made = {name for source in SOURCES for name, _ in notebooks.twins(source)}
    assert {path.name for path in (ROOT / "notebooks").glob("*.ipynb")} == made


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_solution_is_the_source_without_its_marks_and_a_gap_is_one_line_in_place_of_it(source):
    solved, with_gaps, within = [], [], False
    for line in source.read_text(encoding="utf-8").splitlines():
        if line.strip() in ("# solution: begin", "# solution: end"):
            within = line.strip().endswith("begin")
            with_gaps += [line.replace("# solution: begin", "...  # your code here")] if within else []
        else:
            solved.append(line)
            with_gaps += [] if within else [line]
    text = source.read_text(encoding="utf-8")
    assert notebooks.solved(text).splitlines() == solved
    assert notebooks.with_gaps(text).splitlines() == with_gaps


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_behind_every_exercise_stands_its_check(source):
    cells = code_cells(source)
    for cell, following in zip(cells, [*cells[1:], ""], strict=True):
        if notebooks.SOLUTION.search(cell):
            assert CHECK in following, cell


@pytest.mark.parametrize("source", EXERCISES, ids=lambda path: path.stem)
def test_a_notebook_runs_and_each_of_its_gaps_fails_in_one_helpful_line(source, run):
    """Every exercise is run twice: with its gap, whose check must fail, and then solved."""
    notebook, expected_failures = with_gaps_first(source)
    run(notebook)
    failed = [cell for cell in notebook.cells if errors_of(cell)]
    assert [cell.id for cell in failed] == expected_failures
    for cell in failed:
        (error,) = errors_of(cell)
        assert error.ename == "NotYet", error.traceback
        (line,) = error.traceback
        assert len(line) < LONGEST_LINE and "\n" not in line, line
        assert re.match(r"not yet: .+: .{10}", line), line
    assert failed


def test_after_a_disconnect_all_cells_of_the_first_notebook_run_again_and_the_training_goes_on(run):
    first = nbformat.reads(notebooks.notebook(ON_COLAB.read_text(encoding="utf-8")), as_version=4)
    again = copy.deepcopy(first)
    (train,) = [i for i, cell in enumerate(first.cells) if "{minilora} train " in cell.source]
    run(first)
    assert "starting at the beginning" in printed(first.cells[train])
    again.cells = again.cells[: train + 1]
    run(again)
    assert "checkpoint-4, after step 4 of 4" in printed(again.cells[train])


def test_a_mistake_of_the_user_is_one_line_in_a_notebook_too(run):
    cell = nbformat.v4.new_code_cell('from minilora import load_model\nload_model("nowhere")')
    cell.metadata["tags"] = ["raises-exception"]
    run(nbformat.v4.new_notebook(cells=[cell]))
    (error,) = errors_of(cell)
    (line,) = error.traceback
    assert line.startswith("UserError: ") and "nowhere" in line and "\n" not in line


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a notebook in tmp_path, in its fast mode, with warnings as errors, and fill in its outputs."""
    for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    environment = PROGRAM_ENVIRONMENT | {"MINILORA_FAST": "1", "HF_HUB_OFFLINE": "1"}
    place = {"metadata": {"path": str(tmp_path)}}

    def execute(notebook: nbformat.NotebookNode) -> None:
        whole = copy.copy(notebook)
        whole.cells = [nbformat.v4.new_code_cell(STRICT, id="strict"), *notebook.cells]
        NotebookClient(whole, timeout=120, kernel_name="python3", resources=place).execute(env=environment)
        for cell in notebook.cells:  # a command that fails does not stop a notebook
            assert not re.search(r"^(error: |Traceback)", printed(cell), re.MULTILINE), printed(cell)

    return execute


def code_cells(source) -> list[str]:
    """The sources of the code cells, with the marks of the solutions."""
    parts = re.split(r"^# %%(.*)\n", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return [body for kind, body in zip(parts[::2], parts[1::2], strict=True) if "[markdown]" not in kind]


def with_gaps_first(source) -> tuple[nbformat.NotebookNode, list[str]]:
    """The solved notebook, in which each exercise and its check stand before it with the gap. Also returned:
    the ids of those checks.
    """
    gaps, whole = (
        nbformat.reads(notebooks.notebook(made(source.read_text(encoding="utf-8"))), as_version=4)
        for made in (notebooks.with_gaps, notebooks.solved)
    )
    cells, must_fail = [], []
    codes = [
        (gap, cell) for gap, cell in zip(gaps.cells, whole.cells, strict=True) if cell.cell_type == "code"
    ]
    for (gap, cell), (_, following) in zip(codes, [*codes[1:], (None, None)], strict=True):
        if gap.source != cell.source:
            tried = copy.deepcopy(following)
            gap.id, tried.id = f"gap-{gap.id}", f"gap-{tried.id}"
            tried.metadata["tags"] = ["raises-exception"]
            cells += [gap, tried]
            must_fail.append(tried.id)
        cells.append(cell)
    whole.cells = cells
    return whole, must_fail


def printed(cell) -> str:
    return "".join(out.text for out in cell.get("outputs", []) if out.output_type == "stream")


def errors_of(cell) -> list:
    return [out for out in cell.get("outputs", []) if out.output_type == "error"]
