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
    other *.safetensors    not read          not read            read as if they belonged to the adapter

Only the header of the weights is read. With the configuration of the base model, names and shapes are
compared with its layers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from minilora.config import ModelConfig
from minilora.formats.adapter_header import AdapterHeader, UnreadableAdapter
from minilora.formats.peft_format import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    KNOWN_INITS,
    MAGNITUDE,
    PARTNERS,
    PEFT_DEFAULTS,
    changes_base,
)
from minilora.system.errors import UserError, summarize

SERVERS = ("PEFT", "vLLM", "SGLang")
WILL_NOT_LOAD, LOADS_WRONGLY, NEEDS_OPTION = "will not load", "loads wrongly", "loads, if"

_EXPORT = "python scripts/merge.py --adapter DIRECTORY --export_adapter NEW"
_MERGE = "python scripts/merge.py --adapter DIRECTORY --output NEW"
_SAVE_AGAIN = "save or fetch the adapter again"
_CORRECT = f"correct {ADAPTER_CONFIG_FILE}"
_CONVERT = "convert it to plain LoRA, with PEFT's path_initial_model_for_weight_conversion"
_ADAPT_TOGETHER = "adapt q_proj, k_proj, v_proj together, gate_proj with up_proj; or merge it"

_SAVED_EMBEDDINGS = re.compile(r".*\.(embed_tokens|lm_head)(\.base_layer)?\.weight")
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
    verdict: str  # WILL_NOT_LOAD | LOADS_WRONGLY | NEEDS_OPTION
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
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    other_files = [name for name in files if name != ADAPTER_WEIGHTS_FILE]
    findings = [*_peft(adapter), *_vllm(adapter), *_sglang(adapter, other_files)]
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
            lines.append(f"{server:8}{finding.verdict:15}{finding.why}")
            lines += [f"{'':23}-> {finding.mend}"] if finding.mend else []
    return "\n".join(lines)


def _finding(server: str, verdict: str, problems: list[str] | str, mend: str = _MERGE) -> Finding:
    return Finding(server, verdict, problems if isinstance(problems, str) else summarize(problems, 2), mend)


def _absent(adapter: AdapterHeader, *keys: str) -> list[str]:
    return [key for key in keys if adapter.config.get(key) is None]


def _changed_base(adapter: AdapterHeader) -> str | None:
    """A sentence if the adapter's initialisation changed the base model, which a server does not repeat."""
    init = adapter.get("init_lora_weights")
    if isinstance(init, str) and changes_base(init):
        return f"init_lora_weights = {init!r} changed the base model"
    return None


def _foreign_parts(adapter: AdapterHeader) -> list[str]:
    """Names of the tensors of an update that are neither A nor B: DoRA's magnitudes."""
    return [f"{layer}.{part}" for layer, part, _ in adapter.tensors() if part not in PARTNERS]


# ---- PEFT ----


def _peft(adapter: AdapterHeader) -> Iterator[Finding]:
    targets = adapter.targets()  # None: unknown
    yield from _peft_refusals(adapter, targets)
    yield from _peft_ignored_keys(adapter)
    yield from _peft_ignored_tensors(adapter, targets)


def _peft_refusals(adapter: AdapterHeader, targets: list[str] | None) -> Iterator[Finding]:
    refused, get = partial(_finding, "PEFT", WILL_NOT_LOAD), adapter.get
    if (peft_type := adapter.config.get("peft_type")) != "LORA":
        yield refused(f"peft_type is {peft_type!r}, not 'LORA'", _CORRECT)
    if isinstance(init := get("init_lora_weights"), str) and not KNOWN_INITS.fullmatch(init):
        yield refused(f"init_lora_weights = {init!r} is not known", _CORRECT)
    if targets == []:
        yield refused(f"target_modules {get('target_modules')!r} names no layer of the base model", _CORRECT)
    if wrong := adapter.wrong_ranks() + adapter.wrong_widths():
        yield refused(wrong, _SAVE_AGAIN)


def _peft_ignored_keys(adapter: AdapterHeader) -> Iterator[Finding]:
    wrongly = partial(_finding, "PEFT", LOADS_WRONGLY)
    unknown = {key: value for key, value in adapter.config.items() if value and key not in PEFT_DEFAULTS}
    if unknown:
        yield wrongly([f"{k} = {v!r} is not known, and ignored" for k, v in unknown.items()], _CORRECT)
    if absent := _absent(adapter, "r", "lora_alpha", "target_modules"):
        yield wrongly([f"{key} is missing, and PEFT takes its default" for key in absent], _CORRECT)


def _peft_ignored_tensors(adapter: AdapterHeader, targets: list[str] | None) -> Iterator[Finding]:
    wrongly, use_dora = partial(_finding, "PEFT", LOADS_WRONGLY), adapter.get("use_dora")
    untrained = adapter.halves()
    untrained += [f"{layer} has no tensors" for layer in targets or [] if layer not in adapter.layers]
    if use_dora:
        lengthless = [layer for layer, parts in adapter.layers.items() if MAGNITUDE not in parts]
        untrained += [f"{layer}.{MAGNITUDE} is missing" for layer in lengthless]
    if untrained:
        yield wrongly([f"{problem}: left untrained" for problem in untrained], _SAVE_AGAIN)
    parts = [(layer, part) for layer, part, _ in adapter.tensors()]
    ignored = [f"{layer}.{part}" for layer, part in parts if targets is not None and layer not in targets]
    ignored += [f"{layer}.{part}" for layer, part in parts if part == MAGNITUDE and not use_dora]
    ignored += [name for name in adapter.others if not _peft_reads(adapter, name)]
    if ignored:
        yield wrongly([f"{name} is not expected, and ignored" for name in ignored], _SAVE_AGAIN)


def _peft_reads(adapter: AdapterHeader, name: str) -> bool:
    """Whether PEFT reads such a tensor: a trained copy of a module, a bias, or a resized embedding."""
    endings = [f".{module}.weight" for module in adapter.get("modules_to_save") or []]
    if adapter.get("bias") != "none":
        endings.append(".bias")
    if adapter.get("lora_bias"):
        endings.append(".lora_B.bias")
    return name.endswith(tuple(endings)) or bool(_SAVED_EMBEDDINGS.fullmatch(name))


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
            yield refused(f"{key} = {get(key)!r} is not supported")
    if get("bias") != "none":
        yield refused(f"bias = {get('bias')!r} is not supported, only 'none'")
    if copies := [name for name in get("modules_to_save") or [] if name not in ("classifier", "score")]:
        yield refused(f"modules_to_save = {copies!r} is not supported")
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
        if not (_SAVED_EMBEDDINGS.fullmatch(name) and ".base_layer." in name):
            unread.append(name)
    if unread:
        yield refused([f"{name} is no LoRA tensor" for name in unread])
    unknown = [layer for layer in adapter.layers if adapter.base and layer not in adapter.base]
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
    get, targets = adapter.get, adapter.get("target_modules")
    if get("peft_type").lower() != "lora":
        yield refused(f"peft_type is {get('peft_type')!r}, not 'LORA'", _CORRECT)
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        mend = f"{_CORRECT}: list the names of layers"
        yield refused(f"target_modules {targets!r} is a regular expression", mend)
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
    ranks, r = {layer: adapter.rank(layer) for layer in adapter.layers}, adapter.get("r")
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
