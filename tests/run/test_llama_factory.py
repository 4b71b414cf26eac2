"""LLaMA-Factory's files: the meaning of their keys here, of the keys they leave out, and the refused ones."""

import json
import re
from dataclasses import asdict, fields

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from support.project import ROOT

from minilora import UserError
from minilora.data.mixing import parse_datasets
from minilora.data.rows import ColumnNames, read_rows
from minilora.run.datasets import read_mixed
from minilora.run.llama_factory import (
    DEFAULTS,
    INSTEAD,
    KEYS,
    NEEDED,
    NO_EFFECT,
    TRANSLATED,
    VALUES,
    refuse_other_training,
    translate,
)
from minilora.run.settings import ALIASES, SWITCHES, TrainConfig, load_train_config

FILES = ROOT / "tests" / "run" / "llama_factory"


@pytest.fixture
def load(monkeypatch):
    """Load one of the files in the directory of its datasets."""
    monkeypatch.chdir(FILES)
    return lambda name, *overrides: load_train_config(["--config", f"{name}.yaml", *overrides])


def check(config: TrainConfig, **expected) -> None:
    """The settings of `config` named in `expected` have these values."""
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_qlora_file_for_16_gb_means_what_it_says(load, capsys):
    config = load("qlora_16gb")
    check(
        config, model_name_or_path="mistralai/Mistral-7B-v0.1", quantization_bit=4, double_quantization=True
    )
    check(config, lora_dropout=0.05, lora_target="q_proj,v_proj", cutoff_len=1024, max_samples=1000)
    check(config, template="mistral")
    check(config, per_device_train_batch_size=1, gradient_accumulation_steps=16, learning_rate=2e-4)
    check(config, warmup_ratio=0.03)
    check(config, optim="paged_adamw_8bit", fp16=True, gradient_checkpointing="full", eval_steps=100)
    check(config, val_size=0.1, save_steps=200)
    check(config, report_to="none", resume_from_checkpoint=None)
    check(config, dataset=["data/riddles.json", "data/small_talk.jsonl"])
    lora = config.lora_config()
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (8, 16, ("q_proj", "v_proj"))
    out = capsys.readouterr().out
    assert "no effect: overwrite_cache, preprocessing_num_workers (examples are tokenized" in out
    assert (
        "trust_remote_code (code that comes with a model is never run)" in out
        and "LLaMA-Factory's defaults: truncation keep_answer\n" in out
    )


def test_keys_that_a_file_leaves_out_get_llama_factorys_defaults_and_are_printed(load, capsys):
    config = load("lora_24gb")
    check(config, quantization_bit=None, lora_rank=8, lora_dropout=0.0, lora_target="all")
    check(config, cutoff_len=2048, num_train_epochs=3.0)
    check(config, learning_rate=1e-4, loraplus_lr_ratio=16.0, optim="adamw_bnb_8bit", bf16=True)
    check(config, eval_steps=None, val_size=0.1)
    assert config.quant_config() is None and config.lora_config().lora_alpha == 16
    assert config.lora_config().target_modules == "all-linear"
    assert (
        "defaults: quantization_bit none, lora_rank 8, lora_dropout 0.0, cutoff_len 2048, truncation keep_answer\n"
        in capsys.readouterr().out
    )


def test_an_rslora_and_dora_file_for_80_gb_means_what_it_says(load):
    config = load("dora_80gb")
    check(config, use_rslora=True, use_dora=True, lora_rank=64, lora_alpha=32.0, quantization_bit=None)
    check(config, packing=True)
    check(config, optim="adamw_torch", lr_scheduler_type="constant", warmup_steps=20)
    check(config, gradient_checkpointing="off", eval_steps=None)
    check(config, template="tokenizer", prompt_column="question", completion_column="answer")
    check(config, report_to="tensorboard")
    assert [
        row.completion
        for row in read_rows(config.dataset, ColumnNames(config.prompt_column, config.completion_column))
    ][0] == "5"


@pytest.mark.parametrize("name", ["qlora_16gb", "lora_24gb", "dora_80gb"])
def test_the_saved_settings_of_a_llama_factory_run_are_our_own_file_for_the_same_run(
    load, name, tmp_path, capsys
):
    config = load(name)
    (tmp_path / "training_config.yaml").write_text(config.to_yaml())
    capsys.readouterr()
    assert load_train_config(["--config", str(tmp_path / "training_config.yaml")]) == config
    assert capsys.readouterr().out == ""


