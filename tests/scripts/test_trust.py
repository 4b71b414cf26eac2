"""What strangers' files and the user's own slips may not do: leak a secret, open a connection, replace an input."""

import json
import os
import re
import shutil
import stat
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import yaml
from support.project import WORDS
from support.servers import serving

from minilora.run.model_card import as_markdown
from minilora.system import remote

SECRET = "QQSECRETQQ"


@pytest.fixture
def server(examples):
    """A web server that gives the examples to whoever knows the password; its address, password included."""
    body = "".join(json.dumps(example) + "\n" for example in examples).encode()

    class Rows(BaseHTTPRequestHandler):
        def do_GET(self):
            known = "Authorization" in self.headers and SECRET in self.path
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(body if known else b"")

        def log_message(self, *_):
            pass

    with serving(Rows) as rows:
        host = rows.address.removeprefix("http://")
        yield f"http://me:{SECRET}@{host}/rows.jsonl?X-Amz-Signature={SECRET}"


@pytest.fixture
def no_connection(monkeypatch):
    """Any attempt to open an address, or to ask the hub, fails the test."""
    for name in ("_open", "_opener"):
        monkeypatch.setattr(remote, name, lambda *_: pytest.fail("an address was opened"))
    monkeypatch.setattr("minilora.system.hub._download", lambda *_: pytest.fail("the hub was asked"))


def files_with(secret: str, directory: Path) -> list[str]:
    """The files below a directory that contain a text."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [path.name for path in files if secret.encode() in path.read_bytes()]


# ---- secrets ---------------------------------------------------------------------------------------------------


def test_a_password_in_the_address_of_the_data_reads_it_and_is_written_nowhere(
    call, train, server, model_dir, dataset, tmp_path
):
    directory, out = train(dataset=server, val_size=4, save_steps=2)
    assert SECRET not in out
    resumed, _ = train(dataset=server, val_size=4, save_steps=2, max_steps=4, resume_from_checkpoint="latest")
    assert resumed == directory
    shared = ("--model", model_dir, "--bf16", "false")
    for name, *arguments in (
        ("prepare", "--model", model_dir, "--dataset", server, "--output", tmp_path / "prepared"),
        ("evaluate", *shared, "--dataset", server, "--output", tmp_path / "result.json"),
        ("compare", directory, "--output", tmp_path / "compare.png"),
    ):
        code, out, err = call(name, *arguments)
        assert code == 0 and SECRET not in out + err, (name, err)
    assert files_with("rows.jsonl", tmp_path) and not files_with(SECRET, tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_settings_with_an_address_are_for_their_owners_eyes(train, server, umask):
    before = os.umask(umask)
    try:
        directory, _ = train(dataset=server)
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / "training_config.yaml").stat().st_mode) == 0o600
    assert stat.S_IMODE((directory / "metrics.jsonl").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("train", ["--dataset", "http://127.0.0.1:9/{secret}"]),
        ("train", ["--model", "s3://key:{secret}@bucket/model"]),
        ("train", ["--model", "https://{secret}@host/model"]),
        ("train", ["--dataset", "a.jsonl:0.5,https://me:{secret}@127.0.0.1:9/b.jsonl;token={secret}"]),
        ("train", ["--no_such_key", "https://me:{secret}@host/"]),
        ("train", ["https://me:{secret}@host/"]),
        ("train", ["--mlflow_tracking_uri", "https://me:{secret}@host", "--report_to", "mlflow"]),
        ("prepare", ["--dataset", "https://127.0.0.1:9/a.jsonl?sig={secret}"]),
        ("prepare", ["--to", "https://{secret}@host/a"]),
        ("evaluate", ["--dataset", "https://127.0.0.1:9/a.jsonl#access_token={secret}"]),
        ("evaluate", ["--adapter", "one=https://me:{secret}@127.0.0.1:9/a"]),
        ("chat", ["--input", "https://me:{secret}@127.0.0.1:9/a.jsonl", "--output", "x.jsonl"]),
        ("merge", ["--adapter", "https://me:{secret}@127.0.0.1:9/a", "--output", "merged"]),
        ("merge", ["--adapter", "https://me:{secret}@127.0.0.1:9/a"]),
        ("share", ["--adapter", "assets/base", "--upload", "s3://key:{secret}@bucket/a"]),
        ("lint_adapter", ["https://me:{secret}@127.0.0.1:9/a"]),
        ("memory", ["--model", "https://me:{secret}@127.0.0.1:9/a"]),
    ],
)
def test_no_mistake_about_an_address_repeats_its_secret(call, name, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    code, out, err = call(name, *(word.format(secret=SECRET) for word in arguments))
    if arguments[-1].endswith("/{secret}"):  # a path is no secret
        assert SECRET in err
    else:
        assert SECRET not in out + err
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert not files_with(SECRET, tmp_path)


def test_a_sweep_refuses_to_copy_a_secret_into_the_files_of_its_runs(call, tmp_path):
    settings = dict(dataset=f"https://me:{SECRET}@host/a.jsonl", output_dir=str(tmp_path / "out"))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings | {"sweep": {"lora_rank": [1, 2]}}))
    code, out, err = call("sweep", "--config", tmp_path / "sweep.yaml")
    assert code == 2 and "dataset holds a password" in err and SECRET not in out + err
    assert not (tmp_path / "out").exists()


# ---- connections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base", ["https://host/model", "s3://bucket/model", "reference::https://host/x", "file:///etc"]
)
@pytest.mark.parametrize("name", ["merge", "chat", "evaluate"])
def test_an_adapter_does_not_choose_where_this_machine_connects(
    call, no_connection, adapters, dataset, tmp_path, name, base
):
    adapter = shutil.copytree(adapters / "one", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    arguments = {
        "merge": ["--output", tmp_path / "merged"],
        "chat": ["--instruction", "hello"],
        "evaluate": ["--dataset", dataset],
    }
    code, _, err = call(name, "--adapter", adapter, *arguments[name])
    assert code == 2 and base in err and "--model" in err and err.count("\n") == 1
    assert not (tmp_path / "merged").exists()


def test_neither_do_the_settings_beside_an_adapter(call, no_connection, adapters, model_dir, tmp_path):
    adapter = shutil.copytree(adapters / "one", tmp_path / "adapter")
    settings = {"eval_dataset": "https://host/rows.jsonl", "model_name_or_path": "s3://bucket/model"}
    (adapter / "training_config.yaml").write_text(yaml.safe_dump(settings))
    code, _, err = call("evaluate", "--adapter", adapter, "--model", model_dir)
    assert code == 2 and "https://host/rows.jsonl" in err and "--dataset" in err and err.count("\n") == 1


def test_nor_does_a_list_of_datasets(call, no_connection, model_dir, tmp_path):
    entry = {"riddles": {"hf_hub_url": "https://host/rows.jsonl"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(entry))
    keys = (
        "--stage",
        "sft",
        "--dataset_dir",
        tmp_path,
        "--dataset",
        "riddles",
        "--output_dir",
        tmp_path / "out",
    )
    code, _, err = call("train", "--model", model_dir, *keys)
    assert code == 2 and "https://host/rows.jsonl" in err and "--dataset" in err and err.count("\n") == 1


# ---- outputs over inputs, and empty values ---------------------------------------------------------------------


@pytest.fixture
def own(model_dir, adapters, dataset, tmp_path):
    """A model, an adapter, rows and a run of one's own, which a slip could replace."""
    shutil.copytree(model_dir, tmp_path / "model")
    shutil.copytree(adapters / "one", tmp_path / "adapter")
    shutil.copy(dataset, tmp_path / "rows.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.jsonl")
    os.link(tmp_path / "rows.jsonl", tmp_path / "hard.jsonl")
    (tmp_path / "prepared").mkdir()
    shutil.copy(dataset, tmp_path / "prepared" / "train.jsonl")
    (tmp_path / "run").mkdir()
    shutil.copy(dataset, tmp_path / "run" / "metrics.jsonl")
    return tmp_path


