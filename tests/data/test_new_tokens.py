"""Tokens that a user adds get the same ids here and in transformers, and leave all other texts as they were."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from support.project import ROOT
from support.tokenizer_files import CORPUS, byte_fallback_json, byte_level_json, write

from minilora import UserError
from minilora.data.new_tokens import LONGEST_TOKEN, MOST_NEW_TOKENS, add_new_tokens
from minilora.data.tokenizer import load_tokenizer

KINDS = ("sentencepiece", "llama3", "qwen", "llama2-json")
PLAIN, SPECIAL = ["<foo>", "Bär"], ["<|act|>", "<|end_of_act|>"]
TEXTS = (
    "hello <|act|> world",
    "hello<|act|>world <foo> x",
    "<|act|>",
    "<foo>bar",
    "<foo><foo>  <|end_of_act|>\n",
    "ein Bär, zwei Bären",
    *CORPUS,
)
pieces = st.lists(st.sampled_from([*PLAIN, *SPECIAL, "a", "hello", " ", "\n", "é", "🙂"]), max_size=12)


def directory_of(kind, directory):
    """A tokenizer of each form, as its author published it."""
    if kind == "sentencepiece":
        directory.mkdir()
        raw = (ROOT / "assets" / "base" / "tokenizer.model").read_bytes()
        (directory / "tokenizer.model").write_bytes(raw)
        return directory
    raw = byte_fallback_json() if kind == "llama2-json" else byte_level_json(bos=kind == "llama3")
    names = {t["content"] for t in raw["added_tokens"]}
    roles = {"bos_token": "<s>", "eos_token": "</s>"} if "<s>" in names else {"eos_token": "<|end_of_text|>"}
    decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in raw["added_tokens"]}
    config = {**roles, "tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder}
    return write(directory, tokenizer=raw, tokenizer_config=config)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """Kind -> the author's tokenizer, and the one with new tokens."""
    root, found = tmp_path_factory.mktemp("tokenizers"), {}
    for kind in KINDS:
        before = load_tokenizer(directory_of(kind, root / kind))
        found[kind] = before, add_new_tokens(before, PLAIN, SPECIAL, root / f"{kind}-extended")
    return found


