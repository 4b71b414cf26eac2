"""Optimizers by name, AdamW, AdamW with 8-bit moments, and learning rates as plain functions of the step.

AdamW keeps two numbers for every trained one: m, the mean of its gradients, and v, the mean of their squares.
In float32 they take 8 bytes. Their range matters, as v spans many decades, and their last digits do not. So
`AdamW8bit` stores them in the 8-bit dynamic code (Dettmers et al. 2021, arXiv:2110.02861), whose steps grow
with the value, in blocks of 256:

    m  ~  signed_code[index] * absmax      v  ~  unsigned_code[index] * absmax    2 * (1 + 4/256) = 2.03 bytes

A step dequantizes a block, does in float32 what AdamW does, and quantizes it again. Tensors of fewer than
4096 elements keep float32 moments: there is next to nothing to save. The moments are bit-identical to
bitsandbytes' on a CPU.

Why not use the library? It loops over the tensors in Python, and an adapter is hundreds of small ones; here
they are one call: of the C library on a CPU, of a Triton kernel on a GPU.

The schedules are transformers' to the last digit: linear warm-up from 0, then, with t the share of the
remaining steps that are done,

    constant      1                              linear        1 - t
    cosine        (1 + cos(pi t)) / 2            polynomial    1 - t, ending at 1e-7 instead of 0
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from minilora.backend import native
from minilora.backend.choice import form_for
from minilora.quantization import dequantize_dynamic, dynamic_code, nearest_of_steps, quantize_dynamic
from minilora.system.errors import UserError

SCHEDULES = ("cosine", "linear", "constant", "polynomial")
# A new optimizer also needs its bytes in memory/ledger.py and its line in run/describe.py.
OPTIMIZERS = ("adamw_torch", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
MOMENT_BLOCK_SIZE = 256  # elements of an 8-bit moment that share a scale
_POLYNOMIAL_END = 1e-7


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step: it rises from 0 to `peak`, then follows the curve called `name`."""

    name: str  # one of SCHEDULES
    peak: float
    total_steps: int
    warmup_steps: int = 0

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0."""
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


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of parameters its multiple of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


# ---- optimizers by name ------------------------------------------------------------------------------------


def make_optimizer(
    name: str,
    named_parameters: dict[str, nn.Parameter],
    lr: float,
    weight_decay: float,
    loraplus_lr_ratio: float | None = None,
    **adam,  # betas, eps
) -> torch.optim.Optimizer:
    """Return an optimizer by its name in TrainingArguments; set its rate with `set_learning_rate`.

    loraplus_lr_ratio: the learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354). In
    a model of width D, both learn features only if A's rate falls with 1/D and B's does not; with one rate B
    learns too slowly. The authors recommend 2^4. Vectors, such as DoRA's magnitudes, go with B, as in PEFT.

    Raises UserError where bitsandbytes is needed and missing.
    """
    by_scale = {1.0: [], loraplus_lr_ratio or 1.0: []}
    for parameter_name, parameter in named_parameters.items():
        is_fast = loraplus_lr_ratio and ("lora_B" in parameter_name or parameter.ndim == 1)
        by_scale[loraplus_lr_ratio if is_fast else 1.0].append(parameter)
    groups = [dict(params=group, lr=lr * scale, lr_scale=scale) for scale, group in by_scale.items() if group]
    settings = dict(lr=lr, weight_decay=weight_decay, **adam)
    if name == "adamw_torch":
        # Fused: a loop over an adapter's hundreds of small tensors would cost more than the arithmetic.
        return torch.optim.AdamW(groups, **settings, fused=True)
    if name == "adamw_8bit":
        return AdamW8bit(groups, **settings)
    if name in ("adamw_bnb_8bit", "paged_adamw_8bit"):
        bnb_optim = _bitsandbytes_optim(name)
        paged = name == "paged_adamw_8bit" and groups[0]["params"][0].is_cuda  # only CUDA has paged memory
        return (bnb_optim.PagedAdamW8bit if paged else bnb_optim.AdamW8bit)(groups, **settings)
    raise ValueError(f"optimizer {name!r} is not one of {OPTIMIZERS}")


def _bitsandbytes_optim(name: str):
    try:
        from bitsandbytes import optim
    except ImportError as error:
        message = f"optim = {name!r} needs bitsandbytes: pip install bitsandbytes, or choose adamw_8bit"
        raise UserError(message) from error
    return optim


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments take a byte each. Raises UserError for wrong settings and for other than float32.

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
                f"AdamW8bit cannot work with lr = {lr}, betas = {betas}, eps = {eps}, "
                f"weight_decay = {weight_decay}: none may be negative, and betas must be below 1"
            )
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, min_8bit_size=min_8bit_size)
        super().__init__(params, settings)
        self._checked: dict[nn.Parameter, tuple[int, ...]] = {}  # size and addresses of the checked tensors

    def __setstate__(self, state: dict) -> None:
        """Go on with a copied or loaded state: its tensors are unchecked."""
        super().__setstate__(state)
        self._checked = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update every parameter that has a gradient, as many at once as possible."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            batches = defaultdict(list)  # (quantized, device, step) -> tensors; usually one or two batches
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(_zero_state(parameter, group["min_8bit_size"]))
                state["step"] += 1
                moments = [state[name] for name in _MOMENTS if name in state]
                tensors = parameter, parameter.grad.contiguous(), *moments
                quantized = "exp_avg_absmax" in state
                if quantized:
                    self._check(*tensors)
                batches[quantized, parameter.device, state["step"]].append(tensors)
            settings = group["lr"], group["betas"], group["eps"], group["weight_decay"]
            for (quantized, _, step), tensors in batches.items():
                if quantized:
                    adamw_8bit(tensors, *settings, step)
                else:
                    adamw(*map(list, zip(*tensors, strict=True)), *settings, step)
        return loss

    def _check(self, parameter: nn.Parameter, gradient: Tensor, *moments: Tensor) -> None:
        """Check what the kernels take for granted, unless it was checked at the same addresses.

        PyTorch itself holds a gradient to the shape, dtype and device of its parameter.
        """
        found = parameter.numel(), parameter.data_ptr(), *(moment.data_ptr() for moment in moments)
        if self._checked.get(parameter) != found:
            _check_parts(parameter, gradient, *moments)
            self._checked[parameter] = found

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state bit for bit; PyTorch's method would convert the indices to the parameter's dtype."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for i, parameter in zip(saved, parameters, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                is_tensor = isinstance(value, Tensor)
                self.state[parameter][name] = value.to(parameter.device, copy=True) if is_tensor else value


_MOMENTS = ("exp_avg", "exp_avg_absmax", "exp_avg_sq", "exp_avg_sq_absmax")


def _zero_state(parameter: nn.Parameter, min_8bit_size: int) -> dict[str, Tensor | int]:
    if parameter.dtype != torch.float32 or not parameter.is_contiguous():
        raise UserError(
            f"AdamW8bit trains contiguous float32 parameters, not {parameter.dtype} of shape "
            f"{tuple(parameter.shape)}, strides {parameter.stride()}; call .float().contiguous() on it first"
        )
    if parameter.numel() < min_8bit_size:
        return dict(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
    indices = torch.zeros_like(parameter, dtype=torch.uint8)
    absmax = parameter.new_zeros(-(-parameter.numel() // MOMENT_BLOCK_SIZE))
    first = dict(exp_avg=indices, exp_avg_absmax=absmax)
    return dict(step=0, **first, exp_avg_sq=indices.clone(), exp_avg_sq_absmax=absmax.clone())


# ---- one step ----------------------------------------------------------------------------------------------


def adamw(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],  # m
    exp_avg_sqs: list[Tensor],  # v
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,  # t, from 1
) -> None:
    """Take one step of AdamW on tensors, in place (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2):

        m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
        p <- (1 - lr weight_decay) p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    All in float32. Parameters and moments are written to.
    """
    beta1, beta2 = betas
    torch._foreach_mul_(exp_avgs, beta1)
    torch._foreach_add_(exp_avgs, gradients, alpha=1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, value=1 - beta2)
    # Through float64: PyTorch's float32 square root on a CPU is MKL's, sometimes off by the last bit.
    denominators = [v.double().sqrt_().float() for v in exp_avg_sqs]
    torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominators, eps)
    torch._foreach_mul_(parameters, 1 - lr * weight_decay)
    torch._foreach_addcdiv_(parameters, exp_avgs, denominators, value=-lr / (1 - beta1**step))


def adamw_8bit(
    tensors: list[tuple[Tensor, ...]],  # each: parameter, gradient, indices and absmax of m, and those of v
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Take one step of `adamw` with moments in 8 bits, in place (arXiv:2110.02861, section 2).

    A tensor of n elements and its gradient are float32, contiguous, of any shape. Each moment has n indices,
    uint8, and absmax (ceil(n / 256),) float32, zeros at first.

    An adapter is hundreds of small tensors. The kernels take all of them at once, as a table of addresses,
    (tensors, 7) int64: each row says where the six parts of a tensor begin, and n. Every step reads all
    addresses anew. Nothing can be out of date then, and to ask which ones have changed would cost as much.

    PyTorch does not see writes through an address, so it is told of them. A later backward that needs the
    parameters as they were is then an error, as after any other optimizer.
    """
    scalars = _scalars(lr, betas, eps, weight_decay, step)
    arguments = tensors, *_codes_and_tables(tensors[0][0].device), scalars
    match form_for(tensors[0][0], "adamw_8bit"):
        case "triton":
            from minilora.kernels.adamw_8bit import adamw_8bit as kernel

            kernel(*arguments)
        case "c":
            native.adamw_8bit(*arguments)
        case _:
            adamw_8bit_definition(tensors, arguments[1], lr, betas, eps, weight_decay, step)
    torch.autograd.graph.increment_version([parts[0] for parts in tensors])


