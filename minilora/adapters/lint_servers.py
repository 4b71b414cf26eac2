"""The verdicts of vLLM 0.33 and SGLang 0.5.23 on an adapter, from the rules in their code.

vLLM finds a layer by its full name. It refuses a key that ends in no layer's name, and passes over one that
begins otherwise. SGLang finds a layer by its number and its leaf name, whatever stands around them.
"""

import re
from collections.abc import Iterator
from functools import partial

from minilora.adapters.checks import MISSING, UNFIT, WRONG_RANK, is_name
from minilora.adapters.findings import (
    CONVERT,
    CORRECT,
    EXPORT,
    LOADS_WRONGLY,
    NEEDS_OPTION,
    SAVE_AGAIN,
    WILL_NOT_LOAD,
    Finding,
    found,
)
from minilora.adapters.header import AdapterHeader
from minilora.adapters.peft_format import (
    BASE_WEIGHT,
    PARTNERS,
    PREFIX,
    changes_base,
    split_key,
)
from minilora.system.errors import summarize
from minilora.system.schema import shown, shown_name
from minilora.targets import EMBEDDING, OUTPUT_HEAD

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


def _served(adapter: AdapterHeader) -> Iterator[tuple[str, str, str]]:
    """(key, module, part) of every tensor, as the servers read it: PEFT's prefix may be absent."""
    for key in adapter.sizes:
        yield key, *(split_key(key) or split_key(PREFIX + key) or ("", ""))


# ---- vLLM ----


def verdicts_of_vllm(adapter: AdapterHeader) -> Iterator[Finding]:
    """Yield the reasons why vLLM does not load an adapter as it was trained."""
    if absent := adapter.absent("r", "lora_alpha", "target_modules"):
        missing = [f"the key {key} is missing" for key in absent]
        yield found("vLLM", WILL_NOT_LOAD, missing, CORRECT)
        return
    yield from _vllm_features(adapter)
    yield from _vllm_ranks(adapter)
    yield from _vllm_tensors(adapter)


