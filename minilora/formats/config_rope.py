"""RoPE in `config.json` <-> RopeConfig, with transformers' defaults for absent fields.

Both spellings are read. Where a file has both, rope_scaling goes first, as in transformers:

    the hub's             rope_theta, rope_scaling, at times original_max_position_embeddings beside them
    transformers 5's      rope_parameters, which holds them all

RopeConfig holds what the fields come to: YaRN's and LongRoPE's attention factor is a number there, whichever
fields it is derived from. Fields that another type of RoPE would read are refused by name.
"""

from minilora.config import RopeConfig
from minilora.formats.config_fields import ROPE_FIELDS, is_off
from minilora.rope import longrope_attention_factor, yarn_attention_factor
from minilora.system.errors import UserError
from minilora.system.schema import read_fields, shown, shown_name

_ORIGINAL = "original_max_position_embeddings"

# rope_type -> the fields that RopeConfig takes, and those that it is written with.
_TAKEN = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "attention_factor", _ORIGINAL),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor", _ORIGINAL),
}
_ALSO_READ = {"yarn": ("mscale", "mscale_all_dim")}
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),  # which may be null
    "longrope": ("short_factor", "long_factor"),
}
_ANYWHERE = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")


def read_rope(fields: dict, default_theta: float, head_dim: int) -> RopeConfig:
    """The rotary embedding of the fields of a `config.json`. Raises UserError that names the field."""
    source = "rope_scaling" if fields["rope_scaling"] else "rope_parameters"
    raw = fields[source] or {}
    rope = read_fields(raw, ROPE_FIELDS, f"{source}.")
    rope_type = rope["rope_type"] or rope["type"] or "default"
    _check_names(source, raw, rope, rope_type)
    longest = fields["max_position_embeddings"]
    rope[_ORIGINAL] = fields[_ORIGINAL] or rope[_ORIGINAL] or longest
    rope["theta"] = rope["rope_theta"] or fields["rope_theta"] or default_theta
    try:
        values = _DERIVED[rope_type](rope, longest, head_dim) if rope_type in _DERIVED else {}
    except UserError as error:
        raise UserError(f"{source} of type {rope_type!r}: {error}") from error
    values = {name: rope[name] for name in _TAKEN[rope_type] if rope[name] is not None} | values
    return RopeConfig(theta=rope["theta"], rope_type=rope_type, **values)


def _check_names(source: str, raw: dict, rope: dict, rope_type: str) -> None:
    """Raise UserError for a field that is missing, and for one that this type of RoPE does not have."""
    required = _REQUIRED.get(rope_type, ())
    absent = [name for name in required if name not in raw or (rope[name] is None and rope_type != "yarn")]
    if missing := sorted(absent):
        raise UserError(f"{source} of type {rope_type!r} lacks {', '.join(missing)}")
    known = {*_TAKEN[rope_type], *_ALSO_READ.get(rope_type, ()), *_ANYWHERE}
    for name, value in raw.items():
        if name not in known and not is_off(value):
            raise UserError(
                f"{source}.{shown_name(name)} = {shown(value)} is not supported with type {rope_type!r}"
            )


# ---- what one field means for another, type by type: RopeConfig's values that are no fields of the file ----


def _llama3(rope: dict, longest: int, head_dim: int) -> dict:
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    if low >= high:
        raise UserError(f"high_freq_factor must be above low_freq_factor = {low}, not {high}")
    return {}


def _dynamic(rope: dict, longest: int, head_dim: int) -> dict:
    if head_dim < 4:
        raise UserError(f"head_dim must be at least 4, not {head_dim}")
    return {_ORIGINAL: longest}


def _yarn(rope: dict, longest: int, head_dim: int) -> dict:
    """A factor of null is the ratio of the contexts; a beta of 0 is the paper's."""
    factor = rope["factor"] or longest / rope[_ORIGINAL]
    if factor < 1:
        raise UserError(f"max_position_embeddings = {longest} is below {_ORIGINAL} = {rope[_ORIGINAL]}")
    if rope["theta"] == 1:
        raise UserError("rope_theta must be above 1")
    attention_factor = rope["attention_factor"]
    if attention_factor is None:
        attention_factor = yarn_attention_factor(factor, rope["mscale"], rope["mscale_all_dim"])
    betas = dict(beta_fast=rope["beta_fast"] or 32.0, beta_slow=rope["beta_slow"] or 1.0)
    return dict(factor=factor, attention_factor=attention_factor, **betas)


def _longrope(rope: dict, longest: int, head_dim: int) -> dict:
    lists = {name: tuple(rope[name]) for name in ("short_factor", "long_factor")}
    for name, factors in lists.items():
        if len(factors) != head_dim // 2:
            raise UserError(f"{name} has {len(factors)} numbers for head_dim / 2 = {head_dim // 2} pairs")
    if rope[_ORIGINAL] < 2:
        raise UserError(f"{_ORIGINAL} must be at least 2, not {rope[_ORIGINAL]}")
    factor = rope["factor"] or max(longest / rope[_ORIGINAL], 1.0)
    attention_factor = rope["attention_factor"]
    if attention_factor is None:
        attention_factor = longrope_attention_factor(factor, rope[_ORIGINAL])
    return dict(factor=factor, attention_factor=attention_factor, **lists)


_DERIVED = dict(llama3=_llama3, dynamic=_dynamic, yarn=_yarn, longrope=_longrope)


def write_rope(rope: RopeConfig) -> dict:
    """The fields of a `config.json` in the hub's spelling."""
    scaling = {name: getattr(rope, name) for name in _TAKEN[rope.rope_type]}
    scaling = {name: list(value) if isinstance(value, tuple) else value for name, value in scaling.items()}
    scaling = {"rope_type": rope.rope_type} | scaling if scaling else None
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
