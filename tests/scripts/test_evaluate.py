"""scripts/evaluate.py: its figures are those that transformers gives on the same tokens, for the base model
and every adapter.
"""

import io
import json
import math
import re
import shutil
import sys
from functools import partial

import pytest
import torch
from support.project import WORDS, metrics
from tqdm import tqdm

from minilora import load_model, load_tokenizer, save_model
from minilora.data.chat import load_chat_template
from minilora.data.examples import split, tokenize
from minilora.data.rows import Row, read_rows
from minilora.inference.evaluation import answers, load_metric
from minilora.inference.generation import generate_text
from minilora.inference.load import load_adapted_tokenizer
from minilora.system.errors import UserError
from minilora.system.terminal import visible

# Losses are summed in another order in float32, over a few hundred tokens: eps 6e-8 times the depth of the
# sums. Seen: 2e-7.
TOLERANCE = 1e-5
UNQUANTIZED = ("--quantization_bit", "none", "--bf16", "false")  # and in float32, on every machine


@pytest.fixture
def evaluate(call):
    """Run `evaluate.py ARGUMENTS`: (exit code, stdout, stderr)."""
    return partial(call, "evaluate")


@torch.no_grad()
def transformers_perplexity(model_dir, dataset, adapter=None):
    """exp of the mean of transformers' losses, one row at a time."""
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    if adapter is not None:
        peft = pytest.importorskip("peft")
        theirs = peft.PeftModel.from_pretrained(theirs, adapter).eval()
    total = count = 0
    for example in tokenize(read_rows(dataset), load_tokenizer(model_dir), 256).examples:
        input_ids = torch.from_numpy(example.input_ids).long()
        labels = input_ids.where(torch.from_numpy(example.loss_mask), -100)
        total += theirs(input_ids=input_ids[None], labels=labels[None]).loss.item() * example.supervised
        count += example.supervised
    return math.exp(total / count)


def test_perplexity_is_that_of_transformers_and_peft_for_the_base_and_each_adapter(
    evaluate, model_dir, dataset, adapters, tmp_path
):
    chosen = ("--adapter", adapters / "one", "--adapter", f"other={adapters / 'two'}", "--dataset", dataset)
    code, out, err = evaluate(*chosen, *UNQUANTIZED, "--output", tmp_path / "result.json")
    assert code == 0, err
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    expected = {
        "base": transformers_perplexity(model_dir, dataset),
        "one": transformers_perplexity(model_dir, dataset, adapters / "one"),
        "other": transformers_perplexity(model_dir, dataset, adapters / "two"),
    }
    assert results.keys() == expected.keys()
    assert len({round(perplexity, 2) for perplexity in expected.values()}) == 3  # the adapters do something
    for name, perplexity in expected.items():
        assert results[name]["perplexity"] == pytest.approx(perplexity, rel=TOLERANCE)
        assert f"{perplexity:.2f}" in out
        if name != "base":
            assert results[name]["perplexity_change"] == pytest.approx(
                perplexity / expected["base"] - 1, rel=100 * TOLERANCE
            )


def test_figures_and_answers_do_not_depend_on_the_batch_size(evaluate, dataset, adapters, tmp_path):
    found = []
    for size in (1, 3, 24):
        keys = (
            "--per_device_eval_batch_size",
            size,
            "--samples",
            2,
            "--exact_match_samples",
            3,
            "--output",
            tmp_path / "r.json",
        )
        code, _, err = evaluate("--adapter", adapters / "one", "--dataset", dataset, *UNQUANTIZED, *keys)
        assert code == 0, err
        found.append(json.loads((tmp_path / "r.json").read_text()))
    for other in found[1:]:
        assert other["answers"] == found[0]["answers"] and len(other["answers"]) == 3
        for name in ("base", "one"):
            assert other["results"][name]["loss"] == pytest.approx(
                found[0]["results"][name]["loss"], rel=TOLERANCE
            )


