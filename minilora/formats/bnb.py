"""4-bit weights in bitsandbytes' format, to the byte: checkpoints go both ways.

A state dict holds several entries for one weight:

    weight                                    uint8 (ceil(n / 2), 1)   two symbols a byte; or the same bytes
                                                                       called bfloat16, say (quant_storage)
    weight.absmax                             float32, one scale a block; uint8 where scales are quantized too
    weight.quant_map                          float32 (16,)            the codebook
    weight.nested_absmax, .nested_quant_map   float32                  only where scales are quantized too
    weight.quant_state.bitsandbytes__nf4      uint8                    JSON: shape, dtype, block sizes, offset
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from minilora.quantization import (
    BLOCK_SIZES,
    FLOATS,
    NESTED_BLOCK_SIZE,
    QUANT_TYPES,
    QuantizedTensor,
    dequantize_dynamic,
    dynamic_code,
    four_bit_code,
)
from minilora.system.errors import UserError, summarize
from minilora.system.schema import shown

_STATE_KEY = ".quant_state.bitsandbytes__"  # between the weight's name and the quant_type
_NESTED = (".nested_absmax", ".nested_quant_map")
# What quant_storage may call the packed bytes, so that a program can shard them with other weights.
_STORAGE = (torch.uint8, torch.int8, torch.float64, *FLOATS.values())


def to_bitsandbytes(q: QuantizedTensor, name: str = "weight") -> dict[str, Tensor]:
    """The entries that bitsandbytes writes for a Linear4bit's weight called `name`, to the byte."""
    state = {  # in bitsandbytes' order
        "quant_type": q.quant_type,
        "blocksize": q.blocksize,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    entries = {
        name: q.packed.view(-1, 1),
        f"{name}.absmax": q.absmax,
        f"{name}.quant_map": four_bit_code(q.quant_type, q.packed.device).clone(),
    }
    if q.nested_absmax is not None:
        entries[f"{name}.nested_absmax"] = q.nested_absmax
        entries[f"{name}.nested_quant_map"] = dynamic_code(True, q.packed.device).clone()
        state["nested_blocksize"] = NESTED_BLOCK_SIZE
        state["nested_dtype"] = "float32"
        state["nested_offset"] = q.offset.item()
    text = json.dumps(state).encode()
    entries[f"{name}{_STATE_KEY}{q.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8, device="cpu")
    return entries


def group_entries(names: Iterable[str]) -> dict[str, list[str]]:
    """Name of each weight in 4 bits -> the names of its entries, its own among them, in the given order."""
    names = list(names)
    groups = {name.partition(_STATE_KEY)[0]: [] for name in names if _STATE_KEY in name}
    for name in names:
        layer, weight, _ = name.rpartition(".weight")
        if layer + weight in groups:
            groups[layer + weight].append(name)
    return groups


def from_bitsandbytes(entries: dict[str, Tensor], name: str = "weight") -> QuantizedTensor:
    """The tensor that bitsandbytes stored as `name`, `name.absmax`, ...; other entries are ignored.

    Other versions' codebooks may differ from ours by rounding; ours replace them. Raises UserError, with the
    problems by name, if entries are missing, truncated, or contradict one another.
    """
    state = _find_state(entries, name)
    if problems := _packed_problems(entries[name], name, state) + _table_problems(entries, name, state):
        raise UserError(f"{name} cannot be read: {summarize(problems)}")
    return QuantizedTensor(
        packed=entries[name].contiguous().view(-1).view(torch.uint8),
        shape=state.shape,
        dtype=state.dtype,
        quant_type=state.quant_type,
        blocksize=state.blocksize,
        **_read_scales(entries, name, state),
    )


def _read_scales(entries: dict[str, Tensor], name: str, state: "_State") -> dict[str, Tensor]:
    """The fields of a QuantizedTensor that hold scales.

    All kernels know scales in nested blocks of 256, the only size that bitsandbytes writes. Scales in other
    blocks become float32, with the same values and 0.4 bits a weight more.
    """
    absmax = entries[f"{name}.absmax"].reshape(-1)
    if state.offset is None:
        return {"absmax": absmax}
    nested_absmax = entries[f"{name}.nested_absmax"].reshape(-1)
    offset = torch.tensor(state.offset, dtype=torch.float32, device=absmax.device)
    if state.nested_blocksize == NESTED_BLOCK_SIZE:
        return {"absmax": absmax, "nested_absmax": nested_absmax, "offset": offset}
    code = dynamic_code(True, absmax.device)
    return {"absmax": dequantize_dynamic(absmax, nested_absmax, code, state.nested_blocksize) + offset}


@dataclass(frozen=True)
class _State:
    """The checked contents of a quant_state entry."""

    key: str  # the entry's own name
    quant_type: str
    blocksize: int
    dtype: torch.dtype
    shape: torch.Size
    offset: float | None  # None: scales are not quantized
    nested_blocksize: int | None  # scales that share one of theirs


def _find_state(entries: dict[str, Tensor], name: str) -> _State:
    """The state of the weight called `name`. Raises UserError if it is wrong, or another entry is missing."""
    keys = [key for key in entries if key.startswith(name + _STATE_KEY)]
    if len(keys) != 1:
        raise UserError(
            f"{name} needs exactly one entry {name}{_STATE_KEY}nf4 or ...fp4; "
            f"it has {', '.join(keys) or 'none'}"
        )
    state = _parse_state(entries[keys[0]], keys[0])
    suffixes = ("", ".absmax", ".quant_map", *(_NESTED if state.offset is not None else ()))
    if missing := [name + suffix for suffix in suffixes if name + suffix not in entries]:
        raise UserError(f"{name} is incomplete: {state.key} is there, but not {', '.join(missing)}")
    return state


def _parse_state(packed: Tensor, key: str) -> _State:
    """The JSON object of a quant_state entry, with every value checked. Raises UserError."""
    try:
        raw = json.loads(bytes(packed.cpu().view(-1).tolist()))
        if not isinstance(raw, dict):
            raise ValueError("it is no object")
    except (ValueError, TypeError, RecursionError) as error:  # truncated, not UTF-8, not JSON, not bytes
        raise UserError(f"{key} is truncated or corrupt: {error}; download again") from error
    quant_type, blocksize, dtype, shape = map(raw.get, ("quant_type", "blocksize", "dtype", "shape"))
    checks = {
        "quant_type": quant_type == key.rpartition("__")[2] and quant_type in QUANT_TYPES,
        "blocksize": _is_block_size(blocksize),
        "dtype": dtype in list(FLOATS),
        "shape": isinstance(shape, list) and all(map(_is_size, shape)) and math.prod(shape) < 2**62,
    }
    offset, nested_blocksize = raw.get("nested_offset"), raw.get("nested_blocksize")
    nested = any(field.startswith("nested_") for field in raw)
    if nested:
        largest = torch.finfo(torch.float32).max
        checks["nested_blocksize"] = _is_block_size(nested_blocksize)
        checks["nested_dtype"] = raw.get("nested_dtype") == "float32"
        checks["nested_offset"] = type(offset) in (int, float) and abs(offset) <= largest
    if problems := [f"{field} = {shown(raw.get(field))}" for field, fits in checks.items() if not fits]:
        raise UserError(f"{key} cannot be honoured: {summarize(problems)}")
    sizes = key, quant_type, blocksize, FLOATS[dtype], torch.Size(shape)
    return _State(*sizes, offset if nested else None, nested_blocksize if nested else None)


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _is_block_size(value: object) -> bool:
    return _is_size(value) and value in BLOCK_SIZES


def _packed_problems(packed: Tensor, name: str, state: _State) -> list[str]:
    """A sentence if the packed symbols are not as many as the shape asks for."""
    weights = state.shape.numel()
    needed = (weights + 1) // 2
    if packed.dtype in _STORAGE and packed.nbytes == needed:
        return []
    return [f"{name} has {packed.nbytes} bytes of {packed.dtype}, {weights} weights need {needed}"]


def _table_problems(entries: dict[str, Tensor], name: str, state: _State) -> list[str]:
    """One sentence for each entry of scales or codes that contradicts the state."""
    nested = state.offset is not None
    blocks = -(-state.shape.numel() // state.blocksize)
    expected = {  # suffix -> (elements, dtype, codebook)
        ".absmax": (blocks, torch.uint8 if nested else torch.float32, None),
        ".quant_map": (16, torch.float32, state.quant_type),
    }
    if nested:
        expected[".nested_absmax"] = (-(-blocks // state.nested_blocksize), torch.float32, None)
        expected[".nested_quant_map"] = (256, torch.float32, "dynamic")
    problems = []
    for suffix, (size, dtype, codebook) in expected.items():
        table = entries[name + suffix]
        if (table.numel(), table.dtype) != (size, dtype):
            problems.append(
                f"{name}{suffix} has {table.numel()} values of {table.dtype}, not {size} of {dtype}"
            )
        elif codebook is not None:
            code = dynamic_code() if codebook == "dynamic" else four_bit_code(codebook)
            if not torch.allclose(table.cpu(), code, rtol=0, atol=1e-6):
                problems.append(f"{name}{suffix} is not the {codebook} code")
        elif table.is_floating_point() and not table.isfinite().all():
            problems.append(f"{name}{suffix} holds infinities or NaN")
    stray = [name + suffix for suffix in _NESTED if name + suffix in entries]
    if stray and not nested:
        problems.append(f"{', '.join(stray)} are there, but {state.key} names no nested_blocksize")
    return problems