def adamw_8bit_definition(tensors, codes, lr, betas, eps, weight_decay, step) -> None:
    """Dequantize, take a step, quantize again. codes: (256,) float32 each, of m and of v."""
    for parts in tensors:
        parameter, gradient, *moments = (part.view(-1) for part in parts)
        states = [(*moments[:2], codes[0]), (*moments[2:], codes[1])]
        m, v = (dequantize_dynamic(*state, MOMENT_BLOCK_SIZE) for state in states)  # (n,) each
        adamw([parameter], [gradient], [m], [v], lr, betas, eps, weight_decay, step)
        for moment, (indices, absmax, code) in zip((m, v), states, strict=True):
            torch._foreach_copy_([indices, absmax], quantize_dynamic(moment, code, MOMENT_BLOCK_SIZE))


@lru_cache
def _codes_and_tables(device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the codes of m and v and their tables of nearest codes, shared by all optimizers on a device."""
    codes = dynamic_code(True, device), dynamic_code(False, device)
    return codes, (nearest_of_steps(codes[0]), nearest_of_steps(codes[1]))


def _scalars(lr: float, betas, eps: float, weight_decay: float, step: int) -> tuple[float, ...]:
    """Return the eight numbers that depend on neither tensor nor element, in the kernels' order."""
    beta1, beta2 = betas
    corrected = math.sqrt(1 - beta2**step), eps, 1 - lr * weight_decay, -lr / (1 - beta1**step)
    return beta1, 1 - beta1, beta2, 1 - beta2, *corrected


def _check_parts(parameter: Tensor, gradient: Tensor, *moments: Tensor) -> None:
    """Assert what the kernels take for granted behind each address."""
    n = parameter.numel()
    blocks = -(-n // MOMENT_BLOCK_SIZE)
    expected = [(parameter, n, torch.float32), (gradient, n, torch.float32)]
    expected += zip(moments, (n, blocks) * 2, (torch.uint8, torch.float32) * 2, strict=True)
    for part, size, dtype in expected:
        assert part.numel() == size and part.dtype == dtype
        assert part.is_contiguous() and part.device == parameter.device
