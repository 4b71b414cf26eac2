"""What a user mistypes."""

from collections.abc import Iterator

from fuzz.bad_inputs.commands import (
    CHAT,
    COMBINE,
    COMPARE,
    EVALUATE,
    EXPORT,
    EXTRACT,
    LINT,
    MEMORY,
    MERGE,
    PREPARE,
    SERVE,
    TRAIN,
)
from fuzz.case import Case, make_case

KIND = "command line"
LONG = 100_000

EVERY_SCRIPT = {
    "train": TRAIN,
    "prepare": PREPARE,
    "evaluate": EVALUATE,
    "chat": CHAT,
    "merge": MERGE,
    "serve": SERVE,
    "memory": MEMORY,
    "compare": COMPARE,
    "sweep": "sweep --config run.yaml",
    "train_together": "train_together run.yaml",
    "share": "share --adapter adapter --push_to_hub owner/name",
    "lint_adapter": LINT,
    "verify": "verify",
    "bench": "bench",
    "bench_serving": "bench_serving",
    "pretrain": "pretrain --output out --steps 1",
    "pictures": "pictures --output out",
    "keys": "keys",
    "matrix": "matrix",
    "notebooks": "notebooks --output out",
    "check_gpu": "check_gpu",
    "experiments": "experiments rank_and_rate --quick",
}
# Script: its options that an empty text cannot be the value of.
EMPTY = {
    TRAIN: "model_name_or_path model_revision dataset eval_dataset template output_dir resume_from_checkpoint "
    "prompt_column completion_column messages_column preset lora_target optim report_to run_name "
    "mlflow_tracking_uri push_to_hub upload hub_strategy learning_rate config lora_rank packing bf16",
    PREPARE: "output to model dataset show",
    EVALUATE: "model dataset output adapter samples max_samples max_new_tokens",
    "chat --adapter adapter": "input output model adapter temperature",
    SERVE: "model adapter served_model_name host port api_key adapter_dir max_num_seqs max_model_len max_loras "
    "max_cpu_loras max_waiting grace temperature",
    MERGE: "adapter output model into dtype outtype",
    EXPORT: "export_adapter",
    COMBINE: "output svd_rank",
    EXTRACT: "base tuned output lora_rank",
    MEMORY: "picture gpu model processes link tflops",
    COMPARE: "output html",
    "sweep": "config",
    "share --adapter adapter": "push_to_hub upload",
    "share --push_to_hub owner/name": "adapter",
    "lint_adapter adapter": "model",
    "bench": "model output width",
    "bench_serving": "model adapters",
    "verify": "model output family",
    "pretrain --steps 1": "output seed",
    "pictures": "output",
    "notebooks": "output",
    "check_gpu": "only budget emulate out table",
    "experiments rank_and_rate": "output",
}
MISSING = {  # command: the word that its last option is called
    "train --config": "config",
    "train --config run.yaml --output_dir": "output_dir",
    f"{TRAIN} --learning_rate": "learning_rate",
    f"{TRAIN} --dataset": "dataset",
    f"{TRAIN} --lora_target": "lora_target",
    f"{PREPARE} --show": "show",
    f"{EVALUATE} --samples": "samples",
    f"{CHAT} --seed": "seed",
    f"{SERVE} --host": "host",
    f"{SERVE} --adapter_dir": "adapter_dir",
    "merge --adapter": "adapter",
    "combine --output out": "adapter",
    "combine --adapter adapter:1": "output",
    "extract --base model --output out": "tuned",
    "merge --output out": "adapter",
    "merge --adapter adapter": "output",
    f"{MEMORY} --gpu": "gpu",
    f"{MEMORY} --processes": "processes",
    f"{MEMORY} --processes 2 --parallel": "parallel",
    "compare": "DIRECTORY",
    "compare run --output": "output",
    "compare run --html": "html",
    "sweep": "config",
    "sweep --config": "config",
    "train_together": "SETTINGS",
    "share": "adapter",
    "share --adapter adapter": "push_to_hub",
    "lint_adapter": "adapter",
    "bench --width": "width",
    "bench_serving --tokens": "tokens",
    "notebooks --output": "output",
    "check_gpu --only": "only",
    "experiments rank_and_rate --output": "output",
}
TWICE = {
    f"{TRAIN} --seed 1 --seed 2": "seed",
    f"{TRAIN} --model model --model_name_or_path model": "model",
    f"{TRAIN} --lora-rank 2 --lora_rank 2": "lora_rank",
    f"{PREPARE} --show 1 --show 2": "show",
    f"{EVALUATE} --dataset chat.jsonl": "dataset",
    f"{CHAT} --seed 1 --seed 2": "seed",
    f"{SERVE} --port 1": "port",
    f"{MERGE} --output other": "output",
    f"{MEMORY} --gpu 8 --gpu 16": "gpu",
    f"{MEMORY} --processes 2 --processes 4": "processes",
    f"{COMPARE} --output a.png --output b.png": "output",
    f"{COMPARE} --html a.html --html b.html": "html",
    "share --adapter adapter --push_to_hub owner/a --push_to_hub owner/b": "push_to_hub",
    f"{LINT} --model shards": "model",
    "experiments rank_and_rate --output a --output b": "output",
}
NUMBERS = """
    val_size cutoff_len max_samples lora_rank lora_alpha lora_dropout per_device_train_batch_size
    per_device_eval_batch_size gradient_accumulation_steps num_train_epochs max_steps learning_rate
    warmup_steps warmup_ratio loraplus_lr_ratio weight_decay max_grad_norm seed logging_steps eval_steps
    save_steps save_total_limit early_stopping_patience exact_match_samples eval_delay adam_beta1 adam_beta2
    adam_epsilon
    """.split()
