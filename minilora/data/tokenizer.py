"""Text to token ids and back: one interface over `tokenizer.json` and sentencepiece's `tokenizer.model`.

A model directory holds one of the two files, or both. With both, `tokenizer.json` is read: it also holds the
tokens that were added after sentencepiece's training, such as <|im_start|>, which `tokenizer.model` lacks.

BOS. Only `encode` puts BOS in front: exactly one, and none for a model that was trained without it (Qwen).
The files of the model decide whether it has one:

    tokenizer.json     its own post-processor; add_bos_token is ignored, as in transformers 5
    tokenizer.model    add_bos_token in tokenizer_config.json; by default true, as Llama and Mistral were
                       trained, where transformers 5 has false

Special tokens in a text. Under `tokenizer.json`, "</s>" in a text becomes that special token, as in
transformers. Under `tokenizer.model` it stays four characters, as in sentencepiece. `token_id("</s>")` gives
the id under both. A token that was added to a `tokenizer.model` later (`new_tokens.py`) is found in a text
under both, too.

Rendered conversations are the exception: their special tokens come from the chat template, and
`encode_with_offsets` finds them under both backends. The text between two of them is encoded like a text that
stands alone: sentencepiece puts its "▁" in front, as Meta's and Mistral's own code does. A special token that
a person typed must stay text where sentencepiece keeps it text; `escape` sees to that.

Padding is never EOS. A mask of the padding id would then cover the end of every text, and the model would
never learn to stop. Padding is the tokenizer's own padding token, else the unknown token, else id 0. The
choice changes no result here, since rows are masked by their lengths.

Surrogates. A Python string may hold halves of a surrogate pair, which have no UTF-8. `encode` joins the pairs
and replaces a single half by U+FFFD, as every UTF-8 decoder does.
"""

import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from minilora.data.tokenizer_backends import SentencePiece, TokenizerJson
from minilora.system.errors import UserError
from minilora.system.files import fingerprint, read_text
from minilora.system.schema import Field, read_fields, read_object, shown

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_LONGEST_TEMPLATE = 1 << 20  # bytes; the longest that is published has some 10,000
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def has_tokenizer(directory: Path | None) -> bool:
    """Whether a directory holds a tokenizer, as an adapter's may."""
    files = ("tokenizer.json", "tokenizer.model") if directory else ()
    return any((directory / name).is_file() for name in files)


def load_tokenizer(directory: str | Path) -> "Tokenizer":
    """Return the tokenizer of a model directory. Raises UserError if it is missing, damaged or incomplete."""
    directory = Path(directory)
    config = _read_config(directory)
    if (path := directory / "tokenizer.json").is_file():
        backend = TokenizerJson(path)
    elif (path := directory / "tokenizer.model").is_file():
        backend = SentencePiece(path, config)
    else:
        raise UserError(
            f"{directory} holds no tokenizer: it needs a tokenizer.json or a tokenizer.model; copy one there"
        )
    added = {_text_of(token): int(i) for i, token in (config.get("added_tokens_decoder") or {}).items()}
    for token, i in (added | _read_added_tokens(directory)).items():
        if backend.token_id(token) != i:
            raise UserError(
                f"{directory} adds {shown(token)} as id {i}, which its {path.name} lacks; "
                "copy a tokenizer.json there that holds this token"
            )
    if isinstance(backend, SentencePiece):  # a tokenizer.json says itself which added tokens are special
        decoder = (config.get("added_tokens_decoder") or {}).values()
        backend.mark_special(t["content"] for t in decoder if isinstance(t, dict) and t.get("special"))
    return Tokenizer(directory, backend, config)


