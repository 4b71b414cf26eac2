"""LLaMA-Factory's keys in this trainer's words: its files for supervised LoRA training run as they are.

Most keys are the same, because both trainers took them from Hugging Face; `minilora.run.training_arguments`
has the rest of Hugging Face's. LLaMA-Factory's own are of the same three kinds:

    translated     dataset_dir, neat_packing, early_stopping_steps, ...: become keys of this trainer
    no effect      flash_attn, preprocessing_num_workers, ...: change no number; accepted, and a line says why
    refused        stage: dpo, use_galore, export_dir, ...: would change the training, or are no training; an
                   error names the key, unless its value requests what this trainer does anyway

A file that cannot run is refused by its first real obstacle: another kind of training, then another kind of
model, then the rest. A key that this trainer has never heard of is named only after those.

The keys that a file leaves out count too. Without `quantization_bit` LLaMA-Factory does not quantize, but
this trainer quantizes to 4 bits. So a file with `stage` or `finetuning_type` is taken to be LLaMA-Factory's,
and gets LLaMA-Factory's defaults wherever they would change a number. A value given in the file or on the
command line overrides every default. (This trainer's own files hold all of its keys: `finetuning_type` too,
but `preset` beside it and no `stage`.)

A name in `dataset` is looked up in `dataset_dir/dataset_info.json`: `minilora.run.dataset_info`.
"""

from pathlib import Path

from minilora.run import training_arguments
from minilora.run.dataset_info import resolve_datasets
from minilora.run.training_arguments import OFF, TRUE, normalize
from minilora.system.errors import UserError
from minilora.system.schema import shown

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
    "truncation": "keep_answer",
}
TRANSLATED = training_arguments.TRANSLATED | {  # key: its meaning here
    "dataset_dir": "the folder of dataset_info.json, which resolves the names in `dataset`",
    "neat_packing": "`packing`; packed examples never attend to each other here",
    "disable_gradient_checkpointing": "`gradient_checkpointing: off`",
    "pure_bf16": "`bf16`; adapters stay float32",
    "pissa_init": "`init_lora_weights: pissa_niter_16`, of `pissa_iter` iterations; -1: `pissa`",
    "pissa_iter": "see `pissa_init`",
    "pissa_convert": "always done: an adapter is saved as plain LoRA",
    "add_special_tokens": "`new_special_tokens`",
    "early_stopping_steps": "`early_stopping_patience`",
}
VALUES = training_arguments.VALUES | {  # key: {LLaMA-Factory's value: the same value here}
    "template": {"qwen": "tokenizer", "ministral": "tokenizer"}
    | dict.fromkeys(("qwen3_nothink", "yi", "smollm"), "chatml"),
}
# In LLaMA-Factory's files only: there, every answer keeps its thoughts, in Qwen's own template the last one.
TEMPLATES = {"qwen3": "qwen3_all"}
RENAMED = {
    "add_special_tokens": "new_special_tokens",
    "early_stopping_steps": "early_stopping_patience",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}
SEEING = """
    dots_ocr ernie_vl gemma3 gemma3n gemma4 gemma4n glm4v glm4_5v glm_ocr granite3_vision intern_s1 intern_vl
    keye_vl kimi_vl lfm2_vl llama4 llava llava_next llava_next_llama3 llava_next_mistral llava_next_qwen
    llava_next_video llava_next_video_mistral llava_next_video_yi llava_next_yi mimo_vl minicpm_o minicpm_v
    minicpm_v_4_6 ministral3 mistral_small mllama moss_vl paligemma paligemma_chat pixtral qwen2_audio
    qwen2_omni qwen2_vl qwen3_5 qwen3_5_nothink qwen3_6 qwen3_omni qwen3_omni_nothink qwen3_vl
    qwen3_vl_nothink video_llava yi_vl youtu_vl
    """.split()  # templates of models that see or hear
