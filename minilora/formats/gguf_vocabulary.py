"""The tokenizer of a model directory, in the two forms that llama.cpp knows.

llama   sentencepiece's BPE with bytes as a fallback (Llama 1 and 2, Mistral). The text is one string of
        characters, with "▁" for a space. Of all neighbours, the pair whose union has the highest score is
        joined, until no union is a token. So the file needs tokens and scores. A tokenizer.json of the same
        form holds a list of merges. An earlier merge scores higher, so its negative rank is the score.
gpt2    BPE over bytes (Llama 3, Qwen). A regular expression first splits the text into words. The list of
        merges then joins neighbours within a word only. llama.cpp has the expressions compiled in, so the
        file names one of them (`tokenizer.ggml.pre`). An expression that llama.cpp has no name for is
        refused: other words would give other tokens.

If a directory has both files, tokenizer.json is read, as in `tokenizer.py`. An embedding may have more rows
than the tokenizer has tokens; the remaining rows are written as unused tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor

from minilora.system.errors import UserError
from minilora.system.files import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens

# The steps in which a tokenizer.json splits a text into words -> llama.cpp's name for them.
_SPLITS = {
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "llama-bpe",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
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
    """A tokenizer in llama.cpp's terms. Lists are by token id, and as long as the embedding."""

    model: str  # llama | gpt2
    pre: str  # gpt2: the name of the split into words; "default" for llama, which does not split
    tokens: list[str]
    types: list[int]
    scores: list[float] | None  # llama: the pair whose union scores highest is joined first
    merges: list[str] | None  # gpt2: pairs as "left right"; the first in the list is joined first
    space_prefix: bool  # llama: the tokenizer puts a space before the text
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
    # BPE's scores count its merges. A unigram model's scores are log-probabilities.
    if any(score != int(score) for score in scores):
        raise UserError(
            f"{path} is a unigram model, and llama.cpp has only BPE for these models: write a directory"
        )
    added = _added_types(path.with_name("tokenizer_config.json"))
    types = [_sentencepiece_type(model, i) for i in ids]
    types = [added.get(i, NORMAL) if t == NORMAL else t for i, t in enumerate(types)]
    text = "a  ﬁ"  # Normalization would join the spaces, and take the ligature apart.
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=[model.id_to_piece(i) for i in ids] + [f"[PAD{i}]" for i in padding],
        types=types + [UNUSED] * len(padding),
        scores=scores + [0.0] * len(padding),
        merges=None,
        space_prefix=model.encode("a", out_type=str)[0].startswith("▁"),
        unknown_id=model.unk_id(),
        normalizes=model.decode(model.encode(text)) != text,
    )


def _sentencepiece_type(model: SentencePieceProcessor, i: int) -> int:
    if model.is_unknown(i):
        return UNKNOWN
    if model.is_control(i):
        return CONTROL
    if model.is_unused(i):
        return UNUSED
    return BYTE if model.is_byte(i) else NORMAL


def _added_types(path: Path) -> dict[int, int]:
    """Id -> type of the tokens that were added later, which llama.cpp looks for first (`new_tokens.py`)."""
    decoder = read_json(path).get("added_tokens_decoder") if path.is_file() else None
    return {
        int(i): CONTROL if token.get("special") else USER_DEFINED
        for i, token in (decoder or {}).items()
        if isinstance(token, dict)
    }


def _from_tokenizer_json(path: Path, size: int) -> Vocabulary:
    raw = json.loads(path.read_text(encoding="utf-8"))
    model = raw["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"{path} is of type {model.get('type')!r}, and llama.cpp has only BPE for these models: "
            "write a directory"
        )
    is_llama, unknown = bool(model.get("byte_fallback")), model.get("unk_token")
    tokens, types = _json_tokens(path, raw, size)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    scores = None
    if is_llama:
        scores = _scores(tokens, pairs)
        for i in range(size):
            if types[i] == USER_DEFINED:  # llama.cpp finds these in the text before it replaces spaces
                tokens[i] = tokens[i].replace("▁", " ")
    backend = tokenizers.Tokenizer.from_file(str(path))
    text = "a  ﬁ e\u0301"  # Normalization would also join the letter and its accent.
    return Vocabulary(
        model="llama" if is_llama else "gpt2",
        pre="default" if is_llama else _split_name(path, raw.get("pre_tokenizer")),
        tokens=tokens,
        types=types,
        scores=scores,
        merges=None if is_llama else [" ".join(pair) for pair in pairs],
        space_prefix=is_llama and backend.encode("a", add_special_tokens=False).tokens[0].startswith("▁"),
        unknown_id=backend.token_to_id(unknown) if unknown else None,
        normalizes=backend.decode(backend.encode(text, add_special_tokens=False).ids) != text,
    )


def _json_tokens(path: Path, raw: dict, size: int) -> tuple[list[str], list[int]]:
    """The text and the type of every token id below `size`."""
    model, added = raw["model"], {token["id"]: token for token in raw.get("added_tokens") or []}
    texts = {i: token for token, i in model["vocab"].items()}
    texts |= {i: token["content"] for i, token in added.items()}
    _check_size(path, max(texts) + 1, size)
    is_llama = bool(model.get("byte_fallback"))  # only this form has unknown tokens and byte tokens
    types = []
    for i in range(size):
        token = texts.get(i)
        if token is None:
            types.append(UNUSED)
        elif is_llama and token == model.get("unk_token"):
            types.append(UNKNOWN)
        elif i in added:
            types.append(CONTROL if added[i]["special"] else USER_DEFINED)
        else:
            types.append(BYTE if is_llama and _is_byte(token) else NORMAL)
    return [texts.get(i, f"[PAD{i}]") for i in range(size)], types


def _scores(tokens: list[str], pairs: list[list[str]]) -> list[float]:
    """Minus the rank of the first merge that makes each token, and 0 for a token that no merge makes."""
    ranks = {}
    for rank, pair in enumerate(pairs):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, 0)) for token in tokens]


def _check_size(path: Path, tokens: int, size: int) -> None:
    if tokens > size:
        raise UserError(
            f"{path} has {tokens} tokens, and the model's embedding {size} rows: they do not belong together"
        )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _split_name(path: Path, pre_tokenizer: dict | None) -> str:
    """llama.cpp's name for the steps in which a tokenizer.json splits a text into words."""
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
            f"{path} splits texts in a way for which llama.cpp has no name known here ({shown}): "
            "write a directory"
        )
    return name


def _shorten(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[:most] + "..."
