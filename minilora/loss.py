"""The training loss: the sum of the token losses, without the logits ever existing.

The sum, not the mean: examples differ in length, and micro-batches in how many supervised tokens they hold.
The trainer divides once, by the number of supervised tokens of the whole optimizer step; then 1 x 8, 4 x 2
and 8 x 1 are the same step. A mean per micro-batch would weigh a token of a short micro-batch more.

The output head is the widest product of a small model, and its output (Bt, T, V) the largest tensor of a
large one: 4 x 1024 positions and 128k tokens are 2 GB in float32, and as much again for the gradient. Two
things make it small. Only supervised positions go through the head, of questions and answers the answers
alone. And they go through it in chunks:

    z = h W^T     loss = log sum_v exp(z_v) - z_target     dloss/dz = softmax(z) - onehot(target)    dh = dz W

The loss is the end of the graph, so everything that backward needs is known as soon as the loss is. `dh` is
computed at once, `z` is forgotten, and backward multiplies `dh` by the one number that it is given.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from minilora.adapted import TrainedCopy
from minilora.backend.choice import fastest, product_dtype
from minilora.backend.copies import to_device
from minilora.model import CausalLM
from minilora.recompute import checkpoint

IGNORE_INDEX = -100  # the label of a position that is not supervised
LOGITS_BYTES = 64 << 20  # of float32 logits at a time: 512 rows of a vocabulary of 32k
_HEAD_ROWS = 4096  # of the head, widened at a time where the product needs another dtype


def causal_lm_loss(
    model: CausalLM, input_ids: Tensor, labels: Tensor, document_ids: Tensor | None = None
) -> Tensor:
    """Return the sum over supervised tokens of -log p(token | tokens before it), () float32.

    input_ids, labels, document_ids: (Bt, T). `labels` are the ids themselves or IGNORE_INDEX. A token is
    predicted from those before it, of its own document where rows are packed. The first token of a document
    must be IGNORE_INDEX: nothing predicts it. Labels best stay on the CPU: the host must count them.
    """
    return head_loss(model.lm_head, model.model(input_ids, document_ids=document_ids), labels)


def head_loss(head: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """The same, of hidden states (Bt, T, D)."""
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # of the next token: the last one has none
    if isinstance(head, (nn.Linear, TrainedCopy)):
        return linear_cross_entropy(hidden, head.weight, labels)
    hidden, targets = _supervised(hidden, labels)  # adapted or quantized: its logits are computed twice
    chunks = zip(*(t.split(rows_at_a_time(head.weight.shape[0])) for t in (hidden, targets)), strict=True)
    loss, parameters = nn.CrossEntropyLoss(reduction="sum"), list(head.parameters())
    losses = [checkpoint(lambda h, t: loss(head(h).float(), t), *c, parameters=parameters) for c in chunks]
    return torch.stack(losses).sum()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over the labels, but IGNORE_INDEX, of the cross-entropy of hidden W^T, () float32.

    hidden: (..., D), weight: (V, D), labels: (...) of the same positions, not shifted. Both may need
    gradients. Memory beside them and their gradients: twice LOGITS_BYTES, whatever V and the number of
    positions. A weight's gradient is summed in float32.
    """
    hidden, targets = _supervised(hidden, labels)
    return _LinearCrossEntropy.apply(hidden, weight, targets)


def _supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hidden states of supervised positions, (N, D), and their labels, (N,).

    The host must know N. Labels on the CPU tell it at once; for labels on a GPU it waits.
    """
    places = (labels != IGNORE_INDEX).flatten().nonzero().squeeze(1)  # (N,)
    places, targets = (to_device(t, hidden.device) for t in (places, labels.flatten()[places]))
    return hidden.reshape(-1, hidden.shape[-1]).index_select(0, places), targets


def rows_at_a_time(vocab_size: int) -> int:
    """Return how many rows of logits exist at once."""
    return max(1, LOGITS_BYTES // (4 * vocab_size))


def cross_entropy_definition(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each row's log sum exp(z) - z_target; the logits become its gradient, softmax(z) - onehot.

    logits: (n, V) float32, contiguous, targets: (n,) int64 -> (n,) float32.
    """
    logits -= logits.amax(1, keepdim=True)
    picked = logits.gather(1, targets.unsqueeze(1))  # (n, 1)
    sums = logits.exp_().sum(1, keepdim=True)
    logits.div_(sums).scatter_add_(1, targets.unsqueeze(1), torch.full_like(picked, -1.0))
    return (sums.log() - picked).squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden: (N, D), weight: (V, D), targets: (N,) -> ()."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        dtype, device, chunk = product_dtype(hidden), hidden.device, rows_at_a_time(len(weight))
        # float16 loses probabilities below 6e-8, and small gradients before the loss scale is applied:
        # enlarge both.
        scale = 1024.0 if dtype == torch.float16 else 1.0
        # Without widening, the head in one piece.
        parts = [weight] if weight.dtype == dtype else weight.split(_HEAD_ROWS)
        columns = len(parts[0])
        buffer = torch.empty(min(chunk, len(hidden)), len(weight), dtype=torch.float32, device=device)
        d_hidden = d_weight = None
        if needs_hidden:
            d_hidden = torch.empty_like(hidden, dtype=torch.float32 if scale > 1 else hidden.dtype)
        if needs_weight:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=device)
        for start in range(0, len(hidden), chunk):
            h, target = hidden[start : start + chunk].to(dtype), targets[start : start + chunk]
            logits = buffer[: len(h)]  # (n, V); then their gradient
            for part, part_logits in zip(parts, logits.split(columns, dim=1), strict=True):
                if dtype == torch.float32:
                    torch.mm(h, part.to(dtype).T, out=part_logits)
                else:
                    part_logits.copy_(h @ part.to(dtype).T)
            total += fastest("cross_entropy", logits, cross_entropy_definition)(logits, target).sum()
            if not (needs_hidden or needs_weight):
                continue
            dh = torch.zeros(h.shape, dtype=torch.float32, device=device)  # a sum over V, in float32
            for i, (part, part_dz) in enumerate(zip(parts, logits.split(columns, dim=1), strict=True)):
                dz = (part_dz * scale if scale > 1 else part_dz).to(dtype)
                if needs_hidden:
                    dh += dz @ part.to(dtype)
                if needs_weight:
                    d_weight[i * columns :][: len(part)] += dz.T @ h
            if needs_hidden:
                d_hidden[start : start + chunk] = dh
        ctx.gradients, ctx.scale, ctx.dtypes = (d_hidden, d_weight), scale, (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        pairs = zip(ctx.gradients, ctx.dtypes, strict=True)
        return *((g * (d_loss / ctx.scale)).to(dtype) if g is not None else None for g, dtype in pairs), None
