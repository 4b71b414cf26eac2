"""Model directories in Hugging Face's layout: `config.json` and weight files, single or sharded.

Loading is lazy, tensor by tensor. The model is first built on the `meta` device, where parameters have shapes
and no memory. The headers of the files, a few kilobytes each, list the tensors and their shapes. One error
names every difference before the first weight is read. Then each tensor is read, converted, and put into its
module. A file is mapped only while one of its tensors is copied out. So the peak is the model itself and one
tensor, and no weight is ever held twice.

A model that its author quantized, whole or in part, is taken as it is: layers that its files hold in 4 or 8
bits stay so, and the others are not quantized. To quantize these too would give a model that its author never
saw.
"""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minilora.config import ModelConfig, QuantConfig
from minilora.formats.bnb import from_bitsandbytes, group_entries
from minilora.formats.bnb_int8 import from_bitsandbytes_int8, group_int8_entries
from minilora.formats.config_json import read_config_file, to_config_json
from minilora.formats.foreign_formats import foreign_files, refuse_foreign_tensors
from minilora.formats.quantized import (
    QuantizedWeight,
    bitsandbytes_config,
    plain_layers,
    quant_config_of,
    quantize,
    quantized_layer,
    to_entries,
)
from minilora.formats.weight_files import INDEX_FILE, SINGLE_FILE, index_of, open_weights, weight_files
from minilora.linear import QuantizedLinear
from minilora.memory.stored_layers import InFiles
from minilora.model import CausalLM
from minilora.quantization import FLOATS, NESTED_BLOCK_SIZE
from minilora.system.errors import UserError, summarize
from minilora.system.files import read_json, write_whole
from minilora.system.hub import resolve_model
from minilora.system.schema import shown_name
from minilora.targets import OUTPUT_HEAD

MODEL_CONFIG_FILE = "config.json"
SHARD_BYTES = 1_000_000_000  # of a weight file, unless one tensor alone is larger
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_FLOATS_IN_FILES = ("F32", "BF16", "F16")  # safetensors' names of FLOATS
_ROTARY_BUFFERS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # in old Llama files


def load_model(
    path_or_hub_id: str | Path,
    quant: QuantConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | None = None,
    accept_config_fields: Collection[str] = (),
) -> CausalLM:
    """A frozen model, in evaluation mode, from a local directory or a hub id.

    quant: how to store the weights of the linear layers. The embedding, the head and the norms stay in
    `dtype`. It does not apply to a model that its author quantized, which is read as it is. dtype: of the
    other weights and of all computing; None takes the one that `config.json` names. accept_config_fields:
    unknown fields of `config.json` that are harmless. Raises UserError for a directory that is not a model, a
    configuration that cannot be honoured, and corrupt, missing, unexpected or misshapen tensors.
    """
    directory = resolve_model(str(path_or_hub_id), revision=revision, token=token)
    config, stored = read_model(directory, accept_config_fields)
    dtype = dtype or FLOATS[config.dtype]
    with torch.device("meta"):
        model = CausalLM(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}  # lists a tied head only once
    stored.check(shapes, ignore=is_redundant(config))
    quant = stored.applicable(quant)
    large = sum(map(math.prod, shapes.values())) > 5e8
    for name in tqdm(shapes, desc="loading", unit=" tensors", leave=False, disable=None if large else True):
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(parent)
        if name in stored.quantized:
            weight = stored.read_quantized(name, shapes[name], dtype, device)
            model.set_submodule(parent, quantized_layer(weight, layer.bias))
        elif (
            quant is not None and isinstance(layer, nn.Linear) and leaf == "weight" and parent != OUTPUT_HEAD
        ):
            weight = _quantized(stored, name, quant, device)
            model.set_submodule(parent, quantized_layer(weight, layer.bias))
        else:
            weight = check_finite_in(stored.read(name, dtype, device), name, directory)
            setattr(layer, leaf, nn.Parameter(weight, requires_grad=False))
    model.tie_weights()
    return model.eval()


def read_model(
    directory: Path, accept_config_fields: Collection[str] = ()
) -> tuple[ModelConfig, "StoredTensors"]:
    """The model in a directory: its configuration, and its tensors, still on disk.

    A file may hold an output head of its own although `config.json` says that the head shares the embedding's
    weight. Then the file is right, as for transformers and vLLM: the configuration comes back untied. Raises
    UserError for a configuration that cannot be honoured, and for files that cannot be read.
    """
    config, stored = read_config(directory, accept_config_fields), StoredTensors(directory)
    if config.tie_word_embeddings and stored.differ(HEAD, EMBEDDING):
        config = replace(config, tie_word_embeddings=False)
    return config, stored


def read_config(directory: Path, accept_config_fields: Collection[str] = ()) -> ModelConfig:
    """The configuration in a model directory. Raises UserError if there is none that can be honoured."""
    if not (directory / MODEL_CONFIG_FILE).is_file():
        raise UserError(
            f"{directory} is not a model directory: it has no {MODEL_CONFIG_FILE}{foreign_files(directory)}"
        )
    return read_config_file(directory / MODEL_CONFIG_FILE, accept_config_fields)


