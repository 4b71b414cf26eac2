"""What a T4's users meet, on a newer card: float16, 15 GiB, no flash attention.

The numbers and the memory are a T4's. The speed is not, and the kernels are compiled for this card.
"""

from dataclasses import replace

from gpu_sections.card import as_t4
from gpu_sections.gradients import gradients
from gpu_sections.section import Check, Skip
from gpu_sections.steps import WORK, measure_steps


def t4(check: Check) -> None:
    """Gradients and a few steps as on a T4."""
    if check.card.emulates_t4 or check.card.capability <= (7, 5):
        raise Skip("the card is no newer than a T4, or everything is run as on one")
    check = replace(check, card=as_t4(check.card))
    gradients(check)
    measure_steps(check, ("selective", "full"), WORK[:1])
