"""The linter's verdicts: PEFT's are compared with PEFT itself, vLLM's and SGLang's with their rules."""

import json
import shutil
import struct
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.families import relative_error, transformers_model
from support.merging import adapted, change_config, change_tensors, make_adapter, make_base
from support.tiny import TOLERANCE

from minilora import UserError, load_adapter, load_model
from minilora.adapters.lint import (
    LOADS_WRONGLY,
    NEEDS_OPTION,
    SERVERS,
    WILL_NOT_LOAD,
    Finding,
    findings_text,
    lint_adapter,
    loads,
)
from minilora.adapters.peft_format import PEFT_DEFAULTS
from minilora.formats.weights import read_config
from minilora.system import patterns

PREFIX = "base_model.model.model.layers"
Q0, V0, UP1 = f"{PREFIX}.0.self_attn.q_proj", f"{PREFIX}.0.self_attn.v_proj", f"{PREFIX}.1.mlp.up_proj"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, model_dir):
    directory = tmp_path_factory.mktemp("made")
    make_base(directory / "base", model_dir)
    make_adapter(directory / "base", directory / "adapter", use_rslora=False, target_modules=ALL)
    return directory


@pytest.fixture
def place(tmp_path, made):
    """A base model in `base`. In `adapter` a random plain LoRA on all linear layers, which every server loads."""
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def lint(place, with_base=True) -> list[Finding]:
    return lint_adapter(place / "adapter", read_config(place / "base") if with_base else None)


def verdicts(place, server, with_base=True) -> list[str]:
    return [finding.verdict for finding in lint(place, with_base) if finding.server == server]


def reasons(place, server, with_base=True) -> str:
    return "\n".join(f"{f.verdict}: {f.why}" for f in lint(place, with_base) if f.server == server)


# ---- PEFT itself -------------------------------------------------------------------------------------------------------


def in_peft(place) -> torch.Tensor | None:
    """Logits of the base model with the adapter in PEFT, or None if PEFT does not load it."""
    peft = pytest.importorskip("peft")
    base = transformers_model("llama-gqa", vocab_size=320)
    torch.manual_seed(0)  # PEFT draws the tensors that the file lacks.
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(base, str(place / "adapter")).eval()
            return model(input_ids=torch.arange(3, 23)[None]).logits
    except (ValueError, KeyError, RuntimeError, OSError, SafetensorError):
        return None


def made_here(place, **settings) -> torch.Tensor:
    """Replace the adapter by another random one that minilora writes. Returns its logits."""
    make_adapter(place / "base", place / "adapter", **settings)
    return adapted(place)(torch.arange(3, 23)[None])


@pytest.fixture(scope="module")
def trained(made) -> torch.Tensor:
    """Logits with the unchanged adapter."""
    return in_peft(made)


def saved_by_peft(place, **settings) -> torch.Tensor:
    """Replace the adapter by a random one that PEFT writes. Returns its logits."""
    peft = pytest.importorskip("peft")
    shutil.rmtree(place / "adapter")
    torch.manual_seed(1)
    model = peft.get_peft_model(
        transformers_model("llama-gqa", vocab_size=320), peft.LoraConfig(**settings, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(place / "adapter"))
    return model.eval()(input_ids=torch.arange(3, 23)[None]).logits


def drop(*keys):
    return lambda place: change_tensors(place, lambda tensors: [tensors.pop(key) for key in keys])


def rename_all(place) -> None:
    path = place / "adapter" / "adapter_model.safetensors"
    save_file(
        {key.removeprefix("base_model.model."): tensor for key, tensor in load_file(path).items()}, path
    )


def without(key):
    def change(place):
        path = place / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))

    return change


