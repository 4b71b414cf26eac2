"""One decoder for Llama, Mistral, Qwen2, Qwen3 and SmolLM3.

    x = embed(ids)                                            (Bt, T, D)
    for each layer:  x = x + attention(norm(x));  x = x + mlp(norm(x))
    logits = lm_head(norm(x))                                 (Bt, T, V)

The families differ only in flags of `ModelConfig`: biases, a norm on queries and keys, windows and RoPE by
layer, a tied head. Parameter names are Hugging Face's: loading a checkpoint is the identity, and PEFT's keys
are a prefix away.

Packed rows. `document_ids` (Bt, T) says which document each token belongs to, in runs. A token sees only
tokens of its own document, and positions restart with each one. So several short examples in one row give
exactly the numbers they give alone. Padding is part of no document: attention gives it zeros. document_ids
best stay on the CPU (see backend/documents.py).
"""

import torch
from torch import Tensor, nn

from minilora import ops
from minilora.backend.attention import KeptAttention
from minilora.backend.attention_mask import additive
from minilora.backend.copies import to_device
from minilora.backend.documents import (
    Documents,
    documents_of_ids,
    documents_of_rows,
    positions_in_documents,
)
from minilora.backend.offload import OffloadedInputs
from minilora.config import ModelConfig
from minilora.linear import apply_each
from minilora.recompute import checkpoint
from minilora.rope import document_lengths, rope_angles

Sight = Documents | Tensor | None  # what tokens see: their documents, or with a cache a mask or all before


class KVCache:
    """Keys and values of the tokens seen so far: 2 * layers * Bt * G * max_length * K numbers, one block."""

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, dtype: torch.dtype, device):
        G, K = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, batch_size, G, max_length, K)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # Masked ones may be read: no NaN.
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.document_ids = torch.zeros(batch_size, max_length, dtype=torch.long, device=device)
        self.has_documents = False  # whether document_ids were ever given
        self.length = 0  # tokens held; `CausalLM.forward` advances it once all layers have written

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v: (Bt, G, T, K) to a layer. Return its keys and values (Bt, G, S, K), S = length + T."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def add_documents(self, document_ids: Tensor | None, T: int) -> Tensor | None:
        """Append the document ids of T new tokens, (Bt, T). Returns those of all tokens, (Bt, S), or None.

        Raises ValueError if only some of the tokens have any.
        """
        if document_ids is not None:
            end = self.length + T
            self.document_ids[:, self.length : end] = to_device(document_ids, self.document_ids.device)
            self.has_documents = True
            return self.document_ids[:, :end]
        if self.has_documents:
            raise ValueError("the cache holds packed or padded rows: new tokens need document_ids too")
        return None


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # (..., size) -> (..., size)
        return ops.rms_norm(x, self.weight, self.eps)

    def after_sum(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x + y, or x alone, and its norm: two of (..., size)."""
        return ops.add_norm(x, y, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention (arXiv:2305.13245) with RoPE: H query heads share G key/value heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        H, G, K = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        D = config.hidden_size
        self.layer = layer
        self.has_rope = not config.layer_rope or config.layer_rope[layer]
        self.q_proj = nn.Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.o_bias)
        self.q_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,  # (N, D)
        cos: Tensor,  # (Bt or 1, T, K)
        sin: Tensor,
        seen: Sight,
        cache: KVCache | None = None,
        kept: KeptAttention | None = None,
    ) -> Tensor:
        T, K = cos.shape[1:]
        products = apply_each(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.view(-1, T, y.shape[-1] // K, K) for y in products)
        q, k = self.q_norm(q), self.k_norm(k)  # (Bt, T, H, K), (Bt, T, G, K)
        if self.has_rope:
            q, k = ops.rope(q, k, cos, sin)
        if cache is None:
            y = ops.document_attention(q, k, v, seen, kept)  # (Bt, T, H, K)
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            y = ops.attention(q, *cache.update(self.layer, k, v), seen).transpose(1, 2)
        return self.o_proj(y.reshape(len(x), -1))  # (N, D)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, F, bias=config.mlp_bias)
        self.down_proj = nn.Linear(F, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # (N, D) -> (N, D)
        return self.down_proj(ops.swiglu(*apply_each(x, self.gate_proj, self.up_proj)))

    def rerun_for_backward(self, x: Tensor) -> Tensor:
        """Return an output with forward's gradient and arbitrary values (see DecoderLayer)."""
        h = ops.swiglu(*apply_each(x, self.gate_proj, self.up_proj))
        return apply_each(h, self.down_proj, values=False)[0]


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on a normed copy of the residual stream.

    The N = Bt T tokens of a batch are rows, (N, D): only attention tells their documents apart.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Sight, cache=None, kept=None) -> Tensor:
        x, normed = self.input_layernorm.after_sum(x)  # (N, D) each
        y = self.self_attn(normed, cos, sin, seen, cache, kept)
        x, normed = self.post_attention_layernorm.after_sum(x, y)
        return x + self.mlp(normed)

    def rerun_for_backward(self, x: Tensor, cos: Tensor, sin: Tensor, seen: Documents, kept=None) -> Tensor:
        """Run again for backward, which reads every value but the output: down_proj is skipped."""
        x, normed = self.input_layernorm.after_sum(x)
        y = self.self_attn(normed, cos, sin, seen, kept=kept)
        x, normed = self.post_attention_layernorm.after_sum(x, y)
        return x + self.mlp.rerun_for_backward(normed)


