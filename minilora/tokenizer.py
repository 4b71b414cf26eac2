"""Text to token ids and back: one interface over sentencepiece's `tokenizer.model` and the `tokenizer.json` of tokenizers.

A model directory holds one of the two files or both. With both, `tokenizer.json` is read: it also holds the tokens that were
added after sentencepiece's training, such as <|im_start|>, which `tokenizer.model` cannot.

Special tokens have one owner. `encode` alone puts BOS in front, exactly one, and none for a model that was trained without
(Qwen). Who decides whether a directory has a BOS to put:

    tokenizer.json   its own post-processor; add_bos_token of tokenizer_config.json is ignored, as transformers 5 ignores it
    tokenizer.model  add_bos_token; where it is absent yes, as Llama and Mistral were trained (transformers 5 then puts none)

A special token written out in the text, "</s>", becomes that token under `tokenizer.json`, as in transformers, and stays the
four characters that it is under `tokenizer.model`, as in sentencepiece. Whoever needs such a token by its id asks `token_id`.

Padding never is EOS: whoever masks padding by its id would mask the end of every text with it, and teach a model not to stop.
It is the tokenizer's own padding token, else the unknown token, else 0. Which one changes no result here, where rows are
masked by their lengths.

A Python string may hold halves of a surrogate pair, which are no text and have no UTF-8. `encode` joins the pairs and replaces
a half by U+FFFD, as every UTF-8 decoder does.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor

from minilora.errors import UserError

_FILES = (
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
    """The tokenizer of a model directory. Raises UserError if there is none, or if it is damaged or incomplete."""
    directory = Path(directory)
    config, specials = _read_json(directory / "tokenizer_config.json"), _read_json(directory / "special_tokens_map.json")
    # transformers reads special_tokens_map.json only where the newer added_tokens_decoder is absent.
    config = specials | config if "added_tokens_decoder" in config else config | specials
    added = {_text_of(token): int(i) for i, token in (config.get("added_tokens_decoder") or {}).items()}
    added |= _read_json(directory / "added_tokens.json")
    if (path := directory / "tokenizer.json").is_file():
        backend = _TokenizerJson(path)
    elif (path := directory / "tokenizer.model").is_file():
        backend = _SentencePiece(path, config)
    else:
        raise UserError(f"{directory} holds no tokenizer: neither tokenizer.json nor tokenizer.model is there")
    for token, i in added.items():
        if backend.token_id(token) != i:
            raise UserError(f"{directory} adds {token!r} as id {i}, which its {path.name} lacks; it needs a tokenizer.json with it")
    return Tokenizer(directory, backend, config)


class Tokenizer:
    """Text to token ids and back. Made by `load_tokenizer`."""

    bos_id: int | None  # begin of sequence
    eos_id: int | None  # end of sequence
    pad_id: int  # never eos_id
    vocab_size: int  # every id is below it

    def __init__(self, directory: Path, backend: "_TokenizerJson | _SentencePiece", config: dict):
        self._directory, self._backend = directory, backend
        self.vocab_size = backend.vocab_size
        named = {role: _text_of(config[role]) for role in _ROLES if config.get(role)}
        known = {role: token for role, token in named.items() if backend.token_id(token) is not None}
        for role in named.keys() - known.keys() - {"pad_token", "unk_token"}:
            raise UserError(f"{directory} names {role} {named[role]!r}, which its vocabulary lacks; correct tokenizer_config.json")
        backend.mark_special(known.values())
        ids = backend.default_ids | {role: backend.token_id(token) for role, token in known.items()}
        self.bos_id, self.eos_id = ids.get("bos_token"), ids.get("eos_token")
        self.pad_id = next(i for i in (ids.get("pad_token"), ids.get("unk_token"), 0, 1) if i not in (None, self.eos_id))
        self._prefix = backend.prefix(self.bos_id)  # what bos=True puts in front: [bos_id] or nothing

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """The ids of a text, with BOS in front (if the model has one) and, if asked for, EOS at the end.

        A text that already begins with BOS or ends with EOS gets no second one. Raises UserError for eos=True without an EOS.
        """
        if eos and self.eos_id is None:
            raise UserError(f"{self._directory} names no EOS token; name eos_token in its tokenizer_config.json")
        ids = self._backend.encode(_well_formed(text))
        prefix = self._prefix if bos and ids[: len(self._prefix)] != self._prefix else []
        suffix = [self.eos_id] if eos and ids[-1:] != [self.eos_id] else []
        return prefix + ids + suffix

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Special tokens and ids outside of the vocabulary say nothing."""
        return self._backend.decode([i for i in map(int, ids) if self._is_text(i)])

    def token_id(self, token: str) -> int | None:
        """The id of a token by its name, such as "<|im_end|>" or "[INST]". None if the vocabulary has no such token."""
        return self._backend.token_id(token)

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files, unchanged, to another directory."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            source, target = self._directory / name, directory / name
            if source.is_file() and not (target.exists() and source.samefile(target)):
                shutil.copyfile(source, target)

    def _is_text(self, i: int) -> bool:
        return 0 <= i < self.vocab_size and i not in self._backend.special_ids


