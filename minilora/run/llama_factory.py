"""What the keys of a LLaMA-Factory file mean here: its files for supervised LoRA training run as they are.

Most keys are the same ones, as both trainers took them from Hugging Face. The others are of three kinds:

    with a meaning here        dataset_dir, neat_packing, eval_strategy, ...: put into this trainer's words
    without an effect          flash_attn, preprocessing_num_workers, ...: they change no number; accepted, and a line says why
    changing the training      stage: dpo, deepspeed, pissa_init, ...: refused by name unless they ask for what is done here anyway

What a file leaves out counts as well. LLaMA-Factory without `quantization_bit` does not quantize, and this
trainer does, in 4 bits. So a file with `stage` or `finetuning_type` is taken for one of LLaMA-Factory's, and
gets that trainer's defaults wherever they would change a number. What is said explicitly, in the file or on
the command line, holds.

`dataset: alpaca_en_demo` is a name in LLaMA-Factory, looked up in `dataset_dir/dataset_info.json`; where it
lies, its form and what its columns are called is read from there. Paths are relative to the working directory
in both.
"""

import os
from pathlib import Path

from minilora.data.rows import parse_datasets
from minilora.system.errors import UserError, suggestion
from minilora.system.files import read_json

LLAMA_FACTORY_ONLY = ("stage", "finetuning_type")  # keys that only a LLaMA-Factory file has
DEFAULTS = (
    dict(  # those of LLaMA-Factory and of the TrainingArguments below it, where this trainer's are other ones
        quantization_bit=None,
        lora_rank=8,
        lora_dropout=0.0,
        lora_target="all",
        cutoff_len=2048,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=5e-5,
        lr_scheduler_type="linear",
    )
)
TRANSLATED = {
    "dataset_dir": "the folder of dataset_info.json, which says what the names in `dataset` stand for",
    "neat_packing": "`packing`, which never lets documents see each other here",
    "eval_strategy": "`steps`: every `eval_steps`; `epoch`, `no`: at the end of every epoch",
    "evaluation_strategy": "`eval_strategy`",
    "disable_gradient_checkpointing": "`gradient_checkpointing: off`",
    "pure_bf16": "`bf16`; adapters are float32 all the same",
    "hub_model_id": "the name for `push_to_hub: true`, which is `push_to_hub: NAME` here",
}
VALUES = {  # other words for the same thing
    "optim": {"adamw_torch_fused": "adamw_torch"},
    "lr_scheduler_type": {"constant_with_warmup": "constant"},
    "template": {"qwen": "tokenizer", "qwen3_nothink": "chatml"},
}
NO_EFFECT = {  # why: which
    "examples are tokenized at the start, in this process": (
        "overwrite_cache preprocessing_num_workers preprocessing_batch_size dataloader_num_workers dataloader_pin_memory "
        "dataloader_prefetch_factor dataloader_persistent_workers remove_unused_columns data_shared_file_system"
    ),
    "the order of the examples comes from seed": "data_seed",
    "kernels are chosen by what the machine has": (
        "flash_attn enable_liger_kernel use_unsloth use_unsloth_gc use_v1_kernels use_reentrant_gc gradient_checkpointing_kwargs "
        "torch_compile use_fast_tokenizer low_cpu_mem_usage quantization_device_map"
    ),
    "norms and the loss are computed in float32 anyway": "upcast_layernorm upcast_lmhead_output",
    "what is in float32 is multiplied in float32": "tf32",
    "rows are text, and nothing else is loaded": "media_dir",
    "only inference asks for it": "infer_dtype",
    "nothing is fetched from ModelScope": "ms_hub_token",
    "code that comes with a model is never run": "trust_remote_code",
    "the settings of huggingface-hub hold: HF_HOME, HF_TOKEN": "cache_dir hf_hub_token hub_token",
    "loss.png and metrics.jsonl are always written": (
        "plot_loss logging_strategy logging_first_step logging_dir log_level disable_tqdm include_num_input_tokens_seen "
        "include_effective_tokens_per_second print_param_status compute_accuracy"
    ),
    "checkpoints are written every save_steps steps, and can be resumed": "save_strategy save_only_model save_safetensors",
    "held-out examples are evaluated if there are some, and before the first step": "do_eval eval_on_start eval_accumulation_steps",
    "torchrun and PyTorch's own settings hold": "ddp_timeout ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb local_rank",
    "there is nothing for it to change in this training": "create_new_adapter loraplus_lr_embedding pissa_iter use_kv_cache",
    "the mean is taken over all supervised tokens of a step": "average_tokens_across_devices",
}
_TRUE = ("true", "yes", "1")
_OFF = ("false", "no", "none", "null", "0", "", "{}", "[]")
NEEDED = {  # what these must be
    "stage": ("sft",),
    "finetuning_type": ("lora",),
    "do_train": _TRUE,
    "quantization_method": ("bnb", "bitsandbytes"),
    "mix_strategy": ("concat",),
    "ignore_pad_token_for_loss": _TRUE,
    "enable_thinking": _TRUE,
    "adam_beta1": ("0.9",),
    "adam_beta2": ("0.999",),
    "adam_epsilon": ("1e-08",),
    "metric_for_best_model": ("eval_loss", "loss"),
} | dict.fromkeys(  # and these must be off
    (
        "deepspeed fsdp fsdp_config use_ray do_predict predict_with_generate streaming tokenized_path interleave_probs "
        "tool_format eval_on_each_dataset adapter_name_or_path additional_target pissa_init pissa_convert use_galore use_apollo "
        "use_badam use_muon use_adam_mini use_llama_pro use_dft_loss use_asft_loss use_swanlab neftune_noise_alpha "
        "label_smoothing_factor shift_attn mixture_of_depths moe_aux_loss_coef rope_scaling resize_vocab add_tokens "
        "add_special_tokens new_special_tokens_config split_special_tokens train_from_scratch fp8 auto_find_batch_size use_cpu "
        "lr_scheduler_kwargs greater_is_better default_system"
    ).split(),
    _OFF,
)
INSTEAD = {
    "stage": "plain text (pt) is learned from a dataset with a text column; preferences are not",
    "deepspeed": "torchrun --nproc-per-node N scripts/train.py shares the batches between GPUs",
    "fsdp": "torchrun --nproc-per-node N scripts/train.py shares the batches between GPUs",
    "finetuning_type": "the nearest is lora with lora_target: all and a high rank",
    "mix_strategy": "give every dataset a weight, dataset: a.jsonl:0.7,b.jsonl:0.3",
    "interleave_probs": "give every dataset a weight, dataset: a.jsonl:0.7,b.jsonl:0.3",
    "adapter_name_or_path": "resume_from_checkpoint goes on with a run of this trainer's",
    "enable_thinking": "leave it out, as template: qwen3 learns to write <think> </think>; or choose template: chatml, without",
    "default_system": "give the rows a system message, or a column system",
    "do_predict": "scripts/evaluate.py does this after the training",
}
KEYS = {*TRANSLATED, *NEEDED, *(name for names in NO_EFFECT.values() for name in names.split())}


