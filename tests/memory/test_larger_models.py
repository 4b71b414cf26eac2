"""docs/larger_models.md says what its runs print: the tables, the tokens where gathers and arithmetic take
equally long, and the output of its command.
"""

import re
import shlex

import pytest
from support.project import ROOT

PAGE = (ROOT / "docs" / "larger_models.md").read_text(encoding="utf-8")
EVEN, TABLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def printed(capsys):
    """What code prints."""

    def run(code: str) -> str:
        exec(compile(code, "larger_models.md", "exec"), {})
        return capsys.readouterr().out

    return run


def test_the_tables_are_those_that_the_run_prints(printed):
    tables = printed(TABLES).strip()
    assert tables in PAGE and tables.count("**Llama-") == 6
    # Nothing else on the page looks like a row of these tables.
    assert re.findall(r"^\| (?:1024|4096) .*", PAGE, re.MULTILINE) == re.findall(
        r"^\| (?:1024|4096) .*", tables, re.MULTILINE
    )


def test_the_tokens_of_equal_times_are_those_that_the_run_prints(printed):
    counts = re.findall(r"(\d+) bits, (.*): +(\d+) tokens", printed(EVEN))
    machines = list(dict.fromkeys(machine for _, machine, _ in counts))
    rows = [f"| weights | {' | '.join(machines)} |", "|---|---|---|"]
    for bits in ("4", "8", "16"):
        tokens = [f"{int(count):,} tokens" for b, _, count in counts if b == bits]
        rows.append(f"| {bits} bits | {' | '.join(tokens)} |")
    assert "\n".join(rows) in PAGE


def test_the_output_beside_the_command_is_its_own(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, shown = re.search(
        r"^```\npython scripts/(memory\.py .*?)```\n\n```\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL
    ).groups()
    script, *arguments = shlex.split(command.replace("\\\n", " "))
    code, out, _ = call(script.removesuffix(".py"), *arguments)
    assert code == 0 and shown in out and shown.count("\n") > 15
