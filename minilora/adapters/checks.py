"""What is wrong with an adapter: one list for the reader, which refuses it, and for the linter.

The configuration says which modules an adapter changes, the file holds tensors, and a base model has shapes.
Each contradiction is a `Problem`. This implementation refuses all of them. PEFT does not, and so its answer
depends on the kind:

    missing         PEFT leaves the part as it was before training
    missing copy    PEFT stops: it looks copies and rows up by name
    unexpected      PEFT passes over the tensor
    wrong rank      PEFT stops; vLLM computes with another scaling
    does not fit    PEFT stops

Tensors may be on the meta device: their shapes are enough.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from minilora.adapted import LoraEmbedding
from minilora.adapters.file import OWN_WEIGHTS, AdapterFile
from minilora.adapters.peft_format import (
    BASE_BIAS,
    BASE_WEIGHT,
    BIAS,
    EMBEDDING_A,
    EMBEDDING_B,
    LORA_BIAS,
    MAGNITUDE,
    PARTNERS,
    ROWS,
    ROWS_WEIGHT,
    WEIGHT,
    A,
    B,
    tensor_key,
)
from minilora.adapters.vera_files import LAMBDA_B, LAMBDA_D, check_projections
from minilora.initialize import takes_part_of_base
from minilora.starts import check_repeatable
from minilora.system.errors import UserError
from minilora.system.schema import shown_name
from minilora.targets import (
    EMBEDDING,
    OUTPUT_HEAD,
    chosen_targets,
    matching_names,
    ranks_and_alphas,
    rows_of,
    saved_modules,
    token_rows,
)
from minilora.wrapping import base_layers

MISSING, MISSING_COPY, UNEXPECTED = "missing", "missing copy", "unexpected"
WRONG_RANK, UNFIT = "wrong rank", "does not fit"
_RANK_DIMENSION = {A: 0, B: 1, EMBEDDING_A: 0, EMBEDDING_B: 1}  # of a part's shape
# The dimension of a part's shape that must equal a dimension of the base weight's, (out, in) or (V, D).
_WIDTHS = {A: (1, 1), EMBEDDING_A: (1, 0), EMBEDDING_B: (0, 1)}
_WIDTHS |= dict.fromkeys((B, MAGNITUDE, LORA_BIAS), (0, 0))
_VECTORS = (MAGNITUDE, LORA_BIAS, BIAS, BASE_BIAS)
# The modules with parameters in the models of every family that config_json.py reads.
_MODULE = re.compile(
    r"lm_head|model\.(embed_tokens|norm|layers\.\d+\.("
    r"(input|post_attention)_layernorm|self_attn\.([qkvo]_proj|[qk]_norm)|mlp\.(gate|up|down)_proj))"
)


class Problem(NamedTuple):
    """A tensor that is missing, unexpected or of a wrong shape."""

    kind: str
    module: str  # or the whole key, if the part is empty
    part: str = ""
    why: str = ""

    @property
    def key(self) -> str:
        """The tensor's key in the file, cut for a message."""
        return shown_name(tensor_key(self.module, self.part) if self.part else self.module)

    def __str__(self) -> str:
        if self.kind in (MISSING, MISSING_COPY):
            return f"missing {self.key}"
        return f"{self.key} {self.why}" if self.why else f"unexpected {self.key}"


# ---- the two files alone ----


def problems_alone(adapter: AdapterFile) -> list[Problem]:
    """All contradictions between the configuration and the tensors. Raises UserError for a bad pattern."""
    problems = [Problem(UNEXPECTED, key, why=why) for key, why in adapter.unread.items()]
    with naming("rank_pattern or alpha_pattern"):
        halves = [name for name, parts in adapter.modules.items() if parts.keys() & PARTNERS.keys()]
        ranks = ranks_and_alphas(halves, adapter.config)
    for end in token_rows(adapter.config):
        for module in matching_names((EMBEDDING, OUTPUT_HEAD), [end]):
            if ROWS not in adapter.modules.get(module, {}):
                problems.append(Problem(MISSING_COPY, module, ROWS))
    for module, parts in adapter.modules.items():
        if not is_name(module):
            problems += [Problem(UNEXPECTED, module, part, "is no name of these models") for part in parts]
            continue
        needed, allowed = _needed_and_allowed(adapter, module)
        problems += [Problem(MISSING, module, part) for part in sorted(needed - parts.keys())]
        problems += [Problem(UNEXPECTED, module, part) for part in parts if part not in allowed]
        for part in filter(allowed.__contains__, parts):
            problems += _wrong_shape(module, part, parts[part], ranks.get(module, (0, 0))[0])
    return problems