def test_figures_and_answers_of_one_pass_are_those_of_one_adapter_after_the_other(
    evaluate, dataset, adapters, tmp_path
):
    def found(*chosen):
        words = [word for name in chosen for word in ("--adapter", f"{name}={adapters / name}")]
        words += ["--samples", 5, "--exact_match_samples", 4, "--output", tmp_path / "r.json"]
        words += ["--model", model_dir] if not chosen else []
        code, out, err = evaluate(*words, "--dataset", dataset, *UNQUANTIZED)
        assert code == 0, err
        written = json.loads((tmp_path / "r.json").read_text())
        return written["results"], [row["answers"] for row in written["answers"]], out

    model_dir = json.loads((adapters / "one" / "adapter_config.json").read_text())["base_model_name_or_path"]
    results, texts, out = found("one", "two")
    assert len({row[name] for row in texts for name in row}) > 5  # the models say different things
    for chosen in ("one",), ("two",), ():
        alone, texts_alone, _ = found(*chosen)
        for name in ("base", *chosen):
            assert [row[name] for row in texts] == [row[name] for row in texts_alone]
            for key, value in alone[name].items():
                # A loss is a mean of float32 losses, summed in float64: off by some units of 6e-8. A change is
                # a difference of two of them, of about 6.
                assert results[name][key] == pytest.approx(value, rel=1e-6, abs=1e-5 * ("change" in key))
    assert [line.split()[0] for line in out.split("perplexity")[1].splitlines()[1:4]] == [
        "base",
        "one",
        "two",
    ]


def test_samples_show_every_model_beside_what_was_expected(evaluate, dataset, adapters, examples):
    code, out, err = evaluate("--adapter", adapters / "one", "--dataset", dataset, "--samples", 1)
    assert code == 0, err
    prompt, *lines = out.split("\n\n")[1].splitlines()
    assert prompt == examples[0]["prompt"]
    assert [line.split()[0] for line in lines] == ["base", "one", "expected"]
    assert lines[2].split(maxsplit=1)[1] == examples[0]["completion"]


def test_samples_are_shown_whole_in_lines_that_fit(evaluate, model_dir, tmp_path):
    answer = f"{' '.join(WORDS * 8)}\n\n    indented\n{'x' * 300}"
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "say", "completion": answer}) + "\n")
    keys = ("--dataset", tmp_path / "long.jsonl", "--samples", 1, "--max_new_tokens", 200)
    code, out, err = evaluate("--model", model_dir, *keys, "--output", tmp_path / "r.json")
    assert code == 0, err
    shown = re.split(r"\n\n +loss", out.split("  expected")[1])[0]
    assert "".join(shown.split()) == "".join(answer.split()) and re.search(r"\n +    indented\n", shown)
    assert max(map(len, out.splitlines()[1:])) <= 110
    said = json.loads((tmp_path / "r.json").read_text())["answers"][0]["answers"]["base"]
    assert "".join(visible(said).split()) in "".join(out.split())


@pytest.mark.parametrize("limit", [None, 3])
def test_max_new_tokens_limits_answers_and_is_by_default_a_few_more_than_expected(
    evaluate, model_dir, dataset, tmp_path, monkeypatch, limit
):
    monkeypatch.setattr("minilora.inference.evaluation.end_tokens", lambda *_: set())  # no answer ends early
    keys = ("--model", model_dir, "--dataset", dataset, "--max_samples", 2, "--samples", 2)
    keys += ("--max_new_tokens", limit) if limit else ()
    monkeypatch.setattr(
        "minilora.inference.evaluation.generate_text",
        lambda *arguments, **settings: found.append(settings) or ["it"] * 2,
    )
    found = []
    assert evaluate(*keys)[0] == 0
    tokenizer, rows = load_tokenizer(model_dir), read_rows(dataset)[:2]
    longest = max(len(tokenizer.encode(row.completion, bos=False)) for row in rows)
    assert found[0]["max_new_tokens"] == [limit or longest + 8] * 2


def test_a_prompt_and_its_answer_keep_to_the_positions_of_the_model(model_dir, monkeypatch):
    model, tokenizer = load_model(model_dir), load_tokenizer(model_dir)
    monkeypatch.setattr("minilora.inference.evaluation.end_tokens", lambda *_: set())
    prompt = " ".join(WORDS * 5)
    tokens = len(tokenizer.encode(prompt))
    assert 200 < tokens < 256
    (text,) = answers(model, tokenizer, [Row(prompt, "the fox")], max_new_tokens=1000)
    (cut,) = generate_text(model, tokenizer, [prompt], max_new_tokens=256 - tokens, eos_token_ids=())
    assert text == cut.strip()


