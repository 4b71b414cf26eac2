"""A plan keeps the heap where it fits, frees memory at once where it does not, and rounds lengths where kernels are compiled."""

import os
import platform
from pathlib import Path

import pytest
import torch

from minilora.backend.choice import padded_length
from minilora.data.examples import Order, collate, document_ids
from minilora.formats.weights import read_config
from minilora.memory.allocator import return_holes
from minilora.run import memory_plan as plans
from minilora.run.memory_plan import plan_memory
from minilora.run.report import describe_padding
from minilora.run.settings import TrainConfig
from minilora.system.device import Placement

CPU = torch.device("cpu")


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def planned(model_dir, monkeypatch):
    """Plan the memory of a small run with so many free bytes: the plan, and how often memory was told to be freed."""

    def plan(available, dtype=torch.float32, lengths=(20, 100), held_out=0, answers=None, **settings):
        calls = []
        monkeypatch.setattr(plans, "available_memory", lambda _: available)
        monkeypatch.setattr(plans, "return_freed_memory", lambda: calls.append(1))
        order = Order(lengths, batch_size=2, accumulation=1, seed=0)
        placement = Placement(CPU, dtype, "a test")
        config = TrainConfig(quantization_bit=None, **settings)
        memory = plan_memory(
            config, read_config(model_dir), config.lora_config(), placement, order, held_out, answers
        )
        return memory, len(calls)

    return plan


def test_where_the_heap_fits_it_is_kept_and_its_holes_are_in_the_prediction(planned):
    roomy, calls = planned(1 << 40)
    assert calls == 0 and roomy.recompute == "off"
    tight, _ = planned(roomy.peak)  # a tenth must be left free
    assert tight.peak < roomy.peak


def test_where_the_heap_does_not_fit_memory_is_freed_at_once_whatever_the_policy(planned):
    for policy in ("auto", "full", "off"):
        _, calls = planned(1000, gradient_checkpointing=policy)
        assert calls == 1
    _, calls = planned(None)  # a system that does not report its free memory
    assert calls == 0


def test_a_run_that_takes_more_than_predicted_gives_free_memory_back_after_each_step(planned, monkeypatch):
    calls, (memory, _) = [], planned(1 << 40)
    monkeypatch.setattr(plans, "return_holes", lambda: calls.append(1))
    for used, count in ((memory.peak, 0), (memory.peak + 1, 1), (memory.peak + 2, 2)):
        monkeypatch.setattr(plans, "memory_used", lambda device, used=used: used)
        assert memory.measure(CPU) == (used, None) and len(calls) == count
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: memory.peak + 9)
    on_gpu = memory.measure(torch.device("cuda"))
    assert on_gpu == (memory.peak + 2, memory.peak + 9) and len(calls) == 2  # there is no heap


def test_evaluation_takes_fewer_rows_at_a_time_where_it_would_not_fit_and_never_chooses_the_policy(planned):
    sizes = dict(lengths=(250,) * 4, held_out=250, per_device_eval_batch_size=4096)
    roomy, _ = planned(1 << 45, **sizes)
    assert roomy.eval_batch_size == 4096 and roomy.recompute == "off"
    alone, _ = planned(1 << 45, lengths=(250,) * 4)
    tight, _ = planned(int(1.2 * alone.peak), **sizes)
    assert tight.recompute == "off" and 1 < tight.eval_batch_size < 4096
    assert 4096 % tight.eval_batch_size == 0 and 1.1 * tight.peak <= 1.2 * alone.peak
    unknown, _ = planned(None, **sizes)
    assert unknown.eval_batch_size == 4096
    keys = dict(gradient_checkpointing="off", per_device_eval_batch_size=2)
    too_large, _ = planned(1000, lengths=(250,) * 4, held_out=250, **keys)
    assert too_large.eval_batch_size == 2  # the training does not fit either, and fewer rows would not help


def test_held_out_rows_that_are_longer_than_those_to_train_on_are_counted(planned):
    short, long = (planned(None, held_out=n, per_device_eval_batch_size=64)[0].peak for n in (100, 5000))
    width, number = 64, 4  # of the hidden states alone
    assert long - short > 64 * 4900 * width * number


