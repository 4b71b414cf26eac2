"""Several processes: shards are parts of the whole, a tiny model's bytes are those of its shapes, and two
processes gather as many bytes as are predicted.
"""

import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import memory
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.project import PROGRAM_ENVIRONMENT, SUPPORT
from support.tiny import ALL_SEVEN

from minilora import PRESETS, CausalLM, LoraConfig, QuantConfig, save_model
from minilora.formats.config_json import parse_config
from minilora.memory.ledger import MARGIN, Answers, memory_ledger
from minilora.memory.ranks import FROZEN, choose_parallel, frozen_units, rank_ledger, shard_bytes
from minilora.memory.traffic import Traffic, step_seconds, step_traffic
from minilora.recompute import POLICIES

# D 64, F 128, 4 heads of 16, 2 of them for keys and values, 3 layers, V 100; NF4 in blocks of 64.
TINY = parse_config(
    dict(model_type="llama", vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=3)
    | dict(num_attention_heads=4, num_key_value_heads=2)
)
PRODUCTS = 64 * 64 + 32 * 64 + 32 * 64 + 64 * 64 + 3 * 128 * 64  # q, k, v, o, and gate, up, down
BLOCKS = PRODUCTS // 64  # a byte each; and for each product one nested block, 4 bytes, and an offset, 4 bytes
LAYER = PRODUCTS // 2 + (BLOCKS + 7 * 8)  # codes and scales
TABLE = 2 * 100 * 64  # the embedding in 16 bits; the head has as many
NORMS = 2 * (3 * 2 + 1) * 64
TRAINED = 3 * 2 * ((64 + 64) + (64 + 32))  # r 2 on q and v of three layers
RUN = dict(batch_size=2, length=16, recompute="full", dtype=torch.bfloat16)
MODEL = TINY, LoraConfig(r=2, target_modules=("q_proj", "v_proj")), QuantConfig()


