"""Hugging Face's TrainingArguments: each field is honoured, explained or refused with its reason."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import yaml
from support.project import metrics

from minilora import UserError
from minilora.optim import Schedule
from minilora.run import training_arguments
from minilora.run.llama_factory import KEYS, NEEDED, NO_EFFECT, TRANSLATED
from minilora.run.plan import Plan, count_steps, make_schedule
from minilora.run.settings import ALIASES, TrainConfig, load_train_config

transformers = pytest.importorskip("transformers")
FIELDS = {field.name: field for field in dataclasses.fields(transformers.TrainingArguments)}
DROPPED = """
    adafactor dispatch_batches evaluation_strategy fp16_backend fp16_opt_level fsdp_min_num_params
    fsdp_transformer_layer_cls_to_wrap group_by_length half_precision_backend include_inputs_for_metrics
    include_tokens_per_second jit_mode_eval logging_dir mp_parameters no_cuda overwrite_output_dir past_index
    per_gpu_eval_batch_size per_gpu_train_batch_size push_to_hub_model_id push_to_hub_token ray_scope
    save_safetensors split_batches torchdynamo tpu_metrics_debug tpu_num_cores use_ipex use_mps_device
    warmup_ratio
    """.split()  # by version 5 of transformers
OWN = {field.name for field in dataclasses.fields(TrainConfig)} | ALIASES.keys()
EXPLAINED = {name: reason for reason, names in NO_EFFECT.items() for name in names.split()}
HELD_OUT = ["--dataset", "a.json", "--val_size", "2"]


def default_of(name: str) -> object:
    """TrainingArguments' default, as a file would hold it."""
    field = FIELDS.get(name)
    if field is None:
        return None
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def load(tmp_path, **keys) -> TrainConfig:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
    return load_train_config(["--config", str(tmp_path / "run.yaml"), *HELD_OUT])


@pytest.mark.parametrize("name", [*FIELDS, *DROPPED])
def test_each_field_is_honoured_or_explained_or_refused(name):
    homes = [name in OWN, name in TRANSLATED, name in EXPLAINED, name in NEEDED]
    assert homes.count(True) == 1


def test_the_file_of_a_training_with_every_default_is_the_same_training(tmp_path):
    """Each field of TrainingArguments, written into a file as its own to_dict writes it."""
    defaults = transformers.TrainingArguments(output_dir=str(tmp_path / "out")).to_dict()
    config = load(tmp_path, **defaults)
    assert (config.learning_rate, config.lr_scheduler_type, config.optim) == (5e-5, "linear", "adamw_torch")
    assert (config.per_device_train_batch_size, config.logging_steps, config.save_steps) == (8, 500, 500)
    assert config.trackers() == [] and config.push_to_hub is None and not config.hub_private_repo
    assert config.gradient_checkpointing == "off" and config.eval_steps is None


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in ("output_dir", "hub_strategy")])
def test_no_default_is_refused(tmp_path, name):
    load(tmp_path, **{name: default_of(name)})


ANOTHER = {  # a value of a kind that no test could derive from the default
    "dataloader_multiprocessing_context": "spawn",
    "dataloader_prefetch_factor": 4,
    "debug": "underflow_overflow",
    "include_for_metrics": ["inputs"],
    "label_names": ["labels"],
    "length_column_name": "size",
    "log_level": "debug",
    "log_level_replica": "error",
    "logging_strategy": "epoch",
    "include_num_input_tokens_seen": "all",
    "liger_kernel_config": {"rope": True},
    "project": "mine",
    "ddp_timeout": 60,
}


@pytest.mark.parametrize("name", [name for name in [*FIELDS, *DROPPED] if name in EXPLAINED])
def test_an_explained_field_changes_no_setting_and_one_line_says_why(tmp_path, capsys, name):
    plain, default = load(tmp_path), default_of(name)
    other = ANOTHER.get(name, not default if isinstance(default, bool) else "another")
    assert other != default
    for value in (default, other):
        capsys.readouterr()
        assert load(tmp_path, **{name: value}) == plain
        assert capsys.readouterr().out == f"no effect: {name} ({EXPLAINED[name]})\n"


OFF = {"metric_for_best_model": "eval_accuracy", "accelerator_config": {"split_batches": True}}


@pytest.mark.parametrize("name", [name for name in [*FIELDS, *DROPPED] if name in training_arguments.NEEDED])
def test_a_refused_field_is_named_with_its_value_and_the_mend(tmp_path, capsys, name):
    plain = load(tmp_path)
    assert load(tmp_path, **{name: default_of(name)}) == plain
    with pytest.raises(UserError) as error:
        load(tmp_path, **{name: OFF.get(name, "asked for")})
    assert str(error.value).startswith(f"{name} = ") and "; " in str(error.value)
    assert "\n" not in str(error.value)


