"""Chat templates: tokens equal those of transformers and mistral_common, and exactly the answers are learned."""

import json
import re
import shutil
import unicodedata
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from minilora import UserError
from minilora.data.chat import ChatTemplate, load_chat_template
from minilora.data.markers import spans_of_tokens
from minilora.data.templates import TEMPLATES
from minilora.data.tokenizer import load_tokenizer

# mistral_common carries the real Mistral tokenizers and is the reference for them.
MISTRAL_COMMON = find_spec("mistral_common")
MISTRAL_FILES = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
}
needs_mistral = pytest.mark.skipif(
    MISTRAL_COMMON is None, reason="mistral_common, which carries Mistral's tokenizers, is missing"
)
MISTRAL = [pytest.param(name, marks=needs_mistral) for name in MISTRAL_FILES]
CHAT_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
CHAT_TOKENS += ["<｜User｜>", "<｜Assistant｜>"]
CORPUS = [
    "Hello world, hello there! The sea is calm tonight.",
    "user assistant system\n\n",
    "Grüße",
    "日本語 🙂🙃",
    "### \n\n\n",
]
# Byte-level with BOS and without it; "▁" behind every special token, or in front of the text only.
JSON = ("llama3", "qwen", "llama2", "mistral-json")


def byte_level(bos: bool) -> tuple[dict, dict]:
    special = ["<|begin_of_text|>", "<|end_of_text|>", *CHAT_TOKENS]
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    if bos:
        start = processors.TemplateProcessing(single=f"{special[0]} $A", special_tokens=[(special[0], 0)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
        return json.loads(backend.to_str()), {"bos_token": special[0], "eos_token": special[1]}
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.normalizer = normalizers.NFC()
    return json.loads(backend.to_str()), {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": special[1],
    }


def byte_fallback(everywhere: bool) -> tuple[dict, dict]:
    """sentencepiece's vocabulary in tokenizer.json. "▁" goes in front of all that follows a special token, or
    of the text only.
    """
    special = ["<unk>", "<s>", "</s>", *CHAT_TOKENS, *([] if everywhere else ["[INST]", "[/INST]"])]
    characters = sorted({*"▁INST[]/", *(c for line in CORPUS for c in line if c.isalpha())})
    pieces = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *characters,
        "he",
        "▁h",
        "▁a",
        "lo",
        "▁▁",
        "▁[",
    ]
    merges = [("h", "e"), ("▁", "h"), ("▁", "a"), ("l", "o"), ("▁", "▁"), ("▁", "[")]
    backend = Backend(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    backend.add_special_tokens(special)
    if everywhere:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(backend.to_str()), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.fixture(scope="session")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("chat")
    made = {
        "llama3": byte_level(True),
        "qwen": byte_level(False),
        "llama2": byte_fallback(True),
        "mistral-json": byte_fallback(False),
    }
    for name, (tokenizer, config) in made.items():
        (root / name).mkdir()
        (root / name / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
        (root / name / "tokenizer_config.json").write_text(
            json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
        )
    for name, file in MISTRAL_FILES.items() if MISTRAL_COMMON else ():
        (root / name).mkdir()
        shutil.copyfile(Path(MISTRAL_COMMON.origin).parent / "data" / file, root / name / "tokenizer.model")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="session")
def ours(directories):
    return {name: load_tokenizer(path) for name, path in directories.items()}


@pytest.fixture(scope="session")
def theirs(directories):
    transformers = pytest.importorskip("transformers", reason="the reference for chat templates")
    return {name: transformers.PreTrainedTokenizerFast.from_pretrained(directories[name]) for name in JSON}


# Conversations

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "a"}]

texts = st.text(max_size=12) | st.text(alphabet=" ab\n#\u0301é日🙂\u2581\ufdd0", max_size=10)
texts |= st.sampled_from(
    [
        "",
        " ",
        "\n",
        "Hello",
        "<s>no</s>",
        "<|im_end|>",
        "<|eot_id|>\n",
        "[INST] a [/INST]",
        "</think>",
        "Hello  \n",
    ]
)


@st.composite
def conversations(draw, words=texts, answered=True):
    messages = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [{"role": "user", "content": draw(words)}, {"role": "assistant", "content": draw(words)}]
    return messages if answered else messages[:-1]


def written(source: str, tokenizer, messages, **options):
    """Return ids and assistant mask of a conversation by transformers."""
    made = tokenizer.apply_chat_template(messages, chat_template=source, return_dict=True, **options)
    return made["input_ids"], made.get("assistant_masks")


