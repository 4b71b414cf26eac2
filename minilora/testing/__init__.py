"""For tests of your own quantizer, LoRA layer or adapter library: find its bug, and its smallest example.

    import torch
    from minilora.testing import check_quantizer

    code = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    def quantize(weight):  # one scale for the whole tensor
        absmax = weight.abs().max().float()
        return (weight[..., None] / absmax - code).abs().argmin(-1), absmax, weight.dtype
    def dequantize(stored):
        return (code[stored[0]] * stored[1]).to(stored[2])
    print(check_quantizer(quantize, dequantize, code=code, blocksize=64))

A report names each property, and gives a line of Python that makes the smallest tensor or layer with which it
failed; `report.raise_for_failures()` makes a test of it.

quantizer_battery.py     check_quantizer: any quantizer in blocks, of any library
quantizer_properties.py  the properties, one function each
quantizer_subject.py     a quantizer, what is promised of it, and the weights to try
quantizer_oracles.py     the nearest codes, and which inputs have no single right answer
storage_oracles.py       double quantization, int8
lora_battery.py          check_lora_layer: any layer that has A and B
lora_properties.py       the properties, one function each
lora_subject.py          a layer, what is promised of it, and the cases to try
lora_oracles.py          output and gradients of LoRA and DoRA, dropout, merging
optimizer_oracles.py     AdamW
machine.py               adapters added, trained, merged, saved in any order: a state machine
battery.py               named properties and the search for the smallest failure
report.py                what a battery found
recipes.py               a tensor in one line of text
simplify.py              a counterexample of few plain numbers
strategies.py            tensors, shapes and factors
model_strategies.py      ModelConfig, conversations, masks, lengths of documents
peak.py                  memory at the peak of a function
exercises.py             a check in a notebook: one line in place of a traceback

Oracles are float64, slow and plain, and share nothing with the code that they check. This is the only room
that imports hypothesis, which is a test dependency.
"""

from minilora.testing.lora_battery import check_lora_layer
from minilora.testing.lora_oracles import (
    dora_gradients,
    dora_reference,
    dropped_reference,
    lora_gradients,
    lora_reference,
    merged_reference,
)
from minilora.testing.lora_subject import Built, LayerCase
from minilora.testing.machine import AdapterMachine
from minilora.testing.model_strategies import conversations, document_lengths, masks, model_configs
from minilora.testing.optimizer_oracles import adamw_reference
from minilora.testing.peak import peak_memory
from minilora.testing.quantizer_battery import check_quantizer
from minilora.testing.quantizer_oracles import (
    absmax_of,
    blocks_of,
    dequantize_reference,
    is_nearest,
    largest_half_gap,
    nearest_codes,
    smallest_errors,
    unpack_symbols,
)
from minilora.testing.recipes import FLAWS, LAYOUTS, NONFINITE, Recipe
from minilora.testing.report import Report
from minilora.testing.storage_oracles import int8_reference, nested_reference
from minilora.testing.strategies import DTYPES, factors, lora_shapes, recipes, shapes, weights

__all__ = [
    "DTYPES",
    "FLAWS",
    "LAYOUTS",
    "NONFINITE",
    "AdapterMachine",
    "Built",
    "LayerCase",
    "Recipe",
    "Report",
    "absmax_of",
    "adamw_reference",
    "blocks_of",
    "check_lora_layer",
    "check_quantizer",
    "conversations",
    "dequantize_reference",
    "document_lengths",
    "dora_gradients",
    "dora_reference",
    "dropped_reference",
    "factors",
    "int8_reference",
    "is_nearest",
    "largest_half_gap",
    "lora_gradients",
    "lora_reference",
    "lora_shapes",
    "masks",
    "merged_reference",
    "model_configs",
    "nearest_codes",
    "nested_reference",
    "peak_memory",
    "recipes",
    "shapes",
    "smallest_errors",
    "unpack_symbols",
    "weights",
]
