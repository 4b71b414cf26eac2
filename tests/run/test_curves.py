"""The curves of the learning rate that have settings, against transformers."""

import pytest
import torch
from support.project import metrics

from minilora import UserError
from minilora.run.curves import CURVES, SETTINGS
from minilora.run.plan import make_schedule
from minilora.run.settings import TrainConfig, load_train_config

KINDS = [
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr_rate": 0}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_restarts", {}),
    ("warmup_stable_decay", {"num_decay_steps": 5}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "min_lr_ratio": 0.2}),
]


@pytest.mark.parametrize("total, warmup", [(20, 0), (20, 4), (7, 2), (6, 1)])
@pytest.mark.parametrize("name, settings", KINDS)
def test_every_step_has_the_learning_rate_of_transformers(name, settings, total, warmup):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=settings
    )
    config = TrainConfig(
        max_steps=total, warmup_steps=warmup, learning_rate=1e-3,
        lr_scheduler_type=name, lr_scheduler_kwargs=settings or None,
    )  # fmt: skip
    ours = make_schedule(config, steps_per_epoch=1)
    for step in range(total):
        # A few roundings of the same expression in float64.
        assert ours.learning_rate(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "written", ["{min_lr_rate: 0.1}", '{"min_lr_rate": 0.1}', "min_lr_rate: 1e-1", '{"min_lr_rate": "0.1"}']
)
def test_settings_are_written_as_yaml_or_json(tmp_path, written):
    words = ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", written]
    config = load_train_config(words)
    assert config.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_train_config(["--config", str(tmp_path / "again.yaml")]) == config


def test_no_settings_are_none():
    assert load_train_config(["--lr_scheduler_kwargs", "{}"]) == TrainConfig()


@pytest.mark.parametrize(
    "name, settings, said",
    [
        ("cosine", "{min_lr: 1}", "names min_lr, but the cosine curve has no settings"),
        ("cosine_with_min_lr", "{min_lr_rat: 1}", "nearest: 'min_lr_rate'"),
        ("cosine_with_min_lr", "{}", "needs lr_scheduler_kwargs: {min_lr_rate: 0.1}, or min_lr"),
        ("cosine_with_min_lr", "{min_lr_rate: 0.1, min_lr: 0}", "needs lr_scheduler_kwargs"),
        ("cosine_with_min_lr", "{min_lr_rate: 1.5}", "min_lr_rate must be from 0 to 1, not 1.5"),
        ("cosine_with_min_lr", "{min_lr: 1}", "min_lr must be from 0 to 0.0002, not 1"),
        ("cosine_with_min_lr", "{min_lr: low}", "lr_scheduler_kwargs: min_lr must be a number, not 'low'"),
        ("cosine_with_min_lr", "{min_lr: .nan}", "lr_scheduler_kwargs: min_lr must be a number"),
        ("cosine_with_min_lr", "[1]", "must be settings such as {min_lr_rate: 0.1}, not [1]"),
        ("cosine_with_min_lr", "[" * 900, "must be settings such as {min_lr_rate: 0.1}, not '[[["),
        ("cosine_with_min_lr", "2024-02-30", "must be settings such as {min_lr_rate: 0.1}, not '2024"),
        ("cosine_with_min_lr", "{", "must be settings such as {min_lr_rate: 0.1}, not '{'"),
        ("cosine_with_restarts", "{num_cycles: 0}", "num_cycles must be a whole number from 1"),
        ("cosine_with_restarts", "{num_cycles: 1.5}", "num_cycles must be a whole number from 1"),
        ("warmup_stable_decay", "{}", "needs lr_scheduler_kwargs: {num_decay_steps: 100}"),
        ("inverse_sqrt", "{}", "lr_scheduler_type = 'inverse_sqrt' is not known; choose from cosine, linear"),
    ],
)
def test_a_setting_that_a_curve_cannot_use_is_one_line(name, settings, said):
    with pytest.raises(UserError) as error:
        load_train_config(["--lr_scheduler_type", name, "--lr_scheduler_kwargs", settings])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_decay_that_does_not_fit_is_one_line():
    config = TrainConfig(
        max_steps=6, warmup_steps=2, lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 5},
    )  # fmt: skip
    with pytest.raises(UserError, match="num_decay_steps = 5 is more than the 4 steps after the warm-up"):
        make_schedule(config, steps_per_epoch=1)


def test_a_training_follows_its_curve_and_a_resumed_one_goes_on_with_it(train):
    keys = dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs="{min_lr_rate: 0.5}")
    directory, _ = train(max_steps=4, logging_steps=1, save_steps=2, learning_rate=1e-2, **keys)
    rates = [record["lr"] for record in metrics(directory)]
    assert rates[0] == 1e-2 and all(0.5e-2 <= rate <= 1e-2 for rate in rates) and rates == sorted(rates)[::-1]
    again, _ = train(
        max_steps=4, logging_steps=1, save_steps=2, learning_rate=1e-2,
        resume_from_checkpoint=directory / "checkpoint-2", **keys,
    )  # fmt: skip
    assert [record["lr"] for record in metrics(again)] == rates


def test_every_curve_is_a_choice_with_its_settings():
    assert set(SETTINGS) < set(CURVES) and {name for name, _ in KINDS} == set(SETTINGS)
