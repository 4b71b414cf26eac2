"""LLaMA-Factory's dataset_info.json: the files, hub datasets and columns behind the names of datasets.

    {"riddles": {"file_name": "riddles.json", "columns": {"prompt": "question", "response": "answer"}}}

File names in it are relative to its own folder. An entry is accepted if `minilora.data.rows` can read its
rows as they are; everything else is an error that names the entry and the fix. `split` and `subset` are those
of a dataset on the hub, `train` by default.
"""

import os
from pathlib import Path

from minilora.data.messages import ROLES
from minilora.data.mixing import parse_datasets
from minilora.system.errors import UserError, suggestion
from minilora.system.files import read_json
from minilora.system.remote import refuse_address

_FIELD_TYPES = {
    "file_name": str,
    "hf_hub_url": str,
    "ms_hub_url": str,
    "om_hub_url": str,
    "subset": str,
    "folder": str,
    "split": str,
    "formatting": str,
    "columns": dict,
    "tags": dict,
}
_MESSAGE_FORMATS = ("sharegpt", "openai")
_COLUMNS = {  # LLaMA-Factory's name of a column: the name that it must have here
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "system": "system",
    "history": "history",
}
_TAGS = {  # the accepted values; tags of tools may have any value, because messages of tools are refused
    "role_tag": ("from", "role"),
    "content_tag": ("value", "content"),
} | {
    f"{role}_tag": tuple(name for name, meaning in ROLES.items() if meaning == role)
    for role in ("user", "assistant", "system")
}


def resolve_datasets(
    values: dict[str, object], index_file: Path, is_plain_text: bool = False
) -> dict[str, object]:
    """The keys `dataset` and `eval_dataset` with a path or hub id for each name, and the columns' keys.

    `index_file` is dataset_info.json. With `is_plain_text` the prompts alone are learned, whole, as in
    LLaMA-Factory's stage pt. Column keys that `values` sets are not overridden. Raises UserError for
    an unknown name and for an entry that cannot be read here.
    """
    entries = read_json(index_file) if os.path.isfile(index_file) else {}
    if not isinstance(entries, dict):
        raise UserError(
            f'{index_file} must hold an object, {{"name": {{"file_name": "my.json"}}}}, '
            f"not {type(entries).__name__}"
        )
    resolved, column_keys = {}, {}
    for key in ("dataset", "eval_dataset"):
        if values.get(key) in (None, "none", "null"):
            continue
        sources = []
        for name, weight in parse_datasets(values[key]):
            source, needed = _resolve(name, entries, index_file, is_plain_text)
            if both := column_keys.keys() & needed.keys() & {"columns"}:
                needed |= {key: ",".join(dict.fromkeys((column_keys[key], needed[key]))) for key in both}
                column_keys |= {key: needed[key] for key in both}
            if any(column_keys.get(column_key, column) != column for column_key, column in needed.items()):
                raise UserError(
                    f"{key} {name}: {index_file} names its columns differently from another dataset's; "
                    "rename them in the files so that they agree"
                )
            column_keys |= needed
            sources.append(source if weight is None else f"{source}:{float(weight):g}")
        # A list keeps a comma in a file's name from separating two datasets.
        resolved[key] = sources if len(sources) > 1 or "," in sources[0] else sources[0]
    return resolved | {name: column for name, column in column_keys.items() if name not in values}


def _resolve(name: str, entries: dict, index_file: Path, is_plain_text: bool) -> tuple[str, dict[str, str]]:
    """The path or hub id behind a name, and the column keys that its rows need."""
    if entries.get(name) is None:
        return _resolve_without_entry(name, entries, index_file), {}
    entry, location = entries[name], f"{index_file}, {name}"
    _check_entry(entry, location)
    for field in ("hf_hub_url", "file_name"):
        refuse_address(entry.get(field) or "", location, "--dataset")
    source, columns = _source(entry, name, index_file.parent), _given_columns(entry)
    if is_plain_text:
        return source, {"text_column": columns["prompt"]} if "prompt" in columns else {}
    if entry.get("formatting") in _MESSAGE_FORMATS or "messages" in columns:
        _check_tags(entry.get("tags") or {}, location)
        system = {name: column for name, column in columns.items() if name == "system"}
        return source, {"messages_column": columns.get("messages", "conversations")} | _renamed(system)
    return source, _prompt_columns(columns, location)