# ---- fields that are honoured ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, meant",
    [
        ({"activation_checkpointing": True}, {"gradient_checkpointing": "full"}),
        ({"activation_checkpointing": None, "gradient_checkpointing": None}, {}),
        ({"train_sampling_strategy": "group_by_length"}, {"group_by_length": True}),
        ({"train_sampling_strategy": "random"}, {}),
        ({"push_to_hub": True, "push_to_hub_model_id": "a/b"}, {"push_to_hub": "a/b"}),
        ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
        ({"report_to": None}, {}),
        ({"report_to": []}, {}),
        ({"hub_private_repo": None}, {}),
        ({"do_train": False}, {}),
        ({"eval_strategy": "steps", "eval_steps": 0.25}, {"eval_steps": 0.25}),
        ({"adam_beta1": "0.8", "adam_beta2": 0.95, "adam_epsilon": "1e-6"},
         {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}),
    ],
)  # fmt: skip
def test_a_field_by_another_name_or_value_means_our_key(tmp_path, keys, meant):
    assert load(tmp_path, **keys) == dataclasses.replace(load(tmp_path), **meant)


def test_an_order_that_is_not_random_is_refused(tmp_path):
    with pytest.raises(UserError, match="train_sampling_strategy = 'sequential' is not known; choose from"):
        load(tmp_path, train_sampling_strategy="sequential")


@pytest.mark.parametrize("name", ["adam_beta1", "adam_beta2"])
def test_a_mean_that_no_gradient_enters_is_refused(name):
    with pytest.raises(UserError, match=f"{name} must be below 1, not 1: at 1 no gradient counts"):
        TrainConfig(**{name: 1})


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_adams_betas_and_epsilon_reach_the_optimizer(train, optim, monkeypatch):
    import train as trainer_script

    made = []
    original = trainer_script.make_optimizer

    def kept(*arguments, **settings):
        made.append(original(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(trainer_script, "make_optimizer", kept)
    train(max_steps=1, optim=optim, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    (optimizer,) = made
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6 for group in optimizer.param_groups)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_a_step_with_other_betas_is_pytorchs(optim):
    from minilora.optim import make_optimizer

    weight = torch.linspace(-1, 1, 64)
    ours, theirs = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    settings = TrainConfig(adam_beta1=0.7, adam_beta2=0.9, adam_epsilon=0.1).optimizer_settings()
    one = make_optimizer(optim, {"w": ours}, **settings)
    two = torch.optim.AdamW([theirs], lr=2e-4, betas=(0.7, 0.9), eps=0.1, weight_decay=0.0)
    for step in range(3):
        for parameter, optimizer in ((ours, one), (theirs, two)):
            parameter.grad = torch.sin(weight + step)
            optimizer.step()
    assert not torch.equal(ours, weight)
    torch.testing.assert_close(ours.data, theirs.data)


# ---- numbers of steps, and shares of all steps -------------------------------------------------------------

SHARES = (0.001, 0.1, 1 / 3, 0.5, 0.7, 0.999)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 100, 1000])
@pytest.mark.parametrize("steps", [*SHARES, 1, 3, 500])
def test_a_share_of_all_steps_is_rounded_as_transformers_rounds_it(tmp_path, total, steps):
    from transformers.trainer_callback import TrainerState

    state = TrainerState()
    given = SimpleNamespace(logging_steps=steps, eval_steps=steps, save_steps=steps)
    state.compute_steps(given, total)
    config = load(tmp_path, logging_steps=steps, eval_steps=steps, save_steps=steps, eval_strategy="steps")
    plan = plan_of(config, total)
    assert plan.logging_steps == state.logging_steps == plan.eval_steps == plan.save_steps


