"""Sums, differences and shorter forms of low-rank updates. None of them forms a matrix of the weight's size.

An adapter adds scaling * B A to a layer's weight. A weighted sum of such updates is one update again, whose
factors are the old ones side by side. Its rank is the sum of the ranks:

    w1 s1 B1 A1 + w2 s2 B2 A2  =  [B1 | B2] [w1 s1 A1 ; w2 s2 A2]                  cat: exact

Most of such a sum often lies in fewer directions. The singular value decomposition gives the nearest matrix
of a given rank, and the values that it drops are the error (Eckart and Young 1936). With B = Q R and
A^T = P L only the small matrix R L^T has to be decomposed:

    B A  =  Q (R L^T) P^T  =  Q (U S V^T) P^T                                      svd: the nearest of rank r

PEFT's `linear` adds the factors themselves. Its product has terms B1 A2 and B2 A1 that nobody asked for:

    (B1 + B2) (A1 + A2)  =  B1 A1 + B2 A2  +  B1 A2 + B2 A1                        linear: rough, rank r

A difference is a sum, too. An adapter that started at B0 A0 with that much taken out of W has learned
B A - B0 A0 (`to_plain`).

All three combinations give PEFT's numbers (`add_weighted_adapter`), and so does `to_plain`
(`path_initial_model_for_weight_conversion`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minilora.system.errors import UserError, suggestion

Factors = tuple[Tensor, Tensor]  # A (r, in), B (out, r): the update B A, scaling 1
Update = tuple[Tensor, Tensor, float]  # A, B, scaling: the update scaling * B A
Adapter = dict[str, Update]  # by the layer's full name

COMBINATION_TYPES = ("svd", "cat", "linear")


def combine(
    adapters: list[Adapter], weights: list[float], combination_type: str, svd_rank: int | None = None
) -> tuple[dict[str, Factors], dict[str, float]]:
    """Return the weighted sum of adapters as factors by layer, all of one rank, and each layer's error.

    The error is the norm of the difference to the exact sum, over the sum's norm. svd_rank: of the result of
    `svd`; None: the adapters' largest rank. Raises UserError for shapes and ranks that do not fit.
    """
    rank = _rank_of_result(adapters, combination_type, svd_rank)
    combined, errors = {}, {}
    for layer in dict.fromkeys(name for adapter in adapters for name in adapter):
        updates = [
            scaled(adapter[layer], weight)
            for adapter, weight in zip(adapters, weights, strict=True)
            if layer in adapter
        ]
        _check_shapes(layer, updates)
        exact = factors = stacked(updates)
        if not (exact[0].norm() * exact[1].norm()).isfinite():  # a bound of the product's norm
            raise UserError(f"the sum overflows float32 in {layer}; choose smaller weights")
        if combination_type == "svd":
            factors = shortened(*exact, rank)
        elif combination_type == "linear":
            factors = _linear(layer, updates)
        combined[layer], errors[layer] = padded(*factors, rank), distance(factors, exact)
    return combined, errors


def _rank_of_result(adapters: list[Adapter], combination_type: str, svd_rank: int | None) -> int:
    if combination_type not in COMBINATION_TYPES:
        hint = suggestion(combination_type, COMBINATION_TYPES)
        raise UserError(f"combination_type {combination_type!r} is not known{hint}")
    if not adapters or not all(adapters):
        raise UserError("there is nothing to combine: an adapter holds no layers")
    ranks = [max(len(A) for A, _, _ in adapter.values()) for adapter in adapters]
    if svd_rank is not None and svd_rank > sum(ranks):
        exact = f"{sum(ranks)}, the sum's rank"
        raise UserError(f"svd_rank {svd_rank} exceeds {exact}; leave it out, or choose 'cat'")
    return dict(cat=sum(ranks), linear=max(ranks), svd=svd_rank or max(ranks))[combination_type]


def scaled(update: Update, weight: float) -> Update:
    """The update times a weight."""
    A, B, scaling = update
    return A, B, scaling * weight


def stacked(updates: list[Update]) -> Factors:
    """The sum of updates, exactly. Its rank is the sum of their ranks."""
    A = torch.cat([A * scaling for A, _, scaling in updates])  # (r1 + r2 + ..., in)
    return A, torch.cat([B for _, B, _ in updates], dim=1)  # (out, r1 + r2 + ...)


def _linear(layer: str, updates: list[Update]) -> Factors:
    """PEFT's sum of factors. Each takes the root of |scaling|, and A its sign."""
    if len({len(A) for A, _, _ in updates}) > 1:
        ranks = " and ".join(str(len(A)) for A, _, _ in updates)
        raise UserError(f"combination_type 'linear' needs equal ranks, but {layer} has {ranks}; choose 'svd'")
    A = sum(A * abs(scaling) ** 0.5 * (1 if scaling >= 0 else -1) for A, _, scaling in updates)
    return A, sum(B * abs(scaling) ** 0.5 for _, B, scaling in updates)


