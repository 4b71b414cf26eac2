"""Adapters on disk, as PEFT 0.21 reads and writes them (see `peft_format.py` for the names in the files).

What an adapter does stands in its tensors: which layers have an A and a B, which modules of the base model it
replaces, which rows. The configuration says the same once more, by names and patterns, and what tensors do
not tell: alpha, dropout, rsLoRA. The two are compared. A layer that the configuration chooses and the file
lacks is an error here; PEFT leaves it untrained. A field that changes nothing for this adapter is no error.

Reading refuses, by name, every key that asks for something that is not implemented here. Writing gives PEFT's
full set of keys, with plain leaf names as targets where these suffice: PEFT, vLLM and SGLang all read them.
LoRA-FA has no key, since a frozen A matters in training only.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minilora import starts
from minilora.adapted import (
    Adapted,
    LoraEmbedding,
    TrainedCopy,
    TrainedRows,
    adapted_layers,
    base_layers,
    plain_name,
    weight_under,
    wrap_tokens,
    wrapper,
)
from minilora.config import LoraConfig
from minilora.formats.peft_format import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    BASE_BIAS,
    BASE_WEIGHT,
    BIAS,
    EMBEDDING_A,
    EMBEDDING_B,
    LORA_BIAS,
    MAGNITUDE,
    PARTNERS,
    PEFT_CHANGES_NOTHING,
    PEFT_DEFAULTS,
    PEFT_HONOURED,
    PEFT_INIT,
    PICKLED_WEIGHTS_FILE,
    ROWS,
    ROWS_WEIGHT,
    SAVED_TWICE,
    STARTS_FROM_W,
    WEIGHT,
    A,
    B,
    changes_base,
    split_any_key,
    tensor_key,
)
from minilora.formats.vera_adapter import (
    LAMBDA_B,
    LAMBDA_D,
    SHARED_A,
    SHARED_B,
    VERA,
    check_projections,
    parse_vera_config,
    sort_vera,
    vera_config_json,
)
from minilora.initialize import takes_part_of_base
from minilora.lora import LoraLinear, lora_layers, remove_lora, set_adapter, wrap_targets
from minilora.matching import check_new_adapter, match_targets
from minilora.model import CausalLM
from minilora.system.errors import UserError, suggestion, summarize
from minilora.system.files import write_whole
from minilora.system.schema import Field, read_fields, read_object, shown, shown_name
from minilora.targets import EMBEDDING, OUTPUT_HEAD, chosen_targets, ranks_and_alphas, saved_modules

_PARTS = {  # a wrapper's name for a part -> the file's
    "lora_A": A,
    "lora_B": B,
    "lora_magnitude_vector": MAGNITUDE,
    "lora_bias": LORA_BIAS,
    "lora_embedding_A": EMBEDDING_A,
    "lora_embedding_B": EMBEDDING_B,
    "trainable_tokens_delta": ROWS,
    "vera_lambda_d": LAMBDA_D,
    "vera_lambda_b": LAMBDA_B,
}
_OWN_WEIGHTS = (WEIGHT, BIAS, BASE_WEIGHT, BASE_BIAS, ROWS_WEIGHT)
# Parts of torch.compile's, DDP's and FSDP's names, which no file should hold.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")

# Fields of LoraConfig that stand in the file under the same name.
_LORA_CONFIG = """
    r lora_alpha lora_dropout target_modules use_rslora use_dora exclude_modules layers_to_transform
    layers_pattern rank_pattern alpha_pattern lora_bias bias modules_to_save trainable_token_indices
    """.split()

# ---- writing ----


def save_adapter(
    model: nn.Module, directory: str | Path, name: str = "default", base_model_name_or_path: str | None = None
) -> None:
    """Write one adapter in PEFT's two files, each of them complete or not at all.

    The model may be compiled or wrapped, whole or layer by layer: the names in the files are those of the
    plain model. An adapter that started with a part of W is written as plain LoRA of twice its rank, a VeRA
    adapter as PEFT's. Raises UserError if the model has no such adapter.
    """
    tensors = {key: p.detach().cpu().contiguous() for key, p in adapter_tensors(model, name).items()}
    if not tensors:
        raise UserError(f"the model has no adapter called {name!r} to save")
    raw = adapter_config_json(model, name) | {"base_model_name_or_path": base_model_name_or_path}
    write_adapter(directory, raw, tensors)


def write_adapter(directory: str | Path, raw: dict, tensors: dict[str, Tensor]) -> None:
    """Write an adapter's two files. raw: its configuration; tensors by their keys in the file."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / ADAPTER_WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_whole(directory / ADAPTER_CONFIG_FILE, json.dumps(raw, indent=2) + "\n")


