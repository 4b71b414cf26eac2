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

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from minilora.adapted import base_layers
from minilora.config import ModelConfig
from minilora.formats.adapter_checks import (
    MISSING,
    MISSING_COPY,
    UNEXPECTED,
    UNFIT,
    WRONG_RANK,
    is_name,
)
from minilora.formats.adapter_file import OWN_WEIGHTS
from minilora.formats.adapter_header import AdapterHeader
from minilora.formats.export import is_exportable
from minilora.formats.peft_format import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    BASE_WEIGHT,
    PARTNERS,
    PEFT_DEFAULTS,
    PREFIX,
    changes_base,
    split_any_key,
    tensor_key,
)
from minilora.formats.peft_rules import refused_values, starts_elsewhere, unjudged
from minilora.system.errors import UserError, summarize
from minilora.system.schema import shown, shown_name
from minilora.system.terminal import printable
from minilora.targets import EMBEDDING, OUTPUT_HEAD, chosen_targets

SERVERS = ("PEFT", "vLLM", "SGLang")
WILL_NOT_LOAD, LOADS_WRONGLY, NEEDS_OPTION = "will not load", "loads wrongly", "loads, if"
CANNOT_TELL = "cannot tell"  # The adapter asks for something that only the server itself can judge.

_EXPORT = "python scripts/merge.py --adapter DIRECTORY --export_adapter NEW"
_MERGE = "python scripts/merge.py --adapter DIRECTORY --output NEW"
_UNMERGED = "use it unmerged, in PEFT or with scripts/chat.py"
_SAVE_AGAIN = "save or fetch the adapter again"
_TRAIN_AGAIN = "the file is damaged or its training diverged: take an earlier checkpoint"
_CORRECT = f"correct {ADAPTER_CONFIG_FILE}"
_CONVERT = "convert it to plain LoRA, with PEFT's path_initial_model_for_weight_conversion"
_TRY_IT = "load it in PEFT, and compare its answers with those of training"
_RESIZE = "call resize_token_embeddings on the base model first, with the adapter's number of tokens"

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
_LEAVES = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj embed_tokens lm_head".split()
_LAYER = re.compile(r"\blayers\.(\d+)\.")  # all that SGLang reads of a name, beside the leaf
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
    Raises UserError for a directory that is no adapter at all.
    """
    directory = Path(directory)
    if not (directory / ADAPTER_CONFIG_FILE).is_file():
        raise UserError(f"{directory} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
    try:
        adapter = AdapterHeader.read(directory, base_config)
    except UserError as problem:
        return [Finding(server, WILL_NOT_LOAD, str(problem), _SAVE_AGAIN) for server in SERVERS]
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    other_files = [name for name in files if name != ADAPTER_WEIGHTS_FILE]
    findings = [*_peft(adapter), *_vllm(adapter), *_sglang(adapter, other_files)]
    if wrong := adapter.wrong_numbers():
        findings += [_finding(server, LOADS_WRONGLY, wrong, _TRAIN_AGAIN) for server in SERVERS]
    return [replace(finding, mend=_remedy(adapter, finding.mend)) for finding in findings]


def _remedy(adapter: AdapterHeader, mend: str) -> str:
    """The remedy for this adapter. Nobody is sent to a command that refuses it."""
    if mend == _EXPORT and not (adapter.is_taken_here and is_exportable(adapter.file)):
        mend = _MERGE
    if mend == _MERGE and not adapter.can_be_merged:
        return _UNMERGED if adapter.is_taken_here else ""
    if mend == _MERGE and not adapter.get("base_model_name_or_path"):
        mend += " --model BASE"
    return mend.replace("DIRECTORY", str(adapter.file.directory))


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


def _halves(adapter: AdapterHeader) -> list[str]:
    """One sentence for each A without its B, and each B without its A."""
    there = adapter.file.modules
    alone = [p for p in adapter.of_kind(MISSING) if p.part in PARTNERS and p.module in there]
    return [f"{p.key} is missing" for p in alone if PARTNERS[p.part] in there[p.module]]


def _other_vocabulary(adapter: AdapterHeader) -> list[str]:
    """Keys of embeddings and heads in the file that have more or fewer rows than the base model's."""
    found = []
    for module in (EMBEDDING, OUTPUT_HEAD) if adapter.base else ():
        rows = adapter.base.get_submodule(module).weight.shape[0]
        for part, tensor in adapter.file.modules.get(module, {}).items():
            if part in OWN_WEIGHTS and tensor.dim() == 2 and len(tensor) != rows:
                found.append(
                    f"{tensor_key(module, part)} has {len(tensor)} rows, and the base model's {rows}"
                )
    return found


def _served(adapter: AdapterHeader) -> Iterator[tuple[str, str, str]]:
    """(key, module, part) of every tensor, as the servers read it: PEFT's prefix may be absent."""
    for key in adapter.sizes:
        yield key, *(split_any_key(key) or split_any_key(PREFIX + key) or ("", ""))


# ---- PEFT ----


