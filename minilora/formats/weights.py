"""Model directories in Hugging Face's layout: `config.json` and safetensors files, single or sharded.

Loading is lazy, tensor by tensor. The model is first built on the `meta` device, where parameters have shapes
and no memory; the headers of the files, a few kilobytes each, say which tensors are there and of which shape,
and everything that is wrong is listed in one error before the first weight is read. Then each tensor is read,
converted, and put in its place. A file is mapped only while one of its tensors is copied out, so the peak is
the model itself and one tensor: no weight is ever held twice.
"""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from minilora.config import ModelConfig, QuantConfig
from minilora.formats.bnb import from_bitsandbytes, to_bitsandbytes
from minilora.formats.config_json import read_config_file, to_config_json
from minilora.int8 import quantize_int8
from minilora.linear import Linear4bit, Linear8bit, QuantizedLinear
from minilora.lora import OUTPUT_HEAD
from minilora.model import CausalLM
from minilora.quantization import QuantizedTensor, quantize_4bit
from minilora.system.errors import UserError, summarize
from minilora.system.files import write_whole
from minilora.system.hub import resolve_model

MODEL_CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

STATE_KEY = (
    ".quant_state.bitsandbytes__"  # in the name of the entry that describes a weight in bitsandbytes' 4 bits
)

_FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_COMPUTED = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)  # in old Llama files; follows from the config


def load_model(
    path_or_hub_id: str | Path,
    quant: QuantConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | None = None,
) -> CausalLM:
    """A frozen model, in evaluation mode, from a local directory or a hub id.

    quant: how to store the weights of the linear layers; the embedding, the head and the norms stay in
    `dtype`. Weights that lie quantized in the files (bitsandbytes, 4 bits) stay as they are. dtype: of the
    other weights and of all computing; None takes the one that `config.json` names. Raises UserError for a
    directory that is not a model, a configuration that cannot be honoured, and corrupt, missing, unexpected
    or wrongly shaped tensors.
    """
    directory = resolve_model(str(path_or_hub_id), revision=revision, token=token)
    config = read_config(directory)
    dtype = dtype or _config_dtype(config, directory)
    stored = StoredTensors(directory)
    with torch.device("meta"):
        model = CausalLM(config)
    wanted = {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }  # a tied head is not among them: it is the embedding
    stored.check(wanted, ignore=is_redundant(config))
    if stored.quantized and quant is not None and quant.bits != 4:
        raise UserError(
            f"the weights in {directory} are quantized to 4 bits already; load them so, or take unquantized ones"
        )
    large = sum(map(math.prod, wanted.values())) > 5e8
    for name in tqdm(wanted, desc="loading", unit=" tensors", leave=False, disable=None if large else True):
        parent, _, leaf = name.rpartition(".")
        layer = model.get_submodule(parent)
        if name in stored.quantized:
            model.set_submodule(
                parent, Linear4bit(stored.read_quantized(name, wanted[name], device), layer.bias)
            )
        elif (
            quant is not None and isinstance(layer, nn.Linear) and leaf == "weight" and parent != OUTPUT_HEAD
        ):
            # Quantized as it lies in the file: the compute dtype must not round it first.
            weight = stored.read(name, None, device, copy=False)
            try:
                model.set_submodule(parent, _quantized(weight, layer.bias, quant))
            except UserError as error:
                raise UserError(f"{name} in {directory}: {error}") from error
        else:
            setattr(layer, leaf, nn.Parameter(stored.read(name, dtype, device), requires_grad=False))
    model.tie_weights()
    return model.eval()


def _quantized(weight: Tensor, bias: nn.Parameter | None, quant: QuantConfig) -> QuantizedLinear:
    if quant.bits == 8:
        return Linear8bit(quantize_int8(weight), bias)
    return Linear4bit(quantize_4bit(weight, quant.quant_type, quant.blocksize, quant.double_quant), bias)


def read_config(directory: Path) -> ModelConfig:
    """The configuration in a model directory. Raises UserError if it has none or one that cannot be honoured."""
    if not (directory / MODEL_CONFIG_FILE).is_file():
        raise UserError(f"{directory} is not a model directory: it has no {MODEL_CONFIG_FILE}")
    return read_config_file(directory / MODEL_CONFIG_FILE)