def adapter_config_json(model: nn.Module, name: str) -> dict:
    """PEFT's `adapter_config.json` of an adapter on the model."""
    model = unwrapped(model)
    layers = adapted_layers(model, name)
    config = starts.in_files(next(iter(layers.values())).configs[name])
    chosen = [_file_name(n) for n, m in layers.items() if isinstance(m, (LoraLinear, LoraEmbedding))]
    if config.use_vera:
        return vera_config_json(config, _plain_targets(model, chosen, config))
    raw = {field: getattr(config, field) for field in _LORA_CONFIG}
    raw = {field: list(value) if isinstance(value, tuple) else value for field, value in raw.items()}
    raw = {field: PEFT_DEFAULTS[field] if value == [] else value for field, value in raw.items()}
    if isinstance(config.target_modules, str) or not config.layers_to_transform:
        raw["target_modules"] = _plain_targets(model, chosen, config)
    return PEFT_DEFAULTS | raw


def _plain_targets(model: nn.Module, wrapped: list[str], config: LoraConfig) -> list[str]:
    """Leaf names if they name exactly the wrapped layers, else full names. Servers read no regex."""
    leaves = sorted({path.rpartition(".")[2] for path in wrapped})
    return leaves if match_targets(model, replace(config, target_modules=leaves)) == wrapped else wrapped


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors by their keys in the file.

    As in PEFT, an embedding or head with an update comes with its base weight, unless rows are trained.
    """
    model = unwrapped(model)
    tensors, layers = dict(_parameters(model, name)), adapted_layers(model, name)
    tensors |= _frozen_tensors(lora_layers(model, name), name)
    if not any(isinstance(layer, TrainedRows) for layer in layers.values()):
        for path, layer in layers.items():
            if isinstance(layer, (LoraLinear, LoraEmbedding)) and _file_name(path) in (
                EMBEDDING,
                OUTPUT_HEAD,
            ):
                weight = weight_under(layer.base_layer, name)
                if isinstance(weight, Tensor):  # PEFT leaves out a head in 4 bits, too
                    tensors.setdefault(tensor_key(_file_name(path), BASE_WEIGHT), weight.detach().clone())
    return tensors


def _frozen_tensors(layers: dict[str, LoraLinear], name: str) -> dict[str, Tensor]:
    """What a start or VeRA makes of A and B, by their keys in the file."""
    tensors = {}
    for path, layer in layers.items():
        if name in layer.vera_lambda_d:
            tensors = {SHARED_A: layer.frozen_A[name], SHARED_B: layer.frozen_B[name]}
        elif name in layer.frozen_A:
            factors = layer.factors(name)
            tensors |= {
                tensor_key(_file_name(path), part): f for part, f in zip((A, B), factors, strict=True)
            }
    return tensors


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's or a parallel wrapper."""
    return next((m for m in model.modules() if isinstance(m, CausalLM)), model)


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's parameters by their keys in the file."""
    layers = adapted_layers(model, name)
    around = {}  # name without wrappers -> the outermost wrapper with this adapter
    for path, layer in layers.items():
        around.setdefault(_file_name(path), layer)
    found: dict[int, tuple[str, nn.Parameter]] = {}  # each parameter once: a tied head shares trained rows
    for path, layer in layers.items():
        module = _file_name(path)
        for kind, parameter in layer.parts(name).items():
            key = tensor_key(module, _file_part(kind, layer, around[module]))
            found.setdefault(id(parameter), (key, parameter))
    return dict(found.values())


