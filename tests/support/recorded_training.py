"""Runs of the trainer on a pretended GPU, with what each step and its micro-batches did there."""

from functools import partial
from types import SimpleNamespace

from support.pretended_gpu import PretendedGpu


def recorded_training(train, trainer, monkeypatch, capability: tuple[int, int], **keys) -> SimpleNamespace:
    """Train on a pretended GPU. Returns the directory, the GPU, and a record of each step and of the
    micro-batches of each step (see `PretendedGpu.during`). No curves are drawn: they would take a third of the
    time, and no GPU takes part.
    """
    steps, micro_batches = [], []
    with PretendedGpu(capability) as gpu, monkeypatch.context() as patch:

        def record(function, records, *arguments):
            with gpu.during() as seen:
                result = function(*arguments)
            records.append(seen)
            return result

        for name, records in (("optimizer_step", steps), ("accumulate_gradients", micro_batches)):
            patch.setattr(trainer, name, partial(record, getattr(trainer, name), records))
        patch.setattr(trainer.report, "draw_curves", lambda plan, run: None)
        directory, printed = train(**keys)
    return SimpleNamespace(
        directory=directory, printed=printed, gpu=gpu, steps=steps, micro_batches=micro_batches
    )
