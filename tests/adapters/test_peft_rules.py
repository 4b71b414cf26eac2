"""PEFT is asked what it makes of odd configurations and weights. The linter never says "loads" where PEFT does not."""

import json
import math
import shutil
import struct
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.families import transformers_model
from support.merging import change_config, change_tensors, make_adapter, make_base

from minilora.adapters.findings import CANNOT_TELL, WILL_NOT_LOAD
from minilora.adapters.lint import lint_adapter
from minilora.formats.weights import read_config

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"
NAN, INF = math.nan, math.inf

VALUES = {  # key -> values that somebody might write
    "r": ["4", 4.0, True, 0, -1, None, 10**30],
    "lora_alpha": [NAN, INF, -INF, "3", None, 10**400, 1e39, 0, -3],
    "lora_dropout": [1.5, "0.1", None, 1],
    "target_modules": [
        {}, [], [1], "", "(", "q_proj", "all", "All-Linear", None, 5, [*ALL, 1], [*ALL, ""], [*ALL, "lm_head"],
        [*ALL, "input_layernorm"], [*ALL, "act_fn"], ["mlp"], ".*", "(?i).*_PROJ", "dummy-target-modules",
    ],
    "exclude_modules": ["", "q_proj", ["q_proj"], ALL, ".*", "(", 5],
    "layers_to_transform": [[0], 0, [0, 1, 2], [5], -1, "0", ["0"], [], True, {}],
    "layers_pattern": ["layers", "", 5],
    "rank_pattern": [
        None, [], {"q_proj": 4}, {"q_proj": "4"}, {"q_proj": 0}, {"q_proj": 5}, {"(": 4}, {"": 5}, {".*": 4},
    ],
    "alpha_pattern": [
        None, {"q_proj": "4"}, {"q_proj": NAN}, {"q_proj": INF}, {"q_proj": 10**400}, {"(": 4}, {"nothing": NAN},
    ],
    "bias": ["all", "lora_only", "foo", None],
    "modules_to_save": [[1], ["lm_head"], "lm_head", ["q_proj"], ["("], [""], ["norm"]],
    "task_type": ["FOO", "SEQ_CLS", None, "causal_lm", []],
    "peft_type": ["lora", "LOHA", None, 5, {}],
    "fan_in_fan_out": ["true"],
    "use_dora": [True, "yes", None],
    "use_rslora": ["false", None],
    "init_lora_weights": [
        None, 3, "foo", "GAUSSIAN", "EVA", "pissa_niter_x", "corda", "loftq", False, [1], "true",
    ],
    "trainable_token_indices": [[0], {"nothing": [0]}, "x", 5],
    "target_parameters": [[], ["up_proj.weight"], "x", 5],
    "alora_invocation_tokens": [[1], 5, [None]],
    "layer_replication": [[[0, 2]], 5, [[0, 99]], [0]],
    "lora_bias": [True, "x"],
    "megatron_config": [{}, {"a": 1}, 5],
    "eva_config": [{"a": 1}, 5, False],
    "kasa_config": [{}, 5, False],
    "velora_config": [{}, 5],
    "monteclora_config": [{}, 5],
    "arrow_config": [{}, 5],
    "use_bdlora": [{}, 5],
    "inference_mode": ["no"],
    "revision": [5],
    "peft_version": [5],
    "runtime_config": [5],
    "self": [1],
    "cls": [1],
}  # fmt: skip
COMBINATIONS = {
    "layers and a pattern of names": dict(layers_to_transform=[0, 1, 2], target_modules=".*_proj"),
    "layers and all linear ones": dict(layers_to_transform=[0], target_modules="all-linear"),
    "layers of another list": dict(layers_to_transform=[0, 1, 2], layers_pattern="h"),
    "layers of this list": dict(layers_to_transform=[0, 1, 2], layers_pattern=["h", "layers"]),
    "layers of a broken pattern": dict(layers_to_transform=[0, 1, 2], layers_pattern="("),
    "layers of two lists at once": dict(layers_to_transform=[0, 1, 2], layers_pattern="layers|h"),
    "all linear layers but all": dict(target_modules="all-linear", exclude_modules=ALL),
    "DoRA and biases of B": dict(use_dora=True, lora_bias=True),
    "DoRA and aLoRA": dict(use_dora=True, alora_invocation_tokens=[1]),
    "DoRA on an embedding": dict(use_dora=True, target_modules=[*ALL, "embed_tokens"]),
    "biases of B and gaussian": dict(lora_bias=True, init_lora_weights="gaussian"),
    "rsLoRA of no number": dict(use_rslora=True, lora_alpha=NAN),
}
STRICTER = {  # PEFT happens to load these; the linter does not recommend it.
    "lora_alpha": True, "lora_dropout": -1, "modules_to_save": "", "exclude_modules": False,
    "init_lora_weights": 0, "rank_pattern": {"nothing": "x"}, "layers_pattern": 0, "future": 1,
}  # fmt: skip


