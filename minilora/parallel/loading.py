"""Load a model of which every rank keeps a part. A rank reads that part of the files, and little else.

    4 bits    rank r reads the rows of the file that hold its blocks, quantizes them and keeps the bytes
    others    rank r reads its rows

No rank ever holds a whole layer while it loads. Norms and biases, thousandths of a model, are on every rank.

Double quantization centres the scales of a layer on their mean. All ranks get all float32 scales of the
layer, 1/32 of its 16-bit weights, and take the mean of the same numbers in the same order as one process. So
the packed bytes, the scales and the offset are those of `quantize_4bit`, bit for bit.

A model that its author quantized is cut in the same way. Its scales are read whole, checked as ever, and cut.
"""

import math
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora.config import ModelConfig, QuantConfig
from minilora.formats.bnb import from_bitsandbytes
from minilora.formats.bnb_int8 import from_bitsandbytes_int8
from minilora.formats.weight_files import open_weights
from minilora.formats.weights import EMBEDDING, HEAD, StoredTensors, check_finite_in, is_redundant, read_model
from minilora.int8 import Int8Tensor, quantize_int8
from minilora.model import CausalLM
from minilora.parallel.gathering import Gathering, Unit, follow
from minilora.parallel.shards import META, WORD, Layout, ShardedEmbedding, Shards, sharded_linear
from minilora.quantization import (
    NESTED_BLOCK_SIZE,
    QuantizedTensor,
    dynamic_code,
    quantize_4bit,
    quantize_dynamic,
)
from minilora.system.distributed import Processes
from minilora.system.errors import UserError


def load_sharded(
    directory: Path,
    quant: QuantConfig | None,
    dtype: torch.dtype,
    device: torch.device,
    processes: Processes,
    accept_config_fields: Collection[str] = (),
    offload: bool = False,
) -> CausalLM:
    """Return `load_model`'s frozen model with its weights divided over the ranks; `model.gathering` gathers.

    offload: keep this rank's part in the CPU's memory and gather from there. Every rank must call this.
    Raises UserError as `load_model` does.
    """
    config, stored = read_model(directory, accept_config_fields)
    with META:
        model = CausalLM(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}  # lists a tied head only once
    stored.check({name: tuple(shape) for name, shape in shapes.items()}, ignore=is_redundant(config))
    quant, place = stored.applicable(quant), (dtype, device)
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    shards = {name: Shards(_layout(stored, name, shapes[name], quant, dtype)) for name in matrices}
    for name in shapes.keys() - shards.keys():
        parent, _, leaf = name.rpartition(".")
        tensor = check_finite_in(stored.read(name, *place), name, directory)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))
    units = _units(config, shards)
    _shard(units, processes, device, offload)
    for name, part in shards.items():
        _fill(stored, name, part, processes, device)
    _put_into(model, shards, Gathering(units, head=len(units) - 1 if HEAD in shards else 0))
    return model.eval()


def _layout(
    stored: StoredTensors, name: str, shape: torch.Size, quant: QuantConfig | None, dtype: torch.dtype
) -> Layout:
    """Return how a weight of the model is stored and cut."""
    if name in stored.quantized:
        weight = _in_files(stored, name, shape, dtype)
        if isinstance(weight, Int8Tensor):
            return _in_8_bits(stored, name, shape, dtype)
        nested = weight.nested_absmax is not None
        return Layout(shape, weight.dtype, weight.quant_type, weight.blocksize, nested)
    if quant is None or name in (EMBEDDING, HEAD):
        return Layout(shape, dtype)
    in_file = stored.dtype(name)
    if quant.bits == 8:
        return _in_8_bits(stored, name, shape, in_file)
    return Layout(shape, in_file, quant.quant_type, quant.blocksize, quant.double_quant)


def _in_8_bits(stored: StoredTensors, name: str, shape: torch.Size, dtype: torch.dtype) -> Layout:
    if shape[1] % WORD.itemsize:
        raise UserError(
            f"{name} in {stored.directory} has {shape[1]} inputs; processes share weights in 8 bits where "
            f"{WORD.itemsize} divides that: set quantization_bit to 4, or parallel to ddp"
        )
    return Layout(shape, dtype, "int8")


