"""What a package promises to its neighbours: it shadows nobody, and it imports nothing heavy."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, cwd: Path, *path: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {[str(p) for p in path]}\n{code}"], cwd=cwd,
                          capture_output=True, text=True)  # fmt: skip


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
    done = run_python(f"import minilora, sys; print([m for m in {heavy} if m in sys.modules])", ROOT, ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_the_kernels_import_nothing_of_minilora():
    for path in (ROOT / "kernels").glob("*.py"):
        assert "minilora" not in [
            line.split()[1].split(".")[0] for line in path.read_text().splitlines() if line.startswith(("import", "from"))
        ]
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "minilora" / "kernels").is_symlink()


def test_every_public_name_exists_and_is_documented():
    import minilora

    for name in minilora.__all__:
        entry = getattr(minilora, name)
        assert isinstance(entry, dict) or entry.__doc__, name
