"""check_gpu.py runs every section on a pretended GPU, and neither an error nor a kill loses what it has seen."""

import json
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import check_gpu
import pytest
import torch
from gpu_sections import attention, gradients, kernel_rates, models, peer, steps
from gpu_sections.card import Card, Stopwatch, as_t4, read_card
from gpu_sections.report import Report, failures, figure, markdown
from gpu_sections.section import Check
from support.pretended_gpu import PretendedGpu
from support.project import PROGRAM_ENVIRONMENT, ROOT, SUPPORT
from torch.nn.attention import SDPBackend, sdpa_kernel

from minilora.data.examples import batch_for

CPU = Card("a CPU", (8, 0), 1 << 30, torch.bfloat16, device=torch.device("cpu"))


def run_program(program: Path, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(program), *map(str, arguments)]
    return subprocess.run(command, env=PROGRAM_ENVIRONMENT, capture_output=True, text=True, timeout=1200)


def events_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def rows_of(events: list[dict], section: str) -> list[dict]:
    return [event["row"] for event in events if event["section"] == section and "row" in event]


def runs(pid: str) -> bool:
    """Whether a process is there and has not ended."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


# ---- the plan and the command line ------------------------------------------------------------------------------


def test_the_planned_seconds_of_all_sections_are_under_eight_minutes():
    assert sum(section.seconds for section in check_gpu.SECTIONS) < 8 * 60 == check_gpu.BUDGET


def test_the_documents_name_every_section_with_its_planned_seconds():
    text = (ROOT / "docs" / "benchmarks" / "README.md").read_text(encoding="utf-8")
    planned = re.findall(r"^\| (\w+) \| (\d+) \| ", text, re.MULTILINE)
    assert planned == [(section.name, str(section.seconds)) for section in check_gpu.SECTIONS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so_and_nothing_is_written(tmp_path):
    done = run_program(ROOT / "scripts" / "check_gpu.py", "--out", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: no NVIDIA GPU")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--only", "gradient"], "'gradient'.*nearest: 'gradients'"),
        (["--budget", "0"], "--budget.*not 0"),
        (["--budget", "nan"], "--budget.*not nan"),
        (["--emulate", "p100"], "--emulate.*'p100'"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(call, arguments, named):
    code, out, err = call("check_gpu", *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert re.search(named, err), err


TOUCHED = """
import torch

def touched(*_):
    raise AssertionError("the card was touched")

torch._C._cuda_getDeviceCount = torch._C._cuda_init = torch._C._cuda_getCurrentRawStream = touched
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = touched
import check_gpu
check_gpu.import_once()
print("imported")
"""


def test_what_is_imported_before_the_forks_does_not_touch_the_card():
    """A process that has, has children that cannot."""
    done = subprocess.run(
        [sys.executable, "-c", TOUCHED], env=PROGRAM_ENVIRONMENT, capture_output=True, text=True
    )
    assert done.stdout == "imported\n", done.stderr


def test_only_a_whole_run_replaces_the_table_of_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu, "BENCHMARKS", tmp_path)
    card = Card("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, torch.bfloat16)
    for changes, wanted in (
        ({}, tmp_path / "nvidia-h100-80gb-hbm3.md"),
        ({"only": "steps"}, tmp_path / "out/nvidia-h100-80gb-hbm3.md"),
        ({"tiny": True}, tmp_path / "out/nvidia-h100-80gb-hbm3-a-dry-run.md"),
        ({"emulate": "t4"}, tmp_path / "nvidia-h100-80gb-hbm3-as-a-t4.md"),
        ({"only": "steps", "table": tmp_path / "mine.md"}, tmp_path / "mine.md"),
    ):
        options = dict(only=None, tiny=False, emulate=None, table=None, out=tmp_path / "out") | changes
        assert check_gpu.table_of(Namespace(**options), card) == wanted


# ---- the dry run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Everything on a pretended Hopper without bitsandbytes: (the process, its events, its table)."""
    folder = tmp_path_factory.mktemp("dry")
    done = run_program(SUPPORT / "dry_run_of_check_gpu.py", "--tiny", "--budget", 3600, "--out", folder)
    (table,) = folder.glob("*.md")
    return done, events_in(folder), table.read_text()


