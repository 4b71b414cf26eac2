"""scripts/chat.py: a conversation, one question, a file of questions; a reused cache changes no token."""

import json
import shutil
from dataclasses import replace
from functools import partial

import chat as chat_script
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import CausalLM, UserError, generate, load_adapter, load_model, load_tokenizer, save_model
from minilora.data.chat import load_chat_template
from minilora.inference.assistant import Assistant, GenerationSettings, reuse_cache
from minilora.inference.generation import generate_stream, generate_text

TEMPLATE = r"""{{- bos_token }}
{%- for m in messages %}{{ m.content + (eos_token if m.role == 'assistant' else '\n### Response:\n') }}{% endfor %}"""
GREEDY = ("--temperature", "0", "--max_new_tokens", "6", "--quantization_bit", "none")


@pytest.fixture
def chat(call):
    """Run `chat.py ARGUMENTS`, with lines typed: (exit code, stdout, stderr)."""
    return partial(call, "chat")


def expected_answer(model_dir, prompt, adapter=None, **changes):
    """The greedy answer to a prompt, as tokens or text, without a cache from earlier turns."""
    model = load_model(model_dir, dtype=torch.float32)
    if adapter is not None:
        load_adapter(model, adapter)
        model.eval()
    return generate_text(model, load_tokenizer(model_dir), [prompt], **{"max_new_tokens": 6} | changes)[0]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def replies(out: str) -> list[str]:
    """The text printed after each prompt sign."""
    return [reply.strip("\n") for reply in out.split("> ")[1:]]


def test_an_instruction_prints_its_answer_and_nothing_else(chat, model_dir):
    code, out, err = chat("--model", model_dir, "--instruction", "the old fox", *GREEDY)
    assert code == 0, err
    assert out == expected_answer(model_dir, "the old fox") + "\n"


def test_adapters_are_switched_within_a_conversation(chat, model_dir, adapters):
    typed = "the old fox\n/adapter two\nthe old fox\n/base\nthe old fox\n/adapter\n/adapter three\n/quit\nnot read\n"
    chosen = ("--adapter", adapters / "one", "--adapter", adapters / "two")
    code, out, err = chat(*chosen, *GREEDY, typed=typed)
    assert code == 0, err
    one, _, two, _, base, names, unknown, end = replies(out)
    assert one == expected_answer(model_dir, "the old fox", adapters / "one")
    assert two == expected_answer(model_dir, "the old fox", adapters / "two")
    assert base == expected_answer(model_dir, "the old fox")
    assert len({one, two, base}) == 3
    assert names == "one, two" and "no adapter called 'three'" in unknown and end == ""


def test_earlier_turns_are_part_of_the_prompt_until_cleared(chat, model_dir):
    typed = "the old fox\na young owl\n/clear\na young owl\n"
    code, out, err = chat("--model", model_dir, "--template", "alpaca", *GREEDY, typed=typed)
    assert code == 0, err
    template = load_chat_template("alpaca", load_tokenizer(model_dir))
    messages, said = [], []
    for question in ("the old fox", "a young owl"):
        messages.append({"role": "user", "content": question})
        said.append(expected_answer(model_dir, template.encode_prompt(messages)))
        messages.append({"role": "assistant", "content": said[-1]})
    alone = expected_answer(model_dir, template.encode_prompt([{"role": "user", "content": "a young owl"}]))
    first, second, _, cleared, _ = replies(out)
    assert (first, second, cleared) == (said[0], said[1], alone)
    assert second != cleared


def test_settings_are_shown_changed_and_checked(chat, model_dir):
    lines = ["/settings", "/set temperature 0.25", "/settings", "/set top_q 1", "/set top_p 2"]
    lines += ["/set top_k much", "/sett", "/", "/set"]
    code, out, err = chat("--model", model_dir, "--top_k", "7", typed="\n".join(lines))
    assert code == 0, err
    before, _, after, unknown, range_, number_type, command, help_, arguments, _ = replies(out)
    assert "temperature 0.7" in before and "top_k 7" in before and "temperature 0.25" in after
    assert unknown == "error: there is no setting 'top_q'; nearest: 'top_p'"
    assert range_ == "error: top_p must be above 0 and at most 1, not 2.0"
    assert number_type == "error: top_k must be a whole number, not 'much'"
    assert command.startswith("error: /sett is not a command") and "/adapter" in help_
    assert arguments == "error: /set takes other arguments; see /help"


