"""What a package promises to its neighbours: it shadows nobody, imports nothing heavy, and finds its kernels
and its scripts wherever it lies.
"""

import ast
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from support.project import PROGRAM_ENVIRONMENT, ROOT

WITHOUT_PATH = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run_python(code: str, cwd: Path, *path: Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path[:0] = {[str(p) for p in path]}\n{code}"
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=WITHOUT_PATH)


@pytest.mark.parametrize("cwd", [ROOT, ROOT / "tests"])
def test_a_foreign_package_called_kernels_wins_over_ours(tmp_path, cwd):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'foreign'")
    # Behind our checkout on the path: a folder without __init__.py gives way to a package anywhere on it.
    done = run_python("import minilora, kernels; print(kernels.whose)", cwd, ROOT, tmp_path)
    assert done.stdout == "foreign\n", done.stderr
    code = "import kernels, minilora.kernels.rms_norm as ours; print(kernels.whose, ours.__name__)"
    done = run_python(code, cwd, ROOT, tmp_path)
    assert done.stdout == "foreign minilora.kernels.rms_norm\n", done.stderr


def test_importing_minilora_imports_no_oracle_and_no_triton():
    heavy = ["transformers", "peft", "bitsandbytes", "triton", "matplotlib", "huggingface_hub"]
    code = f"from minilora import *; import sys; print([m for m in {heavy} if m in sys.modules])"
    done = run_python(code, ROOT, ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_public_names_are_imported_when_they_are_asked_for():
    code = "import minilora, sys; print('torch' in sys.modules, set(minilora.__all__) <= set(dir(minilora)))"
    assert run_python(code, ROOT, ROOT).stdout == "False True\n"
    code = "from minilora import CausalLM; import minilora.model; print(CausalLM is minilora.model.CausalLM)"
    assert run_python(code, ROOT, ROOT).stdout == "True\n"
    code = "import minilora; print(hasattr(minilora, 'none')); from minilora import none"
    done = run_python(code, ROOT, ROOT)
    assert done.stdout == "False\n" and "cannot import name 'none' from 'minilora'" in done.stderr


def test_type_checkers_see_the_public_names_from_the_modules_that_give_them():
    import minilora

    tree = ast.parse((ROOT / "minilora" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))  # if TYPE_CHECKING
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    homes = minilora._MODULES.items()
    assert seen == {(f"minilora.{module}", name) for module, names in homes for name in names.split()}
    assert sorted(name for _, name in seen) == sorted(minilora.__all__)


def test_the_kernels_import_nothing_of_minilora():
    for path in (ROOT / "kernels").glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import", "from"))]
        assert "minilora" not in [line.split()[1].split(".")[0] for line in lines]
    assert not (ROOT / "kernels" / "__init__.py").exists()


TOOLS = sorted(
    path.name
    for path in (ROOT / "scripts" / "dev").glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("script", TOOLS)
def test_a_tool_of_the_maintainers_starts_from_any_folder(script, tmp_path):
    """By its path alone: the tests' own paths would hide that it finds no script beside its folder."""
    command = [sys.executable, str(ROOT / "scripts" / "dev" / script), "--help"]
    alone = PROGRAM_ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_no_file_is_a_link():
    """Git on Windows and some archives make text files of symbolic links."""
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]


WHERE_KERNELS_LIE = (
    "import minilora, minilora.kernels.nf4 as ours; print(minilora.__file__); print(ours.__file__)"
)


def test_kernels_are_found_from_an_editable_install(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
    done = run_python(WHERE_KERNELS_LIE, tmp_path)
    if not done.stdout.startswith(str(ROOT)):
        pytest.skip("this checkout is not the one that is installed")
    assert done.stdout.split() == [str(ROOT / "minilora/__init__.py"), str(ROOT / "kernels/nf4.py")], (
        done.stderr
    )


def test_kernels_are_found_from_a_checkout_on_the_path(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
    done = run_python(WHERE_KERNELS_LIE, tmp_path, ROOT)
    assert done.stdout.split() == [str(ROOT / "minilora/__init__.py"), str(ROOT / "kernels/nf4.py")], (
        done.stderr
    )


def sources(folder: Path) -> list[Path]:
    """The files of Python and of C below a folder, and those of the page for the browser."""
    return [path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".html", ".css", ".js")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # setuptools leaves a build folder beside what it builds
    source.mkdir()
    for name in ("minilora", "kernels", "scripts", "assets", "pyproject.toml", "README.md"):
        (source / name).symlink_to(ROOT / name)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    command = [sys.executable, "-W", "ignore", "-c", build, str(folder)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_a_wheel_holds_every_module_every_script_and_the_c_sources(site):
    tree = {path.relative_to(ROOT) for path in sources(ROOT / "minilora")}
    tree -= {Path("minilora/kernels/__init__.py")}
    for folder in ("kernels", "scripts"):
        tree |= {Path("minilora") / path.relative_to(ROOT) for path in sources(ROOT / folder)}
    tree = {path for path in tree if "dev" not in path.parts}  # the tools of the maintainers
    assert {path.relative_to(site) for path in sources(site)} == tree


def test_kernels_are_found_from_a_wheel(tmp_path, site):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
    done = run_python(WHERE_KERNELS_LIE, tmp_path, site)
    package = site / "minilora"
    assert done.stdout.split() == [str(package / "__init__.py"), str(package / "kernels/nf4.py")], done.stderr


def command_of(site: Path, *words: str) -> str:
    """Python code that runs the command of the wheel as the program does that pip writes for it."""
    (package,) = distributions(name="minilora", path=[str(site)])
    (entry,) = package.entry_points
    return f"sys.argv = {['minilora', *words]!r}\nfrom {entry.module} import {entry.attr} as main\nmain()"


def test_the_command_of_a_wheel_runs_the_scripts_in_it(tmp_path, site):
    done = run_python(command_of(site, "memory", "--model", "mistral-7b", "--gpu", "16"), tmp_path, site)
    assert done.returncode == 0 and "on a GPU of 16 GB" in done.stdout, done.stderr
    assert (tmp_path / "memory.png").exists()
    done = run_python(command_of(site, "check-gpu", "--only", "x"), tmp_path, site)  # it imports its sections
    assert done.returncode == 2 and "--only names 'x'" in done.stderr


def test_the_small_model_and_its_data_come_with_a_wheel_so_the_default_run_needs_no_clone(tmp_path, site):
    few = ["--max_steps", "2", "--max_samples", "8", "--exact_match_samples", "0"]
    done = run_python(command_of(site, "train", *few), tmp_path, site)
    assert done.returncode == 0 and "assets/base" in done.stdout, done.stderr
    assert (tmp_path / "outputs" / "default" / "adapter_model.safetensors").exists()


def test_every_public_name_exists_and_is_documented():
    import minilora

    for name in minilora.__all__:
        entry = getattr(minilora, name)
        assert isinstance(entry, dict) or entry.__doc__, name