class Decoder(nn.Module):
    """Embedding, layers and final norm: ids to hidden states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Zeros, to be loaded or drawn by `init_weights`. nn.Embedding's normal_() on the meta device would
        # import half of PyTorch.
        weight = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # What each layer keeps for backward: see minilora.recompute.set_recompute.
        self.recompute = ("off",) * config.num_hidden_layers

    def forward(
        self,
        input_ids: Tensor,  # (Bt, T)
        position_ids: Tensor | None = None,  # (Bt, T)
        document_ids: Tensor | None = None,  # (Bt, T)
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return hidden states after the final norm, (Bt, T, D)."""
        x = self.embed_tokens(input_ids)  # (Bt, T, D)
        positions, lengths, sights = self._sights(x, document_ids, cache)
        if position_ids is not None:
            positions, lengths = position_ids, position_ids.max() + 1
        cos, sin = (t.to(x.dtype) for t in rope_angles(self.config, positions, lengths))  # (Bt or 1, T, K)
        x = x.flatten(0, 1)  # (N, D)
        has_backward = cache is None and torch.is_grad_enabled()
        policies = self.recompute if has_backward else ("off",) * len(self.layers)
        offloaded = OffloadedInputs(x.device) if "offload" in policies else None
        for layer, window, policy in zip(self.layers, self.config.layer_windows, policies, strict=True):
            if policy == "off":
                x = layer(x, cos, sin, sights[window], cache)
            else:
                offload = offloaded if policy == "offload" else None
                keep = dict(keep_attention=policy == "selective", offload=offload)
                x = checkpoint(layer, x, cos, sin, sights[window], rerun=layer.rerun_for_backward, **keep)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x).view(*input_ids.shape, -1)

    def _sights(
        self, x: Tensor, document_ids: Tensor | None, cache: KVCache | None
    ) -> tuple[Tensor, int | Tensor, dict[int | None, Sight]]:
        """Return the position of each token, (Bt or 1, T), the length of its document so far, and what tokens
        see within each layer's window.
        """
        (Bt, T, _), device, windows = x.shape, x.device, set(self.config.layer_windows)
        rope = self.config.rope
        if cache is None:
            given = document_ids is not None
            documents = documents_of_ids(document_ids, device) if given else documents_of_rows(Bt, T, device)
            lengths = document_lengths(rope, document_ids, T, T, device)
            return documents.positions, lengths, {w: documents.within(w) for w in windows}
        S, document_ids = cache.length + T, cache.add_documents(document_ids, T)
        masks = {w: additive(attention_mask(T, S, w, document_ids, device), x) for w in windows}
        lengths = document_lengths(rope, document_ids, S, T, device)
        if document_ids is None:
            return torch.arange(cache.length, S, device=device).unsqueeze(0), lengths, masks
        return positions_in_documents(document_ids)[:, cache.length :], lengths, masks


class CausalLM(nn.Module):
    """The decoder with its output head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head share the embedding's weight if the config says so; again after replacing weights."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,  # (Bt, T)
        position_ids: Tensor | None = None,  # (Bt, T): within the document; default: from document_ids
        document_ids: Tensor | None = None,  # (Bt, T): see the module's docstring
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the logits of the next token at every position, (Bt, T, V)."""
        return self.lm_head(self.model(input_ids, position_ids, document_ids, cache))

    @torch.no_grad()
    def init_weights(self, std: float = 0.02, seed: int = 0) -> None:
        """Draw weights for training from scratch: normal(0, std), norms one, biases zero."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def attention_mask(
    T: int, S: int, window: int | None, document_ids: Tensor | None, device: torch.device
) -> Tensor | None:
    """Return which query sees which key, bool (Bt or 1, 1, T, S); the queries are the last T of the S keys.

    A query sees the keys up to its own position, of its own document, and at most `window` of them. Padding
    sees itself and no document sees it: no row of the softmax is empty. None: plain causality.
    """
    narrow = window is not None and window < S
    if document_ids is None and not narrow and (T == S or T == 1):
        return None
    query = torch.arange(S - T, S, device=device).view(T, 1)
    key = torch.arange(S, device=device).view(1, S)
    mask = key <= query  # (T, S)
    if narrow:
        mask &= key > query - window
    mask = mask.view(1, 1, T, S)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, -T:, None] == document_ids[:, None, None, :])  # (Bt, 1, T, S)
    return mask