def test_a_llama_factory_file_trains(run_trainer, model_dir, monkeypatch, tmp_path):
    monkeypatch.chdir(FILES)
    paths = ["--config", "dora_80gb.yaml", "--model", model_dir, "--output_dir", tmp_path / "out"]
    short = ["--max_steps", 1, "--warmup_steps", 0, "--cutoff_len", 64]
    code, out, err = run_trainer(*paths, *short, "--template", "plain", "--report_to", "none")
    assert code == 0, err
    adapter = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["use_rslora"], adapter["use_dora"]) == (64, True, True)


def test_the_command_line_wins_and_may_name_a_preset(load):
    config = load(
        "lora_24gb", "--quantization_bit", "8", "--dataset", "data/quiz.jsonl", "--eval_strategy", "steps"
    )
    check(config, quantization_bit=8, dataset="data/quiz.jsonl", eval_steps=10)
    assert load_train_config(["--stage", "sft", "--preset", "aggressive_r16_all"]).lora_config().r == 16


@pytest.mark.parametrize(
    "schedule, warmup_ratio", [("constant", 0.0), ("constant_with_warmup", 0.1), ("cosine", 0.1)]
)
def test_a_constant_rate_warms_up_only_where_it_says_so(schedule, warmup_ratio):
    words = ["--stage", "sft", "--warmup_ratio", "0.1", "--lr_scheduler_type", schedule]
    config = load_train_config(words)
    check(config, warmup_ratio=warmup_ratio, lr_scheduler_type=schedule.removesuffix("_with_warmup"))


@pytest.mark.parametrize(
    "key, value, advice",
    [
        ("stage", "dpo", "sft learns answers and pt plain text; preferences and rewards are not learned"),
        ("finetuning_type", "freeze", "lora trains an adapter and full all weights"),
        ("deepspeed", "ds_z3_config.json", "torchrun"),
        ("do_train", False, "scripts/evaluate.py evaluates"),
        ("quantization_method", "hqq", "write bnb"),
        ("use_galore", True, "leave it out"),
        ("neftune_noise_alpha", 5, "leave it out"),
        ("train_sampling_strategy", "sequential", "choose from random, group_by_length"),
        ("mix_strategy", "interleave_under", "a.jsonl:0.7"),
        ("eval_strategy", "often", "choose from steps, epoch, no"),
        ("template", "gemma", "choose from alpaca"),
        ("report_to", "swanlab", "choose from none, mlflow, tensorboard, wandb"),
        ("optim", "lion_32bit", "choose from adamw_torch"),
        ("enable_thinking", False, "template: chatml"),
        ("default_system", "Be kind.", "give the rows a system message"),
    ],
)
def test_a_request_for_another_training_is_refused_in_one_line(tmp_path, key, value, advice):
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"stage": "sft", "finetuning_type": "lora", key: value})
    )
    with pytest.raises(UserError) as error:
        load_train_config(["--config", str(tmp_path / "run.yaml")])
    assert key in str(error.value) and advice in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys, first",
    [
        ({"pref_beta": 0.1, "stage": "dpo"}, "stage = 'dpo'"),
        ({"pref_bta": 0.1, "use_galore": True, "stage": "dpo"}, "stage = 'dpo'"),
        ({"finetuning_type": "full", "stage": "kto"}, "stage = 'kto'"),
        (
            {"deepspeed": "z3.json", "image_max_pixels": 9, "finetuning_type": "oft"},
            "finetuning_type = 'oft'",
        ),
        ({"deepspeed": "z3.json", "image_max_pixels": 9}, "image_max_pixels = 9"),
        (
            {"deepspeed": "z3.json", "template": "qwen3_vl_nothink"},
            "template = 'qwen3_vl_nothink' is of a model",
        ),
        ({"learning_rat": 1, "deepspeed": "z3.json"}, "deepspeed = 'z3.json'"),
        ({"learning_rat": 1, "pref_beta": 0.1}, "unknown key 'learning_rat'"),
    ],
)
def test_the_first_real_obstacle_is_named_wherever_it_stands(tmp_path, keys, first):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys, sort_keys=False))
    with pytest.raises(UserError, match=re.escape(first)):
        load_train_config(["--config", str(tmp_path / "run.yaml")])


