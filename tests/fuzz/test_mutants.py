"""The table of mutants fits the sources: every text that a mutant replaces stands once in its file."""

import pytest

from fuzz.mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.old[:30]}")
def test_a_mutants_text_is_there_once_and_its_tests_exist(mutant):
    assert (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    assert mutant.old != mutant.new and (ROOT / mutant.tests.split()[0]).exists()
