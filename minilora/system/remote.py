"""Read and write files at an address, and report every failure in one line.

    https://host/data.jsonl                      read by Python's own client
    s3://bucket/folder, hf://datasets/owner/x    read and written by the package that fsspec uses for it

These packages find credentials themselves. S3 uses AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws, and
AWS_ENDPOINT_URL for a store that is not Amazon's. The hub uses HF_TOKEN or `hf auth login`. A web server uses
the address itself, https://user:password@host/. An address may contain a password or a signature, and the
text of an error may contain a header, so neither is ever printed in full.
"""

import base64
import contextlib
import http.client
import re
import shutil
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from minilora.system.cache import private_cache
from minilora.system.errors import UserError
from minilora.system.files import fingerprint

_UNQUOTED = "/%?=&:;,@!$'()*+~"  # characters that stay as they are; a % begins one that is already quoted
_SET_KEYS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_EXPLANATIONS = {  # name of an exception's type -> message
    "NoCredentialsError": f"there are no credentials; {_SET_KEYS}, or run `aws configure`",
    "PartialCredentialsError": f"the credentials are incomplete; {_SET_KEYS}",
    "PermissionError": "access is denied; do the credentials allow it?",
    "FileNotFoundError": "it does not exist",
    "EndpointConnectionError": "the server cannot be reached; check the network, and AWS_ENDPOINT_URL if set",
}


def is_address(text: str) -> bool:
    """Whether this is an address, and not a path or a hub id."""
    return "://" in text


def redacted(address: str) -> str:
    """An address without user, password and query, which may be secret. Other text is returned unchanged.

    This works for malformed addresses too, because error messages quote them.
    """
    if not is_address(address):
        return address
    scheme, _, rest = address.partition("://")
    host, slash, path = re.split("[?#]", rest)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def check_address(key: str, address: str) -> None:
    """Raise UserError if the value of `key` is not an address, or contains a password.

    Settings are saved and logged, so a password in them would leak.
    """
    try:
        parts = urlsplit(address) if is_address(address) else None
    except ValueError:  # an unclosed bracket
        parts = None
    if parts is None:
        raise UserError(f"{key} = {redacted(address)!r} is no address; write it as s3://bucket/folder")
    if parts.password or parts.query:
        raise UserError(
            f"{key} = {redacted(address)} holds a password or a signature, which would be saved with the "
            "settings; put credentials into the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
        )


def read_file(address: str) -> bytes:
    """The contents of the file at an address. Raises UserError."""
    with _failures_as_user_errors(address, "read"):
        if address.lower().startswith(("http://", "https://")):
            with urllib.request.urlopen(_request(address), timeout=60) as response:
                return response.read()
        import fsspec

        with fsspec.open(address, "rb") as file:
            return file.read()


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
        copy = cache / fingerprint([address.encode(), *entries])
        if not copy.is_dir():
            part = Path(tempfile.mkdtemp(dir=cache))
            try:
                for name in names:
                    system.get_file(listing[name]["name"], str(part / name))
                with contextlib.suppress(FileExistsError):  # another process has made the copy meanwhile
                    part.rename(copy)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return copy


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _open(address: str):
    """The file system of an address, and the path of the folder on it."""
    import fsspec

    system, path = fsspec.url_to_fs(address)
    return system, path.rstrip("/")


@contextlib.contextmanager
def _failures_as_user_errors(address: str, action: str) -> Iterator[None]:
    """Turn every exception into a UserError: ADDRESS cannot be `action` ("read" or "written"), and why."""
    name, scheme = redacted(address), address.partition("://")[0]
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise UserError(
            f"{name} cannot be {action}: the server answers {error.code} {error.reason}"
        ) from error
    except (urllib.error.URLError, http.client.HTTPException) as error:
        reason = error_kind(getattr(error, "reason", error))
        raise UserError(f"{name} cannot be {action}: {reason}; is the address right?") from error
    except ImportError as error:
        help_text = "pip install 'minilora[s3]'" if scheme == "s3" else " ".join(str(error).split())
        raise UserError(f"{name}: a package for {scheme}:// is missing: {help_text}") from error
    except Exception as error:  # every file system raises its own types
        reason = _EXPLANATIONS.get(type(error).__name__) or error_kind(error)
        if "Protocol not known" in str(error):
            reason += f"; {error}"
        raise UserError(f"{name} cannot be {action}: {reason}") from error


def error_kind(error: object) -> str:
    """A description of an error without its text, which may contain secrets such as headers and keys."""
    if not isinstance(error, Exception):
        return str(error)
    status = getattr(getattr(error, "response", None), "status_code", None)
    return f"the answer is {status}" if status else getattr(error, "strerror", None) or type(error).__name__
