"""Adapters on disk: PEFT's format in both directions, and what does not fit is refused."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import relative_error, same_model_here, transformers_model
from support.tiny import ALL_SEVEN, CASES, TOLERANCE, ids, randomize, tiny_model

from minilora import LoraConfig, UserError, add_lora, load_adapter, save_adapter, set_adapter
from minilora.adapters.file import stored_tensors
from minilora.adapters.peft_format import PEFT_DEFAULTS
from minilora.adapters.save_load import read_adapter, read_adapter_config, vocabulary_of
from minilora.lora import lora_layers
from minilora.new_rows import grow_vocabulary
from minilora.wrapping import adapter_names

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


def peft_adapter(family: str, directory, **lora):
    """A PEFT model with a random adapter, saved by PEFT."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    targets = lora.get("target_modules")
    lora["target_modules"] = targets if isinstance(targets, str) else list(targets)
    model = peft.get_peft_model(
        transformers_model(family), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **lora)
    )
    model.save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_an_adapter_saved_by_peft_gives_the_same_logits_here(case, tmp_path):
    theirs = peft_adapter("llama-gqa", tmp_path, **CASES[case])
    ours = same_model_here(transformers_model("llama-gqa"))
    base = ours(ids(2, 15))
    load_adapter(ours, tmp_path)
    assert relative_error(ours(ids(2, 15)), theirs(input_ids=ids(2, 15)).logits) <= TOLERANCE
    assert relative_error(ours(ids(2, 15)), base) > 100 * TOLERANCE  # the adapter does something


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_an_adapter_saved_here_gives_the_same_logits_in_peft(case, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers_model("qwen3-qk-norm")
    ours = same_model_here(base)
    add_lora(ours, LoraConfig(**CASES[case]))
    randomize(ours)
    save_adapter(ours, tmp_path, base_model_name_or_path="some/base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert relative_error(ours(ids(2, 15)), theirs(input_ids=ids(2, 15)).logits) <= TOLERANCE


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ALL_SEVEN])
def test_names_shapes_dtypes_metadata_and_config_keys_are_identical_to_pefts(targets, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    lora = dict(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=targets)
    peft_adapter("llama-gqa", tmp_path / "theirs", **lora)
    ours = same_model_here(transformers_model("llama-gqa"))
    add_lora(ours, LoraConfig(**lora))
    save_adapter(ours, tmp_path / "ours")
    described = {}
    for side in ("ours", "theirs"):
        with safetensors.safe_open(tmp_path / side / "adapter_model.safetensors", "pt") as file:
            entries = {k: (file.get_slice(k).get_shape(), file.get_slice(k).get_dtype()) for k in file.keys()}
            described[side] = entries, file.metadata()
    assert described["ours"] == described["theirs"]
    mine, other = (
        json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")
    )
    assert mine.keys() == other.keys()
    assert sorted(mine.pop("target_modules")) == sorted(other.pop("target_modules"))
    other["init_lora_weights"] = True  # the fixture asks PEFT for a random B
    assert mine == other


@torch.no_grad()
def test_save_then_load_restores_every_bit_under_any_name(tmp_path):
    model = tiny_model()
    add_lora(model, LoraConfig(r=3, target_modules=("q_proj", "up_proj"), use_rslora=True))
    randomize(model)
    expected = model(ids(1, 9))
    save_adapter(model, tmp_path)
    fresh = tiny_model()
    load_adapter(fresh, tmp_path, name="again")
    assert torch.equal(fresh(ids(1, 9)), expected)
    load_adapter(fresh, tmp_path, name="twice")
    assert adapter_names(fresh) == ["again", "twice"]
    set_adapter(fresh, None)
    assert not torch.equal(fresh(ids(1, 9)), expected)


def test_targets_are_written_as_leaf_names_unless_these_match_more_layers(tmp_path):
    for targets, written in (
        ("all-linear", sorted(ALL_SEVEN)),
        (r".*\.1\..*q_proj", ["model.layers.1.self_attn.q_proj"]),
    ):
        model = tiny_model()
        add_lora(model, LoraConfig(target_modules=targets))
        save_adapter(model, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == written


def saved(tmp_path, **config):
    model = tiny_model()
    add_lora(model, LoraConfig(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return tmp_path


@pytest.mark.parametrize(
    "config, message",
    [
        (
            dict(use_dora=True),
            "missing base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        ),
        (dict(use_dora="yes"), "adapter_config.json: use_dora must be true or false, not 'yes'"),
        (dict(r="4"), "adapter_config.json: r must be a whole number from 1 to 65,536, not '4'"),
        (dict(lora_alpha="16"), "adapter_config.json: lora_alpha must be a number above 0, not '16'"),
        (dict(lora_alpha=float("nan")), "adapter_config.json: lora_alpha must be a number above 0, not nan"),
        (dict(lora_alpha=float("inf")), "adapter_config.json: lora_alpha must be a number above 0, not inf"),
        (
            dict(lora_dropout="x"),
            "adapter_config.json: lora_dropout must be a number of at least 0 and below 1, not 'x'",
        ),
        (
            dict(target_modules=3),
            "adapter_config.json: target_modules must be text or a list of texts, not 3",
        ),
        (
            dict(target_modules=["q_proj", 3]),
            "adapter_config.json: target_modules must be text or a list of texts, not ['q_proj', 3]",
        ),
        (
            dict(base_model_name_or_path=3),
            "adapter_config.json: base_model_name_or_path must be text in one line of at most",
        ),
        (
            dict(base_model_name_or_path="a\x1b[2Jb"),
            "adapter_config.json: base_model_name_or_path must be text",
        ),
        (
            dict(base_model_name_or_path="m" * 1001),
            "adapter_config.json: base_model_name_or_path must be text",
        ),
        (dict(r=10**18), "adapter_config.json: r must be a whole number from 1 to 65,536, not 1000000000"),
        (
            dict(modules_to_save={}),
            "adapter_config.json: modules_to_save must be a list of texts or null, not {}",
        ),
        (dict(rank_pattern=[1]), "adapter_config.json: rank_pattern must be an object, not [1]"),
        (
            dict(rank_pattern={"q_proj": 0}),
            "adapter_config.json: rank_pattern.q_proj must be a whole number from 1 to 65,536, not 0",
        ),
        (
            dict(alpha_pattern={"q_proj": "8"}),
            "adapter_config.json: alpha_pattern.q_proj must be a number above 0, not '8'",
        ),
        (
            dict(trainable_token_indices={"lm_head": ["a"]}),
            "trainable_token_indices.lm_head must be a list of whole numbers, not ['a']",
        ),
        (dict(r=True), "adapter_config.json: r must be a whole number from 1 to 65,536, not True"),
        (dict(r=2.0), "adapter_config.json: r must be a whole number from 1 to 65,536, not 2.0"),
        (dict(lora_alpha=True), "adapter_config.json: lora_alpha must be a number above 0, not True"),
        (dict(lora_alpha=10**400), "adapter_config.json: lora_alpha must be a number above 0, not 10000"),
        (dict(use_rslora=0), "adapter_config.json: use_rslora must be true or false, not 0"),
        (dict(inference_mode="yes"), "adapter_config.json: inference_mode must be true or false or null"),
        (dict(eva_config=[1]), "adapter_config.json: eva_config must be an object or null, not [1]"),
        (dict(rank_pattern=7), "adapter_config.json: rank_pattern must be an object, not 7"),
        (dict(bias="some"), "bias = 'some' is not supported; it must be 'none' or 'lora_only' or 'all'"),
        (dict(peft_type="IA3"), "peft_type = 'IA3'"),
        (dict(modules_to_save=["lm_head"]), "missing base_model.model.lm_head.weight"),
        (dict(rank_pattern={"q_proj": 4}), "q_proj.lora_A.weight is (2, 24), not of rank r = 4"),
        (
            dict(rank_pattern={"(": 4}),
            "rank_pattern or alpha_pattern: '(.*\\\\.)?(()$' is not a regular expression",
        ),
        (dict(lora_bias=True), "missing base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"),
        (dict(trainable_token_indices=[3]), "missing base_model.model.model.embed_tokens.token_adapter"),
        (dict(exclude_modules=["layers.0.self_attn.q_proj"]), "unexpected base_model.model.model.layers.0"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4'"),
        (dict(layers_to_transform=[0]), "unexpected base_model.model.model.layers.1.self_attn.q_proj.lora_A"),
        (dict(layer_replication=[[0, 1]]), "layer_replication"),
        (dict(a_key_of_the_future=3), "a_key_of_the_future = 3"),
        (dict(r=None), "the key r is missing"),
        (dict(target_modules=["q_porj"]), "nearest: 'q_proj'"),
        (dict(r=4), "is (2, 24), not of rank r = 4"),
        (
            dict(target_modules=["q_proj", "v_proj"]),
            "missing base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight",
        ),
        (
            dict(target_modules=["v_proj"]),
            "unexpected base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight",
        ),
    ],
)
def test_a_key_that_cannot_be_honoured_is_refused_and_leaves_the_model_as_it_was(config, message, tmp_path):
    directory, model = saved(tmp_path, **config), tiny_model()
    with pytest.raises(UserError) as error:
        load_adapter(model, directory)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not lora_layers(model)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_any_json_at_any_key_is_read_strictly_or_refused_in_one_line(tmp_path, data):
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    key = data.draw(st.sampled_from([*PEFT_DEFAULTS, "runtime_config"]) | st.text(max_size=300))
    value = data.draw(JSON)
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain | {key: value}))
    try:
        config = read_adapter_config(tmp_path)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) <= 500 + len(str(tmp_path))
        return
    expected = plain | {"lora_dropout": 0.0, "use_rslora": False, "use_dora": False} | {key: value}
    expected["target_modules"] = tuple(expected["target_modules"])
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"):
        assert getattr(config, name) == (value if isinstance(value, str) and name == key else expected[name])
    assert type(config.r) is int and type(config.lora_alpha) in (int, float)


@pytest.mark.parametrize("init", [True, False, "gaussian", "Gaussian", "orthogonal", "eva", "mica"])
def test_an_initialisation_that_keeps_the_base_weights_is_read(init, tmp_path):
    adapter = read_adapter(saved(tmp_path, init_lora_weights=init))
    assert adapter.config.r == 2 and len(adapter.layers) == 2


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "future", None])
def test_an_initialisation_that_changes_the_base_weights_is_refused(init, tmp_path):
    with pytest.raises(UserError, match="changed the base weights"):
        read_adapter(saved(tmp_path, init_lora_weights=init))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora_magnitude_vector": None}, "missing {}lora_magnitude_vector"),
        ({"lora_A.weight": None, "lora_B.weight": None}, "missing {}lora_A.weight"),
        ({"lora_magnitude_vector": torch.ones(24, 1)}, "{}lora_magnitude_vector is (24, 1), not a vector"),
        (
            {"lora_magnitude_vector.weight": torch.ones(24)},
            "{}lora_magnitude_vector is there twice",
        ),
        ({"lora_B.weight": torch.ones(24, 3)}, "{}lora_B.weight is (24, 3), not of rank r = 2"),
    ],
)
def test_a_dora_adapter_that_is_not_sound_is_refused_with_and_without_a_model(change, message, tmp_path):
    model = tiny_model()
    add_lora(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    save_adapter(model, tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.config.use_dora and len(adapter.layers) == 2
    for path, tensors in adapter.modules.items():
        kept = lora_layers(model)[path].parts("default")
        assert torch.equal(tensors["lora_A.weight"], kept["lora_A"])
        assert torch.equal(tensors["lora_magnitude_vector"], kept["lora_magnitude_vector"])
    path, prefix = tmp_path / "adapter_model.safetensors", "base_model.model.model.layers.1.self_attn.q_proj."
    whole = load_file(path) | {prefix + name: tensor for name, tensor in change.items()}
    save_file({key: tensor for key, tensor in whole.items() if tensor is not None}, path)
    with pytest.raises(UserError) as error:
        read_adapter(tmp_path)
    assert message.format(prefix) in str(error.value) and "\n" not in str(error.value)
    model = tiny_model()
    with pytest.raises(UserError):
        load_adapter(model, tmp_path)
    assert not lora_layers(model)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda tensor: tensor.to(torch.int32), "is torch.int32, not floating point"),
        (lambda tensor: tensor.fill_(torch.nan), "is infinite or NaN in places"),
    ],
)
def test_integers_infinities_and_nan_are_refused(spoil, message, tmp_path):
    path = saved(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    save_file(tensors | {key: spoil(tensors[key])}, path)
    for read in (read_adapter, lambda directory: load_adapter(tiny_model(), directory)):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        assert f"{key} {message}" in str(error.value) and "\n" not in str(error.value)


def test_a_configuration_that_is_no_object_is_refused(tmp_path):
    (saved(tmp_path) / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="adapter_config.json must hold a JSON object, not \\[\\]"):
        read_adapter(tmp_path)


def test_magnitudes_without_use_dora_are_refused(tmp_path):
    model = tiny_model()
    add_lora(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(use_dora=False)))
    for read in (read_adapter, lambda directory: load_adapter(tiny_model(), directory)):
        with pytest.raises(UserError, match="lora_magnitude_vector"):
            read(tmp_path)