@pytest.mark.parametrize("limit, shown", [(None, None), (20, 2)])
def test_a_run_that_held_rows_out_is_evaluated_on_these_rows(
    evaluate, train, dataset, tmp_path, limit, shown
):
    directory, _ = train(val_size=0.25, seed=7, max_steps=3, bf16="false", max_samples=limit)
    command = ("--adapter", directory, "--bf16", "false", "--exact_match_samples", 24, "--max_new_tokens", 1)
    command += ("--max_samples", shown) if shown else ()
    code, out, err = evaluate(*command, "--output", tmp_path / "r.json")
    assert code == 0, err
    _, held_out = split(read_rows(dataset)[:limit], 0.25, seed=7)
    result = json.loads((tmp_path / "r.json").read_text())
    assert [answer["prompt"] for answer in result["answers"]] == [row.prompt for row in held_out[:shown]]
    assert out.startswith(
        f"held out of {dataset} by val_size = 0.25 and seed = 7: {shown or len(held_out)} exa"
    )
    losses = [record["eval_loss"] for record in metrics(directory) if "eval_loss" in record]
    if not shown:
        found = result["results"]
        found = found["base"]["loss"], found["out"]["loss"]
        assert found == pytest.approx((losses[0], losses[-1]), rel=TOLERANCE)


def test_a_bar_shows_how_far_the_losses_and_answers_of_all_models_have_come(
    evaluate, dataset, adapters, monkeypatch
):
    bars = []

    def bar(*, total, desc, disable, **settings):
        assert disable is None  # a bar on a terminal, and none in a pipe
        bars.append(tqdm(total=total, desc=desc, file=io.StringIO(), disable=False))
        return bars[-1]

    monkeypatch.setattr("tqdm.tqdm", bar)
    code, out, _ = evaluate("--adapter", adapters / "one", "--dataset", dataset, "--samples", 3)
    assert code == 0 and [bar.desc for bar in bars] == ["loss of 2 models", "answers of 2 models"]
    assert [bar.n for bar in bars] == [bar.total for bar in bars] == [24, 6]
    assert "token" in bars[1].postfix and "answers:" not in out


def test_val_size_with_a_dataset_holds_the_same_rows_out_of_it(evaluate, train, dataset, tmp_path):
    directory, _ = train(val_size=4, max_steps=1)
    moved = shutil.copy(dataset, tmp_path / "moved.jsonl")
    found = []
    for keys in ((), ("--dataset", moved, "--val_size", 4), ("--dataset", moved)):
        code, _, err = evaluate(
            "--adapter", directory, "--samples", 24, *keys, "--output", tmp_path / "r.json"
        )
        assert code == 0, err
        found.append(
            [answer["prompt"] for answer in json.loads((tmp_path / "r.json").read_text())["answers"]]
        )
    assert len(found[0]) == 4 and found[1] == found[0] and len(found[2]) == 24


def test_weights_are_quantized_only_where_a_run_or_a_key_says_so(
    evaluate, train, model_dir, dataset, adapters
):
    run, _ = train(dataset=dataset, max_steps=1, quantization_bit=4)
    plain, _ = train("plain", dataset=dataset, max_steps=1)
    for chosen, kind in (
        (("--model", model_dir), "float32"),
        (("--model", model_dir, "--quantization_type", "fp4"), "fp4"),
        (("--model", model_dir, "--load_in_4bit", "true"), "nf4"),
        (("--adapter", adapters / "one"), "float32"),
        (("--adapter", adapters / "one", "--quantization_bit", 8), "int8"),
        (("--adapter", run), "nf4"),
        (("--adapter", run, "--quantization_bit", "none"), "float32"),
        (("--adapter", plain), "float32"),
    ):
        code, _, err = evaluate(*chosen, "--dataset", dataset, "--bf16", "false", "--max_samples", 1)
        assert code == 0, err
        first, *more = err.splitlines()
        assert f": {kind}" in first and "requested by bf16: false" in first
        # where an adapter corrects quantized weights, a line says so
        explained = [f"the weights are in {kind}, as the adapter's settings say; --quantization_bit none"]
        assert [line[: len(explained[0])] for line in more] == explained * (
            "--adapter" in chosen and kind != "float32"
        )


def test_a_trained_adapter_is_an_improvement_and_its_exact_answers_are_counted(evaluate, train, tmp_path):
    dataset = tmp_path / "few.jsonl"
    rows = [{"prompt": f"{word}?", "completion": "by the mill"} for word in WORDS[1:5]]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    directory, _ = train(dataset=dataset, max_steps=60, learning_rate=0.005, preset="high_capacity_r32_all")
    code, _, err = evaluate(
        "--adapter",
        directory,
        "--dataset",
        dataset,
        "--exact_match_samples",
        4,
        "--output",
        tmp_path / "r.json",
    )
    assert code == 0, err
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    # The head is random and frozen, its rows of length 0.1 sqrt(64) = 0.8 and hidden states of length
    # sqrt(64) = 8: a logit reaches 6.4 where 319 others are about e^0.3 each, so no token gets much surer
    # than 0.6 and no loss much below 0.5.
    assert results["out"]["loss"] < 1 < 4 < results["base"]["loss"]
    assert results["out"]["perplexity_change"] < -0.9
    assert (results["base"]["exact_match"], results["out"]["exact_match"]) == (0.0, 1.0)


