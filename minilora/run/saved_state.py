"""What the state in a checkpoint may hold, checked before anything is written and before a step is taken.

A checkpoint's digests tell that its files are as they were written. They do not tell who wrote them, nor with
which version of which optimizer. So a resume checks every value that it will use:

    check_state        counters, records: tables of fields, as soon as the file is read
    check_optimizer    the moments of every parameter, once the parameters are there: names, shapes, dtypes

A checkpoint that passes can still hold other numbers than the training had. It cannot end in a traceback.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minilora.optim import MOMENT_BLOCK_SIZE, AdamW8bit
from minilora.system.errors import UserError
from minilora.system.schema import Field, read_fields, shown, shown_name

_MOST = 10**12  # steps, seconds: far beyond every training
_MOST_BYTES = 10**15
_COUNT = Field(int, "a count", required=True, low=0, high=_MOST)
_SECONDS = Field(float, "a time", required=True, low=0, high=_MOST)
_OBJECT = Field(dict, "an object", required=True)

_STATE = {
    "step": Field(int, "finished steps", required=True, low=1, high=_MOST),
    "seconds": _SECONDS,
    "best": _OBJECT,
    "optimizer": _OBJECT,
    "loss_scale": _OBJECT,
    "tracker": _OBJECT,
    "training": _OBJECT,
    "random": Field(list, "nothing any more: checkpoints of old versions hold generators"),
}
_BEST = {  # infinite before the first evaluation
    "loss": Field(float, "the lowest held-out loss", required=True, high=math.inf),
    "step": _COUNT,
    "waited": _COUNT,
}
_TRACKER = {
    "records": Field(list, "the lines of metrics.jsonl", required=True, items=dict, longest=_MOST),
    "window": Field(list, "loss, tokens, seconds of each step since", required=True, items=list),
    "seconds": _SECONDS,
    "memory": Field(int, "peak bytes in use", low=0, high=_MOST_BYTES, default=0),
    "reserved": Field(int, "peak bytes reserved of a GPU", low=0, high=_MOST_BYTES, default=0),
    "mlflow": Field(dict, "the run there"),
    "tensorboard": Field(dict, "nothing"),
    "wandb": Field(dict, "the run there"),
}
_MLFLOW = {"run_id": Field(str, "MLflow's name of the run", nullable=True, longest=200, one_line=True)}
_WANDB = {
    "run_id": Field(str, "W&B's name of the run", nullable=True, longest=200, one_line=True),
    "directory": Field(str, "the run's output_dir", nullable=True, longest=5000),
}
_LOSS_SCALE = {"scaler": _OBJECT, "skipped": _COUNT, "skipped_in_a_row": _COUNT}
_SCALER = {
    "scale": Field(float, "S", required=True, above=0),
    "growth_factor": Field(float, "S grows by it", required=True, above=1),
    "backoff_factor": Field(float, "S falls by it", required=True, above=0, below=1),
    "growth_interval": Field(int, "steps between", required=True, low=1, high=_MOST),
    "_growth_tracker": _COUNT,
}


def check_state(state: object) -> None:
    """Raise UserError for a state with a value that a resumed run could not use."""
    fields = read_fields(state, _STATE)
    read_fields(fields["best"], _BEST, "best.")
    tracker = read_fields(fields["tracker"], _TRACKER, "tracker.")
    read_fields(tracker["mlflow"] or {}, _MLFLOW, "tracker.mlflow.")
    read_fields(tracker["wandb"] or {}, _WANDB, "tracker.wandb.")
    for record in tracker["records"]:
        _check_record(record)
    for entry in tracker["window"]:
        if len(entry) != 3 or any(type(value) not in (int, float) for value in entry):
            raise UserError(f"tracker.window must hold loss, tokens and seconds, not {shown(entry)}")
        for value in entry[1:]:
            _SECONDS.read("tracker.window", value)
    scale = read_fields(fields["loss_scale"], _LOSS_SCALE, "loss_scale.")
    if scale["scaler"]:  # empty where nothing is scaled
        read_fields(scale["scaler"], _SCALER, "loss_scale.scaler.")


def _check_record(record: dict) -> None:
    read_fields(record, {"step": _COUNT}, "tracker.records.")
    for name, value in record.items():
        Field(float, "a measurement").read(f"tracker.records.{shown_name(name)}", value)


def same_tensors(one: object, other: dict[str, Tensor]) -> bool:
    """Whether two objects hold tensors of the same names, shapes and dtypes."""
    return (
        isinstance(one, dict)
        and one.keys() == other.keys()
        and all(isinstance(value, Tensor) for value in one.values())
        and all(one[name].shape == value.shape for name, value in other.items())
        and all(one[name].dtype == value.dtype for name, value in other.items())
    )


# ---- the optimizer's moments -------------------------------------------------------------------------------

# How a part of a parameter's state lies in memory: its dtype, and its shape for a parameter.
_WHOLE = torch.float32, lambda parameter: parameter.shape
_BYTES = torch.uint8, lambda parameter: parameter.shape
_SCALES = torch.float32, lambda parameter: (-(-parameter.numel() // MOMENT_BLOCK_SIZE),)
_CODE = torch.float32, lambda parameter: (256,)

_Layout = dict[str, tuple[torch.dtype, Callable[[Tensor], tuple[int, ...]]]]
_ADAMW: _Layout = {"exp_avg": _WHOLE, "exp_avg_sq": _WHOLE}
_ADAMW_8BIT: _Layout = {
    "exp_avg": _BYTES, "exp_avg_absmax": _SCALES, "exp_avg_sq": _BYTES, "exp_avg_sq_absmax": _SCALES,
}  # fmt: skip
_BITSANDBYTES: _Layout = {"state1": _WHOLE, "state2": _WHOLE}
_BITSANDBYTES_8BIT: _Layout = {
    "state1": _BYTES, "qmap1": _CODE, "absmax1": _SCALES,
    "state2": _BYTES, "qmap2": _CODE, "absmax2": _SCALES,
}  # fmt: skip
_INNER = "__bnb_optimizer_quant_state__"  # bitsandbytes saves all but `step` within this


def check_optimizer(saved: dict, optimizer: torch.optim.Optimizer) -> None:
    """Raise UserError for a saved state that the optimizer could not load, or not take a step with."""
    groups = optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    if _settings(saved.get("param_groups")) != _settings(optimizer.state_dict()["param_groups"]):
        raise UserError("optimizer.param_groups are not those of this optimizer and its parameters")
    states = Field(dict, "the moments", required=True).read("optimizer.state", saved.get("state"))
    for i, state in states.items():
        if type(i) is not int or not 0 <= i < len(parameters):
            raise UserError(f"optimizer.state holds {shown(i)}; there are {len(parameters)} parameters")
        _check_moments(f"optimizer.state.{i}", state, parameters[i], optimizer)


def _settings(groups: object) -> object:
    """The groups without the learning rate, which every step sets, and with lists for tuples, as in JSON."""
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return groups
    plain = [{k: list(v) if isinstance(v, tuple) else v for k, v in group.items()} for group in groups]
    return [{k: v for k, v in group.items() if k != "lr"} for group in plain]


def _check_moments(name: str, state: object, parameter: Tensor, optimizer: torch.optim.Optimizer) -> None:
    parts = dict(Field(dict, "its moments", required=True).read(name, state))
    parts |= Field(dict, "", default={}).read(f"{name}.{_INNER}", parts.pop(_INNER, {}))
    _check_step(f"{name}.step", parts.pop("step", None), optimizer)
    layouts = [_ADAMW, _ADAMW_8BIT] if isinstance(optimizer, AdamW8bit) else [_ADAMW]
    if type(optimizer).__module__.startswith("bitsandbytes."):
        layouts = [_BITSANDBYTES, _BITSANDBYTES_8BIT]
    for layout in layouts:
        expected = {
            part: torch.empty(shape(parameter), dtype=dtype, device="meta")
            for part, (dtype, shape) in layout.items()
        }
        if same_tensors(parts, expected):
            if all(part.isfinite().all() for part in parts.values()):
                return
            raise UserError(f"{name} is infinite or NaN in places")
    raise UserError(f"{name} does not hold the moments of a parameter of shape {tuple(parameter.shape)}")


def _check_step(name: str, step: object, optimizer: torch.optim.Optimizer) -> None:
    """PyTorch's own AdamW counts in a float32 tensor, the others in a whole number."""
    if isinstance(optimizer, torch.optim.AdamW):
        if not same_tensors({name: step}, {name: torch.zeros(())}):
            raise UserError(f"{name} must be a number in float32, not {shown(step)}")
        Field(float, "", low=0, high=_MOST).read(name, step.item())
    else:
        _COUNT.read(name, step)
