"""From a dataset to a merged model: prepare, train, evaluate, talk and merge, each by its command, on what
the last one left.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.project import ROOT

SHARED = ROOT.parent / "shared" / "data"  # real files, where they are at hand
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
MERGED = ("--output", "merged.json")
TOLERANCE = 1e-5  # sums in another order in float32, over some thousand tokens


def short_rows(name: str, count: int, instead: list[dict]) -> list[dict]:
    path = SHARED / name
    if not path.is_file():
        return instead
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    return sorted(rows, key=lambda row: len(json.dumps(row)))[:count]


def saved_examples(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels of every example in a file of tokens."""
    tensors = load_file(path)
    labels = tensors["input_ids"].where(tensors["loss_mask"], -100).long()
    lengths = tensors["lengths"].tolist()
    return list(zip(tensors["input_ids"].long().split(lengths), labels.split(lengths), strict=True))


@torch.no_grad()
def loss_in_transformers(directory, examples) -> float:
    """Mean over the supervised tokens of all examples, each of which goes through the model alone."""
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

    out = run(
        "prepare",
        "--dataset",
        "data.jsonl",
        *keys,
        "--val_size",
        6,
        "--cutoff_len",
        256,
        "--show",
        3,
        "--seed",
        7,
    )
    assert "</s>⟧" in out and "⟦" in out
    settings = [
        "--max_steps",
        12,
        "--learning_rate",
        4e-3,
        "--packing",
        "true",
        "--quantization_bit",
        "none",
        "--output_dir",
        "out",
    ]
    out = run("train", "--config", "prepared/train.yaml", *settings)
    assert "tokens     lie ready" in out and "packed into" in out and out.count("  loads\n") == 3
    out = run(
        "evaluate", "--adapter", "out", "--samples", 2, "--exact_match_samples", 2, "--output", "figures.json"
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    results = figures["results"]
    assert results["out"]["loss"] < results["base"]["loss"] and "  expected" in out

    question = json.loads((tmp_path / "prepared" / "validation.jsonl").read_text().splitlines()[0])
    asked = question["messages"][-2]["content"] if kind == "alpaca" else question["prompt"]
    greedy = ["--temperature", 0, "--max_new_tokens", 8, "--quantization_bit", "none"]
    answer = run("chat", "--adapter", "out", "--instruction", asked, *greedy)
    merged = ["--model", "merged"] + (["--template", "tokenizer"] if kind == "alpaca" else [])
    run("merge", "--adapter", "out", "--output", "merged")
    assert run("chat", *merged, "--instruction", asked, *greedy) == answer, (
        "the merged model answers as base and adapter do"
    )

    # Base and merged model, on the tokens that preparing saved: each has in transformers the perplexity that
    # evaluating printed.
    run(
        "evaluate",
        *merged,
        "--dataset",
        "prepared/validation.jsonl",
        "--cutoff_len",
        256,
        "--quantization_bit",
        "none",
        *MERGED,
    )
    examples = saved_examples(tmp_path / "prepared" / "validation.safetensors")
    for model, found in (
        (ROOT / "assets" / "base", figures),
        ("merged", json.loads((tmp_path / "merged.json").read_text())),
    ):
        theirs = loss_in_transformers(model, examples)
        assert found["results"]["base"]["perplexity"] == pytest.approx(math.exp(theirs), rel=TOLERANCE)