def nan(tensor):
    return torch.where(torch.arange(tensor.numel()).view_as(tensor) == 1, NAN, tensor)


def all_as(dtype):
    return lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()})


def put(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name]) if callable(change) else change})


TENSORS = {
    "NaN in A": put(A, nan),
    "NaN in B": put(B, nan),
    "an infinity in A": put(A, lambda t: nan(t).nan_to_num(INF)),
    "an infinity in B": put(B, lambda t: nan(t).nan_to_num(-INF)),
    "NaN in float8": put(A, lambda t: nan(t).to(torch.float8_e4m3fn)),
    "beyond float32": put(A, lambda t: t.double() * 1e300),
    "at the end of float32": put(A, lambda t: torch.full_like(t, 3e38)),
    "bfloat16": all_as(torch.bfloat16),
    "float16": all_as(torch.float16),
    "float64": all_as(torch.float64),
    "float8": all_as(torch.float8_e4m3fn),
    "whole numbers": lambda tensors: tensors.update({n: (t * 10).to(torch.int8) for n, t in tensors.items()}),
    "no tensor": lambda tensors: tensors.clear(),
    "A of three dimensions": put(A, lambda t: t[None]),
    "A of one dimension": put(A, torch.ones(4)),
    "A of none": put(A, torch.tensor(1.0)),
    "A of rank 0": put(A, lambda t: t[:0]),
    "A of width 0": put(A, lambda t: t[:, :0]),
    "A transposed": put(A, lambda t: t.T.contiguous()),
    "A with its adapter's name": lambda tensors: tensors.update(
        {f"{Q0}.lora_A.default.weight": tensors.pop(A)}
    ),
    "a stranger": put("x", torch.ones(2)),
    "an empty stranger": put("x", torch.ones(0)),
    "a layer too many": put(A.replace("layers.0", "layers.7"), torch.ones(4, 48)),
    "a magnitude": put(f"{Q0}.lora_magnitude_vector", torch.ones(48)),
    "an output head": put("base_model.model.lm_head.weight", torch.ones(320, 48)),
    "an output head of NaN": put("base_model.model.lm_head.weight", torch.full((320, 48), NAN)),
    "a larger output head": put("base_model.model.lm_head.weight", torch.ones(330, 48)),
}


def rewrite_header(change):
    def rewrite(path: Path) -> None:
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return rewrite


FILES = {  # of the weights
    "empty": lambda path: path.write_bytes(b""),
    "longer than its header says": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("/nowhere")),
    "an unknown dtype": rewrite_header(lambda header: header[A].update(dtype="F7")),
    "metadata that are no text": rewrite_header(lambda header: header.update(__metadata__={"a": 5})),
    "more metadata": rewrite_header(lambda header: header["__metadata__"].update(a="x" * 1000)),
    "no metadata": rewrite_header(lambda header: header.pop("__metadata__")),
    "a negative length": rewrite_header(lambda header: header[A].update(shape=[-1, 48])),
    "a petabyte": rewrite_header(lambda header: header[A].update(shape=[2**62, 48])),
    "tensors that overlap": rewrite_header(lambda header: header[A].update(data_offsets=[0, 768])),
}
CONFIGS = {
    "a list": lambda text: "[]",
    "nothing": lambda text: "",
    "an empty object": lambda text: "{}",
    "NaN": lambda text: "NaN",
    "a text": lambda text: '"x"',
    "a key twice, different": lambda text: text[:-2] + ', "r": 5}',
    "5,000 digits": lambda text: text.replace('"r": 4', '"r": ' + "9" * 5000),
    "100,000 brackets": lambda text: "[" * 100_000,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_dir):
    directory = tmp_path_factory.mktemp("made")
    make_base(directory / "base", model_dir)
    make_adapter(directory / "base", directory / "adapter", use_rslora=False, target_modules=ALL)
    return directory


@pytest.fixture
def place(tmp_path, made):
    """A base model in `base`, a sound LoRA on all its linear layers in `adapter`."""
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def theirs():
    return transformers_model("llama-gqa", vocab_size=320)