NO_EFFECT = training_arguments.NO_EFFECT | {  # the reason: the keys
    "examples are tokenized once, at the start": (
        "overwrite_cache preprocessing_num_workers preprocessing_batch_size buffer_size "
        "data_shared_file_system"
    ),
    "the machine determines the kernels and where weights lie": (
        "flash_attn enable_liger_kernel use_unsloth use_unsloth_gc use_v1_kernels use_reentrant_gc "
        "use_fast_tokenizer low_cpu_mem_usage quantization_device_map offload_folder"
    ),
    "norms and the loss are always computed in float32": "upcast_layernorm upcast_lmhead_output",
    "rows are text, and no other media are loaded": (
        "media_dir freeze_vision_tower freeze_multi_modal_projector"
    ),
    "only inference uses it": (
        "infer_dtype use_kv_cache do_sample temperature top_p top_k num_beams max_new_tokens "
        "repetition_penalty length_penalty skip_special_tokens eval_num_beams"
    ),
    "nothing is fetched from ModelScope or Modelers": "ms_hub_token om_hub_token",
    "code that comes with a model is never run": "trust_remote_code",
    "huggingface-hub reads its own settings, such as HF_HOME": "cache_dir hf_hub_token",
    "loss.png and metrics.jsonl always tell the course of a run": (
        "plot_loss include_effective_tokens_per_second print_param_status compute_accuracy"
    ),
    "PyTorch shares the batches between GPUs": (
        "use_distributed_optimizer overlap_param_gather overlap_grad_reduce recompute_granularity "
        "recompute_method recompute_num_layers bias_activation_fusion apply_rope_fusion "
        "masked_softmax_fusion cross_entropy_loss_fusion moe_grouped_gemm moe_token_dispatcher_type "
        "calculate_per_token_loss account_for_embedding_in_pipeline_split "
        "account_for_loss_in_pipeline_split extra_config"
    ),
    "bf16 and fp16 alone choose the dtype": "mixed_precision compute_dtype",
    "an adapter is always saved as PEFT's": "export_hf_on_finish",
    "it changes nothing in this training": "create_new_adapter loraplus_lr_embedding",
    "it counts only with a method that is off": """
        pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing simpo_gamma ld_alpha
        kto_chosen_weight kto_rejected_weight ppo_buffer_size ppo_epochs ppo_score_norm ppo_target
        ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model
        reward_model_adapters reward_model_quantization_bit reward_model_type
        freeze_trainable_layers freeze_trainable_modules freeze_extra_modules
        oft_rank oft_block_size oft_target module_dropout asft_alpha eaft_alpha
        galore_target galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise
        apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type
        apollo_scale_type apollo_layerwise apollo_scale_front
        badam_mode badam_start_block badam_switch_mode badam_switch_interval badam_update_ratio
        badam_mask_mode badam_verbose fp8_backend fp8_enable_fsdp_float8_all_gather
        swanlab_project swanlab_workspace swanlab_run_name swanlab_mode swanlab_api_key swanlab_logdir
        swanlab_lark_webhook_url swanlab_lark_secret
        kt_config kt_cpu_activation kt_weight_path kt_non_expert_weight_path kt_expert_checkpoint_path
        kt_use_lora_experts kt_lora_expert_num kt_lora_expert_intermediate_size
        megatron_bridge_args hyper_parallel_args hyper_parallel_cp_size
        export_size export_device export_quantization_bit export_quantization_dataset
        export_quantization_nsamples export_quantization_maxlen export_legacy_format export_hub_model_id
        vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank vllm_config sglang_maxlen
        sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend ray_init_kwargs
        master_addr master_port
        profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat
        profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules
    """,
}
MEDIA = """
    image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels video_min_pixels
    video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_language_model
    """.split()
PARALLEL = """
    ray_num_workers tensor_model_parallel_size pipeline_model_parallel_size expert_model_parallel_size
    context_parallel_size virtual_pipeline_model_parallel_size
    """.split()
