"""The readers of files that other people made, each with the good file that its bad ones are made from.

A reader returns a value, or raises a UserError whose text is one line of at most 500 characters. A text that
it returns is for people, and holds no control characters. Everything else breaks a promise.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hypothesis import strategies as st

from fuzz import mutations
from fuzz.edits import seal
from fuzz.place import CHAT_TEMPLATE, SETTINGS
from minilora import load_model, load_tokenizer
from minilora.adapters.lint import findings_text, lint_adapter
from minilora.adapters.save_load import read_adapter
from minilora.data.chat import load_chat_template
from minilora.data.examples import tokenize
from minilora.data.prepared import load_tokens
from minilora.data.rows import read_rows
from minilora.formats.weights import StoredTensors, read_config
from minilora.run.checkpoints import read_checkpoint
from minilora.run.settings import load_train_config

MODEL, WORDS, ADAPTER, RUN = Path("model"), Path("words"), Path("adapter"), Path("run")
CHECKPOINT = RUN / "checkpoint-1"
LLAMA_FACTORY = {
    "mine": {"file_name": "train.jsonl", "columns": {"prompt": "prompt", "response": "completion"}},
    "talk": {
        "file_name": "chat.jsonl",
        "formatting": "sharegpt",
        "tags": {"role_tag": "role", "content_tag": "content"},
    },
}


@dataclass(frozen=True)
class Target:
    """A file, how it is changed, and who reads it. `file` lies in the good files, or holds `good`."""

    name: str
    file: Path
    mutate: Callable[[bytes], st.SearchStrategy[bytes]]
    read: Callable[[], object]
    good: bytes | None = None


def _read_model() -> None:
    load_model(MODEL)


def _read_quantized_model(name: str) -> None:
    StoredTensors(Path(name)).quantized_layers()  # by the headers alone, as a run's plan does
    load_model(name)


def _read_sharded_model() -> None:
    load_model(Path("shards"))


def _read_an_adapter() -> None:
    read_adapter(ADAPTER)


def _lint() -> str:
    return findings_text(lint_adapter(ADAPTER, read_config(MODEL)))


def _read_settings() -> None:
    load_train_config(["--config", "settings.yaml"])


def _read_dataset_info() -> None:
    load_train_config("--model model --dataset mine,talk --dataset_dir data".split())


def _read_prompts() -> None:
    tokenize(read_rows("rows.jsonl"), load_tokenizer(MODEL), cutoff_len=64)


def _read_chats() -> None:
    tokenizer = load_tokenizer(WORDS)
    for name in ("tokenizer", "alpaca", "plain"):
        template = load_chat_template(name, tokenizer)
        tokenize(read_rows("chats.jsonl"), tokenizer, cutoff_len=64, template=template)


def _read_tokenizer() -> None:
    tokenizer = load_tokenizer(WORDS)
    tokenizer.decode(tokenizer.encode("the old fox </s>"))
    _encode_a_conversation(tokenizer)


def _read_pieces() -> None:
    tokenizer = load_tokenizer(MODEL)
    tokenizer.decode(tokenizer.encode("the old fox"))


def _encode_a_conversation(tokenizer=None) -> None:
    template = load_chat_template(None, tokenizer or load_tokenizer(WORDS))
    if template is not None:
        template.encode([{"role": "user", "content": "say"}, {"role": "assistant", "content": "old"}])


def _read_a_checkpoint() -> None:
    seal(str(CHECKPOINT))()  # whoever changes a file can write its digest
    read_checkpoint(CHECKPOINT)


def _read_metrics() -> str:
    from compare import comparison, page, read_runs

    runs = read_runs([RUN])
    return comparison(runs) + page(runs)


def _read_tokens() -> None:
    """Read prepared tokens under the key that they carry, as if they were of these rows."""
    path = Path("prepared/train.safetensors")
    key = path.read_bytes().partition(b'"key":')[2].partition(b'"')[2].partition(b'"')[0]
    load_tokens(path, read_rows("prepared/train.jsonl"), key.decode(errors="replace"))


TARGETS = [
    Target("config.json, mutated", MODEL / "config.json", mutations.json_files, _read_model),
    Target("adapter_config.json, mutated", ADAPTER / "adapter_config.json", mutations.json_files, _read_an_adapter),
    Target("adapter_config.json, mutated and linted", ADAPTER / "adapter_config.json", mutations.json_files, _lint),
    Target("model.safetensors, mutated", MODEL / "model.safetensors", mutations.safetensors_files, _read_model),
    Target("model.safetensors in 4 bits, mutated", Path("in4bits/model.safetensors"),
           mutations.safetensors_files, partial(_read_quantized_model, "in4bits")),
    Target("model.safetensors in 8 bits, mutated", Path("in8bits/model.safetensors"),
           mutations.safetensors_files, partial(_read_quantized_model, "in8bits")),
    Target("adapter_model.safetensors, mutated", ADAPTER / "adapter_model.safetensors",
           mutations.safetensors_files, _read_an_adapter),
    Target("adapter_model.safetensors, mutated and linted", ADAPTER / "adapter_model.safetensors",
           mutations.safetensors_files, _lint),
    Target("model.safetensors.index.json, mutated", Path("shards/model.safetensors.index.json"),
           mutations.json_files, _read_sharded_model),
    Target("prepared tokens, mutated", Path("prepared/train.safetensors"), mutations.safetensors_files, _read_tokens),
    Target("YAML, mutated", Path("settings.yaml"), mutations.yaml_files, _read_settings,
           (json.dumps(SETTINGS)).encode()),
    Target("dataset_info.json, mutated", Path("data/dataset_info.json"), mutations.json_files, _read_dataset_info,
           json.dumps(LLAMA_FACTORY).encode()),
    Target("rows of prompts, mutated", Path("rows.jsonl"), mutations.json_lines, _read_prompts,
           b'{"prompt": "say", "completion": "old"}\n' * 2),
    Target("rows of chats, mutated", Path("chats.jsonl"), mutations.json_lines, _read_chats,
           json.dumps({"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "say"},
                                    {"role": "assistant", "content": "old"}]}).encode() + b"\n"),
    Target("Alpaca's rows, mutated", Path("chats.jsonl"), mutations.json_lines, _read_chats,
           json.dumps({"instruction": "say", "input": "it", "output": "old", "system": "be kind",
                       "history": [["a", "b"]]}).encode() + b"\n"),
    Target("tokenizer.json, mutated", WORDS / "tokenizer.json", mutations.json_files, _read_tokenizer),
    Target("tokenizer_config.json, mutated", WORDS / "tokenizer_config.json", mutations.json_files, _read_tokenizer),
    Target("tokenizer.model, mutated", MODEL / "tokenizer.model", mutations.broken, _read_pieces),
    Target("chat template, mutated", WORDS / "chat_template.jinja", mutations.templates, _encode_a_conversation,
           CHAT_TEMPLATE.encode()),
    Target("state.json, mutated", CHECKPOINT / "training_state/state.json", mutations.json_files, _read_a_checkpoint),
    Target("metrics.jsonl, mutated", RUN / "metrics.jsonl", mutations.json_lines, _read_metrics),
    Target("answers.jsonl, mutated", RUN / "answers.jsonl", mutations.json_lines, _read_metrics),
]  # fmt: skip


def file_name(target: Target, data: bytes) -> str:
    """The name under which an input is saved: its digest tells two of a target apart."""
    return f"{target.name}-{hashlib.sha256(data).hexdigest()[:12]}"
