"""Tokens equal those of the references: mistral_common for Mistral's own models, transformers for tokenizer.json."""

import json
import shutil
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from support.tokenizer_files import BOS, EOS, PAD, byte_fallback_json, byte_level_json, write
from tokenizers import Tokenizer as Backend

from minilora import UserError
from minilora.data.stream_decoder import StreamDecoder
from minilora.data.tokenizer import load_tokenizer

MISTRAL_FILES = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
}
# mistral_common carries the real Mistral tokenizers and is the reference for them.
MISTRAL_COMMON = find_spec("mistral_common")
NO_MISTRAL = "mistral_common, which carries Mistral's tokenizers, is not installed"
MISTRAL = [
    pytest.param(name, marks=pytest.mark.skipif(MISTRAL_COMMON is None, reason=NO_MISTRAL))
    for name in MISTRAL_FILES
]
JSON = ("llama3", "qwen", "llama2-json")
SAMPLES = [
    "",
    " ",
    "Hello world",
    "  two  spaces ",
    "line\r\n\ttab",
    "café",
    "日本語 🙂👩‍👩‍👧",
    "a\0b",
    "\ufeffx\u0301\ufffd",
]
# st.text() draws no surrogates.
texts = st.text(max_size=40) | st.text(alphabet=" ab\n\u2581é日🙂\ufffd", max_size=20)


def sentencepiece_directory(directory: Path, name: str, **files: dict) -> Path:
    if MISTRAL_COMMON is None:
        pytest.skip(NO_MISTRAL)
    write(directory, **files)
    shutil.copyfile(
        Path(MISTRAL_COMMON.origin).parent / "data" / MISTRAL_FILES[name], directory / "tokenizer.model"
    )
    return directory


