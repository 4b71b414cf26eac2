"""minilora/run/together.py: which runs may share a model and its batches, and how many fit into memory."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.memory.ledger import MARGIN
from minilora.run import memory_plan, together
from minilora.run.plan import make_plan
from minilora.run.settings import TrainConfig
from minilora.run.together import describe_groups, first_difference, groups, memory_together, parts_that_fit
from minilora.system.distributed import Processes

OF_THE_ADAPTER = [
    dict(lora_rank=4),
    dict(learning_rate=1e-3),
    dict(lora_target="q_proj"),
    dict(use_dora=True, output_dir="b"),
    dict(optim="adamw_8bit", adam_beta2=0.95),
    dict(additional_target="norm", preset="minimal_r4_qv"),
    dict(lr_scheduler_type="linear", warmup_ratio=0.1, max_grad_norm=0.3),
]
OF_MODEL_AND_DATA = [
    dict(model_name_or_path="other"),
    dict(quantization_bit=None),
    dict(double_quantization=False),
    dict(seed=1),
    dict(cutoff_len=8),
    dict(dataset="other.jsonl"),
    dict(per_device_train_batch_size=2),
    dict(gradient_accumulation_steps=2),
    dict(max_steps=3),
    dict(template="chatml"),
    dict(fused=False),
    dict(gradient_checkpointing="full"),
    dict(val_size=2),
]
FULL = dict(finetuning_type="full", quantization_bit=None)


@given(st.lists(st.tuples(st.sampled_from([{}, *OF_THE_ADAPTER]), st.sampled_from([{}, *OF_MODEL_AND_DATA]))))
def test_runs_go_together_exactly_if_model_and_data_are_the_same(chosen):
    configs = [TrainConfig(**adapter | shared) for adapter, shared in chosen]
    found = groups(configs)
    assert sorted(i for group in found for i in group) == list(range(len(configs)))
    number = {i: n for n, group in enumerate(found) for i in group}
    for i, (_, shared) in enumerate(chosen):
        for j, (_, other) in enumerate(chosen):
            assert (number[i] == number[j]) == (shared == other)


@pytest.mark.parametrize("change", OF_MODEL_AND_DATA, ids=lambda change: next(iter(change)))
def test_the_setting_that_divides_runs_is_named(change):
    configs = [TrainConfig(), TrainConfig(learning_rate=1e-3), TrainConfig(**change)]
    assert groups(configs) == [[0, 1], [2]]
    assert describe_groups(configs).startswith("runs 1-2; alone 3 (")
    assert next(iter(change)) in describe_groups(configs)
    assert first_difference(configs).startswith(next(iter(change)))


def test_full_training_is_alone_and_the_line_says_why():
    configs = [
        TrainConfig(**FULL),
        TrainConfig(quantization_bit=None),
        TrainConfig(**FULL, learning_rate=1e-3),
    ]
    assert groups(configs) == [[0], [1], [2]]
    assert "finetuning_type 'full' trains the base model" in describe_groups(configs)
    assert "full" in first_difference([configs[0], configs[2]])


def test_the_line_counts_runs_from_1_and_joins_neighbours():
    seeds = [TrainConfig(seed=seed) for seed in (1, 1, 2, 1, 2, 3)]
    assert describe_groups(seeds) == "runs 1-2, 4; runs 3, 5; alone 6 (seed must be the same)"
    assert describe_groups(seeds[:2]) == "all 2 runs"
    assert describe_groups(seeds[:1]) == "alone 1"


@pytest.fixture
def plans(model_dir, dataset, tmp_path, monkeypatch):
    """The plans of eight runs of different ranks, in a process that takes no memory itself."""
    monkeypatch.setattr(memory_plan, "process_memory", lambda: 0)
    config = TrainConfig(model_name_or_path=str(model_dir), dataset=str(dataset), val_size=4, max_steps=2)
    configs = [
        replace(config, lora_rank=2 * i + 2, output_dir=str(tmp_path / f"run{i}"), bf16=False)
        for i in range(8)
    ]
    first = make_plan(configs[0], Processes())
    return [first, *(make_plan(config, Processes(), like=first) for config in configs[1:])]


def test_runs_with_one_stream_of_data_read_it_once(plans):
    assert all(one.train_set is plans[0].train_set for one in plans)


def test_memory_is_predicted_for_a_copy_of_the_batch_and_an_adapter_for_each_run(plans):
    alone, pair, all_of_them = plans[0].memory.peak, memory_together(plans[:2]), memory_together(plans)
    assert alone < pair.peak < all_of_them.peak
    # Rank 16's numbers beside rank 4's: A and B of q, k, v and o, (64 + 64, 64 + 32, 64 + 32, 64 + 64) in two
    # layers; each a number, a gradient and two moments of 4 bytes. Steps of AdamW come to 4 bytes a tensor.
    numbers = 2 * (128 + 96 + 96 + 128) * (16 - 4)
    more = memory_together([plans[0], plans[7]]).peak - memory_together([plans[7], plans[7]]).peak
    fewer = memory_together([plans[1], plans[7]]).peak - memory_together([plans[7], plans[7]]).peak
    assert fewer - more == 16 * 2 * (128 + 96 + 96 + 128) * 2 and fewer == -16 * numbers


def test_runs_that_do_not_fit_are_trained_in_halves_and_the_line_says_it(plans, monkeypatch, capsys):
    room = MARGIN * memory_together(plans[4:]).peak
    assert MARGIN * memory_together(plans).peak > room
    monkeypatch.setattr(together, "available_memory", lambda _: room)
    assert [len(part) for part in parts_that_fit(plans)] == [4, 4]
    assert "memory     8 runs together need" in capsys.readouterr().out
    monkeypatch.setattr(together, "available_memory", lambda _: 0)
    assert [len(part) for part in parts_that_fit(plans)] == [1] * 8
    monkeypatch.setattr(together, "available_memory", lambda _: None)  # the system does not tell
    assert [len(part) for part in parts_that_fit(plans)] == [8]
