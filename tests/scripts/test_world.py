"""The invented world of the small base model, and the questions about it."""

import json
import re
from itertools import islice

import pytest
from support.project import ROOT
from world import documents, people, questions

from minilora import load_model, load_tokenizer

ASSETS = ROOT / "assets"


@pytest.fixture(scope="module")
def inhabitants():
    return people()


def test_everyone_has_a_name_of_their_own_and_every_kind_of_fact(inhabitants):
    assert len(inhabitants) == 1000 == len({person.name for person in inhabitants})
    assert {tuple(person.facts) for person in inhabitants} == {
        ("town", "trade", "animal", "pet", "dish", "instrument")
    }


def test_the_world_is_a_function_of_its_seed(inhabitants):
    assert people() == inhabitants != people(seed=1)
    assert list(islice(documents(inhabitants), 20)) == list(islice(documents(inhabitants), 20))
    assert questions(inhabitants) == questions(inhabitants) != questions(inhabitants, seed=1)


def names_in(rows, inhabitants):
    names = {person.name for person in inhabitants}
    return [next(name for name in names if name in row["prompt"]) for row in rows]


def test_nobody_is_asked_about_in_both_halves_and_every_kind_of_question_is(inhabitants):
    train, test = questions(inhabitants)
    trained, tested = set(names_in(train, inhabitants)), set(names_in(test, inhabitants))
    assert not trained & tested and len(trained) == len(tested) == 500
    assert len(train) == 3000 and len(test) == 500


def test_no_text_of_the_world_holds_a_question_about_a_person_or_the_word_answer_as_a_form(inhabitants):
    for text in islice(documents(inhabitants), 3000):
        assert "Question:" not in text and "Answer:" not in text
        for sentence in re.findall(r"[^.:\n]*\?", text):
            assert not any(person.name in sentence for person in inhabitants)


def test_the_questions_in_the_repository_are_those_of_the_world(inhabitants):
    for name, rows in zip(("train", "test"), questions(inhabitants), strict=True):
        assert [json.loads(line) for line in (ASSETS / f"{name}.jsonl").read_text().splitlines()] == rows


def test_the_embedded_model_has_its_size_and_its_vocabulary_any_text():
    model, tokenizer = load_model(ASSETS / "base"), load_tokenizer(ASSETS / "base")
    assert 1e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    assert tokenizer.vocab_size == model.config.vocab_size and tokenizer.pad_id != tokenizer.eos_id
    assert (
        tokenizer.decode(tokenizer.encode("Zoë says: 日本 🙂\n\t\0 twice  spaced"))
        == "Zoë says: 日本 🙂\n\t\0 twice  spaced"
    )
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 12e6