def test_the_same_seed_samples_the_same_answers(chat, model_dir):
    keys = ("--model", model_dir, "--quantization_bit", "none")
    keys += ("--temperature", "2", "--max_new_tokens", "12", "--top_p", "1")
    outs = [chat(*keys, "--seed", seed, typed="the old fox\nthe old fox\n")[1] for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]
    first, second, _ = replies(outs[0])
    assert first != second  # one generator for the whole conversation


def test_every_row_of_a_file_comes_back_with_the_answer_it_would_get_alone(chat, model_dir, tmp_path):
    prompts = ["the old fox", "a", "live by the river in a small blue house"]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "id": i}) + "\n" for i, prompt in enumerate(prompts))
    )
    code, _, err = chat(
        "--model", model_dir, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *GREEDY
    )
    assert code == 0, err
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == [0, 1, 2]
    assert [row["prediction"] for row in found] == [
        expected_answer(model_dir, prompt).strip() for prompt in prompts
    ]


def test_a_row_may_choose_its_adapter_and_the_answer_says_whose_it_is(chat, model_dir, adapters, tmp_path):
    chosen = ["two", None, "one", "", "base", "two"]
    rows = [dict(prompt=f"the old {word}", adapter=name) for word, name in zip("abcdef", chosen, strict=True)]
    rows.append(dict(prompt="the old g"))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = [word for name in ("one", "two") for word in ("--adapter", f"{name}={adapters / name}")]
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    keys = ("--bf16", "false", "--per_device_eval_batch_size", 3)  # in 16 bits near ties may fall either way
    code, out, err = chat(*named, *files, *GREEDY, *keys)
    assert code == 0, err
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["adapter"] for row in found] == ["two", "base", "one", "base", "base", "two", "one"]
    for row in found:
        adapter = None if row["adapter"] == "base" else adapters / row["adapter"]
        assert row["prediction"] == expected_answer(model_dir, row["prompt"], adapter).strip()
    assert out == f"7 answers by two, base, one: {tmp_path / 'out.jsonl'}\n"


@pytest.mark.parametrize(
    "name, said",
    [
        ("onee", "adapter 'onee' is none that --adapter NAME=DIR gives; nearest: 'one'"),
        (3, "adapter 3 is none"),
    ]
    + [(["one"], "adapter ['one'] is none")],
)
def test_a_row_that_names_no_adapter_is_told_by_file_and_line_before_weights_are_read(
    chat, adapters, tmp_path, monkeypatch, name, said
):
    monkeypatch.setattr("minilora.inference.load.load_base_model", lambda *_: pytest.fail("weights are read"))
    (tmp_path / "in.jsonl").write_text(
        '{"prompt": "a"}\n' + json.dumps(dict(prompt="b", adapter=name)) + "\n"
    )
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    code, _, err = chat("--adapter", f"one={adapters / 'one'}", *files, *GREEDY)
    assert code == 2 and err.count("\n") == 1 and f"in.jsonl, line 2: {said}" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_a_long_row_shortens_its_own_answer_and_no_other(chat, model_dir, tmp_path):
    prompts = ["the old fox", "a " * 251, "a young owl"]
    room = 256 - len(load_tokenizer(model_dir).encode(prompts[1]))
    assert 1 <= room < 6
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    code, _, err = chat(
        "--model", model_dir, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", *GREEDY
    )
    assert code == 0, err
    found = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rooms = (6, room, 6)
    assert found == [
        expected_answer(model_dir, prompt, max_new_tokens=room).strip()
        for prompt, room in zip(prompts, rooms, strict=True)
    ]