def _units(config: ModelConfig, shards: dict[str, Shards]) -> list[Unit]:
    """Return the weights that are gathered together: the embedding, each layer, a head of its own."""
    layers = [f"model.layers.{i}." for i in range(config.num_hidden_layers)]
    of_layers = [[part for name, part in shards.items() if name.startswith(layer)] for layer in layers]
    ends = [[shards[name]] for name in (EMBEDDING, HEAD) if name in shards]
    return [Unit(parts) for parts in (ends[0], *of_layers, *ends[1:])]


def _shard(units: list[Unit], processes: Processes, device: torch.device, offload: bool) -> None:
    """Divide parameters without memory, and give this rank memory for its part."""
    from torch.distributed import group
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    mesh = DeviceMesh.from_group(group.WORLD, processes.device.type)
    policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else OffloadPolicy()
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, offload_policy=policy)
        unit.to_empty(device="cpu" if offload else device)


def _put_into(model: CausalLM, shards: dict[str, Shards], gathering: Gathering) -> None:
    """Replace the model's layers by sharded ones. Gather every unit once: then each weight has a shape."""
    numbers = {id(part): i for i, unit in enumerate(gathering.units) for part in unit.parts}
    for name, part in shards.items():
        parent = name.removesuffix(".weight")
        old = model.get_submodule(parent)
        layer = ShardedEmbedding(part) if name == EMBEDDING else sharded_linear(part, old.bias)
        model.set_submodule(parent, layer)
    if HEAD not in shards:
        model.set_submodule("lm_head", sharded_linear(shards[EMBEDDING], None))
    for layer in model.modules():
        if hasattr(layer, "shards"):
            layer.gathering, layer.unit = gathering, numbers[id(layer.shards)]
    model.gathering = gathering
    follow(model, gathering)
    for unit in gathering.units:
        unit()


# ---- this rank's rows --------------------------------------------------------------------------------------


def read_rows(stored: StoredTensors, name: str, start: int, end: int) -> Tensor:
    """Return rows start to end of a tensor in the files, in their dtype, on the CPU."""
    with open_weights(stored.files[name]) as file:
        return file.get_slice(name)[start:end]


def _fill(
    stored: StoredTensors, name: str, shards: Shards, processes: Processes, device: torch.device
) -> None:
    """Write this rank's rows of a weight into its shards."""
    layout, directory = shards.layout, stored.directory
    first, end = layout.rows_of(processes.rank, processes.count)
    if name in stored.quantized:
        parts, shards.offset = _cut(stored, name, layout, first, end)
    elif layout.in_4_bits:
        parts, shards.offset = _quantized(stored, name, layout, processes, device)
    elif first == end:
        return
    else:
        rows = check_finite_in(read_rows(stored, name, first, end).to(device, layout.dtype), name, directory)
        parts = {"values": rows}
        if layout.quant_type:
            quantized = quantize_int8(rows)
            parts = {"values": quantized.data, "absmax": quantized.absmax}
    if shards.offset is not None:
        shards.offset = shards.offset.to(device)
    for part, tensor in parts.items():
        own = shards.own(part)
        own.view(-1)[: tensor.numel()] = tensor.reshape(-1)
        own.view(-1)[tensor.numel() :] = 0  # behind the last weight


