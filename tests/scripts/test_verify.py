"""The parity report has every row, every row can fail, and docs/parity.md is the output of this script."""

import math
import re
import sys
from dataclasses import replace
from functools import partial
from importlib.metadata import version

import pytest
import torch
import verify
from hypothesis import given, settings
from hypothesis import strategies as st
from support.project import ROOT

from minilora import CausalLM, LoraConfig, QuantConfig, load_model, ops, quantize_4bit, save_model
from minilora.optim import AdamW8bit

for oracle in ("transformers", "peft", "bitsandbytes"):
    pytest.importorskip(oracle)

WHATS = [row.what for row in verify.ROWS]


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    monkeypatch.setitem(verify.SIZES, "num_hidden_layers", 1)


@pytest.fixture
def run(call):
    """Run `verify.py ARGUMENTS`: (exit code, stdout, stderr)."""
    return partial(call, "verify")


def tables(report: str) -> dict[str, list[list[str]]]:
    """Return the cells of every row, by section of the report."""
    sections = re.split(r"^## ", report, flags=re.MULTILINE)[1:]
    return {
        s.partition(":")[0]: [row[2:-2].split(" | ") for row in s.splitlines() if row.startswith("| ")][2:]
        for s in sections
    }


def test_the_report_and_the_terminal_hold_every_row_and_what_it_takes_to_repeat_them(run, tmp_path):
    path = tmp_path / "report.md"
    code, out, err = run("--family", "qwen3", "--steps", 2, "--seed", 3, "--output", path)
    report = path.read_text()
    rows = tables(report)["qwen3"]
    assert code == 0, out + err
    assert [row[0] for row in rows] == WHATS and {row[-1] for row in rows} == {"ok"}
    for cells in rows:
        assert int(cells[2]) > 0 and verify.LINE.format(*cells) in out.splitlines()
    assert f"all {len(WHATS)} rows are ok" in out
    assert f"--family qwen3 --steps 2 --seed 3 --output {path}" in report
    assert "layers of width 256" in report and "seed 3, 2 optimizer steps" in report and "float32" in report
    for package in ("torch", "transformers", "peft", "bitsandbytes"):
        assert f"{package} {version(package)}" in report


BREAKAGES = {  # a fault in minilora -> the rows that must fail
    "activation": ["hidden states after every layer", "final hidden states", "logits"],
    "scaling": [
        "loss with an adapter",
        "every LoRA gradient",
        "adapter after AdamW steps",
        "merged weights",
        "adapter saved here, loaded there: logits",
        "adapter saved there, loaded here: logits",
        "NF4 model with an adapter: logits",
        "NF4 model: every LoRA gradient",
    ],
    "betas": ["adapter after 8-bit AdamW steps", "8-bit AdamW: codes and scales"],
    "codebook": ["NF4, FP4: codebooks"],
    "quantizer": [
        "NF4, FP4: packed bytes",
        "NF4, FP4: scales, doubly quantized",
        "NF4, FP4: dequantized weights",
    ],
    "recompute": [
        "gradients, recompute full",
        "gradients, recompute selective",
        "gradients, recompute offload (CPU: full)",
    ],
}


def test_every_row_can_fail():
    assert sorted(sum(BREAKAGES.values(), [])) == sorted(WHATS)


@pytest.fixture
def broken(request, monkeypatch):
    """Break one thing in minilora; return its name."""
    code = verify.four_bit_code("nf4")
    match request.param:
        case "scaling":
            monkeypatch.setattr(LoraConfig, "scaling_of", lambda self, r, alpha: 2 * alpha / r)
        case "activation":
            monkeypatch.setattr(
                ops, "swiglu", lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up
            )
        case "betas":
            monkeypatch.setattr(
                verify, "AdamW8bit", lambda params, **kwargs: AdamW8bit(params, betas=(0.9, 0.998), **kwargs)
            )
        case "codebook":
            monkeypatch.setattr(verify, "four_bit_code", lambda quant_type: code.nextafter(torch.ones(())))
        case "quantizer":  # rounds to the compute dtype first
            monkeypatch.setattr(
                verify.minilora, "quantize_4bit", lambda w, kind: quantize_4bit(w.bfloat16().float(), kind)
            )
        case "recompute":  # forgets the dropout
            monkeypatch.setattr(verify, "set_recompute", lambda model, policy: model.train(policy == "off"))
    return request.param


@pytest.fixture
def case(tmp_path):
    verify.write_random_model(tmp_path, "mistral", 0)
    return verify.Case(tmp_path, verify.SIZES["vocab_size"], steps=2, seed=0)


@pytest.mark.filterwarnings("ignore:::(transformers|peft).*")
@pytest.mark.parametrize("broken", [name for name in BREAKAGES if name != "scaling"], indirect=True)
def test_a_row_fails_if_what_it_compares_is_broken(broken, case):
    for row in verify.ROWS:
        if row.what in BREAKAGES[broken]:
            cells = verify.compare(row, case)
            assert cells[-1] == "FAILED", cells


