"""Optimizers by name, AdamW with 8-bit moments, and learning-rate schedules as plain functions of the step.

AdamW keeps two numbers for every one that it trains: m, the mean of the gradients, and v, that of their
squares. In float32 they are 8 bytes. What matters of them is their range, as v spans many decades, rather
than their last digits. So `AdamW8bit` stores them in the 8-bit dynamic code (Dettmers et al. 2021,
arXiv:2110.02861), whose steps grow with the value, in blocks of 256 with a scale:

    m  ~  signed_code[place] * absmax        v  ~  unsigned_code[place] * absmax        2 * (1 + 4/256) = 2.03 bytes

A step dequantizes a block, does in float32 what AdamW does, and quantizes it again (`adamw.adamw_8bit`).
Tensors of fewer than 4096 elements keep float32 moments: there is next to nothing to save in them.

The moments are to the bit those of bitsandbytes on a CPU. That takes over a fault of its quantizer there: it
rounds values to one of 65,536 steps from -1 to 1, none of which is 0, so a 0 beside larger values comes back
as 2e-5 of the block's largest in m and as 1.6e-5 in v; a parameter that never has a gradient, next to some
that do, drifts by some 0.003 of the learning rate a step. Why not use the library, then? It loops over the
tensors in Python, and an adapter is hundreds of small ones; here they are one call.

The schedules are transformers' to the last digit: linear warm-up from 0, then

    constant      1                              linear        1 - t
    cosine        (1 + cos(pi t)) / 2            polynomial    1 - t, ending at 1e-7 instead of 0

with t the share of the steps after warm-up that are done.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from minilora import adamw, ops
from minilora.quantization import dynamic_code
from minilora.system.errors import UserError

SCHEDULES = ("cosine", "linear", "constant", "polynomial")
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")

_POLYNOMIAL_END = 1e-7


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step: it rises from 0 to `peak`, then follows the curve called `name`."""

    name: str  # one of SCHEDULES
    peak: float
    total_steps: int
    warmup_steps: int = 0

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        t = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        match self.name:
            case "constant":
                return self.peak
            case "linear":
                return self.peak * max(0.0, 1.0 - t)
            case "cosine":
                return self.peak * 0.5 * (1.0 + math.cos(math.pi * t))
            case "polynomial":
                end = _POLYNOMIAL_END
                return end if t > 1 else (self.peak - end) * (1.0 - t) + end
        raise ValueError(f"schedule {self.name!r} is not one of {SCHEDULES}")


def make_optimizer(
    name: str,
    named_parameters: dict[str, nn.Parameter],
    lr: float,
    weight_decay: float,
    loraplus_lr_ratio: float | None = None,
) -> torch.optim.Optimizer:
    """An optimizer by its name in Hugging Face's TrainingArguments; set its rate with `set_learning_rate`.

    loraplus_lr_ratio: the learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354). For
    both to learn features in a model of width D, A's rate should go with 1/D and B's not; with one rate for
    both, B learns too slowly. The authors recommend 2^4. Vectors, such as DoRA's magnitudes, go with B, as in
    PEFT.

    Raises UserError where bitsandbytes is needed and missing.
    """
    by_scale = {1.0: [], loraplus_lr_ratio or 1.0: []}
    for parameter_name, parameter in named_parameters.items():
        is_fast = loraplus_lr_ratio and ("lora_B" in parameter_name or parameter.ndim == 1)
        by_scale[loraplus_lr_ratio if is_fast else 1.0].append(parameter)
    groups = [
        dict(params=params, lr=lr * scale, lr_scale=scale) for scale, params in by_scale.items() if params
    ]
    settings = dict(lr=lr, weight_decay=weight_decay)
    if name == "adamw_torch":
        # One fused pass over all tensors: an adapter is hundreds of small ones, and a loop over them would
        # cost more than the sums.
        return torch.optim.AdamW(groups, **settings, fused=True)
    if name == "adamw_8bit":
        return AdamW8bit(groups, **settings)
    if name in ("adamw_bnb_8bit", "paged_adamw_8bit"):
        bitsandbytes_optim = _bitsandbytes_optim(name)
        paged = name == "paged_adamw_8bit" and _can_page(groups[0]["params"][0].device)
        return (bitsandbytes_optim.PagedAdamW8bit if paged else bitsandbytes_optim.AdamW8bit)(
            groups, **settings
        )
    raise ValueError(f"optimizer {name!r} is not one of {OPTIMIZERS}")


