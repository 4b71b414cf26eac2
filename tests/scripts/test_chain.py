"""From a dataset to a merged model: prepare, train, evaluate, chat and merge, each by its command, on the
files of the command before.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.project import ROOT

SHARED = ROOT.parent / "shared" / "data"  # real files, if this machine has them
QUIZ = [
    {"question": f"What is {a} and {b}?", "answer": f"{a + b}.\n#### {a + b}"}
    for a in range(4)
    for b in range(6)
]
ADVICE = [
    {
        "instruction": f"Say {word} in a sentence.",
        "input": "It should be short." * (i % 2),
        "output": f"Here is {word}.",
    }
    for i, word in enumerate(
        "the old fox and a young owl live by the river in a small blue house near the mill".split()
    )
]
IN_FLOAT32 = ("--bf16", "false")  # on every machine
UNQUANTIZED = ("--quantization_bit", "none", *IN_FLOAT32)
TOLERANCE = 1e-5  # sums in another order in float32, over some thousand tokens


def short_rows(name: str, count: int, substitutes: list[dict]) -> list[dict]:
    """Return the `count` shortest rows of a real file, or the substitutes if the file does not exist."""
    path = SHARED / name
    if not path.is_file():
        return substitutes
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    return sorted(rows, key=lambda row: len(json.dumps(row)))[:count]


def saved_examples(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return ids and labels, both (T,), of every example in a file of tokens."""
    tensors = load_file(path)
    labels = tensors["input_ids"].where(tensors["loss_mask"], -100).long()
    lengths = tensors["lengths"].tolist()
    return list(zip(tensors["input_ids"].long().split(lengths), labels.split(lengths), strict=True))


@torch.no_grad()
def loss_in_transformers(directory, examples) -> float:
    """Return the mean loss per supervised token. Each example goes through the model alone."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    losses = [theirs(input_ids=ids[None], labels=labels[None]).loss.item() for ids, labels in examples]
    counts = [int((labels != -100).sum()) for _, labels in examples]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


@pytest.mark.parametrize("kind", ["alpaca", "gsm8k"])
def test_every_step_from_a_dataset_to_a_merged_model_finds_what_the_last_one_left(
    call, tmp_path, monkeypatch, kind
):
    monkeypatch.chdir(tmp_path)
    if kind == "alpaca":
        rows, keys = short_rows("alpaca_en_demo.json", 24, ADVICE), ["--template", "alpaca"]
    else:
        rows, keys = (
            short_rows("gsm8k_train.jsonl", 24, QUIZ),
            ["--prompt_column", "question", "--completion_column", "answer"],
        )
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(script: str, *arguments: object) -> str:
        code, out, err = call(script, *arguments)
        assert code == 0, f"{script}: {err}"
        return out

    cut = ["--cutoff_len", 256]
    out = run("prepare", "--dataset", "data.jsonl", *keys, *cut, "--val_size", 6, "--show", 3, "--seed", 7)
    assert "</s>⟧" in out and "⟦" in out
    settings = ["--max_steps", 12, "--learning_rate", 4e-3, "--packing", "true", "--output_dir", "out"]
    out = run("train", "--config", "prepared/train.yaml", *settings, *UNQUANTIZED)
    assert "tokens     lie ready" in out and "packed into" in out and out.count("  loads\n") == 3
    answered = ["--samples", 2, "--exact_match_samples", 2]
    out = run("evaluate", "--adapter", "out", *IN_FLOAT32, *answered, "--output", "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    results = figures["results"]
    assert results["out"]["loss"] < results["base"]["loss"] and "  expected" in out

    question = json.loads((tmp_path / "prepared" / "validation.jsonl").read_text().splitlines()[0])
    asked = question["messages"][-2]["content"] if kind == "alpaca" else question["prompt"]
    greedy = ["--temperature", 0, "--max_new_tokens", 8, *UNQUANTIZED]
    answer = run("chat", "--adapter", "out", "--instruction", asked, *greedy)
    merged = ["--model", "merged"] + (["--template", "tokenizer"] if kind == "alpaca" else [])
    run("merge", "--adapter", "out", "--output", "merged")
    assert run("chat", *merged, "--instruction", asked, *greedy) == answer, (
        "the merged model answers as base and adapter do"
    )

    # evaluate.py's perplexities of base and merged model are those of transformers on the saved tokens.
    held_out = ["--dataset", "prepared/validation.jsonl", *cut]
    run("evaluate", *merged, *held_out, *UNQUANTIZED, "--output", "merged.json")
    examples = saved_examples(tmp_path / "prepared" / "validation.safetensors")
    for model, found in (
        (ROOT / "assets" / "base", figures),
        ("merged", json.loads((tmp_path / "merged.json").read_text())),
    ):
        theirs = loss_in_transformers(model, examples)
        assert found["results"]["base"]["perplexity"] == pytest.approx(math.exp(theirs), rel=TOLERANCE)