def without_generation(template: ChatTemplate, tokenizer) -> ChatTemplate:
    """The same template as one of those that do not say what the assistant writes."""
    source = re.sub(r"\{%(-?) generation %\}", r"{%\1 if true %}", template.source).replace(
        "{% endgeneration %}", "{% endif %}"
    )
    assert "generation %}" not in source and source != template.source
    return ChatTemplate("silent", source, tokenizer)


SUPPORTED = [pytest.param(name, template, id=f"{name}-{template}") for name in JSON for template in TEMPLATES]
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # 28 times


# The same tokens as the reference


@pytest.mark.parametrize(("name", "template"), SUPPORTED)
@given(messages=conversations())
@few
def test_tokens_and_mask_of_every_named_template_are_transformers(ours, theirs, name, template, messages):
    # An answer that ends with token 0, which transformers mistakes for no token.
    assume(messages[0]["content"] or template != "plain")
    chat = load_chat_template(template, ours[name])
    input_ids, loss_mask = chat.encode(messages)
    ids, mask = written(chat.source, theirs[name], messages, return_assistant_tokens_mask=True)
    assert input_ids.tolist() == ids
    rendered = theirs[name].apply_chat_template(messages, chat_template=chat.source, tokenize=False)
    if name != "qwen" or unicodedata.is_normalized(
        "NFC", rendered
    ):  # transformers finds no token for an accent that NFC joins
        assert loss_mask.tolist() == [bool(m) for m in mask]


@pytest.mark.parametrize(("name", "template"), SUPPORTED)
@given(messages=conversations(answered=False))
@few
def test_the_prompt_of_every_named_template_is_transformers(ours, theirs, name, template, messages):
    chat = load_chat_template(template, ours[name])
    assert (
        chat.encode_prompt(messages)
        == written(chat.source, theirs[name], messages, add_generation_prompt=True)[0]
    )


def turns_of(system, questions, answers):
    start = [] if system is None else [("system", system)]
    return start + [
        turn for q, a in zip(questions, answers, strict=True) for turn in (("user", q), ("assistant", a))
    ]


def llama2_format(system, questions, answers):
    if system is not None:
        questions = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{questions[0]}", *questions[1:]]
    return "".join(f"<s>[INST] {q} [/INST] {a} </s>" for q, a in zip(questions, answers, strict=True))


def llama3_format(*said):
    return "<s>" + "".join(
        f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}<|eot_id|>" for role, text in turns_of(*said)
    )


def chatml_format(*said):
    return "<s>" + "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns_of(*said))


def qwen3_format(system, questions, answers):
    return chatml_format(system, questions, [*answers[:-1], "<think>\n\n</think>\n\n" + answers[-1]])


def alpaca_format(system, questions, answers):
    intro = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    pairs = zip(questions, answers, strict=True)
    return f"<s>{system or intro}\n\n" + "\n\n".join(
        f"### Instruction:\n{q}\n\n### Response:\n{a}</s>" for q, a in pairs
    )


def plain_format(system, questions, answers):
    return f"<s>{system or ''}" + "".join(f"{q}{a}</s>" for q, a in zip(questions, answers, strict=True))


FORMATS = {
    "llama2": llama2_format,
    "llama3": llama3_format,
    "chatml": chatml_format,
    "qwen3": qwen3_format,
    "alpaca": alpaca_format,
    "plain": plain_format,
}
words = st.text(alphabet="abc é🙂", min_size=1, max_size=8).map(str.strip).filter(bool)


@pytest.mark.parametrize("template", FORMATS)
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_named_templates_write_the_format_they_are_named_after(ours, template, data):
    """Written a second time, as the models' makers describe them: the name promises this text and not
    another.
    """
    messages = data.draw(conversations(words))
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    said = [message["content"] for message in messages if message["role"] != "system"]
    tokenizer = ours["llama2"]
    ids, _ = tokenizer.encode_with_offsets(FORMATS[template](system, said[::2], said[1::2]))
    assert load_chat_template(template, tokenizer).encode(messages)[0].tolist() == ids


def test_an_empty_system_message_is_written_as_llama2s_own_code_does(ours):
    said = [{"role": role, "content": text} for role, text in turns_of("", ["Hello"], ["a"])]
    ids, _ = ours["llama2"].encode_with_offsets(llama2_format("", ["Hello"], ["a"]))
    assert load_chat_template("llama2", ours["llama2"]).encode(said)[0].tolist() == ids


