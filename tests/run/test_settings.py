"""Keys of a run: files, overrides, aliases, types, and error messages that name the nearest key."""

import re
from ast import literal_eval
from dataclasses import asdict, fields

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minilora import UserError
from minilora.adapters.peft_format import PEFT_DEFAULTS
from minilora.data.examples import Order
from minilora.formats.config_fields import CHANGES_NOTHING, CONFIG_FIELDS, ROPE_FIELDS
from minilora.run.llama_factory import KEYS
from minilora.run.manual import documented_keys, manual
from minilora.run.plan import make_schedule
from minilora.run.settings import (
    ALIASES,
    LARGEST,
    TrainConfig,
    load_train_config,
    parse_arguments,
    parse_with_keys,
)
from minilora.system.errors import ArgumentParser


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: some/base\nlearning-rate: 1e-4\nlora_r: 4\nlora_target: [q_proj, v_proj]\n")
    config = load_train_config(
        ["--config", str(path), "--learning_rate=3e-4", "--dataset", "d.jsonl", "--overwrite-output-dir"]
    )
    assert (config.model_name_or_path, config.dataset, config.learning_rate) == ("some/base", "d.jsonl", 3e-4)
    assert config.overwrite_output_dir and config.seed == TrainConfig().seed
    assert (config.lora_config().r, config.lora_config().lora_alpha) == (4, 8)
    assert config.lora_config().target_modules == ("q_proj", "v_proj")


SHORT_NAMES = {  # short name -> (a value, the key that gets it)
    "model": ("some/base", "model_name_or_path"),
    "data": ("a.jsonl", "dataset"),
    "output": ("out", "output_dir"),
    "lora_r": ("4", "lora_rank"),
    "r": ("5", "lora_rank"),
    "target_modules": ("q_proj", "lora_target"),
    "max_length": ("64", "cutoff_len"),
    "max_seq_length": ("65", "cutoff_len"),
    "num_epochs": ("7", "num_train_epochs"),
    "batch_size": ("9", "per_device_train_batch_size"),
    "activation_checkpointing": ("offload", "gradient_checkpointing"),
}


@pytest.mark.parametrize("name", SHORT_NAMES)
def test_every_short_name_sets_its_key_and_no_other(name):
    value, key = SHORT_NAMES[name]
    config = asdict(load_train_config([f"--{name}", value]))
    assert str(config[key]) in (value, f"{value}.0")
    assert config | {key: None} == asdict(TrainConfig()) | {key: None}


def test_the_short_names_are_all_in_that_table():
    assert ALIASES.keys() == SHORT_NAMES.keys()


