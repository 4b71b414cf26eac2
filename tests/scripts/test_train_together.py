"""scripts/train_together.py: each run takes the steps that it takes alone, and leaves the same files."""

import json
import signal
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from minilora.system.assets import DEFAULT_RUN, EMBEDDED_MODEL

# Runs that differ in all that may differ. The second alone drops anything: then its masks are those of a run
# alone, whatever layers the others adapt.
RUNS = {
    "plain": dict(),
    "dropped": dict(lora_dropout=0.1),
    "rate": dict(learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=2),
    "rank": dict(lora_rank=3, lora_alpha=5, loraplus_lr_ratio=4),
    "dora": dict(use_dora=True, weight_decay=0.1),
    "rslora": dict(lora_rank=8, use_rslora=True, init_lora_weights="olora", learning_rate=1e-3),
    "target": dict(lora_target="gate_proj,down_proj:2", max_grad_norm=0.1),
    "whole": dict(lora_target="q_proj", additional_target="norm"),
}
# The two sum in other orders, so gradients differ by some 1e-7 of the largest. AdamW divides a gradient by its
# own size, and makes of such a difference a whole step where the gradient is as small. An epsilon of a
# hundredth of a clipped gradient's norm keeps steps proportional to gradients.
SETTINGS = dict(
    model=str(EMBEDDED_MODEL), dataset="train.jsonl", val_size=6, max_steps=6, eval_steps=3, save_steps=3,
    per_device_train_batch_size=2, gradient_accumulation_steps=2, lora_dropout=0, adam_epsilon=1e-2,
    learning_rate=1e-2, logging_steps=1, seed=3, bf16=False, max_grad_norm=1.0,
)  # fmt: skip
TOLERANCE = 1e-5  # of the largest entry, and of the losses; see above


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a few examples and the settings files of RUNS; the program runs there."""
    rows = Path(DEFAULT_RUN.parent, "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:30]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_settings(folder: Path, runs: dict[str, dict], **changes: object) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, own in runs.items():
        settings = SETTINGS | changes | own | {"output_dir": str(folder / name)}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return [folder / f"{name}.yaml" for name in runs]


def train_each(call, files: list[Path], *words: str) -> None:
    for file in files:
        code, _, err = call("train", "--config", file, *words)
        assert code == 0, err


def train_all(call, files: list[Path], *words: str, code: int = 0) -> str:
    ended, out, err = call("train_together", *files, *words)
    assert ended == code, err
    return out + err


def tree(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


def records(run: Path) -> list[dict]:
    """The metrics without what depends on the machine."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {key: v for key, v in json.loads(line).items() if key not in ("seconds", "tokens_per_second", "memory")}
        for line in lines
    ]


def assert_equal_adapters(one: Path, other: Path) -> None:
    first, second = (load_file(run / "adapter_model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        distance = (tensor - second[name]).abs().max() / tensor.abs().max().clamp_min(1e-30)
        assert distance <= TOLERANCE, (name, float(distance))


def assert_equal_runs(one: Path, other: Path) -> None:
    assert_equal_adapters(one, other)
    assert tree(one) == tree(other)
    for first, second in zip(records(one), records(other), strict=True):
        norms = [record.pop("grad_norm", 0) for record in (first, second)]
        assert first == pytest.approx(second, rel=TOLERANCE)
        # A norm follows the adapters' differences, magnified by the curvature of the loss.
        assert norms[0] == pytest.approx(norms[1], rel=10 * TOLERANCE)


@pytest.mark.parametrize("bits", [None, 4])
def test_runs_that_are_trained_together_leave_what_each_leaves_alone(call, place, bits):
    runs = {name: own for name, own in RUNS.items() if bits is None or name in ("plain", "dropped", "rank", "dora")}
    train_each(call, write_settings(place / "alone", runs, quantization_bit=bits))
    out = train_all(call, write_settings(place / "together", runs, quantization_bit=bits))
    for name in runs:
        assert_equal_runs(place / "alone" / name, place / "together" / name)
    assert out.count("adapter, metrics, plot and model card are in") == len(runs)
