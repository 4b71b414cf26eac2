"""What ranks see of a sharded model, as a program: sharded.py REPORT JOBS, both JSON.

JOBS: name -> [question, ranks, arguments]. Forks the ranks and asks each of them the function below that is
called like the question. REPORT: name -> the ranks' answers, in order.
"""

import hashlib
import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed.fsdp  # noqa: F401  once, and not in every process
from torch import Tensor

from minilora import LoraConfig, QuantConfig, add_lora, load_model
from minilora.loss import causal_lm_loss
from minilora.model import CausalLM
from minilora.parallel import loading
from minilora.parallel.loading import load_sharded, local_bytes, whole_weights
from minilora.recompute import set_recompute
from minilora.system.distributed import Processes, join_processes
from support.allocations import Allocations


def load(directory: str, quant: dict | None, processes: Processes, **options) -> CausalLM:
    """Load a model, in parts where there are several processes."""
    quant, cpu = quant and QuantConfig(**quant), torch.device("cpu")
    if processes.count == 1:
        return load_model(directory, quant, torch.float32)
    return load_sharded(Path(directory), quant, torch.float32, cpu, processes, **options)


def digests(processes: Processes, directory: str, quant: dict | None, **options) -> dict[str, str]:
    """SHA-256 of every tensor of every weight while it is whole, by layer."""
    model = load(directory, quant, processes, **options)
    layers = model.named_modules() if processes.count == 1 else ()
    weights = whole_weights(model) if processes.count > 1 else (
        (name, layer.weight) for name, layer in layers if hasattr(layer, "weight") and "norm" not in name
    )  # fmt: skip
    found = {}
    for name, weight in weights:
        tensors = {"values": weight} if isinstance(weight, Tensor) else vars(weight)
        for key, value in tensors.items():
            if isinstance(value, Tensor):
                key, value = f"{name}.{key}", value.detach().clone().view(-1).view(torch.uint8)
                found[key] = hashlib.sha256(value.numpy().tobytes()).hexdigest()
            else:
                found[f"{name}.{key}"] = str(value)
    return found


def bytes_read(processes: Processes, directory: str, quant: dict | None) -> dict[str, int]:
    """Bytes of matrices that a rank reads, the most of one layer at a time, and bytes that it keeps."""
    read, original = [], loading.read_rows

    def read_rows(*arguments):
        rows = original(*arguments)
        read.append(rows.nbytes)
        return rows

    loading.read_rows = read_rows
    model = load(directory, quant, processes)
    return dict(all=sum(read), at_a_time=max(read), kept=local_bytes(model))


def peak(processes: Processes, directory: str) -> dict[str, int]:
    """How many bytes PyTorch allocates at most while a float32 model is loaded and trained: its own tensors."""
    with Allocations() as allocations:
        model = load(directory, None, processes)
        add_lora(model, LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
        set_recompute(model.train(), "full")
        ids = torch.randint(0, 96, (1, 16), generator=torch.Generator().manual_seed(7))
        causal_lm_loss(model, ids, ids).backward()
    found = dict(peak=max(allocations.peaks.values()))
    if processes.count > 1:
        units = [sum(p.numel() * p.itemsize for p in unit.parameters()) for unit in model.gathering.units]
        found |= dict(gathers=model.gathering.gathers, unit=max(units), kept=local_bytes(model))
    return found


def held(processes: Processes, directory: str, policy: str) -> dict[str, list[int]]:
    """Which units hold memory, each time that one was opened in a pass forward and backward."""
    model = load(directory, dict(bits=4), processes)
    add_lora(model, LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    set_recompute(model.train(), policy)
    opened, most, original = [], 0, model.gathering.open

    def open_unit(i: int) -> None:
        nonlocal most
        original(i)
        whole = [part.whole for unit in model.gathering.units for part in unit.parts[:1]]
        storages = [(w if isinstance(w, Tensor) else w.packed).untyped_storage().nbytes() for w in whole]
        most = max(most, sum(size > 0 for size in storages))
        opened.append(i)

    model.gathering.open = open_unit
    ids = torch.randint(0, 96, (1, 16), generator=torch.Generator().manual_seed(7))
    causal_lm_loss(model, ids, ids).backward()
    model.gathering.close()
    return dict(opened=opened, most=most)


def ask(report: Path, question: str, count: int, arguments: dict) -> list:
    """Return the answers of `count` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(count):
        pids.append(os.fork())
        if pids[-1] == 0:
            place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count)
            place |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os.environ.update({name: str(value) for name, value in place.items()})
            processes = join_processes()
            answer = globals()[question](processes, **arguments)
            report.with_suffix(f".{rank}").write_text(json.dumps(answer))
            processes.leave()
            os._exit(0)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert not any(codes), codes
    return [json.loads(report.with_suffix(f".{rank}").read_text()) for rank in range(count)]


def main(report: Path, jobs: dict[str, tuple[str, int, dict]]) -> None:
    report.write_text(json.dumps({name: ask(report, *job) for name, job in jobs.items()}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