@torch.no_grad()
def test_an_adapter_on_a_model_in_use_drops_nothing_out(tmp_path):
    model = tiny_model()
    add_lora(model, LoraConfig(lora_dropout=0.5))
    randomize(model)
    assert torch.equal(model(ids(1, 9)), model(ids(1, 9)))
    save_adapter(model, tmp_path)
    fresh = tiny_model()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(ids(1, 9)), model(ids(1, 9)))
    assert not torch.equal(fresh.train()(ids(1, 9)), fresh(ids(1, 9)))


def test_a_missing_a_truncated_and_a_pickled_adapter_raise_different_errors(tmp_path):
    model = tiny_model()
    with pytest.raises(UserError, match="is not an adapter: it has no adapter_config.json"):
        load_adapter(model, tmp_path)
    weights = saved(tmp_path) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="truncated or corrupt"):
        load_adapter(model, tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="no file of tensors"):
        load_adapter(model, tmp_path)


def test_half_precision_adapters_are_loaded_as_float32(tmp_path):
    directory = saved(tmp_path)
    path = directory / "adapter_model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path)
    model = tiny_model()
    load_adapter(model, directory)
    assert all(
        p.dtype == torch.float32 for layer in lora_layers(model).values() for p in layer.lora_A.values()
    )


class Wrapper(torch.nn.Module):
    """What DDP and FSDP do to names."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def compiled_layers(model):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer, backend="eager")
    return model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        Wrapper,
        lambda m: Wrapper(Wrapper(m)),
        compiled_layers,
    ],
    ids=["torch.compile", "wrapper", "two wrappers", "layer by layer"],
)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"]])
@torch.no_grad()
def test_a_wrapped_model_is_saved_under_the_names_of_the_plain_one(wrap, targets, tmp_path):
    peft = pytest.importorskip("peft")
    base = transformers_model("llama-gqa")
    model = same_model_here(base)
    add_lora(model, LoraConfig(r=4, target_modules=targets, modules_to_save=["norm"]))
    randomize(model)
    expected = model(ids(2, 9))
    save_adapter(model, tmp_path / "plain")
    save_adapter(wrap(model), tmp_path / "wrapped")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "wrapped" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "wrapped").eval()
    assert relative_error(theirs(input_ids=ids(2, 9)).logits, expected) <= TOLERANCE


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(layers_to_transform=[7]), "layers_to_transform = (7,) leaves no layer of the model to adapt"),
        (dict(layers_to_transform=7), "layers_to_transform = 7 leaves no layer of the model to adapt"),
        (dict(exclude_modules=["q_proj"]), "exclude_modules = ('q_proj',) leaves no layer"),
    ],
)
def test_the_field_that_leaves_no_layer_is_named(config, message, tmp_path):
    with pytest.raises(UserError) as error:
        load_adapter(tiny_model(), saved(tmp_path, **config))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(trainable_token_indices=[61]),
        dict(modules_to_save=["mlp"]),
        dict(trainable_token_indices={"norm": [1]}),
    ],
)
def test_after_an_error_no_wrapper_is_left(wrong):
    model = tiny_model()
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(UserError):
        add_lora(model, LoraConfig(target_modules=["q_proj", "embed_tokens"], **wrong))
    assert [name for name, _ in model.named_modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_vocabulary_is_found_without_reading_the_other_tensors(tmp_path, monkeypatch):
    model = tiny_model()
    add_lora(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    save_adapter(model, tmp_path / "grown")
    saved(tmp_path)
    assert vocabulary_of(tmp_path / "grown", 5) == 61 and vocabulary_of(tmp_path, 5) == 5
    keys = ["base_model.model.model.embed_tokens.weight"]
    assert [key for key, _ in stored_tensors(tmp_path / "grown", keys)] == keys


def grown_model(seed: int = 0):
    """A model whose vocabulary has grown from 61 to 64, with new rows of its own."""
    model = tiny_model()
    grow_vocabulary(model, 64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (model.model.embed_tokens, model.lm_head):
            layer.weight[61:] = torch.randn(3, 24, generator=generator)
    return model


def test_two_adapters_with_other_new_rows_each_keep_their_own(tmp_path):
    tokens, expected = torch.tensor([[1, 61, 62, 63]]), {}
    for seed, name in enumerate(("first", "second"), 1):
        model = grown_model(seed)
        add_lora(model, LoraConfig(r=2, target_modules=["q_proj"]))
        save_adapter(model, tmp_path / name)
        expected[name] = model(tokens)
    model = grown_model()
    for name in expected:
        load_adapter(model, tmp_path / name, name)
    for name, logits in expected.items():
        set_adapter(model, name)
        assert torch.equal(model(tokens), logits)