def test_rows_of_every_form_are_formatted_by_the_models_own_template(chat, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
    forms = [{"prompt": "the old fox"}, {"instruction": "the old fox"}, {"messages": [user("the old fox")]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(form) + "\n" for form in forms))
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    code, _, err = chat("--model", tmp_path / "model", *files, *GREEDY)
    assert code == 0, err
    found = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    worded = expected_answer(model_dir, "the old fox\n### Response:\n")
    assert found == [worded.strip()] * 3 and worded != expected_answer(model_dir, "the old fox")
    assert chat("--model", tmp_path / "model", "--instruction", "the old fox", *GREEDY)[1] == worded + "\n"


def test_without_a_template_prompts_are_raw_and_instructions_get_alpacas_words(chat, model_dir, tmp_path):
    for form, template in (("prompt", None), ("instruction", "alpaca")):
        (tmp_path / "in.jsonl").write_text(json.dumps({form: "the old fox"}) + "\n")
        files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / f"{form}.jsonl")
        code, _, err = chat("--model", model_dir, *files, *GREEDY)
        assert code == 0, err
        tokenizer = load_tokenizer(model_dir)
        asked = tokenizer.encode("the old fox")
        if template:
            asked = load_chat_template(template, tokenizer).encode_prompt([user("the old fox")])
        found = json.loads((tmp_path / f"{form}.jsonl").read_text())["prediction"]
        assert found == expected_answer(model_dir, asked).strip()