def translate(values: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """The keys of a run in this trainer's words, and lines about what has no effect here and which defaults
    were taken.

    Raises UserError for a key that asks for another kind of training.
    """
    of_llama_factory = any(name in values for name in LLAMA_FACTORY_ONLY)
    for name, value in values.items():
        if name in NEEDED and _word(value) not in NEEDED[name]:
            mend = INSTEAD.get(name) or (
                "leave it out" if NEEDED[name] is _OFF else f"it must be {NEEDED[name][0]}"
            )
            raise UserError(
                f"{name} = {value!r} is LLaMA-Factory's for a training that is not done here; {mend}"
            )
    notes = [
        f"no effect: {', '.join(found)} ({why})"
        for why, names in NO_EFFECT.items()
        if (found := _given(names, values))
    ]
    if (
        of_llama_factory and values.get("lr_scheduler_type") == "constant"
    ):  # which has no warm-up in transformers
        values = {
            name: value for name, value in values.items() if name not in ("warmup_steps", "warmup_ratio")
        }
    theirs = {name: value for name, value in values.items() if name in TRANSLATED}
    values = {
        name: VALUES.get(name, {}).get(str(value), value)
        for name, value in values.items()
        if name not in KEYS
    }

    if of_llama_factory or "dataset_dir" in theirs:
        values |= _look_up(values, Path(str(theirs.get("dataset_dir", "data"))) / "dataset_info.json")
    for name, own, meant in (
        ("neat_packing", "packing", True),
        ("disable_gradient_checkpointing", "gradient_checkpointing", "off"),
        ("pure_bf16", "bf16", True),
    ):
        if _word(theirs.get(name)) in _TRUE:
            values[own] = meant
    if _word(values.get("push_to_hub")) in _TRUE:
        if not (name := theirs.get("hub_model_id")):
            raise UserError(
                "push_to_hub = true does not say where to; name a repository of yours: push_to_hub: owner/name"
            )
        values["push_to_hub"] = name
    elif _word(values.get("push_to_hub")) in _OFF:
        values.pop("push_to_hub", None)
    strategy = _word(theirs.get("eval_strategy", theirs.get("evaluation_strategy", "no")))
    if strategy not in ("steps", "epoch", *_OFF):
        raise UserError(f"eval_strategy = {strategy!r} is not known; choose from steps, epoch, no")
    if strategy == "steps":
        values.setdefault("eval_steps", values.get("logging_steps", 10))
    elif of_llama_factory or "eval_strategy" in theirs or "evaluation_strategy" in theirs:
        values.pop("eval_steps", None)

    if of_llama_factory:
        adapter = ("lora_rank", "lora_dropout", "lora_target") if "preset" in values else ()
        taken = {
            name: value for name, value in DEFAULTS.items() if name not in values and name not in adapter
        }
        if taken:
            said = ", ".join(f"{name} {'none' if value is None else value}" for name, value in taken.items())
            notes.append(f"a LLaMA-Factory file, with LLaMA-Factory's defaults: {said}")
        values = taken | values
    return values, notes


def _word(value: object) -> str:
    """Values from YAML and from the command line alike: True -> 'true', '1.0e-8' -> '1e-08'."""
    text = str(value).strip().lower()
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


def _given(names: str, values: dict[str, object]) -> list[str]:
    return [name for name in names.split() if name in values]


# ---- datasets by name ------------------------------------------------------------------------------------------------------

_ENTRY = {
    "file_name": str,
    "hf_hub_url": str,
    "ms_hub_url": str,
    "om_hub_url": str,
    "formatting": str,
    "columns": dict,
    "tags": dict,
}
_COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
}
_TAGS = {  # roles that are named as here; those of tools may have any name, as messages that have them are refused
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "system_tag": ("system",),
}