def test_an_alpaca_row_with_an_input_gets_alpacas_wording(ours):
    chat = load_chat_template("alpaca", ours["llama2"])
    row = {"role": "user", "content": "Add.\n1 2", "instruction": "Add.", "input": "1 2"}
    text = (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )
    assert chat.encode_prompt([row]) == ours["llama2"].encode_with_offsets(text)[0]


def test_qwen3_keeps_the_thoughts_before_the_last_answer_and_drops_older_ones(ours):
    chat = load_chat_template("qwen3", ours["qwen"])
    answer = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}
    messages = [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}, answer]
    apart = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    input_ids, loss_mask = chat.encode(messages)
    assert input_ids.tolist() == chat.encode([messages[0], apart, messages[2], apart])[0].tolist()
    assert ours["qwen"].decode(input_ids[loss_mask]) == "yes<think>\nhm\n</think>\n\nyes"


THINKING = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}


def test_thoughts_that_a_template_leaves_out_are_counted(ours):
    asked = [HELLO[0], THINKING, HELLO[0], THINKING]
    apart = {"role": "assistant", "content": "yes", "reasoning_content": "hm, hm"}
    for name, lost in (("qwen3", 1), ("qwen3_all", 0), ("chatml", 0)):
        assert load_chat_template(name, ours["qwen"]).encode_all(asked).lost_thoughts == lost
    for name, lost in (("qwen3", 0), ("chatml", 1)):
        assert load_chat_template(name, ours["qwen"]).encode_all([HELLO[0], apart]).lost_thoughts == lost
    # An empty block holds no thought.
    empty = HELLO[1] | {"content": "<think>\n\n</think>\n\nyes"}
    assert load_chat_template("qwen3", ours["qwen"]).encode_all([HELLO[0], empty] * 2).lost_thoughts == 0


def test_of_two_answers_in_a_row_only_the_words_are_learned_where_a_template_rewords_the_first(ours):
    """Qwen3's own template, which has no blocks, writes an empty thought before the last answer of all: so the
    prompt of the second one is not the beginning of the text, and a marker finds its words.
    """
    own = without_generation(load_chat_template("qwen3", ours["qwen"]), ours["qwen"])
    answers = [HELLO[1] | {"content": "one"}, HELLO[1] | {"content": "two"}]
    input_ids, loss_mask = own.encode([HELLO[0], *answers])
    assert ours["qwen"].decode(input_ids[loss_mask]) == "onetwo"
    input_ids, loss_mask = own.encode([HELLO[0], answers[1]])
    assert ours["qwen"].decode(input_ids[loss_mask]) == "<think>\n\n</think>\n\ntwo"


@pytest.mark.parametrize("template", ["qwen3_all", "deepseekr1"])
def test_every_answer_of_a_thinking_template_has_its_thoughts_or_an_empty_block(ours, template):
    """What LLaMA-Factory learns as qwen3 and deepseekr1: thoughts of all answers, and the words of empty ones."""
    chat = load_chat_template(template, ours["qwen"])
    apart = HELLO[1] | {"reasoning_content": "so\n"}
    input_ids, loss_mask = chat.encode([HELLO[0], THINKING, HELLO[0], HELLO[1], HELLO[0], apart])
    learned = ours["qwen"].decode(input_ids[loss_mask])
    assert learned == "<think>\nhm\n</think>\n\nyes<think>\n\n</think>\n\na<think>\nso\n</think>\n\na"


def test_the_deepseek_templates_write_deepseeks_marks(ours):
    tokenizer = ours["llama3"]
    messages = [{"role": "system", "content": "be kind"}, *HELLO, HELLO[0]]
    text = (
        "<|begin_of_text|>be kind<｜User｜>Hello<｜Assistant｜>a<|end_of_text|><｜User｜>Hello<｜Assistant｜>"
    )
    chat = load_chat_template("deepseek3", tokenizer)
    assert chat.encode_prompt(messages) == tokenizer.encode_with_offsets(text)[0]
    assert load_chat_template("deepseekr1", tokenizer).encode_prompt(HELLO[:1]) == chat.encode_prompt(
        HELLO[:1]
    )


# As R1-Distill's: the prompt of generation opens a thought, and the thoughts of answers are cut out.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% else %}"
    "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)


