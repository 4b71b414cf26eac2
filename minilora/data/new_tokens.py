"""New tokens in a model's tokenizer: files that give every program the same ids.

    tokenizer.json     the tokenizers package adds them and writes the file
    tokenizer.model    sentencepiece's protobuf. Its fields come in any order, so new elements of its list of
                       pieces may stand at the end of the file

A new token is found whole wherever it stands in a text; a special one also decodes to nothing. sentencepiece
has no such kind: its control pieces are never found in a text. So all new pieces are "user defined" there,
and `added_tokens_decoder` in tokenizer_config.json names the special ones, as in transformers. A piece holds
no space: sentencepiece replaces the spaces of a text before it looks for pieces.

New ids follow the last one. First come the plain tokens and then the special ones, LLaMA-Factory's order. A
token that the vocabulary has already keeps its id, and the files stay as they are.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from minilora.data.tokenizer import Tokenizer, load_tokenizer
from minilora.system.errors import UserError
from minilora.system.files import read_json, write_whole
from minilora.system.schema import shown

MOST_NEW_TOKENS, LONGEST_TOKEN = 10_000, 200  # tokens, and characters of one
_USER_DEFINED = 4  # sentencepiece's ModelProto.SentencePiece.Type
_CONFIG_FILE = "tokenizer_config.json"
_SENTENCEPIECE_CLASS = "LlamaTokenizer"  # transformers' for Llama's and Mistral's tokenizer.model


def check_new_tokens(tokens: Sequence[str]) -> None:
    """Raise UserError for texts that cannot be tokens, and for one that is there twice."""
    if len(tokens) > MOST_NEW_TOKENS:
        raise UserError(f"{len(tokens):,} new tokens are too many; at most {MOST_NEW_TOKENS:,} are added")
    seen = set()
    for token in tokens:
        if not token.strip() or len(token) > LONGEST_TOKEN or not _is_utf8(token):
            raise UserError(
                f"{shown(token)} cannot be a token: write 1 to {LONGEST_TOKEN} characters, not only spaces"
            )
        if token in seen:
            raise UserError(f"the new token {shown(token)} is there twice; leave one of them out")
        seen.add(token)


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)  # halves of a surrogate pair


def add_new_tokens(
    tokenizer: Tokenizer, plain: Sequence[str], special: Sequence[str], target: Path
) -> Tokenizer:
    """Write a tokenizer's files with new tokens to the directory `target`. Returns the tokenizer read there.

    Raises UserError for texts that cannot be tokens.
    """
    check_new_tokens([*plain, *special])
    new = [token for token in (*plain, *special) if tokenizer.token_id(token) is None]
    is_json = (tokenizer.directory / "tokenizer.json").is_file()
    if spaced := [token for token in new if not is_json and {" ", "▁"} & set(token)]:
        raise UserError(f"{shown(spaced[0])} holds a space, which no piece of a tokenizer.model does")
    tokenizer.save(target)
    if not new:
        return load_tokenizer(target)
    if is_json:
        ids = _add_to_json(target / "tokenizer.json", new, special)
    else:
        path = target / "tokenizer.model"
        write_whole(path, path.read_bytes() + b"".join(map(_piece, new)))
        ids = {token: tokenizer.vocab_size + i for i, token in enumerate(new)}
    entries = {str(ids[token]): _entry(token, token in special) for token in new}
    _name_in_config(target / _CONFIG_FILE, entries, always=not is_json)
    return load_tokenizer(target)


# ---- tokenizer.json ----


def _add_to_json(path: Path, new: Sequence[str], special: Sequence[str]) -> dict[str, int]:
    """Return token -> id."""
    backend = tokenizers.Tokenizer.from_file(str(path))
    for token in new:  # one by one: the order decides the ids
        # Not normalized: a text is searched for the token as it is, before anything in it changes.
        added = AddedToken(token, special=token in special, normalized=False)
        (backend.add_special_tokens if token in special else backend.add_tokens)([added])
    write_whole(path, backend.to_str(pretty=True))
    return {token: backend.token_to_id(token) for token in new}


# ---- tokenizer.model ----


def _piece(token: str) -> bytes:
    """One more element of ModelProto.pieces, field 1: a message with the text in field 1, the type in 3."""
    return _bytes_field(1, _bytes_field(1, token.encode()) + bytes([3 << 3, _USER_DEFINED]))


def _bytes_field(number: int, content: bytes) -> bytes:
    """A field of a protobuf: number and wire type 2, the length in groups of 7 bits, the content."""
    length, groups = len(content), []
    while length > 127:
        groups.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *groups, length]) + content


# ---- tokenizer_config.json ----


def _entry(token: str, is_special: bool) -> dict:
    """A token as transformers writes it in added_tokens_decoder."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": is_special}


def _name_in_config(path: Path, entries: dict[str, dict], always: bool) -> None:
    """Add tokens to the file's added_tokens_decoder, or make one for sentencepiece: `always`."""
    config = read_json(path) if path.is_file() else {}
    if "added_tokens_decoder" not in config:
        if not always:
            return
        # With it, this file wins over special_tokens_map.json: see `tokenizer._read_config`.
        in_map = path.with_name("special_tokens_map.json")
        config |= read_json(in_map) if in_map.is_file() else {}
        config.setdefault("tokenizer_class", _SENTENCEPIECE_CLASS)
    config["added_tokens_decoder"] = (config.get("added_tokens_decoder") or {}) | entries
    write_whole(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
