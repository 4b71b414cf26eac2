"""Which tokens of a long example are kept."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.data.truncation import kept_tokens, pieces

pairs = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=4)


def numbered(*lengths: tuple[int, int]) -> np.ndarray:
    """The answers of a conversation whose prompts and answers have these lengths."""
    parts = [np.repeat([0, i], pair) for i, pair in enumerate(lengths, start=1)]
    return np.concatenate(parts)


# Prompt and answer of LLaMA-Factory's infer_seqlen(source_len, target_len, cutoff_len), worked out by hand.
@pytest.mark.parametrize(
    ("prompt", "answer", "cutoff_len", "kept"),
    [
        (100, 20, 64, (44, 20)),  # the answer is less than half: whole
        (20, 100, 64, (20, 44)),  # the prompt is
        (100, 100, 64, (32, 32)),  # neither: in proportion
        (90, 60, 50, (30, 20)),
        (100, 33, 64, (49, 15)),  # int(64 * 33 / 133) = 15
        (32, 64, 64, (22, 42)),  # int(64 * 64 / 96) = 42
        (31, 64, 64, (31, 33)),
        (710, 290, 100, (72, 28)),  # int(100 * 0.29) is 28 in floats
        (0, 100, 64, (0, 64)),
        (10, 20, 64, (10, 20)),
    ],
)
def test_keep_answer_cuts_a_prompt_and_its_answer_as_llama_factory_does(prompt, answer, cutoff_len, kept):
    indices = kept_tokens(numbered((prompt, answer)), cutoff_len, "keep_answer")
    assert indices.tolist() == [*range(kept[0]), *range(prompt, prompt + kept[1])]


def test_later_turns_get_what_the_earlier_ones_leave_and_with_a_masked_history_the_other_way_round():
    answers = numbered((10, 10), (10, 30))  # 60 tokens
    assert kept_tokens(answers, 40, "keep_answer").tolist() == [*range(20), *range(20, 25), *range(30, 45)]
    last_first = kept_tokens(answers, 40, "keep_answer", last_first=True)
    assert last_first.tolist() == [*range(20, 60)]
    last_first = kept_tokens(answers, 50, "keep_answer", last_first=True)
    assert last_first.tolist() == [*range(5), *range(10, 15), *range(20, 60)]


@given(pairs=pairs, tail=st.integers(0, 3), cutoff_len=st.integers(2, 80), last_first=st.booleans())
def test_a_cut_keeps_the_order_never_exceeds_its_limit_and_changes_nothing_that_fits(
    pairs, tail, cutoff_len, last_first
):
    answers = np.append(numbered(*pairs), np.zeros(tail, int))
    for truncation in ("end", "keep_answer"):
        kept = kept_tokens(answers, cutoff_len, truncation, last_first)
        assert len(kept) <= cutoff_len and (np.diff(kept) > 0).all()
        if len(answers) <= cutoff_len:
            assert kept.tolist() == [*range(len(answers))]
    kept = kept_tokens(answers, cutoff_len, "end")
    assert kept.tolist() == [*range(min(len(answers), cutoff_len))]


@given(length=st.integers(1, 300), cutoff_len=st.integers(2, 50))
def test_pieces_hold_every_token_and_share_one_with_the_next(length, cutoff_len):
    made = [np.arange(length)[piece] for piece in pieces(length, cutoff_len)]
    assert all(len(piece) <= cutoff_len for piece in made)
    joined = [*made[0], *(i for piece in made[1:] for i in piece[1:])]
    assert joined == [*range(length)]
    assert all(a[-1] == b[0] for a, b in zip(made, made[1:], strict=False))
    assert length == 1 or all(len(piece) >= 2 for piece in made)