def _look_up(values: dict[str, object], index: Path) -> dict[str, object]:
    """Places for the names of datasets, and what their columns are called where it is unusual."""
    known = read_json(index) if os.path.isfile(index) else {}
    if not isinstance(known, dict):
        raise UserError(
            f'{index} must hold an object, {{"name": {{"file_name": "my.json"}}}}, not {type(known).__name__}'
        )
    found, columns = {}, {}
    for key in ("dataset", "eval_dataset"):
        if values.get(key) in (None, "none", "null"):
            continue
        places = []
        for name, weight in parse_datasets(values[key]):
            place, renamed = _read_entry(name, known, index)
            if any(columns.get(what, column) != column for what, column in renamed.items()):
                raise UserError(
                    f"{key} {name}: {index} calls its columns otherwise than another's; make them alike in the files"
                )
            columns |= renamed
            places.append(place if weight is None else f"{place}:{float(weight):g}")
        found[key] = places if len(places) > 1 or "," in places[0] else places[0]
    return found | {name: column for name, column in columns.items() if name not in values}


def _read_entry(name: str, known: dict, index: Path) -> tuple[str, dict[str, str]]:
    """The place of a dataset, and what its columns are called where its rows are to be read by them."""
    entry, place = known.get(name), f"{index}, {name}"
    if entry is None:
        if os.path.isfile(index.parent / name):
            return str(index.parent / name), {}
        if "/" in name or os.path.exists(name):
            return name, {}
        fault = (
            f"not in {index}{suggestion(name, known)}"
            if known
            else f"and there is no {index}; set dataset_dir, or name a file"
        )
        raise UserError(f"dataset {name!r} is no file, {fault}")
    if not isinstance(entry, dict):
        raise UserError(f'{place} must hold an object such as {{"file_name": "my.json"}}, not {entry!r}')
    for field, kind in _ENTRY.items():
        if not isinstance(value := entry.get(field), kind | None):
            raise UserError(
                f"{place}: {field} must be {'text' if kind is str else 'an object'}, not {value!r}"
            )
    form = entry.get("formatting") or "alpaca"
    columns = {what: column for what, column in (entry.get("columns") or {}).items() if column is not None}
    odd = [field for field, value in entry.items() if field not in _ENTRY and value not in (None, False)]
    odd += [what for what in columns if what not in _COLUMNS and what != "messages"]
    odd += [f"formatting {form}"] if form not in ("alpaca", "sharegpt", "openai") else []
    if odd:
        raise UserError(
            f"{place}: {', '.join(odd)} is not supported; write the examples into a file of their own"
        )
    path = entry.get("hf_hub_url") or str(index.parent / (entry.get("file_name") or name))
    if form in ("sharegpt", "openai") or "messages" in columns:
        _check_tags(entry.get("tags") or {}, place)
        if columns.get("system", "system") != "system":
            raise UserError(f"{place}: call the column {columns['system']} system")
        return path, {"messages_column": columns.get("messages", "conversations")}
    if columns and not columns.keys() >= {"prompt", "response"}:
        raise UserError(
            f"{place}: columns {', '.join(columns)} are no whole example; name prompt and response"
        )
    if len(columns) == 2:
        return path, {"prompt_column": columns["prompt"], "completion_column": columns["response"]}
    if odd := [str(column) for what, column in columns.items() if _COLUMNS[what] != column]:
        raise UserError(
            f"{place}: call the columns {', '.join(odd)} instruction, input, output, system and history"
        )
    return path, {}


def _check_tags(tags: dict[str, object], place: str) -> None:
    """Messages are {"role", "content"} or {"from", "value"}, and roles have the names they have everywhere."""
    for tag, value in tags.items():
        if tag in _TAGS and value is not None and value not in _TAGS[tag]:
            raise UserError(
                f"{place}: {tag} is {value!r}, and must be {' or '.join(_TAGS[tag])}; call it so in the file"
            )
    role, content = (tags.get(tag) or _TAGS[tag][0] for tag in ("role_tag", "content_tag"))
    if (role == "role") != (content == "content"):
        raise UserError(
            f"{place}: role_tag {role} goes with content_tag {'content' if role == 'role' else 'value'}, not {content}"
        )
