"""A token of decoding on a GPU, with the layers as one CUDA graph (see minilora/backend/graphs.py).

A graph repeats the same kernels on the same memory, but each token has one key more than the last. So here
attention reads a fixed number of keys, a multiple of KEYS, behind a mask that opens one place at a time. A
new graph is recorded when they are used up. The new key's place is a number on the GPU. What is before the
layers, the embedding, the angles and the mask, is a few launches of the host.

Stale keys behind the mask have probability 0, but 0 times NaN is NaN: the cache must begin as zeros.
"""

import torch
from torch import Tensor

from minilora.backend.attention_mask import row_numbers
from minilora.backend.documents import positions_in_documents
from minilora.backend.graphs import recorded
from minilora.mixed import Mixture
from minilora.model import CausalLM, KVCache, attention_mask
from minilora.rope import document_lengths, rope_angles

KEYS = 256
LEAST_TOKENS = 16  # Recording costs as much as two or three tokens.


def token_graph(model: CausalLM, cache: KVCache | None, max_new_tokens: int) -> "TokenGraph | None":
    """Return a graph for the tokens behind a prompt, or None where the host must see every module's call."""
    is_cuda = cache is not None and cache.keys.is_cuda
    if not is_cuda or max_new_tokens < LEAST_TOKENS or model.training:
        return None
    pairs = ((m._forward_hooks, m._forward_pre_hooks) for m in model.modules())
    hooks = [hook for pair in pairs for known in pair for hook in known.values()]
    theirs = [hook for hook in hooks if not isinstance(getattr(hook, "__self__", None), Mixture)]
    return None if theirs else TokenGraph(model, cache)  # a mixture's hook only counts the rows


class TokenGraph:
    """Reads one token of each row at a time. Weights and the active adapter must stay as they are."""

    def __init__(self, model: CausalLM, cache: KVCache):
        self.model, self.cache, self.keys = model, cache, 0
        self.like = dict(dtype=cache.keys.dtype, device=cache.keys.device)
        self.x = torch.empty(cache.keys.shape[1], model.config.hidden_size, **self.like)
        self.place = torch.zeros(1, dtype=torch.long, device=self.x.device)  # of the new key
        self.logits: Tensor | None = None  # (Bt, V) float32

    @torch.no_grad()
    def read(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Return the logits behind one new token of each row, (Bt, V) float32; the next call overwrites them.

        input_ids, document_ids: (Bt, 1).
        """
        cache, config = self.cache, self.model.config
        S, documents = cache.length + 1, cache.add_documents(document_ids, 1)
        positions = torch.full((1, 1), cache.length, device=self.x.device)
        if documents is not None:
            positions = positions_in_documents(documents)[:, -1:]
        lengths = document_lengths(config.rope, documents, S, 1, self.x.device)
        angles = [t.to(self.x.dtype) for t in rope_angles(config, positions, lengths)]  # (Bt or 1, 1, K)
        if not cache.length < self.keys:
            self._begin(min(-(-S // KEYS) * KEYS, cache.keys.shape[3]), angles)
        self.x.copy_(self.model.model.embed_tokens(input_ids).squeeze(1))
        self.place.fill_(cache.length)
        for mine, new in zip(self.angles, angles, strict=True):
            mine.copy_(new)
        for window, mask in self.masks.items():
            seen = attention_mask(1, S, window, documents, self.x.device)
            mask.fill_(-torch.inf)[..., :S].masked_fill_(seen if seen is not None else self.every, 0)
        if self.replay is None:
            self._run()
            self.replay = recorded(self._run, self.x.device)
        else:
            self.replay()
        cache.length = S
        return self.logits

    def _begin(self, keys: int, angles: list[Tensor]) -> None:
        """Let the next tokens see so many keys at most."""
        self.keys, self.replay = keys, None
        Bt, windows = len(self.x), set(self.model.config.layer_windows)
        self.angles = [torch.empty_like(t) for t in angles]
        shape = Bt, 1, 1, row_numbers(keys)
        self.masks = {window: torch.empty(shape, **self.like)[..., :keys] for window in windows}
        self.every = torch.ones((), dtype=torch.bool, device=self.x.device)

    def _run(self) -> None:
        """Read the token: all that is recorded."""
        x, model = self.x, self.model
        for layer, window in zip(model.model.layers, model.config.layer_windows, strict=True):
            x = layer(x, *self.angles, self.masks[window], self)
        logits = model.lm_head(model.model.norm(x).unsqueeze(1)).squeeze(1)
        if self.logits is None:
            self.logits = torch.empty_like(logits, dtype=torch.float32)
        self.logits.copy_(logits)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v: (Bt, G, 1, K) of the new token. Returns all keys and values, (Bt, G, keys, K)."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.index_copy_(2, self.place, k)
        values.index_copy_(2, self.place, v)
        return keys[:, :, : self.keys], values[:, :, : self.keys]