def test_every_section_runs_on_a_pretended_gpu_and_its_claims_hold(dry_run):
    done, events, _ = dry_run
    names = [section.name for section in check_gpu.SECTIONS]
    assert [event["section"] for event in events if "ended" in event] == names
    assert not [event for event in events if "failed" in event or not event.get("holds", True)], events
    assert done.returncode == 0 and "every claim holds" in done.stdout, done.stdout + done.stderr
    assert {event["section"] for event in events if "row" in event} == {*names} - {"peer"}


def test_a_missing_bitsandbytes_is_said_and_fails_nothing(dry_run):
    _, events, table = dry_run
    (skipped,) = [event for event in events if "skipped" in event]
    assert skipped["section"] == "peer" and not skipped["wanted"] and "bitsandbytes" in skipped["skipped"]
    notes = [event["note"] for event in events if event["section"] == "kernels" and "note" in event]
    assert any("bitsandbytes was not timed" in note for note in notes)


def test_the_dry_run_compares_every_policy_and_times_every_batch_under_each(dry_run):
    _, events, _ = dry_run
    for section in ("gradients", "t4"):
        compared = [(row["rows"], row["policy"]) for row in rows_of(events, section) if "rows" in row]
        policies = ("off, again", "selective", "full", "offload")
        assert compared == [(rows, policy) for rows in ("causal", "packed") for policy in policies]
    timed = {(row["batch"], row["policy"]) for row in rows_of(events, "steps")}
    batches = ("4 x 16", "1 x 64, packed", "1 x 16")
    assert timed == {
        (batch, policy) for batch in batches for policy in ("off", "full", "selective", "offload")
    }
    assert [row["batch"] for row in rows_of(events, "decode")] == [1, "1, with an adapter", 8]


def test_the_table_shows_every_row_and_tells_what_is_predicted(dry_run):
    _, events, table = dry_run
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in table.splitlines()
        if line.startswith("|")
    ]
    for event in events:
        for column, value in event.get("row", {}).items():
            assert any(column in line for line in cells), column
            assert any(figure(value) in line for line in cells), value
    assert "predicted GiB" in table and "limit, tokens/s" in table
    assert "*predicted* or *limit*: those are computed" in table


# ---- the fence --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fenced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fenced")
    names = "raises,crashes,hangs,untrue,does not apply,fine"
    done = run_program(SUPPORT / "fenced_sections.py", names, "--out", folder, "--table", folder / "table.md")
    return done, events_in(folder), (folder / "table.md").read_text()


def test_a_section_that_raises_crashes_or_hangs_takes_nothing_from_the_next(fenced):
    done, events, table = fenced
    failed = {event["section"]: event["failed"] for event in events if "failed" in event}
    assert failed["raises"] == "RuntimeError: the first line"
    assert "code -11" in failed["crashes"] and "still ran after" in failed["hangs"]
    assert [event["section"] for event in events if "ended" in event][-1] == "fine"
    assert {"work": "done", "seconds": 1.5} in rows_of(events, "fine")
    assert "| done | 1.5 |" in table and "FAILED: RuntimeError: the first line" in table


def test_an_error_is_one_line_in_the_table_and_a_traceback_in_the_json(fenced):
    done, events, table = fenced
    (error,) = [event for event in events if event["section"] == "raises" and "failed" in event]
    assert error["traceback"].startswith("Traceback") and "in raises" in error["traceback"]
    assert "Traceback" not in table + done.stdout + done.stderr


def test_failed_sections_and_claims_are_named_at_the_end_with_exit_code_1(fenced):
    done, _, table = fenced
    assert done.returncode == 1, done.stderr
    end = done.stdout.splitlines()[-6:]
    assert [line.split(":")[0] for line in end[1:-1]] == ["raises", "crashes", "hangs", "untrue"]
    assert "untrue: not so: one is two" in end
    assert "**Failed:**\n\n- raises: RuntimeError: the first line\n- crashes" in table


def test_a_section_that_hangs_is_killed_at_its_deadline_with_the_programs_it_has_started(fenced):
    _, events, _ = fenced
    (note,) = [event["note"] for event in events if "note" in event]
    assert not any(map(runs, note.split()[1:]))
    (ended,) = [event["ended"] for event in events if event["section"] == "hangs" and "ended" in event]
    assert 3 <= ended < 30  # planned for 1 second, and 2 more; it would hang for 60


def test_ctrl_c_is_one_line_and_ends_the_section_too(tmp_path):
    command = [sys.executable, str(SUPPORT / "fenced_sections.py"), "hangs", "--out", str(tmp_path)]
    command += ["--table", str(tmp_path / "table.md")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=PROGRAM_ENVIRONMENT)
    with subprocess.Popen(command, **pipes) as process:
        section, program = next(
            line.split()[1:] for line in process.stdout if line.startswith("  processes ")
        )
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n") and not runs(section) and not runs(program)


