"""Will an adapter load, and where? The rules of PEFT 0.21, vLLM 0.33 and SGLang 0.5.23, without any of them.

A directory that loads in one program need not load in another. Worse, some load and silently give wrong
answers:

                           PEFT              vLLM                SGLang
    rsLoRA                 alpha / sqrt(r)   alpha / sqrt(r)     alpha / r: wrong by a factor of sqrt(r)
    DoRA                   yes               refused             refused
    ranks                  any, by layer     to --max-lora-rank  one for all layers
    alphas by layer        yes               yes                 ignored
    targets                names or regex    as the tensors say  names; q needs v; k, v need q; up needs gate
    trained biases, copies yes               refused             refused or left out
    PiSSA, LoftQ, ...      yes               refused             loaded without their change of the base model
    missing tensors        stay untrained    refused             refused
    NaN, an infinite alpha computes NaN      computes NaN        computes NaN
    other *.safetensors    not read          not read            read as if they belonged to the adapter

The weights are read once, one tensor at a time, to find a NaN; a few hundred megabytes take about a second.
With the configuration of the base model, names and shapes are compared with its layers. No finding means
"loads"; of a feature that the linter does not know, it says "cannot tell".
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from minilora.config import ModelConfig
from minilora.formats.adapter import load_adapter, read_adapter
from minilora.formats.adapter_header import AdapterHeader, UnreadableAdapter
from minilora.formats.peft_format import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    MAGNITUDE,
    PARTNERS,
    PEFT_DEFAULTS,
    changes_base,
)
from minilora.formats.peft_rules import (
    SAVED_EMBEDDINGS,
    misshapen,
    missing_biases,
    refused_values,
    targets,
    unjudged,
    unsupported_targets,
    wrong_copies,
)
from minilora.formats.vera_adapter import VERA
from minilora.model import CausalLM
from minilora.system.errors import UserError, summarize
from minilora.system.schema import shown
from minilora.system.terminal import printable

SERVERS = ("PEFT", "vLLM", "SGLang")
WILL_NOT_LOAD, LOADS_WRONGLY, NEEDS_OPTION = "will not load", "loads wrongly", "loads, if"
CANNOT_TELL = "cannot tell"  # The adapter asks for something that only the server itself can judge.

_EXPORT = "python scripts/merge.py --adapter DIRECTORY --export_adapter NEW"
_MERGE = "python scripts/merge.py --adapter DIRECTORY --output NEW"
_SAVE_AGAIN = "save or fetch the adapter again"
_TRAIN_AGAIN = "the file is damaged or its training diverged: take an earlier checkpoint"
_CORRECT = f"correct {ADAPTER_CONFIG_FILE}"
_CONVERT = "convert it to plain LoRA, with PEFT's path_initial_model_for_weight_conversion"
_TRY_IT = "load it in PEFT, and compare its answers with those of training"
_ADAPT_TOGETHER = "adapt q_proj, k_proj, v_proj together, gate_proj with up_proj; or merge it"

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the choices of --max-lora-rank
_VLLM_DEFAULT_RANK = 16
_VLLM_LACKS = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)
_SGLANG_NEEDS = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Finding:
    """The reason why a server does not load an adapter as it was trained, and the remedy."""

    server: str  # one of SERVERS
    verdict: str  # WILL_NOT_LOAD | LOADS_WRONGLY | NEEDS_OPTION | CANNOT_TELL
    why: str
    mend: str = ""


def lint_adapter(directory: str | Path, base_config: ModelConfig | None = None) -> list[Finding]:
    """All reasons that keep a server from loading an adapter directory as it was trained.

    A server without a finding loads it. base_config: of the base model, to compare names and shapes with.
    Raises UserError for a directory that is no adapter at all, and for pickled weights.
    """
    directory = Path(directory)
    if not (directory / ADAPTER_CONFIG_FILE).is_file():
        raise UserError(f"{directory} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
    try:
        adapter = AdapterHeader.read(directory, base_config)
    except UnreadableAdapter as problem:
        return [Finding(server, WILL_NOT_LOAD, str(problem), _SAVE_AGAIN) for server in SERVERS]
    if adapter.config.get("peft_type") == VERA:
        return _vera(directory, base_config)
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    other_files = [name for name in files if name != ADAPTER_WEIGHTS_FILE]
    findings = [*_peft(adapter), *_vllm(adapter), *_sglang(adapter, other_files)]
    if wrong := adapter.wrong_numbers():
        findings += [_finding(server, LOADS_WRONGLY, wrong, _TRAIN_AGAIN) for server in SERVERS]
    return [replace(finding, mend=finding.mend.replace("DIRECTORY", str(directory))) for finding in findings]


def loads(findings: list[Finding]) -> bool:
    """Whether every server loads the adapter as it was trained. Some servers may need an option for it."""
    return all(finding.verdict == NEEDS_OPTION for finding in findings)


def findings_text(findings: list[Finding]) -> str:
    """The findings for a terminal, each with its remedy below. A server without findings gets one line."""
    lines = []
    for server in SERVERS:
        mine = [finding for finding in findings if finding.server == server]
        lines += [] if mine else [f"{server:8}loads"]
        for finding in mine:
            lines.append(f"{server:8}{finding.verdict:15}{_shortened(finding.why)}")
            lines += [f"{'':23}-> {_shortened(finding.mend)}"] if finding.mend else []
    return "\n".join(lines)


def _shortened(text: str) -> str:
    """A text for a terminal: names from a file may be endless, and may hold line ends and escape codes."""
    return printable(text if len(text) <= 500 else f"{text[:300]} ... {text[-195:]}")


def _finding(server: str, verdict: str, problems: list[str] | str, mend: str = _MERGE) -> Finding:
    return Finding(server, verdict, problems if isinstance(problems, str) else summarize(problems, 2), mend)


def _absent(adapter: AdapterHeader, *keys: str) -> list[str]:
    return [key for key in keys if adapter.config.get(key) is None]


def _changed_base(adapter: AdapterHeader) -> str | None:
    """A sentence if the adapter's initialisation changed the base model, which a server does not repeat."""
    init = adapter.get("init_lora_weights")
    if isinstance(init, str) and changes_base(init):
        return f"init_lora_weights = {shown(init)} changed the base model"
    return None


