"""A plan recomputes the least that fits: less than any other plan of these layers, by the ledger; and the allocator agrees
that the last layers are the ones to keep.
"""

from functools import partial
from itertools import product

import memory
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.allocations import Allocations
from support.tiny import ALL_SEVEN, small_model

from minilora import PRESETS, LoraConfig, QuantConfig
from minilora.formats.config_json import parse_config
from minilora.loss import causal_lm_loss
from minilora.memory.ledger import MARGIN, memory_ledger
from minilora.memory.planner import advise, choose_recompute, fastest_that_fits, split
from minilora.recompute import POLICIES, set_recompute

MISTRAL = memory.SHAPES["mistral-7b"]


def ledgers_of(config=MISTRAL, **changes):
    kind = dict(batch_size=4, length=1024, dtype=torch.float16, optim="adamw_8bit") | changes
    return partial(memory_ledger, config, PRESETS["standard_r8_qkvo"], QuantConfig(), **kind)


@st.composite
def small_runs(draw):
    """`ledger_of(recompute=...)` of a model of few layers, of any balance of attention, head and MLP; its layers."""
    H, layers = draw(st.sampled_from([2, 8])), draw(st.integers(1, 4))
    sizes = dict(
        model_type=draw(st.sampled_from(["llama", "qwen3"])),
        vocab_size=draw(st.sampled_from([50, 50_000])),
        hidden_size=64 * draw(st.integers(1, 4)),
        intermediate_size=64 * draw(st.integers(1, 8)),
        num_hidden_layers=layers,
        num_attention_heads=H,
        num_key_value_heads=draw(st.sampled_from([1, H])),
        head_dim=64,
    )
    targets = draw(st.sampled_from([("q_proj", "v_proj"), ALL_SEVEN]))
    lora = LoraConfig(r=draw(st.integers(1, 8)), target_modules=targets)
    kind = dict(
        batch_size=draw(st.integers(1, 8)),
        length=draw(st.sampled_from([16, 500, 20_000])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        device=draw(st.sampled_from(["cuda", "cpu"])),
    )
    return partial(memory_ledger, parse_config(sizes), lora, QuantConfig(), **kind), layers


def free_bytes(data, ledger_of) -> float:
    """Somewhere between too little for anything and enough for all."""
    least, most = ledger_of(recompute="offload").peak, ledger_of(recompute="off").peak
    return MARGIN * data.draw(st.floats(0.9 * least, 1.1 * max(least, most)), label="free")


@settings(max_examples=100, deadline=None)
@given(small_runs(), st.data())
def test_no_other_choice_of_policies_for_the_layers_fits_with_less_arithmetic(run, data):
    ledger_of, layers = run
    free = free_bytes(data, ledger_of)
    choices = [ledger_of(recompute=names) for names in product(("off", "selective", "full"), repeat=layers)]
    possible = [ledger.flop_per_token for ledger in choices if ledger.fits(free)]
    found = fastest_that_fits(free, ledger_of)
    if possible:
        assert found.fits(free) and found.flop_per_token == pytest.approx(min(possible), rel=1e-12)
    elif (offload := ledger_of(recompute="offload")).fits(free):
        assert found.policies == offload.policies
    else:
        assert found is None


@settings(max_examples=50, deadline=None)
@given(small_runs(), st.data())
def test_more_memory_never_recomputes_more(run, data):
    ledger_of, _ = run
    less, more = sorted(free_bytes(data, ledger_of) for _ in range(2))
    found = fastest_that_fits(less, ledger_of)
    assert found is None or fastest_that_fits(more, ledger_of).flop_per_token <= found.flop_per_token


@settings(max_examples=10, deadline=None)
@given(st.floats(1e9, 40e9), st.sampled_from(["cuda", "cpu"]))
def test_a_7b_model_gets_the_fastest_split_that_fits_and_a_line_that_says_so(free, device):
    ledger_of = ledgers_of(device=device)
    ledger, reason = choose_recompute(free, ledger_of)
    splits = [ledger_of(recompute=split(32, off, some)) for off in range(33) for some in range(33 - off)]
    possible = [other.flop_per_token for other in splits if other.fits(free)]
    gib = f"{ledger.peak / 2**30:.2f}", f"{free / 2**30:.2f} GiB"
    if possible:
        assert ledger.fits(free) and ledger.flop_per_token == min(possible)
    else:
        assert set(ledger.policies) == {"offload" if device == "cuda" else "full"}
    if ledger.fits(free):
        assert reason == f"needs {gib[0]} of {gib[1]} free"
    else:
        assert reason == (
            f"even {ledger.recompute} needs {gib[0]} GiB; {gib[1]} are free, and a tenth should be left"
        )


def test_a_plan_is_described_by_how_many_layers_follow_which_policy():
    ledger_of = ledgers_of()
    texts = [
        ledger_of(recompute=split(32, *counts)).recompute for counts in ((32, 0), (0, 32), (14, 0), (1, 30))
    ]
    assert texts == [
        "off",
        "selective",
        "off in 14 layers, full in 18",
        "off in 1 layer, selective in 30, full in 1",
    ]
    assert ledger_of(recompute="offload").policies == ("offload",) * 32


def test_on_long_rows_selective_comes_before_off():
    """Attention's arithmetic grows with the square of the length, the products' with the length."""
    off, selective = [], []
    for length in (1024, 32_768):
        ledger_of = ledgers_of(batch_size=1, length=length)
        low, high = (ledger_of(recompute=policy).peak for policy in ("full", "off"))
        ledger = fastest_that_fits(MARGIN * (low + 0.07 * (high - low)), ledger_of)
        off.append(ledger.policies.count("off"))
        selective.append(ledger.policies.count("selective"))
    assert off[0] > 0 and selective[1] > 16 > selective[0] and selective[1] > off[1]


def test_where_nothing_is_known_all_layers_are_recomputed():
    assert choose_recompute(None, ledgers_of())[0].recompute == "full"
    assert choose_recompute(1e9, ledgers_of(device="cpu"))[0].recompute == "full"


@pytest.mark.parametrize("off", [1, 3])
def test_the_last_layers_are_the_ones_to_keep(off):
    """By the allocator: kept in the first layers, the same activations take one layer more at the peak.

    And one layer that keeps all, the last, takes less than none: it is not run again, and saves its output.
    """
    model = small_model(layers=6, dropout=0.0, quantized=True)
    ids = torch.zeros(4, 128, dtype=torch.long)

    def peak(policies) -> int:
        set_recompute(model, policies)
        causal_lm_loss(model, ids, ids).backward()  # gradients and scratch exist from here on
        with Allocations() as allocations:
            causal_lm_loss(model, ids, ids).backward()
        return max(allocations.peaks.values())

    last, full, everything = (peak(policies) for policies in (split(6, off, 0), "full", "off"))
    first = peak(split(6, off, 0)[::-1])
    layer = (everything - full) / 5  # of six, one is whole in either
    # One layer, but for its output once more, which a layer run again holds: 64 of some 1000 numbers a token.
    assert first - last == pytest.approx(layer, rel=0.15)
    assert last - full == pytest.approx((off - 1) * layer, abs=0.15 * layer)


def test_advice_about_a_very_long_row_takes_few_predictions():
    asked = []
    ledger_of = lambda **sizes: asked.append(sizes) or ledgers_of()(**sizes)  # noqa: E731
    (advised,) = advise(20e9, ledger_of, batch_size=1, length=10**8)
    assert advised.length % 64 == 0 and advised.fits(20e9) and len(asked) < 400


@settings(max_examples=50, deadline=None)
@given(st.floats(3e9, 40e9), st.integers(1, 12), st.integers(2, 3000))
def test_advice_fits_and_keeps_to_the_batch_and_the_length_as_long_as_it_can(free, batch_size, length):
    ledger_of = ledgers_of()
    found = advise(free, ledger_of, batch_size, length)
    assert all(ledger.fits(free) and batch_size % ledger.batch_size == 0 for ledger in found)
    costs = [ledger.flop_per_token for ledger in found]
    assert costs == sorted(set(costs), reverse=True)  # every further one is smaller and faster
    frugal = partial(ledger_of, recompute=POLICIES[-1])
    sizes = [size for size in range(batch_size, 0, -1) if batch_size % size == 0]
    possible = [size for size in sizes if frugal(batch_size=size, length=length).fits(free)]
    if possible:
        assert (found[0].batch_size, found[0].length) == (possible[0], length)
    elif found:
        longer = found[0].length + 64
        assert found[0].batch_size == 1 and found[0].length < length and len(found) == 1
        assert longer >= length or not frugal(batch_size=1, length=longer).fits(free)
    else:
        assert length <= 64 or not frugal(batch_size=1, length=64).fits(free)