@pytest.mark.parametrize("broken", ["scaling"], indirect=True)
def test_twice_the_scaling_fails_the_rows_of_lora_and_no_other_and_the_script_exits_with_1(
    broken, case, run, tmp_path
):
    path = tmp_path / "report.md"
    code, out, err = run("--model", case.directory, "--steps", 2, "--output", path)
    failed = [row[0] for row in tables(path.read_text())[str(case.directory)] if row[-1] == "FAILED"]
    assert code == 1 and failed == BREAKAGES[broken], out + err
    assert f"{len(failed)} of {len(WHATS)} rows FAILED" in out


def test_the_report_that_is_checked_in_holds_todays_rows_of_all_families_and_all_are_ok():
    report = tables((ROOT / "docs" / "parity.md").read_text(encoding="utf-8"))
    assert list(report) == list(verify.FAMILIES)
    for rows in report.values():
        assert [(row[0], row[1], row[-1]) for row in rows] == [
            (row.what, row.against, "ok") for row in verify.ROWS
        ]
        assert [row[5] for row in rows] == [
            f"{row.allowed:.0e}" if row.allowed else "identical" for row in verify.ROWS
        ]


@pytest.mark.filterwarnings("ignore:::(transformers|peft).*")
def test_the_models_of_ministral_and_smollm3_have_the_windows_and_the_layer_without_rope(
    monkeypatch, tmp_path
):
    """One layer decides each of them, so the logits must depend on it: without, they are another model's."""
    monkeypatch.setitem(verify.SIZES, "num_hidden_layers", 4)
    taken_out = {"ministral": dict(layer_windows=(None,) * 4), "smollm3": dict(layer_rope=())}
    expected = {"ministral": ((16, None, 16, None), ()), "smollm3": ((None,) * 4, (True, True, True, False))}
    for family, change in taken_out.items():
        directory = tmp_path / family
        verify.write_random_model(directory, family, 0)
        case = verify.Case(directory, verify.SIZES["vocab_size"], steps=2, seed=0)
        ours, theirs = verify.load_both(case)
        assert (ours.config.layer_windows, ours.config.layer_rope) == expected[family]
        plain = CausalLM(replace(ours.config, **change))
        plain.load_state_dict(ours.state_dict())
        ids = case.batch()["input_ids"]
        with torch.no_grad():
            reference = theirs(input_ids=ids).logits
            differences = [verify.difference(model(ids), reference, False) for model in (ours, plain)]
        assert differences[0] <= verify.SUMS < 0.01 < differences[1]


def test_an_oracle_that_is_missing_is_a_mistake_of_one_line_that_names_the_mend(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    code, out, err = run()
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "peft" in err and 'pip install -c constraints.txt -e ".[test]"' in err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--steps", 1], "--steps 1"),
        (["--output", "{}/absent/report.md"], "absent/report.md"),
        (["--output", "{}"], "exists and is no file"),
        (["--model", "{}/absent"], "config.json"),
        (["--model", "{}/narrow"], "wide, no multiple of 64"),
        (["--model", "{}/quantized"], "are quantized already"),
    ],
)
def test_mistakes_are_told_before_the_first_number(run, tmp_path, monkeypatch, arguments, said):
    for name, width in (("narrow", 48), ("wide", 64)):
        sizes = dict(
            hidden_size=width, intermediate_size=2 * width, num_attention_heads=2, num_key_value_heads=1
        )
        for key, value in sizes.items():
            monkeypatch.setitem(verify.SIZES, key, value)
        verify.write_random_model(tmp_path / name, "mistral", 0)
    save_model(load_model(tmp_path / "wide", QuantConfig()), tmp_path / "quantized")
    code, out, err = run(*(str(argument).format(tmp_path) for argument in arguments))
    assert code == 2 and out == "" and err.count("\n") == 1 and said in err


floats = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9).map(torch.tensor)


@given(floats, st.integers(-20, 20))
@settings(deadline=None)
def test_a_tensor_differs_from_itself_by_nothing_and_from_its_multiple_by_the_factor_less_one(x, k):
    assert verify.difference(x, x.clone(), identical=True) == 0
    if x.abs().max() > 1e-20:  # far from the subnormals, where powers of two are exact
        assert verify.difference(x, x.clone(), identical=False) == 0
        # The difference and the quotient are rounded to float32: 2^-24 relative each.
        assert verify.difference(x * 2.0**k, x, identical=False) == pytest.approx(abs(2.0**k - 1), rel=2**-22)


def test_one_bit_of_one_value_is_not_identical_and_nan_or_another_shape_never_passes():
    x = torch.tensor([0.0, 1.0])
    assert verify.difference(-x * torch.tensor([1, -1]), x, identical=True) == 1 / 8  # -0 for 0
    for wrong in (x.double(), x.view(2, 1), x[:1]):
        assert (
            verify.difference(wrong, x, identical=True)
            == verify.difference(wrong, x, identical=False)
            == math.inf
        )
    row = verify.Row("NaN", "nothing", 1e-5, lambda _: iter([(x, x), (x * math.nan, x), (x, x)]))
    assert verify.compare(row, None)[-1] == "FAILED"
