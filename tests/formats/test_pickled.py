"""Pickled weights: tensors are read to the bit, and nothing in a hostile file runs."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.families import relative_error, transformers_model
from support.merging import make_base
from support.project import PROGRAM_ENVIRONMENT, ROOT
from support.tiny import ids, tiny_model

from minilora import CausalLM, UserError, load_model, save_model
from minilora.formats.config_json import parse_config
from minilora.formats.pickled import read_pickled_tensors
from minilora.formats.weights import StoredTensors


@pytest.fixture
def directory(tmp_path):
    """A model directory with pickled weights, as transformers 4 wrote it."""
    save_model(tiny_model(), tmp_path / "model")
    return pickled(tmp_path / "model")


def pickled(directory, **how):
    """The same directory with `pytorch_model.bin` in the place of `model.safetensors`."""
    file = directory / "model.safetensors"
    torch.save(OrderedDict(load_file(file)), directory / "pytorch_model.bin", **how)
    file.unlink()
    return directory


# ---- what is read --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_pickled_model_gives_the_same_logits_as_the_same_weights_in_safetensors(directory):
    assert torch.equal(load_model(directory)(ids(1, 9)), tiny_model()(ids(1, 9)))


@torch.no_grad()
def test_what_an_older_transformers_wrote_is_read_shards_shared_weights_and_all(tmp_path):
    """Its state dict holds a tied head that shares the embedding's memory, and parameters with gradients."""
    theirs = transformers_model("qwen2-bias-tied")
    theirs.config.architectures = [type(theirs).__name__]
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict(keep_vars=True)
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    shards = [dict(list(state.items())[:10]), dict(list(state.items())[10:])]
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"pytorch_model-{number + 1:05}-of-00002.bin"
        torch.save(shard, tmp_path / file)
        weight_map |= dict.fromkeys(shard, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    ours = load_model(tmp_path)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert not any(p.requires_grad for p in ours.parameters())
    # 1e-5: float32 sums in another order, as in test_model
    assert relative_error(ours(ids(2, 20)), theirs(ids(2, 20)).logits) <= 1e-5


def test_a_pickled_file_beside_safetensors_is_not_opened(directory, capsys):
    save_model(tiny_model(), directory)
    (directory / "pytorch_model.bin").write_bytes(b"nonsense")
    load_model(directory)
    assert "pickled" not in capsys.readouterr().err


def test_one_line_on_stderr_says_that_weights_are_pickled_and_how_to_convert_them(directory, capsys):
    load_model(directory)
    load_model(directory)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"reading pickled weights in {directory}, with PyTorch's loader")
    assert f"scripts/convert.py --model {directory} --output NEW" in err


def test_tensors_of_a_mapped_file_are_not_in_memory_before_they_are_used(directory):
    tensors = read_pickled_tensors(directory / "pytorch_model.bin")
    with open("/proc/self/maps") as maps:
        assert any(line.rstrip().endswith("pytorch_model.bin") for line in maps)
    del tensors
    with open("/proc/self/maps") as maps:
        assert not any(line.rstrip().endswith("pytorch_model.bin") for line in maps)


