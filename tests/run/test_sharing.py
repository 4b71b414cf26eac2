"""Results reach S3 and the hub complete and without secrets, and can be read back; no failure costs a run."""

import base64
import hashlib
import json
import os
import shutil
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save_file
from support.project import adapter
from support.servers import S3_SECRET, serving

from minilora import UserError
from minilora.data.readers import read_records
from minilora.run.sharing import RemoteFolder, files_to_share, make_destinations
from minilora.system import remote
from minilora.system.hub import push_files, resolve_model
from minilora.system.locks import locked
from minilora.system.remote import fetch_folder, read_file, write_files

SHARED = {
    *(
        "adapter_config.json adapter_model.safetensors tokenizer.model training_config.yaml metrics.jsonl".split()
    ),
    *("loss.png training.png README.md".split()),
}
TOKEN = "hf_secretsecretsecret"


# ---- S3 --------------------------------------------------------------------------------------------------------------------


def test_files_written_to_s3_are_read_back(s3):
    write_files("s3://bucket/data", {"a.jsonl": b'{"text": "a"}\n', "b.bin": bytes(range(256)) * 50_000})
    assert s3() == ["data/a.jsonl", "data/b.bin"]
    assert read_records("s3://bucket/data/a.jsonl") == [("s3://bucket/data/a.jsonl, line 1", {"text": "a"})]
    assert read_file("s3://bucket/data/b.bin") == bytes(range(256)) * 50_000


def test_a_folder_is_fetched_once_and_again_only_after_a_change(s3, monkeypatch):
    write_files("s3://bucket/run/", {"a.json": b"1", "b.json": b"2", "c.png": b"3", "bad.json": b"4"})
    write_files("s3://bucket/run/below", {"d.json": b"5"})
    first = fetch_folder("s3://bucket/run", ["*.json"], ["bad*"])
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {"a.json": b"1", "b.json": b"2"}
    with monkeypatch.context() as patch:
        patch.setattr(remote.tempfile, "mkdtemp", lambda **_: pytest.fail("it is fetched again"))
        assert fetch_folder("s3://bucket/run", ["*.json"], ["bad*"]) == first
    write_files("s3://bucket/run", {"b.json": b"two"})
    assert (fetch_folder("s3://bucket/run", ["*.json"], ["bad*"]) / "b.json").read_bytes() == b"two"