def _quantized(
    stored: StoredTensors, name: str, layout: Layout, processes: Processes, device: torch.device
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return this rank's rows of a weight in 4 bits, and the offset of all. Every rank must call this."""
    (first, end), n = layout.rows_of(processes.rank, processes.count), layout.shape.numel()
    packed = torch.empty(0, dtype=torch.uint8, device=device)
    absmax = torch.empty(0, dtype=torch.float32, device=device)
    if first < end:
        values = _read_flat(stored, name, first * layout.row, min(end * layout.row, n)).to(device)
        try:
            q = quantize_4bit(values, layout.quant_type, layout.blocksize, double_quant=False)
        except UserError as error:
            raise UserError(f"{name} in {stored.directory}: {error}") from error
        packed, absmax = q.packed, q.absmax
    if not layout.double_quant:
        return {"packed": packed, "absmax": absmax}, None
    size, _ = layout.rows_of(1, max(processes.count, 2))  # rows of the first rank, and no rank has more
    scales = absmax.new_zeros(size * NESTED_BLOCK_SIZE)
    scales[: len(absmax)] = absmax
    gathered = torch.cat([part["scales"] for part in processes.gather({"scales": scales})])
    offset = gathered[: -(-n // layout.blocksize)].to(device).mean()
    if not offset.isfinite():
        raise UserError(f"{name} in {stored.directory}: its magnitudes overflow double quantization; omit it")
    if first == end:
        return {"packed": packed, "absmax": absmax.byte(), "nested_absmax": absmax}, offset
    indices, nested = quantize_dynamic(absmax - offset, dynamic_code(True, absmax.device), NESTED_BLOCK_SIZE)
    return {"packed": packed, "absmax": indices, "nested_absmax": nested}, offset


def _read_flat(stored: StoredTensors, name: str, start: int, end: int) -> Tensor:
    """Return weights start to end of a matrix in memory order: of no more rows of the file than hold them."""
    width = stored.shapes[name][1]
    first = start // width
    rows = read_rows(stored, name, first, -(-end // width))
    return rows.reshape(-1)[start - first * width : end - first * width]


def _in_files(stored: StoredTensors, name: str, shape: torch.Size, dtype: torch.dtype):
    """Return a weight that the files hold in 4 or 8 bits, checked; its large tensor is on the meta device."""
    entries = {entry: stored.read(entry, None, "cpu") for entry in stored.quantized[name] if entry != name}
    entries[name] = torch.empty(stored.shapes[name], dtype=stored.dtype(name), device=META)
    in_4_bits = name in stored.in_4_bits
    weight = from_bitsandbytes(entries, name) if in_4_bits else from_bitsandbytes_int8(entries, name, dtype)
    return stored.check_shape(weight, name, shape)


def _cut(
    stored: StoredTensors, name: str, layout: Layout, first: int, end: int
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return rows of a weight that the files hold in 4 or 8 bits, and its offset."""
    weight = _in_files(stored, name, layout.shape, layout.dtype)
    if isinstance(weight, Int8Tensor):
        return {"values": read_rows(stored, name, first, end), "absmax": weight.absmax[first:end]}, None
    bytes_in_row, width = layout.row // 2, stored.shapes[name][1:] or (1,)
    per_entry = math.prod(width) * stored.dtype(name).itemsize  # bytes in a row of the file
    packed = read_rows(stored, name, first * bytes_in_row // per_entry, -(-end * bytes_in_row // per_entry))
    blocks = slice(first * NESTED_BLOCK_SIZE, end * NESTED_BLOCK_SIZE)
    parts = {"packed": packed.contiguous().view(-1).view(torch.uint8), "absmax": weight.absmax[blocks]}
    if weight.nested_absmax is not None:
        parts["nested_absmax"] = weight.nested_absmax[first:end]
    return parts, weight.offset


def local_bytes(model: CausalLM) -> int:
    """Return how many bytes of the sharded weights this rank keeps. Frees what is gathered."""
    model.gathering.close()
    return sum(part.nbytes for unit in model.gathering.units for part in unit.parts)


def whole_weights(model: CausalLM) -> Iterator[tuple[str, QuantizedTensor | Int8Tensor | Tensor]]:
    """Yield name and weight of every sharded layer while it is whole. Every rank must do this."""
    for name, layer in model.named_modules():
        if hasattr(layer, "gathering") and hasattr(layer, "shards"):
            layer.gathering.open(layer.unit)
            yield name, layer.weight
    model.gathering.close()