def test_rows_that_cannot_be_answered_are_named_before_weights_are_read(chat, model_dir, tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(model_dir / name, tmp_path / "model")  # and no weights
    for row, said in (
        ({"prompt": "a " * 300}, "in.jsonl, line 2 is 302 tokens long; the model has 256 positions"),
        (
            {"messages": [{"role": "user", "content": "fox"}]},
            "in.jsonl, line 2: messages need a chat template",
        ),
    ):
        (tmp_path / "in.jsonl").write_text('{"prompt": "fox"}\n' + json.dumps(row) + "\n")
        files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
        code, _, err = chat("--model", tmp_path / "model", *files, *GREEDY)
        assert code == 2 and err.count("\n") == 1 and said in err


def test_a_tokenizer_of_another_model_is_one_line(chat, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "model")
    model = load_model(model_dir)
    config = replace(model.config, vocab_size=100)
    save_model(CausalLM(config), tmp_path / "model")
    (tmp_path / "in.jsonl").write_text('{"prompt": "the old fox"}\n')
    for keys in (
        ["--instruction", "the old fox"],
        ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"],
    ):
        code, _, err = chat("--model", tmp_path / "model", *keys, *GREEDY)
        assert (
            code == 2
            and "but the model knows 100: they do not belong to the same model" in err.splitlines()[-1]
            and "Traceback" not in err
        )


def test_a_line_that_ends_in_a_backslash_continues_on_the_next_one(chat, model_dir):
    code, out, err = chat("--model", model_dir, *GREEDY, typed="the old\\\nfox:\\\na\n/help\n")
    assert code == 0, err
    answer, help_, _ = replies(out)
    assert (
        answer.strip() == expected_answer(model_dir, "the old\nfox:\na").strip().replace("\x18", "\\x18")
        and "a line that ends in \\" in help_
    )


def test_instructions_and_messages_in_a_file_are_formatted_by_the_template(chat, model_dir, tmp_path):
    template = load_chat_template("alpaca", load_tokenizer(model_dir))
    apart = {"role": "user", "content": "the old\nfox", "instruction": "the old", "input": "fox"}
    turns = [{"role": "user", "content": "the owl"}, {"role": "assistant", "content": "expected"}]
    row = {"instruction": "the old", "input": "fox"}
    rows = [row, {"messages": turns}, row | {"system": "be short", "history": [["the owl", "expected"]]}]
    asked = [[apart], turns[:1], [{"role": "system", "content": "be short"}, *turns, apart]]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    code, _, err = chat("--model", model_dir, "--template", "alpaca", *files, *GREEDY)
    assert code == 0, err
    found = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    wanted = [expected_answer(model_dir, template.encode_prompt(messages)).strip() for messages in asked]
    assert found == wanted
    assert [
        chat_script.parse_question("in.jsonl", row).messages for row in rows
    ] == asked  # a random model may answer two of them alike
    assert found[0] != expected_answer(model_dir, "the old\nfox").strip()


@pytest.mark.parametrize(
    "keys, message",
    [
        (("--input", "in.jsonl"), "--input and --output go together"),
        (("--input", "in.jsonl", "--output", "no/such/out.jsonl"), "no/such (No such file or directory)"),
        (("--input", "in.jsonl", "--output", "."), "--output . exists and is no file"),
        (
            ("--input", "in.jsonl", "--output", "out.jsonl"),
            "in.jsonl, line 2: no text in prompt, instruction or messages",
        ),
        (("--input", "absent.jsonl", "--output", "out.jsonl"), "absent.jsonl does not exist"),
        (
            ("--temperature", "-1"),
            "temperature must be 0 (the most likely token) or at least 1e-06, not -1.0",
        ),
        (("--temperature", "nan"), "or at least 1e-06, not nan"),
        (("--seed", "-1"), "seed must be at least 0"),
        (("--system", "be brief"), "a system prompt needs a chat template"),
        (("--template", "chatml"), "needs the token <|im_start|>"),
        (
            ("--instruction", "fox " * 300, "--quantization_bit", "none"),
            "fill the 256 positions of the model",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_2(chat, model_dir, tmp_path, monkeypatch, keys, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text('{"prompt": "fox"}\n{"question": "owl"}\n')
    code, _, err = chat("--model", model_dir, *keys)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and message in last and "Traceback" not in err
    assert not (tmp_path / "out.jsonl").exists()


# ---- the reused cache --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(model_dir):
    return load_model(model_dir, dtype=torch.float32)


@given(
    shared=st.integers(0, 12), new=st.integers(1, 6), answered=st.integers(0, 5), seed=st.integers(0, 2**16)
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_reused_cache_changes_no_token(model, shared, new, answered, seed):
    """The second prompt shares any part of the first one, from nothing to all of it."""
    generator = torch.Generator().manual_seed(seed)
    first, other = (torch.randint(3, 300, (1, 12), generator=generator) for _ in range(2))
    cache = reuse_cache(model, None, [], first[0].tolist(), 5)
    tokens = first[0].tolist()
    for _, token in zip(
        range(answered),
        generate_stream(model, first, max_new_tokens=5, eos_token_ids=(), cache=cache),
        strict=False,
    ):
        tokens.append(int(token))
    second = torch.cat((first[:, :shared], other[:, :new]), dim=1)
    carried = reuse_cache(model, cache, tokens, second[0].tolist(), 4)
    assert carried.length <= second.shape[1] - 1
    assert carried.length >= min(shared, cache.length, second.shape[1] - 1)
    steps = list(generate_stream(model, second, max_new_tokens=4, eos_token_ids=(), cache=carried))
    assert torch.equal(
        torch.cat((second, torch.stack(steps, dim=1)), dim=1),
        generate(model, second, max_new_tokens=4, eos_token_ids=()),
    )


def test_only_the_new_tokens_of_a_second_turn_go_through_the_model(model, model_dir):
    tokenizer = load_tokenizer(model_dir)
    plain = load_chat_template("alpaca", tokenizer)
    assistant = Assistant(model, tokenizer, plain, GenerationSettings(temperature=0, max_new_tokens=5))
    lengths = []
    hook = model.model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    question = {"role": "user", "content": "the old fox and a young owl"}
    answer = "".join(assistant.stream([question]))
    first = lengths[0]
    lengths.clear()
    turns = [question, {"role": "assistant", "content": answer}, {"role": "user", "content": "owl"}]
    "".join(assistant.stream(turns))
    hook.remove()
    total = len(plain.encode_prompt(turns))
    assert first == len(plain.encode_prompt([question]))
    assert lengths[0] <= total - first  # the first prompt is not read again
    assert lengths[1:] == [1] * (len(lengths) - 1)


def test_switching_adapters_drops_the_cache(model, model_dir):
    assistant = Assistant(
        model, load_tokenizer(model_dir), None, GenerationSettings(temperature=0, max_new_tokens=2)
    )
    "".join(assistant.stream([{"role": "user", "content": "the old fox"}]))
    assert assistant.cache.length > 0
    assistant.switch_adapter(None)
    assert assistant.cache is None


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="max_new_tokens must be at least 1, not 0"):
        GenerationSettings(max_new_tokens=0)