class StreamDecoder:
    """Text of ids that come one at a time. What `feed` and `flush` return, joined, is `decode` of all ids.

    A token need not be whole characters: an emoji may be four tokens of one byte. And what a token says depends on the one
    before it: sentencepiece's "▁Hello" is "Hello" at the start of a text and " Hello" elsewhere. So tokens wait until their
    text is whole, and are decoded together with the ones that came out last, whose own text is then cut off in front.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens whose text was returned last
        self._waiting: list[int] = []  # tokens whose text is not whole yet

    def feed(self, token_id: int) -> str:
        """The text that became whole with this token, often all of its own, sometimes none."""
        token_id = int(token_id)
        if not self._tokenizer._is_text(token_id):
            return ""
        self._waiting.append(token_id)
        text = self._text()
        if text.endswith("\ufffd") or token_id in self._tokenizer._backend.open_ids:
            return ""
        self._context, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """The text still waiting, broken characters as U+FFFD. The next `feed` begins another text."""
        text = self._text()
        self._context, self._waiting = [], []
        return text

    def _text(self) -> str:
        known = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._waiting)[len(known) :]


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
        # A run of bytes that is not UTF-8 as a whole becomes U+FFFD as a whole, so what it says is open until the run ends.
        self.open_ids = {self.token_id(f"<0x{byte:02X}>") for byte in range(256)} - {None}
        example = self._tokenizer.encode("a")
        self._prefix = example.ids[: [*example.special_tokens_mask, 0].index(0)]  # what the post-processor puts in front
        self.default_ids = {"bos_token": self._prefix[0]} if self._prefix else {}
        self.mark_special(())

    def mark_special(self, tokens: Iterable[str]) -> None:
        """Let these tokens of the vocabulary be found whole in a text, and say nothing when decoded."""
        self._tokenizer.add_special_tokens(list(tokens))
        self.special_ids = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    def prefix(self, bos_id: int | None) -> list[int]:
        return self._prefix

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class _SentencePiece:
    """A `tokenizer.model`, read by sentencepiece."""

    open_ids = frozenset()  # a broken byte says U+FFFD on its own and changes nothing around it

    def __init__(self, path: Path, config: dict):
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} is not a sentencepiece model ({_one_line(error)}); fetch it again") from error
        model = self._model
        self.vocab_size = model.vocab_size()
        self.special_ids = {i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i)}
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "pad_token": model.pad_id(), "unk_token": model.unk_id()}
        self.default_ids = {role: i for role, i in ids.items() if i >= 0}
        self._add_bos = config.get("add_bos_token", True)

    def mark_special(self, tokens: Iterable[str]) -> None:
        self.special_ids |= {self.token_id(token) for token in tokens}

    def prefix(self, bos_id: int | None) -> list[int]:
        return [bos_id] if self._add_bos and bos_id is not None else []

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def token_id(self, token: str) -> int | None:
        i = self._model.piece_to_id(token)  # the unknown token's id for what is not there
        return i if self._model.id_to_piece(i) == token else None


def _read_json(path: Path) -> dict:
    """The object in a JSON file; an empty one if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _text_of(token: str | dict | None) -> str | None:
    """A token's text: Hugging Face writes a token as its text, or as a dict with the text under "content"."""
    return token.get("content") if isinstance(token, dict) else token


def _well_formed(text: str) -> str:
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