def _foreign_parts(adapter: AdapterHeader) -> list[str]:
    """Names of the tensors of an update that are neither A nor B: DoRA's magnitudes."""
    return [f"{layer}.{part}" for layer, part, _ in adapter.tensors() if part not in PARTNERS]


def _vera(directory: Path, base_config: ModelConfig | None) -> list[Finding]:
    """The findings about a VeRA adapter, which PEFT alone knows."""
    findings = []
    try:
        read_adapter(directory)
        if base_config is not None:
            with torch.device("meta"):
                model = CausalLM(base_config)
            load_adapter(model, directory)
    except UserError as error:
        findings.append(_finding("PEFT", WILL_NOT_LOAD, str(error), _SAVE_AGAIN))
    merge = _MERGE.replace("DIRECTORY", str(directory))
    why = "peft_type 'VERA' is not supported"
    return findings + [_finding(server, WILL_NOT_LOAD, why, merge) for server in SERVERS if server != "PEFT"]


# ---- PEFT ----


def _peft(adapter: AdapterHeader) -> Iterator[Finding]:
    refused = partial(_finding, "PEFT", WILL_NOT_LOAD)
    if (peft_type := adapter.config.get("peft_type")) != "LORA":
        yield refused(f"peft_type is {shown(peft_type)}, not 'LORA'", _CORRECT)
    elif wrong := refused_values(adapter):
        yield refused(wrong, _CORRECT)
    else:
        if unknown := unjudged(adapter):
            yield _finding("PEFT", CANNOT_TELL, unknown, _TRY_IT)
        try:
            chosen = targets(adapter)  # None: unknown
        except UserError as error:
            yield refused(str(error), _CORRECT)
            return
        yield from _peft_refused_layers(adapter, chosen)
        yield from _peft_ignored_keys(adapter)
        yield from _peft_ignored_tensors(adapter, chosen)


def _peft_refused_layers(adapter: AdapterHeader, chosen: set[str] | None) -> Iterator[Finding]:
    refused = partial(_finding, "PEFT", WILL_NOT_LOAD)
    if chosen == set() and (adapter.base or adapter.layers):
        whose = "of the base model" if adapter.base else "that the file adapts"
        names = shown(adapter.get("target_modules"))
        yield refused(f"target_modules {names} names no layer {whose}", _CORRECT)
    if wrong := unsupported_targets(adapter, chosen or set()):
        yield refused(wrong, _CORRECT)
    if wrong := adapter.wrong_ranks() + adapter.wrong_widths() + misshapen(adapter) + wrong_copies(adapter):
        yield refused(wrong, _SAVE_AGAIN)