def test_a_fetch_that_is_cut_short_leaves_no_folder(monkeypatch, tmp_path):
    class Store:
        whole = False

        def ls(self, folder, detail):
            return [{"name": f"{folder}/{name}", "type": "file", "size": 1} for name in ("a.json", "b.json")]

        def get_file(self, source, target):
            if source.endswith("b.json") and not self.whole:
                raise OSError(5, "cut")
            Path(target).write_bytes(b"1")

    store = Store()
    monkeypatch.setattr(remote, "_open", lambda address: (store, "bucket/run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="s3://bucket/run cannot be read: cut"):
        fetch_folder("s3://bucket/run", ["*"], [])
    assert list((tmp_path / "minilora").iterdir()) == []
    store.whole = True
    assert {path.name for path in fetch_folder("s3://bucket/run", ["*"], []).iterdir()} == {
        "a.json",
        "b.json",
    }


def test_what_a_killed_download_left_is_removed_and_one_that_runs_or_begins_is_not(s3, tmp_path):
    write_files("s3://bucket/run", {"a.json": b"1"})
    copy = fetch_folder("s3://bucket/run", ["*.json"], [])
    killed, running, beginning = (
        copy.with_name(f"{copy.name}.{name}") for name in ("killed", "runs", "begins")
    )
    long_ago = time.time() - 3600
    for part in (killed, running, beginning):
        (part / "files").mkdir(parents=True)
        (part / "files" / "a.json").write_bytes(b"half")
    with locked("the cache", running):
        for path in (*killed.rglob("*"), killed, *running.rglob("*"), running):
            os.utime(path, (long_ago, long_ago))
        shutil.rmtree(copy)
        assert fetch_folder("s3://bucket/run", ["*.json"], []) == copy
        assert not killed.exists() and running.is_dir() and beginning.is_dir()
    assert [path.name for path in copy.iterdir()] == ["a.json"]


def test_two_processes_may_fetch_the_same_folder_at_once(s3, monkeypatch):
    write_files("s3://bucket/run", {"a.json": b"1"})
    first = None

    class Slow:  # while it reads, another process makes the copy
        def __init__(self, system):
            self.system = system

        def __getattr__(self, name):
            return getattr(self.system, name)

        def get_file(self, source, target):
            nonlocal first
            monkeypatch.setattr(remote, "_open", open_)
            first = fetch_folder("s3://bucket/run", ["*.json"], [])
            self.system.get_file(source, target)

    open_ = remote._open
    monkeypatch.setattr(remote, "_open", lambda address: (Slow(open_(address)[0]), open_(address)[1]))
    second = fetch_folder("s3://bucket/run", ["*.json"], [])
    assert first == second and (second / "a.json").read_bytes() == b"1"
    assert [path.name for path in second.parent.iterdir()] == [second.name]


def test_a_run_is_uploaded_and_the_adapter_is_used_from_there(train, s3, model_dir, dataset):
    directory, out = train(max_steps=3, val_size=4, save_steps=2, upload="s3://bucket/run")
    assert set(s3()) == {f"run/{name}" for name in SHARED} and out.rstrip().endswith(
        "sent to s3://bucket/run"
    )
    for name in SHARED - {"training_config.yaml"}:
        assert read_file(f"s3://bucket/run/{name}") == (directory / name).read_bytes(), name
    copy = resolve_model("s3://bucket/run")
    one, other = adapter(directory), adapter(copy)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_every_save_is_uploaded_with_its_own_adapter(train, s3, monkeypatch):
    sent = {}

    def send(self, files, message):
        sent[message] = dict(files)
        return self.address

    monkeypatch.setattr(RemoteFolder, "send", send)
    directory, _ = train(max_steps=5, save_steps=2, upload="s3://bucket/run", hub_strategy="every_save")
    assert list(sent) == ["Begin training", "Step 2 of 5", "Step 4 of 5", "Trained for 5 steps"]
    assert set(sent["Begin training"]) == {"training_config.yaml"}
    assert (
        sent["Step 2 of 5"]["adapter_model.safetensors"]
        == directory / "checkpoint-2" / "adapter_model.safetensors"
    )
    assert SHARED - {"training.png"} <= set(sent["Step 2 of 5"])


def test_a_missing_bucket_is_reported_before_anything_is_done(train, s3):
    directory, err = train(code=2, upload="s3://another-bucket/run")
    assert (
        err == "error: s3://another-bucket/run cannot be written: it does not exist\n"
        and not directory.exists()
    )


def test_a_failed_upload_costs_only_a_warning_and_exit_code_2_at_the_end(train, s3, monkeypatch):
    write, calls = remote.write_files, []

    def fail_later(address, files):
        calls.append(address)
        if len(calls) > 1:
            raise UserError(f"{address} cannot be written: the server cannot be reached")
        write(address, files)

    monkeypatch.setattr("minilora.run.sharing.write_files", fail_later)
    directory, err = train(
        code=2, max_steps=4, save_steps=2, upload="s3://bucket/run", hub_strategy="every_save"
    )
    assert len(calls) == 4  # the beginning, two saves, the end
    assert err == (
        f"error: s3://bucket/run cannot be written: the server cannot be reached; all is in {directory}, "
        "and scripts/share.py sends it again\n"
    )
    assert {path.name for path in directory.iterdir()} == SHARED | {"checkpoint-2", "checkpoint-4"}


def broken(name):
    """Functions that damage one file of an adapter."""

    def write_nan(path):
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[3] = float("nan")
        save_file(tensors, path)

    return {
        "missing": lambda path: path.unlink(),
        "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "empty": lambda path: path.write_bytes(b""),
        "a directory": lambda path: (path.unlink(), path.mkdir()),
        "without one half": lambda path: save_file(dict(list(load_file(path).items())[1:]), path),
        "NaN": write_nan,
    }[name]


@pytest.mark.parametrize(
    "damage, said",
    [
        ("missing", "has no adapter_model.safetensors"),
        ("cut short", "truncated or corrupt"),
        ("empty", "truncated or corrupt"),
        ("a directory", "has no adapter_model.safetensors"),
        ("without one half", "is not a sound adapter: missing "),
        ("NaN", "is infinite or NaN in places"),
    ],
)
def test_share_refuses_an_adapter_that_is_not_whole_before_it_connects(
    adapters, tmp_path, call, monkeypatch, damage, said
):
    for destination in ("push_files", "write_files"):
        monkeypatch.setattr(f"minilora.run.sharing.{destination}", lambda *_: pytest.fail("it connects"))
    shutil.copytree(adapters / "one", tmp_path / "one")
    broken(damage)(tmp_path / "one" / "adapter_model.safetensors")
    for destination in (("--push_to_hub", "me/adapter"), ("--upload", "s3://bucket/x")):
        code, out, err = call("share", "--adapter", tmp_path / "one", *destination)
        assert code == 2 and said in err and err.count("\n") == 1 and not out


def test_share_sends_the_results_of_a_finished_run(train, s3, call):
    directory, _ = train(max_steps=1)
    assert call("share", "--adapter", directory, "--upload", "s3://bucket/later") == (
        0,
        "sent to s3://bucket/later\n",
        "",
    )
    assert set(s3()) == {f"later/{name}" for name in SHARED}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapter", "nowhere", "--upload", "s3://bucket/x"], "nowhere"),
        (["--adapter", "."], "adapter_config.json"),
        (["--adapter", "{run}"], "nowhere to send it to"),
        (
            ["--adapter", "{run}", "--upload", "bucket"],
            "upload = 'bucket' is no address; write it as s3://bucket/folder",
        ),
        (
            ["--adapter", "{run}", "--upload", "s3://me:hidden@bucket/x"],
            "upload = s3://bucket/x holds a password",
        ),
        (
            ["--adapter", "{run}", "--upload", "mars://bucket/x"],
            "mars://bucket/x: mars:// is not supported; supported: https, http, s3",
        ),
    ],
)
def test_mistakes_in_sharing_are_one_line_and_exit_2(train, call, monkeypatch, tmp_path, arguments, said):
    directory, _ = train(max_steps=1)
    monkeypatch.chdir(tmp_path)
    code, _, err = call("share", *(word.format(run=directory) for word in arguments))
    assert code == 2 and said in err and err.count("\n") == 1 and "hidden" not in err


