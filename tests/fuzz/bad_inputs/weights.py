"""Safetensors files of a model and of an adapter, and the index of a model in several files."""

from collections.abc import Callable, Iterator

import numpy as np

from fuzz.bad_inputs.commands import EVALUATE, EXPORT, LINT, MERGE, READ_WEIGHTS, TRAIN
from fuzz.case import Case, make_case
from fuzz.edits import (
    DROP,
    Edit,
    both,
    cut,
    edit_bytes,
    edit_header,
    edit_json,
    edit_tensors,
    fifo,
    folder,
    join_safetensors,
    link,
    remove,
    set_keys,
    split_safetensors,
    write,
)  # fmt: skip

KIND = "safetensors"
MODEL, ADAPTER = "model/model.safetensors", "adapter/adapter_model.safetensors"
READ_SHARDS = (f"{TRAIN} --model shards", "evaluate --model shards --dataset train.jsonl")
INDEX = "shards/model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def header_edit(change: Callable[[dict, str], object]) -> Callable[[str], Edit]:
    """path -> an edit of the file's header, in which `change` gets the name of a tensor."""
    return lambda path: edit_header(path, lambda header: change(header, Q if path == MODEL else A))


def entry_edit(**changes: object) -> Callable[[str], Edit]:
    """path -> an edit of one tensor's entry in the header."""
    return header_edit(lambda header, name: header[name].update(changes))


def lie(length: int) -> Callable[[str], Edit]:
    """path -> an edit of the header's length, which then is not the true one."""
    return lambda path: edit_bytes(path, lambda data: join_safetensors(*split_safetensors(data), length))


BROKEN = {  # name: path -> edit. The file is not safetensors.
    "empty": lambda path: write(path, b""),
    "cut to 7 bytes": lambda path: edit_bytes(path, lambda data: data[:7]),
    "cut in its header": lambda path: edit_bytes(path, lambda data: data[:100]),
    "cut in half": lambda path: cut(path, 0.5),
    "cut by a byte": lambda path: edit_bytes(path, lambda data: data[:-1]),
    "longer by a byte": lambda path: edit_bytes(path, lambda data: data + b"\0"),
    "text": lambda path: write(path, "not a tensor in sight"),
    "zeros": lambda path: write(path, bytes(4096)),
    "a pickle": lambda path: write(path, b"\x80\x04\x95" + bytes(64)),
    "a header of 2^63 bytes": lie(2**63),
    "a header of 2^64 - 1 bytes": lie(2**64 - 1),
    "a header of 200 MB": lie(200_000_000),
    "a header of no bytes": lie(0),
    "a header one byte too long": lambda path: edit_bytes(
        path, lambda data: (int.from_bytes(data[:8], "little") + 1).to_bytes(8, "little") + data[8:]
    ),
    "a header that is a list": header_edit(lambda header, name: [1, 2]),
    "a header that is no JSON": header_edit(lambda header, name: b"{nonsense"),
    "a header that is not UTF-8": header_edit(lambda header, name: b'{"\xe9": 1}'),
    "a header nested 10,000 deep": header_edit(lambda header, name: b"[" * 10_000),
    "metadata that is no text": header_edit(lambda header, name: header.update(__metadata__={"format": 5})),
    "metadata that is a list": header_edit(lambda header, name: header.update(__metadata__=[])),
    "offsets beyond the end": entry_edit(data_offsets=[0, 10**15]),
    "offsets below zero": entry_edit(data_offsets=[-8, 8]),
    "offsets the wrong way": entry_edit(data_offsets=[64, 0]),
    "offsets that overlap": entry_edit(data_offsets=[4, 260]),
    "offsets of 2^64": entry_edit(data_offsets=[0, 2**64]),
    "offsets of text": entry_edit(data_offsets=["0", "8"]),
    "a hole between tensors": header_edit(lambda header, name: header.pop(name) and None),
    "an unknown dtype": entry_edit(dtype="F17"),
    "a dtype that is a number": entry_edit(dtype=32),
    "a dtype of another width": entry_edit(dtype="F64"),
    "a shape below zero": entry_edit(shape=[-2, -16]),
    "a shape of 2^62": entry_edit(shape=[2**62, 2**62]),
    "a shape of fractions": entry_edit(shape=[0.5, 64]),
    "a shape that is a number": entry_edit(shape=64),
    "a shape with too few numbers": entry_edit(shape=[1, 1]),
    "a pipe": fifo,
    "a directory": folder,
    "/dev/zero": lambda path: link(path, "/dev/zero"),
    "absent": remove,
}


def tensors_edit(change: Callable[[dict[str, np.ndarray], str], object]) -> Callable[[str], Edit]:
    """path -> an edit of the tensors, in which `change` gets the name of one of them."""
    return lambda path: edit_tensors(path, lambda tensors: change(tensors, Q if path == MODEL else A))


def _set(index: object, value: float) -> Callable[[dict, str], object]:
    return lambda tensors, name: tensors[name].__setitem__(index, value)


