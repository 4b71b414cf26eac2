"""Files that lie elsewhere: an address is read and written through fsspec, and what fails is told in one
line.

    https://host/data.jsonl                      read by Python's own client
    s3://bucket/folder, hf://datasets/owner/x    read and written by whatever package fsspec knows for it

Credentials come from where these packages look for them: for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY
or ~/.aws (and AWS_ENDPOINT_URL for stores that are not Amazon's), for the hub HF_TOKEN or `hf auth login`,
for a web server the address itself, https://user:password@host/. An address may hold a password or a
signature, and an error's text a header, so neither is ever shown whole.
"""

import base64
import contextlib
import http.client
import os
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from minilora.system.errors import UserError
from minilora.system.files import fingerprint

_KEPT = "/%?=&:;,@!$'()*+~"  # what stands in addresses as it is; a % begins what is quoted already
_MENDS = {  # by the name of an exception's type
    "NoCredentialsError": "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`",
    "PartialCredentialsError": "a part of the credentials is missing; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "PermissionError": "access is denied; do the credentials allow it?",
    "FileNotFoundError": "it does not exist",
    "EndpointConnectionError": "the server cannot be reached; check the network, and AWS_ENDPOINT_URL if it is set",
}


def is_address(place: str) -> bool:
    """Whether this is an address, and not a path or a hub id."""
    return "://" in place


def redacted(place: str) -> str:
    """An address without what may be secret in it: user, password, query."""
    if not is_address(place):
        return place
    scheme, _, rest = place.partition("://")  # an address that is malformed is to be shown too
    host, slash, path = re.split("[?#]", rest)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def check_address(key: str, address: str) -> None:
    """Refuse what is given for `key` if it is no address, or holds a password, which settings would keep and
    logs show.
    """
    try:
        parts = urlsplit(address) if is_address(address) else None
    except ValueError:  # a bracket that is never closed
        parts = None
    if parts is None:
        raise UserError(f"{key} = {redacted(address)!r} is no address; write it as s3://bucket/folder")
    if parts.password or parts.query:
        raise UserError(
            f"{key} = {redacted(address)} holds a password or a signature, which would be saved with the settings; "
            "put credentials into the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
        )


def read_file(address: str) -> bytes:
    """What lies at an address. Raises UserError."""
    with _told(address, "read"):
        if address.lower().startswith(("http://", "https://")):
            with urllib.request.urlopen(_request(address), timeout=60) as answer:
                return answer.read()
        import fsspec

        with fsspec.open(address, "rb") as file:
            return file.read()


def _request(address: str) -> urllib.request.Request:
    """Spaces and letters beyond ASCII as servers want them, and user and password in a header."""
    try:
        parts = urlsplit(address)
    except ValueError as error:  # a bracket that is never closed
        raise http.client.InvalidURL from error
    user, at, host = parts.netloc.rpartition("@")
    path, query = quote(parts.path, safe=_KEPT), quote(parts.query, safe=_KEPT)
    request = urllib.request.Request(
        parts._replace(netloc=host, path=path, query=query, fragment="").geturl()
    )
    if at:  # for this server, and for none that it points to
        name_and_password = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {name_and_password}")
    return request


def write_files(address: str, files: Mapping[str, Path | bytes]) -> None:
    """Put files, or what is to be in them, into a folder elsewhere, under their names. Raises UserError."""
    with _told(address, "written"):
        system, folder = _open(address)
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            system.pipe_file(f"{folder}/{name}", data)  # one call: an object appears whole or not at all


def fetch_folder(address: str, wanted: list[str], unwanted: list[str]) -> Path:
    """A copy of a folder's files whose names match one of the patterns `wanted`, and none of `unwanted`.
    Raises UserError.

    Copies are kept in ~/.cache/minilora (or XDG_CACHE_HOME), under a fingerprint of what the store says of
    the files, their sizes and times among it: as long as that is the same, a folder is fetched once.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minilora"
    with _told(address, "read"):
        system, folder = _open(address)
        listing = {
            entry["name"].rpartition("/")[2]: entry
            for entry in system.ls(folder, detail=True)
            if entry["type"] == "file"
        }
        names = sorted(
            n
            for n in listing
            if any(fnmatch(n, p) for p in wanted) and not any(fnmatch(n, p) for p in unwanted)
        )
        copy = cache / fingerprint(
            [address.encode(), *(str(sorted(listing[name].items())).encode() for name in names)]
        )
        if not copy.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=cache))
            try:
                for name in names:
                    system.get_file(listing[name]["name"], str(part / name))
                with contextlib.suppress(FileExistsError):  # another process was as fast
                    part.rename(copy)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return copy


def _open(address: str):
    """The file system of an address, and the path of a folder on it."""
    import fsspec

    system, path = fsspec.url_to_fs(address)
    return system, path.rstrip("/")


@contextlib.contextmanager
def _told(address: str, done: str) -> Iterator[None]:
    """Whatever goes wrong with an address as a UserError. `done`: read or written."""
    name, scheme = redacted(address), address.partition("://")[0]
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(f"{name} cannot be {done}: the server answers {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException) as error:
        reason = error_kind(getattr(error, "reason", error))
        raise UserError(f"{name} cannot be {done}: {reason}; is the address right?") from error
    except ImportError as error:
        mend = "pip install 'minilora[s3]'" if scheme == "s3" else " ".join(str(error).split())
        raise UserError(f"{name}: a package for {scheme}:// is missing: {mend}") from error
    except Exception as error:  # every file system has its own
        known = f"; {error}" if "Protocol not known" in str(error) else ""
        raise UserError(
            f"{name} cannot be {done}: {_MENDS.get(type(error).__name__) or error_kind(error)}{known}"
        ) from error


def error_kind(error: object) -> str:
    """An error without its text, which may hold what belongs to nobody else: headers, keys."""
    if not isinstance(error, Exception):
        return str(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"the answer is {status}" if status else getattr(error, "strerror", None) or type(error).__name__