def _source(entry: dict, name: str, folder: Path) -> str:
    """The path of an entry's file or folder, or its hub id with subset and split."""
    split = f"[{entry['split']}]" if entry.get("split") else ""
    if not entry.get("hf_hub_url"):
        place = str(folder / (entry.get("file_name") or name))
        return place + split if os.path.isdir(place) else place  # one file holds one split
    parts = entry["hf_hub_url"], entry.get("subset"), entry.get("folder")
    return "/".join(part for part in parts if part) + split


def _resolve_without_entry(name: str, entries: dict, index_file: Path) -> str:
    """A file in the index's folder, else a file or hub id by itself."""
    if os.path.isfile(index_file.parent / name):
        return str(index_file.parent / name)
    if "/" in name or os.path.exists(name):
        return name
    if entries:
        raise UserError(f"dataset {name!r} is not a file and not in {index_file}{suggestion(name, entries)}")
    raise UserError(
        f"dataset {name!r} is not a file, and there is no {index_file}; set dataset_dir, or name a file"
    )


def _check_entry(entry: object, location: str) -> None:
    """Raise UserError for fields of a wrong type, and for fields and columns that are not supported."""
    if not isinstance(entry, dict):
        raise UserError(f'{location} must hold an object such as {{"file_name": "my.json"}}, not {entry!r}')
    for field, field_type in _FIELD_TYPES.items():
        if not isinstance(value := entry.get(field), field_type | None):
            needed = "text" if field_type is str else "an object"
            raise UserError(f"{location}: {field} must be {needed}, not {value!r}")
    unsupported = [
        field for field, value in entry.items() if field not in _FIELD_TYPES and value not in (None, False)
    ]
    for name, column in _given_columns(entry).items():
        if not isinstance(column, str):
            raise UserError(f"{location}: columns names {column!r} for {name}, which must be text")
    unsupported += [column for column in _given_columns(entry) if column not in (*_COLUMNS, "messages")]
    if (formatting := entry.get("formatting") or "alpaca") not in ("alpaca", *_MESSAGE_FORMATS):
        unsupported.append(f"formatting {formatting}")
    if unsupported:
        raise UserError(
            f"{location}: {', '.join(unsupported)} is not supported; "
            "write the examples into a file of their own"
        )


def _given_columns(entry: dict) -> dict[str, object]:
    """{LLaMA-Factory's name of a column: its name in the file}, without those set to null."""
    return {name: column for name, column in (entry.get("columns") or {}).items() if column is not None}


def _prompt_columns(columns: dict[str, object], location: str) -> dict[str, str]:
    """The column keys for rows of prompt and response; {} if the rows have the usual Alpaca columns."""
    if [*columns] == ["prompt"]:
        return {"text_column": columns["prompt"]}  # LLaMA-Factory's way to describe plain text
    if columns and not columns.keys() >= {"prompt", "response"}:
        raise UserError(
            f"{location}: columns {', '.join(columns)} do not make an example; name prompt and response"
        )
    if len(columns) == 2:
        return {"prompt_column": columns["prompt"], "completion_column": columns["response"]}
    return _renamed(columns)


def _renamed(columns: dict[str, object]) -> dict[str, str]:
    """The key `columns` for columns that have other names than here; {} if there are none."""
    other = [f"{_COLUMNS[name]}={column}" for name, column in columns.items() if _COLUMNS[name] != column]
    return {"columns": ",".join(other)} if other else {}


def _check_tags(tags: dict[str, object], location: str) -> None:
    """Raise UserError for names of keys and roles in messages that `minilora.data.messages` does not read."""
    for tag, value in tags.items():
        if tag in _TAGS and value is not None and value not in _TAGS[tag]:
            raise UserError(
                f"{location}: {tag} is {value!r}, and must be {' or '.join(_TAGS[tag])}; "
                "rename it in the file"
            )
