"""What is wrong with how a case ended: its exit code, its words, and the files it left.

An error is one line, the only one on stderr and the last one. It begins with "error: ", has at most 500
characters and no control characters: neither escape sequences nor line ends of any kind, nor the marks that
turn the direction of a text. Whatever a case does, everything in its folder stays as it was.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from support.project import ROOT

from fuzz.case import Case

LINE_LENGTH = 500
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@dataclass
class Verdict:
    """How a case ended. Without faults it ended as it should."""

    kind: str
    name: str
    line: str  # the last line of stderr
    seconds: float
    peak: int  # bytes, resident
    faults: list[str] = field(default_factory=list)


def listing(folder: Path) -> dict[str, tuple]:
    """Kind, size and time of everything in a folder, by path, but of the program's output."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if name not in ("stdout", "stderr", "network"):
            state = path.lstat()
            is_folder = path.is_dir() and not path.is_symlink()
            found[name] = (state.st_mode, *(() if is_folder else (state.st_size, state.st_mtime_ns)))
    return found


def faults_of_end(case: Case, ended: int, err: str) -> list[str]:
    faults = []
    if ended != case.code:
        faults.append(f"exit code {ended}, not {case.code}")
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if case.code == 2 and (len(errors) != 1 or lines[-1] != errors[0]):
        faults.append(f"{len(errors)} lines begin with 'error: ', and the last line must")
    if case.code == 2 and not case.remarks and len(lines) > 1:
        faults.append(f"stderr has {len(lines)} lines, not one")
    said = errors[-1] if errors else err
    if missing := [words for words in case.names if not any(word in said for word in words.split("|"))]:
        faults.append(f"does not name {', '.join(missing)}")
    return faults


def faults_of_text(case: Case, out: str, err: str) -> list[str]:
    faults = [f"does not show {text!a}" for text in case.shows if text not in out]
    if "Traceback (most recent call last)" in err + out:
        faults.append(f"traceback: {traceback_place(err if 'Traceback' in err else out)}")
    if case.code != 0 and (length := max(map(len, err.splitlines()), default=0)) > LINE_LENGTH:
        faults.append(f"a line of {length:,} characters on stderr")
    for name, text in (("stdout", out), ("stderr", err)):
        if case.code != 0 and (found := CONTROL_CHARACTERS.search(text)):  # an answer may hold any character
            faults.append(f"the control character {found[0]!a} on {name}")
        if case.secret and case.secret in text:
            faults.append(f"the secret on {name}")
    return faults


def traceback_place(text: str) -> str:
    """The error's last line, and the last function of this project that it went through."""
    frames = re.findall(
        rf'File "{re.escape(str(ROOT))}/((?:minilora|scripts|kernels)/[^"]+)", line (\d+), in (\w+)', text
    )
    name, line, function = frames[-1] if frames else ("?", "?", "?")
    last = next((line for line in reversed(text.splitlines()) if re.match(r"[\w.]+(:|$)", line)), "")
    return f"{last[:160]} ({name}:{line} {function})"


def faults_of_files(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    left, lost = sorted(after.keys() - before.keys()), sorted(before.keys() - after.keys())
    changed = sorted(name for name in before.keys() & after.keys() if before[name] != after[name])
    said = (("leaves", left), ("removes", lost), ("changes", changed))
    return [f"{verb} {', '.join(names[:4])}" for verb, names in said if names]


def write_report(verdicts: Iterable[Verdict], mutations: list[dict], path: Path) -> None:
    """Write the verdicts of the table, and what random changes found, as JSON."""
    report = {"table": [asdict(verdict) for verdict in verdicts], "mutations": mutations}
    path.write_text(json.dumps(report, indent=1))
