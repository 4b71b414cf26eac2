"""What a battery of properties found: a table to read, and an error to raise in a test."""

import textwrap
from dataclasses import dataclass, field


@dataclass
class Report:
    """The properties that were tried on one subject. `str` is a table of them."""

    subject: str
    passed: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # property -> smallest counterexample, as Python
    reasons: dict[str, str] = field(default_factory=dict)  # property -> why that counterexample is one
    skipped: dict[str, str] = field(default_factory=dict)  # property -> why it was not tried

    def raise_for_failures(self) -> None:
        """Raise AssertionError with the whole table if a property failed."""
        if self.failures:
            raise AssertionError(f"\n{self}")

    def __str__(self) -> str:
        tried = len(self.passed) + len(self.failures)
        lines = [f"{self.subject}: {len(self.failures)} of {tried} properties failed"]
        for name, counterexample in self.failures.items():
            lines += [f"  FAILED   {name}", _indented(self.reasons[name]), _indented(counterexample)]
        lines += [f"  ok       {name}" for name in self.passed]
        lines += [f"  skipped  {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def _indented(text: str) -> str:
    return textwrap.fill(text, 110, initial_indent=" " * 11, subsequent_indent=" " * 11, max_lines=4)
