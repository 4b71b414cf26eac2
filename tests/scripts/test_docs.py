"""The documents are true: their snippets run, their commands have the options they use, their files exist."""

import importlib
import re
import sys
from pathlib import Path

import pytest
from support.project import PROGRAM_ENVIRONMENT, ROOT, is_key
from support.snippets import run_snippet

from minilora.system.errors import ArgumentParser

README = ROOT / "README.md"
TOP = [
    ROOT / name
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "assets/README.md", "notebooks/README.md")
]
DOCUMENTS = [*TOP, *sorted((ROOT / "docs").rglob("*.md"))]
HERE = str(Path(__file__).relative_to(ROOT))


def found_in_documents(pattern: str) -> list:
    """One test parameter for each match of the pattern's group, named after its document."""
    return [
        pytest.param(match, id=f"{path.relative_to(ROOT)}-{i}")
        for path in DOCUMENTS
        for i, match in enumerate(re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE))
    ]


@pytest.mark.parametrize("code", found_in_documents(r"^```python\n((?:.*\n)+?)^```"))
def test_every_snippet_runs(code, tmp_path):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    assert not run_snippet(code, tmp_path, PROGRAM_ENVIRONMENT)


@pytest.mark.parametrize(
    "code", ["assert 0, 'no'", "import warnings; warnings.warn('no')", "raise SystemExit('no')"]
)
def test_a_snippet_that_fails_or_warns_would_be_noticed(code, tmp_path):
    assert "no\n" in run_snippet(code, tmp_path, PROGRAM_ENVIRONMENT)


COMMAND = r"(?<!/)(scripts/(?:dev/)?\w+\.py(?: [^`|\n]*(?:\\\n[^`|\n]*)*)?)"


class Parsed(Exception):
    """Raised in place of parsing: the parser, and whether the trainer's keys may follow its own options."""


def parser_of(script: Path, monkeypatch) -> tuple[set[str], bool]:
    """The options that a script's own parser knows, and whether it takes the trainer's keys besides."""

    def stop(takes_keys):
        def parse(parser, *_):
            raise Parsed(set(parser._option_string_actions), takes_keys)

        return parse

    if script.name == "train.py":
        return {"--help"}, True
    monkeypatch.setattr(ArgumentParser, "parse_args", stop(False))
    monkeypatch.setattr(ArgumentParser, "parse_known_args", stop(True))
    monkeypatch.setattr(sys, "argv", [script.name])
    try:
        importlib.import_module(script.stem).main()
    except Parsed as parsed:
        return parsed.args
    raise AssertionError(f"{script.name} parses no options")


@pytest.mark.parametrize("command", found_in_documents(COMMAND))
def test_every_command_names_a_script_and_options_that_it_has(command, monkeypatch):
    script, options = ROOT / command.split()[0], re.findall(r"(?<!\S)--([\w-]+)", command)
    if not options:
        assert script.exists()
        return
    own, takes_keys = parser_of(script, monkeypatch)
    for option in options:
        known = f"--{option}" in own or (takes_keys and is_key(option))
        assert known, f"{script.name} has no --{option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_is_named_exists(document):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:minilora|scripts|docs|assets|kernels|tests)/[\w./]*)`", text):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_between_documents_leads_to_a_file_and_a_heading(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if "://" in name:
            continue
        path = document.parent / name if name else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def anchors(path: Path) -> set[str]:
    """The headings of a document as GitHub writes them in links."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_claim_names_the_test_that_holds_it():
    claims = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    rows = [row for row in claims.splitlines() if row.startswith("|") and not re.match(r"\|-|\| claim ", row)]
    assert len(rows) > 25
    for row in rows:
        tests = re.search(r"\| `(tests/\w+/test_\w+\.py)` \|$", row)
        assert tests and (ROOT / tests.group(1)).exists(), row


def test_the_readme_shows_how_to_begin():
    readme = README.read_text(encoding="utf-8")
    assert "pip install -c constraints.txt -e . && python scripts/train.py" in readme
    assert 'pip install -c constraints.txt -e ".[test]" && pytest' in readme


def test_no_text_points_to_a_folder_on_one_machine():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "pyproject.toml"]
    for path in texts:
        place = path.relative_to(ROOT)
        if str(place) != HERE and not place.parts[0].startswith("."):  # the environment may be .venv
            assert not re.search(r"(?<![\w.])/(home|root|Users)/", path.read_text(encoding="utf-8")), path