def _peft_ignored_keys(adapter: AdapterHeader) -> Iterator[Finding]:
    wrongly = partial(_finding, "PEFT", LOADS_WRONGLY)
    known = {*PEFT_DEFAULTS, "runtime_config"}
    unknown = {key: value for key, value in adapter.config.items() if value and key not in known}
    if unknown:
        yield wrongly([f"{k} = {shown(v)} is not known, and ignored" for k, v in unknown.items()], _CORRECT)
    if absent := _absent(adapter, "r", "lora_alpha", "target_modules"):
        yield wrongly([f"{key} is missing, and PEFT takes its default" for key in absent], _CORRECT)


def _peft_ignored_tensors(adapter: AdapterHeader, chosen: set[str] | None) -> Iterator[Finding]:
    wrongly, use_dora = partial(_finding, "PEFT", LOADS_WRONGLY), adapter.get("use_dora")
    untrained = adapter.halves()
    untrained += [f"{layer} has no tensors" for layer in sorted(chosen or ()) if layer not in adapter.layers]
    if use_dora:
        lengthless = [layer for layer, parts in adapter.layers.items() if MAGNITUDE not in parts]
        untrained += [f"{layer}.{MAGNITUDE} is missing" for layer in lengthless]
    if chosen is not None:
        untrained += [f"{name} is missing" for name in missing_biases(adapter, chosen)]
    if not adapter.layers:
        untrained.append("the file holds no A and no B")
    if untrained:
        yield wrongly([f"{problem}: left untrained" for problem in untrained], _SAVE_AGAIN)
    parts = [(layer, part) for layer, part, _ in adapter.tensors()]
    strange = [f"{layer}.{part}" for layer, part in parts if chosen is not None and layer not in chosen]
    strange += [f"{layer}.{part}" for layer, part in parts if part == MAGNITUDE and not use_dora]
    strange += [name for name in adapter.others if not _peft_reads(adapter, name)]
    if strange:
        yield wrongly([f"{name} is not expected" for name in strange], _SAVE_AGAIN)


def _peft_reads(adapter: AdapterHeader, name: str) -> bool:
    """Whether PEFT reads such a tensor: a trained copy of a module, a bias, or a resized embedding."""
    endings = [f"{module}.weight" for module in adapter.get("modules_to_save") or []]
    if adapter.get("bias") != "none":
        endings.append(".bias")
    if adapter.get("lora_bias"):
        endings.append(".lora_B.bias")
    if adapter.get("trainable_token_indices") is not None:
        endings.append(".token_adapter.trainable_tokens_delta")
    return name.endswith(tuple(endings)) or bool(SAVED_EMBEDDINGS.fullmatch(name))


# ---- vLLM ----


def _vllm(adapter: AdapterHeader) -> Iterator[Finding]:
    if absent := _absent(adapter, "r", "lora_alpha", "target_modules"):
        missing = [f"the key {key} is missing" for key in absent]
        yield _finding("vLLM", WILL_NOT_LOAD, missing, _CORRECT)
        return
    yield from _vllm_features(adapter)
    yield from _vllm_ranks(adapter)
    yield from _vllm_tensors(adapter)