def is_redundant(config: ModelConfig) -> Callable[[str], bool]:
    """A test of tensor names: whether files may hold the tensor although the model does not need it."""
    tied_head = HEAD if config.tie_word_embeddings else None
    return lambda name: name == tied_head or bool(_ROTARY_BUFFERS.fullmatch(name))


def original_weight(directory: Path, layer: str) -> Tensor:
    """A linear layer's weight in the files, float32 (out, in). Raises UserError if they hold 4 or 8 bits."""
    stored, name = StoredTensors(directory), f"{layer}.weight"
    if name in stored.quantized:
        raise UserError(f"{directory} holds {name} in 4 or 8 bits, and not as it was before")
    return check_finite_in(stored.read(name, torch.float32, "cpu"), name, directory)


def _quantized(
    stored: "StoredTensors", name: str, quant: QuantConfig, device: torch.device | str
) -> QuantizedWeight:
    """A weight quantized from the file's dtype: the compute dtype must not round it first."""
    weight = stored.read(name, None, device, copy=False)
    try:
        return quantize(check_finite_in(weight, name, stored.directory) if quant.bits == 8 else weight, quant)
    except UserError as error:
        raise UserError(f"{name} in {stored.directory}: {error}") from error


def check_finite_in(weight: Tensor, name: str, directory: Path) -> Tensor:
    """The weight. Raises UserError if a number in it is infinite or NaN: then its extremes are, too."""
    if not torch.stack(torch.aminmax(weight)).isfinite().all():  # faster than to ask all of them
        raise UserError(
            f"{name} in {directory} is infinite or NaN in places, as {weight.dtype}; download the model again"
        )
    return weight