def test_the_settings_of_the_run_hold_unless_others_are_given(evaluate, train, dataset, tmp_path):
    directory, _ = train(
        dataset=dataset, max_steps=2, save_steps=1, template="alpaca", eval_dataset=dataset, cutoff_len=200
    )
    settings = []
    for adapter, *keys in (
        [directory],
        [directory, "--template", "plain", "--quantization_bit", 8, "--dataset", dataset],
        [directory / "checkpoint-1"],
    ):
        code, _, err = evaluate("--adapter", adapter, *keys, "--output", tmp_path / "r.json")
        assert code == 0, err
        settings.append(json.loads((tmp_path / "r.json").read_text())["settings"])
    assert settings[2] | {"adapters": {}} == settings[0] | {
        "adapters": {}
    }  # those of a checkpoint are the run's
    assert (settings[0]["template"], settings[0]["cutoff_len"], settings[0]["quantization_bit"]) == (
        "alpaca",
        200,
        None,
    )
    assert (settings[1]["template"], settings[1]["cutoff_len"], settings[1]["quantization_bit"]) == (
        "plain",
        200,
        8,
    )
    assert settings[0]["dataset"] == str(dataset)


def test_max_samples_of_the_training_does_not_shorten_the_evaluation(evaluate, train, dataset, tmp_path):
    directory, _ = train(dataset=dataset, max_steps=1, max_samples=3)
    examples = []
    for keys in ((), ("--max-samples=2",), ("--max_samples", 2)):
        code, _, err = evaluate(
            "--adapter", directory, "--dataset", dataset, *keys, "--output", tmp_path / "r.json"
        )
        assert code == 0, err
        examples.append(json.loads((tmp_path / "r.json").read_text())["examples"])
    assert examples[0] > 3 and examples[1:] == [2, 2]


def test_a_checkpoint_speaks_with_the_tokenizer_of_its_run_unless_it_has_its_own(model_dir, tmp_path):
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-5"
    for directory, words in ((model_dir, None), (run, "the run's"), (checkpoint, "its own")):
        if words is not None:
            load_tokenizer(model_dir).save(directory)
            (directory / "chat_template.jinja").write_text(words)
        for adapter in (checkpoint, tmp_path / "run" / "other"):
            found = load_adapted_tokenizer(model_dir, {"default": adapter}).chat_template
            assert found == (words if adapter == checkpoint else None)


def test_conversations_are_formatted_by_the_template(evaluate, model_dir, tmp_path):
    dataset, turns = tmp_path / "chat.jsonl", [("user", "where is the fox"), ("assistant", "by the mill")]
    dataset.write_text(
        json.dumps({"messages": [dict(role=role, content=content) for role, content in turns]}) + "\n"
    )
    keys = ("--model", model_dir, "--dataset", dataset, "--output", tmp_path / "r.json", "--samples", 1)
    code, _, err = evaluate(*keys)
    assert code == 2 and "no chat template" in err and "chat.jsonl, line 1" in err
    code, _, err = evaluate(*keys, "--template", "alpaca")
    assert code == 0, err
    written = json.loads((tmp_path / "r.json").read_text())
    template, messages = (
        load_chat_template("alpaca", load_tokenizer(model_dir)),
        [dict(role=r, content=c) for r, c in turns],
    )
    assert written["supervised_tokens"] == template.encode(messages)[1].sum()
    assert written["settings"]["template"] == "alpaca"
    assert (written["answers"][0]["prompt"], written["answers"][0]["expected"]) == (
        "where is the fox",
        "by the mill",
    )