SHARES = "val_size warmup_steps logging_steps eval_steps save_steps".split()  # whole, or a share below 1
HUGE = {  # key: a number that is absurd
    "val_size": "1e30",
    "cutoff_len": "1e12",
    "lora_rank": "1e9",
    "lora_alpha": "1e300",
    "lora_dropout": "1e9",
    "per_device_train_batch_size": "1e12",
    "gradient_accumulation_steps": "1e12",
    "num_train_epochs": "1e18",
    "max_steps": "1e18",
    "learning_rate": "1e300",
    "warmup_steps": "1e18",
    "warmup_ratio": "1e9",
    "loraplus_lr_ratio": "1e300",
    "weight_decay": "1e300",
    "seed": "1e30",
    "save_steps": "1e30",
}
CHOICES = {
    "template": "nonsense",
    "quantization_bit": "3",
    "quantization_type": "nf5",
    "preset": "standard",
    "lr_scheduler_type": "zigzag",
    "optim": "sgd",
    "gradient_checkpointing": "sometimes",
    "parallel": "zero3",
    "report_to": "comet_ml",
    "hub_strategy": "never",
    "save_strategy": "often",
    "bf16": "maybe",
    "packing": "2",
    "use_dora": "half",
    "lora_target": "v_porj",
    "learning_rate": "fast",
    "max_steps": "0x10",
    "lora_rank": "2.5",
    "seed": "1;2",
    "resume_from_checkpoint": "nowhere",
}
TOGETHER = {  # keys that exclude one another: words of the message
    "--bf16 --fp16": ("bf16", "fp16"),
    "--fsdp_offload": ("fsdp_offload", "parallel"),
    "--packing --group_by_length": ("packing", "group_by_length"),
    "--train_on_prompt --mask_history": ("mask_history", "train_on_prompt"),
    "--eval_dataset train.jsonl": ("eval_dataset", "val_size"),
    "--warmup_steps 1 --warmup_ratio 0.5": ("warmup_steps", "warmup_ratio"),
    "--warmup_steps 5": ("warmup_steps",),
    "--lora_fa --loraplus_lr_ratio 4": ("loraplus_lr_ratio", "lora_fa"),
    "--val_size 0 --eval_steps 1": ("eval_steps",),
    "--val_size 0 --load_best_model_at_end": ("load_best_model_at_end",),
    "--val_size 50": ("val_size",),
    "--fp16": ("fp16",),
    "--stage dpo": ("stage",),
    "--pref_beta 0.1 --stage dpo --nonsense 1": ("stage", "dpo"),
    "--template qwen3_vl": ("template", "text"),
    "--val_size 0 --save_strategy best": ("save_strategy",),
    "--lr_scheduler_type cosine_with_min_lr": ("lr_scheduler_kwargs",),
    "--lr_scheduler_kwargs {min_lr:1}": ("lr_scheduler_kwargs",),
    "--lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs num_cycles:": ("lr_scheduler_kwargs",),
    "--dataloader_drop_last true": ("dataloader_drop_last",),
    "--train_sampling_strategy sequential": ("train_sampling_strategy",),
    "--deepspeed ds.json": ("deepspeed",),
}
OPTIONS = {  # numbers of the other scripts' own options
    f"{CHAT} --temperature": "nan inf -1 hot",
    f"{CHAT} --top_p": "nan 0 2 -1",
    f"{CHAT} --top_k": "-1 1.5 many",
    f"{CHAT} --repetition_penalty": "nan 0 -1 inf",
    f"{CHAT} --max_new_tokens": "0 -1 1.5",
    f"{CHAT} --seed": "-1 18446744073709551616",
    "serve --adapter adapter --dry_run --port": "-1 65536 1.5 http",
    f"{SERVE} --max_num_seqs": "0 -1 1.5 nan 1e9 99999999",
    f"{SERVE} --max_model_len": "1 0 -1 1e12 16777216",
    f"{SERVE} --max_loras": "0 33 many",
    f"{SERVE} --max_cpu_loras": "0 7 1.5",
    f"{SERVE} --max_waiting": "0 -1 x",
    f"{SERVE} --grace": "nan -1 inf long",
    f"{SERVE} --host": "999.0.0.1 ::::",
    f"{SERVE} --adapter_dir": "nowhere train.jsonl",
    f"{SERVE} --temperature": "nan -1",
    f"{SERVE} --seed": "-1",
    f"{EVALUATE} --samples": "-1 x 1.5",
    f"{EVALUATE} --exact_match_samples": "-1 nan",
    f"{EVALUATE} --max_samples": "0 -1 nan",
    f"{EVALUATE} --samples 1 --max_new_tokens": "0 -1 1.5",
    f"{EVALUATE} --max_new_tokens": "5",
    f"{PREPARE} --show": "-1 x",
    f"{MEMORY} --gpu": "0 -1 nan inf 1e300 big",
    f"{MEMORY} --processes": "0 -1 1.5 nan 1e300 1000000 two",
    f"{MEMORY} --processes 2 --parallel": "tensor",
    f"{MEMORY} --processes 2 --tflops 80 --link": "0 -1 nan inf 1e300 fast",
    f"{MEMORY} --processes 2 --link 25 --tflops": "0 -1 nan inf 1e300 fast",
    f"{MEMORY} --processes 2 --link": "25",
    "bench --width": "0 -64 100 1e12 4294967296000",
    "bench --layers": "0 -1",
    "bench_serving --adapters": "0 -1 1e9 2000000 many",
    "bench_serving --lora_rank": "0 x",
    "bench_serving --requests": "0 1.5",
    "bench_serving --prompt": "0 100000",
    "bench_serving --tokens": "0",
    "bench_serving --max_num_seqs": "0 nan",
    "bench_serving --seed": "x",
    "bench --steps": "0 x",
    "verify --steps": "1 -1 x",
    "verify --seed": "-1 x 1.5",
    "verify --family": "gpt2",
    "pretrain --output out --steps": "0 -1 x",
    "pretrain --output out --steps 1 --seed": "x",
    "check_gpu --budget": "0 -1 nan inf 1e300 long",
    "check_gpu --only": "everything steps,nothing",
    "check_gpu --emulate": "p100",
    f"{MERGE} --into": "both",
    f"{MERGE} --outtype": "q8_0",
    f"{MERGE} --dtype": "float64 q8_0",
    "merge --adapter adapter --output out.gguf --dtype": "float32",
    f"{EXPORT} --dtype": "float16",
    f"{EXPORT} --into": "original",
    f"{MERGE} --quantization_type": "nf5",
    f"{MERGE} --double_quantization": "maybe",
}
NOWHERE = {  # commands that end where a name of something that does not exist is to follow
    "train --dataset train.jsonl --output_dir out --model": "model",
    "train --model model --output_dir out --dataset": "dataset",
    "train --config": "config",
    f"{TRAIN} --resume_from_checkpoint": "resume_from_checkpoint",
    f"{TRAIN} --template": "template",
    f"{TRAIN} --lora_target": "lora_target",
    "prepare --model model --output out --dataset": "dataset",
    "evaluate --dataset train.jsonl --adapter": "adapter",
    "chat --instruction say --adapter": "adapter",
    "chat --adapter adapter --instruction say --model": "model",
    "merge --output out --adapter": "adapter",
    "serve --port 0 --dry_run --adapter": "adapter",
    f"{SERVE} --adapter_dir": "adapter_dir",
    "memory --model": "model",
    "compare": "directory",
    "sweep --config": "config",
    "train_together": "config",
    "share --push_to_hub owner/name --adapter": "adapter",
    "lint_adapter": "adapter",
    "experiments": "study",
}
STRANGE = {  # name: a value, and a part of it that must be shown
    "an escape sequence": ("\x1b[31mred", "red"),
    "a carriage return": ("left\rright", "right"),
    "a line end": ("one\ntwo", "two"),
    "C1 and bidirectional controls": ("\x9b2Jplain\u202etxet", "plain"),
    "bytes that are not UTF-8": (b"caf\xe9", "caf"),
    f"{LONG:,} characters": ("q" * LONG, "qqqqqqqq"),
}