def chosen_layers(adapter: AdapterFile, model: nn.Module | None = None) -> list[str]:
    """The layers that the configuration adapts: of a model, or of those that the file names.

    Raises UserError for a pattern that is no regular expression.
    """
    names = linear = adapter.layers
    if model is not None:
        names, linear = adaptable(base_layers(model))
    with naming("target_modules or exclude_modules"):
        chosen = chosen_targets(names, adapter.config, linear)
    if OUTPUT_HEAD in adapter.layers and EMBEDDING in chosen and (model is None or _is_tied(model)):
        chosen += [] if OUTPUT_HEAD in chosen else [OUTPUT_HEAD]  # ensure_weight_tying
    return chosen


def adaptable(layers: dict[str, nn.Module]) -> tuple[list[str], list[str]]:
    """Return the names of the modules that may have an update, and those of linear layers alone."""
    linear = [name for name, layer in layers.items() if hasattr(layer, "in_features")]
    return [name for name in layers if name in linear or name == EMBEDDING], linear


@contextmanager
def naming(place: str | Path) -> Iterator[None]:
    """Say in which file, or in which of its keys, a mistake is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def _is_tied(model: nn.Module) -> bool:
    return model.config.tie_word_embeddings


def _needed_and_allowed(adapter: AdapterFile, module: str) -> tuple[set[str], set[str]]:
    """The parts that a module's other parts call for, and all those that it may have."""
    config, parts = adapter.config, adapter.modules[module]
    if config.use_vera:
        return set(), {LAMBDA_D, LAMBDA_B}
    needed = {PARTNERS[part] for part in parts if part in PARTNERS}
    has_update = A in parts or EMBEDDING_A in parts
    of_update = {MAGNITUDE} if config.use_dora else set()
    of_update |= {LORA_BIAS} if config.lora_bias else set()
    needed |= of_update if A in parts else {A} if of_update & parts.keys() else set()
    allowed = {*PARTNERS, *of_update, *((BASE_WEIGHT, BASE_BIAS) if has_update else (WEIGHT, BIAS))}
    return needed, allowed | ({ROWS, ROWS_WEIGHT} if config.trainable_token_indices else set())


def _wrong_shape(module: str, part: str, tensor: Tensor, rank: int) -> list[Problem]:
    shape, is_vector = tuple(tensor.shape), part in _VECTORS
    if len(shape) != (1 if is_vector else 2) and part != WEIGHT:
        return [Problem(UNFIT, module, part, f"is {shape}, not a {'vector' if is_vector else 'matrix'}")]
    if part in _RANK_DIMENSION and shape[_RANK_DIMENSION[part]] != rank:
        return [Problem(WRONG_RANK, module, part, f"is {shape}, not of rank r = {rank}")]
    return []


def is_name(module: str) -> bool:
    """Whether a model of these families may have such a module. AutoModel's and wrapped names are none."""
    return _MODULE.fullmatch(module) is not None


def left_out(adapter: AdapterFile) -> list[Problem]:
    """The updates of layers that target_modules does not choose, as far as the file alone can tell."""
    chosen = chosen_layers(adapter)
    return [
        Problem(UNEXPECTED, layer, part, "is left out by target_modules")
        for layer in adapter.layers
        for part in adapter.modules[layer]
        if layer not in chosen
    ]


def without_moot_ones(problems: list[Problem]) -> list[Problem]:
    """Each problem once. A tensor that nobody reads may have any shape."""
    unexpected = {(p.module, p.part) for p in problems if p.kind == UNEXPECTED}
    moot = [p for p in problems if p.kind != UNEXPECTED and (p.module, p.part) in unexpected]
    return [p for p in dict.fromkeys(problems) if p not in moot]


# ---- with a base model ----


def problems_on(model: nn.Module, adapter: AdapterFile) -> list[Problem]:
    """All contradictions with a base model: what the configuration promises for it and the file lacks, what
    it has no place for, and what has another shape. Raises UserError for a bad pattern.
    """
    layers, chosen = base_layers(model), chosen_layers(adapter, model)
    problems = [
        Problem(kind, module, part)
        for kind, module, part in _promised(layers, chosen, adapter)
        if part not in adapter.modules.get(module, {})
    ]
    for module, parts in adapter.modules.items():
        if module not in layers or (module in adapter.layers and module not in chosen):
            problems += [Problem(UNEXPECTED, module, part) for part in parts]
        else:
            allowed = _needed_and_allowed(adapter, module)[1]
            tied = _is_tied(model) and module == OUTPUT_HEAD
            found = [
                _misfit(layers[module], module, part, adapter, tied) for part in parts if part in allowed
            ]
            problems += filter(None, found)
    return problems