def _vllm_features(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, get = partial(found, "vLLM", WILL_NOT_LOAD), adapter.get
    for key in _VLLM_LACKS:
        if get(key):
            yield refused(f"{key} = {shown(get(key))} is not supported")
    if get("bias") != "none":
        yield refused(f"bias = {shown(get('bias'))} is not supported, only 'none'")
    if copies := [name for name in get("modules_to_save") or [] if name not in ("classifier", "score")]:
        yield refused(f"modules_to_save = {shown(copies)} is not supported")
    if changed := _changed_base(adapter):
        yield refused(changed, CONVERT)


def _vllm_ranks(adapter: AdapterHeader) -> Iterator[Finding]:
    rank = max([adapter.get("r"), *(adapter.get("rank_pattern") or {}).values()])
    if rank > _VLLM_RANKS[-1]:
        largest = f"rank {rank} is above {_VLLM_RANKS[-1]}, the largest --max-lora-rank"
        yield found("vLLM", WILL_NOT_LOAD, largest)
    elif rank > _VLLM_DEFAULT_RANK:
        choice = min(r for r in _VLLM_RANKS if r >= rank)
        yield Finding("vLLM", NEEDS_OPTION, f"started with --max-lora-rank {choice}: the rank is {rank}")
    if wrong := list(map(str, adapter.of_kind(WRONG_RANK))):
        yield Finding("vLLM", LOADS_WRONGLY, f"{summarize(wrong, 2)}: scaled by another rank", CORRECT)


def _vllm_tensors(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, wrongly = (partial(found, "vLLM", verdict) for verdict in (WILL_NOT_LOAD, LOADS_WRONGLY))
    unread, ignored = [], []
    for key, module, part in _served(adapter):
        is_base = part == BASE_WEIGHT and module in (EMBEDDING, OUTPUT_HEAD)
        if part in PARTNERS and key.endswith(f"{module}.{part}"):
            ignored += [key] if _is_no_layer(adapter, module) else []
        elif not is_base:
            unread.append(key)
    if unread:
        yield refused([f"{shown_name(key)} is no LoRA tensor" for key in unread], EXPORT)
    misfits = [str(p) for p in adapter.of_kind(UNFIT) if p.part in PARTNERS]
    if wrong := _halves(adapter) + misfits:
        yield refused(wrong, SAVE_AGAIN)
    if grown := adapter.other_vocabulary():
        yield refused(grown)
    if foreign := [key for key in ignored if key.split(".lora_")[0].rpartition(".")[2] not in _LEAVES]:
        yield refused([f"the base model has no layer {shown_name(key)}" for key in foreign], SAVE_AGAIN)
    elif ignored:
        yield wrongly(
            [f"{shown_name(key)} is of no layer of the model, and ignored" for key in ignored], SAVE_AGAIN
        )
    if not adapter.sizes:
        yield wrongly("the file holds no tensors: nothing is applied", SAVE_AGAIN)


def _is_no_layer(adapter: AdapterHeader, module: str) -> bool:
    if adapter.base is None:
        return not is_name(module)
    return module not in adapter.modules[1]


# ---- SGLang ----


def verdicts_of_sglang(adapter: AdapterHeader, other_files: list[str]) -> Iterator[Finding]:
    """Yield the reasons why SGLang does not. other_files: further *.safetensors in the directory."""
    if absent := adapter.absent("peft_type", "r", "lora_alpha", "target_modules"):
        missing = [f"the key {key} is missing" for key in absent]
        yield found("SGLang", WILL_NOT_LOAD, missing, CORRECT)
        return
    yield from _sglang_features(adapter)
    yield from _sglang_layers(adapter)
    yield from _sglang_tensors(adapter)
    if other_files:
        why = [f"{name} is read too" for name in other_files]
        yield found("SGLang", WILL_NOT_LOAD, why, "move other *.safetensors elsewhere")


def _sglang_features(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, wrongly = (partial(found, "SGLang", verdict) for verdict in (WILL_NOT_LOAD, LOADS_WRONGLY))
    get, chosen = adapter.get, adapter.get("target_modules")
    if get("peft_type").lower() != "lora":
        yield refused(f"peft_type is {shown(get('peft_type'))}, not 'LORA'", CORRECT)
    if isinstance(chosen, str) and chosen not in ("all", "all-linear"):
        yield refused(f"target_modules {shown(chosen)} is a regular expression", EXPORT)
    if get("use_dora"):
        yield refused("use_dora = True is not supported")
    if get("use_rslora") and get("r") > 1:
        yield wrongly("use_rslora is ignored: scaled by alpha / r, not alpha / sqrt(r)", EXPORT)
    if any(alpha != get("lora_alpha") for _, alpha in adapter.ranks_and_alphas.values()):
        yield wrongly("alpha_pattern is ignored: every layer is scaled by lora_alpha / r", EXPORT)
    if changed := _changed_base(adapter):
        yield wrongly(changed, CONVERT)


def _sglang_layers(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, r = partial(found, "SGLang", WILL_NOT_LOAD), adapter.get("r")
    ranks = {layer: rank for layer, (rank, _) in adapter.ranks_and_alphas.items()}
    if other := [f"{layer} has rank {rank}, not r = {r}" for layer, rank in ranks.items() if rank != r]:
        yield refused(other, EXPORT)
    misfits = [str(p) for p in adapter.of_kind(WRONG_RANK, UNFIT) if p.part in PARTNERS]
    if wrong := misfits + _halves(adapter):
        yield refused(wrong, SAVE_AGAIN)
    layers = {module for _, module, part in _served(adapter) if part in PARTNERS}
    alone = set()  # SGLang fuses q, k, v into one layer, and gate, up into another
    for layer in layers:
        block, _, leaf = layer.rpartition(".")
        if leaf in _SGLANG_NEEDS and f"{block}.{_SGLANG_NEEDS[leaf]}" not in layers:
            alone.add(f"{leaf} is adapted without {_SGLANG_NEEDS[leaf]}")
    if alone:
        yield refused(sorted(alone))


def _sglang_tensors(adapter: AdapterHeader) -> Iterator[Finding]:
    refused, wrongly = (partial(found, "SGLang", verdict) for verdict in (WILL_NOT_LOAD, LOADS_WRONGLY))
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
    if ignored := [f"{shown_name(key)} is ignored" for key in ignored] + adapter.other_vocabulary():
        yield wrongly(ignored)
    if not adapter.sizes:
        yield wrongly("the file holds no tensors: nothing is applied", SAVE_AGAIN)


def _sglang_targets(adapter: AdapterHeader, leaf: str) -> bool:
    """Whether target_modules names an embedding or head, which SGLang passes over otherwise."""
    chosen = adapter.get("target_modules")
    names = [chosen] if isinstance(chosen, str) else [name.rpartition(".")[2] for name in chosen]
    return leaf in names or chosen in ("all", "all-linear")