@pytest.fixture(scope="module")
def in_transformers(extended):
    """Kind -> what transformers makes of the directory with new tokens."""
    transformers = pytest.importorskip("transformers")
    return {
        kind: transformers.AutoTokenizer.from_pretrained(after.directory)
        for kind, (_, after) in extended.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_new_ids_follow_the_last_one_plain_tokens_first(extended, kind):
    before, after = extended[kind]
    ids = [after.token_id(token) for token in (*PLAIN, *SPECIAL)]
    assert ids == [*range(before.vocab_size, before.vocab_size + 4)] and after.vocab_size == ids[-1] + 1
    assert [after.is_special(i) for i in ids] == [False, False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids_and_leaves_out_the_same_tokens(extended, in_transformers, kind):
    (_, after), theirs = extended[kind], in_transformers[kind]
    assert len(theirs) == after.vocab_size
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert after.encode(text, bos=False) == ids, text
        assert after.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("kind", ["llama3", "qwen", "llama2-json"])
def test_a_tokenizer_json_holds_what_transformers_own_add_tokens_would_put_there(extended, kind):
    transformers = pytest.importorskip("transformers")
    before, after = extended[kind]
    theirs = transformers.AutoTokenizer.from_pretrained(before.directory)
    theirs.add_tokens([transformers.AddedToken(token, normalized=False) for token in PLAIN])
    theirs.add_tokens(SPECIAL, special_tokens=True)
    ours = json.loads((after.directory / "tokenizer.json").read_text(encoding="utf-8"))
    assert ours["added_tokens"] == json.loads(theirs.backend_tokenizer.to_str())["added_tokens"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(st.text(max_size=30))
@example("  two  spaces é🙂")
def test_texts_without_a_new_token_have_the_ids_of_before(extended, kind, text):
    before, after = extended[kind]
    if not any(token in text for token in (*PLAIN, *SPECIAL)):
        assert after.encode(text) == before.encode(text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(pieces)
def test_each_new_token_is_found_whole_wherever_it_stands(extended, kind, parts):
    _, after = extended[kind]
    new = {after.token_id(token) for token in (*PLAIN, *SPECIAL)}
    wanted = [after.token_id(part) for part in parts if part in (*PLAIN, *SPECIAL)]
    assert [i for i in after.encode("".join(parts)) if i in new] == wanted
    ids, offsets = after.encode_with_offsets("".join(parts))
    found = ["".join(parts)[start:end] for i, (start, end) in zip(ids, offsets, strict=True) if i in new]
    assert found == [part for part in parts if part in (*PLAIN, *SPECIAL)]


def test_sentencepiece_itself_reads_the_model_with_new_pieces(extended):
    before, after = extended["sentencepiece"]
    model = SentencePieceProcessor(model_file=str(after.directory / "tokenizer.model"))
    assert model.vocab_size() == before.vocab_size + 4
    assert model.decode(model.encode("hello <foo><|act|> world")) == "hello <foo><|act|> world"
    assert not any(
        model.is_control(i) or model.is_byte(i) for i in range(before.vocab_size, after.vocab_size)
    )


def test_roles_that_only_special_tokens_map_json_names_stay(tmp_path):
    source = directory_of("sentencepiece", tmp_path / "source")
    write(source, special_tokens_map={"eos_token": "<s>"}, tokenizer_config={"eos_token": "</s>"})
    before = load_tokenizer(source)
    after = add_new_tokens(before, ["<foo>"], [], tmp_path / "target")
    assert after.eos_id == before.eos_id == before.token_id("<s>")


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_there_already_changes_nothing(extended, kind, tmp_path):
    _, after = extended[kind]
    again = add_new_tokens(after, ["<foo>"], ["<|act|>"], tmp_path / "again")
    assert again.fingerprint() == after.fingerprint()
    one_more = add_new_tokens(after, ["<foo>", "<new>"], [], tmp_path / "one more")
    assert one_more.token_id("<new>") == after.vocab_size
    assert one_more.token_id("<foo>") == after.token_id("<foo>")


@pytest.mark.parametrize(
    "tokens, named",
    [
        (["a", "a"], "'a' is there twice"),
        ([" "], "' ' cannot be a token"),
        (["x" * (LONGEST_TOKEN + 1)], "cannot be a token"),
        (["\ud800"], "cannot be a token"),
        ([f"<{i}>" for i in range(MOST_NEW_TOKENS + 1)], "10,001 new tokens"),
    ],
    ids=["twice", "spaces", "long", "half a surrogate pair", "many"],
)
def test_texts_that_cannot_be_tokens_are_refused_before_anything_is_written(
    tokens, named, tmp_path, extended
):
    with pytest.raises(UserError, match=named) as error:
        add_new_tokens(extended["qwen"][0], tokens, [], tmp_path / "target")
    assert "\n" not in str(error.value) and not (tmp_path / "target").exists()


def test_a_space_in_a_piece_of_sentencepiece_is_refused(tmp_path, extended):
    with pytest.raises(UserError, match="'<a b>' holds a space"):
        add_new_tokens(extended["sentencepiece"][0], ["<a b>"], [], tmp_path / "target")
    assert not (tmp_path / "target").exists()
    after = add_new_tokens(extended["qwen"][0], ["<a b>"], [], tmp_path / "target")
    assert after.token_id("<a b>") in after.encode("x<a b>")


def test_a_long_piece_has_its_length_in_two_bytes(tmp_path, extended):
    token = "<" + "é" * (LONGEST_TOKEN - 2) + ">"  # 398 bytes; a byte of a length holds 7 bits
    after = add_new_tokens(extended["sentencepiece"][0], [token, "<b>"], [], tmp_path / "target")
    model = SentencePieceProcessor(model_file=str(tmp_path / "target" / "tokenizer.model"))
    assert model.encode(f"a{token}<b>")[-2:] == [after.token_id(token), after.token_id("<b>")]
