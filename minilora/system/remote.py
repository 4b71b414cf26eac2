"""Read and write files at an address that the user gave, and report every failure in one line.

    https://host/data.jsonl                      read by Python's own client
    s3://bucket/folder, hf://datasets/owner/x    read and written by the package that fsspec uses for it

Only the schemes in SCHEMES are opened, and no chains of them (`zip::https://...`): fsspec knows dozens, and
some of them read local files or run programs that the address names. Plain http, which anyone on the way can
read and change, is for this machine, or where MINILORA_ALLOW_HTTP=1 requests it. No file of somebody else
chooses an address: see `refuse_address`.

These packages find credentials themselves. S3 uses AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws, and
AWS_ENDPOINT_URL for a store that is not Amazon's. The hub uses HF_TOKEN or `hf auth login`. A web server uses
the address itself, https://user:password@host/. An address may contain a password or a signature, and the
text of an error may contain a header, so neither is ever printed in full (`minilora.system.redaction`).
"""

import base64
import contextlib
import http.client
import os
import re
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from minilora.system.cache import private_cache
from minilora.system.errors import UserError
from minilora.system.files import fingerprint
from minilora.system.locks import check_unlocked, locked
from minilora.system.redaction import Address, is_address, whole

_UNQUOTED = "/%?=&:;,@!$'()*+~"  # characters that stay as they are; a % begins one that is already quoted
_SET_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_SET_CREDENTIALS = "put credentials into the environment, as in AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
_EXPLANATIONS = {  # name of an exception's type -> message
    "NoCredentialsError": f"there are no credentials; {_SET_KEYS}, or run `aws configure`",
    "PartialCredentialsError": f"the credentials are incomplete; {_SET_KEYS}",
    "PermissionError": "access is denied; do the credentials allow it?",
    "FileNotFoundError": "it does not exist",
    "EndpointConnectionError": "the server cannot be reached; check the network, and AWS_ENDPOINT_URL if set",
}
SCHEMES = ("https", "http", "s3", "gs", "abfs", "abfss", "az", "hf")
_EXTRAS = {"s3": "s3", "gs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}  # scheme -> minilora's
_WRITABLE = tuple(scheme for scheme in SCHEMES if not scheme.startswith("http"))
_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def check_scheme(address: str) -> None:
    """Raise UserError for an address that is not opened: another scheme, a chain, or http over a network."""
    text, name = whole(address), Address(address)
    scheme, _, place = text.partition("://")
    scheme, authority = scheme.lower(), place.partition("/")[0]
    if "::" in re.sub(r"\[[^]/]*", "", text):  # in brackets: an IPv6 address
        raise UserError(f"{name} is a chain of addresses (::), which is never opened; name the file itself")
    if scheme not in SCHEMES:
        raise UserError(f"{name}: {scheme}:// is not supported; supported: {', '.join(SCHEMES)}")
    if not _is_valid(text):
        raise UserError(f"{name} is no valid address; write it as https://host/file or s3://bucket/folder")
    if scheme == "http" and _host(text) not in _THIS_MACHINE and not os.environ.get("MINILORA_ALLOW_HTTP"):
        raise UserError(
            f"{name}: http can be read and changed on its way; use https, or set MINILORA_ALLOW_HTTP=1"
        )
    if scheme in ("s3", "gs", "hf") and "@" in authority:
        raise UserError(
            f"{name} holds credentials, which {scheme}:// does not take from an address; {_SET_CREDENTIALS}"
        )


def _is_valid(address: str) -> bool:
    """Whether an address has a host or bucket, a port that exists, and no control characters."""
    authority = address.partition("://")[2].partition("/")[0]
    try:
        port = urlsplit(address).port
    except ValueError:  # an unclosed bracket, or no port
        return False
    has_host = bool(authority.rpartition("@")[2]) and port != 0
    return has_host and address.isprintable() and not re.search(r"\s", authority)


def _host(address: str) -> str | None:
    return urlsplit(address).hostname


def refuse_address(text: str, place: str, option: str) -> None:
    """Raise UserError if a file names an address: only the user decides where this machine connects."""
    if is_address(text) or text.startswith(("//", "\\\\")):  # the latter: a server, on Windows
        raise UserError(
            f"{place} names an address, {Address(text)}, and only you choose where to connect; "
            f"if you trust it, give it with {option}"
        )


def check_address(key: str, address: str) -> None:
    """Raise UserError if the value of `key` cannot be written to, or contains a password.

    Settings are saved and logged, so a resumed run would lack the password.
    """
    try:
        parts = urlsplit(whole(address)) if is_address(address) else None
    except ValueError:  # an unclosed bracket
        parts = None
    if parts is None:
        raise UserError(f"{key} = {str(address)!r} is no address; write it as s3://bucket/folder")
    if "@" in parts.netloc or parts.query:
        raise UserError(
            f"{key} = {address} holds a password or a signature, which is not saved with the settings; "
            f"{_SET_CREDENTIALS}"
        )
    check_scheme(address)
    if parts.scheme.lower() not in _WRITABLE:
        raise UserError(
            f"{key} = {address}: cannot write to {parts.scheme}://, only to {', '.join(_WRITABLE)}"
        )


def read_file(address: str) -> bytes:
    """The contents of the file at an address. Raises UserError."""
    with _failures_as_user_errors(address, "read"):
        if address.lower().startswith(("http://", "https://")):
            with _opener().open(_request(whole(address)), timeout=60) as response:
                return response.read()
        system, path = _open(address)
        return system.cat_file(path)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to an address that the user could have given."""

    def redirect_request(self, request, file, code, message, headers, address):
        try:
            check_scheme(address)
        except UserError:
            file.close()
            raise
        return super().redirect_request(request, file, code, message, headers, address)


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Redirects)


def _request(address: str) -> urllib.request.Request:
    """A request with a percent-encoded address, and with user and password in a header."""
    try:
        parts = urlsplit(address)
    except ValueError as error:  # an unclosed bracket
        raise http.client.InvalidURL from error
    user, at, host = parts.netloc.rpartition("@")
    path, query = quote(parts.path, safe=_UNQUOTED), quote(parts.query, safe=_UNQUOTED)
    url = parts._replace(netloc=host, path=path, query=query, fragment="").geturl()
    request = urllib.request.Request(url)
    if at:
        # An unredirected header goes to this server only, not to one that it redirects to.
        name_and_password = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {name_and_password}")
    return request


def write_files(address: str, files: Mapping[str, Path | bytes]) -> None:
    """Write files into the folder at an address: name -> a local path or the contents. Raises UserError."""
    with _failures_as_user_errors(address, "written"):
        system, folder = _open(address)
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            system.pipe_file(f"{folder}/{name}", data)  # one call: the object appears complete or not at all


def fetch_folder(address: str, wanted: list[str], unwanted: list[str]) -> Path:
    """A local copy of the files whose names match a pattern in `wanted` and none in `unwanted`.

    Copies are cached in ~/.cache/minilora (or XDG_CACHE_HOME) under a fingerprint of the store's listing,
    which includes sizes and times. So an unchanged folder is downloaded only once. Raises UserError.
    """
    cache = private_cache()
    with _failures_as_user_errors(address, "read"):
        system, folder = _open(address)
        files = [entry for entry in system.ls(folder, detail=True) if entry["type"] == "file"]
        listing = {entry["name"].rpartition("/")[2]: entry for entry in files}
        names = sorted(name for name in listing if _matches(name, wanted) and not _matches(name, unwanted))
        entries = [str(sorted(listing[name].items())).encode() for name in names]
        copy = cache / fingerprint([str(address).encode(), *entries])
        if not copy.is_dir():
            _remove_leftovers(copy)
            part = Path(tempfile.mkdtemp(dir=cache, prefix=f"{copy.name}."))
            try:
                with locked("the cache", part):
                    (part / "files").mkdir()
                    for name in names:
                        system.get_file(listing[name]["name"], str(part / "files" / name))
                    try:
                        (part / "files").rename(copy)
                    except OSError:
                        if not copy.is_dir():  # else another process has made it meanwhile
                            raise
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return copy


def _remove_leftovers(copy: Path) -> None:
    """Remove what killed downloads of the same folder have left. One that still runs holds a lock."""
    for part in copy.parent.glob(f"{copy.name}.*"):
        with contextlib.suppress(UserError, OSError):
            check_unlocked("the cache", part)
            newest = max(path.stat().st_mtime for path in (part, *part.rglob("*")))
            if time.time() - newest > 60:  # a younger one may not have taken its lock yet
                shutil.rmtree(part, ignore_errors=True)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _open(address: str):
    """The file system of an address, and the path of the folder on it."""
    import fsspec

    system, path = fsspec.url_to_fs(whole(address))
    return system, path.rstrip("/")


@contextlib.contextmanager
def _failures_as_user_errors(address: str, action: str) -> Iterator[None]:
    """Turn every exception into a UserError: ADDRESS cannot be `action` ("read" or "written"), and why."""
    check_scheme(address)
    name, scheme = Address(address), address.partition("://")[0].lower()
    try:
        yield
    except UserError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(
            f"{name} cannot be {action}: the server answers {error.code} {error.reason}"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException) as error:
        reason = error_kind(getattr(error, "reason", error))
        raise UserError(f"{name} cannot be {action}: {reason}; is the address right?") from error
    except ImportError as error:
        help_text = f"pip install 'minilora[{_EXTRAS.get(scheme, scheme)}]'"
        raise UserError(f"{name}: a package for {scheme}:// is missing: {help_text}") from error
    except Exception as error:  # every file system raises its own types
        reason = _EXPLANATIONS.get(type(error).__name__) or error_kind(error)
        raise UserError(f"{name} cannot be {action}: {reason}") from error


def error_kind(error: object) -> str:
    """A description of an error without its text, which may contain secrets such as headers and keys."""
    if not isinstance(error, Exception):
        return str(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"the answer is {status}" if status else getattr(error, "strerror", None) or type(error).__name__
