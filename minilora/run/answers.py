"""answers.jsonl: the held-out prompts of a run, and how the base model and the adapted one answer them.

Each line is an object of four texts: prompt, expected, base, adapted. The rows belong to whoever owns the
dataset, so the file stays in output_dir: it is neither shared nor sent to a tracker.
"""

from collections.abc import Sequence
from pathlib import Path

from minilora.data.rows import Row
from minilora.system.errors import UserError
from minilora.system.files import read_json_lines, to_json, write_whole
from minilora.system.schema import Field, read_fields

ANSWERS_FILE = "answers.jsonl"
_LONGEST = 10**9  # characters: a prompt may be as long as the model's context
_FIELDS = {
    "prompt": Field(str, "what was asked", required=True, longest=_LONGEST),
    "expected": Field(str, "the row's completion", required=True, longest=_LONGEST),
    "base": Field(str, "the answer without the adapter", required=True, longest=_LONGEST),
    "adapted": Field(str, "the answer with it", required=True, longest=_LONGEST),
}


def write_answers(directory: Path, rows: Sequence[Row], base: Sequence[str], adapted: Sequence[str]) -> None:
    """Write the answers to the rows' prompts into a run's directory."""
    lines = [
        to_json(dict(prompt=row.prompt, expected=row.completion.strip(), base=before, adapted=after))
        for row, before, after in zip(rows, base, adapted, strict=True)
    ]
    write_whole(directory / ANSWERS_FILE, "".join(line + "\n" for line in lines))


def read_answers(directory: Path) -> list[dict[str, str]]:
    """The lines of a run's answers, none if it has no such file. Raises UserError that names a wrong line."""
    path = directory / ANSWERS_FILE
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    answers = []
    for number, line in enumerate(read_json_lines(path), start=1):
        try:
            answers.append(read_fields(line, _FIELDS))
        except UserError as error:
            raise UserError(f"{path}, line {number} holds no answers: {error}") from error
    return answers