@pytest.fixture(scope="session")
def directories(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    llama3 = {"bos_token": BOS, "eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"}
    qwen = {
        "bos_token": None,
        "eos_token": EOS,
        "pad_token": PAD,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    llama2 = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        "llama3": write(root / "llama3", tokenizer=byte_level_json(bos=True), tokenizer_config=llama3),
        "qwen": write(root / "qwen", tokenizer=byte_level_json(bos=False), tokenizer_config=qwen),
        "llama2-json": write(root / "llama2", tokenizer=byte_fallback_json(), tokenizer_config=llama2),
        **{name: sentencepiece_directory(root / name, name) for name in MISTRAL_FILES if MISTRAL_COMMON},
    }


@pytest.fixture(scope="session")
def tokenizers_here(directories):
    return {name: load_tokenizer(path) for name, path in directories.items()}


@pytest.fixture(scope="session")
def tokenizers_there(directories):
    transformers = pytest.importorskip("transformers", reason="the reference for tokenizer.json")
    return {name: transformers.PreTrainedTokenizerFast.from_pretrained(directories[name]) for name in JSON}


# The same tokens as the reference


@pytest.fixture(scope="session")
def mistral_common(directories):
    module = pytest.importorskip("mistral_common.tokens.tokenizers.sentencepiece", reason=NO_MISTRAL)
    # mistral_common reads the version from the name of the file.
    paths = {name: directories[name].parent / file for name, file in MISTRAL_FILES.items()}
    for name, path in paths.items():
        shutil.copyfile(directories[name] / "tokenizer.model", path)
    return {name: module.SentencePieceTokenizer(path) for name, path in paths.items()}


@pytest.mark.parametrize("name", MISTRAL)
@given(text=texts)
@settings(max_examples=50, deadline=None)
def test_tokens_of_a_sentencepiece_model_are_mistral_commons(tokenizers_here, mistral_common, name, text):
    for bos, eos in [(True, False), (False, True), (True, True), (False, False)]:
        assert tokenizers_here[name].encode(text, bos=bos, eos=eos) == mistral_common[name].encode(
            text, bos=bos, eos=eos
        )


@pytest.mark.parametrize("name", MISTRAL)
def test_ids_of_a_sentencepiece_model_are_its_own(tokenizers_here, directories, name):
    ours, model = (
        tokenizers_here[name],
        SentencePieceProcessor(model_file=str(directories[name] / "tokenizer.model")),
    )
    assert (
        (ours.bos_id, ours.eos_id, ours.pad_id)
        == (model.bos_id(), model.eos_id(), model.unk_id())
        == (1, 2, 0)
    )
    assert ours.vocab_size == model.vocab_size() == {"mistral-v1": 32000, "mistral-v3": 32768}[name]
    assert (ours.token_id("</s>"), ours.token_id("<|im_end|>")) == (2, None)


@pytest.mark.parametrize("name", JSON)
@given(text=texts)
@settings(max_examples=50, deadline=None)
def test_tokens_of_tokenizer_json_are_transformers(tokenizers_here, tokenizers_there, name, text):
    ours, theirs = tokenizers_here[name], tokenizers_there[name]
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode(text, bos=False) == theirs.encode(text, add_special_tokens=False)
    ids = [*theirs.encode(text), theirs.eos_token_id]
    assert ours.encode(text, eos=True) == ids
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", JSON)
def test_special_tokens_in_a_text_are_parsed_as_transformers_does(tokenizers_here, tokenizers_there, name):
    ours, theirs = tokenizers_here[name], tokenizers_there[name]
    for special in (theirs.eos_token, theirs.unk_token or theirs.eos_token):
        text = f"Hello{special} world {special}{special}\n"
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    assert ours.bos_id == theirs.bos_token_id


@pytest.mark.parametrize("name", JSON)
@pytest.mark.parametrize("add_bos_token", [True, False, None])
def test_add_bos_token_beside_tokenizer_json_changes_nothing_here_as_in_transformers(
    directories, tmp_path, name, add_bos_token
):
    transformers = pytest.importorskip("transformers", reason="the reference for tokenizer.json")
    path = shutil.copytree(directories[name], tmp_path / name)
    config = json.loads((path / "tokenizer_config.json").read_text())
    write(path, tokenizer_config=config | {"add_bos_token": add_bos_token})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    assert (
        load_tokenizer(path).encode("Hello")
        == theirs.encode("Hello")
        == load_tokenizer(directories[name]).encode("Hello")
    )


def test_a_named_special_token_is_special_even_where_tokenizer_json_calls_it_ordinary(directories, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference for tokenizer.json")
    path = shutil.copytree(directories["llama3"], tmp_path / "ordinary")
    raw = json.loads((path / "tokenizer.json").read_text())
    raw["added_tokens"] = [
        token | {"special": False} for token in raw["added_tokens"] if token["content"] != EOS
    ]
    write(path, tokenizer=raw)
    ours, theirs = load_tokenizer(path), transformers.PreTrainedTokenizerFast.from_pretrained(path)
    text = f"Hello{EOS} there{BOS}"
    assert ours.encode(text) == theirs.encode(text)
    assert (
        ours.decode(ours.encode(text))
        == theirs.decode(theirs.encode(text), skip_special_tokens=True)
        == "Hello there"
    )


def test_truncation_and_padding_saved_in_tokenizer_json_are_ignored(directories, tmp_path):
    backend = Backend.from_file(str(directories["llama3"] / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=100, pad_id=2, pad_token=PAD)
    backend.save(str(write(tmp_path / "cut") / "tokenizer.json"))
    text = "The sea is calm tonight."
    assert load_tokenizer(tmp_path / "cut").encode(text) == load_tokenizer(directories["llama3"]).encode(text)


# There and back


@pytest.mark.parametrize("name", [*JSON, *MISTRAL])
@given(text=texts)
@settings(max_examples=100, deadline=None)
def test_decode_undoes_encode(tokenizers_here, name, text):
    """Two exceptions: "▁" is the space of a sentencepiece vocabulary, and Qwen's text is normalized to NFC."""
    there_and_back = tokenizers_here[name].decode(tokenizers_here[name].encode(text, eos=True))
    if name == "qwen":
        text = unicodedata.normalize("NFC", text)
    assert there_and_back == (text if name in ("llama3", "qwen") else text.replace("\u2581", " "))


@pytest.mark.parametrize("name", [*JSON, *MISTRAL])
def test_a_surrogate_pair_is_joined_and_a_half_becomes_the_replacement_character(tokenizers_here, name):
    ours = tokenizers_here[name]
    assert ours.encode("a\ud83d\ude42b") == ours.encode("a🙂b")
    assert ours.decode(ours.encode("a\ud83db\ude42")) == "a\ufffdb\ufffd"


@pytest.mark.parametrize("name", [*JSON, *MISTRAL])
def test_ids_outside_of_the_vocabulary_say_nothing(tokenizers_here, name):
    ours = tokenizers_here[name]
    assert ours.decode([-100, *ours.encode("Hello"), ours.pad_id, ours.vocab_size, 10**9]) == "Hello"


# One owner of special tokens


@pytest.mark.parametrize("name", [*JSON, *MISTRAL])
@given(text=texts, bos=st.booleans(), eos=st.booleans())
@settings(max_examples=30, deadline=None)
def test_encode_puts_exactly_one_bos_and_only_on_request(tokenizers_here, name, text, bos, eos):
    ours = tokenizers_here[name]
    ids, plain = ours.encode(text, bos=bos, eos=eos), ours.encode(text, bos=False)
    assert ids == [ours.bos_id] * (bos and name != "qwen") + plain + [ours.eos_id] * eos


@pytest.mark.parametrize(("name", "bos", "eos"), [("llama3", BOS, EOS), ("llama2-json", "<s>", "</s>")])
def test_a_text_that_holds_its_bos_and_eos_gets_no_second_one(tokenizers_here, name, bos, eos):
    ours = tokenizers_here[name]
    for text in (f"{bos}Hello{eos}", f"{bos}{eos}"):
        ids = ours.encode(text, eos=True)
        assert (ids.count(ours.bos_id), ids.count(ours.eos_id)) == (1, 1)
        assert ids == ours.encode(text, bos=False)


@pytest.mark.parametrize("name", MISTRAL)
def test_special_tokens_in_a_text_stay_text_under_sentencepiece(tokenizers_here, name):
    ours = tokenizers_here[name]
    ids = ours.encode("<s>[INST] Hello</s>", bos=False)
    assert not {ours.bos_id, ours.eos_id, ours.token_id("[INST]")} & set(ids)
    assert ours.decode(ids) == "<s>[INST] Hello</s>"


def test_a_tokenizer_without_bos_adds_none(tokenizers_here):
    ours = tokenizers_here["qwen"]
    assert ours.bos_id is None
    assert ours.encode("Hello", bos=True) == ours.encode("Hello", bos=False)
    assert ours.encode("") == []


@pytest.mark.parametrize(
    ("config", "bos"), [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False)]
)
def test_add_bos_token_decides_for_sentencepiece(tmp_path, config, bos):
    ours = load_tokenizer(sentencepiece_directory(tmp_path, "mistral-v1", tokenizer_config=config))
    assert ours.encode("Hello") == [1] * bos + [22557]


@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize(
    "form", [lambda token: token, lambda token: {"content": token, "lstrip": False, "__type": "AddedToken"}]
)
def test_special_tokens_are_named_by_a_string_or_a_dict_in_either_file(tmp_path, file, form):
    names = {"bos_token": form("[INST]"), "eos_token": form("[/INST]"), "pad_token": form("[PREFIX]")}
    ours = load_tokenizer(sentencepiece_directory(tmp_path, "mistral-v3", **{file: names}))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (3, 4, 11)
    assert ours.encode("", eos=True) == [3, 4]


@pytest.mark.parametrize(
    ("names", "pad"),
    [
        ({"eos_token": EOS, "pad_token": PAD}, 2),
        ({"eos_token": EOS, "pad_token": EOS}, 0),  # as many recipes do
        ({"eos_token": EOS, "pad_token": EOS, "unk_token": PAD}, 2),
        ({"eos_token": EOS, "pad_token": EOS, "unk_token": EOS}, 0),
        ({"eos_token": EOS, "pad_token": "[PAD]"}, 0),  # named, but the model has no row for it
        ({"eos_token": BOS, "pad_token": BOS}, 1),  # EOS has id 0
        ({}, 0),
    ],
)
def test_padding_is_never_eos(directories, tmp_path, names, pad):
    path = shutil.copytree(directories["llama3"], tmp_path / "pad")
    ours = load_tokenizer(write(path, tokenizer_config=names))
    assert ours.pad_id == pad != ours.eos_id


# Streams


def streamed(tokenizer, ids) -> list[str]:
    stream = StreamDecoder(tokenizer)
    return [*(stream.feed(i) for i in ids), stream.flush()]


@pytest.mark.parametrize("name", [*JSON, *MISTRAL])
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_streamed_pieces_join_to_decode_whatever_the_ids(tokenizers_here, name, data):
    """Any ids, few of which a model would write: broken bytes, special tokens between them, leading spaces."""
    ours = tokenizers_here[name]
    odd = [
        ours.token_id(piece)
        for piece in ("▁", "▁▁", "</s>", *"ĠðŁĻĤ", *(f"<0x{byte:02X}>" for byte in " 🙂".encode()))
    ]
    common = st.sampled_from([i for i in odd if i is not None]) | st.integers(0, 300)
    ids = data.draw(st.lists(common | st.integers(-1, ours.vocab_size), max_size=24))
    assert "".join(streamed(ours, ids)) == ours.decode(ids)


@pytest.mark.parametrize("name", [*JSON, *MISTRAL])
@given(text=texts.filter(lambda text: "\ufffd" not in text))
@example(text="日本語 🙂👩‍👩‍👧 é")
@settings(max_examples=100, deadline=None)
def test_a_stream_never_emits_half_a_character(tokenizers_here, name, text):
    ours = tokenizers_here[name]
    pieces = streamed(ours, ours.encode(text, eos=True))
    assert "".join(pieces) == ours.decode(ours.encode(text))
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", ["llama3", *MISTRAL])
def test_a_stream_emits_a_character_as_soon_as_it_is_whole(tokenizers_here, name):
    ours = tokenizers_here[name]
    pieces = streamed(ours, ours.encode("Hello 🙂", bos=False))
    # The last token completes the emoji, and nothing is left to flush.
    assert pieces[0] and pieces[-2].endswith("🙂") and pieces[-1] == ""


def test_byte_tokens_of_tokenizer_json_wait_for_the_end_of_their_run(tokenizers_here):
    """The byte after an emoji can still break the emoji, since a run of bytes is decoded as a whole."""
    ours = tokenizers_here["llama2-json"]
    emoji = [ours.token_id(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    assert ours.decode([*emoji, ours.token_id("<0xFF>")]) == "\ufffd" * 5
    assert streamed(ours, [*emoji, ours.token_id("h")]) == ["", "", "", "", "🙂h", ""]


@pytest.mark.parametrize("name", MISTRAL)
def test_flush_returns_a_broken_character_and_begins_another_text(tokenizers_here, name):
    ours = tokenizers_here[name]
    stream = StreamDecoder(ours)
    half = [ours.token_id("<0xF0>"), ours.token_id("<0x9F>")]
    assert [stream.feed(i) for i in half] == ["", ""]
    assert stream.flush() == ours.decode(half) == "\ufffd\ufffd"
    assert stream.feed(ours.token_id("▁Hello")) == "Hello"


# Files


@pytest.mark.parametrize("name", [*JSON, *MISTRAL])
def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizers_here, directories, tmp_path, name):
    ours = tokenizers_here[name]
    ours.save(tmp_path / "new" / "place")
    saved = load_tokenizer(tmp_path / "new" / "place")
    assert all(saved.encode(text, eos=True) == ours.encode(text, eos=True) for text in SAMPLES)
    assert (saved.bos_id, saved.eos_id, saved.pad_id, saved.vocab_size) == (
        ours.bos_id,
        ours.eos_id,
        ours.pad_id,
        ours.vocab_size,
    )
    saved.save(tmp_path / "new" / "place")  # onto itself
    assert load_tokenizer(tmp_path / "new" / "place").encode("Hello") == ours.encode("Hello")


def test_tokenizer_json_is_preferred_to_tokenizer_model(directories, tmp_path):
    path = sentencepiece_directory(tmp_path, "mistral-v1")
    shutil.copyfile(directories["qwen"] / "tokenizer.json", path / "tokenizer.json")
    assert load_tokenizer(path).encode("Hello") == load_tokenizer(directories["qwen"]).encode("Hello")


def test_a_directory_without_a_tokenizer_is_refused_by_name(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=f"{path} .*tokenizer.json.*tokenizer.model"):
            load_tokenizer(path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"]
)
@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\xff\xfe", b"[1]"]
)
def test_a_damaged_file_is_refused_in_one_line_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        5,
        {"a": "b"},
        ["{{ messages }}"],
        [{"name": "default"}, 5],
        [{"name": "default", "template": 5}],
        [{"name": []}],
    ],
)
def test_a_chat_template_that_is_no_text_is_one_line(directories, tmp_path, template):
    (tmp_path / "tokenizer.json").write_bytes((directories["llama3"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(
        UserError, match="chat_template is .*, not text or a list of texts by name; correct tokenizer_config"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens": {"<|im_end|>": 32000}},
        {
            "tokenizer_config": {
                "added_tokens_decoder": {"2": {"content": "</s>"}, "32000": {"content": "<|im_end|>"}}
            }
        },
    ],
)
def test_tokens_added_beyond_a_sentencepiece_model_are_refused_by_name(tmp_path, files):
    with pytest.raises(
        UserError, match=r"'<\|im_end\|>' as id 32000, .*tokenizer.model lacks.*tokenizer.json"
    ):
        load_tokenizer(sentencepiece_directory(tmp_path, "mistral-v1", **files))


def test_added_tokens_that_the_vocabulary_holds_are_welcome(directories, tmp_path):
    path = sentencepiece_directory(
        tmp_path / "sp", "mistral-v1", added_tokens={"<unk>": 0, "<s>": 1, "</s>": 2}
    )
    assert load_tokenizer(path).encode("Hello") == [1, 22557]
    path = write(shutil.copytree(directories["llama3"], tmp_path / "json"), added_tokens={EOS: 1})
    assert load_tokenizer(path).eos_id == 1


def test_an_eos_that_is_not_there_is_refused(directories, tmp_path):
    path = shutil.copytree(directories["qwen"], tmp_path / "no-eos")
    with pytest.raises(UserError, match=r"eos_token '<\|im_end\|>'"):
        load_tokenizer(write(path, tokenizer_config={"eos_token": "<|im_end|>"}))
    nameless = load_tokenizer(write(path, tokenizer_config={}))
    assert nameless.eos_id is None and nameless.encode("Hello")
    with pytest.raises(UserError, match="name eos_token in its tokenizer_config.json"):
        nameless.encode("Hello", eos=True)


# Files of other people


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer_config": {"bos_token": 5}}, "tokenizer_config.json: bos_token must be text or an object or null"),
        ({"tokenizer_config": {"eos_token": {"content": None}}}, "tokenizer_config.json: eos_token must be a token"),
        ({"tokenizer_config": {"pad_token": "\ud800"}}, "tokenizer_config.json: pad_token must be a token"),
        ({"tokenizer_config": {"unk_token": ["a"]}}, "tokenizer_config.json: unk_token must be text or an object"),
        ({"tokenizer_config": {"eos_token": "x" * 10**6}}, "tokenizer_config.json: eos_token must be text"),
        ({"tokenizer_config": {"add_bos_token": "false"}}, "add_bos_token must be true or false or null, not 'false'"),
        ({"tokenizer_config": {"add_bos_token": 0}}, "add_bos_token must be true or false or null, not 0"),
        ({"tokenizer_config": {"added_tokens_decoder": ["a"]}}, "added_tokens_decoder must be an object or null"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": "a"}}}, "whole numbers, not by 'x'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"-1": "a"}}}, "whole numbers, not by '-1'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9" * 5000: "a"}}}, "whole numbers, not by '999"),
        ({"tokenizer_config": {"added_tokens_decoder": {"\u0663": "a"}}}, "whole numbers, not by"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": 7}}}, "added_tokens_decoder.1 must be text"),
        ({"tokenizer_config": {"added_tokens_decoder": {"1": None}}}, "added_tokens_decoder.1 must be a token"),
        ({"special_tokens_map": {"bos_token": True}}, "special_tokens_map.json: bos_token must be text"),
        ({"added_tokens": {"a": "1"}}, "added_tokens.json: 'a' must be a whole number from 0"),
        ({"added_tokens": {"a": 1.0}}, "added_tokens.json: 'a' must be a whole number from 0"),
        ({"added_tokens": {"a": 10**18}}, "added_tokens.json: 'a' must be a whole number from 0"),
        ({"added_tokens": ["a"]}, "added_tokens.json must hold a JSON object"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_one_line_that_names_file_and_field(directories, tmp_path, files, said):
    path = write(shutil.copytree(directories["llama3"], tmp_path / "wrong"), **files)
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    assert said in str(error.value) and len(str(error.value)) < 400 + len(str(path))
    assert "\n" not in str(error.value)


def test_null_is_as_good_as_an_absent_token(directories, tmp_path):
    path = shutil.copytree(directories["llama3"], tmp_path / "nulls")
    nulls = dict.fromkeys(("unk_token", "pad_token", "add_bos_token", "added_tokens_decoder"))
    ours = load_tokenizer(write(path, tokenizer_config={"bos_token": BOS, "eos_token": EOS} | nulls))
    assert ours.encode("Hello") == load_tokenizer(directories["llama3"]).encode("Hello")


def changed(raw, path: list, value):
    """A copy of a JSON value with another value at a place within it."""
    raw = json.loads(json.dumps(raw))
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return raw


@pytest.mark.parametrize(
    ("base", "path", "value"),
    [
        ("llama2-json", ["post_processor", "special_tokens"], {}),  # a template names a token that has no id
        (
            "llama2-json",
            ["model", "continuing_subword_prefix"],
            "x" * 9,
        ),  # a slice before the start of a token
        ("llama2-json", ["model", "vocab"], []),
        ("llama3", ["model", "merges"], [["a"]]),
        ("llama3", ["added_tokens"], 7),
        ("qwen", ["pre_tokenizer"], {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated"}),
    ],
)
def test_a_tokenizer_on_which_the_package_panics_is_one_line_and_nothing_else(
    directories, tmp_path, capfd, base, path, value
):
    raw = changed(json.loads((directories[base] / "tokenizer.json").read_text()), path, value)
    with pytest.raises(UserError, match="tokenizer.json is not a tokenizer") as error:
        load_tokenizer(write(tmp_path, tokenizer=raw))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 + len(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_ids_with_gaps_are_below_the_vocabularys_size_and_absurd_ones_are_refused(directories, tmp_path):
    raw = json.loads((directories["llama2-json"] / "tokenizer.json").read_text())
    used = len(raw["model"]["vocab"])
    ours = load_tokenizer(write(tmp_path / "gap", tokenizer=changed(raw, ["model", "vocab", "w"], used + 5)))
    assert ours.vocab_size == used + 6 and ours.decode([used + 5]) == "w"
    with pytest.raises(UserError, match="has a token 4294967295; at most 10,000,000 tokens"):
        load_tokenizer(write(tmp_path / "far", tokenizer=changed(raw, ["model", "vocab", "w"], 2**32 - 1)))
    template = changed(raw, ["post_processor", "special_tokens", "<s>", "ids"], [used + 9])
    with pytest.raises(
        UserError, match=f"puts token {used + 9} in front of a text, which its vocabulary lacks"
    ):
        load_tokenizer(write(tmp_path / "template", tokenizer=template))


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sentencepiece_model_that_is_cut_or_changed_anywhere_is_read_or_refused(model_dir, tmp_path, data):
    whole = (model_dir / "tokenizer.model").read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[place] ^= data.draw(st.integers(1, 255))
    (tmp_path / "tokenizer.model").write_bytes(data.draw(st.sampled_from([whole[:place], bytes(damaged)])))
    try:
        ours = load_tokenizer(tmp_path)
        assert all(0 <= i < ours.vocab_size for i in ours.encode("Hello <s> 🙂", bos=False))
    except UserError as error:
        assert "tokenizer.model is not a sentencepiece model" in str(error) and "\n" not in str(error)
