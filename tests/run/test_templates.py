"""A run has one template: which one words the rows, what is said about it, and that nothing words them twice."""

import json
import shutil

import pytest
from support.project import metrics

from minilora.data.chat import load_chat_template
from minilora.data.tokenizer import load_tokenizer

QUESTION, ANSWER = "where is the fox", "by the mill"
FORMS = {
    "prompt": {"prompt": QUESTION, "completion": ANSWER},
    "instruction": {"instruction": QUESTION, "output": ANSWER},
    "messages": {
        "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    },
    "text": {"text": f"{QUESTION} {ANSWER}"},
}
OWN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


def save_chat_model(directory, model_dir, template):
    """The tiny model with a chat template of its own."""
    shutil.copytree(model_dir, directory)
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.fixture
def rows(tmp_path):
    def write(*records, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("form", "own", "named", "said"),
    [
        ("prompt", True, None, "the tokenizer's own"),
        ("instruction", True, None, "the tokenizer's own"),
        ("messages", True, None, "the tokenizer's own"),
        ("text", True, None, "none (plain text)"),
        ("prompt", False, None, "none (raw text)"),
        ("instruction", False, None, "alpaca"),
        ("text", False, None, "none (plain text)"),
        ("prompt", False, "plain", "plain"),
        ("prompt", True, "plain", "plain, saved with the adapter; the model has one of its own: --template tokenizer"),
        ("instruction", True, "alpaca", "alpaca, saved with the adapter; the model has one of its own: --template tokenizer"),
    ],
)  # fmt: skip
def test_the_summary_names_the_template_and_the_adapter_keeps_it(
    train, model_dir, tmp_path, rows, form, own, named, said
):
    model = save_chat_model(tmp_path / "chat", model_dir, OWN) if own else model_dir
    directory, out = train(model=model, dataset=rows(*[FORMS[form]] * 8), template=named)
    assert f"template   {said}\n" in out
    trained_by = load_chat_template(None, load_tokenizer(directory))
    if said.startswith("none"):
        assert (trained_by is None) != own
    else:
        wanted = load_chat_template(named or ("alpaca" if said == "alpaca" else None), load_tokenizer(model))
        assert trained_by.source == wanted.source.replace("{% generation %}", "{% if true %}").replace(
            "{%- generation %}", "{%- if true %}"
        ).replace("{% endgeneration %}", "{% endif %}")


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("form", ["prompt", "instruction", "messages", "text"])
def test_prepared_rows_are_worded_once_by_whatever_template_trains_on_them(
    train, call, model_dir, tmp_path, monkeypatch, rows, form, own
):
    if form == "messages" and not own:
        pytest.skip("conversations need a template")
    model = save_chat_model(tmp_path / "chat", model_dir, OWN) if own else model_dir
    dataset = rows(*[FORMS[form]] * 8)
    code, _, err = call("prepare", "--model", model, "--dataset", dataset, "--output", tmp_path / "prepared")
    assert code == 0, err
    others = ["alpaca", "plain"] if form != "text" else []
    for template in [None, *others]:
        losses = []
        for source in (dataset, tmp_path / "prepared" / "train.jsonl"):
            directory, _ = train(
                f"{template}-{source.stem}", model=model, dataset=source, template=template, cutoff_len=200
            )
            losses.append([r["loss"] for r in metrics(directory) if "loss" in r])
        assert losses[0] == losses[1]


def test_what_is_not_read_is_said(train, rows):
    _, out = train(dataset=rows(*[FORMS["prompt"] | {"context": "In 2000.", "id": 3, "empty": ""}] * 8))
    assert "rows.jsonl: not read: context, id\n" in out
    _, out = train("other", dataset=rows(*[FORMS["prompt"]] * 8))
    assert "not read" not in out


def test_a_prompt_that_training_never_saw_and_lost_thoughts_are_warned_of(train, model_dir, tmp_path, rows):
    thinking = OWN.replace("[assistant] {% endif %}", "[assistant] <think>{% endif %}")
    model = save_chat_model(tmp_path / "chat", model_dir, thinking)
    dataset = rows(*[FORMS["prompt"]] * 8)
    _, out = train(model=model, dataset=dataset)
    (line,) = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert "asks for an answer with " in line and "[assistant] <think>'" in line
    assert "[assistant] by the mill" in line and "choose another template" in line
    _, out = train("other", model=model, dataset=dataset, template="plain")
    assert "warning" not in out


def test_an_early_stop_ends_with_the_best_adapter_and_a_last_one_says_so(train, trainer, monkeypatch, capsys):
    for name, keys in (("stopped", dict(early_stopping_patience=2)), ("last", {})):
        losses = iter([5.0, 4.0, 3.0, 3.5, 3.7])
        monkeypatch.setattr(trainer, "evaluate_loss", lambda *_, losses=losses: next(losses))
        directory, out = train(name, val_size=4, eval_steps=1, save_steps=1, max_steps=4, **keys)
        saved = (directory / "adapter_model.safetensors").read_bytes()
        step = 2 if keys else 4
        assert saved == (directory / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()
        assert ("back to the adapter of step 2, held-out loss 3.0000" in out) == bool(keys)
        said = "saved is the adapter of step 4; step 2 had the lowest held-out loss, 3.0000: --load_best_model_at_end"
        assert (said in out) != bool(keys)