def _vllm_features(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, get = partial(_finding, "vLLM", WILL_NOT_LOAD), adapter.get
    for key in _VLLM_LACKS:
        if get(key):
            yield refused(f"{key} = {shown(get(key))} is not supported")
    if get("bias") != "none":
        yield refused(f"bias = {shown(get('bias'))} is not supported, only 'none'")
    if copies := [name for name in get("modules_to_save") or [] if name not in ("classifier", "score")]:
        yield refused(f"modules_to_save = {shown(copies)} is not supported")
    if changed := _changed_base(adapter):
        yield refused(changed, _CONVERT)


def _vllm_ranks(adapter: AdapterHeader) -> Iterator[Finding]:
    rank = max([adapter.get("r"), *(adapter.get("rank_pattern") or {}).values()])
    if rank > _VLLM_RANKS[-1]:
        largest = f"rank {rank} is above {_VLLM_RANKS[-1]}, the largest --max-lora-rank"
        yield _finding("vLLM", WILL_NOT_LOAD, largest)
    elif rank > _VLLM_DEFAULT_RANK:
        choice = min(r for r in _VLLM_RANKS if r >= rank)
        yield Finding("vLLM", NEEDS_OPTION, f"started with --max-lora-rank {choice}: the rank is {rank}")
    if wrong := adapter.wrong_ranks():
        yield Finding("vLLM", LOADS_WRONGLY, f"{summarize(wrong, 2)}: scaled by another rank", _CORRECT)


def _vllm_tensors(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, unread = partial(_finding, "vLLM", WILL_NOT_LOAD), _foreign_parts(adapter)
    for name in adapter.others:
        if not (SAVED_EMBEDDINGS.fullmatch(name) and ".base_layer." in name):
            unread.append(name)
    if unread:
        yield refused([f"{name} is no LoRA tensor" for name in unread])
    unknown = [layer for layer in adapter.layers if adapter.base and layer not in adapter.base.weights]
    wrong = adapter.halves() + adapter.wrong_widths()
    if wrong := wrong + [f"the base model has no layer {layer}" for layer in unknown]:
        yield refused(wrong, _SAVE_AGAIN)


# ---- SGLang ----


def _sglang(adapter: AdapterHeader, other_files: list[str]) -> Iterator[Finding]:
    if absent := _absent(adapter, "peft_type", "r", "lora_alpha", "target_modules"):
        missing = [f"the key {key} is missing" for key in absent]
        yield _finding("SGLang", WILL_NOT_LOAD, missing, _CORRECT)
        return
    yield from _sglang_features(adapter)
    yield from _sglang_layers(adapter)
    yield from _sglang_tensors(adapter, other_files)


def _sglang_features(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, wrongly = partial(_finding, "SGLang", WILL_NOT_LOAD), partial(_finding, "SGLang", LOADS_WRONGLY)
    get, chosen = adapter.get, adapter.get("target_modules")
    if get("peft_type").lower() != "lora":
        yield refused(f"peft_type is {shown(get('peft_type'))}, not 'LORA'", _CORRECT)
    if isinstance(chosen, str) and chosen not in ("all", "all-linear"):
        mend = f"{_CORRECT}: list the names of layers"
        yield refused(f"target_modules {shown(chosen)} is a regular expression", mend)
    if get("use_dora"):
        yield refused("use_dora = True is not supported")
    if get("use_rslora") and get("r") > 1:
        yield wrongly("use_rslora is ignored: scaled by alpha / r, not alpha / sqrt(r)", _EXPORT)
    if any(alpha != get("lora_alpha") for alpha in (get("alpha_pattern") or {}).values()):
        yield wrongly("alpha_pattern is ignored: every layer is scaled by lora_alpha / r")
    if changed := _changed_base(adapter):
        yield wrongly(changed, _CONVERT)


def _sglang_layers(adapter: AdapterHeader) -> Iterator[Finding]:
    refused = partial(_finding, "SGLang", WILL_NOT_LOAD)
    ranks, r = {layer: adapter.ranks[layer] for layer in adapter.layers}, adapter.get("r")
    if other := [f"{layer} has rank {rank}, not r = {r}" for layer, rank in ranks.items() if rank != r]:
        yield refused(other)
    if wrong := adapter.wrong_ranks() + adapter.wrong_widths() + adapter.halves():
        yield refused(wrong, _SAVE_AGAIN)
    alone = set()  # SGLang fuses q, k, v into one layer, and gate, up into another
    for layer in adapter.layers:
        block, _, leaf = layer.rpartition(".")
        if leaf in _SGLANG_NEEDS and f"{block}.{_SGLANG_NEEDS[leaf]}" not in adapter.layers:
            alone.add(f"{leaf} is adapted without {_SGLANG_NEEDS[leaf]}")
    if alone:
        yield refused(sorted(alone), _ADAPT_TOGETHER)


def _sglang_tensors(adapter: AdapterHeader, other_files: list[str]) -> Iterator[Finding]:
    refused, wrongly = partial(_finding, "SGLang", WILL_NOT_LOAD), partial(_finding, "SGLang", LOADS_WRONGLY)
    if unread := _foreign_parts(adapter) + [name for name in adapter.others if ".layers." in name]:
        yield refused([f"{name} is no LoRA tensor" for name in unread])
    if ignored := [name for name in adapter.others if ".layers." not in name]:
        yield wrongly([f"{name} is ignored" for name in ignored])
    if other_files:
        yield refused([f"{name} is read too" for name in other_files], "move other *.safetensors elsewhere")
