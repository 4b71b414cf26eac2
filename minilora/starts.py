"""Adapters whose products take more than A and B: those that start with a part of W, and VeRA's.

PiSSA and OLoRA start with s B0 A0, a part of W, and take it out of the frozen weight (initialize.py). Here W
stays as it is, and the part is taken out beside it:

    y  =  (W - s B0 A0) x + s B A x  =  W x + s [B | -B0] [A ; A0] x         A0, B0: where A and B started

So the base model never changes. Without the adapter it is there again, several adapters share it, and a base
in 4 bits is QLoRA's. The price is r more thin columns, frozen. A file holds [A ; A0] and [B | -B0] as plain
LoRA of rank 2r (`arithmetic.to_plain`), which every server loads and which says nothing of a start. Training
that goes on takes the two apart again, bit for bit.

Dropout drops elements of x for the whole difference. At the first step it drops nothing of W, since the
difference is 0. PEFT drops them for B A alone.

LoftQ needs no second pair: its base is quantize(W), and s B A is a part of what quantization lost. VeRA's A
and B are shared and frozen, and its layers train two vectors each (vera.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from minilora import vera
from minilora.adapted import weight_under
from minilora.config import LoraConfig
from minilora.initialize import check_kind, check_rank, initialize, takes_part_of_base
from minilora.system.errors import UserError
from minilora.targets import ranks_and_alphas
from minilora.wrapping import adapted_layers, plain_name

_NOT_WITH_VERA = """
    use_dora use_rslora lora_fa lora_bias rank_pattern alpha_pattern modules_to_save trainable_token_indices
    """.split()


def check(config: LoraConfig) -> None:
    """Raise UserError for a start that is not known, and for settings that do not go together."""
    kind = check_kind(config.init_lora_weights)
    if kind == "eva":
        raise UserError(
            "init_lora_weights 'eva' reads inputs of the layers first: see minilora/eva.py, or choose 'pissa'"
        )
    if config.use_dora and (kind == "loftq" or takes_part_of_base(kind)):
        raise UserError(f"init_lora_weights {kind!r} and use_dora exclude each other; leave one of them out")
    if config.use_vera:
        asked = [name for name in _NOT_WITH_VERA if getattr(config, name)]
        asked += ["bias"] * (config.bias != "none") + ["init_lora_weights"] * (kind != "true")
        if asked:
            raise UserError(f"use_vera and {asked[0]} exclude each other; leave one of them out")


def factors(layer: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Return A and B of a layer's products: [A ; A0] (2r, in), [B | -B0] (out, 2r), or VeRA's A' and B'.

    layer: a `lora.LoraLinear`. Gradients reach what is trained.
    """
    A, B = layer.frozen_A[name], layer.frozen_B[name]
    if name in layer.vera_lambda_d:
        widths = layer.plain_layer.in_features
        return vera.factors(layer.vera_lambda_d[name], layer.vera_lambda_b[name], A, B, widths)
    return torch.cat([layer.lora_A[name], A]), torch.cat([layer.lora_B[name], B], dim=1)


# ---- the first step ----------------------------------------------------------------------------------------


@torch.no_grad()
def start(
    layers: Mapping[str, nn.Module],  # full name -> lora.LoraLinear with a new adapter
    config: LoraConfig,
    name: str,
    original: Callable[[str], Tensor] | None = None,  # a layer's weight before it was quantized, for LoftQ
) -> None:
    """Give A and B of every layer the values that `config.init_lora_weights` asks for, and VeRA its matrices.

    On the meta device, shapes alone. Raises UserError for a rank or a base that a kind cannot start from.
    """
    kind = check_kind(config.init_lora_weights)
    if config.use_vera and layers:
        share(layers, name, *projections(layers, config))
    for path, layer in layers.items() if kind != "true" else ():
        A, B, weight = layer.lora_A[name], layer.lora_B[name], weight_under(layer.base_layer, name)
        check_rank(kind, len(A), weight.shape)
        if A.device.type != "meta":
            how = _loftq(path, weight, original) if kind == "loftq" else {"W": _values(weight)}
            started = initialize(kind, r=len(A), scaling=layer.scalings[name], **how)
            A.copy_(started[0])
            B.copy_(started[1])
        if takes_part_of_base(kind):
            take_out(layer, name, A, B)


def take_out(layer: nn.Module, name: str, A0: Tensor, B0: Tensor) -> None:
    """Subtract s B0 A0 beside the frozen weight from now on."""
    layer.frozen_A[name], layer.frozen_B[name] = _frozen(A0.detach().clone()), _frozen(-B0.detach())


def _values(weight) -> Tensor:
    """W (out, in) in float32, of a plain or a quantized weight."""
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize(torch.float32)


def _loftq(path: str, weight, original: Callable[[str], Tensor] | None) -> dict:
    """`initialize`'s arguments: the original W, and the quantized weight that stays beside it."""
    if isinstance(weight, Tensor):
        raise UserError(f"init_lora_weights 'loftq' makes up for quantization, but {path} is not quantized")
    if original is None:
        raise UserError("init_lora_weights 'loftq' needs the weights as they were before they were quantized")
    return dict(W=original(path).float().to(weight.device), quantize=lambda _: weight)


