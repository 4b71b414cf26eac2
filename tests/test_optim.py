"""Schedules are transformers', number by number."""

import pytest
import torch

from minilora.optim import SCHEDULES, learning_rate


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup, total", [(0, 10), (3, 10), (9, 10), (1, 1000)])
def test_every_schedule_equals_transformers_at_every_step(schedule, warmup, total):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    for step in range(total):
        # Both are a handful of float64 operations: 1e-12 is thousands of roundings.
        assert learning_rate(step, total, warmup, 3e-4, schedule) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        scheduler.step()
