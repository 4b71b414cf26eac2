"""Adapters on disk, as PEFT 0.21 reads and writes them (see `peft_format.py` for the names in the files).

What an adapter does stands in its tensors: which layers have an A and a B, which modules of the base model it
replaces, which rows. The configuration says the same once more, by names and patterns, and what tensors do
not tell: alpha, dropout, rsLoRA. The two are compared. A layer that the configuration chooses and the file
lacks is an error here; PEFT leaves it untrained. A field that changes nothing for this adapter is no error.

Reading refuses, by name, every key that asks for something that is not implemented here. Writing gives PEFT's
full set of keys, with plain leaf names as targets where these suffice: PEFT, vLLM and SGLang all read them.
LoRA-FA has no key, since a frozen A matters in training only.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from minilora import starts
from minilora.adapted import Adapted, LoraEmbedding, TrainedCopy, TrainedRows, weight_under
from minilora.adapters.checks import (
    Problem,
    adaptable,
    check_kind,
    chosen_layers,
    naming,
    problems_alone,
    problems_on,
)
from minilora.adapters.file import (
    AdapterFile,
    check_has_weights,
    is_base_weight,
    read_adapter_config,
    stored_tensors,
    write_adapter,
)
from minilora.adapters.peft_format import (
    ADAPTER_CONFIG_FILE,
    BASE_BIAS,
    BASE_WEIGHT,
    BIAS,
    EMBEDDING_A,
    EMBEDDING_B,
    LORA_BIAS,
    LORA_KEYS,
    MAGNITUDE,
    PEFT_DEFAULTS,
    ROWS,
    ROWS_WEIGHT,
    WEIGHT,
    A,
    B,
    tensor_key,
)
from minilora.adapters.vera_files import (
    LAMBDA_B,
    LAMBDA_D,
    SHARED_A,
    SHARED_B,
    check_projections,
    sort_vera,
    vera_config_json,
)
from minilora.config import LoraConfig
from minilora.initialize import takes_part_of_base
from minilora.lora import LoraLinear, adding, lora_layers, wrap_targets
from minilora.model import CausalLM
from minilora.new_rows import take_new_rows
from minilora.system.errors import UserError, suggestion, summarize
from minilora.system.schema import read_object, shown
from minilora.targets import EMBEDDING, OUTPUT_HEAD, chosen_targets, saved_modules
from minilora.wrapping import (
    adapted_layers,
    base_layers,
    check_new_adapter,
    has_grown,
    plain_name,
    wrap_tokens,
    wrapper,
)

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
# Parts of torch.compile's, DDP's and FSDP's names, which no file should hold.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")

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
    write_adapter(directory, raw, _in_memory_of_their_own(tensors))


def _in_memory_of_their_own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, without two that share memory, which safetensors refuses: a tied head is the embedding."""
    first = {t.data_ptr(): key for key, t in reversed(tensors.items())}
    return {key: t if first[t.data_ptr()] == key else t.clone() for key, t in tensors.items()}


def adapter_config_json(model: nn.Module, name: str) -> dict:
    """PEFT's `adapter_config.json` of an adapter on the model."""
    model = unwrapped(model)
    layers = adapted_layers(model, name)
    config = starts.in_files(next(iter(layers.values())).configs[name])
    chosen = [_file_name(n) for n, m in layers.items() if isinstance(m, (LoraLinear, LoraEmbedding))]
    if config.use_vera:
        return vera_config_json(config, _plain_targets(model, chosen, config))
    raw = {field: getattr(config, field) for field in LORA_KEYS}
    raw = {field: list(value) if isinstance(value, tuple) else value for field, value in raw.items()}
    raw = {field: PEFT_DEFAULTS[field] if value == [] else value for field, value in raw.items()}
    if isinstance(config.target_modules, str) or not config.layers_to_transform:
        raw["target_modules"] = _plain_targets(model, chosen, config)
    return PEFT_DEFAULTS | raw