def _peft(adapter: AdapterHeader) -> Iterator[Finding]:
    refused = partial(_finding, "PEFT", WILL_NOT_LOAD)
    if (peft_type := adapter.config.get("peft_type")) != "LORA":
        yield refused(f"peft_type is {shown(peft_type)}, not 'LORA'", _CORRECT)
    elif wrong := refused_values(adapter.config):
        yield refused(wrong, _CORRECT)
    else:
        if unknown := _unjudged(adapter):
            yield _finding("PEFT", CANNOT_TELL, unknown, _TRY_IT)
        else:
            yield from _peft_layers(adapter)
            yield from _peft_tensors(adapter)
        yield from _peft_ignored_keys(adapter)


def _unjudged(adapter: AdapterHeader) -> list[str]:
    unknown = [f"{key} = {shown(adapter.get(key))} is not judged here" for key in unjudged(adapter.config)]
    has_bias = any(key.endswith(".bias") for key in adapter.sizes)
    if adapter.base is None and (bias := adapter.get("bias")) != "none" and not has_bias:
        unknown.append(f"bias = {shown(bias)}, but no bias in the file: does the base model have biases?")
    return unknown


def _peft_layers(adapter: AdapterHeader) -> Iterator[Finding]:
    refused = partial(_finding, "PEFT", WILL_NOT_LOAD)
    names, weights = _modules_of(adapter)
    chosen = chosen_targets(names, adapter.file.config, [n for n in weights if n != EMBEDDING])
    if names and not chosen:
        whose = "of the base model" if adapter.base else "that the file adapts"
        yield refused(
            f"target_modules {shown(adapter.get('target_modules'))} names no layer {whose}", _CORRECT
        )
    if wrong := [name for name in chosen if name not in weights]:
        problems = [
            f"target_modules chooses {name}, which is no linear layer and no embedding" for name in wrong
        ]
        yield refused(problems, _CORRECT)
    if init := starts_elsewhere(adapter.get("init_lora_weights")):
        yield _finding("PEFT", LOADS_WRONGLY, f"init_lora_weights = {init}", _CONVERT)


def _modules_of(adapter: AdapterHeader) -> tuple[list[str], list[str]]:
    """The names that target_modules is matched with in PEFT, and those of them that can have an update."""
    if adapter.base is None:
        return adapter.file.layers, adapter.file.layers
    layers = {name: module for name, module in base_layers(adapter.base).items() if name}
    weights = [n for n, m in layers.items() if isinstance(m, (nn.Linear, nn.Embedding))]
    without_weights = ["model.rotary_emb", *(f"{name}.act_fn" for name in layers if name.endswith(".mlp"))]
    return [*layers, *without_weights], weights