STRANGE = {  # name: path -> edit, and a word. Safetensors, but not these tensors.
    "NaN in a tensor": (tensors_edit(_set((0, 0), np.nan)), "q_proj"),
    "infinity in a tensor": (tensors_edit(_set((1, 1), np.inf)), "q_proj"),
    "a tensor too few": (tensors_edit(lambda tensors, name: tensors.pop(name) is None or None), "q_proj"),
    "a tensor too many": (tensors_edit(lambda tensors, name: tensors.update(surprise=np.zeros(3))), "surprise"),
    "a tensor too many, with an escape sequence": (
        tensors_edit(lambda tensors, name: tensors.update({"surprise\x1b[2J\r\n": np.zeros(3)})), "surprise"),
    "a tensor too many, of 100,000 characters": (
        tensors_edit(lambda tensors, name: tensors.update({"surprise" * 12_500: np.zeros(3)})), "surprise"),
    "1,000 tensors too many": (
        tensors_edit(lambda tensors, name: tensors.update({f"surprise{i}": np.zeros(1) for i in range(1000)})),
        "surprise"),
    "a tensor on its side": (
        tensors_edit(lambda tensors, name: tensors.update({name: np.ascontiguousarray(tensors[name][:, :-1])})),
        "q_proj"),
    "a vector for a matrix": (
        tensors_edit(lambda tensors, name: tensors.update({name: tensors[name].reshape(-1)})), "q_proj"),
    "a matrix without rows": (
        tensors_edit(lambda tensors, name: tensors.update({name: tensors[name][:0]})), "q_proj"),
    "whole numbers": (tensors_edit(lambda tensors, name: tensors.update({name: tensors[name].astype(np.int32)})),
        "q_proj"),
    "booleans": (tensors_edit(lambda tensors, name: tensors.update({name: tensors[name] > 0})), "q_proj"),
}  # fmt: skip
ONLY_WITH_A_MODEL = ("a tensor too few", "a tensor on its side")  # the adapter alone shows nothing wrong
INDICES = {  # name: edit of the index
    "is no JSON": write(INDEX, "nonsense"),
    "is a list": write(INDEX, "[]"),
    "is null": write(INDEX, "null"),
    "is not UTF-8": write(INDEX, b"\xe9"),
    "is nested 100,000 deep": write(INDEX, "[" * 100_000),
    "has no weight_map": set_keys(INDEX, weight_map=DROP),
    "has an empty weight_map": set_keys(INDEX, weight_map={}),
    "has a list for weight_map": set_keys(INDEX, weight_map=["first.safetensors"]),
    "has a number for weight_map": set_keys(INDEX, weight_map=5),
    "names a number": set_keys(INDEX, weight_map={Q: 5}),
    "names a list": set_keys(INDEX, weight_map={Q: ["first.safetensors"]}),
    "names nothing": set_keys(INDEX, weight_map={Q: ""}),
    "names the folder above": set_keys(INDEX, weight_map={Q: "../model/model.safetensors"}),
    "names a file by its whole path": set_keys(INDEX, weight_map={Q: "/etc/passwd"}),
    "names /dev/zero": set_keys(INDEX, weight_map={Q: "/dev/zero"}),
    "names a pickle": both(
        set_keys(INDEX, weight_map={Q: "pytorch_model.bin"}), write("shards/pytorch_model.bin", b"\x80\x04")
    ),
    "names a shard that is absent": remove("shards/second.safetensors"),
    "names a shard with NUL": set_keys(INDEX, weight_map={Q: "a\0b.safetensors"}),
    "names a shard of 1,000 characters": set_keys(INDEX, weight_map={Q: "a" * 1000 + ".safetensors"}),
    "names 100,000 shards": set_keys(INDEX, weight_map={f"t{i}": f"{i}.safetensors" for i in range(100_000)}),
    "leaves a shard out": edit_json(
        INDEX, lambda raw: raw | {"weight_map": {k: v for k, v in raw["weight_map"].items() if v[0] == "f"}}
    ),
    "is a pipe": fifo(INDEX),
    "is /dev/zero": link(INDEX, "/dev/zero"),
}


def cases() -> Iterator[Case]:
    for number, (name, edit) in enumerate(BROKEN.items()):
        command = READ_WEIGHTS[number % len(READ_WEIGHTS)]
        yield _case(f"model: {name}", command, "model.safetensors|model", edit(MODEL))
        command = (EVALUATE, MERGE, EXPORT)[number % 3]
        yield _case(f"adapter: {name}", command, "adapter_model.safetensors|adapter", edit(ADAPTER))
        findings = dict(code=2) if name == "absent" else dict(code=1)
        if name in ("cut in half", "a header of 2^63 bytes", "a shape below zero", "a pipe", "text"):
            yield _case(f"adapter: {name}", LINT, "", edit(ADAPTER), **findings)
    for number, (name, (edit, word)) in enumerate(STRANGE.items()):
        yield _case(f"model: {name}", (TRAIN, EVALUATE, MERGE)[number % 3], word, edit(MODEL))
        for command in (EVALUATE,) if name in ONLY_WITH_A_MODEL else (EVALUATE, EXPORT):
            yield _case(f"adapter: {name}", command, word, edit(ADAPTER))
    for number, (name, edit) in enumerate(INDICES.items()):
        yield _case(f"the index {name}", READ_SHARDS[number % 2], "index.json|shards", edit)
    pickled = both(remove(ADAPTER), write("adapter/adapter_model.bin", b"\x80\x04"))
    yield _case("adapter: only a pickle", EVALUATE, "adapter_model.bin", pickled)
    yield _case("adapter: only a pickle", LINT, "", pickled, code=1)


def _case(name: str, command: str, word: str, change: Edit, **more: object) -> Case:
    title = "export" if "export_adapter" in command else command.split()[0]
    return make_case(KIND, f"{name} ({title})", command, word, change=change, remarks=True, **more)
