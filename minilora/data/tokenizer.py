"""Text to token ids and back: one interface over sentencepiece's `tokenizer.model` and the `tokenizer.json`
of tokenizers.

A model directory holds one of the two files or both. With both, `tokenizer.json` is read: it also holds the
tokens that were added after sentencepiece's training, such as <|im_start|>, which `tokenizer.model` cannot.

Special tokens have one owner. `encode` alone puts BOS in front, exactly one, and none for a model that was
trained without (Qwen). Who decides whether a directory has a BOS to put:

    tokenizer.json   its own post-processor; add_bos_token of tokenizer_config.json is ignored, as transformers 5 ignores it
    tokenizer.model  add_bos_token; where it is absent yes, as Llama and Mistral were trained (transformers 5 then puts none)

A special token written out in the text, "</s>", becomes that token under `tokenizer.json`, as in
transformers, and stays the four characters that it is under `tokenizer.model`, as in sentencepiece. Whoever
needs such a token by its id asks `token_id`.

Padding never is EOS: whoever masks padding by its id would mask the end of every text with it, and teach a
model not to stop. It is the tokenizer's own padding token, else the unknown token, else 0. Which one changes
no result here, where rows are masked by their lengths.

A rendered conversation is the exception: there special tokens are the template's, and `encode_with_offsets`
finds them under both backends. What lies between two of them is a text of its own to sentencepiece, with its
"▁" in front, as in Meta's and Mistral's own code. A special token that a person typed is not the template's:
`escape` keeps it text where sentencepiece keeps it text.

A Python string may hold halves of a surrogate pair, which are no text and have no UTF-8. `encode` joins the
pairs and replaces a half by U+FFFD, as every UTF-8 decoder does.
"""

import re
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from sentencepiece import SentencePieceProcessor

from minilora.system.errors import UserError
from minilora.system.files import fingerprint, read_json

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
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


def load_tokenizer(directory: str | Path) -> "Tokenizer":
    """The tokenizer of a model directory. Raises UserError if there is none, or if it is damaged or
    incomplete.
    """
    directory = Path(directory)
    config, specials = (
        _read_json(directory / "tokenizer_config.json"),
        _read_json(directory / "special_tokens_map.json"),
    )
    # transformers reads special_tokens_map.json only where the newer added_tokens_decoder is absent.
    config = specials | config if "added_tokens_decoder" in config else config | specials
    added = {_text_of(token): int(i) for i, token in (config.get("added_tokens_decoder") or {}).items()}
    added |= _read_json(directory / "added_tokens.json")
    if (path := directory / "chat_template.jinja").is_file():
        config["chat_template"] = _read_text(path)
    if (path := directory / "tokenizer.json").is_file():
        backend = _TokenizerJson(path)
    elif (path := directory / "tokenizer.model").is_file():
        backend = _SentencePiece(path, config)
    else:
        raise UserError(
            f"{directory} holds no tokenizer: neither tokenizer.json nor tokenizer.model is there"
        )
    for token, i in added.items():
        if backend.token_id(token) != i:
            raise UserError(
                f"{directory} adds {token!r} as id {i}, which its {path.name} lacks; it needs a tokenizer.json with it"
            )
    return Tokenizer(directory, backend, config)


