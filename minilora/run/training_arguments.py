"""Hugging Face's TrainingArguments: what becomes of each field that this trainer has no key for.

    translated     activation_checkpointing, train_sampling_strategy, ...: become keys of this trainer
    no effect      dataloader_num_workers, torch_compile, ...: change no number of a training here
    refused        deepspeed, neftune_noise_alpha, ...: an error names the key, unless its value requests what
                   this trainer does anyway, as every default of TrainingArguments does

Fields that version 5 of transformers dropped are here too: files live longer. `minilora.run.llama_factory`
adds the keys of LLaMA-Factory, which builds on these, and translates both.
"""

TRUE = ("true", "yes", "1")
OFF = ("false", "no", "none", "null", "0", "", "{}", "[]")


def normalize(value: object) -> str:
    """The same text for a value from YAML and from the command line: True -> "true", "1.0e-8" -> "1e-08"."""
    if isinstance(value, dict):
        value = dict(sorted((str(key), part) for key, part in value.items()))
    text = str(value).strip().lower()
    try:
        return f"{float(text):g}"
    except ValueError:
        return text


TRANSLATED = {  # key: its meaning here
    "eval_strategy": "`steps`: every `eval_steps`; `epoch`, `no`: at the end of every epoch",
    "evaluation_strategy": "`eval_strategy`",
    "hub_model_id": "the repository for `push_to_hub: true`, which is `push_to_hub: NAME` here",
    "push_to_hub_model_id": "`hub_model_id`",
    "train_sampling_strategy": "`group_by_length`; `random` is the order of every other training",
    "fsdp": "`parallel: fsdp` for `full_shard`, `auto_wrap` or not; with `offload` also `fsdp_offload`",
    "per_gpu_train_batch_size": "`per_device_train_batch_size`",
    "per_gpu_eval_batch_size": "`per_device_eval_batch_size`",
}
VALUES = {  # key: {value of TrainingArguments: the same value here}
    "optim": {"adamw_torch_fused": "adamw_torch"},
    "lr_scheduler_type": {"constant_with_warmup": "constant"},
}
NO_EFFECT = {  # the reason: the keys
    "examples are tokenized at the start, in this process": (
        "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_in_order "
        "dataloader_persistent_workers dataloader_multiprocessing_context remove_unused_columns "
        "length_column_name label_names"
    ),
    "seed alone determines the order of the examples and every random number": "data_seed full_determinism",
    "the machine determines the kernels": (
        "use_liger_kernel liger_kernel_config torch_compile torch_compile_backend torch_compile_mode "
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs torchdynamo jit_mode_eval use_ipex"
    ),
    "bf16 and fp16 alone choose the dtype, of training and evaluation": (
        "bf16_full_eval fp16_full_eval half_precision_backend fp16_backend fp16_opt_level"
    ),
    "float32 matrices are always multiplied in float32": "tf32",
    "a run plans its memory before it starts": "torch_empty_cache_steps",
    "huggingface-hub reads its own settings: HF_HOME, HF_TOKEN": "hub_token push_to_hub_token",
    "an upload ends before the training goes on": "hub_always_push",
    "loss.png and metrics.jsonl are always written": (
        "logging_strategy logging_first_step logging_dir log_level log_level_replica log_on_each_node "
        "disable_tqdm include_num_input_tokens_seen include_tokens_per_second skip_memory_metrics"
    ),
    "a loss that is not finite is always explained": "debug logging_nan_inf_filter",
    "Trackio is not used": "project trackio_space_id trackio_bucket_id trackio_static_space_id",
    "a checkpoint always holds all that a resumed run needs, and SIGTERM saves one": (
        "save_only_model save_safetensors enable_jit_checkpoint save_on_each_node"
    ),
    "a resumed run continues with the next example, as if it had not stopped": (
        "ignore_data_skip restore_callback_states_from_checkpoint"
    ),
    "held-out examples are always evaluated, also before the first step, and only for their loss": (
        "do_eval eval_on_start eval_accumulation_steps batch_eval_metrics eval_do_concat_batches "
        "eval_use_gather_object include_for_metrics include_inputs_for_metrics prediction_loss_only"
    ),
    "torchrun and PyTorch read their own settings": (
        "ddp_timeout ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph local_rank"
    ),
    "fsdp gathers the layers of a model one by one": (
        "fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap"
    ),
    "training keeps no cache of keys and values": "use_cache",
    "the loss is the mean over all supervised tokens of a step": "average_tokens_across_devices",
    "no search or accelerator reads it here": "ray_scope tpu_metrics_debug mp_parameters past_index",
}
MUST_BE_OFF = """
    deepspeed parallelism_config split_batches dispatch_batches tpu_num_cores use_cpu no_cuda
    use_mps_device auto_find_batch_size do_predict dataloader_drop_last neftune_noise_alpha
    label_smoothing_factor optim_args optim_target_modules adafactor greater_is_better
    hub_revision
    """.split()
_ACCELERATE = dict(split_batches=False, dispatch_batches=None, even_batches=True, use_seedable_sampler=True,
                   non_blocking=False, gradient_accumulation_kwargs=None)  # fmt: skip
NEEDED = {  # key: the values that this trainer accepts, as `normalize` writes them
    "metric_for_best_model": ("eval_loss", "loss", *OFF),
    "accelerator_config": (*OFF, normalize(_ACCELERATE)),
} | dict.fromkeys(MUST_BE_OFF, OFF)
_TORCHRUN = "torchrun --nproc-per-node N scripts/train.py shares the batches between GPUs"
_HIDE_GPU = "hide the GPU: CUDA_VISIBLE_DEVICES= python scripts/train.py"
INSTEAD = {  # key: advice to whoever gave it another value than NEEDED
    "deepspeed": _TORCHRUN,
    "parallelism_config": _TORCHRUN,
    "accelerator_config": _TORCHRUN,
    "use_cpu": _HIDE_GPU,
    "no_cuda": _HIDE_GPU,
    "auto_find_batch_size": "scripts/memory.py says which batch fits",
    "dataloader_drop_last": "the last batch of an epoch is trained on, however small",
    "metric_for_best_model": "the best adapter is the one with the lowest held-out loss, eval_loss",
    "greater_is_better": "the best adapter is the one with the lowest held-out loss, eval_loss",
    "hub_revision": "results go to the main branch",
    "do_predict": "scripts/evaluate.py does this after the training",
}