def test_a_prompt_of_generation_that_training_never_saw_is_found(ours):
    tokenizer = ours["llama3"]
    chat = ChatTemplate("r1", R1, tokenizer)
    asked, trained = chat.prompt_mismatch(HELLO)
    assert asked.endswith("<｜Assistant｜><think>\n") and "<｜Assistant｜>a" in trained
    with pytest.raises(UserError, match="since it has thoughts; --template deepseekr1 keeps them, or leave"):
        chat.encode([HELLO[0], THINKING])
    for name, answer in (("deepseek3", HELLO[1]), ("deepseekr1", THINKING), ("deepseekr1", HELLO[1])):
        chat = load_chat_template(name, tokenizer)
        assert chat.prompt_mismatch([HELLO[0], answer]) is None
        assert chat.encode_all([HELLO[0], answer]).lost_thoughts == 0


@pytest.mark.parametrize("words", ["Sure: ", "<|im_start|>"])
def test_words_between_the_prompt_and_an_answer_that_nobody_learns_to_write_are_found(ours, words):
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ WORDS }}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    asked, trained = ChatTemplate("w", source.replace("WORDS", repr(words)), ours["qwen"]).prompt_mismatch(
        HELLO
    )
    assert asked.endswith("assistant\n") and f"assistant\n{words}a" in trained
    blank = ChatTemplate("w", source.replace("WORDS", repr("\n")), ours["qwen"])
    assert blank.prompt_mismatch(HELLO) is None


@pytest.mark.parametrize(("name", "template"), SUPPORTED)
@given(messages=conversations())
@few
def test_no_named_template_asks_in_a_way_that_it_does_not_train(ours, name, template, messages):
    assert load_chat_template(template, ours[name]).prompt_mismatch(messages) is None


@pytest.mark.parametrize("silent", [False, True])
def test_answers_with_train_false_are_in_the_text_and_not_in_the_mask(ours, silent):
    chat = load_chat_template("chatml", ours["qwen"])
    chat = without_generation(chat, ours["qwen"]) if silent else chat
    turns = [HELLO[0], HELLO[1] | {"content": "one", "train": False}, HELLO[0], HELLO[1] | {"content": "two"}]
    input_ids, loss_mask = chat.encode(turns)
    assert ours["qwen"].decode(input_ids[loss_mask]) == "two"
    plain = [{key: value for key, value in turn.items() if key != "train"} for turn in turns]
    assert chat.encode(plain)[0].tolist() == input_ids.tolist()
    assert ours["qwen"].decode(input_ids[chat.encode(plain)[1]]) == "onetwo"
    assert not chat.encode(turns[:2])[1].any()
    assert not chat.encode([*turns[2:], *turns[:2]], mask_history=True)[1].any()


@given(thoughts=st.none() | texts, words=texts | st.just("<think>\nhm\n</think>\n\nyes"))
@settings(max_examples=50, deadline=None)
def test_qwen3_uses_separate_thoughts_if_they_are_given_even_empty_ones(ours, theirs, thoughts, words):
    """Against the part of Qwen3's own template that says so, written down here."""
    source = (
        "{%- set message = messages[1] %}{%- set content = message.content %}{%- set reasoning_content = '' %}"
        "{%- if message.reasoning_content is string %}{%- set reasoning_content = message.reasoning_content %}"
        "{%- elif '</think>' in content %}"
        "{%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
        "{{- '<|im_start|>user\\n' + messages[0].content + '<|im_end|>\\n<|im_start|>assistant\\n<think>\\n' }}"
        "{{- reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}"
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": words, "reasoning_content": thoughts},
    ]
    ids, _ = written(source, theirs["qwen"], messages)
    assert load_chat_template("qwen3", ours["qwen"]).encode(messages)[0].tolist() == ids


@pytest.fixture(scope="session")
def mistral_common():
    """One conversation -> ids, by Mistral's own code, checks and all."""
    module = pytest.importorskip(
        "mistral_common.tokens.tokenizers.mistral", reason="the reference for Mistral's templates"
    )
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    made = {"mistral-v1": module.MistralTokenizer.v1(), "mistral-v3": module.MistralTokenizer.v3()}
    return lambda name, messages: (
        made[name].encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    )