def in_peft(place, theirs) -> str:
    """ "fails", "differs" if a tensor stays untrained or unread or the logits are no numbers, or "loads"."""
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model = peft.PeftModel.from_pretrained(deepcopy(theirs), str(place / "adapter")).eval()
            logits = model(input_ids=torch.arange(3, 23)[None]).logits
        except Exception:  # Whatever a wrong value meets in PEFT: TypeError, AttributeError, KeyError, ...
            return "fails"
        own = peft.get_peft_model_state_dict(model)
    stored = load_file(place / "adapter" / "adapter_model.safetensors")
    stored = {key.replace(".default.", "."): tensor for key, tensor in stored.items()}  # PEFT's own name
    unread = stored.keys() - own.keys() - model.state_dict().keys()
    return "differs" if unread or own.keys() - stored.keys() or not logits.isfinite().all() else "loads"


def agrees(place, theirs) -> None:
    """Check the linter's verdicts for PEFT, with the base model and without, against PEFT's own behaviour."""
    outcome, bases = in_peft(place, theirs), (read_config(place / "base"), None)
    with_base, without = (verdicts_for_peft(place, base) for base in bases)
    if outcome == "loads":
        assert with_base | without <= {CANNOT_TELL}
    else:
        assert with_base, outcome
        assert outcome == "differs" or with_base & {WILL_NOT_LOAD, CANNOT_TELL}


def verdicts_for_peft(place, base) -> set[str]:
    findings = lint_adapter(place / "adapter", base)
    return {finding.verdict for finding in findings if finding.server == "PEFT"}


def test_the_sound_adapter_loads(place, theirs):
    assert in_peft(place, theirs) == "loads"
    agrees(place, theirs)


@pytest.mark.parametrize(
    "key, value",
    [pytest.param(key, value, id=f"{key} = {value!r:.40}") for key in VALUES for value in VALUES[key]],
)
def test_the_linter_agrees_on_a_value(place, theirs, key, value):
    change_config(place, **{key: value})
    agrees(place, theirs)


@pytest.mark.parametrize("case", COMBINATIONS)
def test_the_linter_agrees_on_values_that_meet(place, theirs, case):
    change_config(place, **COMBINATIONS[case])
    agrees(place, theirs)


@pytest.mark.parametrize("case", TENSORS)
def test_the_linter_agrees_on_tensors(place, theirs, case):
    change_tensors(place, TENSORS[case])
    agrees(place, theirs)


@pytest.mark.parametrize("case", FILES)
def test_the_linter_agrees_on_files_of_weights(place, theirs, case):
    FILES[case](place / "adapter" / "adapter_model.safetensors")
    agrees(place, theirs)


@pytest.mark.parametrize("case", CONFIGS)
def test_the_linter_agrees_on_files_of_configurations(place, theirs, case):
    path = place / "adapter" / "adapter_config.json"
    path.write_text(CONFIGS[case](path.read_text()))
    agrees(place, theirs)


@pytest.mark.parametrize("key", STRICTER)
def test_the_linter_is_stricter_than_peft_where_peft_takes_a_wrong_value_by_chance(place, theirs, key):
    change_config(place, **{key: STRICTER[key]})
    assert in_peft(place, theirs) == "loads"
    assert verdicts_for_peft(place, None)


def test_a_key_that_is_set_twice_is_refused_although_peft_takes_the_last_value(place, theirs):
    path = place / "adapter" / "adapter_config.json"
    path.write_text(path.read_text()[:-2] + ', "r": 4}')
    assert in_peft(place, theirs) == "loads"
    assert verdicts_for_peft(place, None) == {WILL_NOT_LOAD}


def test_an_initialisation_that_would_take_peft_years_is_refused(place):
    change_config(place, init_lora_weights="pissa_niter_1000000000000")
    assert verdicts_for_peft(place, None) == {WILL_NOT_LOAD}


# ---- adapters that PEFT saved with a feature that only tensors tell ----


@pytest.mark.parametrize(
    "settings",
    [
        dict(modules_to_save=["norm"]),
        dict(bias="all"),
        dict(lora_bias=True),
        dict(layers_to_transform=[1]),
        dict(exclude_modules=".*up_proj", target_modules="all-linear"),
    ],
    ids=str,
)
def test_a_feature_whose_tensors_are_all_there_loads_and_not_if_one_is_taken_away(place, theirs, settings):
    peft = pytest.importorskip("peft")
    shutil.rmtree(place / "adapter")
    config = peft.LoraConfig(
        **dict(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM") | settings
    )
    model = peft.get_peft_model(deepcopy(theirs), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(place / "adapter"))
    assert in_peft(place, theirs) == "loads"
    agrees(place, theirs)
    change_tensors(place, lambda tensors: tensors.pop(next(k for k in tensors if "layers.1" in k)))
    assert in_peft(place, theirs) != "loads"
    agrees(place, theirs)