def test_the_default_file_is_read_only_if_nothing_is_named(tmp_path):
    default = tmp_path / "default.yaml"
    default.write_text("dataset: default.jsonl\nmax_steps: 7\n")
    assert load_train_config([], default).max_steps == 7
    assert load_train_config(["--seed", "1"], default).max_steps == 7
    assert load_train_config(["--dataset", "mine.jsonl"], default).max_steps == -1
    assert load_train_config(["--model", "mine"], default).dataset is None


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--learning_rat", "1"], "unknown key 'learning_rat' in the command line; nearest: 'learning_rate'"),
        (["--lora-rnak", "4"], "nearest: 'lora_rank'"),
        (["--xyzzy", "4"], "unknown key 'xyzzy' in the command line; docs/keys.md has them all"),
        (["run.yaml"], "'run.yaml' is not a key; write --key value"),
        (["--r", "4", "--lora_rank", "8"], "lora_rank is set twice"),
        (
            ["--lora-rank", "4", "--lora_rank=8"],
            "lora_rank is set twice in the command line; leave one of them out",
        ),
        (["--config"], "--config names no file; write --config run.yaml"),
        (["--config=", "--seed", "1"], "--config names no file"),
        (["--config", "x" * 5000], "does not exist"),
        (["--seed", str(2**63)], "seed must be at most 9,223,372,036,854,775,807, not 9223372036854775808"),
        (["--seed", "9" * 5000], "seed must be a whole number"),
        (["--learning_rate", "1e999"], "learning_rate must be a number, not '1e999'"),
        (["--lora_rank", "0"], "lora_rank must be above 0, not 0"),
        (["--lora_rank", "4.5"], "lora_rank must be a whole number, not '4.5'"),
        (["--learning_rate", "-1e-4"], "learning_rate must be above 0, not -0.0001"),
        (["--learning_rate", "fast"], "learning_rate must be a number, not 'fast'"),
        (["--learning_rate", "nan"], "learning_rate must be a number"),
        (["--learning_rate"], "learning_rate must be a number, not True"),
        (["--use_rslora", "maybe"], "use_rslora must be true or false, not 'maybe'"),
        (["--lora_dropout", "1.5"], "lora_dropout must be at least 0 and below 1"),
        (["--lr_scheduler_type", "cosin"], "lr_scheduler_type = 'cosin' is not known; choose from cosine"),
        (["--optim", "sgd"], "optim = 'sgd' is not known"),
        (["--preset", "standard"], "nearest: 'standard_r8_qkvo'"),
        (["--warmup_ratio", "1"], "warmup_ratio must be below 1"),
        (["--warmup_ratio", "0.1", "--warmup_steps", "3"], "both set"),
        (["--max_steps", "0"], "max_steps must be above 0"),
        (["--cutoff_len", "1"], "cutoff_len must be at least 2"),
        (["--early_stopping_patience", "2"], "needs held-out examples: set val_size or eval_dataset"),
        (["--val_size", "0.1", "--eval_dataset", "x"], "both set"),
        (["--config", "nowhere.yaml"], "config nowhere.yaml does not exist"),
        (["--max_grad_norm", "-1"], "max_grad_norm must be at least 0"),
        (["--loraplus_lr_ratio", "0"], "loraplus_lr_ratio must be above 0, not 0"),
        (["--template", "alpacca"], "template = 'alpacca' is not known; choose from alpaca, llama2"),
        (
            ["--report_to", "mlflow,comet_ml"],
            "report_to = 'comet_ml' is not known; choose from none, mlflow, tensorboard, wandb",
        ),
        (["--max_samples", "0"], "max_samples must be above 0, not 0"),
        (["--mask_history", "--train_on_prompt"], "mask_history and train_on_prompt exclude each other"),
        (["--packing", "--group_by_length"], "packing and group_by_length exclude each other"),
        (
            ["--gradient_checkpointing", "some"],
            "gradient_checkpointing = 'some' is not known; choose from auto, off",
        ),
    ],
)
def test_mistakes_are_one_line_that_names_the_key_and_the_fix(arguments, said):
    with pytest.raises(UserError) as error:
        load_train_config(arguments)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--adpter", "a"], "unknown key 'adpter' in the command line; nearest: 'adapter'"),
        (["--lora-rnak", "4"], "unknown key 'lora_rnak' in the command line; nearest: 'lora_rank'"),
        (["--xyzzy"], "unknown key 'xyzzy' in the command line; docs/keys.md has them all"),
        (["--stage", "dpo"], "stage = 'dpo' requests a training that minilora does not do"),
        (["more"], "'more' is not a key"),
    ],
)
def test_a_mistake_in_a_scripts_options_or_the_keys_behind_them_names_the_nearest(monkeypatch, words, said):
    monkeypatch.setattr("sys.argv", ["chat.py", *words])
    with pytest.raises(UserError, match=re.escape(said)):
        parse_with_keys(parser_of_a_script())


def test_a_scripts_own_options_are_told_from_the_keys_behind_them(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", "chat.py --lora-r 3 --adapter=a --config run.yaml --use-4bit --t 1".split()
    )
    options, keys = parse_with_keys(parser_of_a_script())
    assert vars(options) == dict(adapter="a", t=1)
    assert parse_arguments(keys) == dict(lora_r="3", config="run.yaml", use_4bit=True)


def parser_of_a_script() -> ArgumentParser:
    parser = ArgumentParser()
    parser.add_argument("--adapter")
    parser.add_argument("--t", type=int, default=0)
    return parser


@pytest.mark.parametrize("name", LARGEST)
def test_every_number_has_a_stated_limit_and_beyond_it_is_one_line(name):
    largest = LARGEST[name]
    assert f"at most {largest:,}" in next(line for line in manual().splitlines() if f"--{name} " in line)
    for beyond in (largest + (1 if largest < 10**12 else largest), 10**18 * largest, 10**400):
        with pytest.raises(
            UserError, match=rf"^{name} must be (at most {re.escape(f'{largest:,}')}|a number), not"
        ) as error:
            load_train_config([f"--{name}", str(beyond)])
        assert len(str(error.value)) < 200
    with pytest.raises(UserError, match="must be") as error:
        load_train_config([f"--{name}", "-1" + "0" * 400])
    assert len(str(error.value)) < 200


