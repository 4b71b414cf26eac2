"""PEFT 0.21's verdict on an adapter: what it refuses, what it leaves untrained, what it passes over.

The two files are compared by checks.py, for this linter and for the reader. Here each problem gets
PEFT's answer to it.
"""

from collections.abc import Iterator
from functools import partial

from minilora.adapters.checks import MISSING, MISSING_COPY, UNEXPECTED, UNFIT, WRONG_RANK
from minilora.adapters.findings import (
    CANNOT_TELL,
    CONVERT,
    CORRECT,
    LOADS_WRONGLY,
    RESIZE,
    SAVE_AGAIN,
    TRY_IT,
    WILL_NOT_LOAD,
    Finding,
    found,
)
from minilora.adapters.header import AdapterHeader
from minilora.adapters.peft_format import PEFT_DEFAULTS
from minilora.adapters.peft_rules import refused_values, starts_elsewhere, unjudged
from minilora.system.schema import shown
from minilora.targets import EMBEDDING, chosen_targets


def verdicts_of_peft(adapter: AdapterHeader) -> Iterator[Finding]:
    """Yield the reasons why PEFT does not load an adapter as it was trained."""
    refused = partial(found, "PEFT", WILL_NOT_LOAD)
    if (peft_type := adapter.config.get("peft_type")) != "LORA":
        yield refused(f"peft_type is {shown(peft_type)}, not 'LORA'", CORRECT)
    elif wrong := refused_values(adapter.config):
        yield refused(wrong, CORRECT)
    else:
        if unknown := _unjudged(adapter):
            yield found("PEFT", CANNOT_TELL, unknown, TRY_IT)
        else:
            yield from _layers(adapter)
            yield from _tensors(adapter)
        yield from _ignored_keys(adapter)


def _unjudged(adapter: AdapterHeader) -> list[str]:
    unknown = [f"{key} = {shown(adapter.get(key))} is not judged here" for key in unjudged(adapter.config)]
    has_bias = any(key.endswith(".bias") for key in adapter.sizes)
    if adapter.base is None and (bias := adapter.get("bias")) != "none" and not has_bias:
        unknown.append(f"bias = {shown(bias)}, but no bias in the file: does the base model have biases?")
    return unknown


def _layers(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, targets = partial(found, "PEFT", WILL_NOT_LOAD), shown(adapter.get("target_modules"))
    names, weights = adapter.modules
    chosen = chosen_targets(names, adapter.file.config, [n for n in weights if n != EMBEDDING])
    if names and not chosen:
        whose = "of the base model" if adapter.base else "that the file adapts"
        yield refused(f"target_modules {targets} names no layer {whose}", CORRECT)
    if wrong := [name for name in chosen if name not in weights]:
        why = "which is no linear layer and no embedding"
        yield refused([f"target_modules chooses {name}, {why}" for name in wrong], CORRECT)
    if init := starts_elsewhere(adapter.get("init_lora_weights")):
        yield found("PEFT", LOADS_WRONGLY, f"init_lora_weights = {init}", CONVERT)


def _tensors(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, wrongly = (partial(found, "PEFT", verdict) for verdict in (WILL_NOT_LOAD, LOADS_WRONGLY))
    if wrong := adapter.of_kind(UNFIT, WRONG_RANK, MISSING_COPY):
        yield refused(list(map(str, wrong)), SAVE_AGAIN)
    if grown := adapter.other_vocabulary():
        yield refused(grown, RESIZE)
    untrained = [f"{problem.key} is missing" for problem in adapter.of_kind(MISSING)]
    if not adapter.file.layers:
        untrained.append("the file holds no A and no B")
    if untrained:
        yield wrongly([f"{problem}: left untrained" for problem in untrained], SAVE_AGAIN)
    if strange := adapter.of_kind(UNEXPECTED):
        yield wrongly([str(p) if p.why else f"{p.key} is not expected" for p in strange], SAVE_AGAIN)


def _ignored_keys(adapter: AdapterHeader) -> Iterator[Finding]:
    wrongly = partial(found, "PEFT", LOADS_WRONGLY)
    known = {*PEFT_DEFAULTS, "runtime_config"}
    unknown = {key: value for key, value in adapter.config.items() if value and key not in known}
    if unknown:
        yield wrongly([f"{k} = {shown(v)} is not known, and ignored" for k, v in unknown.items()], CORRECT)
    if absent := adapter.absent("r", "lora_alpha", "target_modules"):
        yield wrongly([f"{key} is missing, and PEFT takes its default" for key in absent], CORRECT)