def check_kind(model: nn.Module, adapter: AdapterFile) -> None:
    """Raise UserError for a kind of adapter that layers of the model cannot have. Its shapes fit them."""
    config, layers, chosen = adapter.config, base_layers(model), chosen_layers(adapter, model)
    linear = {path: layers[path].weight for path in chosen if hasattr(layers[path], "in_features")}
    if EMBEDDING in chosen:
        LoraEmbedding.check(config)
    if takes_part_of_base(config.init_lora_weights):
        for path, weight in linear.items():
            check_repeatable(config.init_lora_weights, path, weight, len(adapter.modules[path][A]))
    if adapter.shared and linear:
        widest_out, widest_in = map(max, *(weight.shape for weight in linear.values()), (0, 0))
        check_projections(*adapter.shared, widest_in, widest_out)
    if any(len(set(rows)) < len(rows) for rows in token_rows(config).values()):
        raise UserError("trainable_token_indices names one row twice")


def _promised(
    layers: dict[str, nn.Module], chosen: list[str], adapter: AdapterFile
) -> list[tuple[str, str, str]]:
    """(kind of the problem if it is missing, module, part) of every tensor that PEFT would have written."""
    config = adapter.config
    linear_part = LAMBDA_D if config.use_vera else A
    promised = [(MISSING, layer, EMBEDDING_A if layer == EMBEDDING else linear_part) for layer in chosen]
    whole = saved_modules(layers, config.modules_to_save)
    for module in [n for n in layers if any(f"{n}.".startswith(f"{copy}.") for copy in whole)]:
        promised += [
            (MISSING_COPY, module, leaf) for leaf, _ in layers[module].named_parameters(recurse=False)
        ]
    for module in chosen if config.bias == "lora_only" else layers if config.bias == "all" else ():
        if getattr(layers[module], BIAS, None) is not None and module not in whole:
            promised.append((MISSING, module, BASE_BIAS if module in chosen else BIAS))
    for end in token_rows(config):
        promised += [(MISSING_COPY, module, ROWS) for module in matching_names(layers, [end]) or [end]]
    return promised


def _misfit(layer: nn.Module, module: str, part: str, adapter: AdapterFile, tied: bool) -> Problem | None:
    """What is wrong with one tensor of a module, beside the base model's layer. tied: a head that shares the
    embedding's trained rows.
    """
    shape = tuple(adapter.modules[module][part].shape)
    if part in (LAMBDA_D, LAMBDA_B):
        return None  # the model itself tells their lengths
    if part in OWN_WEIGHTS:
        return _misfit_of_own(getattr(layer, part.rpartition(".")[2], None), module, part, shape)
    if part in PARTNERS and (part in (A, B)) != hasattr(layer, "in_features"):
        return Problem(UNEXPECTED, module, part)
    weight = adapter.own(module).get(WEIGHT, getattr(layer, "weight", None))
    if weight is None or len(weight.shape) != 2:
        return Problem(UNEXPECTED, module, part)
    if part == ROWS:
        rows = rows_of(module, adapter.config) or (rows_of(EMBEDDING, adapter.config) if tied else [])
        return _misfit_of_rows(rows, weight, module, shape)
    mine, theirs = _WIDTHS[part]
    if len(shape) > mine and shape[mine] != (width := weight.shape[theirs]):
        needed = (*shape[:mine], width, *shape[mine + 1 :])
        return Problem(UNFIT, module, part, f"is {shape}, the model needs {needed}")
    return None


def _misfit_of_rows(rows: list[int], weight: Tensor, module: str, shape: tuple[int, ...]) -> Problem | None:
    if not rows:
        return Problem(UNEXPECTED, module, ROWS)
    if wrong := [row for row in rows if not 0 <= row < weight.shape[0]]:
        return Problem(UNFIT, module, ROWS, f"holds row {wrong[0]} of a weight of {weight.shape[0]} rows")
    needed = (len(rows), weight.shape[1])
    return None if shape == needed else Problem(UNFIT, module, ROWS, f"is {shape}, the model needs {needed}")


def _misfit_of_own(own: object, module: str, part: str, shape: tuple[int, ...]) -> Problem | None:
    if own is None:
        return Problem(UNEXPECTED, module, part)
    if not isinstance(own, Tensor):
        return Problem(UNFIT, module, part, "replaces a weight in 4 or 8 bits; load the model unquantized")
    first = 1 if module in (EMBEDDING, OUTPUT_HEAD) else 0  # a vocabulary may grow
    if len(shape) != own.dim() or shape[first:] != tuple(own.shape[first:]):
        return Problem(UNFIT, module, part, f"is {shape}, the model needs {tuple(own.shape)}")
    return None