def _check_shapes(layer: str, updates: list[Update]) -> None:
    shapes = [(B.shape[0], A.shape[1]) for A, B, _ in updates]
    if len(set(shapes)) > 1:
        different = " and ".join(map(str, sorted(set(shapes))))
        raise UserError(f"the adapters belong to different models: {layer} is {different}")


def shortened(A: Tensor, B: Tensor, r: int) -> Factors:
    """The factors of rank at most r whose product is nearest to B A. A's rows are orthonormal, as PEFT's."""
    core, Q, P = _core(A, B)
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    return Vh[:r] @ P.T, Q @ (U[:, :r] * S[:r])


def distance(found: Factors, exact: Factors) -> float:
    """||found - exact|| over ||exact||, Frobenius norms of the two products. 0 for the product of zeros."""
    difference = stacked([(*found, 1.0), (*exact, -1.0)])
    norm, size = (torch.linalg.norm(_core(*factors)[0]).item() for factors in (difference, exact))
    return norm / size if size else 0.0


def _core(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The small matrix C and the orthonormal Q, P with B A = Q C P^T. C has the singular values of B A."""
    (Q, R), (P, L) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    return R @ L.T, Q, P


def padded(A: Tensor, B: Tensor, r: int) -> Factors:
    """The same product from factors of rank r, contiguous, with zeros for what is missing."""
    missing = r - len(A)
    return F.pad(A, (0, 0, 0, missing)).contiguous(), F.pad(B, (0, missing)).contiguous()


def errors_text(errors: dict[str, float]) -> str:
    """A line for each layer's error, and one for their mean."""
    width = max(map(len, errors))
    lines = [f"  {layer:{width}}  {error:.1e}" for layer, error in errors.items()]
    return "\n".join([*lines, f"  {'mean':{width}}  {sum(errors.values()) / len(errors):.1e}"])


# ---- to plain LoRA -----------------------------------------------------------------------------------------


def to_plain(
    A: Tensor,  # (r, in), trained
    B: Tensor,  # (out, r)
    A0: Tensor,  # as they started
    B0: Tensor,
    lora_alpha: float,
    use_rslora: bool = False,
) -> tuple[Tensor, Tensor, int, float]:
    """Return A' (2r, in), B' (out, 2r), r' = 2r and alpha': the adapter for W instead of W - scaling * B0 A0.

        W - s B0 A0 + s B A  =  W + s [B | -B0] [A ; A0]        s = alpha / r = alpha' / r', or / sqrt(r')

    It is exact if the frozen weight was exactly W - s B0 A0: PiSSA and OLoRA without quantization. A frozen
    weight in 4 bits was another one. Then the plain adapter beside W lacks the error of quantization, which
    training saw (docs/initialization.md).
    """
    r = len(A)
    alpha = lora_alpha * (2**0.5 if use_rslora else 2)
    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1), 2 * r, alpha


# ---- from two models ---------------------------------------------------------------------------------------


def extract(base: Tensor, tuned: Tensor, r: int, iterations: int = 8) -> tuple[Factors, float]:
    """Return factors of rank r near tuned - base, (out, in), and the relative error of their product.

    The singular vectors come from subspace iterations (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4)
    with twice as many directions as are kept: of a 4096 x 14336 matrix that is a small part of the work of a
    full decomposition. The start is drawn from a fixed seed.
    """
    difference = tuned.float() - base.float()
    size = torch.linalg.norm(difference)
    if size == 0:
        return (difference.new_zeros(r, base.shape[1]), difference.new_zeros(base.shape[0], r)), 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(difference, q=min(2 * r, *base.shape), niter=iterations)
    A, B = V.T[:r], U[:, :r] * S[:r]
    error = torch.linalg.norm(difference - B @ A) / size
    return padded(A, B, r), error.item()