class StoredTensors:
    """The tensors of a model directory by name: shapes in memory, contents still on disk."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: dict[str, Path] = {}  # tensor name -> the file that holds it
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # in safetensors' spelling: BF16, F32, ...
        for path, promised in weight_files(directory).items():
            with open_weights(path) as file:
                if lacking := sorted(promised - set(file.keys())):
                    problem = summarize([shown_name(name) for name in lacking], 3)
                    raise UserError(
                        f"{path} lacks {problem}, which {index_of(path)} puts there; download again"
                    )
                for name in file.keys():
                    if name in self.files:
                        raise UserError(
                            f"{directory} holds {shown_name(name)} twice, in {self.files[name].name} and "
                            f"{path.name}; download again"
                        )
                    entry = file.get_slice(name)
                    self.files[name] = path
                    self.shapes[name] = tuple(entry.get_shape())
                    self.dtypes[name] = entry.get_dtype()
        refuse_foreign_tensors(directory, self.files)
        self.in_4_bits = group_entries(self.files)
        # Weights in 4 or 8 bits: name -> the names of its entries.
        self.quantized = self.in_4_bits | group_int8_entries(self.files)

    @property
    def prequantized(self) -> bool:
        """Whether the author quantized the model, whole or in part: its tensors or its config say so."""
        return bool(self.quantized) or bool(
            read_json(self.directory / MODEL_CONFIG_FILE).get("quantization_config")
        )

    def quantized_layers(self) -> dict[str, InFiles] | None:
        """Full name of each layer in 4 or 8 bits -> what its scales take, by the headers alone. None: the
        model's author did not quantize it.
        """
        if not self.prequantized:
            return None
        layers = {}
        for name in self.quantized:
            layer = name.removesuffix(".weight")
            blocks, nested_blocks, rows = (
                math.prod(self.shapes.get(entry, (0,)))
                for entry in (f"{name}.absmax", f"{name}.nested_absmax", f"{layer}.SCB")
            )
            # Nested blocks of 256 stay; `from_bitsandbytes` makes others float32.
            nested = nested_blocks and nested_blocks == -(-blocks // NESTED_BLOCK_SIZE)
            scales = blocks + 4 * nested_blocks + 4 if nested else 4 * (blocks + rows)
            layers[layer] = InFiles(4 if name in self.in_4_bits else 8, scales)
        return layers

    def applicable(self, quant: QuantConfig | None) -> QuantConfig | None:
        """`quant`, or None where it must not be applied, because the author has quantized the model.

        Raises UserError if `quant` asks for 8 bits and the files hold 4, which can only be a mistake.
        """
        if quant is not None and quant.bits == 8 and self.in_4_bits:
            raise UserError(
                f"the weights in {self.directory} are quantized to 4 bits already; "
                "load them without quantization to 8 bits, or take unquantized ones"
            )
        return None if self.prequantized else quant

    def check(self, wanted: dict[str, tuple[int, ...]], ignore: Callable[[str], bool]) -> None:
        """Compare with a model's names and shapes. One UserError lists every difference."""
        problems = [f"missing {name}" for name in wanted if name not in self.shapes]
        described = {entry for name, entries in self.quantized.items() if name in wanted for entry in entries}
        extra = [name for name in self.shapes if name not in wanted and name not in described]
        problems += [f"unexpected {name}" for name in extra if not ignore(name)]
        problems += [
            f"{name} is quantized, but only linear layers can be"
            for name in wanted
            if name in self.quantized and (name == EMBEDDING or len(wanted[name]) != 2)
        ]
        for name, shape in wanted.items():
            # The shape of packed bytes does not tell the weight's shape. `read_quantized` checks it.
            if name in self.quantized or name not in self.shapes:
                continue
            if self.shapes[name] != shape:
                problems.append(f"{name} is {self.shapes[name]}, {MODEL_CONFIG_FILE} says {shape}")
            elif self.dtypes[name] not in _FLOATS_IN_FILES:
                supported = ", ".join(_FLOATS_IN_FILES)
                problems.append(f"{name} is of type {self.dtypes[name]}, supported: {supported}")
        if problems:
            raise UserError(
                f"the weights in {self.directory} do not fit its {MODEL_CONFIG_FILE}: {summarize(problems)}"
            )

    def differ(self, one: str, other: str) -> bool:
        """Whether the files hold both tensors, with different contents."""
        if one not in self.shapes or other not in self.shapes:
            return False
        return not torch.equal(*(self.read(name, None, "cpu", copy=False) for name in (one, other)))

    def read(
        self, name: str, dtype: torch.dtype | None, device: torch.device | str, copy: bool = True
    ) -> Tensor:
        """One tensor on a device, in a dtype (None: the file's).

        With `copy=False` it may be a view of the mapped file: use it at once, and drop it.
        """
        with open_weights(self.files[name]) as file:
            return file.get_tensor(name).to(device=device, dtype=dtype, copy=copy)

    def read_quantized(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
    ) -> QuantizedWeight:
        """A weight in bitsandbytes' 4 or 8 bits, (out, in).

        dtype: of 8-bit weights once dequantized, which their entries do not tell. Raises UserError for
        entries that contradict one another.
        """
        entries = {entry: self.read(entry, None, "cpu") for entry in self.quantized[name]}
        if name in self.in_4_bits:
            weight = from_bitsandbytes(entries, name)
        else:
            weight = from_bitsandbytes_int8(entries, name, dtype)
        return self.check_shape(weight, name, shape).to(device)

    def check_shape(self, weight: QuantizedWeight, name: str, shape: tuple[int, ...]) -> QuantizedWeight:
        """The weight. Raises UserError if its entries give it another shape than the model."""
        if tuple(weight.shape) != tuple(shape):
            raise UserError(
                f"{name} in {self.directory} is {tuple(weight.shape)}, "
                f"{MODEL_CONFIG_FILE} says {tuple(shape)}"
            )
        return weight

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the files."""
        with open_weights(self.files[name]) as file:
            return file.get_slice(name)[:1].dtype


def save_model(model: CausalLM, directory: str | Path) -> None:
    """Write a model without adapters as a directory that transformers and `load_model` read.

    A tied head is written once. Weights in 4 or 8 bits are written in bitsandbytes' format. Raises UserError
    for a model with both, which transformers would not read.
    """
    directory = Path(directory)
    raw = to_config_json(model.config)
    raw["torch_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, weight in weights.items():
        tensors |= to_entries(weight.to("cpu"), f"{name}.weight")
    if weights:
        kinds = [quant_config_of(weight) for weight in weights.values()]
        if len({kind.bits for kind in kinds}) > 1:
            raise UserError(
                "the model has layers in 4 and in 8 bits, which transformers cannot read from one directory: "
                "save the adapter alone"
            )
        raw["quantization_config"] = bitsandbytes_config(kinds[0], plain_layers(model), raw["torch_dtype"])
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, directory / SINGLE_FILE)
    write_whole(directory / MODEL_CONFIG_FILE, json.dumps(raw, indent=2) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, complete or not at all, with the permissions of any new file."""
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)  # safetensors lets only the owner read its files
        os.replace(part, path)
    except SafetensorError as error:  # safetensors raises this, and not OSError, for a full disk
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def write_shards(entries: Iterable[dict[str, Tensor]], directory: Path) -> None:
    """Write tensors in the order they come, into one file, or into several files and an index."""
    held, shards, total = {}, [], 0  # shards: the names in each file
    for tensors in chain(entries, [{}]):  # the empty one marks the end
        if held and (not tensors or sum(t.nbytes for t in (held | tensors).values()) > SHARD_BYTES):
            save_tensors(held, directory / f"{len(shards)}.safetensors")
            shards.append(list(held))
            total, held = total + sum(t.nbytes for t in held.values()), {}
        held |= tensors
    weight_map = {}
    for i, names in enumerate(shards):  # A file's name holds the number of files, known only now.
        file = SINGLE_FILE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        os.replace(directory / f"{i}.safetensors", directory / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_whole(directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")