def cases() -> Iterator[Case]:
    for script, command in EVERY_SCRIPT.items():
        yield make_case(KIND, f"{script}: an unknown option", f"{command} --nonsense 1", "nonsense")
    for command, options in EMPTY.items():
        for option in options.split():
            words = [*_without(command, option), f"--{option}", ""]
            words += ["--output", "x"] if option == "input" else []
            words += ["--input", "questions.jsonl"] if (words[0], option) == ("chat", "output") else []
            yield make_case(KIND, f"{words[0]}: --{option} is empty", words, option)
    yield make_case(KIND, "compare: a directory's name is empty", ["compare", ""], ())
    yield make_case(KIND, "train_together: a file's name is empty", ["train_together", ""], ())
    yield make_case(KIND, "train_together: a file twice", "train_together run.yaml run.yaml", "output_dir")
    yield make_case(KIND, "sweep: --together is no switch", "sweep --config run.yaml --together 7", "7")
    yield make_case(KIND, "lint_adapter: the adapter's name is empty", ["lint_adapter", ""], "adapter")
    for words in (
        "experiments rank_and_ratee",
        "experiments rank_and_rate --redraw",
        "experiments all --redraw --output run",
    ):
        word = "nearest|figures|missing"
        yield make_case(KIND, f"experiments: {words.partition(' ')[2]}", words, word)
    yield from _commands("has no value", MISSING)
    yield from _commands("given twice", TWICE)
    yield from _trainers_values()
    yield make_case(
        KIND, "evaluate: metrics without samples", f"{EVALUATE} --metrics rouge", "exact_match_samples"
    )
    meteor = f"{EVALUATE} --exact_match_samples 2 --metrics meteor"
    yield make_case(KIND, "evaluate: an unknown metric", meteor, "meteor")
    key = dict(environment={"MINILORA_API_KEY": "sk-1 two"}, secret="sk-1 two")
    yield make_case(KIND, "serve: a key with a blank", SERVE, "MINILORA_API_KEY", **key)
    same = f"{SERVE} --served_model_name adapter"
    yield make_case(KIND, "serve: the base called as an adapter", same, "adapter")
    for command, values in OPTIONS.items():
        for value in values.split():
            option = command.rpartition("--")[2]
            yield make_case(KIND, f"{command.split()[0]}: {option} = {value}", f"{command} {value}", option)
    for command, option in NOWHERE.items():
        for name, (value, shown) in STRANGE.items():
            words = [*command.split(), value]
            word = "lora_target" if option == "lora_target" else shown  # its value is a list of names
            yield make_case(KIND, f"{words[0]}: {option} with {name}", words, word)
    for name, (value, shown) in STRANGE.items():
        key = b"--" + value if isinstance(value, bytes) else f"--{value}"
        yield make_case(KIND, f"train: a key with {name}", [*TRAIN.split(), key, "1"], shown)


def _without(command: str, option: str) -> list[str]:
    """The command's words, but not this option and its value."""
    words = command.split()
    if f"--{option}" in words:
        where = words.index(f"--{option}")
        del words[where : where + 2]
    return words


def _commands(fault: str, commands: dict[str, str]) -> Iterator[Case]:
    for command, word in commands.items():
        yield make_case(KIND, f"{command.split()[0]}: {word} {fault} ({command[-24:]})", command, word)


def _trainers_values() -> Iterator[Case]:
    for key in NUMBERS:
        yield make_case(KIND, f"train: {key} = nan", f"{TRAIN} --{key} nan", key)
        yield make_case(KIND, f"train: {key} = -5", f"{TRAIN} --{key}=-5", key)
    for key in SHARES:
        yield make_case(KIND, f"train: {key} = 1.5", f"{TRAIN} --{key} 1.5", key)
    for values in (HUGE, CHOICES):
        for key, value in values.items():
            yield make_case(KIND, f"train: {key} = {value}", f"{TRAIN} --{key} {value}", key)
    for keys, words in TOGETHER.items():
        yield make_case(KIND, f"train: {keys}", f"{TRAIN} {keys}", words)