def repeat(layers: Mapping[str, nn.Module], config: LoraConfig, name: str) -> None:
    """Take the start of an adapter that PEFT trained out of W again: PiSSA's and OLoRA's depend on W alone.

    Raises UserError for a quantized base, of which PEFT quantized what was left.
    """
    for path, layer in layers.items():
        weight, r = weight_under(layer.base_layer, name), len(layer.lora_A[name])
        check_repeatable(config.init_lora_weights, path, weight, r)
        if weight.is_meta:
            A0, B0 = layer.lora_A[name], layer.lora_B[name]
        else:
            A0, B0, _ = initialize(config.init_lora_weights, weight.float(), r, layer.scalings[name])
        take_out(layer, name, A0, B0)


def check_repeatable(kind: str, path: str, weight, r: int) -> None:
    """Raise UserError unless a start can be taken out of a layer's weight, (out, in), again."""
    if not isinstance(weight, Tensor):
        raise UserError(
            f"init_lora_weights = {kind!r} took a part out of the unquantized weights, and {path} is in 4 or "
            "8 bits: load the model unquantized"
        )
    check_rank(kind, r, weight.shape)


# ---- in a file ---------------------------------------------------------------------------------------------


def doubled(config: LoraConfig) -> LoraConfig:
    """The configuration of [A ; A0] and [B | -B0] as plain LoRA: twice the ranks, and the same scaling.

    s = alpha / r = 2 alpha / 2r. rsLoRA: alpha / sqrt(r) = sqrt(2) alpha / sqrt(2r).
    """
    factor = 2**0.5 if config.use_rslora else 2
    return replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={end: 2 * r for end, r in config.rank_pattern.items()},
        alpha_pattern={end: factor * alpha for end, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )


def in_files(config: LoraConfig) -> LoraConfig:
    """The configuration under which an adapter of this one is saved. VeRA's files know no alpha."""
    if config.use_vera:
        return replace(config, lora_alpha=LoraConfig.lora_alpha)
    return doubled(config) if takes_part_of_base(config.init_lora_weights) else config


def split(model: nn.Module, config: LoraConfig, name: str) -> None:
    """Take the factors of a file, of rank 2r, apart again: A and B to train, A0 and -B0 frozen, bit for bit.

    Raises UserError for a rank that is not twice the training's.
    """
    layers = adapted_layers(model, name)
    linear = {path: layer for path, layer in layers.items() if hasattr(layer, "frozen_A")}
    plain = {path: plain_name(path) for path in linear}
    ranks = ranks_and_alphas(list(plain.values()), config)
    for path, layer in linear.items():
        (r, alpha), A, B = ranks[plain[path]], layer.lora_A[name].detach(), layer.lora_B[name].detach()
        if len(A) != 2 * r:
            raise UserError(f"{plain[path]} has rank {len(A)} in the file, not twice the {r} of the training")
        layer.lora_A[name], layer.frozen_A[name] = nn.Parameter(A[:r].clone()), _frozen(A[r:].clone())
        layer.lora_B[name], layer.frozen_B[name] = nn.Parameter(B[:, :r].clone()), _frozen(B[:, r:].clone())
        layer.scalings[name] = config.scaling_of(r, alpha)
    for layer in layers.values():
        layer.configs[name] = config


# ---- VeRA --------------------------------------------------------------------------------------------------


def add_vectors(layer: nn.Module, name: str, r: int, weight) -> None:
    """Add VeRA's lambda_d (r,) and lambda_b (out,) to a `lora.LoraLinear`. `share` adds A and B."""
    vectors = vera.initial_vectors(r, weight.shape[0])
    on_device = [nn.Parameter(vector.to(weight.device)) for vector in vectors]
    layer.vera_lambda_d[name], layer.vera_lambda_b[name] = on_device


def share(layers: Mapping[str, nn.Module], name: str, A: Tensor, B: Tensor) -> None:
    """Give all layers the same frozen A (r, widest in) and B (widest out, r)."""
    device = next(iter(layers.values())).plain_layer.weight.device
    A, B = _frozen(A.to(device)), _frozen(B.to(device))
    for layer in layers.values():
        layer.frozen_A[name], layer.frozen_B[name] = A, B


def widest(layers: Mapping[str, nn.Module]) -> tuple[int, int]:
    """Return the most inputs and the most outputs of a layer."""
    widest_out, widest_in = map(max, *(layer.plain_layer.weight.shape for layer in layers.values()), (0, 0))
    return widest_in, widest_out


def projections(layers: Mapping[str, nn.Module], config: LoraConfig) -> tuple[Tensor, Tensor]:
    """Return the A and B that VeRA's seed draws for these layers; on the meta device, shapes alone."""
    widest_in, widest_out = widest(layers)
    if next(iter(layers.values())).plain_layer.weight.device.type == "meta":
        return torch.empty(config.r, widest_in), torch.empty(widest_out, config.r)
    return vera.shared_projections(config.r, widest_in, widest_out, config.projection_prng_key)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
