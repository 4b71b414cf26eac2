"""VeRA adapters on disk, as PEFT 0.21 reads and writes them, and as plain LoRA (see minilora/vera.py).

`adapter_config.json` has `peft_type: VERA`. `adapter_model.safetensors` holds two vectors a layer:

    base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_d            float32 (r,)
    base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b            float32 (out,)
    base_model.vera_A    base_model.vera_B        (r, widest in), (widest out, r), only with `save_projection`

Without the last two, `projection_prng_key` is the seed that draws them again. No server loads VeRA, but all
of them load the LoRA adapter that `as_plain_lora` makes. It is the same function, in a larger file.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
from torch import Tensor

from minilora.formats.adapter import _read_tensors
from minilora.formats.peft_format import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PEFT_CHANGES_NOTHING
from minilora.system.errors import UserError, summarize
from minilora.system.files import write_whole
from minilora.system.schema import Field, read_fields, read_object, shown, shown_name
from minilora.vera import factors, shared_projections

VERA = "VERA"  # the value of `peft_type`
SHARED_A, SHARED_B = "base_model.vera_A", "base_model.vera_B"
LAMBDA_D, LAMBDA_B = "vera_lambda_d", "vera_lambda_b"

_KEY = re.compile(rf"base_model\.model\.(.+)\.({LAMBDA_D}|{LAMBDA_B})")
_CHANGES_NOTHING = {
    key: PEFT_CHANGES_NOTHING[key]
    for key in ("auto_mapping", "inference_mode", "layers_pattern", "peft_version", "task_type")
} | {
    "fan_in_fan_out": Field(bool, "of GPT-2's layers; PEFT turns it off for others", False, nullable=True),
    "init_weights": Field(bool, "whether lambda_b starts at 0", True, nullable=True),
    "layers_to_transform": Field((int, list), "the tensors tell which layers", nullable=True, items=int),
}  # fmt: skip
_HONOURED = {
    "peft_type": Field(str, "the kind of adapter", VERA, required=True, choices=(VERA,)),
    "r": Field(int, "rank of the shared matrices", 256, required=True, low=1, high=65_536),
    "target_modules": Field(
        (str, list), "the layers: names, a regular expression, or all-linear", required=True, longest=10_000
    ),
    "projection_prng_key": Field(int, "seed of the shared matrices", 0, low=-(2**63), high=2**64 - 1),
    "save_projection": Field(bool, "whether the file holds the shared matrices", True),
    "vera_dropout": Field(float, "dropout on the adapter's input in training", 0.0, low=0, below=1),
    "d_initial": Field(float, "where lambda_d starts", 0.1),
    "base_model_name_or_path": Field(str, "the base model", nullable=True, longest=1000, one_line=True),
    "revision": Field(str, "its revision on the hub", nullable=True, longest=1000, one_line=True),
}
_MUST_BE_OFF = {"bias": "none", "modules_to_save": None}


@dataclass(frozen=True)
class VeraAdapter:
    """A VeRA adapter without a model. The names of fields are PEFT's."""

    r: int
    target_modules: list[str] | str
    vectors: dict[str, tuple[Tensor, Tensor]]  # layer -> lambda_d (r,), lambda_b (out,), float32
    projections: tuple[Tensor, Tensor] | None = (
        None  # A (r, widest in), B (widest out, r); None: from the seed
    )
    projection_prng_key: int = 0
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    base_model_name_or_path: str | None = None
    revision: str | None = None
    raw: dict = field(default_factory=dict, repr=False)  # the file's other keys, which change nothing

    def shared(self, in_features: dict[str, int]) -> tuple[Tensor, Tensor]:
        """The file's A and B, or those of the seed. in_features: of every adapted layer.

        Raises UserError if the file's are too small for a layer.
        """
        widest_in = max(in_features[layer] for layer in self.vectors)
        widest_out = max(len(lambda_b) for _, lambda_b in self.vectors.values())
        if self.projections is None:
            return shared_projections(self.r, widest_in, widest_out, self.projection_prng_key)
        A, B = self.projections
        if A.shape[1] < widest_in or B.shape[0] < widest_out:
            raise UserError(
                f"the shared matrices are {tuple(A.shape)} and {tuple(B.shape)}, "
                f"too small for {widest_in} inputs and {widest_out} outputs; take the base model of training"
            )
        return A, B

    def as_plain_lora(self, in_features: dict[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
        """LoRA's A (r, in) and B (out, r) by layer, with scaling 1. in_features: of every adapted layer."""
        A, B = self.shared(in_features)
        return {
            layer: factors(lambda_d, lambda_b, A, B, in_features[layer])
            for layer, (lambda_d, lambda_b) in self.vectors.items()
        }


def read_vera(directory: str | Path) -> VeraAdapter:
    """The VeRA adapter of a directory.

    Raises UserError that names the file and the key that cannot be honoured, or all tensors that do not fit.
    """
    directory = Path(directory)
    raw = read_object(directory / ADAPTER_CONFIG_FILE)
    try:
        fields = read_fields(raw, _HONOURED)
        read_fields(raw, _CHANGES_NOTHING)
        for key, value in raw.items():
            known = key in _HONOURED or key in _CHANGES_NOTHING
            if not known and value and value != _MUST_BE_OFF.get(key):
                raise UserError(f"{shown_name(key)} = {shown(value)} is not supported in a VeRA adapter")
    except UserError as error:
        raise UserError(f"{directory / ADAPTER_CONFIG_FILE}: {error}") from error
    tensors = _read_tensors(directory / ADAPTER_WEIGHTS_FILE)
    vectors, projections = _sorted_out(tensors, fields["r"], fields["save_projection"], directory)
    kept = {key: value for key, value in raw.items() if key in _CHANGES_NOTHING}
    settings = {key: fields[key] for key in _HONOURED if key not in ("peft_type", "save_projection")}
    return VeraAdapter(vectors=vectors, projections=projections, raw=kept, **settings)


def _sorted_out(
    tensors: dict[str, Tensor], r: int, save_projection: bool, directory: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[Tensor, Tensor] | None]:
    """The vectors by layer, and the shared matrices. One UserError lists every tensor that does not fit.

    Like PEFT, it passes over shared matrices that `save_projection` says are not there.
    """
    shared = {key: tensors.pop(key, None) for key in (SHARED_A, SHARED_B)}
    layers: dict[str, dict[str, Tensor]] = {}
    problems = []
    for key, tensor in sorted(tensors.items()):
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"{shown_name(key)} is no part of a VeRA adapter")
        elif tensor.dim() != 1 or (match[2] == LAMBDA_D and len(tensor) != r) or not len(tensor):
            length = f"{r} numbers" if match[2] == LAMBDA_D else "numbers, one an output"
            problems.append(f"{shown_name(key)} is {tuple(tensor.shape)}, not a vector of {length}")
        else:
            layers.setdefault(match[1], {})[match[2]] = tensor.float()
    for layer, pair in layers.items():
        problems += [
            f"missing {shown_name(layer)}.{part}" for part in (LAMBDA_D, LAMBDA_B) if part not in pair
        ]
    if not layers:
        problems.append(f"no tensor is a {LAMBDA_D}")
    for (key, tensor), dimension in zip(shared.items() if save_projection else (), (0, 1), strict=False):
        if tensor is None:
            problems.append(f"missing {key}, which save_projection announces")
        elif tensor.dim() != 2 or tensor.shape[dimension] != r:
            problems.append(f"{key} is {tuple(tensor.shape)}, not of rank r = {r}")
    if problems:
        raise UserError(f"{directory} is not a sound VeRA adapter: {summarize(problems)}")
    vectors = {layer: (pair[LAMBDA_D], pair[LAMBDA_B]) for layer, pair in layers.items()}
    return vectors, (shared[SHARED_A].float(), shared[SHARED_B].float()) if save_projection else None


def write_vera(directory: str | Path, adapter: VeraAdapter) -> None:
    """Write PEFT's two files, each complete or not at all."""
    defaults = {name: entry.default for name, entry in (_HONOURED | _CHANGES_NOTHING).items()}
    own = {name: getattr(adapter, name) for name in _HONOURED if hasattr(adapter, name)}
    raw = defaults | _MUST_BE_OFF | own | adapter.raw
    raw["save_projection"] = adapter.projections is not None
    tensors = {}
    for layer, pair in adapter.vectors.items():
        for part, vector in zip((LAMBDA_D, LAMBDA_B), pair, strict=True):
            tensors[f"base_model.model.{layer}.{part}"] = vector.detach().cpu().contiguous()
    for key, matrix in zip((SHARED_A, SHARED_B), adapter.projections or (), strict=False):
        tensors[key] = matrix.detach().cpu().contiguous()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / ADAPTER_WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_whole(directory / ADAPTER_CONFIG_FILE, json.dumps(dict(sorted(raw.items())), indent=2) + "\n")
