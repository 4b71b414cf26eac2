"""The good files that every case starts from, made once by the scripts themselves.

    model/        a Llama of 30,000 parameters with a sentencepiece vocabulary of 320 pieces
    shards/       the same in two files with an index
    in4bits/      the same in bitsandbytes' 4 bits, but for the output head; in8bits/ in 8
    words/        the same with a tokenizer.json and a chat template
    train.jsonl, chat.jsonl, alpaca.json, table.csv, plain.txt, questions.jsonl
    run.yaml      settings of a training; run/ is what it left, with checkpoints 1 and 2
    adapter/      the adapter of that run alone
    prepared/     what prepare.py made of train.jsonl

Nothing here runs in the process that later forks: each function is called in a child.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import sentencepiece
import tokenizers
from safetensors.torch import load_file, save_file
from support.project import WORDS

from minilora import CausalLM, QuantConfig, load_model, save_model
from minilora.data.rows import Row
from minilora.formats.config_json import parse_config
from minilora.run.answers import write_answers
from minilora.system.errors import run_script

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
SETTINGS = {
    "model": "model",
    "dataset": "train.jsonl",
    "output_dir": "run",
    "max_steps": 2,
    "save_steps": 1,
    "logging_steps": 1,
    "val_size": 2,
    "lora_rank": 2,
    "lora_target": "q_proj,k_proj,v_proj",
    "quantization_bit": "none",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
}


def make_files() -> None:
    """Models and datasets, in the working directory."""
    _make_model(Path("model"))
    _make_shards(Path("model"), Path("shards"))
    for bits in (4, 8):
        save_model(load_model("model", QuantConfig(bits)), f"in{bits}bits")
    _make_words(Path("model"), Path("words"))
    _make_datasets()
    Path("run.yaml").write_text(json.dumps(SETTINGS))  # JSON is YAML


def make_run(script: Callable[[], None]) -> None:
    """Train; `script` is the trainer's main. The answers are of no model."""
    sys.argv = ["train.py", "--config", "run.yaml"]
    run_script(script)
    write_answers(Path("run"), [Row("say the:", "old"), Row("say a:", "fox")], ["the", ""], ["old", "owl"])


def make_prepared(script: Callable[[], None]) -> None:
    """Prepare train.jsonl; `script` is prepare.py's main."""
    sys.argv = "prepare.py --model model --dataset train.jsonl --output prepared".split()
    run_script(script)


def make_adapter() -> None:
    """The adapter of the run, without anything beside it."""
    Path("adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path("run", name), "adapter")


def _make_model(directory: Path) -> None:
    directory.mkdir()
    text = directory / "text.txt"
    text.write_text("\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    text.unlink()
    (directory / "tokenizer.vocab").unlink()
    sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    model = CausalLM(parse_config(dict(model_type="llama", bos_token_id=1, eos_token_id=2) | sizes | heads))
    model.init_weights(std=0.1)
    save_model(model, directory)


def _make_shards(model: Path, directory: Path) -> None:
    shutil.copytree(model, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"first.safetensors": names[::2], "second.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _make_words(model: Path, directory: Path) -> None:
    shutil.copytree(model, directory)
    (directory / "tokenizer.model").unlink()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT_TEMPLATE)
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def _make_datasets() -> None:
    pairs = [(" ".join(WORDS[i : i + 3]), " ".join(WORDS[i + 3 : i + 6])) for i in range(12)]
    rows = [dict(prompt=f"say {question}:", completion=answer) for question, answer in pairs]
    chats = [[dict(role="user", content=q), dict(role="assistant", content=a)] for q, a in pairs]
    alpaca = [dict(instruction=question, input="", output=answer) for question, answer in pairs]
    for name, records in (("train", rows), ("chat", [dict(messages=chat) for chat in chats])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    Path("questions.jsonl").write_text("".join(json.dumps(dict(prompt=q)) + "\n" for q, _ in pairs[:2]))
    Path("alpaca.json").write_text(json.dumps(alpaca))
    Path("table.csv").write_text("prompt,completion\n" + "".join(f"{q},{a}\n" for q, a in pairs))
    Path("plain.txt").write_text("\n\n".join(answer for _, answer in pairs))