class Tokenizer:
    """Text to token ids and back. Made by `load_tokenizer`."""

    bos_id: int | None  # begin of sequence
    eos_id: int | None  # end of sequence
    pad_id: int  # never eos_id
    vocab_size: int  # every id is below it
    special_tokens: dict[str, str]  # {"bos_token": "<s>", ...}, without roles that no token has
    chat_template: str | None  # Jinja, from chat_template.jinja or tokenizer_config.json

    def __init__(self, directory: Path, backend: TokenizerJson | SentencePiece, config: dict):
        self._directory, self._backend = directory, backend
        self.vocab_size = backend.vocab_size
        named = {role: _text_of(config[role]) for role in _ROLES if config.get(role)}
        known = {role: token for role, token in named.items() if backend.token_id(token) is not None}
        for role in ("bos_token", "eos_token"):
            if role in named and role not in known:
                raise UserError(
                    f"{directory} names {role} {shown(named[role])}, which its vocabulary lacks; "
                    "correct tokenizer_config.json"
                )
        backend.mark_special(known.values())
        ids = backend.default_ids | {role: backend.token_id(token) for role, token in known.items()}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        pad_ids = (ids.get("pad_token"), ids.get("unk_token"), 0, 1)
        self.pad_id = next(i for i in pad_ids if i not in (None, self.eos_id))
        self._prefix = backend.prefix(self.bos_id)  # the ids that bos=True puts in front: BOS or none
        self.special_tokens = {role: backend.token(i) for role, i in ids.items()}
        self.chat_template = _default_template(config.get("chat_template"), directory)

    @property
    def directory(self) -> Path:
        """The directory of its files."""
        return self._directory

    @property
    def puts_bos(self) -> bool:
        """Whether `encode` puts BOS in front. A model may name a BOS token and be trained without it."""
        return bool(self._prefix)

    # ---- text to ids ----

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Return the ids of a text, with BOS in front if the model was trained with it, and EOS at the end.

        A text that begins with BOS or ends with EOS gets no second one. Raises UserError for eos=True if the
        tokenizer has no EOS token.
        """
        if eos and self.eos_id is None:
            raise UserError(
                f"{self._directory} names no EOS token; name eos_token in its tokenizer_config.json"
            )
        ids = self._backend.encode(_join_surrogates(text))
        prefix = self._prefix if bos and ids[: len(self._prefix)] != self._prefix else []
        suffix = [self.eos_id] if eos and ids[-1:] != [self.eos_id] else []
        return prefix + ids + suffix

    def encode_with_offsets(self, text: str, mark: str = "") -> tuple[list[int], np.ndarray]:
        """Return the ids of a rendered conversation, and the characters [start, end) of each, int64 (T, 2).

        Special tokens in the text are special tokens, except those that `escape` broke up with `mark`. No BOS
        is added. The "▁" that sentencepiece puts in front of a text has no character: start = end. Tokens of
        one byte each, which form a character together, have that whole character.
        """
        return self._backend.encode_with_offsets(text, mark)

    def escape(self, text: str, mark: str) -> str:
        """Return a text that a person typed with `mark` inside its special tokens, so that they stay text.

        `encode_with_offsets(..., mark)` takes the mark out again. Under `tokenizer.json` nothing is marked:
        special tokens in a text are special tokens there, as in transformers.
        """
        return self._backend.escape(_join_surrogates(text), mark)

    # ---- ids to text ----

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of some ids. Special tokens and ids outside of the vocabulary have no text."""
        return self._backend.decode([i for i in map(int, ids) if self.is_text(i)])

    def is_special(self, token_id: int) -> bool:
        """Whether this is the id of a special token, which decodes to nothing."""
        return token_id in self._backend.special_ids

    def is_text(self, token_id: int) -> bool:
        """Whether this id decodes to text: it is in the vocabulary and not special."""
        return 0 <= token_id < self.vocab_size and token_id not in self._backend.special_ids

    def is_unsettled(self, token_id: int) -> bool:
        """Whether the text of this id depends on the ids behind it."""
        return token_id in self._backend.unsettled_ids

    # ---- single tokens by name ----

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, such as "<|im_end|>" or "[INST]"; None if the vocabulary lacks it."""
        return self._backend.token_id(token)

    def token(self, token_id: int) -> str:
        """Return a token as the vocabulary writes it: "▁Hello", or "</s>" for a special token."""
        return self._backend.token(token_id)

    # ---- files ----

    def fingerprint(self) -> str:
        """Return a hash of the files that decide the result of `encode`: all but the chat template."""
        paths = (self._directory / name for name in TOKENIZER_FILES if name != "chat_template.jinja")
        return fingerprint(path.name.encode() + path.read_bytes() for path in paths if path.is_file())

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files, unchanged, to another directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            source, target = self._directory / name, directory / name
            if source.is_file() and not (target.exists() and source.samefile(target)):
                shutil.copyfile(source, target)


# ---- reading the configuration ----


_TOKEN = Field((str, dict), "a token, or an object that holds it as content", nullable=True, longest=1000)
_FIELDS = dict.fromkeys(_ROLES, _TOKEN) | {  # of tokenizer_config.json and special_tokens_map.json
    "add_bos_token": Field(bool, "whether sentencepiece puts BOS in front", nullable=True),
    "added_tokens_decoder": Field(dict, "id -> token", nullable=True),
}
_ID = re.compile("[0-9]{1,9}")


def _read_config(directory: Path) -> dict:
    """Return tokenizer_config.json, with the special tokens and the chat template of the files beside it."""
    config = _read_checked(directory / "tokenizer_config.json", _check_config)
    special_tokens = _read_checked(directory / "special_tokens_map.json", _check_config)
    # As in transformers, special_tokens_map.json counts only if the newer added_tokens_decoder is absent.
    config = special_tokens | config if "added_tokens_decoder" in config else config | special_tokens
    if (path := directory / "chat_template.jinja").exists():
        config["chat_template"] = _read_template(path)
    return config


def _read_added_tokens(directory: Path) -> dict[str, int]:
    """Return added_tokens.json: token -> id."""
    return _read_checked(directory / "added_tokens.json", _check_added_tokens)


def _read_checked(path: Path, check: Callable[[dict], None]) -> dict:
    """Return the object in a JSON file, or an empty one if the file does not exist."""
    if not path.exists():
        return {}
    raw = read_object(path)
    try:
        check(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return raw


def _check_config(raw: dict) -> None:
    fields = read_fields(raw, _FIELDS)
    for role in _ROLES:
        _check_token(role, fields[role])
    for i, token in (fields["added_tokens_decoder"] or {}).items():
        if not _ID.fullmatch(i):
            raise UserError(f"added_tokens_decoder names tokens by whole numbers, not by {shown(i)}")
        _check_token(f"added_tokens_decoder.{i}", _TOKEN.read(f"added_tokens_decoder.{i}", token or {}))


def _check_added_tokens(raw: dict) -> None:
    for token, i in raw.items():
        _check_token("a token", token)
        Field(int, "id", low=0, high=10**9).read(shown(token), i)


def _check_token(name: str, token: str | dict | None) -> None:
    """Raise UserError for an object without a text, and for half of a surrogate pair, which no file holds."""
    text = _text_of(token)
    if token is not None and (not isinstance(text, str) or re.search("[\ud800-\udfff]", text)):
        raise UserError(f"{name} must be a token, or an object that holds it as content, not {shown(token)}")


def _read_template(path: Path) -> str:
    try:
        return read_text(path, _LONGEST_TEMPLATE)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    except UserError as error:
        raise UserError(f"{path} is {error}") from error


def _text_of(token: str | dict | None) -> str | None:
    """Return a token's text; Hugging Face writes it alone, or in an object under "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _default_template(template: object, directory: Path) -> str | None:
    """Return the chat template; of a list of named templates, the one that is named "default"."""
    if isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in template
    ):
        template = {entry["name"]: entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str | None):
        raise UserError(
            f"{directory}: chat_template is {shown(template)}, not text or a list of texts by name; "
            "correct tokenizer_config.json"
        )
    return template


def _join_surrogates(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
