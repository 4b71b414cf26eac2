"""answers.jsonl: what a run keeps of its answers, and who gets it."""

import json

import pytest

from minilora import UserError
from minilora.data.rows import Row
from minilora.run.answers import read_answers, write_answers
from minilora.run.sharing import files_to_share

KEYS = dict(val_size=4, exact_match_samples=3)


def test_a_run_keeps_the_answers_that_evaluate_gives_to_the_same_prompts(train, call, dataset, tmp_path):
    directory, _ = train(eval_dataset=dataset, exact_match_samples=5, bf16="false")
    result = tmp_path / "result.json"
    arguments = ("--dataset", dataset, "--exact_match_samples", 5, "--output", result, "--bf16", "false")
    code, _, err = call("evaluate", "--adapter", directory, *arguments)
    assert code == 0, err
    evaluated = json.loads(result.read_text())["answers"]
    kept = read_answers(directory)
    assert [(line["prompt"], line["expected"]) for line in kept] == [
        (e["prompt"], e["expected"]) for e in evaluated
    ]
    assert [dict(base=line["base"], out=line["adapted"]) for line in kept] == [
        e["answers"] for e in evaluated
    ]


def test_answers_are_not_shared_and_go_with_the_run_that_gave_them(train):
    directory, _ = train(**KEYS, save_steps=2)
    assert len(read_answers(directory)) == 3
    assert "metrics.jsonl" in files_to_share(directory) and "answers.jsonl" not in files_to_share(directory)
    resumed = directory / "checkpoint-2"
    train(val_size=4, resume_from_checkpoint=resumed)  # which answers nothing
    assert read_answers(directory) == []
    train(**KEYS, save_steps=2, overwrite_output_dir="true")
    assert len(read_answers(directory)) == 3
    train(overwrite_output_dir="true")
    assert read_answers(directory) == []


def test_any_text_is_read_as_it_was_written(tmp_path):
    texts = ["a\nb\u2028c", "", "\ud800", "</script>", '"'] * 2
    rows = [Row(text, f" {text}x ") for text in texts]
    write_answers(tmp_path, rows, texts, texts[::-1])
    assert read_answers(tmp_path) == [
        dict(prompt=text, expected=f" {text}x ".strip(), base=text, adapted=after)
        for text, after in zip(texts, texts[::-1], strict=True)
    ]


GOOD = dict(prompt="a", expected="b", base="c", adapted="d")


@pytest.mark.parametrize(
    "line, said",
    [
        ("5", "must hold a JSON object"),
        (json.dumps(GOOD | {"base": None}), "the key base is missing"),
        (json.dumps(GOOD | {"adapted": ["d"]}), "adapted must be text"),
        ("{", "not valid JSON"),
    ],
)
def test_a_line_that_holds_no_answers_is_named(tmp_path, line, said):
    (tmp_path / "answers.jsonl").write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(UserError, match=f"answers.jsonl, line 2 .*{said}"):
        read_answers(tmp_path)