@st.composite
def runs(draw):
    """Arguments of `rank_ledger`: a model, an adapter, a quantizer; and the settings of a run."""
    sizes = dict(
        model_type=draw(st.sampled_from(["llama", "qwen2", "qwen3"])),
        vocab_size=draw(st.sampled_from([50, 5000])),
        hidden_size=64 * draw(st.integers(1, 4)),
        intermediate_size=64 * draw(st.integers(1, 8)),
        num_hidden_layers=draw(st.integers(1, 5)),
        num_attention_heads=4,
        num_key_value_heads=draw(st.sampled_from([1, 4])),
        head_dim=16,
        tie_word_embeddings=draw(st.booleans()),
    )
    targets = draw(st.sampled_from([("q_proj", "v_proj"), ALL_SEVEN]))
    quant = draw(st.sampled_from([None, QuantConfig(), QuantConfig(double_quant=False), QuantConfig(bits=8)]))
    kind = dict(
        batch_size=draw(st.integers(1, 4)),
        length=draw(st.sampled_from([16, 500])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        device=draw(st.sampled_from(["cuda", "cpu"])),
        recompute=draw(st.sampled_from(POLICIES)),
        eval_batch_size=draw(st.sampled_from([0, 8])),
        answers=draw(st.sampled_from([None, Answers(2, 30, 10)])),
    )
    return (parse_config(sizes), LoraConfig(r=draw(st.integers(1, 8)), target_modules=targets), quant), kind


# ---- bytes ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**12), st.integers(1, 1000))
def test_shards_sum_to_the_whole_and_the_first_rank_has_the_largest(size, processes):
    shards = [shard_bytes(size, processes, rank) for rank in range(processes)]
    assert sum(shards) == size and max(shards) == shards[0] and shards[0] - shards[-1] <= 1


@settings(max_examples=50, deadline=None)
@given(runs())
def test_units_are_all_that_is_frozen_but_norms_and_biases(run):
    model, kind = run
    ledger, units = memory_ledger(*model, **kind), frozen_units(*model, kind["dtype"])
    assert len(units) == model[0].num_hidden_layers + (1 if model[0].tie_word_embeddings else 2)
    for category in FROZEN[:2]:
        assert sum(unit[category] for unit in units) == ledger.bytes[category]
    with torch.device("meta"):
        vectors = sum(p.numel() for p in CausalLM(model[0]).parameters() if p.ndim == 1)
    in_units = sum(unit[FROZEN[2]] for unit in units)
    assert in_units + vectors * kind["dtype"].itemsize == ledger.bytes[FROZEN[2]]


@settings(max_examples=50, deadline=None)
@given(runs(), st.sampled_from(["ddp", "fsdp"]), st.booleans())
def test_one_process_has_the_ledger_of_one_process_and_receives_nothing(run, parallel, offload):
    model, kind = run
    alone = rank_ledger(*model, **kind, processes=1, parallel=parallel, offload=offload)
    assert alone == memory_ledger(*model, **kind)
    traffic = step_traffic(*model, dtype=kind["dtype"], processes=1, parallel=parallel, offload=offload)
    assert traffic == Traffic(0, 0)


@settings(max_examples=50, deadline=None)
@given(runs(), st.integers(2, 64), st.integers(1, 64))
def test_more_processes_never_hold_more_each_and_never_receive_less(run, processes, more):
    model, kind = run
    for parallel in ("ddp", "fsdp"):
        few, many = (
            rank_ledger(*model, **kind, processes=n, parallel=parallel) for n in (processes, processes + more)
        )
        assert many.peak <= few.peak
        few, many = (
            step_traffic(*model, dtype=kind["dtype"], processes=n, parallel=parallel)
            for n in (processes, processes + more)
        )
        assert many.gathered >= few.gathered and many.summed >= few.summed


@settings(max_examples=50, deadline=None)
@given(runs(), st.integers(2, 64))
def test_ddp_changes_nothing_but_the_sum_of_gradients_and_offload_leaves_no_weight_on_a_gpu(run, processes):
    model, kind = run
    one = memory_ledger(*model, **kind)
    ddp, fsdp, offloaded = (
        rank_ledger(*model, **kind, processes=processes, **how)
        for how in (dict(), dict(parallel="fsdp"), dict(parallel="fsdp", offload=True))
    )
    summing = ddp.moments["sum of gradients"]
    assert {name: held for name, held in ddp.moments.items() if name != "sum of gradients"} == one.moments
    assert summing["summed gradients"] == 2 * summing["gradients"] > 0
    assert fsdp.policies == offloaded.policies == one.policies
    on_gpu = kind["device"] == "cuda"
    assert all(held[name] == 0 for held in offloaded.moments.values() for name in FROZEN[:2]) == on_gpu
    assert offloaded.peak < fsdp.peak if on_gpu else offloaded == fsdp


def test_a_tiny_model_of_four_processes_holds_what_its_shapes_say():
    ledger = rank_ledger(*MODEL, **RUN, processes=4, parallel="fsdp")
    for held in ledger.moments.values():
        assert sum(held[name] for name in FROZEN) == pytest.approx(
            (3 * LAYER + 2 * TABLE) / 4 + NORMS,
            abs=3,  # a byte a category, where 4 does not divide it
        )
        assert held["linear weights"] == 3 * PRODUCTS // 2 // 4
        assert held["gathered weights"] == 2 * LAYER
        assert held["adapter"] == held["gradients"] == 4 * TRAINED
    assert LAYER > TABLE and ledger.moments["sum of gradients"]["summed gradients"] == 2 * 4 * TRAINED


def test_a_large_vocabulary_is_the_largest_unit_and_is_there_twice():
    wide = replace(TINY, vocab_size=5000)
    ledger = rank_ledger(wide, *MODEL[1:], **RUN, processes=2, parallel="fsdp")
    assert ledger.bytes["gathered weights"] == 2 * (2 * 5000 * 64)


# ---- traffic and time ----------------------------------------------------------------------------------------


def test_a_step_of_a_tiny_model_receives_what_its_shapes_say():
    of = partial(step_traffic, *MODEL, dtype=torch.bfloat16, processes=4, micro_batches=5)
    both = 2 * 3 * LAYER + 2 * TABLE  # layers for forward and for backward, embedding and head once
    assert of(parallel="ddp") == Traffic(0, 2 * 4 * TRAINED * 3 // 4)
    assert of(parallel="fsdp") == Traffic(5 * (both * 3 // 4), 2 * 4 * TRAINED * 3 // 4)
    assert of(parallel="fsdp", offload=True).gathered == 5 * both


def test_a_tied_embedding_is_gathered_for_the_first_layer_and_again_as_the_head():
    tied = replace(TINY, tie_word_embeddings=True)
    both = 2 * 3 * LAYER + 2 * TABLE
    traffic = step_traffic(tied, *MODEL[1:], dtype=torch.bfloat16, processes=2, parallel="fsdp")
    assert traffic.gathered == both // 2


def test_two_processes_gather_as_many_bytes_as_are_predicted(tmp_path):
    """Below the first adapter one layer is gathered again: the next one is fetched ahead, needed or not."""
    # Every weight has an even number of rows for fully_shard, 16,384 weights each in 4 bits.
    sizes = dict(vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    untied = parse_config(dict(model_type="llama") | sizes | heads)
    configs = {"untied": untied, "tied": replace(untied, tie_word_embeddings=True)}
    for name, config in configs.items():
        model = CausalLM(config)
        model.init_weights()
        save_model(model, tmp_path / name)
    program, report = SUPPORT / "counted_gathers.py", tmp_path / "report.json"
    environment = PROGRAM_ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, str(program), str(report), *(str(tmp_path / name) for name in configs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases = itertools.product(configs.values(), (0, 2))
    for (config, first), counted in zip(cases, json.loads(report.read_text()), strict=True):
        lora = LoraConfig(r=2, target_modules=("q_proj", "v_proj"), layers_to_transform=(*range(first, 4),))
        kind = dict(dtype=torch.float32, processes=2, parallel="fsdp")
        predicted = step_traffic(config, lora, QuantConfig(), **kind).gathered
        run = dict(batch_size=2, length=6, recompute="full")
        held = rank_ledger(config, lora, QuantConfig(), **run, **kind).bytes
        # The offset of double quantization, 4 bytes, is on every rank and counted as shared.
        offsets, gathered = 7 * 4, 4 + (4 if first == 0 else 3)  # bytes a layer; how often one is gathered
        assert counted["received"] == predicted - gathered * offsets // 2
        norms = 4 * (4 * 2 + 1) * 256
        assert counted["shards"] == sum(held[name] for name in FROZEN) - norms - 4 * offsets // 2


def test_gathers_hide_behind_arithmetic_or_not_and_the_sum_of_gradients_never():
    ledger = memory_ledger(*MODEL, **RUN)
    flop = ledger.flop_per_token * 2 * 16 * 3
    rates = dict(micro_batches=3, flop_rate=flop / 4, byte_rate=100)  # 4 seconds of arithmetic
    assert step_seconds(ledger, Traffic(300, 50), **rates) == pytest.approx((4, 4 + 0.5, 4 + 3 + 0.5))
    assert step_seconds(ledger, Traffic(700, 50), **rates) == pytest.approx((4, 7 + 0.5, 4 + 7 + 0.5))


# ---- ddp or fsdp? --------------------------------------------------------------------------------------------

LLAMA_70B = memory.SHAPES["llama-2-70b"], PRESETS["aggressive_r16_all"], QuantConfig()


plan_of_70b = partial(
    rank_ledger, *LLAMA_70B, batch_size=1, length=1024, dtype=torch.bfloat16, recompute="full"
)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e9, 100e9), st.sampled_from([2, 4, 8]))
def test_ddp_is_chosen_wherever_it_fits_then_fsdp_and_where_neither_does_the_reason_says_what_would(
    free, processes
):
    parallel, ledger, reason = choose_parallel(free, processes, plan_of_70b)
    ddp, fsdp = (plan_of_70b(parallel=kind, processes=processes) for kind in ("ddp", "fsdp"))
    assert parallel == ("ddp" if MARGIN * ddp.peak <= free else "fsdp")
    assert ledger == (ddp if parallel == "ddp" else fsdp)
    of_free = rf"{free / 2**30:.2f} GiB"
    if ledger.fits(free):
        ending = "" if parallel == "ddp" else f"; ddp would need {ddp.peak / 2**30:.2f}"
        assert reason == f"needs {ledger.peak / 2**30:.2f} of {of_free} free{ending}"
        return
    assert reason.startswith(f"even fsdp needs {fsdp.peak / 2**30:.2f} GiB; {of_free} are free, and a tenth ")
    offloaded = plan_of_70b(parallel="fsdp", processes=processes, offload=True).fits(free)
    assert ("in main memory" in reason) == offloaded
    if over := re.search(r"over (\d+) processes", reason):
        more = int(over[1])
        assert plan_of_70b(parallel="fsdp", processes=more).fits(free)
        assert not plan_of_70b(parallel="fsdp", processes=more // 2).fits(free)
    else:
        assert not plan_of_70b(parallel="fsdp", processes=128 * processes).fits(free)
        assert offloaded or "no number of processes" in reason


@pytest.mark.parametrize(
    "free, processes, why",
    [
        (None, 2, "this system does not tell how much memory is free"),
        (80e9, 1, "one process shares with nobody"),
    ],
)
def test_where_there_is_nothing_to_choose_ddp_is_taken_and_the_reason_said(free, processes, why):
    parallel, ledger, reason = choose_parallel(free, processes, plan_of_70b)
    assert (parallel, reason) == ("ddp", why) and ledger == plan_of_70b(processes=processes)


def test_where_both_fit_the_one_with_the_shorter_longest_step_is_chosen_and_both_are_said():
    def of_times(ddp, fsdp):
        times = dict(ddp=ddp, fsdp=fsdp)
        return choose_parallel(80e9, 8, plan_of_70b, lambda ledger, parallel: times[parallel])

    parallel, ledger, reason = of_times(3.0, 2.5)
    assert (parallel, ledger) == ("fsdp", plan_of_70b(parallel="fsdp", processes=8))
    assert reason.endswith(" of 74.51 GiB free; at most 2.5 s a step, ddp 3")
    for fsdp in (3.0, 3.5):  # no faster is no reason to send more
        parallel, ledger, reason = of_times(3.0, fsdp)
        assert (parallel, ledger) == ("ddp", plan_of_70b(processes=8))
        assert reason.endswith(f" of 74.51 GiB free; 3 s a step, fsdp up to {fsdp:.3g}")


def test_an_fsdp_that_would_be_faster_and_does_not_fit_is_not_chosen():
    """Of a model of one layer two processes gather the whole, and hold half of it besides."""
    one_layer = parse_config(
        dict(model_type="llama", vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=1)
        | dict(num_attention_heads=4, num_key_value_heads=2)
    )
    plan_of = partial(rank_ledger, one_layer, *MODEL[1:], **RUN)
    ddp, fsdp = (plan_of(parallel=kind, processes=2) for kind in ("ddp", "fsdp"))
    assert ddp.peak < fsdp.peak
    free = MARGIN * (ddp.peak + fsdp.peak) / 2
    chosen = choose_parallel(free, 2, plan_of, lambda ledger, parallel: dict(ddp=2.0, fsdp=1.0)[parallel])
    assert chosen[:2] == ("ddp", ddp)


# ---- the script ----------------------------------------------------------------------------------------------


@pytest.fixture
def ask(call, tmp_path, monkeypatch):
    """Run `memory.py --model llama-2-70b ... ARGUMENTS` in tmp_path: (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    run = "--model llama-2-70b --per_device_train_batch_size 1 --cutoff_len 1024 --lora_target all --lora_rank 16"
    return lambda arguments: call("memory", *run.split(), *arguments.split())


def test_an_adapter_that_the_model_cannot_have_is_named_before_anything_is_printed(
    call, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    command = "--model llama-2-70b --gpu 24 --processes 2 --lora_target v_porj"
    code, out, err = call("memory", *command.split())
    assert code == 2 and out == "" and err.count("\n") == 1 and "v_porj" in err


def table(out: str) -> dict[str, list[str]]:
    """The first table of the output: name -> cells."""
    return {line[:28].strip(): line[28:].split() for line in out.partition("micro-batch")[0].splitlines()}


def test_the_script_compares_the_ways_of_four_processes_and_goes_on_with_the_chosen_one(ask):
    code, out, _ = ask("--gpu 24 --processes 4 --link 25 --tflops 80")
    rows = table(out)
    assert code == 0 and rows["GB in each process"] == ["ddp", "fsdp", "offloaded"]
    assert rows["fits, with a tenth to spare"] == ["no", "yes", "yes"]
    parts = [list(map(float, rows[part])) for part in memory.PARTS if part in rows]
    for peak, *sizes in zip(map(float, rows["peak"]), *parts, strict=True):
        assert peak == pytest.approx(sum(sizes), abs=0.006)  # ten numbers, each rounded to 0.001
    least, most = (list(map(float, rows[f"s a step, {kind} hidden"])) for kind in ("gathers", "none"))
    assert least[0] == most[0] and all(low < high for low, high in zip(least[1:], most[1:], strict=True))
    received = list(map(float, rows["received in a step"]))
    # Both have the adapter's gradients on top: 207 million numbers, 1.5 times 4 bytes.
    assert received[0] == pytest.approx(1.243, abs=0.001)
    assert received[1] - received[0] == pytest.approx(0.75 * (received[2] - received[0]), abs=0.002)
    assert re.search(r"^fsdp: needs [\d.]+ of 21.89 GiB free; ddp would need [\d.]+$", out, re.MULTILINE)
    assert "each process with fsdp" in out and out.count("gathered weights") == 2
    (moments,) = re.findall(r"^  in  .*$", out, re.MULTILINE)
    assert "  sum of gradients  " in moments  # no column touches the next


def test_the_requested_way_is_the_one_that_the_advice_is_about(ask):
    out = ask("--gpu 80 --processes 8")[1]
    assert "ddp: needs " in out and "s a step, " not in out and out.count("gathered weights") == 1
    out = ask("--gpu 80 --processes 8 --parallel fsdp")[1]
    assert "fsdp: as requested" in out and out.count("gathered weights") == 2


def test_processes_on_a_cpu_share_its_memory(ask, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 400 * 10**9)
    out = ask("--processes 4 --bf16 false")[1]
    assert "each with its part of the 100.0 GB that are free" in out and "offloaded" not in out


def test_a_full_training_leaves_no_frozen_weights_to_share(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    full = "--model tinyllama-1.1b --finetuning_type full --quantization_bit none --gpu 80 --processes 4"
    code, out, _ = call("memory", *full.split())
    assert code == 0 and table(out)["GB in each process"] == ["ddp"] and "ddp: trains all weights" in out
    code, _, err = call("memory", *full.split(), "--parallel", "fsdp")
    assert code == 2 and err.count("\n") == 1 and "parallel = 'fsdp'" in err


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("--processes 0", "--processes"),
        ("--processes 1000000", "--processes"),
        ("--processes two", "--processes"),
        ("--processes 2 --parallel tensor", "parallel = 'tensor'"),
        ("--link 25 --tflops 80", "--processes"),
        ("--processes 2 --link 25", "--tflops"),
        ("--processes 2 --link 0 --tflops 80", "--link"),
        ("--processes 2 --link 25 --tflops nan", "--tflops"),
    ],
)
def test_a_mistaken_option_is_named_in_a_line(ask, arguments, named):
    code, out, err = ask(f"--gpu 24 {arguments}")
    assert code == 2 and out == "" and err.count("\n") == 1 and named in err
