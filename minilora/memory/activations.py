"""What a training step holds beside weights and adapters: bytes of activations, from a configuration alone.

For its backward a decoder layer needs, in numbers a token,

    2 D      its input, and the sum after attention
    2 HK     q and attention's output
    2 GK     k and v
    2 F      gate and up
    D        after each norm, if a product with it is adapted

and a few single ones: 1 / rms a norm, log-sum-exp a head, x A^T. For Mistral-7B with LoRA on q, k, v and o
that is 12.5 D. A and B are there once more, in the dtype of products. LoRA-FA keeps no inputs of products.
Dropout keeps a seed and no mask; all layers share one scratch buffer for an input with its zeros. DoRA has
its own way: it keeps outputs too and masks of a byte a number, and no copies of A and B.

Backward makes more, and most within SwiGLU's: the gradients of gate and up beside these and their product's.
While attention runs, k and v are there for H heads too, unless its kernel knows groups. A layer's forward
never needs more than its backward. The loss holds the hidden states twice, their gradient, and one chunk of
float32 logits, which becomes its own gradient. Documents need no mask. A CPU's attention makes one where a
window is shorter than a document.

These are the sizes of what `model.py`, `lora.py`, `ops.py` and `loss.py` create, and at the same time hold;
the tests compare them with what PyTorch allocates. Every place is taken for a supervised one. Tables of a row
or a token are left out.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from minilora.backend import cpu_attention
from minilora.backend.attention_mask import row_numbers
from minilora.backend.choice import product_dtype
from minilora.config import LoraConfig, ModelConfig
from minilora.loss import _HEAD_ROWS, rows_at_a_time
from minilora.system.device import requested_backend

_SHARE_AN_INPUT = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",)


class Widths(NamedTuple):
    """Bytes of a number. 0: there are none of the kind."""

    number: int  # a weight or an activation
    product: int  # in a matrix product (see `choice.product_dtype`)
    wide: int  # the same, of operands that are copied for it
    d_hidden: int  # the gradient of the hidden states
    sums: int  # in float32, of operands that are not
    attention_sums: int  # the same of attention's gradients, which a GPU's kernels have in memory
    groups: bool  # attention reads keys and values of G heads; elsewhere they are repeated while it runs


def widths_of(c: ModelConfig, dtype: torch.dtype, device: str) -> Widths:
    """device: `cuda` or `cpu`."""
    number = product = dtype.itemsize
    if device == "cpu":
        product = product_dtype(torch.empty(0, dtype=dtype, device=device)).itemsize
    sums = 4 if number < 4 else 0
    return Widths(
        number=number,
        product=product,
        wide=product if product != number else 0,
        d_hidden=4 if dtype == torch.float16 else number,
        sums=sums,
        attention_sums=sums if device == "cuda" else 0,
        groups=_knows_groups(c, dtype, device),
    )


def _knows_groups(c: ModelConfig, dtype: torch.dtype, device: str) -> bool:
    """Whether attention runs in a kernel that knows groups: flash attention on GPUs that compute in bfloat16,
    and the C kernel on a CPU (see `attention.fused_form`).
    """
    if device == "cuda":
        return dtype == torch.bfloat16
    heads = c.num_attention_heads, c.num_key_value_heads
    q, k = (torch.empty(0, count, c.head_dim, dtype=dtype, device="cpu") for count in heads)
    return not requested_backend(q.device) and cpu_attention.takes(q, k)


class LayerBytes(NamedTuple):
    """Bytes of one decoder layer."""

    input: int
    attention: int  # attention's output and log-sum-exps
    kept: int  # what backward reads, attention's included but not the input
    backward: int  # what backward makes itself, at its largest
    gradients: int  # of weights that are trained whole, which a layer that runs again has all at once
    alone: int  # all of a forward without a graph, the input included


class _Adapters(NamedTuple):
    """The adapters of a layer on a number of tokens."""

    lora: LoraConfig
    adapted: frozenset[str]
    tokens: int
    widths: Widths

    def kept(self, x: int, outputs: dict[str, int], x_is_kept: bool = False) -> int:
        """Return the bytes that the adapters on one input of x bytes keep.

        outputs: bytes of each product's output. DoRA keeps those.
        """
        names = self.adapted & outputs.keys()
        kept = len(names) * self.tokens * self.lora.r * self.widths.product  # x A^T
        if self.lora.use_dora and self.lora.lora_dropout:
            kept += len(names) * x // self.widths.number  # the masks
        if names and not (self.lora.lora_fa or x_is_kept):
            kept += x
        return kept + (sum(outputs[name] for name in names) if self.lora.use_dora else 0)

    def copies(self, c: ModelConfig, *names: str) -> int:
        """Return the bytes of A and B in the dtype of products, of the products of these names."""
        if self.lora.use_dora:
            return 0
        D, F = c.hidden_size, c.intermediate_size
        HK, GK = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        sizes = dict(q_proj=D + HK, k_proj=D + GK, v_proj=D + GK, o_proj=HK + D)  # in + out
        sizes |= dict(gate_proj=D + F, up_proj=D + F, down_proj=F + D)
        return self.lora.r * self.widths.product * sum(sizes[name] for name in self.adapted & {*names})


def layer_bytes(
    c: ModelConfig,
    lora: LoraConfig,
    adapted: frozenset[str],  # products that have an adapter: q_proj, ...
    tokens: int,
    widths: Widths,
    copied: int = 0,  # numbers of its weights that are trained whole, in copies
) -> LayerBytes:
    """Return the bytes of a decoder layer on so many tokens, of however many rows and documents."""
    in_16_bits = copied * widths.number if widths.number < 4 else 0  # copies as the products read them
    row = 4 * tokens  # a float32 a token
    H, G, K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    D, HK, GK, F = (tokens * n * widths.number for n in (c.hidden_size, H * K, G * K, c.intermediate_size))
    wide_D, wide_F = (tokens * n * widths.wide for n in (c.hidden_size, c.intermediate_size))
    sums_D, sums_F = (tokens * n * widths.sums for n in (c.hidden_size, c.intermediate_size))
    adapters = _Adapters(lora, adapted, tokens, widths)

    attention = HK + H * row
    repeated = 0 if widths.groups or G == H else 2 * HK
    first_half = attention + HK + 2 * GK + row
    # Without dropout DoRA's output is the tensor that the norm of queries or keys keeps.
    q, k = (0, 0) if c.qk_norm and not lora.lora_dropout else (HK, GK)
    first_half += adapters.kept(D, dict(q_proj=q, k_proj=k, v_proj=GK))
    first_half += adapters.kept(HK, dict(o_proj=D), x_is_kept=True)
    if c.qk_norm:
        first_half += HK + GK + (H + G) * row
    # Under dropout DoRA's output is not the product's; without it SwiGLU keeps the same tensor.
    twice = F if lora.lora_dropout else 0
    down = adapters.kept(F, dict(down_proj=D))
    second_half = D + row + adapters.kept(D, dict(gate_proj=twice, up_proj=twice)) + 2 * F + down

    at_swiglu = 3 * F - down  # down_proj has released what it kept
    if lora.use_dora and adapted & {"gate_proj", "up_proj"}:  # the gradient of up's magnitudes
        at_swiglu = max(at_swiglu, 2 * (F - twice) + (2 * sums_F or F) - down)
    at_down = F + wide_F + D + wide_D + (D + (twice if lora.use_dora else 0) if down else 0)
    # After the second half: dy, dq, dk and dv of attention; the norm's input, dy, and what it makes of them.
    in_attention = 4 * HK + repeated + 3 * tokens * H * K * widths.attention_sums
    between = max(in_attention, 2 * D + 4 * sums_D) - second_half
    # Without a graph: the residual stream, its norm and the products, RoPE or attention; then both streams,
    # attention's output, a norm, and SwiGLU, up_proj or down_proj.
    copied_qkv, copied_up, copied_down = (adapters.copies(c, *names) for names in _SHARE_AN_INPUT)
    alone_in_attention = 2 * D + max(4 * HK + 2 * GK, 2 * HK + 5 * GK, HK + 2 * GK + copied_qkv)
    alone_in_mlp = 4 * D + max(3 * F, 2 * F + wide_D + wide_F + copied_up, at_down + copied_down)
    return LayerBytes(
        input=D,
        attention=attention,
        kept=first_half + second_half + adapters.copies(c, *adapted) + in_16_bits,
        backward=D + max(at_swiglu, at_down, between),  # D: the gradient of the residual stream
        gradients=4 * copied,
        alone=max(alone_in_attention, alone_in_mlp),
    )


def dropped_bytes(c: ModelConfig, adapted: Iterable[frozenset[str]], tokens: int, widths: Widths) -> int:
    """Return the bytes of the scratch buffer for dropout(x), of the widest x that an adapter reads."""
    reads = dict(o_proj=c.num_attention_heads * c.head_dim, down_proj=c.intermediate_size)
    widest = max((reads.get(name, c.hidden_size) for names in adapted for name in names), default=0)
    return tokens * widest * widths.product


def attention_buffer_bytes(c: ModelConfig, tokens: int) -> tuple[int, int]:
    """Return the bytes of the buffers of the C attention, in 16 bits and in float32: see
    backend/cpu_attention.py.
    """
    G, K = c.num_key_value_heads, c.head_dim
    parts = G * -(-c.num_attention_heads // G // 4)
    return 2 * 3 * tokens * G * K, 4 * 2 * tokens * parts * K


def mask_bytes(c: ModelConfig, rows: int, length: int, widths: Widths) -> int:
    """Return the bytes of attention's masks: one for each window that is shorter than `length` tokens.

    rows: of a batch with padding on the left, which needs a mask for every row. 0: there is none.
    """
    masked = {window for window in c.layer_windows if rows or (window is not None and window < length)}
    return len(masked) * max(rows, 1) * length * row_numbers(length) * widths.number


class LossBytes(NamedTuple):
    """Bytes around the output head."""

    peak: int
    d_hidden: int  # the gradient of the hidden states, and of a trained head: backward holds them to its end
    alone: int  # without gradients


def loss_bytes(
    c: ModelConfig, head_is_adapted: bool, rows: int, widths: Widths, head_is_trained: bool = False
) -> LossBytes:
    """Return the bytes of the loss of so many supervised tokens, the hidden states included.

    A head that is trained whole has its gradient in float32. Backward multiplies it once more.
    """
    V, D = c.vocab_size, c.hidden_size
    chunk, head_rows = min(rows, rows_at_a_time(V)), min(V, _HEAD_ROWS)
    hidden, d_hidden = rows * D * widths.number, rows * D * widths.d_hidden
    logits = 4 * chunk * V
    if head_is_adapted:  # log-softmax, its gradient, and the gradient of the logits
        return LossBytes(2 * hidden + 3 * logits, hidden, 2 * hidden + 3 * logits)
    alone = 2 * hidden + logits + chunk * D * widths.wide
    # Logits or weights in another dtype. A trained head's are float32.
    widened = 0 if head_is_trained else head_rows * D * widths.wide
    alone += chunk * V * widths.product if widths.product == 2 else widened
    scaled = logits if widths.d_hidden > widths.number else 0  # for float16 the logits' gradient, once more
    peak = alone + d_hidden + scaled + chunk * D * (4 + widths.product)
    if head_is_trained:
        d_head, part = 4 * V * D, (V if widths.product == 4 else head_rows) * D * widths.product
        return LossBytes(d_head + max(peak + part, hidden + 2 * d_hidden + d_head), d_hidden + d_head, alone)
    return LossBytes(peak, d_hidden, alone)


class AnswerBytes(NamedTuple):
    """Bytes of answering a batch of prompts."""

    cache: int  # keys and values of all tokens
    alone: int  # attention over the cache and the logits of one new token a row


def answer_bytes(c: ModelConfig, batch_size: int, tokens: int, new: int, widths: Widths) -> AnswerBytes:
    """Return the bytes of rows of `tokens` tokens, `new` of them an answer, beside the prompts' pass."""
    H, G, K, L = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.num_hidden_layers
    places = batch_size * tokens * K * widths.number
    repeated = 2 * H * places  # one layer's keys and values, for all heads
    logits = 4 * batch_size * c.vocab_size
    narrow = batch_size * c.vocab_size * widths.number if widths.number < 4 else 0  # before they are widened
    before = logits if new > 1 else 0  # the last token's logits are still there
    return AnswerBytes(2 * L * G * places, before + max(repeated, logits + narrow))