def save_model(model: CausalLM, directory: str | Path) -> None:
    """Write a model without adapters as a directory that transformers, and `load_model`, read. A tied head is
    written once.

    4-bit weights are written in bitsandbytes' format. Raises UserError for 8-bit ones, which have no format
    that others read.
    """
    directory = Path(directory)
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    raw = to_config_json(model.config) | {
        "torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")
    }
    quantized = {name: m.weight for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    for name, weight in quantized.items():
        if not isinstance(weight, QuantizedTensor):
            raise UserError(
                f"{name} is in 8 bits, which no other program would read back: save the adapter alone"
            )
        tensors |= to_bitsandbytes(weight.to("cpu"), f"{name}.weight")
    if quantized:
        raw["quantization_config"] = bitsandbytes_config(
            weight.quant_type, weight.nested_absmax is not None, raw["torch_dtype"]
        )
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, directory / SINGLE_FILE)
    write_whole(directory / MODEL_CONFIG_FILE, json.dumps(raw, indent=2) + "\n")


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole or not at all, readable as other files are (safetensors' own are for the
    owner alone).
    """
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata={"format": "pt"})
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        os.replace(part, path)
    except SafetensorError as error:  # a full disk comes as this, and not as an OSError
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def bitsandbytes_config(quant_type: str, double_quant: bool, compute_dtype: str) -> dict:
    """The `quantization_config` of a `config.json` by which transformers knows that the files hold 4 bits a
    weight.
    """
    kind = dict(
        quant_type=quant_type,
        use_double_quant=double_quant,
        compute_dtype=compute_dtype,
        quant_storage="uint8",
    )
    return {"quant_method": "bitsandbytes", "load_in_4bit": True} | {
        f"bnb_4bit_{key}": value for key, value in kind.items()
    }


class StoredTensors:
    """The tensors of a model directory by name, with their shapes known and their contents still on disk."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.files: dict[str, Path] = {}  # tensor name -> the file that holds it
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # as safetensors spells them: BF16, F32, ...
        for path in self._shards():
            with _open(path) as file:
                for name in file.keys():
                    entry = file.get_slice(name)
                    self.files[name] = path
                    self.shapes[name] = tuple(entry.get_shape())
                    self.dtypes[name] = entry.get_dtype()
        # weights in bitsandbytes' 4 bits: name -> the names of all entries that describe it, its own among
        # them
        self.quantized = {name.partition(STATE_KEY)[0]: [] for name in self.files if STATE_KEY in name}
        for name in self.files:
            path, weight, _ = name.rpartition(".weight")
            if path + weight in self.quantized:
                self.quantized[path + weight].append(name)

    def _shards(self) -> list[Path]:
        index = self.directory / INDEX_FILE
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError) as error:
                raise UserError(f"{index} is not a safetensors index: {error!r}") from error
            shards = [self.directory / name for name in names]
            if absent := [path.name for path in shards if not path.is_file()]:
                raise UserError(
                    f"{self.directory} lacks {', '.join(absent)}, which {INDEX_FILE} names; download again"
                )
            return shards
        if (self.directory / SINGLE_FILE).is_file():
            return [self.directory / SINGLE_FILE]
        pickled = sorted(path.name for path in self.directory.glob("*.bin"))
        hint = f" ({pickled[0]} is pickled and never read; convert it to safetensors)" if pickled else ""
        raise UserError(f"{self.directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")

    def check(self, wanted: dict[str, tuple[int, ...]], ignore: Callable[[str], bool]) -> None:
        """Compare with the names and shapes that a model wants; one UserError lists every difference."""
        problems = [f"missing {name}" for name in wanted if name not in self.shapes]
        described = {entry for name, entries in self.quantized.items() if name in wanted for entry in entries}
        extra = [name for name in self.shapes if name not in wanted and name not in described]
        problems += [f"unexpected {name}" for name in extra if not ignore(name)]
        for name, shape in wanted.items():
            if name in self.quantized:
                continue  # its bytes say nothing of its shape; `read_quantized` checks it
            if name in self.shapes and self.shapes[name] != shape:
                problems.append(f"{name} is {self.shapes[name]}, {MODEL_CONFIG_FILE} says {shape}")
            elif name in self.shapes and self.dtypes[name] not in _FLOAT_DTYPES:
                problems.append(
                    f"{name} is of type {self.dtypes[name]}, supported: {', '.join(_FLOAT_DTYPES)}"
                )
        if problems:
            raise UserError(
                f"the weights in {self.directory} do not fit its {MODEL_CONFIG_FILE}: {summarize(problems)}"
            )

    def read_quantized(
        self, name: str, shape: tuple[int, ...], device: torch.device | str
    ) -> QuantizedTensor:
        """A weight that lies in the files in bitsandbytes' 4 bits. Raises UserError for entries that do not
        fit together.
        """
        weight = from_bitsandbytes(
            {entry: self.read(entry, None, "cpu") for entry in self.quantized[name]}, name
        )
        if tuple(weight.shape) != shape:
            raise UserError(
                f"{name} in {self.directory} is {tuple(weight.shape)}, {MODEL_CONFIG_FILE} says {shape}"
            )
        return weight.to(device)

    def read(
        self, name: str, dtype: torch.dtype | None, device: torch.device | str, copy: bool = True
    ) -> Tensor:
        """One tensor, in the dtype (None: its own) and on the device asked for.

        With `copy=False` it may be a view of the mapped file, to be used at once and let go.
        """
        with _open(self.files[name]) as file:
            return file.get_tensor(name).to(device=device, dtype=dtype, copy=copy)


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt: {error}; download it again") from error


def is_redundant(config: ModelConfig) -> Callable[[str], bool]:
    """Tells of a tensor's name whether files may hold it though the model has no use for it."""
    return lambda name: (
        bool(_COMPUTED.fullmatch(name)) or (config.tie_word_embeddings and name == "lm_head.weight")
    )


def _config_dtype(config: ModelConfig, directory: Path) -> torch.dtype:
    names = {str(d).removeprefix("torch."): d for d in _FLOAT_DTYPES.values()}
    if config.dtype not in names:
        raise UserError(
            f"{directory / MODEL_CONFIG_FILE}: torch_dtype {config.dtype!r} is not supported; supported: {', '.join(names)}"
        )
    return names[config.dtype]
