"""4-bit weights as bitsandbytes keeps them in a state dict, to the byte: such checkpoints go both ways.

weight                                    uint8 (ceil(n / 2), 1)    two symbols a byte
weight.absmax                             a scale a block: float32, or uint8 where scales are quantized too
weight.quant_map                          float32 (16,)             the codebook
weight.nested_absmax, .nested_quant_map   float32                   only where scales are quantized too
weight.quant_state.bitsandbytes__nf4      uint8                     a JSON object: shape, dtype, block sizes, offset
"""

import json

import torch
from torch import Tensor

from minilora.quantization import (
    BLOCK_SIZES,
    FLOATS,
    NESTED_BLOCK_SIZE,
    QUANT_TYPES,
    QuantizedTensor,
    dynamic_code,
    four_bit_code,
)
from minilora.system.errors import UserError, summarize

_STATE_KEY = "quant_state.bitsandbytes__"  # + quant_type


def to_bitsandbytes(q: QuantizedTensor, name: str = "weight") -> dict[str, Tensor]:
    """The entries of a state dict that bitsandbytes writes for a Linear4bit's weight called `name`, to the
    byte.
    """
    state = {
        "quant_type": q.quant_type,
        "blocksize": q.blocksize,
    }  # in the order in which bitsandbytes writes them
    state |= {"dtype": str(q.dtype).removeprefix("torch."), "shape": list(q.shape)}
    entries = {
        "": q.packed.view(-1, 1),
        ".absmax": q.absmax,
        ".quant_map": four_bit_code(q.quant_type, q.packed.device).clone(),
    }
    if q.nested_absmax is not None:
        entries[".nested_absmax"] = q.nested_absmax
        entries[".nested_quant_map"] = dynamic_code(True, q.packed.device).clone()
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": q.offset.item(),
        }
    packed_state = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8, device="cpu")
    return {name + suffix: t for suffix, t in entries.items()} | {
        f"{name}.{_STATE_KEY}{q.quant_type}": packed_state
    }


def from_bitsandbytes(entries: dict[str, Tensor], name: str = "weight") -> QuantizedTensor:
    """The tensor that bitsandbytes stored as `name`, `name.absmax`, ...; other entries are ignored.

    Codebooks that differ from ours by rounding only, as other versions' do, are taken for ours. Raises
    UserError, with the problems by name, if entries are missing, truncated, or contradict one another.
    """
    state_keys = [key for key in entries if key.startswith(f"{name}.{_STATE_KEY}")]
    if len(state_keys) != 1:
        raise UserError(
            f"{name} needs exactly one entry {name}.{_STATE_KEY}nf4 or ...fp4; found {', '.join(state_keys) or 'none'}"
        )
    key = state_keys[0]
    state = _read_state(entries[key], key)
    nested = "nested_blocksize" in state
    wanted = ["", ".absmax", ".quant_map"] + [".nested_absmax", ".nested_quant_map"] * nested
    if missing := [name + suffix for suffix in wanted if name + suffix not in entries]:
        raise UserError(f"{name} is incomplete: {key} is there, but not {', '.join(missing)}")

    n = torch.Size(state["shape"]).numel()
    blocks = -(-n // state["blocksize"])
    packed = entries[name]
    expected = {  # suffix -> (elements, dtype)
        ".absmax": (blocks, torch.uint8 if nested else torch.float32),
        ".quant_map": (16, torch.float32),
        ".nested_absmax": (-(-blocks // NESTED_BLOCK_SIZE), torch.float32),
        ".nested_quant_map": (256, torch.float32),
    }
    problems = []  # `packed` may be called bfloat16, say, so that others can shard it: bytes they are
    if packed.dtype not in (torch.uint8, *FLOATS.values()) or packed.nbytes != (n + 1) // 2:
        problems.append(
            f"{name} has {packed.nbytes} bytes of {packed.dtype}, {n} weights need {(n + 1) // 2}"
        )
    for suffix in wanted[1:]:
        t, (size, dtype) = entries[name + suffix], expected[suffix]
        if (t.numel(), t.dtype) != (size, dtype):
            problems.append(f"{name}{suffix} has {t.numel()} values of {t.dtype}, not {size} of {dtype}")
        elif suffix.endswith("quant_map"):
            code = dynamic_code() if "nested" in suffix else four_bit_code(state["quant_type"])
            if not torch.allclose(t.cpu(), code, rtol=0, atol=1e-6):
                problems.append(
                    f"{name}{suffix} is not the {'dynamic' if 'nested' in suffix else state['quant_type']} code"
                )
        elif t.is_floating_point() and not t.isfinite().all():
            problems.append(f"{name}{suffix} holds infinities or NaN")
    if not nested and (
        stray := [name + s for s in (".nested_absmax", ".nested_quant_map") if name + s in entries]
    ):
        problems.append(f"{', '.join(stray)} are there, but {key} names no nested_blocksize")
    if problems:
        raise UserError(f"{name} cannot be read: {summarize(problems)}")
    return QuantizedTensor(
        packed=packed.contiguous().view(-1).view(torch.uint8),
        absmax=entries[f"{name}.absmax"].reshape(-1),
        shape=torch.Size(state["shape"]),
        dtype=FLOATS[state["dtype"]],
        quant_type=state["quant_type"],
        blocksize=state["blocksize"],
        nested_absmax=entries[f"{name}.nested_absmax"].reshape(-1) if nested else None,
        offset=torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device)
        if nested
        else None,
    )


def _read_state(packed: Tensor, key: str) -> dict:
    """The JSON object of a quant_state entry, with every value checked. Raises UserError."""
    try:
        state = json.loads(bytes(packed.cpu().view(-1).tolist()))
        if not isinstance(state, dict):
            raise ValueError("it is no object")
    except (ValueError, TypeError, RecursionError) as error:  # truncated, not UTF-8, not JSON, not bytes
        raise UserError(f"{key} is truncated or corrupt: {error}; download again") from error

    def is_size(x) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and x > 0

    checks = {
        "quant_type": lambda x: x == key.rpartition("__")[2] and x in QUANT_TYPES,
        "blocksize": lambda x: is_size(x) and x in BLOCK_SIZES,
        "dtype": lambda x: x in list(FLOATS),
        "shape": lambda x: isinstance(x, list) and all(map(is_size, x)),
    }
    if any(name.startswith("nested_") for name in state):
        checks |= {
            "nested_blocksize": lambda x: x == NESTED_BLOCK_SIZE,
            "nested_dtype": lambda x: x == "float32",
            "nested_offset": lambda x: (
                isinstance(x, (int, float)) and abs(x) <= torch.finfo(torch.float32).max
            ),
        }
    if problems := [
        f"{name} = {state.get(name)!r}" for name, fits in checks.items() if not fits(state.get(name))
    ]:
        raise UserError(f"{key} cannot be honoured: {summarize(problems)}")
    return state
