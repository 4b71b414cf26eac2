"""The tokenizer of a model directory, in the two forms that llama.cpp knows.

llama   sentencepiece's BPE with bytes as a fallback (Llama 1 and 2, Mistral). The text is one string of characters, "▁" for a
        space; of all neighbours the pair whose union has the highest score is joined, until no union is a
        token: tokens and scores. A tokenizer.json of the same kind holds a list of merges instead of scores;
        what is merged earlier scores higher, so the negative rank is the score.
gpt2    BPE over bytes (Llama 3, Qwen). The text is first split into words by a regular expression, and only within a word are
        neighbours joined, by the list of merges. llama.cpp has the expressions compiled in, so the file names
        one of them (`tokenizer.ggml.pre`). An expression without a name there is refused: other words are
        other tokens.

Of a directory with both files tokenizer.json is read, as in `tokenizer.py`. Tokens that the embedding has
rows for and the tokenizer has no text for are written as unused ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor

from minilora.system.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens

# How a tokenizer.json splits a text into words, step by step -> what llama.cpp calls it.
_SPLITS = {
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "llama-bpe",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "qwen2",
    (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "tekken",
    ("digits", "gpt2"): "smollm",
    ("gpt2",): "gpt-2",
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llama.cpp wants it. Lists are by token id, and as long as the embedding."""

    kind: str  # llama | gpt2
    pre: str  # how gpt2 splits a text into words; "default" for llama, which does not
    tokens: list[str]
    types: list[int]
    scores: list[float] | None  # llama: what is joined first
    merges: list[str] | None  # gpt2: the same, as "left right"
    space_prefix: bool  # llama: a text begins with a space that is not in it
    unknown_id: int | None
    normalizes: bool  # the tokenizer rewrites a text first (NFC, NFKC, ...), which llama.cpp does not


def read_vocabulary(directory: Path, size: int) -> Vocabulary:
    """The tokenizer in a model directory, for a model with `size` rows of embedding.

    Raises UserError for a tokenizer that llama.cpp has no form for.
    """
    if (path := directory / "tokenizer.json").is_file():
        return _from_tokenizer_json(path, size)
    return _from_sentencepiece(directory / "tokenizer.model", size)


def _from_sentencepiece(path: Path, size: int) -> Vocabulary:
    model = SentencePieceProcessor(model_file=str(path))
    ids, padding = range(model.vocab_size()), range(model.vocab_size(), size)
    _check_size(path, len(ids), size)
    scores = [model.get_score(i) for i in ids]
    if any(
        score != int(score) for score in scores
    ):  # BPE counts its merges, a unigram model has log-probabilities
        raise UserError(
            f"{path} is a unigram model, and llama.cpp has only BPE for these models: write a directory"
        )
    kinds = {
        UNKNOWN: model.is_unknown,
        CONTROL: model.is_control,
        UNUSED: model.is_unused,
        BYTE: model.is_byte,
    }
    return Vocabulary(
        kind="llama",
        pre="default",
        tokens=[model.id_to_piece(i) for i in ids] + [f"[PAD{i}]" for i in padding],
        types=[next((kind for kind, holds in kinds.items() if holds(i)), NORMAL) for i in ids]
        + [UNUSED] * len(padding),
        scores=scores + [0.0] * len(padding),
        merges=None,
        space_prefix=model.encode("a", out_type=str)[0].startswith("▁"),
        unknown_id=model.unk_id(),
        normalizes=model.decode(model.encode("a  ﬁ")) != "a  ﬁ",
    )


def _from_tokenizer_json(path: Path, size: int) -> Vocabulary:
    raw = json.loads(path.read_text(encoding="utf-8"))
    model, added = raw["model"], {token["id"]: token for token in raw.get("added_tokens") or []}
    if model.get("type") != "BPE":
        raise UserError(
            f"{path} is of type {model.get('type')!r}, and llama.cpp has only BPE for these models: write a directory"
        )
    texts = {i: token for token, i in model["vocab"].items()} | {
        i: token["content"] for i, token in added.items()
    }
    _check_size(path, max(texts) + 1, size)
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(size)]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    is_llama, unknown = bool(model.get("byte_fallback")), model.get("unk_token")
    backend = tokenizers.Tokenizer.from_file(str(path))

    def type_of(i: int) -> int:
        if i not in texts:
            return UNUSED
        if is_llama and tokens[i] == unknown:
            return UNKNOWN
        if i in added:
            return CONTROL if added[i]["special"] else USER_DEFINED
        return BYTE if is_llama and _is_byte(tokens[i]) else NORMAL

    types = [type_of(i) for i in range(size)]
    scores = None
    if is_llama:
        ranks = {}
        for rank, pair in enumerate(merges):
            ranks.setdefault("".join(pair), rank)
        scores = [-float(ranks.get(token, 0)) for token in tokens]
        tokens = [
            token.replace("▁", " ") if kind == USER_DEFINED else token
            for token, kind in zip(tokens, types, strict=True)
        ]
    return Vocabulary(
        kind="llama" if is_llama else "gpt2",
        pre="default" if is_llama else _split_name(path, raw.get("pre_tokenizer")),
        tokens=tokens,
        types=types,
        scores=scores,
        merges=None if is_llama else [" ".join(pair) for pair in merges],
        space_prefix=is_llama and backend.encode("a", add_special_tokens=False).tokens[0].startswith("▁"),
        unknown_id=backend.token_to_id(unknown) if unknown else None,
        normalizes=backend.decode(backend.encode("a  ﬁ e\u0301", add_special_tokens=False).ids)
        != "a  ﬁ e\u0301",
    )


def _check_size(path: Path, tokens: int, size: int) -> None:
    if tokens > size:
        raise UserError(
            f"{path} has {tokens} tokens, and the model's embedding {size} rows: they do not belong together"
        )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _split_name(path: Path, pre_tokenizer: dict | None) -> str:
    """llama.cpp's name for the way in which a tokenizer.json splits a text into words."""
    steps: list[str] = []
    for step in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}]):
        if step.get("type") == "Split":
            steps.append(step["pattern"].get("Regex", "") if step.get("behavior") == "Isolated" else "?")
        elif step.get("type") == "Digits":
            steps.append("digits" if step.get("individual_digits") else "?")
        elif step.get("type") == "ByteLevel":
            steps += ["gpt2"] if step.get("use_regex", True) else []
        else:
            steps.append(str(step.get("type")))
    if (name := _SPLITS.get(tuple(steps))) is None:
        shown = _shorten(" then ".join(steps) or "nothing")
        raise UserError(
            f"{path} splits texts in a way for which llama.cpp has no name known here ({shown}): write a directory"
        )
    return name


def _shorten(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[:most] + "..."
