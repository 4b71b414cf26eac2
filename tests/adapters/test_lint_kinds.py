"""Every kind of adapter, whole and damaged: the linter's verdict is what PEFT does, and what the reader does."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.adapter_kinds import KINDS, base_of, peft_again, peft_model
from support.families import config_dict, relative_error, same_model_here
from support.tiny import TOLERANCE, ids

from minilora import UserError, load_adapter
from minilora.adapters.findings import CANNOT_TELL, LOADS_WRONGLY, WILL_NOT_LOAD
from minilora.adapters.lint import lint_adapter
from minilora.formats.config_json import parse_config

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::UserWarning:transformers")
LOADS = "loads"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> (its adapter directory, PEFT's logits with what was trained); made once each."""
    pytest.importorskip("peft")
    directories = {}

    def make(name):
        if name not in directories:
            directory = tmp_path_factory.mktemp("kind")
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                theirs = peft_model(KINDS[name], directory / "base")
                theirs.save_pretrained(directory / "adapter", **KINDS[name].saving)
                directories[name] = directory, theirs(input_ids=tokens(KINDS[name])).logits
        return directories[name]

    return make


def tokens(kind):
    """Token ids, those of trained and new rows among them."""
    found = ids(2, 15, vocab=kind.vocab_size or 97)
    found[0, :8] = torch.tensor([5, 6, 3, 4, 97, 98, 5, 100]).clamp_max((kind.vocab_size or 97) - 1)
    return found