def describe_optimizer(name: str, device: torch.device, loraplus_lr_ratio: float | None = None) -> str:
    """What `make_optimizer` makes of a name on a device, in one line."""
    line = {
        "adamw_torch": "AdamW with 32-bit moments",
        "adamw_8bit": "AdamW with 8-bit moments",
        "adamw_bnb_8bit": "bitsandbytes' AdamW with 8-bit moments",
        "paged_adamw_8bit": "bitsandbytes' AdamW with 8-bit moments, paged to main memory from 100,000 elements a tensor on",
    }[name]
    if name == "paged_adamw_8bit" and not _can_page(device):
        line = (
            f"bitsandbytes' AdamW with 8-bit moments, not paged: paging is CUDA's, and this is {device.type}"
        )
    return line + (f"; B learns at {loraplus_lr_ratio:g} times the rate (LoRA+)" if loraplus_lr_ratio else "")


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of parameters its multiple of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the tensors in an optimizer's state hold; what several parameters share, such as a codebook,
    counts once.
    """
    tensors = (
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _can_page(device: torch.device) -> bool:
    return device.type == "cuda"


def _bitsandbytes_optim(name: str):
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise UserError(
            f"optim = {name!r} needs bitsandbytes: pip install bitsandbytes, or choose adamw_8bit"
        ) from error
    return optim


@lru_cache
def _codebooks(device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The codes of m and v, and their tables, which all optimizers on a device share."""
    codes = dynamic_code(True, device), dynamic_code(False, device)
    return codes, (ops.nearest_of_steps(codes[0]), ops.nearest_of_steps(codes[1]))


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments take a byte each. Raises UserError for settings out of range and for parameters
    that are not float32.

    The state of a parameter is flat: `step`, a number; `exp_avg` and `exp_avg_sq` in its shape, float32 if it
    is small, else uint8, and then `exp_avg_absmax` and `exp_avg_sq_absmax`, float32 (ceil(n / 256),).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,  # tensors with fewer elements keep float32 moments
    ):
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise UserError(
                f"AdamW8bit cannot work with lr = {lr}, betas = {betas}, eps = {eps}, weight_decay = {weight_decay}: "
                "none may be negative, and betas must be below 1"
            )
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, min_8bit_size=min_8bit_size)
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient, as many as can be at once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            batches = defaultdict(list)  # (quantized, device, step) -> tensors; one or two batches, as a rule
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_zero_state(parameter, group["min_8bit_size"]))
                state["step"] += 1
                moments = [state[name].view(-1) for name in _MOMENTS if name in state]
                tensors = parameter.view(-1), parameter.grad.reshape(-1), *moments
                batches["exp_avg_absmax" in state, parameter.device, state["step"]].append(tensors)
            settings = group["lr"], group["betas"], group["eps"], group["weight_decay"]
            for (quantized, device, step), tensors in batches.items():
                if quantized:
                    adamw.adamw_8bit(tensors, *_codebooks(device), *settings, step)
                else:
                    adamw.adamw(*map(list, zip(*tensors, strict=True)), *settings, step)
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """As PyTorch's, but bit for bit: that one would make floats of the places, in the dtype of the
        parameter.
        """
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, parameter in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[parameter][name] = (
                    value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                )


_MOMENTS = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")


def _zero_state(parameter: nn.Parameter, min_8bit_size: int) -> dict[str, Tensor | int]:
    if parameter.dtype != torch.float32 or not parameter.is_contiguous():
        raise UserError(
            f"AdamW8bit trains contiguous float32 parameters, not {parameter.dtype} of shape {tuple(parameter.shape)} and "
            f"strides {parameter.stride()}; call .float().contiguous() on it first"
        )
    if parameter.numel() < min_8bit_size:
        return dict(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
    places = torch.zeros_like(parameter, dtype=torch.uint8)
    absmax = parameter.new_zeros(-(-parameter.numel() // adamw.MOMENT_BLOCK_SIZE))
    first = dict(exp_avg=places, exp_avg_absmax=absmax)
    return dict(step=0, **first, exp_avg_sq=places.clone(), exp_avg_sq_absmax=absmax.clone())