def test_the_command_line_may_take_an_obstacle_away(tmp_path):
    (tmp_path / "run.yaml").write_text("stage: dpo\npref_beta: 0.1\n")
    assert load_train_config(["--config", str(tmp_path / "run.yaml"), "--stage", "sft"]).lora_rank == 8


@pytest.mark.parametrize(
    "tokens",
    [{"add_tokens": "<a>"}, {"add_special_tokens": "<a>"}, {"resize_vocab": True}],
    ids=lambda t: next(iter(t)),
)
def test_with_new_tokens_a_file_trains_both_embeddings_whole_unless_it_names_others(tokens):
    file = {"stage": "sft", "finetuning_type": "lora", **tokens}
    ours, notes = translate(file)
    assert ours["additional_target"] == "embed_tokens,lm_head"
    assert any("embed_tokens and lm_head are trained whole, as in LLaMA-Factory" in note for note in notes)
    assert translate(file | {"additional_target": "norm"})[0]["additional_target"] == "norm"
    assert "additional_target" not in translate(tokens)[0]  # not LLaMA-Factory's file: only the new rows
    off = dict.fromkeys(tokens, False)
    assert "additional_target" not in translate({"stage": "sft", "finetuning_type": "lora", **off})[0]


@pytest.mark.parametrize("off", [False, None, 0, "", {}, "false", "none"])
def test_a_key_that_is_off_requests_nothing(off):
    names = [name for name, allowed in NEEDED.items() if "none" in allowed]
    refuse_other_training(dict.fromkeys(names, off))
    assert "deepspeed" in names and translate(dict.fromkeys(names, off)) == ({}, [])


def test_numbers_are_compared_as_numbers_however_yaml_reads_them():
    for workers in (1, "1", 1.0, "1e0"):
        refuse_other_training({"ray_num_workers": workers, "stage": "sft", "do_train": 1})
    with pytest.raises(UserError, match="ray_num_workers = 4 requests"):
        refuse_other_training({"ray_num_workers": 4})