@pytest.mark.parametrize("total", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", ["warmup_steps", "warmup_ratio"])
def test_a_share_of_warm_up_is_transformers_and_leaves_a_step_to_learn_from(total, share, name):
    theirs = transformers.TrainingArguments(output_dir="o", warmup_steps=share).get_warmup_steps(total)
    schedule = make_schedule(TrainConfig(max_steps=total, **{name: share}), steps_per_epoch=1)
    assert schedule.warmup_steps == min(theirs, total - 1)
    assert schedule.learning_rate(total - 1) > 0


def plan_of(config: TrainConfig, total: int, steps_per_epoch: int = 4, eval_set: object = True) -> Plan:
    """A plan that knows its steps, and nothing else."""
    plan = object.__new__(Plan)
    parts = dict(config=config, schedule=Schedule("constant", 1.0, total), eval_set=eval_set)
    for name, value in (parts | dict(order=SimpleNamespace(steps_per_epoch=steps_per_epoch))).items():
        object.__setattr__(plan, name, value)
    return plan


@pytest.mark.parametrize("name", ["val_size", "warmup_steps", "logging_steps", "eval_steps", "save_steps"])
def test_a_number_above_one_that_is_not_whole_is_one_line(name):
    held_out = [] if name == "val_size" else ["--val_size", "2"]
    with pytest.raises(UserError, match=f"^{name} must be a whole number or a share below 1, not 1.5$"):
        load_train_config([*held_out, f"--{name}", "1.5"])
    config = load_train_config([*held_out, f"--{name}", "3.0"])
    assert getattr(config, name) == 3 and isinstance(getattr(config, name), int)


def evaluated(config: TrainConfig, total: int, steps_per_epoch: int) -> list[int]:
    plan = plan_of(config, total, steps_per_epoch)
    return [step for step in range(1, total + 1) if plan.evaluates(step)]


@pytest.mark.parametrize("delay", [0, 1, 3, 4, 4.5, 9, 10, 11])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluations_wait_for_eval_delay_as_transformers_do(strategy, delay):
    from transformers.trainer_callback import DefaultFlowCallback, TrainerControl, TrainerState

    total, steps_per_epoch, every = 10, 2, 3
    args = transformers.TrainingArguments(
        output_dir="o", eval_strategy=strategy, eval_steps=every, eval_delay=delay
    )
    flow, theirs = DefaultFlowCallback(), []
    for step in range(1, total + 1):
        control = TrainerControl()
        state = TrainerState(global_step=step, epoch=step / steps_per_epoch, max_steps=total)
        state.compute_steps(args, total)
        flow.on_step_end(args, state, control)
        if step % steps_per_epoch == 0:
            flow.on_epoch_end(args, state, control)
        if control.should_evaluate:
            theirs.append(step)
    keys = dict(eval_steps=every) if strategy == "steps" else {}
    config = TrainConfig(val_size=2, eval_delay=delay, **keys)
    assert evaluated(config, total, steps_per_epoch) == theirs


def test_without_held_out_examples_nothing_is_evaluated():
    assert not plan_of(TrainConfig(), 4, eval_set=None).evaluates(4)


@pytest.mark.parametrize(
    "keys, steps",
    [
        (dict(save_strategy="steps", save_steps=2), [2, 4]),
        (dict(save_strategy="steps", save_steps=0.5), [3]),
        (dict(save_strategy="epoch", save_steps=1), [2, 4]),
        (dict(save_strategy="no", save_steps=1), []),
    ],
)
def test_checkpoints_are_saved_by_steps_by_epochs_or_never(train, keys, steps):
    directory, _ = train(max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=4, **keys)
    epoch = metrics(directory)[-1]["epoch"] / 5
    saved = sorted(int(path.name.split("-")[1]) for path in directory.glob("checkpoint-*"))
    if keys["save_strategy"] == "epoch":
        steps = [step for step in range(1, 6) if step % round(1 / epoch) == 0]
        assert steps
    assert saved == steps


def test_the_best_strategy_saves_whenever_the_held_out_loss_is_the_lowest(train):
    directory, _ = train(
        max_steps=6, val_size=4, eval_steps=1, save_strategy="best", learning_rate=1e-2, save_steps=1
    )
    losses = {r["step"]: r["eval_loss"] for r in metrics(directory) if "eval_loss" in r and r["step"]}
    best, lowest = math.inf, []
    for step, loss in losses.items():
        if loss < best:
            best, lowest = loss, [*lowest, step]
    saved = sorted(int(path.name.split("-")[1]) for path in directory.glob("checkpoint-*"))
    assert saved == lowest and lowest


def test_saving_the_best_needs_held_out_examples():
    with pytest.raises(UserError, match="save_strategy = 'best' needs held-out examples"):
        TrainConfig(save_strategy="best")


def test_a_training_of_one_step_with_a_warmup_ratio_trains(train):
    directory, _ = train(max_steps=1, warmup_ratio=0.1)
    assert metrics(directory)[-1]["lr"] > 0


def test_shares_are_counted_over_the_whole_training(train):
    directory, _ = train(max_steps=10, logging_steps=0.3, eval_steps=0.5, save_steps=0.4, val_size=4)
    logged = [record["step"] for record in metrics(directory) if "loss" in record]
    assert logged == [1, 3, 6, 9, 10]  # the first and the last are always recorded
    assert [r["step"] for r in metrics(directory) if "eval_loss" in r] == [0, 5, 10]
    assert {path.name for path in directory.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-8"}


def test_every_key_here_is_known_to_the_trainer():
    assert set(FIELDS) <= KEYS | OWN
    assert count_steps(0.5, 5) == 3
