"""Keys and values of texts that begin and end at different times, and the passes that read more of them.

    keys, values    (layers, slots, G, max_length, K) each, one block
    lengths         how many tokens each text has; text i of n lies in slot i, n <= slots

The texts always fill the first n slots, so that a pass reads a view, `keys[layer, :n]`, and copies nothing.
When a text leaves, the last one moves into its slot.

A prompt is read behind nothing: its rows are padded on the right, where causality hides the padding. A step
reads one token of every text, each at its own position. All rows see as many keys as the longest text has,
so a mask hides the rest. Hidden values have probability 0, but 0 times NaN is NaN: whatever a slot's last
text left there is overwritten with zeros before another one comes.

Lengths are rounded up (`padded_length`): a CPU with bfloat16 instructions compiles a kernel for every new
length, and a GPU's allocator likes repeated sizes. The numbers are those of `minilora.model` for each text
alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minilora.backend.attention_mask import additive
from minilora.backend.choice import padded_length
from minilora.backend.copies import to_device
from minilora.config import ModelConfig
from minilora.model import CausalLM, attention_mask
from minilora.rope import BY_LENGTH, rope_angles


def slot_bytes(config: ModelConfig, max_length: int, dtype: torch.dtype) -> int:
    """Return the bytes of one slot's keys and values."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * max_length * dtype.itemsize


class SlotCache:
    """See the module's docstring."""

    def __init__(self, config: ModelConfig, slots: int, max_length: int, dtype: torch.dtype, device):
        G, K = config.num_key_value_heads, config.head_dim
        shape = config.num_hidden_layers, slots, G, max_length, K
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.slots, self.max_length = slots, max_length
        self.lengths: list[int] = []

    def remove(self, i: int) -> None:
        """Free slot i: the last text moves there."""
        last = self.lengths.pop()
        if i < len(self.lengths):
            for block in (self.keys, self.values):
                block[:, i] = block[:, len(self.lengths)]
            self.lengths[i] = last

    @torch.no_grad()
    def read_prompts(self, model: CausalLM, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Give each prompt the next free slot. Return the logits behind them, (prompts, V) float32."""
        first, device, config = len(self.lengths), self.keys.device, model.config
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        T = min(padded_length(int(lengths.max())), self.max_length)
        ids = torch.tensor([[*prompt, *[prompt[-1]] * (T - len(prompt))] for prompt in prompts])
        places = slice(first, first + len(prompts))

        def update(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (prompts, G, T, K)
            self.keys[layer, places, :, :T], self.values[layer, places, :, :T] = k, v
            return k, v

        own = to_device(lengths.unsqueeze(1), device) if config.rope.rope_type in BY_LENGTH else T
        positions = torch.arange(T, device=device).unsqueeze(0)

        def mask(window: int | None, x: Tensor) -> Tensor | None:
            return additive(attention_mask(T, T, window, None, device), x)

        hidden = _through_layers(
            model, to_device(ids, device), positions, own, mask, update
        )  # (prompts, T, D)
        for i, length in enumerate(lengths.tolist(), start=first):
            self.keys[:, i, :, length:] = 0
            self.values[:, i, :, length:] = 0
        self.lengths += lengths.tolist()
        last = to_device(lengths - 1, device)
        return _logits(model, hidden[torch.arange(len(prompts), device=device), last])

    @torch.no_grad()
    def read_tokens(self, model: CausalLM, tokens: Sequence[int]) -> Tensor:
        """Read one more token of every text. Return the logits behind them, (n, V) float32."""
        n, device, config = len(tokens), self.keys.device, model.config
        S = min(padded_length(max(self.lengths) + 1), self.max_length)
        positions = to_device(torch.tensor(self.lengths), device)  # (n,) of the new tokens
        rows = torch.arange(n, device=device)

        def update(layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (n, G, 1, K)
            self.keys[layer, rows, :, positions] = k.squeeze(2)
            self.values[layer, rows, :, positions] = v.squeeze(2)
            return self.keys[layer, :n, :, :S], self.values[layer, :n, :, :S]

        key, query = torch.arange(S, device=device), positions.view(n, 1, 1, 1)

        def mask(window: int | None, x: Tensor) -> Tensor | None:
            seen = key <= query  # (n, 1, 1, S)
            return additive(seen if window is None else seen & (key > query - window), x)

        own = positions.unsqueeze(1) + 1 if config.rope.rope_type in BY_LENGTH else S
        ids = to_device(torch.tensor(tokens), device).unsqueeze(1)
        hidden = _through_layers(model, ids, positions.unsqueeze(1), own, mask, update)
        self.lengths = [length + 1 for length in self.lengths]
        return _logits(model, hidden.squeeze(1))


class _Writer:
    """The part of a KVCache that a layer calls."""

    def __init__(self, update: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]):
        self.update = update


def _through_layers(
    model: CausalLM,
    ids: Tensor,  # (Bt, T)
    positions: Tensor,  # (Bt or 1, T)
    lengths: int | Tensor,  # of the texts, or (Bt, 1): for RoPE that depends on it
    mask: Callable[[int | None, Tensor], Tensor | None],  # window, x -> what to add to the scores
    update: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Tensor:
    """Return hidden states behind the final norm, (Bt, T, D)."""
    decoder, config = model.model, model.config
    x = decoder.embed_tokens(ids)  # (Bt, T, D)
    cos, sin = (t.to(x.dtype) for t in rope_angles(config, positions, lengths))  # (Bt or 1, T, K)
    masks = {window: mask(window, x) for window in set(config.layer_windows)}
    x, writer = x.flatten(0, 1), _Writer(update)  # (N, D)
    for layer, window in zip(decoder.layers, config.layer_windows, strict=True):
        x = layer(x, cos, sin, masks[window], writer)
    return decoder.norm(x).view(*ids.shape, -1)


def _logits(model: CausalLM, hidden: Tensor) -> Tensor:
    """Return the head's output for one token of each row: (Bt, D) -> (Bt, V) float32."""
    return model.lm_head(hidden.unsqueeze(1)).squeeze(1).float()
