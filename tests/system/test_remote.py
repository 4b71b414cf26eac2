"""Only the user decides where this machine connects, and only by the schemes that are meant for it."""

from http.server import BaseHTTPRequestHandler

import pytest
from support.servers import serving

from minilora import UserError
from minilora.system import remote
from minilora.system.redaction import Address
from minilora.system.remote import check_address, fetch_folder, read_file, refuse_address, write_files


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to open an address fails the test."""
    monkeypatch.setattr(remote, "_open", lambda _: pytest.fail("an address was opened"))
    monkeypatch.setattr(remote, "_opener", lambda: pytest.fail("an address was opened"))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("file:///etc/passwd", "file:// is not supported"),
        ("local:///etc/passwd", "local:// is not supported"),
        ("ftp://host/a.jsonl", "ftp:// is not supported"),
        ("memory://a/b.jsonl", "memory:// is not supported"),
        ("reference://a.json", "reference:// is not supported"),
        ("github://owner:name@/a.jsonl", "github:// is not supported"),
        ("ssh://me:secret@host/a.jsonl", "ssh:// is not supported"),
        ("zip://a.jsonl::https://host/a.zip", "is a chain of addresses"),
        ("simplecache::s3://bucket/a.jsonl", "is a chain of addresses"),
        ("https://host/a.jsonl::reference://b", "is a chain of addresses"),
        ("http://host/a.jsonl", "use https, or set MINILORA_ALLOW_HTTP=1"),
        ("http://127.0.0.1.host.org/a.jsonl", "use https, or set MINILORA_ALLOW_HTTP=1"),
        ("HTTP://HOST/a.jsonl", "use https, or set MINILORA_ALLOW_HTTP=1"),
        ("s3://key:secret@bucket/a.jsonl", "credentials"),
        ("s3:///a.jsonl", "is no valid address"),
        ("https:///a.jsonl", "is no valid address"),
        ("https://host:99999/a.jsonl", "is no valid address"),
        ("https://[::1/a.jsonl", "is no valid address"),
        ("https://a host/a.jsonl", "is no valid address"),
        ("https://host/\r\nHost: other/a.jsonl", "is no valid address"),
        ("https://host/\x1b[2Ja.jsonl", "is no valid address"),
        ("hf://hf_secretsecret@datasets/owner/name/a.jsonl", "credentials"),
    ],
)
def test_what_the_list_of_schemes_lacks_is_refused_before_any_connection(no_network, address, said):
    for use in (read_file, lambda a: write_files(a, {}), lambda a: fetch_folder(a, ["*"], [])):
        for given in (address, Address(address)):
            with pytest.raises(UserError) as error:
                use(given)
            assert said in str(error.value) and "secret" not in str(error.value)


@pytest.mark.parametrize("address", ["http://[::1]:9/a", "http://localhost:9/a", "http://127.0.0.1:9/a"])
def test_http_is_for_this_machine(address):
    with pytest.raises(
        UserError, match="cannot be read: (Connection refused|Cannot assign requested address)"
    ):
        read_file(address)


def test_http_over_a_network_is_read_on_request(monkeypatch):
    monkeypatch.setenv("MINILORA_ALLOW_HTTP", "1")
    remote.check_scheme("http://host/a.jsonl")


@pytest.mark.parametrize("target", ["http://host.invalid/a", "file:///etc/passwd", "ftp://host.invalid/a"])
def test_a_server_cannot_redirect_to_what_the_user_could_not_give(target):
    class Redirect(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()

        def log_message(self, *_):
            pass

    with serving(Redirect) as server, pytest.raises(UserError) as error:
        read_file(f"{server.address}/a")
    assert "not supported" in str(error.value) or "use https" in str(error.value) or "302" in str(error.value)


@pytest.mark.parametrize(
    "name", ["https://host/model", "s3://bucket/model", "file:///a", "//host/share", "\\\\host\\share"]
)
def test_an_address_that_a_file_names_is_shown_and_left_to_the_user(name):
    with pytest.raises(UserError) as error:
        refuse_address(name, "adapter_config.json", "--model")
    assert name in str(error.value).replace("\\\\", "\\") or "share" in str(error.value)
    assert "--model" in str(error.value)


@pytest.mark.parametrize("name", ["owner/name", "assets/base", "/models/base", "C:\\models\\a", "~/model"])
def test_hub_ids_and_paths_may_be_named_by_a_file(name):
    refuse_address(name, "adapter_config.json", "--model")


@pytest.mark.parametrize(
    "address", ["s3://key:secret@bucket/a", "https://secret@host/a", "s3://bucket/a?X-Amz-Signature=secret"]
)
def test_an_address_to_write_to_holds_no_secret(address):
    for given in (address, Address(address)):
        with pytest.raises(UserError, match="put credentials into the environment") as error:
            check_address("upload", given)
        assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    "address", ["https://host/folder", "http://localhost/folder", "file:///folder", "s3://"]
)
def test_what_cannot_be_written_to_is_refused_before_any_connection(no_network, address):
    with pytest.raises(UserError, match="cannot write to|not supported|no valid address"):
        check_address("upload", address)
