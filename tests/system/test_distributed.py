"""Several processes with gloo take the same steps as one process with more gradient accumulation."""

import json
import socket
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.families import relative_error
from support.pretended_gpu import PretendedGpu
from support.project import PROGRAM_ENVIRONMENT, ROOT, SUPPORT, adapter, metrics

from minilora import UserError
from minilora.system import distributed
from minilora.system.distributed import Processes, join_processes

ENVIRONMENT = PROGRAM_ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}


def test_two_processes_equal_one_with_twice_the_accumulation(train, dataset, tmp_path):
    """13 examples in steps of 12: every second step has a single micro-batch, and the second rank has none."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(dataset.read_text().splitlines(keepends=True)[:13]))
    keys = dict(
        dataset=few,
        eval_dataset=dataset,
        max_steps=6,
        eval_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        lora_dropout=0.1,
        bf16="false",
    )
    keys |= dict(per_device_train_batch_size=3, per_device_eval_batch_size=4, exact_match_samples=3)
    one, expected = train("one", gradient_accumulation_steps=4, **keys)
    settings = (one / "training_config.yaml").read_text().replace(str(one), str(tmp_path / "two"))
    (tmp_path / "run.yaml").write_text(
        settings.replace("gradient_accumulation_steps: 4", "gradient_accumulation_steps: 2")
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "scripts" / "train.py"), "--config", str(tmp_path / "run.yaml")]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    two = tmp_path / "two"
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    # Only one process prints, and it prints the same lines.
    assert step_lines(run.stdout) == step_lines(expected)
    assert "; 2 processes" in run.stdout and run.stdout.count("adapter, metrics, plot and model card") == 1
    # The same float32 numbers are added in another order.
    for name in ("loss", "eval_loss"):
        figures = [
            [record[name] for record in metrics(directory) if name in record] for directory in (one, two)
        ]
        assert len(figures[0]) >= 3 and figures[1] == pytest.approx(figures[0], rel=1e-6)
    for key, tensor in adapter(one).items():
        assert relative_error(adapter(two)[key], tensor) <= 1e-4, key


def step_lines(out: str) -> list[str]:
    """The trainer's lines about steps, without the speed at their end."""
    lines = [line for line in out.splitlines() if line.startswith("step ")]
    return [line.partition(" tok/s")[0].rpartition("  ")[0] for line in lines]


def test_two_processes_stop_together_resume_bit_identically_and_print_once(
    model_dir, dataset, train, tmp_path
):
    keys = dict(
        model=model_dir,
        dataset=dataset,
        max_steps=6,
        quantization_bit="none",
        lora_dropout=0.1,
        learning_rate=1e-2,
    )
    keys |= dict(per_device_train_batch_size=3, gradient_accumulation_steps=2, logging_steps=1)
    words = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    command = [
        sys.executable,
        str(SUPPORT / "two_ranks.py"),
        str(tmp_path / "report.json"),
        str(tmp_path),
        *words,
    ]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    # Only the second rank got the signal; both stopped after step 3, and the first one saved.
    assert (
        report["stopped"]["ended"] == [130, 130]
        and "interrupted after step 3 of 6" in report["stopped"]["said"][0]
    )
    assert report["whole"]["ended"] == report["resumed"]["ended"] == [0, 0]
    whole, resumed = adapter(tmp_path / "whole"), adapter(tmp_path / "stopped")
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("whole", "stopped")]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    # Both ranks find the mistake, and one reports it.
    assert report["mistaken"]["ended"] == [2, -15] and report["mistaken"]["said"][1] == ""
    assert (
        report["mistaken"]["said"][0].count("\n") == 1
        and "nearest: 'learning_rate'" in report["mistaken"]["said"][0]
    )
    assert all(said[1] == "" for said in (job["said"] for job in report.values()))
    # One process cannot resume the run of two with half of its micro-batches.
    _, err = train("stopped", code=2, resume_from_checkpoint="latest", **keys)
    assert "4 micro-batches in a step, of 2 processes, and this run 2 x 1" in err
    assert "set gradient_accumulation_steps to 4" in err