GOOD = {  # Each function returns the logits of training, or None if they do not change.
    "as minilora writes it": lambda place: None,
    "rsLoRA": lambda place: made_here(place, use_rslora=True),
    "DoRA": lambda place: saved_by_peft(place, r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "full names": lambda place: made_here(place, target_modules=["model.layers.1.mlp.up_proj"]),
    "a regular expression": lambda place: change_config(
        place, target_modules=r".*\.(self_attn|mlp)\..*_proj"
    ),
    "all linear layers": lambda place: change_config(place, target_modules="all-linear"),
    "a half-misspelt list": lambda place: change_config(place, target_modules=[*ALL, "qkv_porj"]),
    "ranks and alphas by layer": lambda place: saved_by_peft(
        place,
        r=4,
        target_modules=ALL,
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7},
        alpha_pattern={"v_proj": 1},
    ),
    "trained copies of modules": lambda place: saved_by_peft(
        place, r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
    ),
    "trained biases": lambda place: saved_by_peft(
        place, r=4, target_modules=["q_proj", "up_proj"], bias="lora_only"
    ),
    "biases of B": lambda place: saved_by_peft(place, r=4, target_modules=["q_proj"], lora_bias=True),
    "an adapted embedding": lambda place: saved_by_peft(
        place, r=4, target_modules=["q_proj", "embed_tokens"]
    ),
    "an initialisation that changes nothing": lambda place: change_config(
        place, init_lora_weights="gaussian"
    ),
    "other tensors beside": lambda place: save_file(
        {"a": torch.ones(2)}, place / "adapter" / "optimizer.safetensors"
    ),
}
WRONG = {  # PEFT loads these, and computes other logits than in training.
    "a layer without tensors": drop(f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"),
    "an A without B": drop(f"{UP1}.lora_B.weight"),
    "a magnitude without DoRA": lambda place: change_tensors(
        place, lambda tensors: tensors.update({f"{Q0}.lora_magnitude_vector": torch.ones(48)})
    ),
    "DoRA without magnitudes": lambda place: change_config(place, use_dora=True),
    "names without their prefix": rename_all,
    "targets that leave layers out": lambda place: change_config(place, target_modules=["q_proj", "v_proj"]),
    "no alpha": without("lora_alpha"),
}
REFUSED = {
    "no weights": lambda place: (place / "adapter" / "adapter_model.safetensors").unlink(),
    "weights cut short": lambda place: (place / "adapter" / "adapter_model.safetensors").write_bytes(
        b"\xff" * 40
    ),
    "a configuration cut short": lambda place: (place / "adapter" / "adapter_config.json").write_text(
        '{"r": 4'
    ),
    "no kind": without("peft_type"),
    "another kind": lambda place: change_config(place, peft_type="LOHO"),
    "another rank": lambda place: change_config(place, r=5),
    "no rank at all": lambda place: change_config(place, r=0),
    "another width": lambda place: change_tensors(
        place, lambda tensors: tensors.update({f"{Q0}.lora_A.weight": torch.ones(4, 47)})
    ),
    "targets that no layer has": lambda place: change_config(place, target_modules=["query", "value"]),
    "an unknown initialisation": lambda place: change_config(place, init_lora_weights="future"),
}


def test_the_adapter_to_compare_with_does_something(place, trained):
    base = transformers_model("llama-gqa", vocab_size=320)
    with torch.no_grad():
        before = base(input_ids=torch.arange(3, 23)[None]).logits
    assert relative_error(trained, before) > 100 * TOLERANCE
    assert lint(place) == lint(place, with_base=False) == []


@pytest.mark.parametrize("case", GOOD)
@torch.no_grad()
def test_an_adapter_that_peft_loads_as_it_was_trained_has_no_finding(place, trained, case):
    other = GOOD[case](place)
    assert relative_error(in_peft(place), trained if other is None else other) <= TOLERANCE
    assert reasons(place, "PEFT") == reasons(place, "PEFT", with_base=False) == ""


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_that_peft_loads_differently_loads_wrongly(place, trained, case):
    WRONG[case](place)
    loaded = in_peft(place)
    assert loaded is not None
    if case != "a magnitude without DoRA":  # PEFT loses the trained length and keeps the rest.
        assert relative_error(loaded, trained) > 100 * TOLERANCE
    assert set(verdicts(place, "PEFT")) == {LOADS_WRONGLY}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_peft_refuses_will_not_load(place, case):
    REFUSED[case](place)
    assert in_peft(place) is None
    assert WILL_NOT_LOAD in verdicts(place, "PEFT")


def test_a_key_that_peft_does_not_know_is_reported_as_ignored(place):
    change_config(place, future_feature={"on": True}, other_feature=None)
    assert in_peft(place) is not None
    assert reasons(place, "PEFT") == "loads wrongly: future_feature = {'on': True} is not known, and ignored"


# ---- vLLM's and SGLang's rules, from their code ----------------------------------------------------------------------


def renamed(place, old, new) -> None:
    def change(tensors):
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    change_tensors(place, change)


def only(*leaves):
    return lambda place: make_adapter(
        place / "base", place / "adapter", use_rslora=False, target_modules=leaves
    )


def added(name, *shape):
    return lambda place: change_tensors(place, lambda tensors: tensors.update({name: torch.ones(shape)}))


VLLM = {
    "r": (without("r"), WILL_NOT_LOAD, "the key r is missing"),
    "lora_alpha": (without("lora_alpha"), WILL_NOT_LOAD, "the key lora_alpha is missing"),
    "target_modules": (without("target_modules"), WILL_NOT_LOAD, "the key target_modules is missing"),
    "DoRA": (
        lambda place: change_config(place, use_dora=True),
        WILL_NOT_LOAD,
        "use_dora = True is not supported",
    ),
    "lora_bias": (
        lambda place: change_config(place, lora_bias=True),
        WILL_NOT_LOAD,
        "lora_bias = True is not supported",
    ),
    "bias": (lambda place: change_config(place, bias="all"), WILL_NOT_LOAD, "bias = 'all' is not supported"),
    "modules_to_save": (
        lambda place: change_config(place, modules_to_save=["lm_head", "score"]),
        WILL_NOT_LOAD,
        "modules_to_save = ['lm_head'] is not supported",
    ),
    "PiSSA": (
        lambda place: change_config(place, init_lora_weights="pissa_niter_4"),
        WILL_NOT_LOAD,
        "'pissa_niter_4' changed the base",
    ),
    "LoRA-GA": (
        lambda place: change_config(place, init_lora_weights="lora_ga"),
        WILL_NOT_LOAD,
        "'lora_ga' changed the base",
    ),
    "aLoRA": (
        lambda place: change_config(place, alora_invocation_tokens=[1]),
        WILL_NOT_LOAD,
        "alora_invocation_tokens = [1]",
    ),
    "replication": (
        lambda place: change_config(place, layer_replication=[[0, 2]]),
        WILL_NOT_LOAD,
        "layer_replication",
    ),
    "BD-LoRA": (lambda place: change_config(place, use_bdlora={"nblocks": 2}), WILL_NOT_LOAD, "use_bdlora"),
    "QALoRA": (lambda place: change_config(place, use_qalora=True), WILL_NOT_LOAD, "use_qalora = True"),
    "rank 17": (
        lambda place: change_rank(place, 17),
        NEEDS_OPTION,
        "started with --max-lora-rank 32: the rank is 17",
    ),
    "rank 513": (lambda place: change_rank(place, 513), WILL_NOT_LOAD, "rank 513 is above 512"),
    "a rank of one layer": (
        lambda place: change_config(place, rank_pattern={"q_proj": 600}),
        WILL_NOT_LOAD,
        "rank 600 is above 512",
    ),
    "another tensor": (
        added(f"{PREFIX}.0.input_layernorm.weight", 48),
        WILL_NOT_LOAD,
        "input_layernorm.weight is no LoRA tensor",
    ),
    "a resized head": (
        added("base_model.model.lm_head.weight", 330, 48),
        WILL_NOT_LOAD,
        "lm_head.weight is no LoRA tensor",
    ),
    "a magnitude": (
        added(f"{Q0}.lora_magnitude_vector", 48),
        WILL_NOT_LOAD,
        "lora_magnitude_vector is no LoRA tensor",
    ),
    "half a pair": (drop(f"{Q0}.lora_B.weight"), WILL_NOT_LOAD, "q_proj.lora_B.weight is missing"),
    "another layer": (
        lambda place: renamed(place, "1.mlp.up_proj", "7.mlp.up_proj"),
        LOADS_WRONGLY,
        "layers.7.mlp.up_proj.lora_A.weight is of no layer of the model, and ignored",
    ),
    "another width": (added(f"{Q0}.lora_A.weight", 4, 47), WILL_NOT_LOAD, "q_proj.lora_A.weight is (4, 47)"),
    "another rank": (lambda place: change_config(place, r=2), LOADS_WRONGLY, "not of rank r = 2; and"),
}
SGLANG = {
    "peft_type": (without("peft_type"), WILL_NOT_LOAD, "the key peft_type is missing"),
    "another kind": (
        lambda place: change_config(place, peft_type="LOHA"),
        WILL_NOT_LOAD,
        "peft_type is 'LOHA'",
    ),
    "r": (without("r"), WILL_NOT_LOAD, "the key r is missing"),
    "rsLoRA": (
        lambda place: change_config(place, use_rslora=True),
        LOADS_WRONGLY,
        "use_rslora is ignored: scaled by alpha / r",
    ),
    "a regular expression": (
        lambda place: change_config(place, target_modules=r".*_proj"),
        WILL_NOT_LOAD,
        "target_modules '.*_proj' is a regular expression",
    ),
    "DoRA": (
        lambda place: change_config(place, use_dora=True),
        WILL_NOT_LOAD,
        "use_dora = True is not supported",
    ),
    "q only": (only("q_proj"), WILL_NOT_LOAD, "q_proj is adapted without v_proj"),
    "q and k": (only("q_proj", "k_proj"), WILL_NOT_LOAD, "q_proj is adapted without v_proj"),
    "v only": (only("v_proj"), WILL_NOT_LOAD, "v_proj is adapted without q_proj"),
    "k and v": (
        only("k_proj", "v_proj"),
        WILL_NOT_LOAD,
        "k_proj is adapted without q_proj; v_proj is adapted without q_proj",
    ),
    "up only": (only("up_proj"), WILL_NOT_LOAD, "up_proj is adapted without gate_proj"),
    "ranks by layer": (
        lambda place: saved_by_peft(
            place, r=4, target_modules=["o_proj", "down_proj"], rank_pattern={"o_proj": 2}
        ),
        WILL_NOT_LOAD,
        "model.layers.0.self_attn.o_proj has rank 2, not r = 4",
    ),
    "alphas by layer": (
        lambda place: change_config(place, alpha_pattern={"q_proj": 9}),
        LOADS_WRONGLY,
        "alpha_pattern is ignored",
    ),
    "LoftQ": (
        lambda place: change_config(place, init_lora_weights="loftq"),
        LOADS_WRONGLY,
        "'loftq' changed the base model",
    ),
    "LoRA-GA": (
        lambda place: change_config(place, init_lora_weights="lora_ga"),
        LOADS_WRONGLY,
        "'lora_ga' changed the base model",
    ),
    "trained copies": (
        lambda place: saved_by_peft(place, r=4, target_modules=["o_proj"], modules_to_save=["lm_head"]),
        LOADS_WRONGLY,
        "base_model.model.lm_head.weight is ignored",
    ),
    "another tensor": (
        added(f"{PREFIX}.0.input_layernorm.weight", 48),
        WILL_NOT_LOAD,
        "input_layernorm.weight is no LoRA tensor",
    ),
    "half a pair": (drop(f"{Q0}.lora_B.weight"), WILL_NOT_LOAD, "q_proj.lora_B.weight is missing"),
    "other tensors beside": (
        lambda place: save_file({"a": torch.ones(2)}, place / "adapter" / "optimizer.safetensors"),
        WILL_NOT_LOAD,
        "optimizer.safetensors is read too",
    ),
}


BY_NAME = {  # old, new -> the verdicts of PEFT, vLLM and SGLang on keys that are renamed so; None: loads
    ("", ""): (None, None, None),
    ("base_model.model.", ""): (LOADS_WRONGLY, None, None),
    ("base_model.model.model.", "base_model.model."): (LOADS_WRONGLY, LOADS_WRONGLY, None),
    ("model.layers", "_orig_mod.model.layers"): (LOADS_WRONGLY, LOADS_WRONGLY, None),
    ("self_attn.", "_fsdp_wrapped_module.self_attn."): (LOADS_WRONGLY, LOADS_WRONGLY, None),
    ("mlp.", "_checkpoint_wrapped_module.mlp."): (LOADS_WRONGLY, LOADS_WRONGLY, None),
    ("lora_A.weight", "lora_A.default.weight"): (None, WILL_NOT_LOAD, None),
    ("lora_A.weight", "lora_A.other.weight"): (LOADS_WRONGLY, WILL_NOT_LOAD, WILL_NOT_LOAD),
    ("q_proj", "query"): (LOADS_WRONGLY, WILL_NOT_LOAD, WILL_NOT_LOAD),
}


@pytest.mark.parametrize("names", BY_NAME, ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_vllm_finds_layers_by_full_names_and_sglang_by_number_and_leaf(place, names, with_base):
    renamed(place, *names)
    for server, verdict in zip(SERVERS, BY_NAME[names], strict=True):
        found = set(verdicts(place, server, with_base))
        assert found == set() if verdict is None else verdict in found, (server, found)


def test_an_adapter_without_tensors_loads_everywhere_and_nothing_is_applied(place):
    change_tensors(place, lambda tensors: tensors.clear())
    for with_base in (True, False):
        assert [f.verdict for f in lint(place, with_base)] == [LOADS_WRONGLY] * 3
    assert "nothing is applied" in reasons(place, "vLLM") and "nothing is applied" in reasons(place, "SGLang")


@pytest.mark.parametrize("settings", [dict(target_modules=["q_proj", "v_proj", "embed_tokens", "lm_head"])])
def test_the_base_weights_beside_updates_of_embeddings_are_no_finding_unless_the_vocabulary_differs(
    place, settings
):
    saved_by_peft(place, r=4, **settings)
    assert lint(place) == lint(place, with_base=False) == []
    key = "base_model.model.lm_head.base_layer.weight"
    change_tensors(place, lambda tensors: tensors.update({key: torch.ones(330, 48)}))
    assert {f.server for f in lint(place)} == set(SERVERS)


def test_sglang_passes_over_an_embedding_that_target_modules_does_not_name(place):
    saved_by_peft(place, r=4, target_modules=["q_proj", "v_proj"])
    added("base_model.model.lm_head.lora_A.weight", 4, 48)(place)
    added("base_model.model.lm_head.lora_B.weight", 320, 4)(place)
    assert "lm_head.lora_A.weight is ignored" in reasons(place, "SGLang")
    assert reasons(place, "vLLM") == ""


@pytest.mark.parametrize("init", ["lora_ga", "pissa_niter_4"])
def test_peft_starts_elsewhere_where_an_initialisation_cannot_be_repeated(place, init):
    change_config(place, init_lora_weights=init)
    assert verdicts(place, "PEFT") == [LOADS_WRONGLY] and f"{init!r} changed" in reasons(place, "PEFT")


@pytest.mark.parametrize("init", ["pissa", "olora", "OLoRA", "mica", "MiCA", "Gaussian", "eva", None, False])
@torch.no_grad()
def test_peft_repeats_other_initialisations_and_the_linter_says_loads(place, init):
    trained = saved_by_peft(place, r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    # PiSSA and OLoRA decompose the same W twice, to the bit; what is left is the order of float32 sums.
    assert relative_error(in_peft(place), trained) <= TOLERANCE
    assert reasons(place, "PEFT") == reasons(place, "PEFT", with_base=False) == ""


@pytest.mark.parametrize("init", ["lora_ga", "pissa_niter_4"])
@torch.no_grad()
def test_peft_itself_loads_these_two_wrongly(place, init):
    peft = pytest.importorskip("peft")
    base, tokens = transformers_model("llama-gqa", vocab_size=320), torch.arange(3, 23)[None]
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=init,
        lora_ga_config=peft.LoraGAConfig() if init == "lora_ga" else None,
    )  # fmt: skip
    shutil.rmtree(place / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if init == "lora_ga":
            with torch.enable_grad():
                peft.preprocess_loraga(
                    base, config, lambda: base(input_ids=tokens, labels=tokens).loss.backward()
                )
        model = peft.get_peft_model(base, config).eval()
        model.save_pretrained(place / "adapter")
    assert relative_error(in_peft(place), model(input_ids=tokens).logits) > 100 * TOLERANCE
    assert verdicts(place, "PEFT") == [LOADS_WRONGLY]


def pickled(place) -> Path:
    """The adapter's tensors as older versions of PEFT wrote them."""
    path = place / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_name("adapter_model.bin"))
    path.unlink()
    return path.with_name("adapter_model.bin")


@torch.no_grad()
def test_a_pickled_adapter_is_read_as_peft_reads_it_and_announced(place, capsys):
    expected = adapted(place)(torch.arange(3, 23)[None])
    pickled(place)
    capsys.readouterr()
    assert lint(place) == []
    assert "reading pickled weights" in capsys.readouterr().err
    for found in in_peft(place), adapted(place)(torch.arange(3, 23)[None]):
        assert relative_error(found, expected) <= TOLERANCE


def test_a_malicious_pickle_is_a_finding_of_every_server_and_is_not_run(place, tmp_path):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    torch.save({"a": Malicious()}, pickled(place))
    findings = lint(place)
    assert [finding.server for finding in findings] == list(SERVERS)
    assert all("not run" in f.why and f.verdict == WILL_NOT_LOAD for f in findings)
    assert not (tmp_path / "run").exists()


def change_rank(place, r: int) -> None:
    make_adapter(place / "base", place / "adapter", use_rslora=False, target_modules=ALL, r=r)


@pytest.mark.parametrize("case", VLLM)
def test_each_rule_of_vllm(place, case):
    change, verdict, why = VLLM[case]
    assert reasons(place, "vLLM") == ""
    change(place)
    assert f"{verdict}: " in reasons(place, "vLLM") and why in reasons(place, "vLLM"), reasons(place, "vLLM")


@pytest.mark.parametrize("case", SGLANG)
def test_each_rule_of_sglang(place, case):
    change, verdict, why = SGLANG[case]
    assert reasons(place, "SGLang") == ""
    change(place)
    assert f"{verdict}: " in reasons(place, "SGLang") and why in reasons(place, "SGLang"), reasons(
        place, "SGLang"
    )


@pytest.mark.parametrize(
    "leaves", [["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj"], ["gate_proj"], ["o_proj", "down_proj"]]
)
def test_layers_that_the_servers_fuse_themselves_are_no_finding(place, leaves):
    only(*leaves)(place)
    assert lint(place) == lint(place, with_base=False) == []


@pytest.mark.parametrize(
    "change", [dict(use_rslora=True), dict(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 1})]
)
def test_vllm_honours_rslora_and_patterns(place, change):
    change_config(place, **change)
    assert reasons(place, "vLLM") == ""


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(call):
    """Run `lint_adapter.py ARGUMENTS`: (exit code, stdout, stderr)."""
    return partial(call, "lint_adapter")


def test_the_command_prints_a_line_for_each_server_and_exits_with_0_if_all_load(command, place):
    assert command(place / "adapter", "--model", place / "base") == (
        0,
        "PEFT    loads\nvLLM    loads\nSGLang  loads\n",
        "",
    )
    change_rank(place, 20)
    code, out, _ = command(place / "adapter")
    assert code == 0 and "vLLM    loads, if      started with --max-lora-rank 32: the rank is 20\n" in out


def test_the_command_prints_reason_and_remedy_and_exits_with_1_if_some_do_not_load(command, place):
    change_config(place, use_rslora=True)
    assert command(place / "adapter") == (
        1,
        "PEFT    loads\n"
        "vLLM    loads\n"
        "SGLang  loads wrongly  use_rslora is ignored: scaled by alpha / r, not alpha / sqrt(r)\n"
        f"                       -> python scripts/merge.py --adapter {place / 'adapter'} --export_adapter NEW\n",
        "",
    )


def test_mistakes_of_the_user_are_one_line_and_exit_with_2(command, place):
    (place / "empty").mkdir()
    for arguments, message in [
        ((place / "nowhere",), "no such directory"),
        ((place / "empty",), "is not an adapter: it has no adapter_config.json"),
        ((place / "adapter", "--model", place / "empty"), "is not a model directory"),
    ]:
        code, out, err = command(*arguments)
        assert code == 2 and message in err and err.count("\n") == 1 and not out


def test_a_directory_that_no_program_can_read_is_a_finding_of_every_server(place):
    for damage in REFUSED["no weights"], REFUSED["a configuration cut short"]:
        damage(place)
        findings = lint(place)
        assert [finding.server for finding in findings] == list(SERVERS) and not loads(findings)
        assert {finding.verdict for finding in findings} == {WILL_NOT_LOAD}
    with pytest.raises(UserError, match="is not an adapter"):
        lint_adapter(place / "base")


@pytest.mark.parametrize("value", [None, "4", [4], {}, 4.5, True, -1])
@pytest.mark.parametrize(
    "key", ["r", "lora_alpha", "target_modules", "rank_pattern", "modules_to_save", "bias", "peft_type"]
)
def test_any_value_of_any_key_is_judged_without_a_crash(place, key, value):
    change_config(place, **{key: value})
    assert findings_text(lint(place)).count("\n") >= 2
    change_config(place, **{key: {"q_proj": value} if key == "rank_pattern" else [value]})
    assert findings_text(lint(place)).count("\n") >= 2


# ---- files that other people made ------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([*ALL, "lm_head", "(", ".*"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.sampled_from(ALL), inner, max_size=3)
    ),
    max_leaves=6,
)
HOSTILE = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text() | st.sampled_from(
    ["", "a" * 10_000, "\x1b[31m\n\r\x07", "\ud800", "\u202e", f"{Q0}.lora_A.weight"]
)


