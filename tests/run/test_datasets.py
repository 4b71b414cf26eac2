"""The trainer on every common form of data: conversations, packed rows, several datasets."""

import json
import re

import pytest
import torch
from support.project import adapter, metrics

CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"count to {n}"},
            {"role": "assistant", "content": " ".join(map(str, range(n)))},
        ]
    }
    for n in range(1, 13)
]


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    return path


def test_exact_answers_are_counted_on_conversations_too(train, tmp_path):
    path = tmp_path / "fox.jsonl"
    turns = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the old fox"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    keys = dict(
        dataset=path,
        eval_dataset=path,
        template="plain",
        exact_match_samples=1,
        gradient_accumulation_steps=1,
    )
    _, out = train(max_steps=30, learning_rate=2e-2, **keys)
    assert "exact answers to 1 held-out prompts: 0.0% before, 100.0% after" in out
    assert "\nwho?\n" in out and "  adapted   the old fox\n  expected  the old fox\n" in out


@pytest.mark.parametrize("template", ["plain", "llama2", "alpaca"])
def test_conversations_are_learned_through_a_template_which_is_saved_beside_the_adapter(
    train, chats, template
):
    directory, out = train(
        dataset=chats, template=template, max_steps=12, learning_rate=1e-2, logging_steps=1
    )
    losses = [r["loss"] for r in metrics(directory) if "loss" in r]
    assert losses[-1] < losses[0]
    assert "12 examples" in out and (directory / "chat_template.jinja").is_file()


def test_five_steps_without_padding_end_in_the_adapter_of_five_steps_with_it(train):
    keys = dict(gradient_accumulation_steps=2, max_steps=5, learning_rate=1e-2, bf16="false", logging_steps=1)
    end_to_end, out = train("end to end", **keys)
    assert "padding    none: the examples of a pass lie end to end in one row\n" in out
    padded, out = train("padded", padding_free="false", **keys)
    assert re.search(r"padding    [1-9][\d.]*% of all tokens", out)
    one, other = (
        [r["loss"] for r in metrics(directory) if "loss" in r] for directory in (end_to_end, padded)
    )
    assert one == pytest.approx(other, rel=1e-4) and one[4] < 0.99 * one[0]
    # AdamW divides a gradient by its own size: where rounding decides the sign, a step goes the other way.
    one, other = adapter(end_to_end), adapter(padded)
    assert all(((one[k] - other[k]).abs() <= 1e-4 * other[k].abs().max()).float().mean() > 0.97 for k in one)


def test_packed_rows_train_as_the_examples_alone_do(train, dataset):
    keys = dict(
        cutoff_len=200,
        per_device_train_batch_size=24,
        gradient_accumulation_steps=1,
        max_steps=1,
        learning_rate=1e-2,
        bf16="false",
    )
    alone, _ = train("alone", **keys)
    packed, out = train("packed", packing=True, **keys)
    assert "padding    " in out
    # All examples are in one step: the same sum of losses, in another order. 1e-5 is a hundred roundings.
    assert metrics(packed)[0]["loss"] == pytest.approx(metrics(alone)[0]["loss"], rel=1e-5)
    one, other = adapter(alone), adapter(packed)
    # AdamW's first step is lr * sign(gradient). It differs by 2 lr if rounding decides the sign, else not at all.
    assert all(
        ((one[k] - other[k]).abs() <= 1e-5).float().mean() > 0.97 and one[k].shape == other[k].shape
        for k in one
    )


def test_several_datasets_are_mixed_by_weight_and_cut_by_max_samples(train, chats, dataset):
    _, out = train(dataset=f"{dataset}:0.5,{dataset}:0.5", max_samples=6)
    assert "12 examples" in out


def test_a_resumed_packed_run_on_conversations_ends_with_the_bits_of_one_that_was_not_stopped(
    train, chats, tmp_path
):
    keys = dict(
        dataset=chats,
        template="plain",
        packing=True,
        lora_dropout=0.1,
        max_steps=6,
        save_steps=3,
        use_dora=True,
    )
    whole, _ = train("whole", **keys)
    again, out = train("again", resume_from_checkpoint=whole / "checkpoint-3", **keys)
    assert "after step 3 of 6" in out
    one, other = adapter(whole), adapter(again)
    assert all(torch.equal(one[key], other[key]) for key in one)
