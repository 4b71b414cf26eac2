"""Passwords and signatures stay out of everything that is printed, recorded, saved or sent.

    without_secrets(text)   cuts them out of any text: messages, settings, the reports of services
    Address(text)           a text that holds an address. It reads as `without_secrets` writes it, wherever it
                            goes. `whole` gives all of it to those who connect, or split a list of addresses

These parts are secret:

    https://user:password@host/a        everything between :// and @; s3:// may have a key pair there
    https://host/a?X-Amz-Signature=1    everything behind a question mark, a # or a semicolon
    token=1, password=1, sig=1 ...      such pairs, in any text
    hf_..., Bearer ..., Basic ...       tokens of the hub, and headers, in any text

Malformed addresses are cut too, because error messages quote them. A password may hold a slash or a comma
that should have been percent-encoded. Then too much is cut rather than too little, and "..." marks the place.
"""

import re

_AZURE = ("abfs://", "abfss://", "az://")  # abfs://container@account: a name without a password
# An address ends at a blank, or in a list, where the next one begins.
_ADDRESS = re.compile(r"(\w[\w+.-]*://)((?:(?!,\w[\w+.-]*://)\S)*)")
_QUERY = re.compile(r"[?#;][^\s,'\")\]]*")
_PAIR = re.compile(
    r"(?i)\b((?:access_|api_|auth_|hf_|refresh_)?"
    r"(?:token|password|passwd|pwd|secret|signature|sig|credential|api_?key|access_?key)=)[^\s&,;'\")\]]+"
)
_TOKEN = re.compile(r"\b(hf_|Bearer |Basic )[\w.=/+-]{8,}")


class Address(str):
    """A text with an address in it: this string lacks the secrets that `whole` returns.

    Being a str, it can be printed, joined, compared, copied and saved like any other, always without them.
    """

    _whole: str

    def __new__(cls, text: str) -> "Address":
        # A password may have blanks that should be encoded. Encoded here, they do not end the address early.
        spaceless = re.sub(r"\s", "%20", re.sub(r",\s+", ",", whole(text).strip()))
        redacted = without_secrets(spaceless)
        address = super().__new__(cls, whole(text) if redacted == spaceless else redacted)
        address._whole = whole(text)
        return address

    def __reduce__(self):  # for copies and pickles
        return str, (str(self),)


def whole(text: str) -> str:
    """The text with its secrets: to connect, or to split a list of addresses whose parts are hidden again."""
    return text._whole if isinstance(text, Address) else text


def is_address(text: str) -> bool:
    """Whether a text is or holds an address, and not only a path or a hub id."""
    return "://" in text


def hide_secrets(value: object) -> object:
    """A value as it is, or as an `Address` if it is a text with an address in it."""
    return Address(value) if isinstance(value, str) and is_address(value) else value


def without_secrets(text: str) -> str:
    """The text without anything secret. Text without secrets is returned unchanged."""
    text = _ADDRESS.sub(lambda match: match[1] + _without_user(*match.groups()), text)
    return _TOKEN.sub(r"\1...", _PAIR.sub(r"\1...", text))


def _without_user(scheme: str, rest: str) -> str:
    """What follows the scheme of an address, without user, password, query and fragment."""
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if ":" in (user or host) and "@" in path:  # user:pass/word@host, or a name with an @: nobody can tell
        rest = f"...@{path.rpartition('@')[2]}"
    elif at and not (scheme.lower() in _AZURE and ":" not in user):
        mark = "...@" * bool(user == "..." or re.search("[?#;,]", user))
        rest = f"{mark}{host}{slash}{path}"
    return _QUERY.sub("", rest)