def judged(place) -> list[Finding]:
    """The findings, in lines that end where the linter ends them, of printable text and bounded length."""
    findings = lint(place) + lint(place, with_base=False)
    lines = findings_text(findings).split("\n")
    assert all(line.isprintable() and len(line) < 600 for line in lines)
    assert len(lines) <= 2 * len(findings) + len(SERVERS)
    return findings


@given(
    changes=st.dictionaries(st.sampled_from([*PEFT_DEFAULTS, "future", "self"]), JSON, min_size=1, max_size=4)
)
@HOSTILE
def test_any_json_at_any_key_is_judged_without_a_crash(place, changes):
    change_config(place, **changes)
    judged(place)


@given(changes=st.dictionaries(NAMES, JSON, min_size=1, max_size=2))
@HOSTILE
def test_any_name_of_a_key_is_judged_without_a_crash(place, changes):
    change_config(place, **changes)
    judged(place)


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(
            ["F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "U8", "BOOL", "C64"]
        )
        | JSON,
        "shape": st.lists(st.integers(-1, 10) | st.just(2**63), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 10**4), min_size=2, max_size=2) | JSON,
    },
)


@given(
    name=NAMES | st.none(),
    entry=ENTRY,
    cut=st.integers(0, 300) | st.none(),
    length=st.integers(0, 2**64 - 1) | st.none(),
)
@HOSTILE
def test_any_header_of_the_weights_is_judged_without_a_crash(place, made, name, entry, cut, length):
    data = (made / "adapter" / "adapter_model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    key = f"{Q0}.lora_A.weight" if name is None else name
    header[key] = header.get(key, {}) | entry
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text) if length is None else length) + text + data[8 + size :]
    (place / "adapter" / "adapter_model.safetensors").write_bytes(data if cut is None else data[:cut])
    judged(place)