def _plain_targets(model: nn.Module, wrapped: list[str], config: LoraConfig) -> list[str]:
    """Leaf names if they name exactly the wrapped layers, else full names. Servers read no regex."""
    leaves = sorted({path.rpartition(".")[2] for path in wrapped})
    names, _ = adaptable({_file_name(name): layer for name, layer in base_layers(model).items()})
    return leaves if chosen_targets(names, replace(config, target_modules=leaves)) == wrapped else wrapped


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors by their keys in the file.

    As in PEFT, an embedding or head with an update comes with its base weight, unless rows are trained.
    """
    model = unwrapped(model)
    tensors, layers = dict(_parameters(model, name)), adapted_layers(model, name)
    tensors |= _frozen_tensors(lora_layers(model, name), name)
    if any(isinstance(layer, TrainedRows) for layer in layers.values()):
        return tensors
    for path, layer in layers.items():
        module, has_update = _file_name(path), isinstance(layer, (LoraLinear, LoraEmbedding))
        if has_update and module in (EMBEDDING, OUTPUT_HEAD):
            weight = weight_under(layer.base_layer, name)
            if isinstance(weight, Tensor):  # PEFT leaves out a head in 4 bits, too
                tensors.setdefault(tensor_key(module, BASE_WEIGHT), weight)
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
    copied = {_file_name(path) for path, layer in layers.items() if isinstance(layer, TrainedCopy)}
    found: dict[object, tuple[str, nn.Parameter]] = {}
    for path, layer in layers.items():
        module = _file_name(path)
        for kind, parameter in layer.parts(name).items():
            key = tensor_key(module, _file_part(kind, layer, around[module]))
            # A tied head shares trained rows. As in PEFT, they are written once, unless its weight is too.
            found.setdefault(key if module in copied else id(parameter), (key, parameter))
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


# ---- reading ----


def read_adapter(directory: str | Path) -> AdapterFile:
    """Read an adapter without a model. Raises UserError as `read_adapter_config` does.

    One UserError lists all tensors that PEFT does not write, lack their partners, or contradict the
    configuration.
    """
    config, tensors = read_adapter_config(directory), read_tensors(directory)
    if config.use_vera:
        modules, shared, wrong = sort_vera(
            tensors, read_object(Path(directory) / ADAPTER_CONFIG_FILE), config
        )
        if wrong:
            raise UserError(f"{directory} is not a sound VeRA adapter: {summarize(wrong)}")
        return AdapterFile(Path(directory), config, modules, shared=shared)
    adapter = AdapterFile.of(Path(directory), config, tensors.items())
    if not adapter.modules and not adapter.unread:
        raise UserError(f"{directory} is not a sound adapter: it holds no tensors")
    with naming(adapter.directory / ADAPTER_CONFIG_FILE):
        problems = problems_alone(adapter)
        chosen_layers(adapter)  # for its patterns
    if problems:
        raise UserError(f"{directory} is not a sound adapter: {_summary(problems)}")
    return adapter


def _summary(problems: list[Problem]) -> str:
    return summarize(list(map(str, problems)))


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of an adapter, by key. Raises UserError for no file, an infinity or NaN."""
    tensors = dict(stored_tensors(directory))
    problems = [
        f"{key} is {t.dtype}, not floating point" for key, t in tensors.items() if not t.is_floating_point()
    ]
    problems = problems or [
        f"{key} is infinite or NaN in places" for key, t in tensors.items() if not t.float().isfinite().all()
    ]
    if problems:
        path = check_has_weights(directory)
        raise UserError(f"{path} is damaged, or its training diverged: {summarize(problems, 3)}")
    return tensors


def vocabulary_of(directory: str | Path, otherwise: int) -> int:
    """The number of tokens that a model has under an adapter: more, if the adapter brings its embedding."""
    keys = [tensor_key(EMBEDDING, part) for part in (WEIGHT, BASE_WEIGHT, ROWS_WEIGHT)]
    return next((len(t) for _, t in stored_tensors(directory, keys) if t.dim()), otherwise)


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    name: str = "default",
    lora_fa: bool = False,
    lora_dropout: float | None = None,
    started: LoraConfig | None = None,
) -> None:
    """Put an adapter that PEFT or `save_adapter` wrote on the model under `name`, and make it active.

    Raises UserError as `read_adapter` and `put_adapter` do. After an error the model is as it was.
    """
    put_adapter(model, read_adapter(directory), name, lora_fa, lora_dropout, started)


