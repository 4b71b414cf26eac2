"""The hub's real client against a stand-in on loopback: its requests, and the messages when it fails."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

import pytest
from support.servers import serving

from minilora import UserError
from minilora.system.hub import resolve_model

constants = pytest.importorskip("huggingface_hub.constants", reason="the hub's client")

TOKEN = "hf_secretsecretsecret"
MAIN, OLD = "a" * 40, "b" * 40  # commits
READ = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": b"{}",
    "model-00001-of-00002.safetensors": b"first half",
    "model-00002-of-00002.safetensors": b"second half",
}
NOT_READ = {
    "consolidated.safetensors": b"the same again",
    "consolidated.00.pth": b"pickle",
    "original/model.safetensors": b"the same again",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "pytorch_model.bin": b"pickle",
    "pytorch_model.bin.index.json": b"{}",
    "rust_model.ot": b"pickle",
    "tf_model.h5": b"h5",
    "tekken.json": b"{}",
    "modeling_evil.py": b"raise SystemExit",
    "README.md": b"# model",
}
ADAPTER = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"A and B",
    "adapter_model.bin": b"pickle",
}
PICKLED = {
    "config.json": b"{}",
    "pytorch_model.bin.index.json": b"{}",
    "pytorch_model-00001-of-00002.bin": b"pickle",
    "pytorch_model-00002-of-00002.bin": b"pickle",
}
REPOSITORIES = {
    "owner/model": {MAIN: READ | NOT_READ, OLD: {"config.json": b"{}", "model.safetensors": b"older"}},
    "owner/adapter": {MAIN: ADAPTER},
    "owner/pickled": {MAIN: PICKLED | {"consolidated.00.pth": b"pickle", "training_args.bin": b"pickle"}},
    "owner/gguf": {MAIN: {"config.json": b"{}", "model-Q4_K_M.gguf": b"GGUF"}},
    "owner/folders": {
        MAIN: {"config.json": b"{}", "model.safetensors": b"at the top"}
        | {f"runs/one/{name}": data for name, data in ADAPTER.items()}
        | {"runs/one/deeper/adapter_config.json": b"{}", "runs/two/README.md": b"no model"}
    },
    "owner/gated": {MAIN: READ},
    "owner/mistaken-token": {},
    "owner/broken": {},
}
BRANCHES = {"main": MAIN, "v0": OLD, MAIN: MAIN, OLD: OLD}


class StandIn(BaseHTTPRequestHandler):
    """Answers snapshot_download's requests: a revision's commit, its list of files, each file (HEAD, GET)."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/").split("/")
        self.server.requests.append((self.command, "/".join(path), self.headers.get("Authorization")))
        api, path = path[:2] == ["api", "models"], path[2:] if path[:2] == ["api", "models"] else path
        repo_id, action, revision, file = "/".join(path[:2]), *(path[2:4] + ["", ""])[:2], "/".join(path[4:])
        commit = BRANCHES.get(revision)
        if repo_id not in REPOSITORIES:
            return self.answer(404, error="RepoNotFound")
        if repo_id == "owner/mistaken-token":
            return self.answer(401, message="Invalid credentials in Authorization header")
        if repo_id == "owner/broken":
            return self.answer(500)
        if commit not in REPOSITORIES[repo_id]:
            return self.answer(404, error="RevisionNotFound")
        files = REPOSITORIES[repo_id][commit]
        if api and action == "revision":
            return self.answer(200, json.dumps({"id": repo_id, "sha": commit, "siblings": []}).encode())
        if api and action == "tree":
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": etag(data)}
                for name, data in files.items()
            ]
            return self.answer(200, json.dumps(listing).encode())
        if action != "resolve" or file not in files:
            return self.answer(404, error="EntryNotFound")
        if repo_id == "owner/gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(403, error="GatedRepo")
        return self.answer(200, files[file], ETag=f'"{etag(files[file])}"', X_Repo_Commit=commit)

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes = b"", error: str = "", message: str = "", **headers: str):
        self.send_response(status)
        headers |= {"X-Error-Code": error} if error else {}
        headers |= {"X-Error-Message": message} if message else {}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def server():
    with serving(StandIn) as server:
        yield server


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The stand-in, with the client pointed at it and at an empty cache.

    The client reads its environment on import, so the fixture sets its constants.
    """
    server.requests = []
    point_to(monkeypatch, server.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return server


def point_to(monkeypatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )


def files_in(directory) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def refusal(*args, **kwargs) -> str:
    """The message of the UserError: one line, without the token."""
    with pytest.raises(UserError) as error:
        resolve_model(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and TOKEN not in message
    return message


# Local directories


def test_a_local_directory_is_returned_even_if_it_looks_like_a_hub_id(hub, tmp_path, monkeypatch):
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model("owner/model").samefile(tmp_path / "owner" / "model")
    assert resolve_model("~/owner") == tmp_path / "owner"
    assert hub.requests == []


@pytest.mark.parametrize(
    "path",
    [
        "./nope",
        "../nope",
        "/nope",
        "~/nope",
        "a\\b",
        "a/b/../c",
        "a/b/c*",
        "a/b/",
        "nope--nope",
        "two words",
        "x.git",
        "",
    ],
)
def test_a_path_that_does_not_exist_is_no_such_directory_and_makes_no_request(hub, path):
    assert refusal(path).startswith(f"no such directory: {path!r}")
    assert hub.requests == []


def test_a_file_is_refused_and_its_directory_suggested(hub, tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert f"is a file; use its directory instead: {tmp_path}" in refusal(str(tmp_path / "model.safetensors"))
    assert hub.requests == []


# Downloads


def test_only_files_that_minilora_reads_are_downloaded(hub):
    assert files_in(resolve_model("owner/model")) == READ
    fetched = {
        path.rpartition("/resolve/")[2].partition("/")[2]
        for _, path, _ in hub.requests
        if "/resolve/" in path
    }
    assert fetched == set(READ), "no other file is requested"


def test_an_adapter_is_downloaded_by_the_same_call(hub):
    assert set(files_in(resolve_model("owner/adapter"))) == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_pickled_weights_are_downloaded_only_where_there_are_no_safetensors(hub, monkeypatch):
    snapshot = resolve_model("owner/pickled")
    assert files_in(snapshot) == PICKLED, "no other pickle"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("owner/pickled") == snapshot


def test_a_folder_of_a_repository_is_downloaded_alone(hub):
    directory = resolve_model("owner/folders/runs/one")
    assert files_in(directory) == {
        name: ADAPTER[name] for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    fetched = [path for _, path, _ in hub.requests if "/resolve/" in path]
    assert fetched and all("/runs/one/adapter_" in path for path in fetched)
    assert files_in(resolve_model("owner/folders"))["model.safetensors"] == b"at the top"


def test_a_path_below_a_directory_that_is_here_is_no_hub_id(hub, tmp_path):
    (tmp_path / "owner").mkdir()
    assert refusal("owner/folders/runs").startswith(
        "no such directory: 'owner/folders/runs', although 'owner' is"
    )
    assert hub.requests == []


@pytest.mark.parametrize("folder", ["runs/two", "runs/three", "nowhere"])
def test_a_folder_without_a_model_is_named(hub, folder):
    assert f"owner/folders has no folder '{folder}' with a model's files" in refusal(
        f"owner/folders/{folder}"
    )


@pytest.mark.parametrize("revision", ["v0", OLD])
def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, revision):
    assert files_in(resolve_model("owner/model", revision=revision)) == {
        "config.json": b"{}",
        "model.safetensors": b"older",
    }


def test_a_cached_snapshot_is_used_offline_and_without_a_network(hub, monkeypatch):
    snapshot = resolve_model("owner/model")
    requests = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_model("owner/model") == snapshot
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_to(monkeypatch, "http://127.0.0.1:9")  # the discard port, where no server listens
    assert resolve_model("owner/model") == snapshot
    assert len(hub.requests) == requests


def test_the_token_is_sent_and_opens_a_gated_repository(hub):
    assert files_in(resolve_model("owner/gated", token=TOKEN)) == READ
    assert {authorization for _, _, authorization in hub.requests} == {f"Bearer {TOKEN}"}


# Refusals


@pytest.mark.parametrize("token", [None, TOKEN[:-1]])
def test_a_gated_repository_says_accept_the_licence_and_log_in(hub, token):
    message = refusal("owner/gated", token=token)
    assert "owner/gated is gated" in message and f"{constants.ENDPOINT}/owner/gated" in message
    assert "hf auth login" in message and "pass a token" in message
    assert TOKEN[:-1] not in message


def test_a_missing_repository_is_reported_as_missing_or_private(hub):
    message = refusal("owner/misspelt", token=TOKEN)
    assert (
        "'owner/misspelt' is neither a local directory nor a repository" in message and "private" in message
    )


def test_a_missing_revision_is_reported(hub):
    assert "owner/model has no revision 'v9'" in refusal("owner/model", revision="v9", token=TOKEN)


def test_a_repository_without_weights_that_are_read_is_refused(hub):
    message = refusal("owner/gguf")
    assert "owner/gguf holds neither *.safetensors nor pytorch_model*.bin nor adapter_model.bin" in message
    assert not any(path.endswith(".gguf") for _, path, _ in hub.requests)


def test_a_missing_cache_is_reported_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refusal("owner/model", token=TOKEN)
    missing = "there is no folder owner/model, owner/model is not (or not completely) in the cache"
    assert missing in message and "HF_HUB_OFFLINE" in message
    assert hub.requests == []


def test_an_unreachable_hub_is_reported(hub, monkeypatch):
    point_to(monkeypatch, "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached (ConnectError); check the network" in refusal(
        "owner/model", token=TOKEN
    )


def test_a_rejected_token_is_reported(hub):
    assert "answers 401: the token is not accepted" in refusal("owner/mistaken-token", token=TOKEN)


def test_a_broken_hub_is_reported(hub):
    assert "answers 500: try again later" in refusal("owner/broken", token=TOKEN)


@pytest.mark.parametrize("token", ["", TOKEN + "\n", f" {TOKEN}", TOKEN + "é"])
def test_an_impossible_token_is_refused_before_it_is_sent(hub, token):
    assert "the token is empty or contains" in refusal("owner/model", token=token)
    assert hub.requests == []


def test_without_a_home_directory_one_line_says_what_to_set(monkeypatch):
    import pwd

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a container whose user is in no file
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    with pytest.raises(UserError, match="owner/model cannot be downloaded: .* set HF_HOME to a directory"):
        resolve_model("owner/model")