SLIPS = {
    "evaluate onto its dataset": "evaluate --model model --dataset rows.jsonl --output rows.jsonl",
    "evaluate onto its dataset, by a link": "evaluate --model model --dataset rows.jsonl --output link.jsonl",
    "evaluate onto its dataset, by a second name": "evaluate --model model --dataset rows.jsonl:1.0 --output hard.jsonl",
    "evaluate onto the model": "evaluate --model model --dataset rows.jsonl --output model/config.json",
    "evaluate onto the adapter": "evaluate --model model --adapter adapter --dataset rows.jsonl --output adapter/adapter_config.json",
    "chat onto its questions": "chat --model model --input rows.jsonl --output ./rows.jsonl",
    "chat onto the weights": "chat --model model --input rows.jsonl --output model/model.safetensors",
    "compare onto the metrics": "compare run --output run/metrics.jsonl",
    "memory onto the configuration": "memory --model model --picture model/config.json",
    "train into the model": "train --model model --dataset rows.jsonl --output_dir model",
    "train into the model, overwriting": "train --model model --dataset rows.jsonl --output_dir ./model/../model --overwrite_output_dir",
    "train onto its rows": "train --model model --dataset run/metrics.jsonl --output_dir run --overwrite_output_dir",
    "prepare onto its source": "prepare --model model --dataset prepared/train.jsonl --output prepared --overwrite_output_dir",
    "prepare into the model": "prepare --model model --dataset rows.jsonl --output model",
    "merge onto the base": "merge --model model --adapter adapter --output model",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_no_output_replaces_an_input(call, own, monkeypatch, slip):
    monkeypatch.chdir(own)
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    code, _, err = call(*SLIPS[slip].split())
    assert code == 2 and re.fullmatch(r"error: .*(would overwrite|output model exists|PNG files).*\n", err)
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--model", ""), ("train", "--output_dir", ""), ("train", "--dataset="), ("train", "--run_name", " "),
        ("prepare", "--output", ""), ("prepare", "--dataset", ""), ("evaluate", "--model="), ("evaluate", "--adapter", ""),
        ("chat", "--instruction", ""), ("merge", "--adapter", "", "--output", "x"), ("merge", "--adapter", "x", "--output", ""),
        ("memory", "--picture", ""), ("compare", ""), ("share", "--adapter", "x", "--upload", ""), ("sweep", "--config", ""),
        ("lint_adapter", ""), ("lint_adapter", "x", "--model", ""), ("train_together", ""),
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_empty_value_is_a_mistake_and_not_the_default(call, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert code == 2 and "empty" in err and err.count("\n") == 1 and out == ""
    assert not list(tmp_path.iterdir())


# ---- the model card --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quoted", ["a|b", "<img src=x onerror=y>", "[here](https://host)", "`x`", "a\n# b\n---", "**b**"]
)
def test_the_model_card_escapes_what_it_quotes(quoted):
    shown = as_markdown(quoted)
    assert "\n" not in shown
    assert not any(c in shown.replace("\\" + c, "") for c in "|<>[]`*")


def test_the_model_card_names_plain_things_plainly():
    for name in ("mistralai/Mistral-7B-v0.1", "q_proj, k_proj", "0.9123 (step 40)", " ".join(WORDS)):
        assert as_markdown(name) == name
