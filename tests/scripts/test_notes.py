"""Every note of the course has the same form, so a reader knows where to look."""

import re

import pytest
from support.project import ROOT

COURSE = (ROOT / "docs" / "course.md").read_text(encoding="utf-8")
NOTES = re.findall(r"^\| \d+ \| \[(\w+\.md)\]", COURSE, re.MULTILINE) + ["memory.md", "property_tests.md"]
HEADINGS = [
    "The question",
    "The idea",
    "The mathematics",
    "Run it",
    "What it costs",
    "Where the code is",
    "Exercises",
]


def sections(name: str) -> dict[str, str]:
    """Heading -> text, of the second level, in their order. Code may hold lines that begin with #."""
    text = re.sub(
        r"^```.*?^```", "", (ROOT / "docs" / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_the_course_has_thirteen_numbered_notes_and_links_to_all_the_others():
    assert len(NOTES) == 15 and len(set(NOTES)) == 15
    assert {"experiments.md", "how_to_choose.md", *NOTES} <= set(re.findall(r"\((\w+\.md)[)#]", COURSE))


@pytest.mark.parametrize("name", NOTES)
def test_a_note_asks_explains_derives_runs_counts_points_and_trains_in_this_order(name):
    found = [heading for heading in sections(name) if heading in HEADINGS]
    assert found == HEADINGS


@pytest.mark.parametrize("name", NOTES)
def test_a_note_has_a_picture_a_snippet_and_three_exercises_each_with_an_answer(name):
    text, parts = (ROOT / "docs" / name).read_text(encoding="utf-8"), sections(name)
    assert "\n```python\n" in text and re.search(r"!\[[^]]{20,}\]\((pictures|experiments)/", text)
    exercises = parts["Exercises"]
    asked = re.findall(r"^\*\*(\d+)\.\*\*", exercises, re.MULTILINE)
    assert asked == [str(i + 1) for i in range(len(asked))]
    assert 3 <= len(asked) == exercises.count("<details>") == exercises.count("</details>")


@pytest.mark.parametrize("name", NOTES)
def test_the_idea_is_five_sentences_before_its_picture_or_second_paragraph(name):
    idea = sections(name)["The idea"].strip().split("\n\n")[0].replace("\n", " ")
    sentences = re.split(r"(?<=[.?!]) (?=[A-Za-z`])", re.sub(r"\([^)]*\)", "", idea))
    assert len(sentences) == 5, sentences


@pytest.mark.parametrize("name", NOTES)
def test_formulas_use_only_what_github_renders(name):
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(re.findall(r"^\$\$$", text, re.MULTILINE)) % 2 == 0
    for forbidden in (r"\operatorname*", r"\newcommand", r"\def", r"\mathlarger"):
        assert forbidden not in text