def _file_name(path: str) -> str:
    """The name that the plain model has for a module."""
    return ".".join(part for part in plain_name(path).split(".") if part not in _WRAPPERS)


def _file_part(kind: str, layer: Adapted, outermost: Adapted) -> str:
    if not isinstance(layer, TrainedCopy):
        return _PARTS[kind]
    if isinstance(outermost, TrainedRows):
        return ROWS_WEIGHT
    own, under_update = {"saved_weight": (WEIGHT, BASE_WEIGHT), "saved_bias": (BIAS, BASE_BIAS)}[kind]
    return own if outermost is layer else under_update


# ---- reading: the configuration ----


def read_adapter_config(directory: str | Path) -> LoraConfig:
    """Read `adapter_config.json`. Raises UserError naming the file and the key that cannot be honoured."""
    path = Path(directory) / ADAPTER_CONFIG_FILE
    if not path.exists():
        raise UserError(f"{directory} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
    raw = read_object(path)
    try:
        return parse_adapter_config(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def parse_adapter_config(raw: dict) -> LoraConfig:
    """The adapter that the contents of an `adapter_config.json` describe. Raises UserError."""
    if raw.get("peft_type") == VERA:
        return parse_vera_config(raw)
    fields = read_fields(raw, PEFT_HONOURED)
    read_fields(raw, PEFT_CHANGES_NOTHING)
    for key, value in raw.items():
        _check_honoured(key, value)
    for key, kind in (("rank_pattern", PEFT_HONOURED["r"]), ("alpha_pattern", PEFT_HONOURED["lora_alpha"])):
        read_fields(fields[key], dict.fromkeys(fields[key], kind), f"{key}.")
    if isinstance(rows := fields["trainable_token_indices"], dict):
        read_fields(rows, dict.fromkeys(rows, Field(list, "rows", items=int)), "trainable_token_indices.")
    given = {key: fields[key] for key in _LORA_CONFIG if fields[key] is not None}
    if not given["target_modules"]:
        raise UserError("target_modules is empty")
    if str(init := raw.get(PEFT_INIT)).lower() in STARTS_FROM_W:
        given[PEFT_INIT] = init.lower()
    return LoraConfig(**given)


def _check_honoured(key: str, value: object) -> None:
    """Raise UserError for a key outside the tables whose value this implementation does not honour."""
    if key in PEFT_HONOURED or key in PEFT_CHANGES_NOTHING:
        return
    if key == PEFT_INIT:
        repeatable = isinstance(value, str) and value.lower() in STARTS_FROM_W
        if not isinstance(value, bool) and changes_base(str(value)) and not repeatable:
            raise UserError(
                f"{key} = {shown(value)} changed the base weights; convert it to plain LoRA first"
            )
    elif key in PEFT_DEFAULTS:
        if value not in (None, False, []) and value != PEFT_DEFAULTS[key]:
            raise UserError(f"{key} = {shown(value)} is not supported")
    elif value:
        raise UserError(f"{shown_name(key)} = {shown(value)} is not supported")


# ---- reading: the tensors ----


@dataclass(frozen=True)
class AdapterFile:
    """An adapter without a model: its configuration, and each module's tensors by part."""

    directory: Path
    config: LoraConfig
    modules: dict[str, dict[str, Tensor]]  # full name -> part (A, B, WEIGHT, ROWS, ...) -> tensor
    shared: tuple[Tensor, Tensor] | None = None  # VeRA's A and B; None: drawn from the seed

    @property
    def layers(self) -> list[str]:
        """Names of the modules that have an update A, B."""
        return [name for name, parts in self.modules.items() if parts.keys() & {A, EMBEDDING_A, LAMBDA_D}]

    def own(self, name: str) -> dict[str, Tensor]:
        """Return the weight and the bias that take the place of a module's own, as WEIGHT and BIAS."""
        parts = self.modules.get(name, {})
        return {key.rpartition(".")[2]: parts[key] for key in _OWN_WEIGHTS if key in parts}


def read_adapter(directory: str | Path) -> AdapterFile:
    """Read an adapter without a model. Raises UserError as `read_adapter_config` does.

    One UserError lists all tensors that PEFT does not write, lack their partners, or contradict the ranks.
    """
    config = read_adapter_config(directory)
    modules: dict[str, dict[str, Tensor]] = {}
    strange = []
    tensors = _read_tensors(Path(directory) / ADAPTER_WEIGHTS_FILE)
    if config.use_vera:
        raw = read_object(Path(directory) / ADAPTER_CONFIG_FILE)
        modules, shared, problems = sort_vera(tensors, raw, config)
        if problems:
            raise UserError(f"{directory} is not a sound VeRA adapter: {summarize(problems)}")
        return AdapterFile(Path(directory), config, modules, shared)
    for key, tensor in sorted(tensors.items()):
        module, part = split_any_key(key) or ("", "")
        if SAVED_TWICE.search(key):
            continue
        if not module:
            strange.append(f"unexpected {key}")
        elif part in modules.get(module, {}):
            strange.append(f"{tensor_key(module, part)} is there twice, as {key} too")
        else:
            modules.setdefault(module, {})[part] = tensor
    adapter = AdapterFile(Path(directory), config, modules)
    if problems := strange + _unsound(adapter):
        raise UserError(f"{directory} is not a sound adapter: {summarize(problems)}")
    return adapter


def _unsound(adapter: AdapterFile) -> list[str]:
    """One sentence for each tensor that is missing, of a wrong rank, or that nobody asked for."""
    config, problems = adapter.config, []
    if not adapter.modules:
        return ["it holds no tensors"]
    try:
        ranks = ranks_and_alphas(adapter.layers, config)
    except UserError as error:
        return [f"rank_pattern or alpha_pattern: {error}"]
    for module, parts in adapter.modules.items():
        needed = {PARTNERS[part] for part in parts if part in PARTNERS}
        needed |= {MAGNITUDE} if config.use_dora and A in parts else set()
        needed |= {LORA_BIAS} if config.lora_bias and A in parts else set()
        problems += [f"missing {tensor_key(module, part)}" for part in sorted(needed - parts.keys())]
        has_update = A in parts or EMBEDDING_A in parts
        if MAGNITUDE in parts and config.use_dora and not has_update:
            problems.append(f"missing {tensor_key(module, A)}")
        allowed = {*needed, *PARTNERS, BASE_WEIGHT, BASE_BIAS} if has_update else {WEIGHT, BIAS}
        allowed |= {ROWS, ROWS_WEIGHT} if config.trainable_token_indices else set()
        problems += [f"unexpected {tensor_key(module, part)}" for part in parts if part not in allowed]
        rank = ranks.get(module, (0, 0))[0]
        for part, tensor in parts.items():
            problems += _wrong_shape(tensor_key(module, part), part, tensor, rank)
    return problems


def _wrong_shape(key: str, part: str, tensor: Tensor, rank: int) -> list[str]:
    is_vector = part in (MAGNITUDE, LORA_BIAS, BIAS, BASE_BIAS)
    if tensor.dim() != (1 if is_vector else 2) and part != WEIGHT:
        return [f"{key} is {tuple(tensor.shape)}, not a {'vector' if is_vector else 'matrix'}"]
    if part in PARTNERS and tensor.shape[1 if part in (B, EMBEDDING_B) else 0] != rank:
        return [f"{key} is {tuple(tensor.shape)}, not of rank r = {rank}"]
    return []


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    lora_fa: bool = False,
    lora_dropout: float | None = None,
    started: LoraConfig | None = None,
) -> None:
    """Put an adapter that PEFT or `save_adapter` wrote on the model under `name`, and make it active.

    lora_fa: whether further training keeps A fixed; no file says so. lora_dropout: for further training;
    None: the file's. started: the configuration of a training that started with a part of W, and that goes on
    from the file. Raises UserError for a configuration that cannot be honoured. One UserError lists all
    missing, unexpected and wrongly shaped tensors. After an error the model is as it was.
    """
    adapter = read_adapter(directory)
    dropout = adapter.config.lora_dropout if lora_dropout is None else lora_dropout
    adapter = replace(adapter, config=replace(adapter.config, lora_fa=lora_fa, lora_dropout=dropout))
    check_new_adapter(model, name)
    if problems := _misfits(model, adapter):
        raise UserError(f"{directory} does not fit the model: {summarize(problems)}")
    before = {p for p in model.parameters() if p.requires_grad}
    for parameter in before:
        parameter.requires_grad_(False)
    try:
        _put_on(model, adapter, name)
        if takes_part_of_base(adapter.config.init_lora_weights):
            starts.repeat(lora_layers(model, name), adapter.config, name)
        elif started is not None and takes_part_of_base(started.init_lora_weights):
            starts.split(model, replace(started, lora_fa=lora_fa, lora_dropout=dropout), name)
    except UserError as error:
        if any(name in layer.configs for layer in adapted_layers(model).values()):
            remove_lora(model, name)
        for parameter in before:
            parameter.requires_grad_(True)
        raise UserError(f"{directory} does not fit the model: {error}") from error
    set_adapter(model, name)


def _misfits(model: nn.Module, adapter: AdapterFile) -> list[str]:
    """One sentence for each tensor that the configuration promises for this model and the file lacks, and
    for each that nobody asked for.
    """
    layers, config = base_layers(model), adapter.config
    linear = [name for name, layer in layers.items() if _is_linear(layer)]
    adaptable = [name for name in layers if name in linear or name == EMBEDDING]
    try:
        chosen = chosen_targets(adaptable, config, linear)
    except UserError as error:
        raise UserError(f"{adapter.directory / ADAPTER_CONFIG_FILE}: target_modules {error}") from error
    if OUTPUT_HEAD in adapter.layers and EMBEDDING in chosen and model.config.tie_word_embeddings:
        chosen.append(OUTPUT_HEAD)  # ensure_weight_tying
    if not chosen:
        asked = config.target_modules if isinstance(config.target_modules, str) else config.target_modules[0]
        near = suggestion(asked, {name.rpartition(".")[2] for name in linear})
        return [f"target_modules = {shown(config.target_modules)} names no layer of it{near}"]
    linear_part = LAMBDA_D if config.use_vera else A
    promised = [(layer, EMBEDDING_A if layer == EMBEDDING else linear_part) for layer in chosen]
    for module in saved_modules(layers, config.modules_to_save):
        promised += [(module, leaf) for leaf, _ in layers[module].named_parameters(recurse=False)]
    for module in chosen if config.bias == "lora_only" else layers if config.bias == "all" else ():
        if getattr(layers[module], BIAS, None) is not None:
            promised.append((module, BASE_BIAS if module in chosen else BIAS))
    unknown = [module for module in adapter.modules if module not in layers]
    unknown += [layer for layer in adapter.layers if layer in layers and layer not in chosen]
    problems = [
        f"missing {tensor_key(module, part)}"
        for module, part in promised
        if part not in adapter.modules.get(module, {})
    ]
    problems += [f"unexpected {tensor_key(m, part)}" for m in unknown for part in adapter.modules[m]]
    return problems + _wrong_weights(layers, adapter)


def _wrong_weights(layers: dict[str, nn.Module], adapter: AdapterFile) -> list[str]:
    """One sentence for each weight or bias that cannot take the place of the module's own."""
    problems = []
    for module, parts in adapter.modules.items():
        for part in parts.keys() & set(_OWN_WEIGHTS):
            own = getattr(layers.get(module), part.rpartition(".")[2], None)
            stored, key = tuple(parts[part].shape), tensor_key(module, part)
            if own is None:
                problems.append(f"unexpected {key}")
            elif isinstance(own, Tensor):
                first = 1 if module in (EMBEDDING, OUTPUT_HEAD) else 0  # a vocabulary may grow
                if len(stored) != own.dim() or stored[first:] != tuple(own.shape[first:]):
                    problems.append(f"{key} is {stored}, the model needs {tuple(own.shape)}")
            else:
                problems.append(f"{key} replaces a weight in 4 or 8 bits; load the model unquantized")
    return problems


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features")


def _put_on(model: nn.Module, adapter: AdapterFile, name: str) -> None:
    """Wrap the modules that the adapter changes and fill in its tensors. Raises UserError."""
    config, layers = adapter.config, base_layers(model)
    whole = saved_modules(layers, config.modules_to_save)
    for module in adapter.modules:
        own, trained = adapter.own(module), module in whole or (WEIGHT not in adapter.own(module))
        if own and (trained or not _is_the_same(layers[module], own)):
            copy = wrapper(model, module, TrainedCopy)
            copy.add_adapter(name, config, own.get(WEIGHT), own.get(BIAS), trained)
    wrap_targets(model, [n for n in layers if n in adapter.layers], config, name)
    wrap_tokens(model, config, name)
    tensors = {tensor_key(m, part): t for m, parts in adapter.modules.items() for part, t in parts.items()}
    problems = []
    for key, parameter in (parameters := _parameters(model, name)).items():
        needed = tuple(parameter.shape)
        if key not in tensors:
            problems.append(f"missing {key}")
        elif (stored := tuple(tensors[key].shape)) != needed:
            problems.append(f"{key} is {stored}, the model needs {needed}")
    if problems:
        raise UserError(summarize(sorted(problems)))
    if config.use_vera:
        _share_projections(model, adapter, name)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])


