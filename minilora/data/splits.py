"""Which files of a dataset are read: those of one subset and one split, in one format.

    owner/name                 the training split
    owner/name[test]           another one
    owner/name/main[test]      of a subset, or a folder

Splits are never mixed. A dataset's README.md may list them under `configs:`, with the files of each. Without
that, the names of the files tell, by the words that the datasets library knows:

    data/train_sft-00000-of-00003.parquet     a split of any name, in front of its shards
    train.jsonl, dev/a.csv, my_test.json      train or training; validation, valid, val or dev; test, testing,
                                              eval or evaluation
    quiz.jsonl                                of no split: training, unless a file is named so

Without a split in the name of the dataset, `train` is read, or the only one there is. Of several that begin
with train, such as train_sft and train_gen, one has to be chosen.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import yaml

from minilora.data.file_formats import list_columns
from minilora.system.errors import UserError

_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}.*")
LARGEST_CARD = 300_000  # characters of a README's YAML; PyYAML reads some 100,000 in a second
_LONGEST_PATTERN, _MOST_STARS = 500, 6

Files = dict[str, list[str]]  # split -> names of files


def parse_name(dataset: str) -> tuple[str, str | None]:
    """Return the name and the split of "owner/name[split]"."""
    match = re.fullmatch(r"(.+)\[([\w.-]+)\]", dataset)
    return (match[1], match[2]) if match else (dataset, None)


def choose_split(
    names: Iterable[str], dataset: str, folder: str, split: str | None, card: str = ""
) -> list[str]:
    """Return the files of one split, of those that a dataset consists of.

    `names` are the files of all formats that can be read, `card` is the text of its README.md. `folder` names
    a subset of the card, a folder, or the beginning of files' names: "data/test" is the folder data/test and
    the files data/test-0.jsonl, data/test.jsonl. Raises UserError, with the choices there are, if it takes
    one.
    """
    names, subsets = sorted(names), _subsets_of(card)
    if subsets and (patterns := _choose_subset(subsets, dataset, folder)) is not None:
        splits = {name: _matching(names, paths) for name, paths in patterns.items()}
        return _choose(splits, dataset, folder, split)
    if folder:
        names = [name for name in names if re.fullmatch(rf"{re.escape(folder)}(/.*|[-.][^/]*)", name)]
    chosen = _choose(_splits_by_name(names), dataset, folder, split)
    if chosen:
        _refuse_several_folders(chosen, dataset)
    return chosen


def _choose(splits: Files, dataset: str, folder: str, split: str | None) -> list[str]:
    """Return the files of the split to read. Raises UserError with the splits there are."""
    where = f"{dataset}/{folder}" if folder else dataset
    splits = {name: files for name, files in splits.items() if files}
    if split is not None:
        known = {word: name for name, words in _WORDS.items() for word in words}
        wanted = split if split in splits else known.get(split, split)
        if wanted not in splits:
            there = f"it has {list_columns(splits)}" if splits else "it has no files"
            raise UserError(f"dataset {where} has no split {split}; {there}")
        return splits[wanted]
    training = [name for name in splits if name.startswith("train")]
    for only in (["train"] if "train" in splits else [], training, [*splits]):
        if len(only) == 1:
            return splits[only[0]]
    if not splits:
        return []
    choices = training or [*splits]
    raise UserError(
        f"dataset {where} has the splits {list_columns(choices)}; choose one, as in {where}[{choices[0]}]"
    )


# ---- by the names of files ----


def _splits_by_name(names: Iterable[str]) -> Files:
    """Return the files of each split. Two names of one word, train_sft and train_gen, are two splits."""
    found: dict[str, Files] = {}  # word -> name of the split -> files
    for name in names:
        word, own = _split_of(name)
        found.setdefault(word, {}).setdefault(own, []).append(name)
    unnamed = found.pop("", {})
    splits: Files = {}
    for word, owns in found.items():
        for own, files in owns.items():
            splits[own if len(owns) > 1 or own.startswith(word) else word] = files
    if unnamed and not any(name.startswith("train") for name in splits):
        splits["train"] = unnamed[""]
    return splits


def _split_of(name: str) -> tuple[str, str]:
    """Return the word for a file's split, and the whole name of it: ("train", "train_sft"). No split: "".

    The file's own name decides, or else that of the nearest folder which says one.
    """
    *folders, file = name.split("/")
    shard, stem = _SHARD.fullmatch(file), file.partition(".")[0]
    own = shard[1] if shard else re.sub(r"[-_ ]*\d+$", "", stem)
    for part in (own, *reversed(folders)):
        words = re.split(r"[^a-z]+", part.lower())
        for split, known in _WORDS.items():
            if any(word in known for word in words):
                return split, (split if part.lower() in known else part)
    return (own, own) if shard and own != "data" else ("", "")


def _refuse_several_folders(names: list[str], dataset: str) -> None:
    """Raise UserError, with a choice to make, if the files lie in several folders: each is a dataset then."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    if len(folders) == 1:
        return
    listed = ", ".join(folder or "no folder" for folder in folders)
    example = next(folder for folder in folders if folder)
    advice = f"choose one, as in {dataset}/{example}"
    if outside := [name for name in names if "/" not in name]:
        advice += f"; or a file outside of the folders, as in hf://datasets/{dataset}/{outside[0]}"
    raise UserError(f"dataset {dataset} holds several, in {listed}; {advice}")


