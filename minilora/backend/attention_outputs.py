"""The outputs of fused attention, kept so that a second run need not compute them (policy `selective`).

A GPU computes attention in one of three fused kernels, and PyTorch chooses anew at every call:

    flash        16 bits, no mask                             always gives the log-sum-exps
    efficient    any dtype, any mask; all that a T4 has       gives them if it is asked to
    cuDNN        16 bits, from Hopper on; with a mask too     gives them if it is asked to

PyTorch asks for the log-sum-exps only when something needs a gradient. The first run has no graph, but the
backward of the second run reads what the first one has kept. So the first run asks for them. Where the second
run arrives at another kernel, as it may because its inputs need gradients, attention is computed again.
"""

from collections.abc import Iterable

from torch.utils._python_dispatch import TorchDispatchMode

_LOG_SUM_EXP = "compute_log_sumexp"  # the argument that asks, of every kernel that has to be asked


class AttentionOutputs(TorchDispatchMode):
    """First run: record fused attention's outputs. Second run: return them without computing.

    Works below autograd, where PyTorch calls the fused kernels.
    """

    def __init__(self, recorded: Iterable[tuple] = ()):
        super().__init__()
        self.outputs: list[tuple] = []  # for each attention: the kernel, and its tensors and plain numbers
        self.recorded = iter(recorded)

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        name = operation.overloadpacket.__name__
        if not name.startswith("_scaled_dot_product_") or "backward" in name:
            return operation(*arguments, **options)
        kernel, outputs = next(self.recorded, (None, None))
        if kernel == operation:
            return outputs
        names = [argument.name for argument in operation._schema.arguments]
        if _LOG_SUM_EXP in names:
            place = names.index(_LOG_SUM_EXP)
            arguments = (*arguments[:place], True, *arguments[place + 1 :])
        self.outputs.append((operation, operation(*arguments, **options)))
        return self.outputs[-1][1]