@pytest.mark.parametrize("name", MISTRAL)
@given(messages=conversations())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_tokens_of_the_mistral_template_are_mistral_commons(ours, mistral_common, name, messages):
    """Mistral's code takes a question last; answers that are empty or blanks only it refuses."""
    assume(all(m["content"].strip() for m in messages if m["role"] == "assistant"))
    chat = load_chat_template("mistral", ours[name])
    assert chat.encode_prompt(messages[:-1]) == mistral_common(name, messages[:-1])
    input_ids, loss_mask = chat.encode(messages)
    prompt, answer = mistral_common(name, messages[:-1]), messages[-1]["content"]
    answer_ids = ours[name].encode(
        answer if name == "mistral-v1" else answer.rstrip(" "), bos=False, eos=True
    )
    assert input_ids.tolist() == prompt + answer_ids
    assert input_ids[chat.encode(messages, mask_history=True)[1]].tolist() == answer_ids
    assert loss_mask[: len(prompt)].sum() == sum(
        len(ours[name].encode(m["content"].rstrip(" " if name == "mistral-v3" else ""), bos=False, eos=True))
        for m in messages[:-1]
        if m["role"] == "assistant"
    )


# Learned tokens


@pytest.mark.parametrize(("name", "template"), SUPPORTED)
@given(messages=conversations())
@few
def test_a_template_that_does_not_mark_its_answers_gives_the_same_mask(ours, name, template, messages):
    """Where it gives one: a template that looks into answers, as Qwen3's, may make another text of a marked
    one and is refused.
    """
    chat = load_chat_template(template, ours[name])
    marked_ids, marked = chat.encode(messages)
    try:
        input_ids, loss_mask = without_generation(chat, ours[name]).encode(messages)
    except UserError as error:
        assert "cannot be found in the text" in str(error)
        assert template in ("qwen3", "mistral") and any(
            not m["content"].strip() or "</think>" in m["content"] for m in messages
        )
        return
    assert input_ids.tolist() == marked_ids.tolist()
    if (
        template == "mistral"
    ):  # its prompts differ from the text where the system message moves; then its own blank is not learned
        marked[(marked_ids == ours[name].token_id("▁")) & ~loss_mask] = False
    assert loss_mask.tolist() == marked.tolist()


@pytest.mark.parametrize(("name", "template"), SUPPORTED)
def test_exactly_the_answers_and_their_end_tokens_are_learned(ours, name, template):
    chat, tokenizer = load_chat_template(template, ours[name]), ours[name]
    turns = [
        ("system", "be kind"),
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
        ("assistant", "four"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    input_ids, loss_mask = chat.encode(messages)
    runs = "".join("x" if flag else " " for flag in loss_mask).split()
    assert (
        len(runs) == 2
        and input_ids[loss_mask].tolist().count(chat.end_id) == 2
        and tokenizer.is_special(chat.end_id)
    )
    block = "<think>\n\n</think>\n\n"  # an empty one: before every answer, or the last one
    all_thoughts = block if template in ("qwen3_all", "deepseekr1") else ""
    thoughts = block if template == "qwen3" else all_thoughts
    first, second = (
        tokenizer.decode(input_ids[loss_mask][: len(runs[0])]),
        tokenizer.decode(input_ids[loss_mask][len(runs[0]) :]),
    )
    assert (first.strip(), second.strip()) == (all_thoughts + "two", thoughts + "four")
    last_ids, last = chat.encode(messages, mask_history=True)
    assert last_ids.tolist() == input_ids.tolist() and last.sum() == len(runs[1]) and (loss_mask[last]).all()


TWO_BLOCKS = (  # as templates that put what the model thinks apart; older thoughts are left out
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if loop.index > messages | length - 2 %}{% generation %}<think>{% endgeneration %}hm{% endif %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@given(messages=conversations(st.sampled_from(["one", "two\n", "three"])))
@settings(max_examples=30, deadline=None)
def test_all_blocks_of_the_last_answer_are_learned_and_none_of_the_history(ours, messages):
    chat = ChatTemplate("two", TWO_BLOCKS, ours["qwen"])
    input_ids, loss_mask = chat.encode(messages, mask_history=True)
    assert ours["qwen"].decode(input_ids[loss_mask]) == "<think>" + messages[-1]["content"]
    assert (input_ids[loss_mask] == ours["qwen"].token_id("<|im_end|>")).sum() == 1
    answers = "".join(message["content"] for message in messages[:-1] if message["role"] == "assistant")
    input_ids, loss_mask = chat.encode(messages)
    assert ours["qwen"].decode(input_ids[loss_mask]) == answers + "<think>" + messages[-1]["content"]


def test_the_answers_of_a_long_conversation_are_found_together(ours, monkeypatch):
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i}"} for i in range(400)]
    chat = without_generation(load_chat_template("chatml", ours["qwen"]), ours["qwen"])
    rendered, render = [], chat._render
    monkeypatch.setattr(
        chat,
        "_render",
        lambda messages, *given, **named: rendered.append(1) or render(messages, *given, **named),
    )
    input_ids, loss_mask = chat.encode(messages)
    assert ours["qwen"].decode(input_ids[loss_mask]) == "".join(
        message["content"] for message in messages[1::2]
    )
    # One prompt per answer; the text, and the text with markers in front of all answers, then behind them.
    assert len(rendered) <= 200 + 3


OLD_CHATML = (  # as templates were before add_generation_prompt
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)


def test_the_header_of_an_answer_is_not_learned_if_the_template_knows_no_generation_prompt(ours):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": " two\n"}]
    input_ids, loss_mask = ChatTemplate("old", OLD_CHATML, ours["qwen"]).encode(messages)
    assert (
        ours["qwen"].decode(input_ids[loss_mask]) == " two\n"
        and input_ids[loss_mask][-1] == ours["qwen"].eos_id
    )


def test_the_end_token_of_an_answer_is_learned_through_blanks_but_nothing_behind_it(ours):
    source = "{% for m in messages %}{{ m.role + ':' + m.content | trim + '  ' + eos_token + eos_token + '\n' }}{% endfor %}"
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " two "},
        {"role": "user", "content": "x"},
    ]
    input_ids, loss_mask = ChatTemplate("blanks", source, ours["qwen"]).encode(messages)
    expected = ours["qwen"].encode_with_offsets("two  <|im_end|>")[0]
    assert input_ids[loss_mask].tolist() == expected


