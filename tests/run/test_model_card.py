"""The model card can be used alone: its snippet runs as it is, and it speaks of the adapter beside it."""

import json
import re
import shutil

import pytest
import torch
from support.tokenizer_files import BOS, EOS, PAD, byte_level_json, write

from minilora import load_adapter, load_model, load_tokenizer
from minilora.data.chat import load_chat_template
from minilora.inference.generation import end_tokens, generate
from minilora.run.model_card import QUESTION, as_markdown
from minilora.run.tracker import Tracker

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    f"\n\n### Instruction:\n{QUESTION}\n\n### Response:\n"
)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def card_of(directory) -> str:
    return (directory / "README.md").read_text()


def table(card: str) -> dict[str, str]:
    """The rows of the card's table."""
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", card, re.M))


def run_snippet(card: str) -> dict:
    """The variables that the card's own code leaves."""
    pytest.importorskip("peft")
    variables = {}
    exec(re.search(r"```python\n(.*?)```", card, re.S)[1], variables)
    return variables


@pytest.fixture
def chat_model(model_dir, tmp_path):
    """The tiny model with a tokenizer.json and a chat template of its own."""
    directory = tmp_path / "chat-model"
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    write(directory, tokenizer=byte_level_json(bos=True), tokenizer_config=names)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model_dir / name, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


ROWS = {
    "messages": {
        "messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "the fox"}]
    },
    "instruction": {"instruction": "say", "output": "the fox"},
    "prompt": {"prompt": "say", "completion": "the fox"},
    "text": {"text": "the old fox"},
}


@pytest.mark.parametrize("form, template, own, shown", [
    ("prompt", None, False, QUESTION),
    ("prompt", None, True, QUESTION),
    ("prompt", "alpaca", True, f"{BOS}{ALPACA}"),
    ("instruction", None, False, f"<s>{ALPACA}"),
    ("messages", "tokenizer", True, f"<|user|>\n{QUESTION}{EOS}\n<|assistant|>\n"),
    ("text", None, False, "The"),
])  # fmt: skip
def test_the_snippet_runs_as_it_is_and_gives_the_answer_of_the_adapter(
    train, model_dir, chat_model, tmp_path, form, template, own, shown
):
    base = chat_model if own else model_dir
    if template is None:
        (chat_model / "chat_template.jinja").unlink()
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROWS[form]) + "\n") * 8)
    keys = dict(template=template, bf16="false", learning_rate=0.01, max_steps=2)
    directory, _ = train(model=base, dataset=tmp_path / "rows.jsonl", **keys)
    card = card_of(directory)
    assert "".join(f"    {line}\n" for line in shown.split("\n")) in card
    tokenizer = load_tokenizer(directory)
    prompt, turn_end = tokenizer.encode(shown), None
    if template is not None or form == "instruction":  # whose template is saved with the adapter
        chat = load_chat_template(template, tokenizer)
        prompt, turn_end = chat.encode_prompt([{"role": "user", "content": QUESTION}]), chat.end_id
    model = load_model(base, dtype=torch.float32)
    load_adapter(model, directory)
    ends = end_tokens(model.eval(), tokenizer, turn_end)
    expected = generate(model, torch.tensor([prompt]), max_new_tokens=100, eos_token_ids=ends)
    said = run_snippet(card)
    assert said["inputs"]["input_ids"].tolist() == [prompt]
    assert said["output"].tolist() == expected.tolist() and expected.shape[1] > len(prompt) + 5


def test_the_card_says_on_what_and_how_the_adapter_was_trained(train, dataset):
    keys = dict(val_size=4, cutoff_len=200, learning_rate=3e-3, warmup_steps=1, lr_scheduler_type="linear")
    rows = table(card_of(train(**keys, seed=7, packing=True)[0]))
    assert rows["dataset"] == as_markdown(str(dataset))
    assert rows["held-out examples"] == "4 (val_size = 4)"
    assert rows["examples"] == "20" and rows["cutoff_len"] == "200" and rows["seed"] == "7"
    assert rows["learning rate"] == "0.003, linear, warmup_steps = 1"
    assert rows["prompt format"] == "none, the prompt as it is written"


@pytest.mark.parametrize("best", [True, False])
def test_the_card_speaks_of_the_adapter_that_is_saved(train, trainer, monkeypatch, best):
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.7])
    monkeypatch.setattr(trainer, "evaluate_loss", lambda *_: next(losses))
    keys = dict(val_size=4, eval_steps=1, load_best_model_at_end=best, max_steps=4)
    rows = table(card_of(train(**keys)[0]))
    expected = ("of step 2, the lowest held-out loss", "3.0000") if best else ("of step 4", "3.7000")
    assert (rows["this adapter"], rows["held-out loss, this adapter"]) == expected
    assert rows["held-out loss, base model"] == "5.0000"
    assert rows["held-out loss, lowest"] == "3.0000 (step 2)"


def test_peak_memory_after_a_resume_is_that_of_the_whole_training(train, monkeypatch):
    used = {"first": 7 * 2**30, "second": 3 * 2**30}
    monkeypatch.setattr("minilora.run.memory_plan.memory_used", lambda device: used["first"])
    directory, _ = train(max_steps=4, save_steps=2)
    assert table(card_of(directory))["peak memory"].startswith("7.00 GiB (")
    (directory / "adapter_model.safetensors").unlink()
    monkeypatch.setattr("minilora.run.memory_plan.memory_used", lambda device: used["second"])
    directory, _ = train(max_steps=4, save_steps=2, resume_from_checkpoint=directory / "checkpoint-2")
    assert table(card_of(directory))["peak memory"].startswith("7.00 GiB (")


def test_the_tracker_keeps_the_peak_of_a_gpu_in_its_state():
    one = Tracker(None, 10, 10, 1)
    assert one.peak(5, 9) == (5, 9)
    other = Tracker(None, 10, 10, 1, state=json.loads(json.dumps(one.state_dict())))
    assert other.peak(4, 10) == (5, 10) and other.peak(6, None) == (6, None)


def test_a_template_that_refuses_one_question_leaves_a_card_without_an_example(train, chat_model, tmp_path):
    template = "{% if messages | length < 2 %}{{ raise_exception('two') }}{% endif %}" + TEMPLATE
    (chat_model / "chat_template.jinja").write_text(template)
    (tmp_path / "rows.jsonl").write_text((json.dumps(ROWS["messages"]) + "\n") * 8)
    directory, _ = train(model=chat_model, dataset=tmp_path / "rows.jsonl")
    assert "tokenizer writes the prompts.\n\n## Use" in card_of(directory)