def test_a_damaged_models_figures_are_not_a_number(evaluate, model_dir, dataset, tmp_path):
    model = load_model(model_dir, dtype=torch.float32)
    model.model.norm.weight.data[3] = 3e38  # finite, and times an activation it is not
    save_model(model, tmp_path / "damaged")
    load_tokenizer(model_dir).save(tmp_path / "damaged")
    keys = ("--model", tmp_path / "damaged", "--dataset", dataset, "--output", tmp_path / "r.json")
    code, out, err = evaluate(*keys, "--quantization_bit", "none")
    assert code == 0 and out.splitlines()[-2].split() == ["base", "nan", "nan"], err
    assert json.loads((tmp_path / "r.json").read_text())["results"] == {
        "base": {"loss": None, "perplexity": None}
    }


@pytest.mark.parametrize("package, name", [("rouge_score.rouge_scorer", "rouge"), ("sacrebleu", "bleu")])
def test_metrics_are_0_for_nothing_in_common_and_full_for_the_expected_answer(package, name):
    pytest.importorskip(package)
    rows = [Row("p", "the old fox lives by the river"), Row("p", "a young owl sits in the mill")]
    score, full = load_metric(name), {"rouge": 1.0, "bleu": 100.0}[name]
    assert score([row.completion for row in rows], rows) == pytest.approx(full)
    assert score(["seven green pens fell", "nine"], rows) < 0.05 * full


def test_rouge_is_the_harmonic_mean_of_the_shares_of_the_common_subsequence():
    pytest.importorskip("rouge_score")
    # "old by river" is common: 3 of the 4 words said, 3 of the 6 expected
    score = load_metric("rouge")(["old ran by river"], [Row("p", "the old fox by the river")])
    assert score == pytest.approx(2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6))


@pytest.mark.parametrize("package, name", [("rouge_score", "rouge"), ("sacrebleu", "bleu")])
def test_a_missing_package_is_named_with_the_command_to_install_it(monkeypatch, package, name):
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(UserError, match=rf"{package}.*pip install 'minilora\[metrics\]'"):
        load_metric(name)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--dataset": "nowhere.jsonl"}, "nowhere.jsonl does not exist"),
        ({"--model": "./nowhere/at/all"}, "no such directory: './nowhere/at/all'"),
        ({"--adapter": "MODEL"}, "is not an adapter"),
        ({"--cutoff_len": 300}, "cutoff_len = 300 is more than the 256 positions of the model"),
        ({"--per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be above 0, not 0"),
        ({"--quantization_bit": 3}, "3"),
        ({"--sample": 3}, "unknown key 'sample'"),
        ({"--samples": -3}, "--samples must be at least 0, not -3"),
        ({"--metrics": "rogue", "--exact_match_samples": 1}, "metric 'rogue' is not known; nearest: 'rouge'"),
        ({"--metrics": "bleu"}, "--exact_match_samples N"),
        ({"--max_new_tokens": 9}, "--exact_match_samples N"),
        ({"--max_new_tokens": 0, "--samples": 1}, "--max_new_tokens must be at least 1, not 0"),
        ({"--max_samples": 0}, "--max_samples must be at least 1, not 0"),
        ({"--template": "llama9"}, "template = 'llama9' is not known"),
        ({"--output": "no/such/place.json"}, "no/such (No such file or directory)"),
        ({"--output": "."}, "--output . exists and is no file"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    evaluate, model_dir, dataset, tmp_path, monkeypatch, changes, message
):
    monkeypatch.chdir(tmp_path)
    keys = {"--model": model_dir, "--dataset": dataset} | changes
    words = [model_dir if word == "MODEL" else word for pair in keys.items() for word in pair]
    code, out, err = evaluate(*words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert out == ""


def test_an_adapter_without_weights_is_refused_before_the_base_model_is_read(
    evaluate, dataset, adapters, tmp_path, monkeypatch
):
    monkeypatch.setattr("minilora.inference.load.read_config", lambda *_: pytest.fail("the model is read"))
    shutil.copytree(adapters / "one", tmp_path / "one")
    (tmp_path / "one" / "adapter_model.safetensors").unlink()
    code, out, err = evaluate("--adapter", tmp_path / "one", "--dataset", dataset)
    assert code == 2 and err == f"error: {tmp_path / 'one'} has no adapter_model.safetensors\n" and not out


def test_a_name_that_is_taken_is_refused(evaluate, dataset, adapters):
    for names in (
        ("one", "one"),
        ("one", "base"),
        ("one", "half"),
    ):  # the last is a method of what adapters are kept in
        places = [word for name in names for word in ("--adapter", f"{name}={adapters / 'one'}")]
        code, _, err = evaluate(*places, "--dataset", dataset)
        assert code == 2 and f"the name {names[1]!r} is taken" in err