@pytest.mark.parametrize(
    "dataset, said",
    [
        ("ridles", "nearest: 'riddles'"),
        ("preferences", "preferences: ranking, chosen is not supported"),
        ("quiz,exam", "dataset exam: data/dataset_info.json names its columns differently"),
        ("riddles,,quiz", "names nothing between two commas"),
    ],
)
def test_a_wrong_name_of_a_dataset_is_one_line(load, dataset, said):
    with pytest.raises(UserError) as error:
        load("lora_24gb", "--dataset", dataset)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_names_stand_for_files_hub_datasets_and_themselves(load, monkeypatch, tmp_path):
    assert load("lora_24gb", "--dataset", "riddles:0.7,on_the_hub:0.3").dataset == [
        "data/riddles.json:0.7",
        "some/dataset:0.3",
    ]
    (tmp_path / "run.yaml").write_text("dataset_dir: data\ndataset: [riddles, small_talk]\n")
    listed = load_train_config(["--config", str(tmp_path / "run.yaml")])
    assert listed.dataset == ["data/riddles.json", "data/small_talk.jsonl"] and listed.quantization_bit == 4
    assert load("lora_24gb", "--dataset", "quiz.jsonl,owner/name").dataset == [
        "data/quiz.jsonl",
        "owner/name",
    ]
    assert (
        load("lora_24gb", "--val_size", "0", "--eval_dataset", "riddles").eval_dataset == "data/riddles.json"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no data/dataset_info.json; set dataset_dir"):
        load_train_config(["--stage", "sft", "--dataset", "riddles"])


def test_columns_of_any_name_are_read_also_of_two_datasets_in_one_run(load, tmp_path):
    described = {
        "one": {"file_name": "one.jsonl", "columns": {"prompt": "q", "query": "ctx", "response": "a", "system": "sys"}},
        "two": {"file_name": "two.jsonl", "columns": {"prompt": "task", "response": "output", "history": "past"}},
        "talk": {
            "file_name": "talk.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "system": "sys"},
        },
    }  # fmt: skip
    rows = {
        "one": {"q": "Add.", "ctx": "1 2", "a": "3", "sys": "s", "output": "not this", "input": ""},
        "two": {"task": "Sing.", "output": "la", "past": [["a", "b"]]},
        "talk": {"conversations": SAID, "sys": "s"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(described))
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    config = load("lora_24gb", "--dataset_dir", str(tmp_path), "--dataset", "one,two,talk")
    one, two, talk = read_mixed(config.dataset, config)
    assert [m["content"] for m in one.messages] == ["s", "Add.\n1 2", "3"]
    assert [m["content"] for m in two.messages] == ["a", "b", "Sing.", "la"]
    assert [(m["role"], m["content"]) for m in talk.messages][0] == ("system", "s")
    (tmp_path / "training_config.yaml").write_text(config.to_yaml())
    assert load_train_config(["--config", str(tmp_path / "training_config.yaml")]) == config


def test_a_pretraining_file_learns_whole_texts_end_to_end(load, monkeypatch, tmp_path):
    """In LLaMA-Factory's words, the prompt of plain text is the column to learn; its stage pt packs."""
    config = load("lora_24gb", "--stage", "pt", "--dataset", "c4_demo")
    check(config, dataset="data/plain.txt", text_column="text", packing=True)
    assert load("lora_24gb", "--stage", "pt", "--dataset", "c4_demo", "--packing", "false").packing is False
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"wiki": {"file_name": "wiki.jsonl", "columns": {"prompt": "article"}}})
    )
    (tmp_path / "wiki.jsonl").write_text(json.dumps({"article": "one two", "prompt": "a", "completion": "b"}))
    for stage in ("pt", "sft"):
        config = load("lora_24gb", "--dataset_dir", str(tmp_path), "--stage", stage, "--dataset", "wiki")
        assert config.text_column == "article"
        names = ColumnNames(config.prompt_column, config.completion_column, None, config.text_column)
        assert [row.completion for row in read_rows(config.dataset, names)] == ["one two"]


def test_a_file_for_thoughts_and_long_prompts_is_trained_as_llama_factory_does(load):
    config = load("lora_24gb", "--template", "qwen3")
    check(config, template="qwen3_all", truncation="keep_answer")
    assert load("lora_24gb", "--truncation", "end").truncation == "end"
    assert load_train_config(["--template", "qwen3"]).template == "qwen3"
    assert load_train_config([]).truncation == "end"


@pytest.mark.parametrize(
    ("described", "source"),
    [
        ({"hf_hub_url": "a/b", "split": "train_sft"}, "a/b[train_sft]"),
        ({"hf_hub_url": "a/b", "subset": "main"}, "a/b/main"),
        ({"hf_hub_url": "a/b", "folder": "en", "split": "test"}, "a/b/en[test]"),
        ({"hf_hub_url": "a/b", "split": None, "subset": None}, "a/b"),
        ({"file_name": "one.jsonl", "split": "train"}, "{}/one.jsonl"),
        ({"file_name": "many", "split": "test"}, "{}/many[test]"),
    ],
)
def test_split_and_subset_of_an_entry_choose_the_files(load, tmp_path, described, source):
    (tmp_path / "many").mkdir()
    (tmp_path / "dataset_info.json").write_text("\ufeff" + json.dumps({"mine": described}), encoding="utf-8")
    config = load("lora_24gb", "--dataset_dir", str(tmp_path), "--dataset", "mine")
    assert config.dataset == source.format(tmp_path)


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """Read one row as an entry of dataset_info.json describes it."""
    monkeypatch.chdir(tmp_path)

    def read(row: dict, **entry) -> list:
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / "a,b.json").write_text(json.dumps([row]))
        (tmp_path / "data" / "dataset_info.json").write_text(
            json.dumps({"mine": {"file_name": "a,b.json"} | entry})
        )
        config = load_train_config(["--stage", "sft", "--dataset", "mine", "--template", "chatml"])
        ((path, _),) = parse_datasets(config.dataset)
        names = config.prompt_column, config.completion_column, config.messages_column, config.text_column
        return read_rows(path, ColumnNames(*names))

    return read