def test_a_run_that_is_killed_leaves_its_table_so_far(tmp_path):
    arguments = "fine,kills the run,fine", "--out", tmp_path, "--table", tmp_path / "table.md"
    done = run_program(SUPPORT / "fenced_sections.py", *arguments)
    table = (tmp_path / "table.md").read_text()
    assert done.returncode == -signal.SIGKILL
    assert "| done | 1.5 |" in table and "| before the kill |" in table
    assert "how it kills the run (it did not end)" in table


def test_a_section_with_too_little_time_left_is_skipped_and_the_run_says_so(tmp_path):
    arguments = (
        "raises,fine,does not apply",
        "--budget",
        50,
        "--out",
        tmp_path,
        "--table",
        tmp_path / "table.md",
    )
    done = run_program(SUPPORT / "fenced_sections.py", *arguments)
    (skipped,) = [event for event in events_in(tmp_path) if event["section"] == "fine" and "skipped" in event]
    assert skipped["wanted"] and "100 s are planned" in skipped["skipped"]
    assert done.returncode == 1 and "fine: skipped" in done.stdout
    assert "does not apply: skipped" not in done.stdout.splitlines()


# ---- the table --------------------------------------------------------------------------------------------------

EVENTS = [
    {
        "section": "check_gpu",
        "head": {"card": "NVIDIA Tesla T4", "date": "2026-11-27", "versions": "torch 2.11.0"},
    },
    {"section": "steps", "began": "a training step"},
    {"section": "steps", "note": "a large product of this card: 24 TFLOP/s"},
    {
        "section": "steps",
        "row": {"batch": "4 x 1024", "policy": "full", "tokens/s": 531.4, "predicted GiB": 6.4},
    },
    {"section": "steps", "row": {"batch": "4 x 1024", "policy": "off", "tokens/s": "out of memory"}},
    {"section": "steps", "claim": "it is fast", "holds": True},
    {"section": "steps", "ended": 61.2},
    {"section": "trainer", "began": "the default run"},
    {"section": "trainer", "failed": "OSError: no | space", "traceback": "Traceback ..."},
]
TABLE = """# NVIDIA Tesla T4

- date: 2026-11-27
- versions: torch 2.11.0

Every figure was measured on this card, except in columns whose names begin with *predicted* or *limit*: those are computed. `docs/benchmarks/README.md` explains the sections.

**Failed:**

- trainer: OSError: no | space

## steps: a training step (61 s)

| batch | policy | tokens/s | predicted GiB |
| --- | --- | --- | --- |
| 4 x 1024 | full | 531 | 6.4 |
| 4 x 1024 | off | out of memory |  |

- a large product of this card: 24 TFLOP/s
- ok: it is fast

## trainer: the default run (it did not end)

- FAILED: OSError: no | space
"""


def test_the_table_of_given_results_is_readable_markdown():
    assert markdown(EVENTS) == TABLE


def test_figures_have_three_digits_and_cells_keep_their_bars_from_the_table():
    values = [True, 1234567, 17023.4, 99.96, 0.1234, 0.0, 0.00001234, "a | b"]
    assert [figure(value) for value in values] == "yes|1,234,567|17,023|100|0.123|0|1.2e-05|a \\| b".split(
        "|", 7
    )


# ---- what the sections claim ------------------------------------------------------------------------------------


@pytest.fixture
def check(tmp_path):
    """A check on this CPU, whose report has begun."""
    report = Report(tmp_path / "results.jsonl", tmp_path / "table.md")
    report.begin(card="a CPU")
    return Check(CPU, report, tmp_path, tiny=True, section="gradients")


@pytest.mark.parametrize("documents", [1, 4])
@pytest.mark.parametrize("wrong", [None, "selective"])
def test_a_policy_with_another_gradient_fails_its_claim(check, monkeypatch, documents, wrong):
    model = models.random_model(models.TINY, CPU)
    models.our_side(model, CPU)
    batch = batch_for(CPU.device, models.random_rows(models.TINY, 2, 32, documents), pad_id=0)
    run = gradients.run

    def changed(model, policy, batch):
        loss, found = run(model, policy, batch)
        return loss, [g * 1.001 if policy == wrong else g for g in found]

    monkeypatch.setattr(gradients, "run", changed)
    gradients.compare_policies(check, model, "rows", batch)
    (claim,) = [event for event in check.report.events() if "claim" in event]
    assert claim["holds"] == (wrong is None) and claim["claim"].endswith("selective") == (wrong is not None)