# ---- by the card ----


def _subsets_of(card: str) -> dict[str, dict]:
    """Return {subset: its entry} of the `configs:` in a README's YAML. What cannot be read says nothing."""
    front = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    if not front or len(front[1]) > LARGEST_CARD:
        return {}
    try:
        told = yaml.load(front[1], Loader=yaml.BaseLoader)  # every scalar is text: no code, no huge numbers
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    configs = told.get("configs") if isinstance(told, dict) else None
    entries = [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []
    named = {entry.get("config_name", "default"): entry for entry in entries if entry.get("data_files")}
    return {name: entry for name, entry in named.items() if isinstance(name, str)}


def _choose_subset(subsets: Mapping[str, dict], dataset: str, folder: str) -> dict[str, list[str]] | None:
    """Return {split: patterns} of the subset that is meant; None if `folder` is no subset's name."""
    if folder:
        return _patterns(subsets[folder]) if folder in subsets else None
    marked = [name for name, entry in subsets.items() if entry.get("default") == "true"]
    usual = [*marked, *(name for name in ("default",) if name in subsets)]
    if len(subsets) > 1 and not usual:
        listed, example = list_columns(subsets), next(iter(subsets))
        raise UserError(
            f"dataset {dataset} holds the subsets {listed}; choose one, as in {dataset}/{example}"
        )
    return _patterns(subsets[usual[0] if usual else next(iter(subsets))])


def _patterns(entry: dict) -> dict[str, list[str]]:
    """Return {split: patterns of its files}; patterns without a split are of `train`."""
    files, folder = entry["data_files"], entry.get("data_dir")
    splits: dict[str, list[str]] = {}
    for part in files if isinstance(files, list) else [files]:
        split, paths = (part.get("split"), part.get("path")) if isinstance(part, dict) else ("train", part)
        paths = paths if isinstance(paths, list) else [paths]
        if isinstance(split, str):
            inside = [f"{folder}/{path}" if isinstance(folder, str) else path for path in paths]
            splits.setdefault(split, []).extend(path for path in inside if isinstance(path, str))
    return splits


def _matching(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    matchers = [*map(_matcher, patterns)]
    return [name for name in names if any(matches(name) for matches in matchers)]


def _matcher(pattern: str) -> Callable[[str], object]:
    """Return a function that tells whether a name matches: * within a folder, ** across folders."""
    if len(pattern) > _LONGEST_PATTERN or pattern.count("*") > _MOST_STARS:
        return lambda name: False
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    return re.compile("".join(words.get(piece, re.escape(piece)) for piece in pieces)).fullmatch