# The tokenizer's own template

OWN = r"""{%- set loop_messages = messages %}
{%- if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{{ messages[0]['content'] | tojson }}{% endif %}
{%- if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}
{%- set ns = namespace(count=0) %}
    {% for message in loop_messages %}
    {%- if message.content == 'stop here' %}{% break %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{ bos_token if ns.count == 1 }}{{ unk_token }}<|start_header_id|>{{ message['role'] }} {{ ns.count }}<|end_header_id|>

{{ message['content'] | trim }}<|eot_id|>
    {%- endfor %}
{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""


@pytest.fixture(scope="session")
def own(directories, tmp_path_factory):
    """Tokenizers with their own template, one for each file it can be in; and transformers' for the same files."""
    transformers = pytest.importorskip("transformers", reason="the reference for chat templates")
    made, root = [], tmp_path_factory.mktemp("own")
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": OWN}]
    for place, template in (("config", OWN), ("list", several), ("file", "no")):
        path = shutil.copytree(directories["llama3"], root / place)
        config = json.loads((path / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        if place == "file":
            (path / "chat_template.jinja").write_text(OWN, encoding="utf-8")
        made.append((load_tokenizer(path), transformers.PreTrainedTokenizerFast.from_pretrained(path)))
    return made


@given(messages=conversations(texts | st.just("stop here")))
@settings(max_examples=60, deadline=None)
def test_tokens_of_the_tokenizers_own_template_are_transformers(own, messages):
    for tokenizer, reference in own:
        chat = load_chat_template(None, tokenizer)
        assert (
            chat.encode_prompt(messages[:-1])
            == written(None, reference, messages[:-1], add_generation_prompt=True)[0]
        )
        if all(message["content"] != "stop here" for message in messages):
            assert chat.encode(messages)[0].tolist() == written(None, reference, messages)[0]
    assert load_chat_template("tokenizer", tokenizer).source == chat.source


def test_an_answer_that_the_template_leaves_out_is_refused(own):
    messages = [{"role": "user", "content": "stop here"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(UserError, match="changes answer 1 so that it cannot be found in the text"):
        load_chat_template(None, own[0][0]).encode(messages)


def test_a_template_that_prints_the_date_uses_the_given_clock(ours):
    tokenizer = ours["qwen"]
    tokenizer_with_date = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = ChatTemplate("dated", tokenizer_with_date, tokenizer, now=lambda: datetime(2024, 7, 26))
    assert chat.encode_prompt([{"role": "user", "content": "!"}]) == tokenizer.encode("26 Jul 2024!")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_saved_template_is_found_and_writes_the_same_without_generation_blocks(
    ours, theirs, directories, tmp_path, template
):
    messages = [{"role": "user", "content": "Hello a"}, {"role": "assistant", "content": "lo"}]
    for name in JSON:
        path = shutil.copytree(directories[name], tmp_path / name)
        chat = load_chat_template(template, ours[name])
        chat.save(path)
        assert "generation %}" not in (path / "chat_template.jinja").read_text(encoding="utf-8")
        saved = load_chat_template(None, load_tokenizer(path))
        assert [part.tolist() for part in saved.encode(messages)] == [
            part.tolist() for part in chat.encode(messages)
        ]
        assert saved.encode_prompt(messages[:1]) == chat.encode_prompt(messages[:1])
        assert written(saved.source, theirs[name], messages)[0] == chat.encode(messages)[0].tolist()


# Special tokens


@pytest.mark.parametrize(("name", "template"), SUPPORTED)
def test_there_is_exactly_one_bos_where_the_tokenizer_puts_one(ours, name, template):
    """Llama 2 was trained with one in front of every question."""
    input_ids, _ = load_chat_template(template, ours[name]).encode(HELLO * 3)
    assert input_ids.tolist().count(ours[name].bos_id) == (
        0 if name == "qwen" else 3 if template == "llama2" else 1
    )


@pytest.mark.parametrize("name", MISTRAL)
@given(messages=conversations(st.sampled_from(["<s>struck out</s>", "[INST] <unk>", "</s>", "<</s>/s>"])))
@settings(max_examples=20, deadline=None)
def test_special_tokens_that_people_type_stay_text_under_sentencepiece(ours, name, messages):
    input_ids, loss_mask = load_chat_template("mistral", ours[name]).encode(messages)
    answers = sum(message["role"] == "assistant" for message in messages)
    assert (input_ids == ours[name].bos_id).sum() == 1
    assert (
        (input_ids == ours[name].eos_id).sum() == (input_ids[loss_mask] == ours[name].eos_id).sum() == answers
    )
    for message in messages:
        assert message["content"] in ours[name].decode(input_ids)


@pytest.mark.parametrize("name", [*JSON, *MISTRAL])
@given(text=texts)
@settings(max_examples=40, deadline=None)
def test_offsets_go_through_the_text_and_leave_no_character_out(ours, name, text):
    tokenizer = ours[name]
    text = (
        unicodedata.normalize("NFC", tokenizer.escape(text, "\U000f0000")).encode("utf-8", "replace").decode()
    )
    ids, offsets = tokenizer.encode_with_offsets(text, "\U000f0000")
    offsets = offsets.tolist()
    assert len(ids) == len(offsets) and offsets == sorted(offsets)
    covered = {i for begin, end in offsets for i in range(begin, end)}
    assert covered >= {i for i, character in enumerate(text) if character != "\U000f0000"}
    if name in MISTRAL_FILES:
        assert ids == tokenizer.encode(text.replace("\U000f0000", ""), bos=False)


# Refused templates


@pytest.mark.parametrize(
    ("name", "template", "said"),
    [
        ("qwen", "chatm", "template = 'chatm' is not known; nearest: 'chatml'"),
        (
            "qwen",
            "tokenizer",
            "template = tokenizer, but the tokenizer has no chat_template; choose from alpaca, llama2",
        ),
        (
            "plain",
            "chatml",
            r"template = chatml needs the token <\|im_start\|>, which the tokenizer lacks; plain and alpaca need no",
        ),
        (
            "plain",
            "plain",
            "template = plain ends answers with EOS, but the tokenizer names none; set eos_token in",
        ),
    ],
)
def test_a_template_that_cannot_be_is_refused_by_name(ours, tmp_path, name, template, said):
    if name == "plain":
        Backend(models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=said):
        load_chat_template(template, load_tokenizer(tmp_path) if name == "plain" else ours[name])


@pytest.mark.parametrize("template", ["alpaca", "llama2", "mistral"])
@pytest.mark.parametrize(
    ("roles", "said"),
    [
        (
            ["assistant", "user"],
            "roles must alternate: user, assistant, user, ...; message 1 is of assistant",
        ),
        (["user", "user", "assistant"], "message 2 is of user"),
        (["system", "user", "assistant", "assistant"], "message 3 is of assistant"),
        (["user", "assistant", "system", "user", "assistant"], "message 3 is of system"),
    ],
)
def test_turns_in_an_order_that_the_format_has_no_words_for_are_refused(ours, template, roles, said):
    with pytest.raises(UserError, match=f"the chat template {template} says: .*{said}"):
        load_chat_template(template, ours["llama2"]).encode(
            [{"role": role, "content": "a"} for role in roles]
        )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('only\\nEnglish') }}", "says: only English"),
        ("{{ messages[0].content + 1 }}", "says: can only concatenate str"),
        ("{{ nothing.at.all }}", "says: 'nothing' is undefined"),
        ("{{ 1 // 0 }}", "says: .*by zero"),
        ("{{ ''.__class__.__mro__ }}", "says: access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "says: .*is not safely callable|says: access to attribute 'append'"),
        ("{% include '/etc/hostname' %}", "says: no loader"),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "changes answer 1"),
        (
            "{% set a %}{% generation %}b{% endgeneration %}{% endset %}{{ a[1:] }}",
            "cuts or nests a {% generation %} block",
        ),
        (
            "{% set a %}{% generation %}b{% endgeneration %}{% endset %}{{ a | reverse }}",
            "cuts or nests a {% generation %} block",
        ),
        (
            "{% generation %}{% generation %}b{% endgeneration %}{% endgeneration %}",
            "cuts or nests a {% generation %} block; it must",
        ),
    ],
)
def test_a_template_that_fails_is_quoted_in_one_line(ours, source, said):
    with pytest.raises(
        UserError, match=f"the chat template mine .*{said}|the chat template mine {said}"
    ) as error:
        ChatTemplate("mine", source, ours["qwen"]).encode(HELLO)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}",
        "{% if a %}" * 200 + "{% endif %}" * 200,
        "{{ " + "9" * 5000 + " }}",
        "{{ a" + "|upper" * 5000 + " }}",
        "{% for a.b in messages %}{% endfor %}",
        "{{ f(a=1, a=2) }}",
    ],
)
def test_a_template_that_cannot_be_compiled_is_one_line(ours, source):
    with pytest.raises(UserError, match="the chat template (cannot be compiled|is not valid Jinja)") as error:
        ChatTemplate("mine", source, ours["qwen"])
    assert "\n" not in str(error.value)


