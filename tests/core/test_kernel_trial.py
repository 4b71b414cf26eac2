"""A Triton kernel is used after its trial. On the CPU the definitions stand in for the kernels."""

from functools import partial

import pytest
import torch

from minilora import loss, ops
from minilora.backend import dropout, kernel_trial, segmented

CPU = torch.device("cpu")
IN_PLACE = ("cross_entropy", "add_dropped", "add_dropped_product", "expand")


def definition_of(operation):
    for module in (ops, dropout, loss, segmented):
        if hasattr(module, f"{operation}_definition"):
            return getattr(module, f"{operation}_definition")
    raise AssertionError(operation)


def dtypes_of(operation):
    return [torch.float32] if operation == "cross_entropy" else [torch.float32, torch.bfloat16, torch.float16]


def problem_of(operation, form, dtype):
    definition = definition_of(operation)
    return kernel_trial._problem(kernel_trial.TRIALS[operation], form, definition, CPU, dtype)


def test_every_kernel_has_a_trial():
    operations = pytest.importorskip("minilora.kernels.operations", reason="Triton is not installed")
    assert kernel_trial.TRIALS.keys() == set(operations.__all__)


@pytest.mark.parametrize("operation", kernel_trial.TRIALS)
def test_the_definition_passes_its_own_trial_and_each_wrong_result_of_it_fails(operation):
    definition = definition_of(operation)

    def wrong(*operands, place, share, **options):
        """Change one number of one result, by a share of the largest."""
        results = definition(*operands, **options)
        written = results if isinstance(results, tuple) else (results,)
        if operation in IN_PLACE:
            written = (operands[0], *(t for t in written if t is not None))
        target = written[place % len(written)]
        target[(-1,) * target.dim()] += target.abs().max() * share
        return results

    for dtype in dtypes_of(operation):
        assert problem_of(operation, definition, dtype) == ""
        share = 0.02 if dtype == torch.float32 else 0.1
        for place in range(3):
            form = partial(wrong, place=place, share=share)
            assert problem_of(operation, form, dtype) == "a trial gave other numbers than the definition"


def test_an_element_that_is_wrongly_dropped_fails():
    def other_seed(x, seed, stream, threshold):
        return dropout.dropout_definition(x, seed + 1, stream, threshold)

    assert problem_of("dropout", other_seed, torch.float16)


def test_a_kernel_that_fails_is_one_line_and_is_asked_once(capsys):
    calls = []

    def broken(*operands):
        calls.append(1)
        raise RuntimeError("no compiler\nfound")

    for _ in range(3):
        assert not kernel_trial.passed("swiglu", broken, ops.swiglu_definition, CPU, torch.float16)
    said = capsys.readouterr().err
    assert calls == [1] and said.count("\n") == 1
    assert "swiglu is slower here, without its Triton kernel: RuntimeError: no compiler" in said