def put_adapter(
    model: nn.Module,
    adapter: AdapterFile,
    name: str = "default",
    lora_fa: bool = False,
    lora_dropout: float | None = None,
    started: LoraConfig | None = None,
) -> None:
    """Put an adapter that was read on the model under `name`, and make it active. Its tensors are copied.

    lora_fa: whether further training keeps A fixed; no file says so. lora_dropout: for further training;
    None: the file's. started: the configuration of a training that started with a part of W, and that goes on
    from the file. Raises UserError for a name that cannot be, and as `fitted` does. After an error the model
    is as it was.
    """
    dropout = adapter.config.lora_dropout if lora_dropout is None else lora_dropout
    adapter = replace(adapter, config=replace(adapter.config, lora_fa=lora_fa, lora_dropout=dropout))
    check_new_adapter(model, name)
    adapter = fitted(model, adapter)
    with naming(f"{adapter.directory} does not fit the model"), adding(model, name):
        _put_on(model, adapter, name)
        if takes_part_of_base(adapter.config.init_lora_weights):
            starts.repeat(lora_layers(model, name), adapter.config, name)
        elif started is not None and takes_part_of_base(started.init_lora_weights):
            starts.split(model, replace(started, lora_fa=lora_fa, lora_dropout=dropout), name)


def fitted(model: nn.Module, adapter: AdapterFile) -> AdapterFile:
    """Return the adapter as this model takes it. Nothing is put on.

    Raises UserError for a configuration that chooses no layer, and for a kind that its layers cannot have.
    One UserError lists all missing, unexpected and wrongly shaped tensors.
    """
    adapter = adapter.on_tied_base() if model.config.tie_word_embeddings else adapter
    with naming(adapter.directory / ADAPTER_CONFIG_FILE):
        problems = problems_on(model, adapter)
        if not chosen_layers(adapter, model):
            raise UserError(_no_layer(model, adapter))
    if problems:
        made_for = _made_for(adapter.directory)
        raise UserError(f"{adapter.directory} does not fit the model: {made_for}{_summary(problems)}")
    with naming(f"{adapter.directory} does not fit the model"):
        check_kind(model, adapter)
    return adapter


def _made_for(directory: Path) -> str:
    """How an error message begins that explains what an adapter lacks: with the base that it names."""
    file = directory / ADAPTER_CONFIG_FILE
    base = read_object(file).get("base_model_name_or_path") if file.is_file() else None
    return f"it was made for {shown(base)}; " if isinstance(base, str) and base else ""


def _no_layer(model: nn.Module, adapter: AdapterFile) -> str:
    """Which field of the configuration chooses no layer."""
    config, targets = adapter.config, adapter.config.target_modules
    for key in ("layers_to_transform", "exclude_modules", "modules_to_save"):
        without = replace(adapter, config=replace(config, **{key: ()}))
        if (value := getattr(config, key)) != () and chosen_layers(without, model):
            return f"{key} = {shown(value)} leaves no layer of the model to adapt"
    leaves = {name.rpartition(".")[2] for name in adaptable(base_layers(model))[1]}
    near = suggestion(targets if isinstance(targets, str) else targets[0], leaves)
    return f"target_modules = {shown(targets)} names no layer of the model{near}"


def _put_on(model: nn.Module, adapter: AdapterFile, name: str) -> None:
    """Wrap the modules that the adapter changes and fill in its tensors. Raises UserError."""
    config, layers = adapter.config, base_layers(model)
    whole = saved_modules(layers, config.modules_to_save)
    for module in adapter.modules:
        own = adapter.own(module)
        trained = WEIGHT not in own or any(f"{module}.".startswith(f"{copy}.") for copy in whole)
        grown = module in (EMBEDDING, OUTPUT_HEAD) and has_grown(model, layers[module])
        if grown and WEIGHT in own and not trained:
            own[WEIGHT] = take_new_rows(model, layers[module], own[WEIGHT])
        if own and (trained or grown or not _is_the_same(layers[module], own)):
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
            parameter.copy_(tensors[key], non_blocking=True)


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
        if not isinstance(base, Tensor) or base.is_meta:
            return False
        if not is_base_weight(base, tensor):
            return False
    return True