def test_answers_take_no_more_than_the_training_has_taken_or_half_of_the_free_memory(planned, monkeypatch):
    monkeypatch.setattr(plans, "process_memory", lambda: 0)  # not that of all tests before
    rows = dict(lengths=(6000, 6000))
    alone, _ = planned(None, **rows)
    roomy, _ = planned(1 << 45, answers=(2000, 500), **rows)
    assert roomy.answer_batch_size == 64 and roomy.peak > 2 * alone.peak
    tight, _ = planned(None, answers=(2000, 500), **rows)
    assert 1 < tight.answer_batch_size < 16 and tight.peak == alone.peak
    free = int(1.4 * roomy.peak)
    half, _ = planned(free, answers=(2000, 500), **rows)
    assert tight.answer_batch_size < half.answer_batch_size == 32 and half.peak <= free / 2 < roomy.peak
    one, _ = planned(None, answers=(500_000, 10), **rows)
    assert one.answer_batch_size == 1 and one.peak > 2 * alone.peak  # and the prediction says so


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to")
def test_holes_between_blocks_in_use_go_back_to_the_system():
    blocks = [torch.ones(1 << 14) for _ in range(3200)]  # 64 kB each: always on the heap
    kept = blocks[::10]  # the blocks between them become holes
    del blocks
    before = resident_bytes()
    return_holes()
    assert before - resident_bytes() > 0.8 * 0.9 * 3200 * (1 << 16)
    assert all(bool((block == 1).all()) for block in kept)


@pytest.mark.parametrize("multiplies", [True, False])
def test_lengths_are_rounded_only_where_a_cpu_compiles_kernels_for_them(planned, monkeypatch, multiplies):
    monkeypatch.setattr("minilora.backend.choice._cpu_multiplies_bfloat16", lambda: multiplies)
    assert planned(1 << 40, torch.bfloat16)[0].rounded == multiplies
    assert not planned(1 << 40, torch.float32)[0].rounded


def test_more_lengths_take_more_kernels_and_only_there(planned, monkeypatch):
    monkeypatch.setattr("minilora.backend.choice._cpu_multiplies_bfloat16", lambda: True)
    one, many = (planned(1 << 40, torch.bfloat16, lengths)[0].peak for lengths in ((256,) * 9, range(8, 257)))
    assert many - one > 100e6
    one, many = (planned(1 << 40, torch.float32, lengths)[0].peak for lengths in ((256,) * 9, range(8, 257)))
    assert abs(many - one) < 10e6  # the process itself grows a little between two plans


def test_a_batch_is_planned_for_the_tokens_of_the_longest_examples_and_with_padding_for_rows_of_the_longest(
    planned, monkeypatch
):
    monkeypatch.setattr(plans, "process_memory", lambda: 0)
    asked = []
    original = plans.rank_ledger
    monkeypatch.setattr(plans, "rank_ledger", lambda *a, **kind: asked.append(kind) or original(*a, **kind))

    def sizes(dtype=torch.float32, **settings):
        asked.clear()
        planned(None, dtype, lengths=(20, 100, 3, 37), **settings)
        return {name: asked[-1].get(name, 1) for name in ("batch_size", "length", "tokens", "row_lengths")}

    assert sizes() == dict(batch_size=2, length=100, tokens=137, row_lengths=1)
    assert sizes(padding_free=False) == dict(batch_size=2, length=100, tokens=200, row_lengths=1)
    monkeypatch.setattr("minilora.backend.choice._cpu_multiplies_bfloat16", lambda: True)
    # Two examples have 23 to 137 tokens: 32, 48, ..., 144 of them, rounded up. One has 16, 32, 48 or 112.
    assert sizes(torch.bfloat16) == dict(batch_size=2, length=100, tokens=144, row_lengths=8)
    padded = sizes(torch.bfloat16, padding_free=False)
    assert padded == dict(batch_size=2, length=100, tokens=224, row_lengths=4)


def test_padding_is_told_in_a_line():
    order = Order((20, 100, 100, 5), batch_size=4, accumulation=1, seed=0)
    texts = [describe_padding(order, *how) for how in ((False, True), (True, True), (False, False))]
    assert texts[0] == "none: the examples of a pass lie end to end in one row"
    assert texts[1] == "6.2% of all tokens that go through the model"  # 225 of 240
    assert texts[2] == "43.8% of all tokens that go through the model"


def test_rounded_rows_hold_the_same_tokens_and_labels_and_padding_behind_them():
    import numpy as np

    from minilora.data.examples import Example

    examples = [Example(np.arange(1, n + 1, dtype=np.int32), np.arange(n) > 2, (2, n - 2)) for n in (7, 37)]
    plain, rounded = collate(examples, 0), collate(examples, 0, rounded=True)
    assert plain[0].shape == (2, 37) and rounded[0].shape == (2, padded_length(37)) == (2, 48)
    for before, after, filling in zip(plain, rounded, (0, -100), strict=True):
        assert torch.equal(after[:, :37], before) and (after[:, 37:] == filling).all()
    ids = document_ids(examples, rounded=True)
    assert torch.equal(ids[:, :37], document_ids(examples)) and (ids[:, 37:] == -1).all()
