"""Hypothesis strategies for models and their data: shapes of decoders, conversations, masks, documents."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from minilora.config import ModelConfig

# The window is drawn for each layer where the family has one, biases and norms where the family has them.
_FAMILIES = {
    "llama": {},
    "mistral": dict(windowed=True),
    "qwen2": dict(qkv_bias=True),
    "qwen3": dict(qk_norm=True),
}


@st.composite
def model_configs(draw: st.DrawFn, max_layers: int = 3, max_heads: int = 4) -> ModelConfig:
    """Shapes of decoders that minilora and transformers know, small enough to run in milliseconds."""
    family = dict(_FAMILIES[name := draw(st.sampled_from(sorted(_FAMILIES)))])
    windowed = family.pop("windowed", False)
    groups = draw(st.integers(1, max_heads))
    heads = groups * draw(st.integers(1, max(1, max_heads // groups)))  # G divides H
    layers = draw(st.integers(1, max_layers))
    window = draw(st.none() | st.integers(1, 9)) if windowed else None
    return ModelConfig(
        model_type=name,
        vocab_size=draw(st.integers(8, 64)),
        hidden_size=8 * draw(st.integers(1, 4)),
        intermediate_size=4 * draw(st.integers(1, 8)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=2 * draw(st.integers(1, 4)),
        layer_windows=(window,) * layers,
        tie_word_embeddings=draw(st.booleans()),
        **family,
    )


@st.composite
def conversations(
    draw: st.DrawFn, max_turns: int = 3, text: st.SearchStrategy[str] | None = None
) -> list[dict[str, str]]:
    """Messages as chat templates take them: a system message or none, then user and assistant in turn, an
    answer last. Contents are any text that is not blank.
    """
    words = (
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20) if text is None else text
    )
    words = words.filter(lambda content: content.strip())
    messages = [dict(role="system", content=draw(words))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, max_turns))):
        messages += [dict(role=role, content=draw(words)) for role in ("user", "assistant")]
    return messages


def document_lengths(max_tokens: int = 64, max_documents: int = 6) -> st.SearchStrategy[list[int]]:
    """Tokens of documents that are packed into one row: each at least 1, at most `max_tokens` together."""
    lengths = st.lists(st.integers(1, max_tokens), min_size=1, max_size=max_documents)
    return lengths.filter(lambda found: sum(found) <= max_tokens)


@st.composite
def masks(draw: st.DrawFn, max_rows: int = 4, max_tokens: int = 24) -> Tensor:
    """Attention masks, (B, T) int64: 1 for a token and 0 for padding, which stands at one end, at both, or
    anywhere. Every row has a token.
    """
    B, T = draw(st.integers(1, max_rows)), draw(st.integers(1, max_tokens))
    rows = []
    for _ in range(B):
        row = draw(
            st.lists(st.integers(0, 1), min_size=T, max_size=T) | st.integers(1, T).map(lambda n: [1] * n)
        )
        row = (row + [0] * T)[:T]
        rows.append(row if any(row) else [1] * T)
    return torch.tensor(rows)