NOT_TRAINING = ("compute_environment", "export_dir", "infer_backend", "train_dataset", "peft_config")
_MUST_BE_OFF = """
    predict_with_generate streaming tokenized_path interleave_probs tool_format eval_on_each_dataset
    use_galore use_apollo use_badam use_muon use_adam_mini use_llama_pro use_dft_loss use_asft_loss
    use_eaft_loss use_swanlab shift_attn mixture_of_depths moe_aux_loss_coef rope_scaling
    new_special_tokens_config split_special_tokens train_from_scratch fp8 default_system preserve_thinking
    disable_shuffling adapter_folder use_mca use_megatron_bridge use_hyper_parallel use_kt
    enable_torch_profiler sequence_parallel use_packed_sequences megatron_pretrained_checkpoint
    """.split()
NEEDED = (
    {  # key: the values that this trainer accepts, as `normalize` writes them; the first obstacle is named
        "stage": ("sft", "pt"),
        "finetuning_type": ("lora", "full"),
    }
    | dict.fromkeys((*MEDIA, *NOT_TRAINING), OFF)
    | training_arguments.NEEDED
    | dict.fromkeys(_MUST_BE_OFF, OFF)
    | {
        "do_train": TRUE,
        "quantization_method": ("bnb", "bitsandbytes"),
        "mix_strategy": ("concat",),
        "ignore_pad_token_for_loss": TRUE,
        "enable_thinking": TRUE,
        "init_special_tokens": ("noise_init",),
    }
    | dict.fromkeys(PARALLEL, ("1", *OFF))
)
_TEXT_ONLY = "only models of text are trained"
_OWN_FORMAT = "write model_name_or_path, dataset and lora_rank, as docs/keys.md lists them"
_TORCHRUN = training_arguments.INSTEAD["deepspeed"]
INSTEAD = (  # key: advice to whoever gave it another value than NEEDED
    training_arguments.INSTEAD
    | dict.fromkeys(MEDIA, _TEXT_ONLY)
    | dict.fromkeys((*PARALLEL, "use_mca", "use_megatron_bridge", "use_hyper_parallel"), _TORCHRUN)
    | {
        "compute_environment": _TORCHRUN,
        "use_packed_sequences": "write packing: true",
        "export_dir": "scripts/merge.py writes the merged model",
        "infer_backend": "scripts/chat.py answers with a trained adapter",
        "train_dataset": _OWN_FORMAT,
        "peft_config": _OWN_FORMAT,
        "new_special_tokens_config": "name the tokens in new_special_tokens, without descriptions",
        "stage": "sft learns answers and pt plain text; preferences and rewards are not learned",
        "finetuning_type": "lora trains an adapter and full all weights",
        "do_train": "scripts/evaluate.py evaluates without training",
        "quantization_method": "write bnb: weights are quantized as bitsandbytes does it",
        "ignore_pad_token_for_loss": "write true: padding is never learned",
        "mix_strategy": "give every dataset a weight, dataset: a.jsonl:0.7,b.jsonl:0.3",
        "interleave_probs": "give every dataset a weight, dataset: a.jsonl:0.7,b.jsonl:0.3",
        "enable_thinking": "template: qwen3 learns to write <think> </think> and template: chatml does not",
        "default_system": "give the rows a system message, or a column system",
        "tokenized_path": "scripts/prepare.py tokenizes a dataset once, for many trainings",
        "init_special_tokens": "new rows begin at the mean of the old ones",
    }
)
MAY_BE_EMPTY = {"fsdp", *NEEDED, *(name for names in NO_EFFECT.values() for name in names.split())}
KEYS = {*TRANSLATED, *MAY_BE_EMPTY} - {"finetuning_type"}  # which is this trainer's, too
ADAPTER_KEYS = """
    lora_rank lora_alpha lora_dropout lora_target additional_target adapter_name_or_path use_rslora use_dora
    init_lora_weights use_vera lora_fa loraplus_lr_ratio
    """.split()  # this trainer's keys that have no meaning where all weights are trained