@pytest.mark.parametrize("name", ["a" * 10_000, "\x1b[2J", "two\nlines", "\u202egnp.exe"])
def test_names_of_tensors_are_cut_and_escaped_and_the_reason_stays(place, name):
    change_tensors(place, lambda tensors: tensors.update({name: torch.ones(1)}))
    (finding,) = (f for f in judged(place)[:3] if f.server == "PEFT")
    assert findings_text([finding]).split("\n")[0].endswith("is not expected")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["A", "B", "lora_alpha", "alpha_pattern"])
def test_a_number_that_is_none_is_wrong_in_every_program(place, where, bad):
    if where in ("A", "B"):
        change_tensors(place, lambda tensors: tensors[f"{Q0}.lora_{where}.weight"].view(-1)[5].fill_(bad))
    else:
        change_config(place, **{where: bad if where == "lora_alpha" else {"q_proj": bad}})
    assert {finding.server for finding in lint(place)} == set(SERVERS) and not loads(lint(place))


SLOW = ["(a+)+$", "(.*)*x", "(a|a)*$", "(.*.*)*!", "(.?){30}.{30}!", "(([a-z])+.)+[A-Z]([a-z])+$"]


@pytest.mark.parametrize("key", ["target_modules", "rank_pattern", "alpha_pattern", "exclude_modules"])
@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_would_take_years_is_refused(place, monkeypatch, key, pattern):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    name = f"base_model.model.{'a' * 60}!"
    change_tensors(place, lambda tensors: tensors.update({f"{name}.lora_A.weight": torch.ones(4, 48)}))
    change_config(place, **{key: {pattern: 4} if "_pattern" in key else pattern})
    assert WILL_NOT_LOAD in verdicts(place, "PEFT", with_base=False)


def test_an_adapter_with_such_a_pattern_is_not_loaded_and_the_model_stays_as_it_was(place, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    change_config(place, target_modules="((.*)*)*!")
    model = load_model(place / "base")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(
        UserError, match=r"adapter_config.json: target_modules .* takes more than 1 seconds"
    ) as error:
        load_adapter(model, place / "adapter")
    assert "\n" not in str(error.value) and [name for name, _ in model.named_modules()] == names


def test_an_adapter_with_a_pattern_that_people_write_is_loaded(place):
    change_config(place, target_modules=r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")
    model = load_model(place / "base")
    load_adapter(model, place / "adapter")
    assert model.model.layers[0].mlp.up_proj.active == "default"