def _peft_tensors(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, wrongly = (partial(_finding, "PEFT", verdict) for verdict in (WILL_NOT_LOAD, LOADS_WRONGLY))
    if wrong := adapter.of_kind(UNFIT, WRONG_RANK, MISSING_COPY):
        yield refused(list(map(str, wrong)), _SAVE_AGAIN)
    if grown := _other_vocabulary(adapter):
        yield refused(grown, _RESIZE)
    untrained = [f"{problem.key} is missing" for problem in adapter.of_kind(MISSING)]
    if not adapter.file.layers:
        untrained.append("the file holds no A and no B")
    if untrained:
        yield wrongly([f"{problem}: left untrained" for problem in untrained], _SAVE_AGAIN)
    if strange := adapter.of_kind(UNEXPECTED):
        yield wrongly([str(p) if p.why else f"{p.key} is not expected" for p in strange], _SAVE_AGAIN)


def _peft_ignored_keys(adapter: AdapterHeader) -> Iterator[Finding]:
    wrongly = partial(_finding, "PEFT", LOADS_WRONGLY)
    known = {*PEFT_DEFAULTS, "runtime_config"}
    unknown = {key: value for key, value in adapter.config.items() if value and key not in known}
    if unknown:
        yield wrongly([f"{k} = {shown(v)} is not known, and ignored" for k, v in unknown.items()], _CORRECT)
    if absent := _absent(adapter, "r", "lora_alpha", "target_modules"):
        yield wrongly([f"{key} is missing, and PEFT takes its default" for key in absent], _CORRECT)


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
    if wrong := list(map(str, adapter.of_kind(WRONG_RANK))):
        yield Finding("vLLM", LOADS_WRONGLY, f"{summarize(wrong, 2)}: scaled by another rank", _CORRECT)


def _vllm_tensors(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, wrongly = (partial(_finding, "vLLM", verdict) for verdict in (WILL_NOT_LOAD, LOADS_WRONGLY))
    unread, ignored = [], []
    for key, module, part in _served(adapter):
        is_base = part == BASE_WEIGHT and module in (EMBEDDING, OUTPUT_HEAD)
        if part in PARTNERS and key.endswith(f"{module}.{part}"):
            ignored += [key] if _is_no_layer(adapter, module) else []
        elif not is_base:
            unread.append(key)
    if unread:
        yield refused([f"{shown_name(key)} is no LoRA tensor" for key in unread])
    misfits = [str(p) for p in adapter.of_kind(UNFIT) if p.part in PARTNERS]
    if wrong := _halves(adapter) + misfits + _other_vocabulary(adapter):
        yield refused(wrong, _SAVE_AGAIN)
    if foreign := [key for key in ignored if key.split(".lora_")[0].rpartition(".")[2] not in _LEAVES]:
        yield refused([f"the base model has no layer {shown_name(key)}" for key in foreign], _SAVE_AGAIN)
    elif ignored:
        yield wrongly(
            [f"{shown_name(key)} is of no layer of the model, and ignored" for key in ignored], _SAVE_AGAIN
        )
    if not adapter.sizes:
        yield wrongly("the file holds no tensors: nothing is applied", _SAVE_AGAIN)


def _is_no_layer(adapter: AdapterHeader, module: str) -> bool:
    if adapter.base is None:
        return not is_name(module)
    return module not in _modules_of(adapter)[1]


# ---- SGLang ----


def _sglang(adapter: AdapterHeader, other_files: list[str]) -> Iterator[Finding]:
    if absent := _absent(adapter, "peft_type", "r", "lora_alpha", "target_modules"):
        missing = [f"the key {key} is missing" for key in absent]
        yield _finding("SGLang", WILL_NOT_LOAD, missing, _CORRECT)
        return
    yield from _sglang_features(adapter)
    yield from _sglang_layers(adapter)
    yield from _sglang_tensors(adapter)
    if other_files:
        why = [f"{name} is read too" for name in other_files]
        yield _finding("SGLang", WILL_NOT_LOAD, why, "move other *.safetensors elsewhere")


def _sglang_features(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, wrongly = (partial(_finding, "SGLang", verdict) for verdict in (WILL_NOT_LOAD, LOADS_WRONGLY))
    get, chosen = adapter.get, adapter.get("target_modules")
    if get("peft_type").lower() != "lora":
        yield refused(f"peft_type is {shown(get('peft_type'))}, not 'LORA'", _CORRECT)
    if isinstance(chosen, str) and chosen not in ("all", "all-linear"):
        yield refused(f"target_modules {shown(chosen)} is a regular expression", _EXPORT)
    if get("use_dora"):
        yield refused("use_dora = True is not supported")
    if get("use_rslora") and get("r") > 1:
        yield wrongly("use_rslora is ignored: scaled by alpha / r, not alpha / sqrt(r)", _EXPORT)
    if any(alpha != get("lora_alpha") for _, alpha in adapter.ranks_and_alphas.values()):
        yield wrongly("alpha_pattern is ignored: every layer is scaled by lora_alpha / r", _EXPORT)
    if changed := _changed_base(adapter):
        yield wrongly(changed, _CONVERT)


def _sglang_layers(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, r = partial(_finding, "SGLang", WILL_NOT_LOAD), adapter.get("r")
    ranks = {layer: rank for layer, (rank, _) in adapter.ranks_and_alphas.items()}
    if other := [f"{layer} has rank {rank}, not r = {r}" for layer, rank in ranks.items() if rank != r]:
        yield refused(other, _EXPORT)
    misfits = [str(p) for p in adapter.of_kind(WRONG_RANK, UNFIT) if p.part in PARTNERS]
    if wrong := misfits + _halves(adapter):
        yield refused(wrong, _SAVE_AGAIN)
    layers = {module for _, module, part in _served(adapter) if part in PARTNERS}
    alone = set()  # SGLang fuses q, k, v into one layer, and gate, up into another
    for layer in layers:
        block, _, leaf = layer.rpartition(".")
        if leaf in _SGLANG_NEEDS and f"{block}.{_SGLANG_NEEDS[leaf]}" not in layers:
            alone.add(f"{leaf} is adapted without {_SGLANG_NEEDS[leaf]}")
    if alone:
        yield refused(sorted(alone))


def _sglang_tensors(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, wrongly = (partial(_finding, "SGLang", verdict) for verdict in (WILL_NOT_LOAD, LOADS_WRONGLY))
    unread, ignored = [], []
    for key, module, part in _served(adapter):
        layer, leaf = _LAYER.search(key), module.rpartition(".")[2]
        if layer is not None:
            is_there = adapter.base is None or int(layer[1]) < adapter.base.config.num_hidden_layers
            unread += [] if part in PARTNERS and leaf in _LEAVES and is_there else [key]
        elif not (part == BASE_WEIGHT or (part in PARTNERS and _sglang_targets(adapter, leaf))):
            ignored.append(key)
    if unread:
        yield refused([f"{shown_name(key)} is no LoRA tensor" for key in unread])
    if ignored := [f"{shown_name(key)} is ignored" for key in ignored] + _other_vocabulary(adapter):
        yield wrongly(ignored)
    if not adapter.sizes:
        yield wrongly("the file holds no tensors: nothing is applied", _SAVE_AGAIN)


def _sglang_targets(adapter: AdapterHeader, leaf: str) -> bool:
    """Whether target_modules names an embedding or head, which SGLang passes over otherwise."""
    chosen = adapter.get("target_modules")
    names = [chosen] if isinstance(chosen, str) else [name.rpartition(".")[2] for name in chosen]
    return leaf in names or chosen in ("all", "all-linear")
