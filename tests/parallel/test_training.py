"""Processes that share a model train what one process trains, through scripts/train.py."""

import re
import subprocess
import sys

import pytest
from support.families import relative_error
from support.project import PROGRAM_ENVIRONMENT, ROOT, adapter, metrics
from support.tiny import AFTER_20_STEPS

# nf4 with double quantization, dropout, packing and eight micro-batches a step, of the model in assets/base. 25
# held-out examples make passes that some ranks do not have, and so does the end of an epoch.
RUN = dict(
    config=ROOT / "assets" / "default.yaml", max_steps=20, per_device_train_batch_size=1, cutoff_len=48
)
RUN |= dict(
    packing="true", lora_dropout=0.1, learning_rate=1e-3, logging_steps=1, eval_steps=10, max_samples=25
)
RUN |= dict(
    per_device_eval_batch_size=2, exact_match_samples=0, bf16="false", save_steps=5, save_total_limit=9
)
MICRO_BATCHES = 8

PROCESSES = {  # name -> processes, parallel, recompute
    "one": (1, "ddp", "off"),
    "ddp": (2, "ddp", "full"),
    "two, full": (2, "fsdp", "full"),
    "four, selective": (4, "fsdp", "selective"),
    "two, off": (2, "fsdp", "off"),
}
VARIANTS = {  # three steps of two processes, against one
    "8 bits": dict(quantization_bit=8),
    "plain weights, pissa": dict(quantization_bit="none", init_lora_weights="pissa"),
    "loftq": dict(init_lora_weights="loftq"),
    "olora": dict(init_lora_weights="olora"),
    "vera": dict(use_vera="true"),
    "dora, the best adapter, answers": dict(
        use_dora="true",
        load_best_model_at_end="true",
        eval_steps=1,
        learning_rate=1e-1,
        exact_match_samples=2,
    ),
    "whole modules": dict(additional_target="embed_tokens,lm_head"),
    "whole norms": dict(additional_target="norm"),
    "trained rows": dict(add_tokens="</s>"),
    "offload": dict(double_quantization="false"),
}


def job(ranks: int, directory, broken: str | None = None, **keys) -> dict:
    keys = RUN | dict(gradient_accumulation_steps=MICRO_BATCHES // ranks, output_dir=directory) | keys
    return dict(
        ranks=ranks, arguments=[str(w) for key, value in keys.items() for w in (f"--{key}", value)]
    ) | {"break": broken}


def variant(name: str, ranks: int, directory, **more) -> dict:
    return job(ranks, directory, max_steps=3, gradient_checkpointing="full", **VARIANTS[name], **more)


@pytest.fixture(scope="module")
def runs(run_program, tmp_path_factory):
    """The directory of all runs, by name, and the report of how they ended."""
    root = tmp_path_factory.mktemp("runs")
    jobs = {
        name: job(ranks, root / name, parallel=parallel, gradient_checkpointing=policy)
        for name, (ranks, parallel, policy) in PROCESSES.items()
    }
    for name in VARIANTS:
        offload = {"fsdp_offload": "true"} if name == "offload" else {}
        jobs[name] = variant(name, 2, root / name, parallel="fsdp", **offload)
        jobs[f"{name}, alone"] = variant(name, 1, root / f"{name}, alone")
    shared = dict(parallel="fsdp", gradient_checkpointing="full")
    jobs["killed"] = job(
        3, root / "killed", "kill_in_step_7", gradient_accumulation_steps=2, max_steps=9, **shared
    )
    again = dict(resume_from_checkpoint=root / "two, full" / "checkpoint-10")
    jobs["four after two"] = job(4, root / "four after two", **again, **shared)
    jobs["one after two"] = job(1, root / "one after two", **again)
    jobs["other steps"] = job(2, root / "other", gradient_accumulation_steps=8, **again, **shared)
    jobs["five"] = job(5, root / "five", gradient_accumulation_steps=1, **again, **shared)
    jobs["no rerun"] = job(2, root / "no rerun", "no_gather_in_rerun", max_steps=1, **shared)
    diverging = dict(learning_rate=1e30, max_grad_norm=0, save_steps=50)
    jobs["diverged, alone"] = job(1, root / "diverged, alone", **diverging)
    jobs["diverged"] = job(2, root / "diverged", parallel="fsdp", **diverging)
    for way in ("ddp", "fsdp"):
        jobs[f"nan, {way}"] = job(2, root / f"nan, {way}", "nan_in_rank_1", parallel=way, max_steps=1)
    off = dict(parallel="fsdp", gradient_checkpointing="off")
    jobs["no backward"] = job(2, root / "no backward", "no_gather_in_backward", max_steps=1, **off)
    return root, run_program("ranks", jobs)


def check_equal(one, other, losses: int) -> None:
    """Losses <= 1e-6, adapters <= 1e-4 of their largest entry: the same float32 numbers, added in another order."""
    for name, least in (("loss", losses), ("eval_loss", 2)):
        figures = [[record[name] for record in metrics(run) if name in record] for run in (one, other)]
        assert len(figures[0]) >= least and figures[1] == pytest.approx(figures[0], rel=1e-6)
    assert adapter(one).keys() == adapter(other).keys()
    for key, tensor in adapter(one).items():
        assert relative_error(adapter(other)[key], tensor) <= AFTER_20_STEPS, key
    if (one / "answers.jsonl").exists():
        assert (one / "answers.jsonl").read_text() == (other / "answers.jsonl").read_text()


@pytest.mark.parametrize("name", [name for name in PROCESSES if name != "one"])
def test_several_processes_equal_one_with_dropout_and_packing(runs, name):
    root, report = runs
    assert set(report[name]["ended"]) == {0}, report[name]["said"]
    check_equal(root / "one", root / name, losses=20)


@pytest.mark.parametrize("name", VARIANTS)
def test_so_it_is_with_other_weights_and_adapters(runs, name):
    root, report = runs
    assert report[name]["ended"] == [0, 0], report[name]["said"]
    check_equal(root / f"{name}, alone", root / name, losses=3)


def test_torchrun_starts_them_and_the_plan_says_so(runs, tmp_path):
    keys = RUN | dict(gradient_accumulation_steps=4, parallel="fsdp", output_dir=tmp_path / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "scripts" / "train.py"), *(str(w) for k, v in keys.items() for w in (f"--{k}", v))]
    environment = PROGRAM_ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "parallel   fsdp (as requested)" in run.stdout
    assert run.stdout.count("adapter, metrics, plot and model card") == 1
    check_equal(runs[0] / "one", tmp_path / "out", losses=20)