def test_a_template_that_is_not_jinja_is_refused_with_the_line(ours):
    with pytest.raises(UserError, match="not valid Jinja, line 2: .*'endfor'"):
        ChatTemplate("mine", "{% for m in messages %}\n{% endif %}", ours["qwen"])


# Conversations and templates that are meant to hang


@given(
    lengths=st.lists(st.integers(0, 3), max_size=12),
    ends_of_spans=st.lists(st.integers(0, 20), max_size=8).map(sorted),
)
def test_a_token_is_learned_if_one_of_its_characters_lies_in_a_span(lengths, ends_of_spans):
    spans = [*zip(ends_of_spans[::2], ends_of_spans[1::2], strict=False)]  # one behind the other
    ends = np.cumsum(lengths)
    offsets = np.stack([ends - lengths, ends], axis=1).reshape(-1, 2).astype(np.int64)
    expected = [
        any(start <= i < end for start, end in spans for i in range(first, max(last, first + 1)))
        for first, last in offsets.tolist()
    ]
    assert (spans_of_tokens(offsets, spans) > 0).tolist() == expected


def test_a_template_that_prints_thousands_of_blocks_takes_seconds(ours):
    source = "{% for i in range(9999) %}{% generation %}a {% endgeneration %}{% endfor %}"
    _, loss_mask = ChatTemplate("many", source, ours["qwen"]).encode(HELLO)
    assert len(loss_mask) >= 9999 and loss_mask.all()


def test_more_answers_than_can_be_located_are_refused(ours):
    chat = without_generation(load_chat_template("chatml", ours["qwen"]), ours["qwen"])
    with pytest.raises(UserError, match="has 501 answers, and .* silent does not mark them; at most 500"):
        chat.encode(HELLO * 501)
    assert load_chat_template("chatml", ours["qwen"]).encode(HELLO * 501)[1].any()


def test_a_conversation_that_holds_every_marker_is_refused(ours):
    every = "".join(map(chr, [*range(0xFDD0, 0xFDF0), *range(0xF0000, 0xFFFFE)]))
    with pytest.raises(UserError, match="uses all 65,566 characters that Unicode reserves"):
        load_chat_template("chatml", ours["qwen"]).encode([{"role": "user", "content": every}, HELLO[1]])


def test_a_conversation_that_is_nested_too_deeply_is_refused(ours):
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UserError, match="the conversation is nested too deeply"):
        load_chat_template("chatml", ours["qwen"]).encode([HELLO[0] | {"more": deep}, HELLO[1]])