SAID = [{"from": "human", "value": "said"}, {"from": "gpt", "value": "there"}]
ROW = {
    "prompt": "p",
    "completion": "c",
    "instruction": "i",
    "output": "o",
    "messages": SAID,
    "conversations": SAID,
    "chat": SAID,
}


@pytest.mark.parametrize(
    "description, prompt",
    [
        ({}, "i"),
        ({"formatting": "alpaca"}, "i"),
        (
            {"columns": {"prompt": "instruction", "query": "input", "response": "output", "history": None}},
            "i",
        ),
        ({"columns": {"prompt": "prompt", "response": "output"}}, "p"),
        ({"formatting": "sharegpt"}, "said"),
        ({"formatting": "sharegpt", "columns": {"messages": "messages"}}, "said"),
        (
            {
                "columns": {"messages": "chat"},
                "tags": {
                    "role_tag": "from",
                    "content_tag": "value",
                    "observation_tag": "tool",
                    "system_tag": "system",
                },
            },
            "said",
        ),
    ],
)
def test_the_columns_of_an_entry_are_read_whatever_other_columns_a_row_has(entry, description, prompt):
    row = ROW | {"chat": ROW["chat"] if "columns" in description else "not this"}
    assert [row.prompt for row in entry(row, **description)] == [prompt]


@pytest.mark.parametrize(
    "wrong, said",
    [
        (
            {"columns": {"messages": "chat"}, "tags": {"user_tag": "customer"}},
            "user_tag is 'customer', and must be user or human",
        ),
        (
            {"formatting": "sharegpt", "tags": {"role_tag": "speaker"}},
            "role_tag is 'speaker', and must be from or role",
        ),
        ({"formatting": "xml"}, "formatting xml is not supported"),
        ({"columns": {"query": "text"}}, "columns query do not make an example; name prompt and response"),
        ({"columns": ["prompt", "response"]}, "columns must be an object, not ['prompt', 'response']"),
        ({"tags": "human"}, "tags must be an object, not 'human'"),
        ({"file_name": 5}, "file_name must be text, not 5"),
    ],
)
def test_an_entry_that_cannot_be_read_here_is_one_line(entry, wrong, said):
    with pytest.raises(UserError) as error:
        entry(ROW, **wrong)
    assert f"data/dataset_info.json, mine: {said}" in str(error.value)


