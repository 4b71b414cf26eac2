"""LoRA layers with one fault each, and the right one that they are made from."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Lora(nn.Module):
    """The right one: y = x W^T + b + s dropout(x) A^T B^T."""

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float):
        super().__init__()
        self.base, self.r, self.alpha, self.p = base.requires_grad_(False), r, lora_alpha, lora_dropout
        self.scaling, self.on, self.merged = lora_alpha / r, True, False
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        return y + self.update(x).to(y.dtype) if self.on and not self.merged else y

    def dropped(self, x):
        return F.dropout(x, self.p, self.training)

    def update(self, x):
        return F.linear(F.linear(self.dropped(x).float(), self.lora_A), self.lora_B) * self.scaling

    def delta(self):
        return self.lora_B @ self.lora_A * self.scaling

    @torch.no_grad()
    def merge(self):
        if not self.merged:
            self.base.weight.copy_(self.base.weight.float() + self.delta())
            self.merged = True

    @torch.no_grad()
    def unmerge(self):
        if self.merged:
            self.base.weight.copy_(self.base.weight.float() - self.delta())
            self.merged = False

    def enable_adapters(self, on):
        self.on = on


class RandomB(Lora):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.normal_(self.lora_B)


class ScalingUpsideDown(Lora):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scaling = self.r / self.alpha


class ScalingBySquareRoot(Lora):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scaling = self.alpha / math.sqrt(self.r)


class NoScaling(Lora):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scaling = 1.0


class DropoutOnTheWholeInput(Lora):
    def forward(self, x):
        x = self.dropped(x)
        return (
            self.base(x) + F.linear(F.linear(x.float(), self.lora_A), self.lora_B).to(x.dtype) * self.scaling
        )


class DropoutInEvaluation(Lora):
    def dropped(self, x):
        return F.dropout(x, self.p, True)


class DropoutWithoutGain(Lora):
    def dropped(self, x):
        return F.dropout(x, self.p, self.training) * (1 - self.p if self.training else 1)


class DropoutOfTheOtherShare(Lora):
    def dropped(self, x):
        return F.dropout(x, 1 - self.p, self.training) if self.p else x


class DropoutOfWholeTokens(Lora):
    def dropped(self, x):
        keep = F.dropout(torch.ones(*x.shape[:-1], 1), self.p, self.training)
        return x * keep.to(x.dtype)


class FrozenA(Lora):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.lora_A.requires_grad_(False)


class DetachedA(Lora):
    def update(self, x):
        return F.linear(F.linear(self.dropped(x).float(), self.lora_A.detach()), self.lora_B) * self.scaling


class DetachedInput(Lora):
    def update(self, x):
        return super().update(x.detach())


class ForgetsScalingInBackward(Lora):
    def update(self, x):
        narrow = F.linear(self.dropped(x).float(), self.lora_A)
        plain = F.linear(narrow, self.lora_B)
        return plain + (plain * (self.scaling - 1)).detach()  # the value is right, the gradient unscaled


class MergeTwiceAddsTwice(Lora):
    @torch.no_grad()
    def merge(self):
        self.base.weight.copy_(self.base.weight.float() + self.delta())
        self.merged = True


class MergeForgetsScaling(Lora):
    def delta(self):
        return self.lora_B @ self.lora_A


class MergeStaysActive(Lora):
    def forward(self, x):
        return self.base(x) + self.update(x).to(x.dtype) if self.on else self.base(x)


class UnmergeForgetsScaling(Lora):
    @torch.no_grad()
    def unmerge(self):
        self.base.weight.sub_(self.lora_B @ self.lora_A)
        self.merged = False


class TrainableBase(Lora):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.base.requires_grad_(True)


class TransposedFactors(Lora):
    def __init__(self, base, *arguments):
        super().__init__(base, *arguments)
        self.lora_A = nn.Parameter(torch.randn(base.in_features, self.r) / math.sqrt(3 * base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(self.r, base.out_features))

    def update(self, x):
        return self.dropped(x).float() @ self.lora_A @ self.lora_B * self.scaling


class BiasTwice(Lora):
    def update(self, x):
        bias = 0 if self.base.bias is None else self.base.bias
        return super().update(x) + bias


class AOfVarianceOne(Lora):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.normal_(self.lora_A)


class AByRank(Lora):
    """kaiming_uniform of the transposed matrix: the bound is 1 / sqrt(r)."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        nn.init.kaiming_uniform_(self.lora_A.T, a=math.sqrt(5))


class SwitchForgetsToComeBack(Lora):
    def enable_adapters(self, on):
        self.on = False


class EvalMerges(Lora):
    def train(self, mode=True):
        super().train(mode)
        self.unmerge() if mode else self.merge()
        return self


class OnlyMatrices(Lora):
    def update(self, x):
        return super().update(x.reshape(-1, x.shape[-1])).view(len(x), -1, self.base.out_features).squeeze(1)


class Float32Output(Lora):
    def forward(self, x):
        return self.base(x) + self.update(x)


class ScalesItsInput(Lora):
    def update(self, x):
        with torch.no_grad():
            x.mul_(self.scaling)
        return super().update(x) / self.scaling


WRONG = {
    RandomB: {"B = 0 is the base layer"},
    ScalingUpsideDown: {"scaling", "output"},
    ScalingBySquareRoot: {"scaling", "output"},
    NoScaling: {"scaling", "output"},
    DropoutOnTheWholeInput: {"dropout on the adapter's path"},
    DropoutInEvaluation: {"dropout in training only"},
    DropoutWithoutGain: {"dropout's gain"},
    DropoutOfTheOtherShare: {"dropout's share"},
    DropoutOfWholeTokens: {"dropout's share"},
    FrozenA: {"gradient of A", "trained factors"},
    DetachedA: {"gradient of A", "trained factors"},
    DetachedInput: {"gradient of x"},
    ForgetsScalingInBackward: {"gradient of A", "gradient of B", "gradient of x"},
    MergeTwiceAddsTwice: {"merge twice"},
    MergeForgetsScaling: {"merge"},
    MergeStaysActive: {"merge"},
    UnmergeForgetsScaling: {"unmerge", "unmerge in 16 bits"},
    TrainableBase: {"frozen base"},
    TransposedFactors: {"shapes of the factors"},
    BiasTwice: {"bias", "output"},
    AOfVarianceOne: {"distribution of A"},
    AByRank: {"distribution of A"},
    SwitchForgetsToComeBack: {"switch"},
    EvalMerges: {"train and eval keep the weight"},
    OnlyMatrices: {"leading dimensions"},
    Float32Output: {"16 bits"},
    ScalesItsInput: {"input unchanged"},
}
