"""The house: imports run one way, from the cellar up, and nothing is said of it that is not so."""

import ast
from pathlib import Path

import pytest
from support.project import ROOT

# From the ground up. A module imports from its own floor (without a circle) and from the floors below it.
# This is the architecture.
FLOORS = (
    ("system",),
    ("backend", "config", "recompute"),
    ("ops", "quantization", "int8"),
    ("optim", "linear", "dora"),
    ("model", "lora"),
    ("loss", "loss_scale"),
    ("data", "memory", "testing"),
    ("formats",),
    ("run",),
    ("inference",),
    ("__init__",),
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
