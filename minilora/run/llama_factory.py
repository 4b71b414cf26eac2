"""LLaMA-Factory's keys in this trainer's words: its files for supervised LoRA training run as they are.

Most keys are the same, because both trainers took them from Hugging Face. The others are of three kinds:

    translated     dataset_dir, neat_packing, eval_strategy, ...: become keys of this trainer
    no effect      flash_attn, preprocessing_num_workers, ...: change no number; accepted, and a line says why
    refused        stage: dpo, deepspeed, use_galore, ...: would change the training; an error names the key,
                   unless its value requests what this trainer does anyway

The keys that a file leaves out count too. Without `quantization_bit` LLaMA-Factory does not quantize, but
this trainer quantizes to 4 bits. So a file with `stage` or `finetuning_type` is taken to be LLaMA-Factory's,
and gets LLaMA-Factory's defaults wherever they would change a number. A value given in the file or on the
command line overrides every default.

A name in `dataset` is looked up in `dataset_dir/dataset_info.json`: `minilora.run.dataset_info`.
"""

from pathlib import Path

from minilora.run.dataset_info import resolve_datasets
from minilora.system.errors import UserError

MARKERS = ("stage", "finetuning_type")  # either key marks a file as LLaMA-Factory's
DEFAULTS = {  # of LLaMA-Factory, or of the TrainingArguments that it builds on, where this trainer's differ
    "quantization_bit": None,
    "lora_rank": 8,
    "lora_dropout": 0.0,
    "lora_target": "all",
    "cutoff_len": 2048,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
}
TRANSLATED = {  # key: its meaning here
    "dataset_dir": "the folder of dataset_info.json, which resolves the names in `dataset`",
    "neat_packing": "`packing`; packed examples never attend to each other here",
    "eval_strategy": "`steps`: every `eval_steps`; `epoch`, `no`: at the end of every epoch",
    "evaluation_strategy": "`eval_strategy`",
    "disable_gradient_checkpointing": "`gradient_checkpointing: off`",
    "pure_bf16": "`bf16`; adapters stay float32",
    "pissa_init": "`init_lora_weights: pissa_niter_16`, of `pissa_iter` iterations; -1: `pissa`",
    "pissa_iter": "see `pissa_init`",
    "pissa_convert": "always done: an adapter is saved as plain LoRA",
    "add_special_tokens": "`new_special_tokens`",
    "hub_model_id": "the repository for `push_to_hub: true`, which is `push_to_hub: NAME` here",
}
VALUES = {  # key: {LLaMA-Factory's value: the same value here}
    "optim": {"adamw_torch_fused": "adamw_torch"},
    "lr_scheduler_type": {"constant_with_warmup": "constant"},
    "template": {"qwen": "tokenizer", "qwen3_nothink": "chatml"},
}
NO_EFFECT = {  # the reason: the keys
    "examples are tokenized at the start, in this process": (
        "overwrite_cache preprocessing_num_workers preprocessing_batch_size dataloader_num_workers "
        "dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers "
        "remove_unused_columns data_shared_file_system"
    ),
    "seed alone determines the order of the examples": "data_seed",
    "the machine determines the kernels": (
        "flash_attn enable_liger_kernel use_unsloth use_unsloth_gc use_v1_kernels use_reentrant_gc "
        "gradient_checkpointing_kwargs torch_compile use_fast_tokenizer low_cpu_mem_usage "
        "quantization_device_map"
    ),
    "norms and the loss are always computed in float32": "upcast_layernorm upcast_lmhead_output",
    "float32 matrices are always multiplied in float32": "tf32",
    "rows are text, and no other media are loaded": "media_dir",
    "only inference uses it": "infer_dtype",
    "nothing is fetched from ModelScope": "ms_hub_token",
    "code that comes with a model is never run": "trust_remote_code",
    "huggingface-hub reads its own settings: HF_HOME, HF_TOKEN": "cache_dir hf_hub_token hub_token",
    "loss.png and metrics.jsonl are always written": (
        "plot_loss logging_strategy logging_first_step logging_dir log_level disable_tqdm "
        "include_num_input_tokens_seen include_effective_tokens_per_second print_param_status "
        "compute_accuracy"
    ),
    "checkpoints are written every save_steps steps and can be resumed": (
        "save_strategy save_only_model save_safetensors"
    ),
    "held-out examples are always evaluated, and also before the first step": (
        "do_eval eval_on_start eval_accumulation_steps"
    ),
    "torchrun and PyTorch read their own settings": (
        "ddp_timeout ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb local_rank"
    ),
    "it changes nothing in this training": ("create_new_adapter loraplus_lr_embedding use_kv_cache"),
    "the loss is the mean over all supervised tokens of a step": "average_tokens_across_devices",
}
_TRUE = ("true", "yes", "1")
_OFF = ("false", "no", "none", "null", "0", "", "{}", "[]")
_MUST_BE_OFF = """
    deepspeed fsdp fsdp_config use_ray do_predict predict_with_generate streaming tokenized_path
    interleave_probs tool_format eval_on_each_dataset use_galore use_apollo use_badam use_muon use_adam_mini
    use_llama_pro use_dft_loss use_asft_loss use_swanlab neftune_noise_alpha label_smoothing_factor
    shift_attn mixture_of_depths moe_aux_loss_coef rope_scaling new_special_tokens_config
    split_special_tokens train_from_scratch fp8 auto_find_batch_size use_cpu lr_scheduler_kwargs
    greater_is_better default_system
    """.split()