class Tokenizer:
    """Text to token ids and back. Made by `load_tokenizer`."""

    bos_id: int | None  # begin of sequence
    eos_id: int | None  # end of sequence
    pad_id: int  # never eos_id
    vocab_size: int  # every id is below it
    special_tokens: dict[
        str, str
    ]  # the texts of bos_token, eos_token, pad_token, unk_token, those of them that it has
    chat_template: str | None  # Jinja, from chat_template.jinja or tokenizer_config.json

    def __init__(self, directory: Path, backend: "_TokenizerJson | _SentencePiece", config: dict):
        self._directory, self._backend = directory, backend
        self.vocab_size = backend.vocab_size
        named = {role: _text_of(config[role]) for role in _ROLES if config.get(role)}
        known = {role: token for role, token in named.items() if backend.token_id(token) is not None}
        for role in named.keys() - known.keys() - {"pad_token", "unk_token"}:
            raise UserError(
                f"{directory} names {role} {named[role]!r}, which its vocabulary lacks; correct tokenizer_config.json"
            )
        backend.mark_special(known.values())
        ids = backend.default_ids | {role: backend.token_id(token) for role, token in known.items()}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.pad_id = next(
            i for i in (ids.get("pad_token"), ids.get("unk_token"), 0, 1) if i not in (None, self.eos_id)
        )
        self._prefix = backend.prefix(self.bos_id)  # what bos=True puts in front: [bos_id] or nothing
        self.special_tokens = {role: backend.token(i) for role, i in ids.items()}
        self.chat_template = _read_template(config.get("chat_template"), directory)

    @property
    def directory(self) -> Path:
        """Where its files lie."""
        return self._directory

    @property
    def puts_bos(self) -> bool:
        """Whether `encode` puts a BOS in front: a model may name one and be trained without."""
        return bool(self._prefix)

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """The ids of a text, with BOS in front (if the model has one) and, if asked for, EOS at the end.

        A text that already begins with BOS or ends with EOS gets no second one. Raises UserError for eos=True
        without an EOS.
        """
        if eos and self.eos_id is None:
            raise UserError(
                f"{self._directory} names no EOS token; name eos_token in its tokenizer_config.json"
            )
        ids = self._backend.encode(_well_formed(text))
        prefix = self._prefix if bos and ids[: len(self._prefix)] != self._prefix else []
        suffix = [self.eos_id] if eos and ids[-1:] != [self.eos_id] else []
        return prefix + ids + suffix

    def encode_with_offsets(self, text: str, mark: str = "") -> tuple[list[int], np.ndarray]:
        """The ids of a rendered conversation, and (T, 2), which characters [begin, end) each one stands for.
        No BOS is added.

        Special tokens written out are special tokens, but for those that `escape` broke up with `mark`. The
        "▁" that sentencepiece puts in front of a text stands for no character, begin = end; the bytes of one
        character stand for all of it.
        """
        return self._backend.encode_with_offsets(text, mark)

    def escape(self, text: str, mark: str) -> str:
        """Text that a person wrote, so that special tokens in it stay text in `encode_with_offsets(...,
        mark)`.

        Under `tokenizer.json` nothing is escaped: there they are special tokens, as in transformers.
        """
        return self._backend.escape(_well_formed(text), mark)

    def is_special(self, i: int) -> bool:
        """Whether an id is a special token's: one that says nothing when decoded."""
        return i in self._backend.special_ids

    def is_text(self, i: int) -> bool:
        """Whether an id says anything when decoded: it is in the vocabulary, and no special token's."""
        return 0 <= i < self.vocab_size and i not in self._backend.special_ids

    def is_open(self, i: int) -> bool:
        """Whether what an id says is known only with the ids behind it."""
        return i in self._backend.open_ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Special tokens and ids outside of the vocabulary say nothing."""
        return self._backend.decode([i for i in map(int, ids) if self.is_text(i)])

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as "<|im_end|>" or "[INST]". None if the vocabulary has no such
        token.
        """
        return self._backend.token_id(token)

    def token(self, i: int) -> str:
        """The name of a token by its id, as it stands in the vocabulary: special ones are called as they are
        written.
        """
        return self._backend.token(i)

    def fingerprint(self) -> str:
        """Changes with any byte of the files that decide what `encode` gives. The chat template is not among
        them.
        """
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


class _TokenizerJson:
    """A `tokenizer.json`, read by the tokenizers package."""

    def __init__(self, path: Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more exact
            raise UserError(f"{path} is not a tokenizer ({_one_line(error)}); fetch it again") from error
        self._tokenizer.no_truncation()  # both may be saved in the file, from someone's training run
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size()
        # A run of bytes that is not UTF-8 as a whole becomes U+FFFD as a whole, so what it says is open until
        # the run ends.
        self.open_ids = {self.token_id(f"<0x{byte:02X}>") for byte in range(256)} - {None}
        example = self._tokenizer.encode("a")
        self._prefix = example.ids[
            : [*example.special_tokens_mask, 0].index(0)
        ]  # what the post-processor puts in front
        self.default_ids = {"bos_token": self._prefix[0]} if self._prefix else {}
        self.mark_special(())

    def mark_special(self, tokens: Iterable[str]) -> None:
        """Let these tokens of the vocabulary be found whole in a text, and say nothing when decoded."""
        self._tokenizer.add_special_tokens(list(tokens))
        self.special_ids = {
            i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special
        }

    def prefix(self, bos_id: int | None) -> list[int]:
        return self._prefix

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str, mark: str) -> tuple[list[int], np.ndarray]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def escape(self, text: str, mark: str) -> str:
        return text

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, i: int) -> str:
        return self._tokenizer.id_to_token(i)


