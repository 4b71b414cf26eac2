"""The short run of the fuzzer: part of the table of bad inputs, and some random changes of every file.

`make fuzz` runs the whole table, and random changes for as long as you like.
"""

import json
import subprocess
import sys
from collections import Counter

import pytest
from support.project import PROGRAM_ENVIRONMENT, ROOT

from fuzz.bad_inputs import TABLE
from fuzz.misbehaving import WAYS
from fuzz.readers import TARGETS
from fuzz.runner import DEVELOPERS_SCRIPTS, SCRIPTS

STRIDE = 6  # of the table, every sixth case: in under a minute on two cores
EXAMPLES = 15  # random changes of every file
SECONDS = 40  # four times the limit of `make fuzz`: other tests may keep the cores busy


def run_program(report, *arguments: object) -> dict:
    """Run a program of this package; it starts no thread before it forks. Returns its report."""
    paths = [PROGRAM_ENVIRONMENT["PYTHONPATH"], str(ROOT / "scripts" / "dev")]
    environment = PROGRAM_ENVIRONMENT | {"PYTHONPATH": ":".join(paths)}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=report.parent, env=environment, capture_output=True, text=True)
    assert report.exists(), done.stderr
    return json.loads(report.read_text())


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    report = tmp_path_factory.mktemp("fuzz") / "report.json"
    limits = ("--stride", STRIDE, "--examples", EXAMPLES, "--limit", SECONDS, "--workers", 2)
    return run_program(report, "fuzz", *limits, "--report", report)


@pytest.mark.parametrize("case", TABLE[::STRIDE], ids=lambda case: case.id)
def test_a_bad_input_ends_with_code_2_in_one_line_and_leaves_nothing(short_run, case):
    (verdict,) = [v for v in short_run["table"] if (v["kind"], v["name"]) == (case.kind, case.name)]
    assert not verdict["faults"], verdict["line"]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_file_changed_at_random_is_read_or_refused_in_one_line(short_run, target):
    (found,) = [entry for entry in short_run["mutations"] if entry["name"] == target.name]
    assert found["inputs"] >= EXAMPLES and not found["faults"]


def test_the_table_has_hundreds_of_different_cases_and_drives_every_script():
    ids = Counter(case.id for case in TABLE)
    assert len(TABLE[::STRIDE]) >= 300 and max(ids.values()) == 1
    driven = {case.command[0] for case in TABLE}
    scripts = (ROOT / "scripts").rglob("*.py")
    files = {path.stem for path in scripts if "run_script(main)" in path.read_text(encoding="utf-8")}
    assert driven == files == {*SCRIPTS, *DEVELOPERS_SCRIPTS}


def test_the_table_holds_good_inputs_of_every_script_that_does_work():
    good = {case.command[0] for case in TABLE if case.code == 0 and "--help" not in case.command}
    assert good == {*SCRIPTS} - {"share"}  # which needs somewhere to send to


@pytest.fixture(scope="module")
def misbehaviour(tmp_path_factory):
    report = tmp_path_factory.mktemp("misbehaviour") / "report.json"
    return run_program(report, "fuzz.misbehaving", report)["table"]


@pytest.mark.parametrize("way", WAYS)
def test_the_fuzzer_notices_when_a_script_misbehaves(misbehaviour, way):
    (verdict,) = [v for v in misbehaviour if v["name"] == way]
    assert any(WAYS[way] in fault for fault in verdict["faults"]) if WAYS[way] else not verdict["faults"]