@torch.no_grad()
def in_peft(kind, directory, trained) -> str:
    """What PEFT does with an adapter, on a base model whose vocabulary is resized where the kind's was."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(3)  # PEFT draws the tensors that the file lacks
            logits = peft_again(kind, directory)(input_ids=tokens(kind)).logits
    except (ValueError, KeyError, RuntimeError, IndexError, TypeError):
        return WILL_NOT_LOAD
    return LOADS if relative_error(logits, trained) <= TOLERANCE else LOADS_WRONGLY


def here(kind, directory) -> str:
    try:
        load_adapter(same_model_here(base_of(kind)), directory)
    except UserError as error:
        assert "\n" not in str(error)
        return WILL_NOT_LOAD
    return LOADS


def base_config(kind):
    """Of the base model that the adapter is loaded on in PEFT."""
    config = config_dict(base_of(kind))
    return parse_config(config | {"vocab_size": kind.vocab_size or config["vocab_size"]})


def verdict(directory, config, server="PEFT") -> str:
    verdicts = {f.verdict for f in lint_adapter(directory, config) if f.server == server}
    return next((v for v in (CANNOT_TELL, WILL_NOT_LOAD, LOADS_WRONGLY) if v in verdicts), LOADS)


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_adapter_loads_in_peft_here_and_for_the_linter(name, made):
    kind, (directory, trained) = KINDS[name], made(name)
    assert in_peft(kind, directory / "adapter", trained) == LOADS
    assert here(kind, directory / "adapter") == LOADS
    assert verdict(directory / "adapter", base_config(kind)) == LOADS
    assert verdict(directory / "adapter", None) == LOADS


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].vocab_size])
def test_peft_refuses_another_vocabulary_than_the_base_models_and_the_linter_says_so(name, made):
    kind, (directory, _) = KINDS[name], made(name)
    with (
        pytest.raises((RuntimeError, IndexError), match="size mismatch|out of bounds"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        import peft

        peft.PeftModel.from_pretrained(base_of(kind), directory / "adapter")
    findings = lint_adapter(directory / "adapter", parse_config(config_dict(base_of(kind))))
    (finding,) = (f for f in findings if f.server == "PEFT")
    assert finding.verdict == WILL_NOT_LOAD and "resize_token_embeddings" in finding.mend


# Fields that contradict the tensors. Others can be wrong without a trace: lora_alpha, the number of a trained row, or
# a further target, whose tensors may never have been there.
FIELDS = [
    dict(target_modules=["q_proj"]),
    dict(target_modules=["q_porj"]),
    dict(target_modules=r".*layers.0.*\.[qv]_proj"),
    dict(target_modules="all"),
    dict(r=5),
    dict(use_dora=True),
    dict(use_dora=False),
    dict(lora_bias=False),
    dict(bias="none"),
    dict(modules_to_save=["lm_head"]),
    dict(layers_to_transform=[0]),
    dict(layers_to_transform=0, layers_pattern="layers"),
    dict(layers_pattern="layers"),
    dict(exclude_modules=["q_proj"]),
    dict(rank_pattern={"v_proj": 3}),
    dict(rank_pattern={}),
    dict(trainable_token_indices=[1, 2, 3]),
    dict(trainable_token_indices=[300]),
    dict(trainable_token_indices={"nothing": [1]}),
    dict(trainable_token_indices=[]),
    dict(trainable_token_indices=None),
]
NAMES = [
    ("lora_A.weight", "lora_A.default.weight"),
    ("lora_embedding_A", "lora_embedding_A.default"),
    ("lora_magnitude_vector", "lora_magnitude_vector.default.weight"),
    ("lora_A.weight", "lora_A.other.weight"),
    ("model.layers", "_orig_mod.model.layers"),
    ("self_attn.", "_fsdp_wrapped_module.self_attn."),
    ("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    ("base_model.model.model.", "base_model.model."),
    ("base_model.model.", ""),
    ("base_model.model.", "base_model.model.module."),
    ("layers.1.", "layers.7."),
    ("lora_A", "lora_C"),
]


def change(directory, mutation, which, tensors):
    """Drop a tensor, rename keys, or change a field."""
    if mutation is None:
        tensors.pop(sorted(tensors)[which % len(tensors)])
    elif isinstance(mutation, tuple):
        tensors = {key.replace(*mutation): tensor for key, tensor in tensors.items()}
    else:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | mutation))
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})


# VeRA has a verdict of its own, and an adapter that starts with a part of W means nothing once it is changed.
CHANGED_KINDS = [name for name in KINDS if not name.startswith(("vera", "pissa", "olora"))]


@given(
    name=st.sampled_from(CHANGED_KINDS),
    mutation=st.none() | st.sampled_from(FIELDS) | st.sampled_from(NAMES),
    which=st.integers(0, 30),
)
@settings(max_examples=40, deadline=None)
def test_a_changed_adapter_does_in_peft_what_the_linter_says_and_is_read_here_if_it_loads_there(
    name, mutation, which, made, tmp_path_factory
):
    kind, (source, trained) = KINDS[name], made(name)
    directory = tmp_path_factory.mktemp("changed") / "adapter"
    shutil.copytree(source / "adapter", directory)
    change(directory, mutation, which, load_file(directory / "adapter_model.safetensors"))
    outcome = in_peft(kind, directory, trained)
    assert verdict(directory, base_config(kind)) == outcome
    if (
        kind.vocab_size is None or mutation is not None
    ):  # A dropped vocabulary is missed by a base of another one.
        assert (here(kind, directory) == LOADS) == (outcome == LOADS)
    if (
        outcome == LOADS
    ):  # Without the base model the linter knows less, and finds no fault with what is right.
        assert verdict(directory, None) == LOADS


# ---- docs/adapters.md ------------------------------------------------------------------------------------------------


def rows_of_the_page() -> dict[str, list[str]]:
    lines = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {name: cells for name, *cells in rows[1:]}


def test_the_committed_page_has_a_row_for_every_kind_and_no_difference_to_peft():
    rows = rows_of_the_page()
    assert list(rows) == list(KINDS)
    assert all(cells[:3] == ["yes"] * 3 and cells[4] == "yes" for cells in rows.values())
    assert {name for name, cells in rows.items() if cells[3] != "yes"} == {"lora_bias"}  # merged into no bias


@pytest.mark.parametrize("name", KINDS)
def test_the_committed_page_says_of_the_servers_what_the_linter_says(name, made):
    directory, _ = made(name)
    config = parse_config(config_dict(base_of(KINDS[name])))
    cells = rows_of_the_page()[name]
    assert [verdict(directory / "adapter", config, server) for server in ("vLLM", "SGLang")] == cells[5:7]
