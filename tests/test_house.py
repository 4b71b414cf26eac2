"""The house: imports run one way, from the cellar up, and nothing is said of it that is not so."""

import ast
import re
from pathlib import Path

import pytest
from support.project import ROOT

# From the ground up. A module imports from its own floor (without a circle) and from the floors below it.
# This is the architecture.
FLOORS = (
    ("system",),
    ("backend", "config", "recompute"),
    ("ops", "quantization", "int8", "rope", "targets"),
    ("optim", "linear", "dora", "initialize", "eva", "vera"),
    ("model", "lora", "adapted", "wrapping", "new_rows", "starts"),
    ("loss", "loss_scale"),
    ("mixed", "mixed_layer", "data", "memory", "testing"),
    ("formats",),
    ("adapters",),
    ("parallel",),
    ("run",),
    ("inference",),
    ("serving",),
    ("__init__", "__main__"),
    ("scripts",),
)
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of minilora and of the scripts. Packages have the name of their folder."""
    found = {}
    for path in [*(ROOT / "minilora").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "kernels" not in parts:
            found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)] = path
    return found


def imports(path: Path, names: dict[str, Path]) -> set[str]:
    """The modules of this project that a file imports, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {"minilora.__init__" if name == "minilora" else name for name in found} & {*names, "minilora"} | (
        {"minilora.__init__"} if "minilora" in found else set()
    )


def room(module: str) -> str:
    return "scripts" if module.startswith("scripts.") else module.split(".")[1]


GRAPH = {name: imports(path, modules()) - {name} for name, path in modules().items()}


def test_every_module_has_a_floor():
    assert {room(module) for module in GRAPH} == set(HEIGHT)


@pytest.mark.parametrize("module", GRAPH)
def test_no_arrow_points_up(module):
    # `from minilora import ops` names the package, whose __init__ imports everything: what is meant is the
    # module.
    up = {
        other for other in GRAPH[module] - {"minilora.__init__"} if HEIGHT[room(other)] > HEIGHT[room(module)]
    }
    assert not up, f"{module} imports {', '.join(sorted(up))} from above"


def test_there_is_no_circle():
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for other in sorted(GRAPH[module] - {"minilora.__init__"}):
                walk(other, (*path, module))
            done.add(module)

    for module in GRAPH:
        walk(module, ())


def test_no_module_is_called_like_a_public_function():
    import minilora

    public = {name for name in minilora.__all__ if callable(getattr(minilora, name)) and name.islower()}
    assert not public & {module.rpartition(".")[2] for module in GRAPH}


# ---- the README's tree ------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = README.partition("<!-- tree:")[2].partition("```\n")[2].partition("```")[0]
COUNTED = {
    name: int(lines)
    for name, lines in re.findall(r"^ {0,2}(\w+\.py|\w+/|[\w/]+\.py) +(\d+) ", TREE, re.MULTILINE)
}
CORE = "config ops model lora quantization linear recompute optim loss loss_scale".split()


def lines_of(name: str) -> int:
    """Lines of a file of the core, of scripts/train.py, or of all files of a room."""
    if name.endswith("/"):
        folder = ROOT / name if name == "kernels/" else ROOT / "minilora" / name
        return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))
    path = ROOT / name if "/" in name else ROOT / "minilora" / name
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("name", COUNTED)
def test_the_readme_counts_the_lines_of_each_file_and_room(name):
    assert COUNTED[name] == pytest.approx(lines_of(name), rel=0.05, abs=5)


def test_the_readme_lists_every_file_of_the_core_in_reading_order_and_every_room():
    files = {path.name for path in (ROOT / "minilora").glob("*.py")} - {"__init__.py"}
    rooms = {f"{path.parent.name}/" for path in (ROOT / "minilora").glob("*/__init__.py")}
    assert set(COUNTED) == files | rooms | {"scripts/train.py"}
    assert [name.removesuffix(".py") for name in COUNTED if name.removesuffix(".py") in CORE] == CORE


def test_the_core_with_the_trainer_is_at_most_2600_lines():
    assert sum(lines_of(f"{name}.py") for name in CORE) + lines_of("scripts/train.py") <= 2600


@pytest.mark.parametrize(
    "path", [*(ROOT / "minilora").glob("*/__init__.py")], ids=lambda path: path.parent.name
)
def test_each_room_says_what_is_in_it(path):
    lesson = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    missing = [
        file.name
        for file in path.parent.glob("*.py")
        if file.name != "__init__.py" and file.name not in lesson
    ]
    assert not missing or path.parent.name == "kernels", missing


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_function_is_longer_than_60_lines_and_none_of_the_trainer_longer_than_40():
    files = [path for folder in ("minilora", "scripts", "kernels") for path in (ROOT / folder).rglob("*.py")]
    long = {
        f"{path.relative_to(ROOT)}: {name}": size
        for path in files
        for name, size in functions(path)
        if size > 60
    }
    train = {name: size for name, size in functions(ROOT / "scripts/train.py") if size > 40}
    assert not long and not train
