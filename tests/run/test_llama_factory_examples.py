"""LLaMA-Factory's example files: those of a training of LoRA or all weights on text run, the others name their obstacle."""

from dataclasses import fields

import keys
import pytest
import yaml
from support.project import ROOT

from minilora.run.llama_factory import KEYS
from minilora.run.settings import ALIASES, TrainConfig

FOLDER = ROOT / "tests" / "run" / "llama_factory"
EXAMPLES = yaml.safe_load((FOLDER / "examples.yaml").read_text(encoding="utf-8"))
FILES = EXAMPLES["files"]
RUN = """
    ascend/qwen3_full_sft_fsdp2.yaml extras/fsdp_qlora/llama3_lora_sft.yaml extras/loraplus/llama3_lora_sft.yaml
    extras/pissa/llama3_lora_sft.yaml megatron_bridge/llama3_sft.yaml train_lora/qwen3_lora_sft.yaml
    train_lora/qwen3_lora_pretrain.yaml
    train_qlora/qwen3_lora_sft_bnb_npu.yaml train_qlora/qwen3_lora_sft_otfq.yaml
    """.split()
OBSTACLES = """
    stage finetuning_type template compute_environment export_dir infer_backend train_dataset peft_config
    do_predict deepspeed use_kt ray_num_workers tokenized_path fp8 pipeline_model_parallel_size
    use_adam_mini use_apollo use_badam use_dft_loss use_eaft_loss use_galore use_muon mixture_of_depths dataset
    """.split()


def test_the_page_of_example_files_is_up_to_date_and_has_them_all():
    page = keys.EXAMPLES_PAGE.read_text(encoding="utf-8")
    assert page == keys.examples_page(), "run python scripts/dev/keys.py"
    assert all(page.count(f"`{name}`") == 1 for name in FILES)


@pytest.mark.parametrize("name", RUN)
def test_an_example_of_a_training_on_text_trains_as_it_is(
    name, run_trainer, model_dir, monkeypatch, tmp_path
):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(FILES[name]))
    monkeypatch.chdir(FOLDER)
    # Another model, so that nothing is fetched, and what a model of 64 positions without a chat template needs.
    smaller = ["--model", model_dir, "--template", "plain", "--cutoff_len", 64, "--bf16", "false"]
    short = ["--max_steps", 1, "--warmup_ratio", 0, "--warmup_steps", 0, "--output_dir", tmp_path / "out"]
    code, out, err = run_trainer("--config", tmp_path / "run.yaml", *smaller, *short)
    assert code == 0, err
    trained = "model" if FILES[name]["finetuning_type"] == "full" else "adapter_model"
    assert "no effect: " in out and (tmp_path / "out" / f"{trained}.safetensors").is_file()


@pytest.mark.parametrize("name", EXAMPLES["arguments"].split())
def test_every_setting_of_llama_factory_is_known(name):
    assert name in KEYS | {field.name for field in fields(TrainConfig)} | ALIASES.keys()


def test_only_those_run():
    assert sorted(RUN) == [name for name in sorted(FILES) if not keys.outcome(name, EXAMPLES)[0]]


@pytest.mark.parametrize("name", [name for name in FILES if name not in RUN])
def test_another_example_is_refused_in_one_line_by_its_first_obstacle(name):
    values, (error, _) = FILES[name], keys.outcome(name, EXAMPLES)
    obstacle = error.split()[0]
    assert "\n" not in error and "; " in error
    if values.get("stage", "sft") not in ("sft", "pt"):
        assert obstacle == "stage"
    elif values.get("finetuning_type", "lora") not in ("lora", "full"):
        assert obstacle == "finetuning_type"
    elif "vl" in values.get("template", ""):
        assert obstacle == "template"
    elif obstacle == "quantization_config":  # of the model
        assert len(EXAMPLES["models"][values["model_name_or_path"]].split()) == 2  # the second quantized it
    else:
        assert obstacle in OBSTACLES and obstacle in values
