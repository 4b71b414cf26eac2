"""What becomes of an example that has more tokens than `cutoff_len`.

plain text       pieces of cutoff_len tokens. Each begins with the last token of the one before, which is
                 never learned there, so every token is learned exactly once and none is lost
end              cut at the end: the last tokens are lost, at first those of the answer
keep_answer      LLaMA-Factory's way: prompts and answers are both cut at their ends, prompts more
"""

import numpy as np

TRUNCATIONS = ("end", "keep_answer")


def pieces(length: int, cutoff_len: int) -> list[slice]:
    """Return the pieces of `length` tokens, each of at most `cutoff_len` >= 2 and of two at least."""
    return [slice(start, start + cutoff_len) for start in range(0, max(length - 1, 1), cutoff_len - 1)]


def kept_tokens(
    answers: np.ndarray, cutoff_len: int, truncation: str = "end", last_first: bool = False
) -> np.ndarray:
    """Return the indices of the tokens that a cut leaves, at most `cutoff_len` of them, in order.

    answers: int (T,), the number of the answer that each token belongs to, 0 for the tokens of prompts.

    With "keep_answer", a prompt and its answer get what is left of `cutoff_len`, one pair after the other
    (`last_first`: the last pair first). An answer is whole if it fits into half of that; a prompt, if it does
    and the answer does not; otherwise both are cut in proportion (LLaMA-Factory, data/processor).
    """
    T = len(answers)
    if truncation == "end" or cutoff_len >= T or not answers.any():
        return np.arange(min(T, cutoff_len))
    pairs, begin = [], 0
    for number in np.unique(answers[answers > 0]):
        first, last = np.flatnonzero(answers == number)[[0, -1]]
        pairs.append((begin, int(first), int(last) + 1))
        begin = int(last) + 1
    kept, room = [], cutoff_len
    for begin, first, end in reversed(pairs) if last_first else pairs:
        prompt, answer = _shares(first - begin, end - first, room)
        kept += [np.arange(begin, begin + prompt), np.arange(first, first + answer)]
        room -= prompt + answer
    return np.sort(np.concatenate(kept))


def _shares(prompt: int, answer: int, room: int) -> tuple[int, int]:
    """Return how many tokens of a prompt and of its answer fit into `room` tokens."""
    if 2 * answer < room:
        most = room
    elif 2 * prompt < room:
        most = room - prompt
    else:
        most = int(room * (answer / (prompt + answer)))  # in floats, rounded as there: 100 * 0.29 is 28
    answer = min(answer, most)
    return min(prompt, room - answer), answer