class _SentencePiece:
    """A `tokenizer.model`, read by sentencepiece."""

    open_ids = frozenset()  # a broken byte says U+FFFD on its own and changes nothing around it

    def __init__(self, path: Path, config: dict):
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path} is not a sentencepiece model ({_one_line(error)}); fetch it again"
            ) from error
        model = self._model
        self.vocab_size = model.vocab_size()
        self.special_ids = {i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i)}
        ids = {
            "bos_token": model.bos_id(),
            "eos_token": model.eos_id(),
            "pad_token": model.pad_id(),
            "unk_token": model.unk_id(),
        }
        self.default_ids = {role: i for role, i in ids.items() if i >= 0}
        self._add_bos = config.get("add_bos_token", True)

    def mark_special(self, tokens: Iterable[str]) -> None:
        self.special_ids |= {self.token_id(token) for token in tokens}

    def prefix(self, bos_id: int | None) -> list[int]:
        return [bos_id] if self._add_bos and bos_id is not None else []

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_with_offsets(self, text: str, mark: str) -> tuple[list[int], np.ndarray]:
        ids, offsets, start = [], [], 0
        for i, part in enumerate(self._special_pattern.split(text)):
            if i % 2:  # text, special token, text, ..., text
                ids.append(self.token_id(part))
                offsets.append([[start, start + len(part)]])
            elif part:
                found, places = self._encode_part(part, mark)
                ids += found
                offsets.append(places + start)
            start += len(part)
        return ids, np.concatenate(offsets or [np.empty((0, 2), dtype=np.int64)])

    def _encode_part(self, text: str, mark: str) -> tuple[list[int], np.ndarray]:
        """sentencepiece has had three ways to ask for offsets, each in some of its versions; this one needs
        none of them.
        """
        kept = np.arange(len(text) + 1)
        if mark and mark in text:
            kept = np.delete(kept, [i for i, character in enumerate(text) if character == mark])
            text = text.replace(mark, "")
        normal, origin = self._model.normalize(
            text, with_offsets=True
        )  # the pieces joined; character -> character of the text
        starts = (
            np.frombuffer(normal.encode(), dtype=np.uint8) & 0xC0
        ) != 0x80  # UTF-8: the first bytes of characters
        character_of = np.cumsum(starts) - 1  # byte -> character of `normal`
        pieces = self._model.encode(text, out_type=str)
        ids = self._model.piece_to_id(pieces)
        ends = np.cumsum(
            [1 if i in self._byte_ids else len(p.encode()) for i, p in zip(ids, pieces, strict=True)],
            dtype=np.int64,
        )
        begins = np.concatenate(([0], ends))[:-1]  # in bytes
        characters = np.stack((character_of[begins], character_of[ends - 1] + 1), axis=1)
        return ids, kept[np.array(origin)[characters]]

    def escape(self, text: str, mark: str) -> str:
        return self._special_pattern.sub(lambda found: found[0][0] + mark + found[0][1:], text)

    @cached_property
    def _byte_ids(self) -> set[int]:
        return {self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)} - {self._model.unk_id()}

    @cached_property
    def _special_pattern(self) -> re.Pattern:
        names = sorted(map(self.token, self.special_ids), key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def token_id(self, token: str) -> int | None:
        i = self._model.piece_to_id(token)  # the unknown token's id for what is not there
        return i if self._model.id_to_piece(i) == token else None

    def token(self, i: int) -> str:
        return self._model.id_to_piece(i)


def _read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def _text_of(token: str | dict | None) -> str | None:
    """A token's text: Hugging Face writes a token as its text, or as a dict with the text under "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _read_template(template: object, directory: Path) -> str | None:
    """The chat template, of several by name the default one."""
    if isinstance(template, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in template
    ):
        template = {entry["name"]: entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str | None):
        found = repr(template)[:80]
        raise UserError(
            f"{directory}: chat_template is {found}, not text or a list of texts by name; correct tokenizer_config.json"
        )
    return template


def _well_formed(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
