"""The two kinds of tokenizer that a model directory may hold, behind `minilora.data.tokenizer.Tokenizer`.

    TokenizerJson    tokenizer.json, read by the tokenizers package
    SentencePiece    tokenizer.model, read by sentencepiece

Both have the same methods and attributes:

    vocab_size       every id is below it
    special_ids      ids that decode to nothing
    default_ids      {"bos_token": 1, ...}: the special tokens that the file itself names
    unsettled_ids    ids whose text depends on the ids behind them

Both packages are compiled libraries, and a damaged or hostile file makes them raise whatever they like: the
tokenizers package even a panic of Rust. All of it comes out as one UserError that names the file.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from sentencepiece import SentencePieceProcessor

from minilora.system.errors import UserError

_MAX_TOKENS = 10_000_000  # far above every vocabulary; lists as long as the largest id are made of it


class TokenizerJson:
    """A `tokenizer.json`, read by the tokenizers package."""

    def __init__(self, path: Path):
        self._path = path
        with _without_panic_messages(), _blaming(path):
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
            # A training run may have saved both settings in the file.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            example = self._tokenizer.encode("a")
        largest = max(self._tokenizer.get_vocab().values(), default=0)
        if largest >= _MAX_TOKENS:
            raise UserError(f"{path} has a token {largest}; at most {_MAX_TOKENS:,} tokens are supported")
        self.vocab_size = max(self._tokenizer.get_vocab_size(), largest + 1)  # ids may have gaps
        # A run of byte tokens that is not UTF-8 as a whole decodes to U+FFFD as a whole. So the next byte
        # token can still change the text of those before it.
        self.unsettled_ids = {self.token_id(f"<0x{byte:02X}>") for byte in range(256)} - {None}
        # The post-processor's prefix: the special tokens that it puts in front of a text.
        self._prefix = example.ids[: [*example.special_tokens_mask, 0].index(0)]
        if absent := [i for i in self._prefix if self.token(i) is None]:
            raise UserError(f"{path} puts token {absent[0]} in front of a text, which its vocabulary lacks")
        self.default_ids = {"bos_token": self._prefix[0]} if self._prefix else {}
        self.mark_special(())

    def mark_special(self, tokens: Iterable[str]) -> None:
        """Make these tokens of the vocabulary special: found whole in a text, decoded to nothing."""
        with _blaming(self._path):
            self._tokenizer.add_special_tokens(list(tokens))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {i for i, token in added.items() if token.special}

    def prefix(self, bos_id: int | None) -> list[int]:
        """Return the ids in front of every text: those of the post-processor, whatever `bos_id` is."""
        return self._prefix

    def encode(self, text: str) -> list[int]:
        with _blaming(self._path):
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str, mark: str) -> tuple[list[int], np.ndarray]:
        with _blaming(self._path):
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def escape(self, text: str, mark: str) -> str:
        return text  # a special token in a text is a special token, as in transformers

    def decode(self, ids: list[int]) -> str:
        with _blaming(self._path):
            return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id)


class SentencePiece:
    """A `tokenizer.model`, read by sentencepiece."""

    unsettled_ids = frozenset()  # a broken byte decodes to U+FFFD by itself and changes no text around it

    def __init__(self, path: Path, config: dict):
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except (
            OSError,
            RuntimeError,
            UnicodeDecodeError,
        ) as error:  # the last if the message quotes the file
            message = f"{path} is not a sentencepiece model ({_one_line(error)}); fetch it again"
            raise UserError(message) from error
        model = self._model
        self.vocab_size = model.vocab_size()
        self.special_ids = {i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i)}
        ids = {
            "bos_token": model.bos_id(),
            "eos_token": model.eos_id(),
            "pad_token": model.pad_id(),
            "unk_token": model.unk_id(),
        }
        self.default_ids = {role: i for role, i in ids.items() if i >= 0}  # -1: the model has no such token
        self._add_bos = config.get("add_bos_token", True)  # null means false, as in transformers 4
        self._added_ids = {int(i) for i in config.get("added_tokens_decoder") or {}}
        self._space_id = model.piece_to_id("▁")

    def mark_special(self, tokens: Iterable[str]) -> None:
        """Make these tokens of the vocabulary special: decoded to nothing."""
        self.special_ids |= {self.token_id(token) for token in tokens}

    def prefix(self, bos_id: int | None) -> list[int]:
        """Return the ids in front of every text: BOS, unless add_bos_token is false."""
        return [bos_id] if self._add_bos and bos_id is not None else []

    def encode(self, text: str) -> list[int]:
        ids = self._model.encode(text)
        return ids[self._unneeded(ids) :]

    def _unneeded(self, ids: list[int]) -> int:
        """Return 1 if a "▁" stands before an added token that begins a text. transformers puts none there."""
        return int(ids[:1] == [self._space_id] and ids[1:2] != [] and ids[1] in self._added_ids)

    def encode_with_offsets(self, text: str, mark: str) -> tuple[list[int], np.ndarray]:
        ids, offsets, start = [], [], 0
        for i, part in enumerate(self._special_pattern.split(text)):  # text, special token, text, ..., text
            if i % 2:
                ids.append(self.token_id(part))
                offsets.append([[start, start + len(part)]])
            elif part:
                part_ids, part_offsets = self._encode_part(part, mark)
                ids += part_ids
                offsets.append(part_offsets + start)
            start += len(part)
        return ids, np.concatenate(offsets or [np.empty((0, 2), dtype=np.int64)])

    def _encode_part(self, text: str, mark: str) -> tuple[list[int], np.ndarray]:
        """Return the ids of a text without special tokens, and the characters [start, end) of each, (T, 2).

        Offsets are computed here, since sentencepiece's own interface to them changed between versions. The
        way back: pieces -> bytes -> characters of the normalized text -> characters of `text`.
        """
        # Remove the escape marks. Character i of the unmarked text was text[kept[i]].
        kept = np.arange(len(text) + 1)
        if mark and mark in text:
            kept = np.delete(kept, [i for i, character in enumerate(text) if character == mark])
            text = text.replace(mark, "")

        # Character i of the normalized text was character origin[i] of the unmarked text.
        normalized, origin = self._model.normalize(text, with_offsets=True)

        # Byte i of the normalized text belongs to its character character_of_byte[i]. In UTF-8, all bytes of
        # a character but the first are 10xxxxxx.
        first_bytes = (np.frombuffer(normalized.encode(), dtype=np.uint8) & 0xC0) != 0x80
        character_of_byte = np.cumsum(first_bytes) - 1

        # The pieces, joined, are the normalized text: piece i is its bytes [starts[i], ends[i]). The piece
        # "<0xF0>" is a single byte.
        pieces = self._model.encode(text, out_type=str)
        ids = self._model.piece_to_id(pieces)
        byte_counts = [
            1 if i in self._byte_ids else len(piece.encode()) for i, piece in zip(ids, pieces, strict=True)
        ]
        ends = np.cumsum(byte_counts, dtype=np.int64)
        starts = np.concatenate(([0], ends))[:-1]

        characters = np.stack((character_of_byte[starts], character_of_byte[ends - 1] + 1), axis=1)
        first = self._unneeded(ids)
        return ids[first:], kept[np.array(origin)[characters]][first:]

    def escape(self, text: str, mark: str) -> str:
        """Return the text with `mark` behind the first character of every special token in it."""
        return self._special_pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)

    @cached_property
    def _byte_ids(self) -> set[int]:
        return {self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)} - {self._model.unk_id()}

    @cached_property
    def _special_pattern(self) -> re.Pattern:
        names = sorted(map(self.token, self.special_ids), key=len, reverse=True)  # the longest match first
        return re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def token_id(self, token: str) -> int | None:
        i = self._model.piece_to_id(token)  # an absent token has the id of the unknown token
        return i if self._model.id_to_piece(i) == token else None

    def token(self, token_id: int) -> str:
        return self._model.id_to_piece(token_id)


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Turn whatever the tokenizers package raises into a UserError that names its file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # it raises no narrower class, and its panics are not even an Exception
        raise UserError(f"{path} is not a tokenizer ({_one_line(error)}); fetch it again") from error


@contextmanager
def _without_panic_messages() -> Iterator[None]:
    """Close the standard error stream to Rust, which prints a panic there before Python hears of it."""
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