def test_every_number_of_a_run_has_a_limit_or_a_choice_of_values():
    hints = {field.name: str(field.type) for field in fields(TrainConfig)}
    numbers = {name for name, hint in hints.items() if "int" in hint or "float" in hint}
    # 4 or 8; below 1; of each curve, in minilora/run/curves.py
    assert numbers - set(LARGEST) == {"quantization_bit", "lora_dropout", "lr_scheduler_kwargs"}


def test_the_longest_training_is_planned_without_counting_through_it():
    config = TrainConfig(max_steps=LARGEST["max_steps"], warmup_steps=LARGEST["max_steps"] - 1)
    schedule = make_schedule(config, steps_per_epoch=1)
    assert schedule.total_steps == 10**9 and schedule.learning_rate(10**9 - 1) == config.learning_rate
    order = Order([5] * 10, batch_size=10**6, accumulation=10**6, seed=1)
    assert [sorted(batch) for batch in order.batches(10**9)] == [list(range(10))]
    epochs = make_schedule(TrainConfig(num_train_epochs=10**6), steps_per_epoch=10**6)
    assert epochs.total_steps == 10**12


@pytest.mark.parametrize(
    "content, said",
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b\n", "must hold `key: value` lines"),
        ("lr: 3", "unknown key 'lr'"),
        ("seed: 1\nlora_rank: 4\nseed: 2\n", "sets seed twice; leave one of them out"),
        ("lora-rank: 4\nlora_rank: 4\n", "sets lora_rank twice"),
        ("run_name: 2024-02-30\n", "not valid YAML: day is out of range"),
        ("dataset: " + 5000 * "[", "not valid YAML"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path, content, said):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        load_train_config(["--config", str(path)])
    assert "run.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_number_beyond_all_floats_is_one_line(tmp_path):
    (tmp_path / "run.yaml").write_text(f"learning_rate: 1{400 * '0'}\n")
    with pytest.raises(UserError, match="learning_rate must be a number, not 1000"):
        load_train_config(["--config", str(tmp_path / "run.yaml")])


@given(st.integers(0, 2**63 - 1))
def test_a_seed_keeps_all_its_digits(seed):
    assert (
        load_train_config(["--seed", str(seed)]).seed == seed == load_train_config([f"--seed={seed:_}"]).seed
    )


@pytest.mark.parametrize("written", ["1e3", "1000.0", "1_000", " 1000 "])
def test_a_whole_number_may_be_written_as_people_write_them(written):
    assert load_train_config(["--max_steps", written]).max_steps == 1000


@pytest.mark.parametrize(
    "written, meant",
    [
        ("q_proj,v_proj", ("q_proj", "v_proj")),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        ("model.layers.0.self_attn.q_proj", ("model.layers.0.self_attn.q_proj",)),
        ("all", "all-linear"),
        ("all-linear", "all-linear"),
        (r".*\.[0-3]\..*q_proj", r".*\.[0-3]\..*q_proj"),
    ],
)
def test_lora_target_is_names_or_all_or_a_regular_expression(written, meant):
    assert load_train_config(["--lora_target", written]).lora_config().target_modules == meant


@pytest.mark.parametrize(
    "written, policy",
    [
        ("", "full"),
        ("true", "full"),
        ("false", "off"),
        ("off", "off"),
        ("on", "full"),
        ("offload", "offload"),
    ],
)
def test_gradient_checkpointing_takes_policies_and_what_people_type(tmp_path, written, policy):
    if written != "on":  # only YAML reads this word as true
        assert (
            load_train_config(
                ["--gradient_checkpointing", *([written] if written else [])]
            ).gradient_checkpointing
            == policy
        )
    (tmp_path / "run.yaml").write_text(f"gradient_checkpointing: {written or 'true'}\n")
    config = load_train_config(["--config", str(tmp_path / "run.yaml")])
    assert config.gradient_checkpointing == policy
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_train_config(["--config", str(tmp_path / "again.yaml")]) == config


@pytest.mark.parametrize(
    "written, meant",
    [("latest", "latest"), ("true", "latest"), ("false", None), ("none", None), ("a/b", "a/b")],
)
def test_resume_from_checkpoint_takes_a_path_latest_and_what_people_type(written, meant):
    assert load_train_config(["--resume_from_checkpoint", written]).resume_from_checkpoint == meant
    assert load_train_config(["--resume_from_checkpoint"]).resume_from_checkpoint == "latest"


def test_no_number_depends_on_the_keys_that_may_change_on_resuming():
    # Everything that enters the numbers of a step, by its meaning.
    numbers = """
        val_size prompt_column completion_column messages_column columns text_column truncation cutoff_len max_samples template train_on_prompt mask_history
        padding_free packing group_by_length quantization_bit quantization_type double_quantization preset lora_rank lora_alpha
        lora_dropout lora_target finetuning_type additional_target adapter_name_or_path init_lora_weights use_vera use_rslora use_dora lora_fa per_device_train_batch_size gradient_accumulation_steps
        num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim adam_beta1 adam_beta2 adam_epsilon loraplus_lr_ratio
        weight_decay max_grad_norm seed load_best_model_at_end fused new_special_tokens add_tokens resize_vocab
    """.split()
    assert TrainConfig().may_change() == {field.name for field in fields(TrainConfig)} - set(numbers)
    assert "max_steps" in TrainConfig(lr_scheduler_type="constant").may_change()
    for name in ("warmup_ratio", "warmup_steps"):
        assert "max_steps" not in TrainConfig(lr_scheduler_type="constant", **{name: 0.1}).may_change()


def test_saved_settings_are_read_back_as_the_same_run(tmp_path):
    config = load_train_config(
        ["--lora_target", "q_proj,v_proj", "--learning_rate", "1e-5", "--val_size", "0.1"]
    )
    (tmp_path / "training_config.yaml").write_text(config.to_yaml())
    assert load_train_config(["--config", str(tmp_path / "training_config.yaml")]) == config


def test_several_datasets_are_named_with_commas_or_as_a_list(tmp_path):
    assert load_train_config(["--dataset", "a.jsonl:0.7,b.json:0.3"]).dataset == "a.jsonl:0.7,b.json:0.3"
    (tmp_path / "run.yaml").write_text("dataset: [a.jsonl, b.json]\neval_dataset: none\n")
    config = load_train_config(["--config", str(tmp_path / "run.yaml")])
    assert (config.dataset, config.eval_dataset) == (["a.jsonl", "b.json"], None)


@pytest.mark.parametrize("stage", ["", "stage: sft\n"])
@pytest.mark.parametrize("key", ["dataset", "eval_dataset"])
@pytest.mark.parametrize(
    "value", ["[]", "[1]", "[a.json, null]", "[2024-01-01]", "{a: b}", "[{a: b}]", "true"]
)
def test_a_dataset_that_is_not_text_is_one_line(tmp_path, stage, key, value):
    (tmp_path / "run.yaml").write_text(f"{stage}{key}: {value}\n")
    with pytest.raises(UserError, match=f"dataset .*{re.escape(repr(yaml.safe_load(value)))}"):
        load_train_config(["--config", str(tmp_path / "run.yaml")])


def test_trackers_are_named_with_commas_or_as_a_list(tmp_path):
    assert TrainConfig().trackers() == load_train_config(["--report_to", "none"]).trackers() == []
    assert load_train_config(["--report_to", "mlflow, tensorboard"]).trackers() == ["mlflow", "tensorboard"]
    (tmp_path / "run.yaml").write_text("report_to: [tensorboard]\nrun_name: first\n")
    assert load_train_config(["--config", str(tmp_path / "run.yaml")]).trackers() == ["tensorboard"]


def test_the_page_of_fields_is_up_to_date_and_has_them_all():
    import keys

    page = keys.FIELDS_PAGE.read_text(encoding="utf-8")
    assert page == keys.fields_page(), "run python scripts/dev/keys.py"
    for name in {*CONFIG_FIELDS, *CHANGES_NOTHING, *ROPE_FIELDS, *PEFT_DEFAULTS}:
        assert f"`{name}`" in page


def test_the_page_of_keys_is_up_to_date_and_has_them_all():
    import keys

    page = keys.PAGE.read_text(encoding="utf-8")
    assert page == keys.page(), "run python scripts/dev/keys.py"
    for name in {field.name for field in fields(TrainConfig)} | KEYS:
        assert f"`{name}`" in page
    defaults = {name: default for section in documented_keys().values() for name, default, _ in section}
    assert {name: literal_eval(default) for name, default in defaults.items()} == asdict(TrainConfig())
    assert not re.findall(r"\|\s*\|$", page, re.MULTILINE)  # every row says what a key means, or what to do


def test_the_manual_names_every_key():
    text = manual()
    assert all(f"--{field.name} " in text for field in fields(TrainConfig))
    assert all(f"{name} = {key}" in text for name, (_, key) in SHORT_NAMES.items())


@pytest.mark.parametrize("values", [dict(dataset=""), dict(dataset=["a.jsonl", " "]), dict(run_name="\t")])
def test_an_empty_text_is_refused_in_a_list_and_from_python_too(values):
    with pytest.raises(UserError, match=f"{next(iter(values))} is empty"):
        TrainConfig(**values)