def test_gradients_that_are_not_finite_differ_from_everything():
    fine, broken = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert gradients.relative_difference(fine, 2 * fine) == 0.5
    assert (
        gradients.relative_difference(broken, fine)
        == gradients.relative_difference(fine, broken)
        == float("inf")
    )


@pytest.mark.parametrize("backend, fused", [(SDPBackend.FLASH_ATTENTION, True), (SDPBackend.MATH, False)])
def test_the_attention_that_is_named_is_the_one_that_runs(backend, fused):
    q, k, v = (torch.randn(1, 2, 8, 16, requires_grad=True) for _ in range(3))
    with sdpa_kernel(backend):
        assert attention.chosen_attention(q, k, v, None) == (
            "flash_attention_for_cpu" if fused else "not fused"
        )


def test_bitsandbytes_gets_the_same_work_as_our_kernels():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    calls = kernel_rates.four_bit_calls(torch.randn(128, 64), bitsandbytes)
    (ours, _, theirs), (dense, _, same), _ = calls.values()  # on a CPU its product wants another layout
    packed, state = theirs()
    assert torch.equal(ours().packed, packed.view(-1)) and torch.equal(ours().absmax, state.absmax)
    assert torch.equal(dense().clone(), same())


@pytest.fixture
def pretended(check):
    """The same check on a pretended GPU of 80 GiB."""
    with PretendedGpu(capability=(9, 0), memory=80 << 30):
        yield replace(check, card=read_card(), section="steps", deadline=time.perf_counter() + 600)


def test_a_step_that_runs_out_of_memory_is_a_result_and_the_next_policy_is_timed(pretended, monkeypatch):
    step = models.Side.step

    def limited(side, rows):
        if "off" in side.loss_of.args[0].model.recompute:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(side, rows)

    monkeypatch.setattr(models.Side, "step", limited)
    steps.measure_steps(pretended, ("off", "full"), steps.WORK[:1])
    off, full = rows_of(pretended.report.events(), "steps")
    assert off["tokens/s"] == "out of memory" and off["predicted GiB"] > 0
    assert full["tokens/s"] > 0 and not failures(pretended.report.events())


@pytest.mark.parametrize("allocated, holds", [(1, True), (1 << 40, False)])
def test_a_step_of_more_memory_than_predicted_fails_the_claim(pretended, monkeypatch, allocated, holds):
    monkeypatch.setattr(steps, "MISTRAL_7B", models.TINY | dict(num_hidden_layers=1))
    monkeypatch.setattr(Stopwatch, "product_rate", lambda *_: 1e12)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated)
    steps.measure_steps(replace(pretended, tiny=False), ("full",), [(1, 16, 1)])
    (claim,) = [event for event in pretended.report.events() if "claim" in event]
    assert claim["holds"] == holds and "1.1 times" in claim["claim"]


def test_no_step_is_begun_when_its_time_has_run_out(pretended):
    steps.measure_steps(replace(pretended, deadline=time.perf_counter() + 1), ("full",), steps.WORK[:1])
    assert not rows_of(pretended.report.events(), "steps")
    assert any(
        event.get("note") == "no time was left for 4 x 16, full" for event in pretended.report.events()
    )


def test_a_card_used_as_a_t4_has_15_gib_float16_and_no_flash_attention(pretended, monkeypatch):
    shares = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share)
    )
    try:
        card = as_t4(pretended.card)
        assert not torch.backends.cuda.flash_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert shares == [15 / 80] and (card.memory, card.dtype) == (15 << 30, torch.float16)


def test_both_sides_have_the_same_weights_and_so_the_same_loss():
    for package in ("transformers", "peft", "accelerate", "bitsandbytes"):
        pytest.importorskip(package)
    rows = models.random_rows(models.TINY, 2, 64)
    ours, theirs = peer.ours(models.TINY, CPU), peer.theirs(models.TINY, CPU)
    assert sum(p.numel() for p in ours.trainable) == sum(p.numel() for p in theirs.trainable)
    for _ in range(2):  # the second after a step
        (one, _), (other, _) = ours.step(rows), theirs.step(rows)
        # bfloat16: 128 tokens, each of whose losses is off by some 2^-9 of 6 at random
        assert abs(one - other) / other < 2e-3
