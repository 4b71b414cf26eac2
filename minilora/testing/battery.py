"""A battery: named properties, each tried on inputs that Hypothesis draws and shrinks.

Bounded, and the same every time: no database, no clock, PyTorch's random state seeded for every case.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from minilora.testing.report import Report

Subject = Any  # a Quantizer or a LayerMaker


@dataclass(frozen=True)
class Property:
    """A check, the cases to try it on, and why it does not concern some subjects."""

    check: Callable[[Subject, Any], None]  # raises AssertionError
    cases: Callable[[Subject], st.SearchStrategy]
    not_for: Callable[[Subject], str | None]  # the reason; None: it concerns this subject


class Battery:
    """Properties by name, in the order in which they were written."""

    def __init__(self):
        self.properties: dict[str, Property] = {}

    def add(self, name: str, cases: Callable, not_for: Callable = lambda subject: None) -> Callable:
        """Return a decorator that enters a check under a name."""

        def enter(check: Callable) -> Callable:
            self.properties[name] = Property(check, cases, not_for)
            return check

        return enter

    def run(
        self, subject: Subject, title: str, skip: Sequence[str], max_examples: int, shrink: bool
    ) -> Report:
        """Try every property that concerns the subject. Raises ValueError for an unknown name in `skip`."""
        for name in skip:
            check_choice("skip", name, tuple(self.properties))
        report = Report(title)
        for name, each in self.properties.items():
            if why := "by choice" if name in skip else each.not_for(subject):
                report.skipped[name] = why
                continue
            check = partial(each.check, subject)
            case = smallest_failure(each.cases(subject), check, max_examples, shrink)
            if case is None:
                report.passed.append(name)
            else:
                if shrink:
                    case = case.simplest(lambda case, check=check: reason_of_failure(check, case) is not None)
                report.failures[name] = repr(case)
                report.reasons[name] = reason_of_failure(check, case) or "it fails only now and then"
        return report


def check_choice(name: str, value: object, known: Sequence) -> None:
    """Raise ValueError for a value that is not known."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, known))}")


def smallest_failure(
    cases: st.SearchStrategy, check: Callable[[Any], None], max_examples: int, shrink: bool = True
) -> Any | None:
    """Return the smallest case with which `check` raises, or the first one; None: there is none."""
    failed: list[Any] = []

    def attempt(case: Any) -> None:
        if reason_of_failure(check, case) is not None:
            failed.append(case)
            raise AssertionError

    options = settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
    )
    try:
        options(given(cases)(attempt))()
    except Exception:
        if not failed:
            raise
    return failed[-1] if failed else None  # Hypothesis ends with the smallest


def reason_of_failure(check: Callable[[Any], None], case: Any) -> str | None:
    """Return in one line why the check fails, under a fixed random state; None: it holds."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes milliseconds
    try:
        check(case)
    except Exception as error:
        text = " ".join(str(error).split())
        return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"
    finally:
        torch.set_rng_state(state)
    return None


def expect_close(found: Tensor, expected: Tensor, bound: Tensor | float, meaning: str) -> None:
    """Raise AssertionError that names the first value beyond its bound. NaN is beyond every bound."""
    if found.shape != expected.shape:
        raise AssertionError(f"the shape is {tuple(found.shape)}, {meaning} has {tuple(expected.shape)}")
    found, expected = found.detach().double().reshape(-1), expected.detach().double().reshape(-1)
    limits = torch.as_tensor(bound, dtype=torch.float64).reshape(-1).expand(len(found))
    wrong = ~((found - expected).abs() <= limits)
    if wrong.any():
        i = int(wrong.nonzero()[0, 0])
        allowed = f", and they may differ by {limits[i]:.2g}" if limits[i] else ""
        raise AssertionError(f"value {i} is {found[i]:.7g}, {meaning} is {expected[i]:.7g}{allowed}")


def expect_same(found: Tensor, expected: Tensor, meaning: str) -> None:
    """Raise AssertionError unless all values are equal. -0 equals 0."""
    expect_close(found, expected, 0.0, meaning)
