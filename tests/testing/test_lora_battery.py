"""The battery names the fault of every wrong LoRA layer, and finds none in the right ones."""

import math
import warnings

import pytest
from testing.wrong_lora_layers import WRONG, Lora
from torch import nn

from minilora import LoraConfig
from minilora.lora import LoraLinear
from minilora.testing import LayerCase, check_lora_layer

NARROW = """DropoutWithoutGain DropoutOfWholeTokens FrozenA MergeTwiceAddsTwice MergeForgetsScaling TrainableBase AByRank
    UnmergeForgetsScaling OnlyMatrices SwitchForgetsToComeBack""".split()


@pytest.mark.parametrize("layer", WRONG, ids=lambda layer: layer.__name__)
def test_every_wrong_layer_is_reported_by_the_name_of_its_fault_and_a_narrow_fault_by_no_other(layer):
    failures = set(check_lora_layer(layer, max_examples=15, shrink=False).failures)
    assert failures == WRONG[layer] if layer.__name__ in NARROW else failures >= WRONG[layer]


def test_a_wrong_scaling_is_no_wrong_gradient():
    (wrong,) = (layer for layer in WRONG if layer.__name__ == "NoScaling")
    failures = set(check_lora_layer(wrong, max_examples=20, shrink=False).failures)
    assert not {name for name in failures if "gradient" in name or "dropout" in name or "merge" in name}


def test_a_right_layer_written_in_thirty_lines_passes():
    report = check_lora_layer(Lora)
    report.raise_for_failures()
    assert not report.skipped


def ours(base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float, **options) -> LoraLinear:
    base.requires_grad_(False)  # add_lora does it for a whole model
    layer = LoraLinear(base)
    config = LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, **options)
    layer.add_adapter("a", config)
    layer.active = "a"
    return layer


def switch(layer: LoraLinear, on: bool) -> None:
    layer.active = "a" if on else None


def test_ours_has_every_property():
    report = check_lora_layer(ours, switch=switch)
    report.raise_for_failures()
    assert not report.skipped


def test_ours_has_every_property_with_rslora():
    def rslora(*arguments):
        return ours(*arguments, use_rslora=True)

    check_lora_layer(
        rslora, switch=switch, scaling=lambda r, alpha: alpha / math.sqrt(r), max_examples=15
    ).raise_for_failures()
    assert "scaling" in check_lora_layer(rslora, switch=switch, max_examples=5, shrink=False).failures


def peft_layer(base: nn.Linear, r: int, lora_alpha: float, lora_dropout: float) -> nn.Module:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import Linear

    config = peft.LoraConfig(r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout)
    return Linear(base, "default", config, r=r, lora_alpha=lora_alpha)


def test_pefts_layer_has_every_property_once_its_base_is_frozen_as_get_peft_model_does():
    def frozen(base, *arguments):
        return peft_layer(base.requires_grad_(False), *arguments)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of merging twice
        check_lora_layer(frozen).raise_for_failures()


def test_a_layer_that_nobody_froze_fails_in_this_alone():
    def thawed(*arguments):
        layer = ours(*arguments)
        layer.base_layer.requires_grad_(True)
        return layer

    for layer, options in ((thawed, dict(switch=switch)), (peft_layer, {})):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert set(check_lora_layer(layer, max_examples=10, shrink=False, **options).failures) == {
                "frozen base"
            }


def test_verbs_that_a_layer_lacks_are_skipped_and_said_so():
    class Bare(nn.Module):
        def __init__(self, *arguments):
            super().__init__()
            layer = Lora(*arguments)
            self.base, self.lora_A, self.lora_B, self.call = layer.base, layer.lora_A, layer.lora_B, [layer]

        def forward(self, x):
            return self.call[0].train(self.training)(x)

    report = check_lora_layer(Bare, max_examples=10)
    report.raise_for_failures()
    assert set(report.skipped) == {"merge", "merge twice", "unmerge", "unmerge in 16 bits", "switch"}


def test_a_counterexample_makes_the_layer_again():
    (wrong,) = (layer for layer in WRONG if layer.__name__ == "NoScaling")
    report = check_lora_layer(wrong, max_examples=20)
    line = report.failures["scaling"]
    assert line.startswith("LayerCase(in_features=1, out_features=1, r=")
    assert line.endswith("bias=False, leading=(1,), seed=0)")
    built = eval(line, dict(LayerCase=LayerCase)).layer(wrong)
    assert built.measured_scaling() == pytest.approx(1) != built.scaling