@pytest.mark.parametrize("name", ["four after two", "one after two"])
def test_a_run_goes_on_with_another_number_of_processes(runs, name):
    root, report = runs
    assert set(report[name]["ended"]) == {0}, report[name]["said"]
    assert "after step 10 of 20" in report[name]["said"][0]
    check_equal(root / "one", root / name, losses=20)


def test_where_a_training_diverges_all_processes_name_the_layer_that_one_names(runs):
    _, report = runs
    (alone,) = report["diverged, alone"]["said"]
    *_, said = alone.splitlines()
    assert re.search(
        "^error: loss nan.* diverged; .*; not finite first: the (in|out)put of model.layers", said
    )
    assert report["diverged"]["ended"] == [2, 2]
    first, second = (text.splitlines()[-1] for text in report["diverged"]["said"])
    assert first == said and second == said.replace("error: ", "error: rank 1: ")


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_all_processes_say_what_one_of_them_has_found(runs, way):
    _, report = runs
    assert report[f"nan, {way}"]["ended"] == [2, 2]
    for text in report[f"nan, {way}"]["said"]:
        said = "loss nan at step 1: the output of lm_head is not finite without the adapter too"
        assert said in text.splitlines()[-1]


def test_a_run_with_other_micro_batches_is_refused_with_the_mend(runs):
    _, report = runs
    assert report["other steps"]["ended"][0] == report["five"]["ended"][0] == 2
    said = report["other steps"]["said"][0]
    assert "gradient_accumulation_steps" in said.splitlines()[-1]
    five = report["five"]["said"][0].splitlines()[-1]
    assert "8 micro-batches in a step" in five and "start a number of processes that divides 8" in five


def test_where_a_rank_is_killed_the_others_end_with_a_line_each_and_the_run_goes_on(
    runs, run_program, tmp_path
):
    root, report = runs
    killed = report["killed"]
    # None would be a rank that had to be killed, 20 seconds later.
    assert killed["ended"] == [2, -9, 2]
    for said in (killed["said"][0], killed["said"][2]):
        assert said.count("another process of this training has ended") == 1 and "Traceback" not in said
    assert (root / "killed" / "checkpoint-5").is_dir()
    keys = dict(parallel="fsdp", resume_from_checkpoint="latest", max_steps=9)
    resumed = job(2, root / "killed", gradient_accumulation_steps=3, **keys)
    whole = job(1, tmp_path / "whole", gradient_accumulation_steps=6, max_steps=9)
    report = run_program("ranks", {"resumed": resumed, "whole": whole})
    assert report["resumed"]["ended"] == [0, 0], report["resumed"]["said"]
    check_equal(tmp_path / "whole", root / "killed", losses=9)


@pytest.mark.parametrize("name", ["no rerun", "no backward"])
def test_a_layer_that_is_not_gathered_for_backward_would_be_noticed(runs, name):
    """It reads freed memory: the processes crash, or their losses differ."""
    _, report = runs
    assert report[name]["ended"] != [0, 0]