def _share_projections(model: nn.Module, adapter: AdapterFile, name: str) -> None:
    """Give VeRA's layers the file's A and B, or those of the seed."""
    layers = lora_layers(model, name)
    A, B = adapter.shared or starts.projections(layers, adapter.config)
    check_projections(A, B, *starts.widest(layers))
    starts.share(layers, name, A, B)


def _is_the_same(layer: nn.Module, own: dict[str, Tensor]) -> bool:
    """Whether the weights in the file are the base model's own, which PEFT writes beside updates."""
    for leaf, tensor in own.items():
        base = getattr(layer, leaf, None)
        if not isinstance(base, Tensor) or base.shape != tensor.shape or base.is_meta:
            return False
        if not torch.equal(tensor.to(base.device, base.dtype), base):
            return False
    return True


def vocabulary_of(directory: str | Path, otherwise: int) -> int:
    """The number of tokens that a model has under an adapter: more, if the adapter brings its embedding."""
    check_has_weights(directory)
    path = Path(directory) / ADAPTER_WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as file:
            for key in (tensor_key(EMBEDDING, part) for part in (WEIGHT, BASE_WEIGHT, ROWS_WEIGHT)):
                if key in file.keys() and (shape := file.get_slice(key).get_shape()):
                    return shape[0]
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt: {error}") from error
    return otherwise


def check_has_weights(directory: str | Path) -> None:
    """Raise UserError if an adapter's directory lacks its weights, without reading them."""
    path = Path(directory) / ADAPTER_WEIGHTS_FILE
    if not path.is_file():
        pickled = path.with_name(PICKLED_WEIGHTS_FILE).exists()
        hint = f" ({PICKLED_WEIGHTS_FILE} is pickled and never read; save it again as safetensors)" * pickled
        raise UserError(f"{path.parent} has no {path.name}{hint}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of the file, by key. Raises UserError if it is missing, or holds infinities or NaN."""
    check_has_weights(path.parent)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt: {error}") from error
    problems = [
        f"{key} is {t.dtype}, not floating point" for key, t in tensors.items() if not t.is_floating_point()
    ]
    problems = problems or [
        f"{key} is infinite or NaN in places" for key, t in tensors.items() if not t.float().isfinite().all()
    ]
    if problems:
        raise UserError(f"{path} is damaged, or its training diverged: {summarize(problems, 3)}")
    return tensors
