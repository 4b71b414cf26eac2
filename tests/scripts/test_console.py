"""A console of any encoding: whatever a script prints or is named, no character is too strange for it."""

import io
import json
import subprocess
import sys

import pytest
from support.project import PROGRAM_ENVIRONMENT, ROOT

from minilora.system.early_help import answer_help
from minilora.system.errors import UserError, run_script

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py"))
CONSOLES = {  # name: encoding of stdout, variables of the process
    "utf-8": ("utf-8", {}),
    "cp1252": ("cp1252", {}),
    "ascii": ("ascii", {}),
    "ascii file names, too": ("ascii", {"LC_ALL": "C", "PYTHONUTF8": "0"}),
}


@pytest.fixture(scope="module", params=CONSOLES)
def verdicts(request, tmp_path_factory):
    """How every script ended that worked on such names and texts; see tests/fuzz/consoles.py."""
    encoding, variables = CONSOLES[request.param]
    report = tmp_path_factory.mktemp("consoles") / "report.json"
    environment = PROGRAM_ENVIRONMENT | variables
    environment["PYTHONPATH"] += f":{ROOT / 'scripts' / 'dev'}"
    command = [sys.executable, "-m", "fuzz.consoles", encoding, str(report)]
    done = subprocess.run(command, cwd=report.parent, env=environment, capture_output=True, text=True)
    assert report.exists(), done.stderr
    return {verdict["name"]: verdict for verdict in json.loads(report.read_text())["table"]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_does_its_work_and_shows_all_letters_or_their_escapes(verdicts, script):
    assert not verdicts[script]["faults"], verdicts[script]["line"]


def stdout_of(encoding: str, monkeypatch) -> io.BytesIO:
    """What is printed from now on, on a stdout that is as strict as Python's own."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, errors="strict"))
    return written


@pytest.mark.parametrize("encoding, shown", [("ascii", rb"\xe4\u6570"), ("cp1252", b"\xe4\\u6570")])
def test_a_letter_that_the_console_lacks_is_written_as_its_escape(monkeypatch, encoding, shown):
    written = stdout_of(encoding, monkeypatch)
    run_script(lambda: print("ä数", end=""))
    assert written.getvalue() == shown


def test_a_script_runs_where_there_is_no_console(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as under pythonw.exe
    run_script(lambda: print("ä数"))


def test_a_question_in_another_encoding_than_the_terminals_is_refused_in_one_line(monkeypatch):
    import chat

    typed = io.TextIOWrapper(io.BytesIO("größe\n".encode()), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdin", typed)
    with pytest.raises(UserError, match="the line is not ascii.*PYTHONIOENCODING"):
        chat.read_question()


def test_help_is_printed_on_such_a_console_too(monkeypatch):
    written = stdout_of("ascii", monkeypatch)
    monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
    with pytest.raises(SystemExit) as end:
        answer_help("größe\n")
    assert not end.value.code and written.getvalue() == b"gr\\xf6\\xdfe\n"