@pytest.mark.parametrize(
    "index, said",
    [
        ("[1]", "dataset_info.json must hold an object, .*, not list"),
        ('{"mine": "a.json"}', "dataset_info.json, mine must hold an object such as .*, not 'a.json'"),
        ("{", "dataset_info.json is not valid JSON"),
    ],
)
def test_an_index_of_another_shape_is_one_line(monkeypatch, tmp_path, index, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset_info.json").write_text(index)
    with pytest.raises(UserError, match=said):
        load_train_config(["--dataset_dir", ".", "--dataset", "mine"])


@given(
    st.dictionaries(
        st.sampled_from(
            sorted(
                {field.name for field in fields(TrainConfig)}
                - VALUES.keys()
                - {"push_to_hub", "finetuning_type"}
            )
        ),
        st.integers() | st.text(max_size=9),
    )
)
def test_our_own_keys_pass_unchanged_if_there_are_no_others(values):
    assert translate(values) == (values, [])


@given(st.permutations([name for names in NO_EFFECT.values() for name in names.split()]), st.integers(0, 9))
def test_keys_without_effect_are_listed_and_dropped(names, count):
    values, notes = translate(dict.fromkeys(names[:count], "anything"))
    listed = [
        name for note in notes for name in note.removeprefix("no effect: ").partition(" (")[0].split(", ")
    ]
    assert values == {} and sorted(listed) == sorted(names[:count])


def test_no_key_has_two_meanings():
    own = {field.name for field in fields(TrainConfig)} | ALIASES.keys() | set(SWITCHES)
    named = [*TRANSLATED, *NEEDED, *(name for names in NO_EFFECT.values() for name in names.split())]
    named.remove("finetuning_type")  # the same key in both, of which NEEDED lists the values
    assert len(named) == len(set(named)) == len(KEYS) and not KEYS & own
    assert INSTEAD.keys() <= NEEDED.keys() and {*DEFAULTS, *VALUES} <= own
    ours = asdict(TrainConfig())
    assert all(ours[name] != value for name, value in DEFAULTS.items())


MEANINGS = {  # LLaMA-Factory's key: (the keys of a file, what they become here)
    "dataset_dir": ({"dataset_dir": "nowhere", "dataset": "a/b"}, {"dataset": "a/b"}),
    "neat_packing": ({"neat_packing": True}, {"packing": True}),
    "eval_strategy": (
        {"eval_strategy": "steps", "eval_steps": 5, "val_size": 2},
        {"eval_steps": 5, "val_size": 2},
    ),
    "evaluation_strategy": (
        {"evaluation_strategy": "epoch", "eval_steps": 5, "val_size": 2},
        {"val_size": 2},
    ),
    "disable_gradient_checkpointing": (
        {"disable_gradient_checkpointing": True},
        {"gradient_checkpointing": "off"},
    ),
    "pure_bf16": ({"pure_bf16": True}, {"bf16": True}),
    "add_special_tokens": ({"add_special_tokens": "<a>,<b>"}, {"new_special_tokens": "<a>,<b>"}),
    "pissa_init": ({"pissa_init": True}, {"init_lora_weights": "pissa_niter_16"}),
    "pissa_iter": ({"pissa_init": True, "pissa_iter": -1}, {"init_lora_weights": "pissa"}),
    "pissa_convert": ({"pissa_convert": True}, {}),
    "early_stopping_steps": ({"early_stopping_steps": 3}, {"early_stopping_patience": 3}),
    "fsdp": (
        {"fsdp": ["full_shard", "auto_wrap", "offload"]},
        {"parallel": "fsdp", "fsdp_offload": True},
    ),
    "per_gpu_train_batch_size": ({"per_gpu_train_batch_size": 3}, {"per_device_train_batch_size": 3}),
    "per_gpu_eval_batch_size": ({"per_gpu_eval_batch_size": 3}, {"per_device_eval_batch_size": 3}),
    "train_sampling_strategy": ({"train_sampling_strategy": "group_by_length"}, {"group_by_length": True}),
    "push_to_hub_model_id": (
        {"push_to_hub_model_id": "owner/name", "push_to_hub": True},
        {"push_to_hub": "owner/name"},
    ),
    "hub_model_id": ({"hub_model_id": "owner/name", "push_to_hub": True}, {"push_to_hub": "owner/name"}),
}


@pytest.mark.parametrize("key", MEANINGS)
def test_a_translated_key_becomes_the_key_that_means_the_same_here(key):
    theirs, ours = MEANINGS[key]
    assert translate(theirs)[0] == ours


def test_the_translated_keys_are_all_in_that_table():
    assert TRANSLATED.keys() == MEANINGS.keys()


@pytest.mark.parametrize("value", ["full_shard", "full_shard auto_wrap", ["full_shard"], True])
def test_fsdp_of_training_arguments_divides_the_frozen_weights(value):
    assert translate({"fsdp": value})[0] == {"parallel": "fsdp"}


@pytest.mark.parametrize("value", ["", [], False, None])
def test_fsdp_that_is_off_there_is_off_here(value):
    assert translate({"fsdp": value})[0] == {}


@pytest.mark.parametrize("value", ["shard_grad_op", "hybrid_shard auto_wrap", ["full_shard", "no_shard"]])
def test_other_ways_to_divide_a_model_are_refused_by_name(value):
    with pytest.raises(UserError, match=r"fsdp = .*(shard_grad_op|hybrid_shard|no_shard) is not done here"):
        translate({"fsdp": value})


@pytest.mark.parametrize(
    "given, start",
    [
        (dict(pissa_init=True), "pissa_niter_16"),
        (dict(pissa_init=True, pissa_iter=4), "pissa_niter_4"),
        (dict(pissa_init="true", pissa_iter=-1, pissa_convert=True), "pissa"),
        (dict(pissa_init=False, pissa_iter=4), None),
    ],
)
def test_pissa_init_is_a_start_and_its_conversion_is_always_done(given, start):
    ours, _ = translate(given)
    assert ours.get("init_lora_weights") == start and not ours.keys() & given.keys()