NEEDED = {  # key: the values that this trainer accepts, as `_normalize` writes them
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
} | dict.fromkeys(_MUST_BE_OFF, _OFF)
INSTEAD = {  # key: advice to whoever gave it another value than NEEDED
    "new_special_tokens_config": "name the tokens in new_special_tokens, without descriptions",
    "stage": "plain text (pt) is learned from a dataset with a text column; preferences are not",
    "deepspeed": "torchrun --nproc-per-node N scripts/train.py shares the batches between GPUs",
    "fsdp": "torchrun --nproc-per-node N scripts/train.py shares the batches between GPUs",
    "finetuning_type": "the nearest is lora with lora_target: all and a high rank",
    "mix_strategy": "give every dataset a weight, dataset: a.jsonl:0.7,b.jsonl:0.3",
    "interleave_probs": "give every dataset a weight, dataset: a.jsonl:0.7,b.jsonl:0.3",
    "enable_thinking": "template: qwen3 learns to write <think> </think> and template: chatml does not",
    "default_system": "give the rows a system message, or a column system",
    "do_predict": "scripts/evaluate.py does this after the training",
}
KEYS = {*TRANSLATED, *NEEDED, *(name for names in NO_EFFECT.values() for name in names.split())}


def translate(values: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """(settings, notes): the same run in this trainer's keys, and lines to print.

    The notes name the keys without an effect, and the defaults taken from LLaMA-Factory. Raises UserError for
    a key that requests another training.
    """
    is_llama_factory = any(name in values for name in MARKERS)
    _refuse_other_training(values)
    notes = _ignored_keys(values)
    theirs = {name: value for name, value in values.items() if name in TRANSLATED}
    ours = {
        name: VALUES.get(name, {}).get(str(value), value)
        for name, value in values.items()
        if name not in KEYS
    }

    if is_llama_factory and values.get("lr_scheduler_type") == "constant":  # no warm-up in transformers
        ours = {name: value for name, value in ours.items() if name not in ("warmup_steps", "warmup_ratio")}
    if is_llama_factory or "dataset_dir" in theirs:
        index_file = Path(str(theirs.get("dataset_dir", "data"))) / "dataset_info.json"
        ours |= resolve_datasets(ours, index_file)
    _translate_switches(theirs, ours)
    _translate_pissa(theirs, ours)
    _translate_push_to_hub(theirs, ours)
    _translate_eval_strategy(theirs, ours, is_llama_factory)
    if "add_special_tokens" in theirs:
        ours["new_special_tokens"] = theirs["add_special_tokens"]
    if is_llama_factory:
        notes += _train_embeddings(ours)
        defaults = _missing_defaults(ours)
        notes += _defaults_taken(defaults)
        ours = defaults | ours
    return ours, notes


def _refuse_other_training(values: dict[str, object]) -> None:
    """Raise UserError for the first key whose value requests another training."""
    for name, value in values.items():
        if name not in NEEDED or _normalize(value) in NEEDED[name]:
            continue
        generic = "leave it out" if NEEDED[name] is _OFF else f"it must be {NEEDED[name][0]}"
        raise UserError(
            f"{name} = {value!r} requests a training that minilora does not do; {INSTEAD.get(name, generic)}"
        )


def _ignored_keys(values: dict[str, object]) -> list[str]:
    """One line for each reason: the given keys that have no effect."""
    notes = []
    for reason, names in NO_EFFECT.items():
        if given := [name for name in names.split() if name in values]:
            notes.append(f"no effect: {', '.join(given)} ({reason})")
    return notes


def _translate_switches(theirs: dict[str, object], ours: dict[str, object]) -> None:
    """Set in `ours` the keys that LLaMA-Factory's booleans stand for."""
    for switch, name, value in (
        ("neat_packing", "packing", True),
        ("disable_gradient_checkpointing", "gradient_checkpointing", "off"),
        ("pure_bf16", "bf16", True),
    ):
        if _normalize(theirs.get(switch)) in _TRUE:
            ours[name] = value


def _train_embeddings(ours: dict[str, object]) -> list[str]:
    """With new tokens LLaMA-Factory trains the embedding and the head whole, unless the file names others."""
    keys = ("new_special_tokens", "add_tokens", "resize_vocab")
    given = [name for name in keys if _normalize(ours.get(name)) not in _OFF]
    if not given or ours.get("additional_target") is not None:
        return []
    ours["additional_target"] = "embed_tokens,lm_head"
    return [f"{given[0]}: embed_tokens and lm_head are trained whole, as in LLaMA-Factory"]


def _translate_pissa(theirs: dict[str, object], ours: dict[str, object]) -> None:
    """`pissa_init: true` is `init_lora_weights: pissa_niter_N`, N = `pissa_iter` or 16; -1: `pissa`."""
    if _normalize(theirs.get("pissa_init")) in _TRUE:
        iterations = _normalize(theirs.get("pissa_iter", 16))
        ours["init_lora_weights"] = "pissa" if iterations == "-1" else f"pissa_niter_{iterations}"


def _translate_push_to_hub(theirs: dict[str, object], ours: dict[str, object]) -> None:
    """`push_to_hub: true` with `hub_model_id: NAME` is `push_to_hub: NAME` here."""
    requested = _normalize(ours.get("push_to_hub"))
    if requested in _TRUE:
        if not theirs.get("hub_model_id"):
            raise UserError("push_to_hub = true names no repository; write push_to_hub: owner/name")
        ours["push_to_hub"] = theirs["hub_model_id"]
    elif requested in _OFF:
        ours.pop("push_to_hub", None)


def _translate_eval_strategy(
    theirs: dict[str, object], ours: dict[str, object], is_llama_factory: bool
) -> None:
    """`eval_steps` counts only with the strategy `steps`, where it is `logging_steps` by default."""
    given = "eval_strategy" in theirs or "evaluation_strategy" in theirs
    strategy = _normalize(theirs.get("eval_strategy", theirs.get("evaluation_strategy", "no")))
    if strategy not in ("steps", "epoch", *_OFF):
        raise UserError(f"eval_strategy = {strategy!r} is not known; choose from steps, epoch, no")
    if strategy == "steps":
        ours.setdefault("eval_steps", ours.get("logging_steps", 10))
    elif is_llama_factory or given:
        ours.pop("eval_steps", None)


def _missing_defaults(ours: dict[str, object]) -> dict[str, object]:
    """LLaMA-Factory's defaults for the keys that are not given. A preset gives the adapter's."""
    given = {*ours}
    if "preset" in ours or "adapter_name_or_path" in ours:
        given |= {"lora_rank", "lora_dropout", "lora_target"}
    return {name: value for name, value in DEFAULTS.items() if name not in given}


def _defaults_taken(defaults: dict[str, object]) -> list[str]:
    """One line that lists them, or none."""
    shown = ", ".join(f"{name} {'none' if value is None else value}" for name, value in defaults.items())
    return [f"a LLaMA-Factory file, with LLaMA-Factory's defaults: {shown}"] if defaults else []


def _normalize(value: object) -> str:
    """The same text for a value from YAML and from the command line: True -> "true", "1.0e-8" -> "1e-08"."""
    text = str(value).strip().lower()
    try:
        return f"{float(text):g}"
    except ValueError:
        return text
