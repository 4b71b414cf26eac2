"""Will an adapter load, and where: the rules of PEFT 0.21, vLLM 0.33 and SGLang 0.5.23, checked without any
of them.

A directory that one program loads need not load in another, and the worst do load and are wrong without a
word:

                              PEFT               vLLM                  SGLang
    rsLoRA                    alpha / sqrt(r)    alpha / sqrt(r)       alpha / r: wrong by a factor of sqrt(r)
    DoRA                      yes                refused               refused
    ranks                     all alike or not   to --max-lora-rank    all alike
    alphas by layer           yes                yes                   ignored
    targets                   names or regex     as the tensors say    names; q needs v, k and v need q, up needs gate
    trained biases, copies    yes                refused               refused or left out
    PiSSA, LoftQ, ...         yes                refused               loaded without their change of the base model
    missing tensors           stay untrained     refused               refused
    other *.safetensors       not read           not read              read as if they were of the adapter

Only the header of the weights is read. With the configuration of the base model, names and shapes are
compared with its layers.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from minilora.config import ModelConfig
from minilora.formats.adapter import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, PEFT_DEFAULTS
from minilora.formats.adapter_header import MAGNITUDE, PARTNERS, AdapterHeader, UnreadableAdapter
from minilora.system.errors import UserError, summarize

SERVERS = ("PEFT", "vLLM", "SGLang")
WILL_NOT_LOAD, LOADS_WRONGLY, NEEDS_OPTION = "will not load", "loads wrongly", "loads, if"

_EXPORT = "python scripts/merge.py --adapter DIRECTORY --export_adapter NEW"
_MERGE = "python scripts/merge.py --adapter DIRECTORY --output NEW"
_SAVE_AGAIN = "save or fetch the adapter again"
_CORRECT = f"correct {ADAPTER_CONFIG_FILE}"
_CONVERT = "convert it to plain LoRA, with PEFT's path_initial_model_for_weight_conversion"

_PEFT_INITS = re.compile(r"(?i:gaussian|olora|mica)|eva|orthogonal|lora_ga|loftq|corda|pissa(_niter_\d+)?")
_HARMLESS_INITS = (
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
    "lora_ga",
)  # the others change the base model's weights
_SAVED_EMBEDDINGS = re.compile(r".*\.(embed_tokens|lm_head)(\.base_layer)?\.weight")
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the choices of --max-lora-rank
_VLLM_DEFAULT_RANK = 16
_SGLANG_NEEDS = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Finding:
    """Why a server does not load an adapter as it was trained, and what helps."""

    server: str  # one of SERVERS
    verdict: str  # WILL_NOT_LOAD | LOADS_WRONGLY | NEEDS_OPTION
    why: str
    mend: str = ""


def lint_adapter(directory: str | Path, base_config: ModelConfig | None = None) -> list[Finding]:
    """What keeps each server from loading an adapter directory as it was trained. A server without a finding
    loads it.

    base_config: of the base model, to compare names and shapes with. Raises UserError for a directory that is
    no adapter at all, and for pickled weights.
    """
    directory = Path(directory)
    if not (directory / ADAPTER_CONFIG_FILE).is_file():
        raise UserError(f"{directory} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
    try:
        adapter = AdapterHeader.read(directory, base_config)
    except UnreadableAdapter as problem:
        return [Finding(server, WILL_NOT_LOAD, str(problem), _SAVE_AGAIN) for server in SERVERS]
    other_files = sorted(
        path.name for path in directory.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS_FILE
    )
    findings = [*_peft(adapter), *_vllm(adapter), *_sglang(adapter, other_files)]
    return [replace(finding, mend=finding.mend.replace("DIRECTORY", str(directory))) for finding in findings]


def _finding(server: str, verdict: str, problems: list[str] | str, mend: str = _MERGE) -> Finding:
    return Finding(server, verdict, problems if isinstance(problems, str) else summarize(problems, 2), mend)


def loads(findings: list[Finding]) -> bool:
    """Whether every server loads the adapter as it was trained, some perhaps with an option."""
    return all(finding.verdict == NEEDS_OPTION for finding in findings)


def table(findings: list[Finding]) -> str:
    """The findings for a terminal: a line each with its mend below, and one line for a server without any."""
    lines = []
    for server in SERVERS:
        mine = [finding for finding in findings if finding.server == server]
        lines += [] if mine else [f"{server:8}loads"]
        for finding in mine:
            lines.append(f"{server:8}{finding.verdict:15}{finding.why}")
            lines += [f"{'':23}-> {finding.mend}"] if finding.mend else []
    return "\n".join(lines)


def _peft(adapter: AdapterHeader) -> Iterator[Finding]:
    finding, get, targets = partial(_finding, "PEFT"), adapter.get, adapter.targets()
    if adapter.config.get("peft_type") != "LORA":
        yield finding(
            WILL_NOT_LOAD, f"peft_type is {adapter.config.get('peft_type')!r}, not 'LORA'", _CORRECT
        )
    if isinstance(init := get("init_lora_weights"), str) and not _PEFT_INITS.fullmatch(init):
        yield finding(WILL_NOT_LOAD, f"init_lora_weights = {init!r} is not known", _CORRECT)
    if targets == []:
        yield finding(
            WILL_NOT_LOAD,
            f"target_modules {get('target_modules')!r} names no layer of the base model",
            _CORRECT,
        )
    if wrong := adapter.wrong_ranks() + adapter.wrong_widths():
        yield finding(WILL_NOT_LOAD, wrong, _SAVE_AGAIN)
    if unknown := [
        f"{key} = {value!r}" for key, value in adapter.config.items() if value and key not in PEFT_DEFAULTS
    ]:
        yield finding(LOADS_WRONGLY, [f"{key} is not known, and ignored" for key in unknown], _CORRECT)
    if absent := [key for key in ("r", "lora_alpha", "target_modules") if adapter.config.get(key) is None]:
        yield finding(LOADS_WRONGLY, [f"{key} is missing, and a default taken" for key in absent], _CORRECT)
    untrained = adapter.halves() + [
        f"{layer} has no tensors" for layer in targets or [] if layer not in adapter.layers
    ]
    if get("use_dora"):
        untrained += [
            f"{layer}.{MAGNITUDE} is missing"
            for layer, parts in adapter.layers.items()
            if MAGNITUDE not in parts
        ]
    if untrained:
        yield finding(LOADS_WRONGLY, [f"{problem}: left untrained" for problem in untrained], _SAVE_AGAIN)
    ignored = [
        f"{layer}.{part}"
        for layer, part, _ in adapter.tensors()
        if targets is not None and layer not in targets
    ]
    ignored += [
        f"{layer}.{part}" for layer, part, _ in adapter.tensors() if part == MAGNITUDE and not get("use_dora")
    ]
    ignored += [name for name in adapter.others if not _peft_reads(adapter, name)]
    if ignored:
        yield finding(
            LOADS_WRONGLY, [f"{name} is not expected, and ignored" for name in ignored], _SAVE_AGAIN
        )


def _peft_reads(adapter: AdapterHeader, name: str) -> bool:
    """Whether PEFT has a use for a tensor that is no factor: a trained copy of a module, a bias, a resized
    embedding.
    """
    copies = tuple(f".{module}.weight" for module in adapter.get("modules_to_save") or [])
    biases = (".bias",) * (adapter.get("bias") != "none") + (".lora_B.bias",) * bool(adapter.get("lora_bias"))
    return name.endswith(copies + biases) or bool(_SAVED_EMBEDDINGS.fullmatch(name))


def _vllm(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, get = partial(_finding, "vLLM", WILL_NOT_LOAD), adapter.get
    if absent := [key for key in ("r", "lora_alpha", "target_modules") if adapter.config.get(key) is None]:
        yield refused([f"the key {key} is missing" for key in absent], _CORRECT)
        return
    for key in (
        "use_dora",
        "lora_bias",
        "alora_invocation_tokens",
        "layer_replication",
        "use_bdlora",
        "use_qalora",
    ):
        if get(key):
            yield refused(f"{key} = {get(key)!r} is not supported")
    if get("bias") != "none":
        yield refused(f"bias = {get('bias')!r} is not supported, only 'none'")
    if copies := [name for name in get("modules_to_save") or [] if name not in ("classifier", "score")]:
        yield refused(f"modules_to_save = {copies!r} is not supported")
    if isinstance(init := get("init_lora_weights"), str) and init.lower() not in _HARMLESS_INITS:
        yield refused(f"init_lora_weights = {init!r} changed the base model", _CONVERT)
    if (rank := max([get("r"), *(get("rank_pattern") or {}).values()])) > _VLLM_RANKS[-1]:
        yield refused(f"rank {rank} is above {_VLLM_RANKS[-1]}, the largest --max-lora-rank")
    elif rank > _VLLM_DEFAULT_RANK:
        choice = min(r for r in _VLLM_RANKS if r >= rank)
        yield Finding("vLLM", NEEDS_OPTION, f"started with --max-lora-rank {choice}: the rank is {rank}")
    unread = [f"{layer}.{part}" for layer, part, _ in adapter.tensors() if part not in PARTNERS]
    unread += [
        name for name in adapter.others if not (_SAVED_EMBEDDINGS.fullmatch(name) and ".base_layer." in name)
    ]
    if unread:
        yield refused([f"{name} is no LoRA tensor" for name in unread])
    unknown = [
        f"the base model has no layer {layer}"
        for layer in adapter.layers
        if adapter.base and layer not in adapter.base
    ]
    if wrong := adapter.halves() + adapter.wrong_widths() + unknown:
        yield refused(wrong, _SAVE_AGAIN)
    if wrong := adapter.wrong_ranks():
        yield Finding("vLLM", LOADS_WRONGLY, f"{summarize(wrong, 2)}: scaled by another rank", _CORRECT)


def _sglang(adapter: AdapterHeader, other_files: list[str]) -> Iterator[Finding]:
    finding, get = partial(_finding, "SGLang"), adapter.get
    if absent := [
        key for key in ("peft_type", "r", "lora_alpha", "target_modules") if adapter.config.get(key) is None
    ]:
        yield finding(WILL_NOT_LOAD, [f"the key {key} is missing" for key in absent], _CORRECT)
        return
    if get("peft_type").lower() != "lora":
        yield finding(WILL_NOT_LOAD, f"peft_type is {get('peft_type')!r}, not 'LORA'", _CORRECT)
    if isinstance(targets := get("target_modules"), str) and targets not in ("all", "all-linear"):
        yield finding(
            WILL_NOT_LOAD,
            f"target_modules {targets!r} is a regular expression",
            f"{_CORRECT}: list the names of layers",
        )
    if get("use_dora"):
        yield finding(WILL_NOT_LOAD, "use_dora = True is not supported")
    if get("use_rslora") and get("r") > 1:
        yield finding(
            LOADS_WRONGLY, "use_rslora is ignored: scaled by alpha / r, not alpha / sqrt(r)", _EXPORT
        )
    if any(alpha != get("lora_alpha") for alpha in (get("alpha_pattern") or {}).values()):
        yield finding(LOADS_WRONGLY, "alpha_pattern is ignored: every layer is scaled by lora_alpha / r")
    if isinstance(init := get("init_lora_weights"), str) and init.lower() not in _HARMLESS_INITS:
        yield finding(LOADS_WRONGLY, f"init_lora_weights = {init!r} changed the base model", _CONVERT)
    if other := [layer for layer in adapter.layers if adapter.rank(layer) != get("r")]:
        yield finding(
            WILL_NOT_LOAD, [f"{layer} has rank {adapter.rank(layer)}, not r = {get('r')}" for layer in other]
        )
    if wrong := adapter.wrong_ranks() + adapter.wrong_widths() + adapter.halves():
        yield finding(WILL_NOT_LOAD, wrong, _SAVE_AGAIN)
    alone = set()  # q, k, v are one layer there, and gate, up another
    for layer in adapter.layers:
        block, _, leaf = layer.rpartition(".")
        if leaf in _SGLANG_NEEDS and f"{block}.{_SGLANG_NEEDS[leaf]}" not in adapter.layers:
            alone.add(f"{leaf} is adapted without {_SGLANG_NEEDS[leaf]}")
    if alone:
        yield finding(
            WILL_NOT_LOAD,
            sorted(alone),
            "adapt q_proj, k_proj, v_proj together, gate_proj with up_proj; or merge it",
        )
    unread = [f"{layer}.{part}" for layer, part, _ in adapter.tensors() if part not in PARTNERS]
    if unread := unread + [name for name in adapter.others if ".layers." in name]:
        yield finding(WILL_NOT_LOAD, [f"{name} is no LoRA tensor" for name in unread])
    if ignored := [name for name in adapter.others if ".layers." not in name]:
        yield finding(LOADS_WRONGLY, [f"{name} is ignored" for name in ignored])
    if other_files:
        yield finding(
            WILL_NOT_LOAD,
            [f"{name} is read too" for name in other_files],
            "move other *.safetensors elsewhere",
        )