def test_missing_credentials_are_reported_with_the_fix(s3, monkeypatch):
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(
        UserError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`"
    ):
        write_files("s3://bucket/x", {"a": b""})


names = st.text("abc-_.", min_size=1, max_size=8)
secrets = st.text("ABC019", min_size=6, max_size=12)


@given(name=names, secret=secrets)
def test_settings_are_sent_without_the_secrets_in_their_addresses(tmp_path_factory, name, secret):
    directory = tmp_path_factory.mktemp("run")
    address = f"https://me:{secret}@host/{name}.jsonl?sig={secret}"
    (directory / "training_config.yaml").write_text(yaml.safe_dump({"dataset": address, "seed": 1}))
    sent = files_to_share(directory)["training_config.yaml"].decode()
    assert secret not in sent and yaml.safe_load(sent) == {"dataset": f"https://host/{name}.jsonl", "seed": 1}


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "README.md", "metrics.jsonl", "training_config.yaml"]
)
def test_texts_that_others_wrote_are_sent_without_secrets_and_stay_as_they_are_here(tmp_path, name):
    text = "base: https://me:QQSECRETQQ@host/model?sig=QQSECRETQQ and a name: caf\udce9"
    (tmp_path / name).write_text(text, errors="surrogateescape")
    sent = files_to_share(tmp_path)[name]
    assert sent == b"base: https://host/model and a name: caf\xe9"
    assert "QQSECRETQQ" in (tmp_path / name).read_text(errors="surrogateescape")
    (tmp_path / name).write_text("base: owner/name")
    assert files_to_share(tmp_path)[name] == tmp_path / name


# ---- the hub ---------------------------------------------------------------------------------------------------------------


class StandIn(BaseHTTPRequestHandler):
    """The hub's answers to a client that creates a repository and a commit.

    Text files arrive in the commit, other files as LFS objects.
    """

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server, path = self.server, self.path
        server.authorizations.add(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            request = json.loads(body)
            name = f"{request.get('organization') or 'me'}/{request['name']}"
            if name.startswith("others/"):
                return self.answer(403, {"error": "Forbidden: you may not create models under others"})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid credentials in Authorization header"})
            known = name in server.repositories
            server.repositories.setdefault(
                name, {"visibility": request.get("visibility"), "files": {}, "commits": []}
            )
            return self.answer(409 if known else 200, {"url": f"{server.address}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            for file in files:
                file["uploadMode"] = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
            return self.answer(200, {"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{server.address}/lfs/{item['oid']}", "header": {}}}
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            repository = server.repositories["/".join(path.split("/")[3:5])]
            if server.broken:
                return self.answer(500, {"error": "out of order"})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    repository["commits"].append(value["summary"])
                elif line["key"] == "file":
                    repository["files"][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository["files"][value["path"]] = server.objects[value["oid"]]
            oid = "a" * 40
            return self.answer(
                200,
                {
                    "commitOid": oid,
                    "commitUrl": f"{server.address}/{path.split('/', 3)[3][:-12]}/commit/{oid}",
                },
            )
        return self.answer(404, {"error": f"no such page: {path}"})

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[hashlib.sha256(data).hexdigest()] = data
        self.answer(200, {})

    def do_GET(self):
        self.answer(404, {"error": "nothing is read here"})

    do_HEAD = do_GET

    def answer(self, status: int, body: dict):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with serving(StandIn) as server:
        yield server


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """An empty hub with a logged-in user."""
    from huggingface_hub import constants

    server.repositories, server.objects, server.authorizations, server.broken = {}, {}, set(), False
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return server


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own business
def test_a_run_is_pushed_to_a_repository_that_it_creates(train, hub):
    directory, out = train(max_steps=3, val_size=4, push_to_hub="me/adapter", hub_private_repo=True)
    repository = hub.repositories["me/adapter"]
    assert repository["visibility"] == "private" and repository["commits"] == [
        "Begin training",
        "Trained for 3 steps",
    ]
    assert set(repository["files"]) == SHARED and f"sent to {hub.address}/me/adapter" in out
    assert repository["files"]["metrics.jsonl"] == (directory / "metrics.jsonl").read_bytes()
    theirs, ours = load(repository["files"]["adapter_model.safetensors"]), adapter(directory)
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    card = repository["files"]["README.md"].decode()
    assert (
        "'me/adapter')" in card and "base_model:" not in card
    )  # the base is a folder here, which the hub cannot link to
    everything = out + "".join(path.read_text() for path in directory.glob("*.yaml"))
    assert TOKEN not in everything and hub.authorizations <= {f"Bearer {TOKEN}", None}


def test_an_existing_repository_gets_another_commit(hub):
    for message in ("one", "two"):
        assert push_files("me/adapter", {"a.txt": message.encode()}, message) == f"{hub.address}/me/adapter"
    assert hub.repositories["me/adapter"] == {
        "visibility": None,
        "files": {"a.txt": b"two"},
        "commits": ["one", "two"],
    }


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("others/adapter", TOKEN, "answers 403: the token may not do this; use one that has write access"),
        (
            "me/adapter",
            "hf_anothersecret",
            "answers 401: the token is not accepted; log in with `hf auth login`",
        ),
        ("me/adapter", "", "me/adapter cannot be written: "),
        (
            "two words",
            TOKEN,
            "'two words' cannot be the name of a repository on the hub, which is owner/name",
        ),
    ],
)
def test_a_missing_permission_to_push_is_reported_before_the_training(
    train, hub, monkeypatch, name, token, said
):
    monkeypatch.setenv("HF_TOKEN", token)
    directory, err = train(code=2, push_to_hub=name)
    assert said in err and err.count("\n") == 1 and "secret" not in err and not directory.exists()


def test_a_hub_that_fails_or_is_out_of_reach_is_reported(hub, monkeypatch):
    from huggingface_hub import constants

    hub.broken = True
    with pytest.raises(UserError, match="me/adapter cannot be written: .* answers 500: try again later"):
        push_files("me/adapter", {"a.txt": b""}, "x")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached .*check the network"):
        push_files("me/adapter", {"a.txt": b""}, "x")


def test_nothing_is_pushed_offline_and_the_message_says_why(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match="me/adapter cannot be written: HF_HUB_OFFLINE keeps this from the network; unset it"
    ):
        push_files("me/adapter", {"a.txt": b""}, "x")


def test_all_destinations_are_tried_even_if_one_fails(hub, s3, train, call):
    directory, _ = train(max_steps=1)
    code, out, err = call(
        "share", "--adapter", directory, "--push_to_hub", "others/adapter", "--upload", "s3://bucket/x"
    )
    assert code == 2 and out == "sent to s3://bucket/x\n" and "others/adapter cannot be written" in err
    assert S3_SECRET not in out + err


def test_nothing_is_sent_if_no_destination_is_named():
    assert make_destinations(None, False, None) == []


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_the_reason_is_reported_if_a_large_file_fails(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(StandIn, "do_PUT", lambda self: self.answer(403, {"error": "Forbidden"}))
    (tmp_path / "a.safetensors").write_bytes(b"1")
    with pytest.raises(
        UserError, match="me/adapter cannot be written: .* answers 403: the token may not do this"
    ):
        push_files("me/adapter", {"a.safetensors": tmp_path / "a.safetensors"}, "x")