def is_llama_factory(values: dict[str, object]) -> bool:
    """Whether a run's keys are those of a LLaMA-Factory file."""
    return "stage" in values or ("finetuning_type" in values and "preset" not in values)


def translate(values: dict[str, object]) -> tuple[dict[str, object], list[str]]:
    """(settings, notes): the same run in this trainer's keys, and lines to print.

    The notes name the keys without an effect, and the defaults taken from LLaMA-Factory. Raises UserError for
    a value that cannot be translated; `refuse_other_training` comes before.
    """
    from_llama_factory = is_llama_factory(values)
    notes = _ignored_keys(values)
    theirs = {name: value for name, value in values.items() if name in TRANSLATED}
    ours = {
        name: VALUES.get(name, {}).get(str(value), value)
        for name, value in values.items()
        if name not in KEYS
    }

    if from_llama_factory and values.get("lr_scheduler_type") == "constant":  # no warm-up in transformers
        ours = {name: value for name, value in ours.items() if name not in ("warmup_steps", "warmup_ratio")}
    is_plain_text = normalize(values.get("stage")) == "pt"
    if from_llama_factory or "dataset_dir" in theirs:
        index_file = Path(str(theirs.get("dataset_dir", "data"))) / "dataset_info.json"
        ours |= resolve_datasets(ours, index_file, is_plain_text)
    _translate_switches(theirs, ours)
    _translate_pissa(theirs, ours)
    _translate_push_to_hub(theirs, ours)
    _translate_eval_strategy(theirs, ours, from_llama_factory)
    _translate_names(theirs, ours)
    _translate_sampling(theirs, ours)
    _translate_fsdp(theirs, ours)
    if is_plain_text:
        ours.setdefault("packing", True)
    if from_llama_factory:
        ours["template"] = TEMPLATES.get(str(ours.get("template")), ours.get("template"))
        notes += _drop_adapter(ours) if ours.get("finetuning_type") == "full" else _train_embeddings(ours)
        defaults = _missing_defaults(ours)
        notes += _defaults_taken(defaults)
        ours = defaults | ours
    return ours, notes


def refuse_other_training(values: dict[str, object]) -> None:
    """Raise UserError for the first obstacle in the order of NEEDED, whatever other keys are unknown."""
    template = values.get("template")
    for name, accepted in NEEDED.items():
        if name == MEDIA[0] and template in SEEING:
            raise UserError(f"template = {template!r} is of a model that sees or hears; {_TEXT_ONLY}")
        if name not in values or normalize(values[name]) in accepted:
            continue
        if name == "do_train" and not is_llama_factory(values):
            continue  # TrainingArguments alone: its trainer does not read it
        generic = "leave it out" if accepted is OFF else f"it must be {accepted[0]}"
        fault = "requests a training that minilora does not do"
        if name in NOT_TRAINING:
            fault = "belongs to another kind of file"
        raise UserError(f"{name} = {shown(values[name])} {fault}; {INSTEAD.get(name, generic)}")


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
        if normalize(theirs.get(switch)) in TRUE:
            ours[name] = value


def _translate_names(theirs: dict[str, object], ours: dict[str, object]) -> None:
    """Set in `ours` the keys that only have another name there. A null is left out."""
    for name, own in RENAMED.items():
        if theirs.get(name) is not None:
            ours.setdefault(own, theirs[name])


def _translate_sampling(theirs: dict[str, object], ours: dict[str, object]) -> None:
    strategy = normalize(theirs.get("train_sampling_strategy", "random"))
    if strategy not in ("random", "group_by_length", *OFF):
        raise UserError(
            f"train_sampling_strategy = {strategy!r} is not known; choose from random, group_by_length"
        )
    if strategy == "group_by_length":
        ours["group_by_length"] = True


