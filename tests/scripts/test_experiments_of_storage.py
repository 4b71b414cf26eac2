"""The studies of stored weights, gradients, moments and starts measure what they say, and support their sentences."""

import json
from itertools import pairwise

import pytest
import torch
from studies import eight_bit_adam, merging, small_gradients, stored_bits, which_zero
from studies.live_bytes import SEGMENTS, CountProducts, Segment, make_model
from studies.small_world import load, questions
from support.project import ROOT

from minilora.data.examples import collate
from minilora.lora import lora_layers, trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.quantization import dequantize_dynamic, quantize_dynamic


def figures_of(name: str) -> dict:
    return json.loads((ROOT / "docs" / "experiments" / f"{name}.json").read_text(encoding="utf-8"))


def mean(values) -> float:
    return sum(values) / len(values)


def logits(model, count: int = 4) -> torch.Tensor:
    ids, _ = collate(questions("test").examples[:count], pad_id=0)
    with torch.no_grad():
        return model.eval()(ids)


# ---- what the studies measure ------------------------------------------------------------------------------


def test_the_base_with_outliers_is_the_same_function_to_the_bit_with_other_weights():
    plain, spiked = load(), stored_bits.load_spiked()
    assert torch.equal(logits(plain), logits(spiked))
    W, V = (model.model.layers[0].self_attn.q_proj.weight for model in (plain, spiked))
    assert (V / W)[0].nan_to_num().unique().tolist() == [1.0, stored_bits.OUTLIER]


@pytest.mark.parametrize(("saw", "into"), [("float32", None), ("NF4", "NF4")])
def test_a_merge_into_what_training_saw_is_the_model_that_was_trained(saw, into):
    model = merging.trained(load(), saw, 2, seed=0)
    whole = merging.merged(load(), merging.updates_of(model), into, None)
    # Two orders of the same float32 sums; the logits are some 20.
    assert torch.allclose(logits(model), logits(whole), atol=2e-4)


