"""One decoder for Llama, Mistral, Qwen2 and Qwen3.

    x = embed(ids)                                            (B, T, D)
    for each layer:  x = x + attention(norm(x));  x = x + mlp(norm(x))
    logits = lm_head(norm(x))                                 (B, T, V)

The families differ only in flags of `ModelConfig`: biases, a norm on queries and keys, a window, a tied head.
Parameter names are Hugging Face's: loading a checkpoint is the identity, and PEFT's keys are a prefix away.

Packed rows. `document_ids` (B, T) says which document each token belongs to, in runs. A token sees only
tokens of its own document, and positions restart with each one. So several short examples in one row give
exactly the numbers they give alone. Padding is one more document: prompts of different lengths need no mask.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from minilora import ops
from minilora.backend.attention_mask import additive
from minilora.backend.offload import OffloadedInputs
from minilora.config import ModelConfig, RopeConfig
from minilora.linear import rerun_linear
from minilora.recompute import checkpoint

PADDING = -1  # the document id of tokens that only fill a row


class KVCache:
    """Keys and values of the tokens seen so far: 2 * layers * B * G * max_length * K numbers, one block."""

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, dtype: torch.dtype, device):
        G, K = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, batch_size, G, max_length, K)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.document_ids = torch.zeros(batch_size, max_length, dtype=torch.long, device=device)
        self.has_documents = False  # whether document_ids were ever given
        self.length = 0  # tokens held; `CausalLM.forward` advances it once all layers have written

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v: (B, G, T, K) to a layer. Returns its keys and values (B, G, S, K), S = length + T."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


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
        self.layer, self.head_dim = layer, K
        self.q_proj = nn.Linear(D, H * K, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, G * K, bias=config.qkv_bias)
        self.o_proj = nn.Linear(H * K, D, bias=config.o_bias)
        self.q_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(K, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = ops.rope(self.q_norm(q), self.k_norm(k), cos, sin)  # (B, T, H, K), (B, T, G, K)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, G, S, K)
        y = ops.attention(q, k, v, mask)  # (B, H, T, K)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=config.mlp_bias)
        self.up_proj = nn.Linear(D, F, bias=config.mlp_bias)
        self.down_proj = nn.Linear(F, D, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))

    def rerun_for_backward(self, x: Tensor) -> Tensor:
        """Return an output with forward's gradient and arbitrary values (see DecoderLayer)."""
        return rerun_linear(self.down_proj, ops.swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each on a normed copy of the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache=None) -> Tensor:
        x, normed = self.input_layernorm.after_sum(x)  # (B, T, D) each
        y = self.self_attn(normed, cos, sin, mask, cache)
        x, normed = self.post_attention_layernorm.after_sum(x, y)
        return x + self.mlp(normed)

    def rerun_for_backward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """Run again for backward, which reads every value but the output: down_proj is skipped."""
        x, normed = self.input_layernorm.after_sum(x)
        y = self.self_attn(normed, cos, sin, mask, None)
        x, normed = self.post_attention_layernorm.after_sum(x, y)
        return x + self.mlp.rerun_for_backward(normed)


class Decoder(nn.Module):
    """Embedding, layers and final norm: ids to hidden states."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Zeros, to be loaded or drawn by `init_weights`. nn.Embedding's normal_() on the meta device would
        # import half of PyTorch: 146 MB and a second.
        weight = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # What each layer keeps for backward: see minilora.recompute.set_recompute.
        self.recompute = ("off",) * config.num_hidden_layers

    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        position_ids: Tensor | None = None,  # (B, T)
        document_ids: Tensor | None = None,  # (B, T)
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return hidden states after the final norm, (B, T, D)."""
        T, past = input_ids.shape[1], 0 if cache is None else cache.length
        if cache is not None:
            if document_ids is not None:
                cache.document_ids[:, past : past + T] = document_ids
                document_ids = cache.document_ids[:, : past + T]  # (B, S): the keys'; queries are the last T
                cache.has_documents = True
            elif cache.has_documents:
                raise ValueError("the cache holds packed or padded rows: new tokens need document_ids too")
        if position_ids is None:
            if document_ids is None:
                position_ids = torch.arange(past, past + T, device=input_ids.device).unsqueeze(0)  # (1, T)
            else:
                position_ids = positions_in_documents(document_ids)[:, past:]
        x = self.embed_tokens(input_ids)  # (B, T, D)
        cos, sin = (t.to(x.dtype) for t in rope_angles(self.config, position_ids))  # (B or 1, T, K)
        windows = self.config.layer_windows
        masks = {w: additive(attention_mask(T, past + T, w, document_ids, x.device), x) for w in set(windows)}
        has_backward = cache is None and torch.is_grad_enabled()
        policies = self.recompute if has_backward else ("off",) * len(self.layers)
        offloaded = OffloadedInputs(x.device) if "offload" in policies else None
        for layer, window, policy in zip(self.layers, windows, policies, strict=True):
            if policy == "off":
                x = layer(x, cos, sin, masks[window], cache)
            else:
                offload = offloaded if policy == "offload" else None
                keep = dict(keep_attention=policy == "selective", offload=offload)
                x = checkpoint(layer, x, cos, sin, masks[window], rerun=layer.rerun_for_backward, **keep)
        if cache is not None:
            cache.length += T
        return self.norm(x)


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
        input_ids: Tensor,  # (B, T)
        position_ids: Tensor | None = None,  # (B, T): within the document; default: from document_ids
        document_ids: Tensor | None = None,  # (B, T): see the module's docstring
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the logits of the next token at every position, (B, T, V)."""
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


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Return each token's index within its run, (B, S) -> (B, S): [7, 7, 7, 2, 2] -> [0, 1, 2, 0, 1]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def attention_mask(
    T: int, S: int, window: int | None, document_ids: Tensor | None, device: torch.device
) -> Tensor | None:
    """Return which query sees which key, bool (B or 1, 1, T, S); the queries are the last T of the S keys.

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
        mask = mask & (document_ids[:, None, -T:, None] == document_ids[:, None, None, :])  # (B, 1, T, S)
    return mask


def rope_angles(config: ModelConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position * frequency: (B, T) -> two float32 (B, T, K), both halves alike."""
    frequencies = rope_frequencies(config.rope, config.head_dim, position_ids.device)  # (K/2,)
    angles = position_ids[:, :, None].float() * frequencies  # (B, T, K/2)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@lru_cache
def rope_frequencies(rope: RopeConfig, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Return radians per token of each of the K/2 rotating pairs, float32 (K/2,).

    default: theta^(-2i/K) (arXiv:2104.09864, 3.3). linear: all divided by `factor` (arXiv:2306.15595).
    llama3 (Llama 3.1): low frequencies divided by `factor`, high ones kept, and a linear blend between.
    """
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if rope.rope_type == "linear":
        frequencies = frequencies / rope.factor
    if rope.rope_type == "llama3":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        turns = rope.original_max_position_embeddings * frequencies / (2 * torch.pi)  # within the old context
        keep = (turns - low) / (high - low)  # share of the old frequency
        frequencies = torch.lerp(frequencies / rope.factor, frequencies, keep.clamp(0, 1))
    return frequencies.to(device)
