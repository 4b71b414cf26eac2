"""scripts/train_together.py: each run takes the steps that it takes alone, and leaves the same files."""

import json
import signal
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minilora.system.assets import DEFAULT_RUN, EMBEDDED_MODEL

# Runs that differ in all that may differ. Two drop elements, before different layers.
RUNS = {
    "plain": dict(),
    "dropped": dict(lora_dropout=0.1),
    "rate": dict(learning_rate=1e-3, lr_scheduler_type="linear", warmup_steps=2),
    "rank": dict(lora_rank=3, lora_alpha=5, loraplus_lr_ratio=4),
    "dora": dict(use_dora=True, weight_decay=0.1),
    "rslora": dict(lora_rank=8, use_rslora=True, init_lora_weights="olora", learning_rate=1e-3),
    "target": dict(lora_target="gate_proj,down_proj:2", max_grad_norm=0.1, lora_dropout=0.2),
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
        {
            key: v
            for key, v in json.loads(line).items()
            if key not in ("seconds", "tokens_per_second", "memory")
        }
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
    runs = {
        name: own
        for name, own in RUNS.items()
        if bits is None or name in ("plain", "dropped", "rank", "dora")
    }
    train_each(call, write_settings(place / "alone", runs, quantization_bit=bits))
    out = train_all(call, write_settings(place / "together", runs, quantization_bit=bits))
    for name in runs:
        assert_equal_runs(place / "alone" / name, place / "together" / name)
    assert out.count("adapter, metrics, plot and model card are in") == len(runs)


# ---- the end of some runs before the others ----------------------------------------------------------------

FEW = {name: RUNS[name] for name in ("plain", "rank", "dora")}


def test_a_run_that_diverges_is_named_and_the_others_take_the_steps_that_they_take_alone(call, place):
    runs = FEW | {"lost": dict(learning_rate=1e30, warmup_steps=1)}
    train_each(call, write_settings(place / "alone", FEW))
    out = train_all(call, write_settings(place / "together", runs), code=2)
    assert (
        "error: 1 of 4 runs failed: lost: loss nan" in out and "training diverged; lower learning_rate" in out
    )
    assert "not finite first" in out and not (place / "together" / "lost" / "README.md").exists()
    for name in FEW:
        assert_equal_runs(place / "alone" / name, place / "together" / name)


def test_a_run_that_stops_early_leaves_and_the_others_go_on(call, place):
    runs = {
        "good": dict(learning_rate=1e-3),
        "overshoots": dict(learning_rate=3.0),
        "slow": dict(learning_rate=1e-4),
    }
    keys = dict(early_stopping_patience=1, eval_steps=1, save_steps=2)
    train_each(call, write_settings(place / "alone", runs, **keys))
    train_all(call, write_settings(place / "together", runs, **keys))
    assert records(place / "together" / "overshoots")[-1]["step"] < 6
    for name in ("good", "slow"):
        assert records(place / "together" / name)[-1]["step"] == 6
        assert_equal_runs(place / "alone" / name, place / "together" / name)
    # At this rate numbers are large, and rounding grows with every step: the files and the steps must be equal.
    alone, together = place / "alone" / "overshoots", place / "together" / "overshoots"
    assert tree(alone) == tree(together)
    assert [r["step"] for r in records(alone)] == [r["step"] for r in records(together)]


def test_new_tokens_and_padded_rows_are_trained_together_too(call, place):
    runs = {name: RUNS[name] for name in ("plain", "rank")}
    keys = dict(new_special_tokens="<a>,<b>", padding_free=False, max_steps=2)
    train_each(call, write_settings(place / "alone", runs, **keys))
    train_all(call, write_settings(place / "together", runs, **keys))
    for name in runs:
        assert_equal_runs(place / "alone" / name, place / "together" / name)


def test_held_out_prompts_are_answered_by_each_runs_own_adapter_and_once_by_the_base(
    call, place, monkeypatch
):
    import train

    asked, answers = [], train.answers

    def count(*arguments, **options):
        asked.append(arguments)
        return answers(*arguments, **options)

    runs = {"slow": dict(learning_rate=1e-6), "fast": dict(learning_rate=1e-2)}
    keys = dict(exact_match_samples=3, adam_epsilon=1e-8)
    train_each(call, write_settings(place / "alone", runs, **keys))
    monkeypatch.setattr(train, "answers", count)
    train_all(call, write_settings(place / "together", runs, **keys))
    assert len(asked) == len(runs) + 1
    found = {
        name: [(place / folder / name / "answers.jsonl").read_text() for folder in ("alone", "together")]
        for name in runs
    }
    assert found["slow"][0] != found["fast"][0]
    assert all(alone == together for alone, together in found.values())


def test_in_float16_each_run_scales_its_own_loss_and_its_overflow_is_its_own(
    call, place, monkeypatch, in_float16
):
    import train

    in_float16(scale=2.0**8)
    runs, start = {name: RUNS[name] for name in ("plain", "rank", "dora")}, train.start

    def start_loud(plan, *arguments):
        run = start(plan, *arguments)
        if plan.output_dir.name == "rank":
            state = run.loss_scale.state_dict()
            state["scaler"]["scale"] = 2.0**40
            run.loss_scale.load_state_dict(state)
        return run

    train_all(call, write_settings(place / "quiet", runs, bf16=None))
    monkeypatch.setattr(train, "start", start_loud)
    train_all(call, write_settings(place / "loud", runs, bf16=None))
    for name in ("plain", "dora"):
        quiet, loud = (
            load_file(place / folder / name / "adapter_model.safetensors") for folder in ("quiet", "loud")
        )
        assert all(torch.equal(tensor, loud[key]) for key, tensor in quiet.items())
        assert all(record["skipped_steps"] == 0 for record in steps(place / "loud" / name))
    assert [record["skipped_steps"] for record in steps(place / "loud" / "rank")] == [*range(1, 7)]


def steps(run: Path) -> list[dict]:
    return [record for record in records(run) if "skipped_steps" in record]


# ---- interrupted, resumed ----------------------------------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch):
    """Send SIGTERM while the first micro-batch of a step (from 0) is at work."""
    import train_together

    original = train_together.accumulate_gradients

    def at(step: int | None) -> None:
        def accumulate(group):
            if group.step == step:
                signal.raise_signal(signal.SIGTERM)
            return original(group)

        monkeypatch.setattr(train_together, "accumulate_gradients", accumulate)

    return at


def test_interrupted_runs_go_on_together_to_the_same_bits(call, place, interrupt):
    runs = FEW | {"dropped": RUNS["dropped"]}
    files = write_settings(place / "whole", runs)
    train_all(call, files)
    files = write_settings(place / "halves", runs)
    interrupt(1)
    out = train_all(call, files, code=130)
    assert "interrupted after step 2 of 6; to resume: --resume" in out
    assert all((place / "halves" / name / "checkpoint-2").is_dir() for name in runs)
    interrupt(None)
    train_all(call, files, "--resume")
    for name in runs:
        one, other = (
            load_file(place / part / name / "adapter_model.safetensors") for part in ("whole", "halves")
        )
        assert all((one[key] == other[key]).all() for key in one), name
        assert records(place / "whole" / name) == records(place / "halves" / name)


def test_the_trainer_alone_resumes_each_of_them_and_the_others_resume_what_it_left(call, place, interrupt):
    train_each(call, write_settings(place / "alone", FEW))
    files = write_settings(place / "together", FEW)
    interrupt(1)
    train_all(call, files, code=130)
    interrupt(None)
    train_each(call, files[:1], "--resume_from_checkpoint", "latest")
    train_all(call, files[1:], "--resume")
    for name in FEW:
        assert_equal_adapters(place / "alone" / name, place / "together" / name)


def test_runs_at_other_steps_go_on_in_parts(call, place):
    alone, files = write_settings(place / "alone", FEW), write_settings(place / "together", FEW)
    train_each(call, alone)
    train_all(call, files)
    for name, kept in (("plain", 3), ("rank", 3), ("dora", 6)):
        run = place / "together" / name
        for path in run.glob("checkpoint-*"):
            if int(path.name.partition("-")[2]) > kept:
                path.rename(place / f"{name}-{path.name}")
        (run / "README.md").unlink()
    out = train_all(call, files, "--resume")
    assert out.count("after step 3 of 6") == 2 and out.count("after step 6 of 6") == 1
    for name in FEW:
        assert_equal_adapters(place / "alone" / name, place / "together" / name)


# ---- memory ------------------------------------------------------------------------------------------------


def test_runs_that_do_not_fit_are_trained_in_halves_each_on_a_model_of_its_own(call, place, monkeypatch):
    import train_together

    from minilora.memory.ledger import MARGIN
    from minilora.run import memory_plan, together

    original, predict, models, room = train_together.load_base_model, together.memory_together, [], []

    def ask(plans):
        if not room:  # as much is free as the larger half needs
            room.append(MARGIN * max(predict(half).peak for half in (plans[:2], plans[2:])))
        return predict(plans)

    def load(*arguments):
        assert all(model() is None for model in models)  # the first half's is gone
        model = original(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(memory_plan, "process_memory", lambda: 0)
    monkeypatch.setattr(together, "memory_together", ask)
    monkeypatch.setattr(together, "available_memory", lambda _: room[0])
    monkeypatch.setattr(train_together, "load_base_model", load)
    runs = {name: RUNS[name] for name in ("plain", "dropped", "rank", "dora")}
    train_each(call, write_settings(place / "alone", runs, max_steps=2))
    out = train_all(call, write_settings(place / "together", runs, max_steps=2))
    assert "memory     4 runs together need" in out and len(models) == 2
    for name in runs:
        assert_equal_runs(place / "alone" / name, place / "together" / name)


# ---- mistakes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "runs, said",
    [
        ({"a": {}, "b": dict(seed=4)}, "cannot be trained together: seed is 3 in one and 4 in another"),
        ({"a": dict(cutoff_len=8), "b": {}}, "cannot be trained together: cutoff_len is 8 in one"),
        ({"a": {}, "b": dict(lora_rnk=4)}, "unknown key 'lora_rnk' in"),
        ({"a": {}, "b": dict(lora_target="v_porj")}, "1 of 2 runs failed: b: lora_target names 'v_porj'"),
        ({one: dict(warmup_steps=9) for one in "ab"}, "2 of 2 runs failed: a, b: warmup_steps = 9 is not"),
        ({"a": {}, "b": dict(warmup_steps=9)}, "1 of 2 runs failed: b: warmup_steps = 9 is not shorter"),
    ],
)
def test_a_mistake_is_one_line(call, place, runs, said):
    code, _, err = call("train_together", *write_settings(place / "runs", runs, max_steps=1))
    assert code == 2 and err.count("\n") == 1 and said in err


def test_two_runs_in_one_directory_are_refused(call, place):
    (file,) = write_settings(place / "runs", {"a": {}})
    code, _, err = call("train_together", file, file)
    assert code == 2 and "is that of two runs; give each its own" in err


def test_several_processes_are_refused(call, place, monkeypatch):
    import train_together

    from minilora.system.distributed import Processes

    monkeypatch.setattr(train_together, "join_processes", lambda: Processes(0, 2))
    code, _, err = call("train_together", *write_settings(place / "runs", FEW))
    assert code == 2 and "trains in one process; start it without torchrun" in err