def test_loading_never_holds_pickled_weights_twice(tmp_path):
    """Measured in a process of its own, as for safetensors: a mapped file that stays open would count again."""
    config = dict(
        model_type="llama", vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=20
    )
    model = CausalLM(parse_config(config | dict(num_attention_heads=8, num_key_value_heads=8))).bfloat16()
    save_model(model, tmp_path)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    code = f"""
import minilora, torch
from minilora.system.device import memory_used
before = memory_used(torch.device("cpu"))
model = minilora.load_model({str(pickled(tmp_path))!r})
print(memory_used(torch.device("cpu")) - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=PROGRAM_ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    # 144 MB of weights. Beside them: one tensor as it lies in the file (8 MB), and the allocator's and the
    # modules' own 40 MB. A second copy would be 144 MB more.
    assert 130e6 < size < int(done.stdout) * 1.02 and int(done.stdout) < size + 60e6


def test_a_transposed_tensor_and_a_parameter_are_read_as_plain_tensors(tmp_path):
    matrix = torch.arange(6.0).view(2, 3)
    torch.save({"t": matrix.T, "p": torch.nn.Parameter(matrix)}, tmp_path / "x.bin")
    tensors = read_pickled_tensors(tmp_path / "x.bin")
    assert torch.equal(tensors["t"], matrix.T) and torch.equal(tensors["p"], matrix)
    assert {type(tensor) for tensor in tensors.values()} == {torch.Tensor}
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_a_file_from_before_2020_is_read_whole_and_a_model_in_it_must_be_converted(tmp_path):
    save_model(tiny_model(), tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    pickled(tmp_path, _use_new_zipfile_serialization=False)
    tensors = read_pickled_tensors(tmp_path / "pytorch_model.bin")
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    with pytest.raises(UserError, match="is no zip archive.* scripts/convert.py --model"):
        StoredTensors(tmp_path)


@settings(max_examples=30)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64]),
    shape=st.lists(st.integers(0, 5), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_any_plain_tensor_comes_back_to_the_bit(tmp_path_factory, dtype, shape, seed):
    path = tmp_path_factory.mktemp("any") / "x.bin"
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(100).to(dtype)
    torch.save({"x": tensor}, path)
    read = read_pickled_tensors(path)["x"]
    assert read.dtype == dtype and read.shape == tensor.shape and torch.equal(read, tensor)


# ---- what is refused -----------------------------------------------------------------------------------------


def refusal(path) -> str:
    """The one line that refuses a file."""
    with pytest.raises(UserError) as error:
        read_pickled_tensors(path)
    message = str(error.value)
    assert "\n" not in message and path.name in message and "weights_only" not in message
    return message


STRANGE = {  # content of a file: words of its refusal
    "a list": ([torch.ones(2)], "holds a list, not tensors by name"),
    "a tensor alone": (torch.ones(2), "holds a Tensor, not tensors by name"),
    "a checkpoint of a trainer": ({"model": {"w": torch.ones(2)}, "epoch": 3}, "model is a dict, where only"),
    "a number": ({"w": torch.ones(2), "step": 3}, "step is a int, where only plain tensors"),
    "a name that is a number": ({3: torch.ones(2)}, "an entry whose name is a int, not a text"),
    "a sparse tensor": ({"w": torch.ones(2).to_sparse()}, "w is a tensor of torch.float32, torch.sparse_coo"),
    "a tensor without memory": ({"w": torch.ones(2, device="meta")}, "torch.strided, on meta"),
    "complex numbers": ({"w": torch.ones(2, dtype=torch.complex64)}, "w is a tensor of torch.complex64"),
    "a view of one number": ({"w": torch.ones(1).expand(10**6, 10**6)}, r"a view of (1000000, 1000000) of fewer"),
    "a control character in a name": ({"w\x1b[2J": 3}, r"'w\x1b[2J' is a int"),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_anything_but_plain_tensors_by_name_is_refused(name, tmp_path):
    content, said = STRANGE[name]
    torch.save(content, tmp_path / "x.bin")
    assert said in refusal(tmp_path / "x.bin")


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_calls(trace) -> dict[str, object]:
    """Calls that leave a trace, if any of them runs."""
    command = f"touch {trace}"
    return {
        "os.system": Call(os.system, command),
        "subprocess": Call(subprocess.check_call, ["touch", str(trace)]),
        "eval": Call(eval, f"open({str(trace)!r}, 'w')"),
        "exec": Call(exec, f"open({str(trace)!r}, 'w')"),
        "open": Call(open, str(trace), "w"),
        "getattr": Call(getattr, "text", "upper"),
        "shutil": Call(shutil.copy, sys.executable, str(trace)),
    }


@pytest.mark.parametrize("kind", ["zip", "zip-protocol-4", "old", "tar", "bare"])
@pytest.mark.parametrize("name", hostile_calls(None))
def test_a_function_that_builds_no_tensor_is_named_and_does_not_run(name, kind, tmp_path):
    trace, path = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    content = {"w": torch.ones(2), "x": hostile_calls(trace)[name]}
    program = pickle.dumps(content["x"], protocol=2)
    if kind == "bare":
        path.write_bytes(program)
    elif kind == "tar":  # the way of CVE-2025-32434
        with tarfile.open(path, "w") as archive:
            for member in ("storages", "tensors", "pickle"):
                entry = tarfile.TarInfo(member)
                entry.size = len(program)
                archive.addfile(entry, io.BytesIO(program))
    else:
        protocol = 4 if kind == "zip-protocol-4" else 2
        torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=kind != "old")
    message = refusal(path)
    assert not trace.exists()
    if kind in ("zip", "bare"):  # Of the others the loader does not even know the instructions, or the frame.
        assert "which builds no tensor; it was not run" in message


def test_the_hostile_files_do_run_where_nothing_stops_them(tmp_path):
    """The test above can fail."""
    torch.save({"x": hostile_calls(tmp_path / "ran")["os.system"]}, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("script", ["train.py", "convert.py"])
def test_a_script_ends_with_code_2_and_one_line_and_the_payload_has_not_run(
    script, model_dir, dataset, tmp_path
):
    directory = pickled(shutil.copytree(model_dir, tmp_path / "model"))
    torch.save({"x": Call(os.system, f"touch {tmp_path / 'ran'}")}, directory / "pytorch_model.bin")
    shutil.copy(dataset, tmp_path / "train.jsonl")
    options = {
        "train.py": ["--dataset", tmp_path / "train.jsonl", "--output_dir", tmp_path / "out"],
        "convert.py": ["--output", tmp_path / "out"],
    }[script]
    command = [sys.executable, ROOT / "scripts" / script, "--model", directory, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=PROGRAM_ENVIRONMENT, cwd=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "posix.system, which builds no tensor" in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("keep", [0, 3, 64, 0.5, -1])
def test_a_truncated_file_is_named(keep, directory):
    path = directory / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if keep == 0.5 else keep])
    with pytest.raises(UserError, match="pytorch_model.bin is (truncated, corrupt|no zip archive)"):
        load_model(directory)


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The same archive, each of its entries changed by a function of its name and bytes."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, change(name, content))


def test_a_zip_bomb_is_refused_before_anything_is_unpacked(directory):
    path = directory / "pytorch_model.bin"
    grow = lambda name, content: content + bytes(10**7 * name.endswith("data.pkl"))  # noqa: E731
    rewritten(path, grow, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    assert "holds compressed entries, which PyTorch never writes" in refusal(path)


def test_a_tensor_that_claims_more_bytes_than_the_file_has_is_refused(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"x": torch.ones(300, 7)}, path)

    def claim(name, content):
        if not name.endswith("data.pkl"):
            return content
        number = lambda value: b"J" + struct.pack("<i", value)  # noqa: E731  BININT
        small, rows = b"M" + struct.pack("<H", 2100), b"M" + struct.pack("<H", 300)  # BININT2
        assert content.count(small) == content.count(rows) == 1
        return content.replace(small, number(7 * 2**27)).replace(rows, number(2**27))

    rewritten(path, claim)
    assert "is truncated, corrupt, or no file of tensors" in refusal(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_pipe_a_folder_and_a_device_are_not_opened(make, tmp_path):
    make(tmp_path / "pytorch_model.bin")
    assert "is missing, or is no regular file" in refusal(tmp_path / "pytorch_model.bin")


@settings(max_examples=60)
@given(data=st.data())
def test_a_file_changed_anywhere_is_a_dictionary_of_plain_tensors_or_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("changed") / "x.bin"
    torch.save(
        {"a": torch.ones(3), "b": torch.ones(2, 2)},
        path,
        _use_new_zipfile_serialization=data.draw(st.booleans()),
    )
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        tensors = read_pickled_tensors(path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and str(error).isprintable()
        return
    assert all(type(tensor) is torch.Tensor and tensor.device.type == "cpu" for tensor in tensors.values())


def test_a_pytorch_with_a_known_way_out_of_the_loader_reads_no_pickles(directory, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.9.1"))
    assert "CVE-2026-24747): install PyTorch 2.10 or newer" in refusal(directory / "pytorch_model.bin")


def test_the_index_of_pickled_shards_names_no_file_elsewhere_and_none_of_another_kind(directory):
    (directory / "pytorch_model.bin").unlink()
    index = directory / "pytorch_model.bin.index.json"
    for file in ("../x.bin", "/etc/x.bin", "x.safetensors", ".bin", "x.pt", 3):
        index.write_text(json.dumps({"weight_map": {"x": file}}))
        with pytest.raises(UserError, match="is not a pickled index: x must lie in a file such as .*2.bin"):
            load_model(directory)
    index.write_text(json.dumps({"weight_map": {"x": "gone.bin"}}))
    with pytest.raises(UserError, match="lacks gone.bin, which pytorch_model.bin.index.json names"):
        load_model(directory)


# ---- conversion ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_a_converted_model_holds_the_same_tensors_and_the_files_around_them(
    call, tmp_path, model_dir, zipped
):
    make_base(tmp_path / "old", model_dir, torch.bfloat16)
    expected = load_file(tmp_path / "old" / "model.safetensors")
    pickled(tmp_path / "old", _use_new_zipfile_serialization=zipped)
    (tmp_path / "old" / "modeling_evil.py").write_text("raise SystemExit")
    (tmp_path / "old" / "LICENSE").write_text("free")
    code, out, err = call("convert", "--model", tmp_path / "old", "--output", tmp_path / "new")
    assert code == 0, err
    new = load_file(tmp_path / "new" / "model.safetensors")
    assert new.keys() == expected.keys()
    assert all(torch.equal(new[name], expected[name]) and new[name].dtype == torch.bfloat16 for name in new)
    assert {path.name for path in (tmp_path / "new").iterdir()} == set(
        "config.json generation_config.json tokenizer.model LICENSE model.safetensors".split()
    )
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float32)
    assert all(torch.equal(tensor, expected[name].float()) for name, tensor in theirs.state_dict().items())


def test_a_converted_model_in_shards_has_an_index(call, tmp_path, directory, monkeypatch):
    monkeypatch.setattr("minilora.formats.weights.SHARD_BYTES", 10_000)
    assert call("convert", "--model", directory, "--output", tmp_path / "new")[0] == 0
    assert (tmp_path / "new" / "model.safetensors.index.json").exists()
    assert torch.equal(load_model(tmp_path / "new")(ids(1, 9)), tiny_model()(ids(1, 9)))


def test_a_converted_adapter_is_read_by_peft(call, tmp_path, place):
    peft = pytest.importorskip("peft")
    import transformers

    file = place / "adapter" / "adapter_model.safetensors"
    expected = load_file(file)
    torch.save(expected, place / "adapter" / "adapter_model.bin")
    file.unlink()
    code, _, err = call("convert", "--model", place / "adapter", "--output", place / "new")
    assert code == 0, err
    new = load_file(place / "new" / "adapter_model.safetensors")
    assert new.keys() == expected.keys() and all(torch.equal(new[name], expected[name]) for name in new)
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "base")
    state = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(base, place / "new"))
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_conversion_that_fails_leaves_nothing(call, tmp_path, directory):
    weight_map = {"a": "one.bin", "b": "two.bin"}
    (directory / "pytorch_model.bin").unlink()
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    torch.save({"a": torch.ones(2)}, directory / "one.bin")
    torch.save({"b": torch.ones(2), "evil": Call(os.system, "true")}, directory / "two.bin")
    code, _, err = call("convert", "--model", directory, "--output", tmp_path / "new")
    assert code == 2 and "posix.system" in err and not (tmp_path / "new").exists()
    torch.save({"a": torch.ones(2)}, directory / "two.bin")
    code, _, err = call("convert", "--model", directory, "--output", tmp_path / "new")
    assert code == 2 and "two.bin lacks b" in err and not (tmp_path / "new").exists()
    torch.save({"a": torch.ones(2), "b": torch.ones(2)}, directory / "two.bin")
    code, _, err = call("convert", "--model", directory, "--output", tmp_path / "new")
    assert code == 2 and "two.bin holds a, which another file holds too" in err
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_model_in_safetensors_is_not_converted(call, tmp_path, model_dir):
    code, _, err = call("convert", "--model", model_dir, "--output", tmp_path / "new")
    assert code == 2 and "nothing to convert" in err and not (tmp_path / "new").exists()