def _translate_fsdp(theirs: dict[str, object], ours: dict[str, object]) -> None:
    """`fsdp: full_shard auto_wrap offload`, a text or a list. Other ways to divide a model are refused."""
    value = theirs.get("fsdp")
    words = value if isinstance(value, list) else normalize(value).split()
    if not words or normalize(value) in OFF:
        return
    if unknown := sorted({str(word) for word in words} - {"full_shard", "auto_wrap", "offload", "true"}):
        raise UserError(f"fsdp = {shown(value)}: {unknown[0]} is not done here; write full_shard")
    ours.setdefault("parallel", "fsdp")
    if "offload" in words:
        ours.setdefault("fsdp_offload", True)


def _train_embeddings(ours: dict[str, object]) -> list[str]:
    """With new tokens LLaMA-Factory trains the embedding and the head whole, unless the file names others."""
    keys = ("new_special_tokens", "add_tokens", "resize_vocab")
    given = [name for name in keys if normalize(ours.get(name)) not in OFF]
    if not given or ours.get("additional_target") is not None:
        return []
    ours["additional_target"] = "embed_tokens,lm_head"
    return [f"{given[0]}: embed_tokens and lm_head are trained whole, as in LLaMA-Factory"]


def _drop_adapter(ours: dict[str, object]) -> list[str]:
    """Take an adapter's keys out of the settings of a full training: LLaMA-Factory does not read them."""
    unread = {*ADAPTER_KEYS} - {"adapter_name_or_path"}  # refused there, too
    given = [name for name in ADAPTER_KEYS if name in unread and ours.pop(name, None) is not None]
    return [f"no effect: {', '.join(given)} (finetuning_type is full)"] if given else []


def _translate_pissa(theirs: dict[str, object], ours: dict[str, object]) -> None:
    """`pissa_init: true` is `init_lora_weights: pissa_niter_N`, N = `pissa_iter` or 16; -1: `pissa`."""
    if normalize(theirs.get("pissa_init")) in TRUE:
        iterations = normalize(theirs.get("pissa_iter", 16))
        ours["init_lora_weights"] = "pissa" if iterations == "-1" else f"pissa_niter_{iterations}"


def _translate_push_to_hub(theirs: dict[str, object], ours: dict[str, object]) -> None:
    """`push_to_hub: true` with `hub_model_id: NAME` is `push_to_hub: NAME` here."""
    requested = normalize(ours.get("push_to_hub"))
    if requested in TRUE:
        repository = theirs.get("hub_model_id") or theirs.get("push_to_hub_model_id")
        if not repository:
            raise UserError("push_to_hub = true names no repository; write push_to_hub: owner/name")
        ours["push_to_hub"] = repository
    elif requested in OFF:
        ours.pop("push_to_hub", None)


def _translate_eval_strategy(
    theirs: dict[str, object], ours: dict[str, object], is_llama_factory: bool
) -> None:
    """`eval_steps` counts only with the strategy `steps`, where it is `logging_steps` by default."""
    given = "eval_strategy" in theirs or "evaluation_strategy" in theirs
    strategy = normalize(theirs.get("eval_strategy", theirs.get("evaluation_strategy", "no")))
    if strategy not in ("steps", "epoch", *OFF):
        raise UserError(f"eval_strategy = {strategy!r} is not known; choose from steps, epoch, no")
    if strategy == "steps":
        ours.setdefault("eval_steps", ours.get("logging_steps", 10))
    elif is_llama_factory or given:
        ours.pop("eval_steps", None)


def _missing_defaults(ours: dict[str, object]) -> dict[str, object]:
    """LLaMA-Factory's defaults for the keys that are not given. A preset gives the adapter's."""
    given = {*ours}
    if {"preset", "adapter_name_or_path"} & ours.keys() or ours.get("finetuning_type") == "full":
        given |= {"lora_rank", "lora_dropout", "lora_target"}
    return {name: value for name, value in DEFAULTS.items() if name not in given}


def _defaults_taken(defaults: dict[str, object]) -> list[str]:
    """One line that lists them, or none."""
    shown = ", ".join(f"{name} {'none' if value is None else value}" for name, value in defaults.items())
    return [f"a LLaMA-Factory file, with LLaMA-Factory's defaults: {shown}"] if defaults else []