def test_one_process_sets_up_no_communication(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join_processes()
    assert alone == Processes() and alone.main and not torch.distributed.is_initialized()
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    assert alone.sum_gradients([parameter], torch.tensor(3.0), 4, True) == [3.0, 4.0, 1.0]
    assert alone.share([1, 2]) == [1, 2] and alone.mean(0.1, 3.0) == 0.1 and alone.gather({}) == [{}]
    alone.wait_for_all(), alone.leave()


def test_processes_on_gpus_wait_once_for_the_sum_of_a_step(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda message: message.mul_(2))  # another like it
    with PretendedGpu() as gpu:
        device = torch.device("cuda", 0)
        parameters = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
        parameters[0].grad = torch.full((3,), 0.5, device=device)  # the other has none
        loss = torch.full((), 1.25, device=device)
        sums = Processes(0, 2, device).sum_gradients(parameters, loss, 7, True)
        assert sum(gpu.waits.values()) == 1 and not gpu.faults
    assert sums == [2.5, 14.0, 2.0]
    assert [p.grad.tolist() for p in parameters] == [[1.0] * 3, [0.0] * 3]


WAITING = """
import sys, time
from pathlib import Path
import torch.distributed as dist
from minilora.system.distributed import join_processes

processes = join_processes()
dist.all_reduce = lambda *arguments: None  # as with NCCL, where it returns before the others have come
late = Path(sys.argv[1])
if processes.rank == 1:
    time.sleep(1)
    late.touch()
processes.wait_for_all()
assert late.exists()
processes.leave()
"""


def test_no_process_goes_on_before_all_have_come(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "waiting.py"), str(tmp_path / "late")]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_on_gpus_the_processes_talk_through_nccl_each_on_its_own(placed, monkeypatch):
    calls = {}
    placed(LOCAL_RANK="1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(current=device))
    monkeypatch.setattr(distributed, "_meet", lambda rank, count: torch.distributed.HashStore())
    init = lambda backend, **options: calls.update(options, backend=backend)  # noqa: E731
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    monkeypatch.setattr(torch.distributed, "barrier", lambda device_ids: calls.update(barrier=device_ids))
    processes = join_processes()
    processes.wait_for_all()
    assert processes.device == calls["current"] == calls["device_id"] == torch.device("cuda", 1)
    assert calls["backend"] == "nccl" and calls["barrier"] == [1]
    assert calls["timeout"].total_seconds() >= 3600  # another process may upload a checkpoint


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in dict(WORLD_SIZE=4, RANK=3, LOCAL_RANK=3, LOCAL_WORLD_SIZE=4).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="torchrun started 4 processes on 2 GPUs; use --nproc-per-node 2"):
        join_processes()


PLACE = dict(WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


@pytest.fixture
def placed(monkeypatch):
    """A function that sets the variables of torchrun, with changes; None unsets one."""

    def place(**changes):
        for name, value in (PLACE | changes).items():
            monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return place


@pytest.mark.parametrize(
    "name, value",
    [
        *(
            ("WORLD_SIZE", value)
            for value in ("two", "-1", "0", "1.5", "1e9", "2\n", "٢", "1000000", "9" * 5000)
        ),
        *(("RANK", value) for value in ("2", "-1", "one", "9" * 5000)),
        *(("LOCAL_RANK", value) for value in ("2", "-1", "one")),
        *(("MASTER_PORT", value) for value in ("0", "65536", "99999", "http", "-1")),
        *(
            ("MASTER_ADDR", value)
            for value in ("no.such.computer.invalid", "two words", "a" * 300, ".", "127.0.0.1:1")
        ),
    ],
)
def test_a_variable_that_torchrun_would_not_set_is_one_line_with_its_value(placed, name, value):
    placed(**{name: value})
    with pytest.raises(UserError) as raised:
        join_processes()
    said = str(raised.value)
    shown = repr(value if len(value) <= 80 else value[:80] + "...")
    assert f"{name} is {shown}, which" in said or f"{name} = {shown} is the name of no computer" in said
    assert "start the processes with torchrun, or unset WORLD_SIZE" in said and "\n" not in said
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_missing_beside_world_size_is_one_line(placed, name, value):
    placed(**{name: value})
    with pytest.raises(UserError, match=f"WORLD_SIZE is 2, but {name} is not set; start .* with torchrun"):
        join_processes()


@pytest.mark.parametrize("count", ["1", "", None])
def test_one_process_needs_no_other_variable(placed, count):
    placed(WORLD_SIZE=count, RANK=None, LOCAL_RANK=None, MASTER_ADDR=None, MASTER_PORT=None)
    assert join_processes() == Processes()


def test_a_port_that_is_taken_is_one_line(placed):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        placed(RANK="0", MASTER_PORT=str(other.getsockname()[1]))
        with pytest.raises(UserError, match="rank 0 waits at 127.0.0.1, port .*address already in use"):
            join_processes()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_nobody_joins_ends_in_time_with_one_line(rank):
    """Rank 1 finds a program on the port that never answers. In processes of their own: PyTorch goes on waiting."""
    program = "from minilora.system import distributed, errors; distributed.START_SECONDS = 2; "
    program += "errors.run_script(distributed.join_processes)"
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        port = mute.getsockname()[1]
        if rank == "1":
            mute.listen()
        else:
            mute.close()
        environment = (
            ENVIRONMENT | PLACE | {"RANK": rank, "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        )
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith(f"error: rank {rank} waits at 127.0.0.1, port {port}: the 2 processes have")
    assert "not all come within 2 seconds" in run.stderr and run.stderr.count("\n") == 1


@given(count=st.integers(1, 9), items=st.lists(st.integers(), max_size=40))
def test_every_micro_batch_goes_to_exactly_one_rank_and_shares_differ_by_at_most_one(count, items):
    shares = [Processes(rank, count).share(items) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
