"""A vocabulary that grows: rows of the embedding and of the output head for tokens that a model never saw."""

import torch
from torch import Tensor, nn

from minilora.system.errors import UserError
from minilora.targets import EMBEDDING, OUTPUT_HEAD
from minilora.wrapping import base_layers

_NOISE = 1e-9**0.5  # of the distance of an old row from the mean


@torch.no_grad()
def grow_vocabulary(model: nn.Module, rows: int, seed: int = 0) -> None:
    """Give the embedding and the output head `rows` rows, where they have fewer.

    New rows lie at the mean of the old rows W: row = mean + 3e-5 (W[i] - mean), of a random i. Mean and
    covariance are those of transformers' `mean_resizing`. In the head n such rows take at most n / (n + V) of
    the probability, by Jensen's inequality: exp(h mean) <= mean exp(h W) (Hewitt 2021, Initializing New Word
    Embeddings for Pretrained Language Models). LLaMA-Factory's noise is as large as a row, and breaks this.

    Raises UserError for an output head in 4 or 8 bits.
    """
    layers, generator = base_layers(model), torch.Generator().manual_seed(seed)
    if layers[EMBEDDING].weight.shape[0] >= rows:
        return
    if not isinstance(layers[OUTPUT_HEAD].weight, Tensor):
        raise UserError(f"{OUTPUT_HEAD} is in 4 or 8 bits, and takes no new tokens: load it unquantized")
    for path in (EMBEDDING, OUTPUT_HEAD):
        layer = layers[path]
        if path == OUTPUT_HEAD and model.config.tie_word_embeddings:
            _set_weight(layer, layers[EMBEDDING].weight)
        else:
            old = layer.weight
            mean = old.mean(0, dtype=torch.float32)  # (D,)
            chosen = torch.randint(len(old), (rows - len(old),), generator=generator).to(old.device)
            new = mean + _NOISE * (old[chosen].float() - mean)  # (new, D)
            weight = torch.cat((old, new.to(old.dtype)))
            _set_weight(layer, nn.Parameter(weight, requires_grad=False))


def _set_weight(layer: nn.Module, weight: nn.Parameter) -> None:
    layer.weight = weight
    setattr(layer, "num_embeddings" if isinstance(layer, nn.Embedding) else "out_features", len(weight))


@torch.no_grad()
def take_new_rows(model: nn.Module, layer: nn.Module, own: Tensor) -> Tensor:
    """Let a layer that has grown take its new rows from the first adapter's own weight.

    Another adapter may bring other rows: it keeps its weight. Returns the weight for the adapter: the
    layer's, if now it is the same, so that memory holds one.
    """
    base, old = layer.weight, model.config.vocab_size
    if base.shape != own.shape or base.is_meta:
        return own
    if not getattr(base, "has_new_rows", False):
        base[old:] = own[old:].to(base)
        base.has_new_rows = True
    return base if torch.equal(own.to(base), base) else own