def test_an_update_smaller_than_half_a_step_is_rounded_away_and_a_larger_one_becomes_whole_steps():
    model, block = load(), torch.ones(64) / 8
    block[0] = 1.0  # each block of 64 keeps its scale: all else is one value, 0.125, that is no code of NF4
    layers = merging.linear_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(block.repeat(layer.weight.numel() // 64).view_as(layer.weight))
    tiny = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    for update in tiny.values():
        update.view(-1, 64)[:, 1] = 1e-4
    assert merging.survives(model, tiny, 1.0)["dequantized"] == 0
    large = {name: update * 3e3 for name, update in tiny.items()}
    # 0.125 + 0.3 becomes the code 0.4407099, and 0.125 was 0.1609302. Four digits are kept.
    assert merging.survives(model, large, 1.0)["W"] == pytest.approx((0.4407099 - 0.1609302) / 0.3, rel=1e-4)


def test_segments_have_the_gradients_of_the_whole_to_the_bit():
    gradients = []
    for plan in ("off", *(name.format(2) for name in SEGMENTS)):
        model = make_model(4, plan, side=2)
        assert isinstance(model.model.layers[0], Segment) == (plan != "off")
        ids = torch.arange(40).view(2, 20)
        causal_lm_loss(model, ids, ids).backward()
        gradients.append([p.grad for p in trainable_parameters(model).values()])
    for other in gradients[1:]:
        assert all(map(torch.equal, gradients[0], other))


def test_products_are_counted_as_rows_times_columns_times_length():
    a, b, c = torch.randn(3, 5), torch.randn(5, 7), torch.randn(3, 7)
    with CountProducts() as products:
        a @ b
        torch.addmm(c, a, b)
    assert products.count == 2 * 3 * 5 * 7


def test_float16_loses_what_lies_below_half_its_smallest_number_and_above_its_largest():
    values = torch.tensor([2.0**-26, 2.0**-24, 2.0**-10, 1e6])
    assert small_gradients.losses_at(values, 1.0) == dict(zero=0.25, few_digits=0.25, infinite=0.25)
    assert small_gradients.losses_at(values, 2.0**16)["zero"] == 0


def test_equal_steps_make_a_second_moment_zero_below_half_a_step_and_the_dynamic_code_does_not():
    v = torch.full((256,), 0.9 / 510)
    v[0] = 1.0
    for code, zeros in ((eight_bit_adam.UNIFORM, 255), (eight_bit_adam.dynamic_code(False), 0)):
        kept = dequantize_dynamic(*quantize_dynamic(v, code, 256), code, 256)
        assert int((kept == 0).sum()) == zeros


@pytest.mark.parametrize("name", which_zero.STARTS)
def test_a_start_with_a_zero_factor_changes_nothing_and_both_random_do(name):
    model = which_zero.start(*which_zero.STARTS[name], seed=0)
    zeros = [
        [not factor.any() for factor in layer.factors("default")] for layer in lora_layers(model).values()
    ]
    assert {tuple(pair) for pair in zeros} == {
        ("A = 0" in name or "zero" in name, "B = 0" in name or "zero" in name)
    }
    assert torch.equal(logits(model), logits(load())) == (name != "both small")


# ---- what docs/experiments.md says of the committed figures ------------------------------------------------


def test_segments_of_layers_need_more_memory_and_arithmetic_than_every_layer_alone():
    rows = {row["plan"]: row for row in figures_of("live_bytes")["rows"]}
    peak, products = ({plan: row[key] for plan, row in rows.items()} for key in ("peak", "products"))
    segments, checkpointed = (name.format(4) for name in SEGMENTS)
    assert 0.15 < peak["full"] / peak["off"] < 0.2 and 1.3 < products["full"] / products["off"] < 1.36
    assert peak["selective"] / peak["full"] == pytest.approx(1.37, abs=0.005)
    assert peak["off"] > peak["segments of 4"] > peak["full"] and products[segments] > products["full"]
    assert peak[checkpointed] == min(peak.values())
    assert products[checkpointed] - products["off"] > 2 * (products["full"] - products["off"])
    assert (peak["offload"], products["offload"]) == (peak["full"], products["full"])


def test_an_adapter_that_is_trained_on_stored_weights_mends_what_one_put_on_them_loses():
    rows = {(row["base"], row["format"]): row for row in figures_of("stored_bits")["rows"]}
    plain = {name: row for (base, name), row in rows.items() if base == stored_bits.PLAIN}
    spiked = {name: row for (base, name), row in rows.items() if base == stored_bits.SPIKED}
    exact = plain["bfloat16"]["put_on"]
    for name, row in plain.items():  # at least as bad in every seed; int8 changes the fourth digit at most
        assert all(loss >= best for loss, best in zip(row["put_on"], exact, strict=True)), name
    nf4, cost = "NF4, blocks of 64", mean(plain["NF4, blocks of 64"]["put_on"]) / mean(exact)
    assert cost == pytest.approx(1.07, abs=0.005) and max(exact) - min(exact) > (cost - 1) * mean(exact)
    coarse = plain["FP4, blocks of 512"]
    assert coarse["error"] > 0.14 and mean(coarse["put_on"]) / mean(exact) == pytest.approx(1.15, abs=0.005)
    of_512, of_32 = (mean(plain[f"NF4, blocks of {size}"]["trained_on"]) for size in (512, 32))
    assert of_512 < of_32  # the order that the page calls noise
    exact = mean(spiked["bfloat16"]["put_on"])
    assert 1.5 < mean(spiked[nf4]["put_on"]) / exact < 1.6 and mean(spiked[nf4]["trained_on"]) < exact
    large = spiked["NF4, blocks of 512"]
    assert 8.5 < mean(large["put_on"]) / exact < 9.5 and 2.25 < mean(large["trained_on"]) / exact < 2.35
    coarse = spiked["FP4, blocks of 512"]
    assert (
        mean(coarse["right"]) < 0.055 and coarse["error"] > 0.4 and mean(spiked["bfloat16"]["right"]) > 0.73
    )
    small = spiked["FP4, blocks of 64"]
    assert all(mean(small[key]) < mean(large[key]) for key in ("put_on", "trained_on"))
    assert small["bits"] - large["bits"] == pytest.approx(0.11, abs=0.005)
    for of_base in (plain, spiked):
        double, single = of_base[nf4], of_base[nf4 + ", single"]
        assert single["bits"] - double["bits"] == pytest.approx(0.37, abs=0.005)
        assert abs(mean(single["put_on"]) - mean(double["put_on"])) < 0.002


def test_eight_bit_moments_follow_float32_in_the_dynamic_code_and_ruin_every_run_in_equal_steps():
    figures = figures_of("eight_bit_adam")
    runs = {(run["trained"], run["moments"]): run for run in figures["runs"]}
    exact, dynamic, equal = eight_bit_adam.CODES
    ends = {}
    for trained in eight_bit_adam.RATES:
        for losses, others in zip(
            runs[trained, exact]["losses"], runs[trained, dynamic]["losses"], strict=True
        ):
            pairs = zip(losses[:20], others[:20], strict=True)
            assert all(abs(a - b) < 0.005 * a for a, b in pairs)
        for losses in runs[trained, equal]["losses"]:
            assert None in losses[:30]
        held_out = (runs[trained, moments]["held_out_loss"] for moments in (exact, dynamic))
        ends[trained] = [b - a for a, b in zip(*held_out, strict=True)]
    assert min(ends["LoRA"]) < 0 < max(ends["LoRA"])
    assert all(0 < more < 0.0085 for more in ends["all weights"])
    of_seeds = runs["all weights", exact]["held_out_loss"]
    assert max(of_seeds) - min(of_seeds) == pytest.approx(0.036, abs=0.0005)
    zero = {spread["trained"]: spread["zero"] for spread in figures["spread"]}
    assert all(0.1 < shares[equal] < 0.11 for shares in zero.values())
    assert zero["LoRA"][dynamic] == zero["all weights"][dynamic] == 0
    assert eight_bit_adam.FLOOR.item() == pytest.approx(1.5e-5, abs=1e-6)


def test_an_adapter_belongs_into_what_training_saw_and_a_sum_that_is_quantized_again_into_w():
    figures = figures_of("merging")
    plain, spiked = stored_bits.PLAIN, stored_bits.SPIKED

    def losses(base, saw, name):
        return merging.row_of(figures, base, saw, name)["losses"]

    for base in (plain, spiked):
        for saw in merging.SAW:
            seen, unmerged = "dequantized" if saw == "NF4" else "W", losses(base, saw, "not merged")
            for name in (seen, f"{seen}, in bfloat16"):
                assert losses(base, saw, name) == pytest.approx(unmerged, abs=0.0005)
        int8 = losses(base, "NF4", "dequantized, then int8")
        assert int8 == pytest.approx(losses(base, "NF4", "dequantized"), abs=0.002)
        into_W, kept = losses(base, "NF4", "W"), losses(base, "NF4", "dequantized")
        assert all(a > b for a, b in zip(into_W, kept, strict=True))
        more = 1.03 if base == plain else 1.20
        assert mean(into_W) / mean(kept) == pytest.approx(more, abs=0.005)
    wrong = mean(losses(spiked, "float32", "dequantized")) / mean(losses(spiked, "float32", "W"))
    assert 1.55 < wrong < 1.65 and mean(losses(spiked, "bfloat16", "dequantized")) > 1.55 * mean(
        losses(spiked, "bfloat16", "W")
    )
    for saw in merging.SAW:
        of_W, of_stored = (losses(spiked, saw, f"{into}, then NF4") for into in ("W", "dequantized"))
        assert all(a < b for a, b in zip(of_W, of_stored, strict=True))
        of_W, of_stored = (mean(losses(plain, saw, f"{into}, then NF4")) for into in ("W", "dequantized"))
        assert abs(of_W - of_stored) < 0.008
    best = [mean(losses(spiked, "NF4", f"{into}, then NF4")) for into in ("W", "dequantized")]
    assert best == pytest.approx([0.159, 0.192], abs=0.0005)
    small = [row for row in figures["survival"] if row["size"] < 0.017]
    assert len(small) == 4 and all(row["W"] >= 0.975 and row["dequantized"] < 0.055 for row in small)
    assert all(0.16 < row["update"] < 0.27 and 0.0016 < row["bfloat16"] < 0.0018 for row in figures["sizes"])
    ends = {saw: mean(losses(plain, saw, "not merged")) for saw in merging.SAW}
    assert ends["float32"] < ends["bfloat16"] < ends["NF4"]


def test_activations_gradients_need_the_loss_scale_and_training_bears_their_loss_for_long():
    figures = figures_of("small_gradients")
    at = {found["kind"]: {row["scale"]: row for row in found["scales"]} for found in figures["gradients"]}
    plain, scaled, small = (at["activations"][scale] for scale in (1.0, 65536.0, 2.0**-10))
    assert plain["zero"] == pytest.approx(0.18, abs=0.005) and plain["few_digits"] == pytest.approx(
        0.79, abs=0.005
    )
    assert 0.002 < scaled["zero"] < 0.0025 and small["zero"] == pytest.approx(0.94, abs=0.005)
    assert all(at[kind][1.0]["zero"] < 1e-4 for kind in "AB")
    for rows in at.values():
        middle = [row for scale, row in rows.items() if 2**10 <= scale <= 2**20]
        assert len(middle) == 6 and all(row["zero"] < 0.01 and row["infinite"] == 0 for row in middle)
    runs = {run["name"]: run for run in figures["runs"]}
    exact, saw, free, shrunk = runs.values()
    assert saw["skipped"] == 4 and len(saw["scales"]) == 40
    falls = sum(after < before for before, after in pairwise([65536.0, *saw["scales"]]))
    assert falls == 4 and max(saw["scales"]) >= 2**20
    ends = [run["held_out_loss"] for run in (exact, saw, free, shrunk)]
    assert ends == pytest.approx([0.22, 0.25, 0.22, 0.36], abs=0.005) and abs(ends[0] - ends[2]) < 0.0005


def test_a_start_with_a_zero_tolerates_half_the_rate_of_one_with_b_zero():
    curves = {curve["start"]: curve for curve in figures_of("which_zero")["curves"]}
    of = {name: dict(zip(curve["rates"], curve["losses"], strict=True)) for name, curve in curves.items()}
    A, B, small = of["A = 0"], of["B = 0"], of["both small"]
    assert max(B[0.016]) < 0.5 and min(A[0.016]) > 2 and min(*B[0.032], *A[0.032]) > 2
    assert max(A[0.002]) < min(B[0.002])
    best = [min((mean(losses), rate) for rate, losses in start.items()) for start in (B, A, small)]
    assert best[0] == pytest.approx((0.384, 0.008), abs=0.0005) and best[1] == pytest.approx(
        (0.455, 0.004), abs=0.0005
    )
    assert best[2] == pytest.approx((0.321, 0.016), abs=0.0005)
    assert max(B[0.008]) > min(A[0.004]) and max(small[0.016]) > min(B[0.008])  # the ranges overlap
    assert [mean(small[rate]) < 1 for rate in small] == [mean(B[rate]) < 1 for rate in B]
    assert all(
        loss == curves["both zero"]["before"] for losses in of["both zero"].values() for loss in losses
    )
    assert curves["A = 0"]["before"] == curves["B = 0"]["before"] == curves["both zero"]["before"]
