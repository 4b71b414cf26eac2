"""A store keeps the adapters that were used last, moves the fewest, and none of them changes on its way."""

import gc
import json
import shutil
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from safetensors.torch import load_file, save_file
from support.adapter_kinds import KINDS, peft_model
from support.tiny import ids, tiny_model

from minilora import (
    LoraConfig,
    UserError,
    add_lora,
    load_adapter,
    load_model,
    quantize_4bit,
    save_adapter,
    set_adapter,
)
from minilora.inference import store as store_module
from minilora.inference.store import AdapterStore
from minilora.linear import Linear4bit
from minilora.mixed import adapters
from minilora.new_rows import grow_vocabulary
from minilora.wrapping import adapted_layers, adapter_names

NAMES = ["a", "b", "c", "d", "e"]


def write_adapter(directory, seed: int, model=None, **config) -> None:
    """An adapter with random values everywhere."""
    model, generator = model or tiny_model(), torch.Generator().manual_seed(seed)
    add_lora(model, LoraConfig(**dict(r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"]) | config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, directory)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> the folder of an adapter of that name."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        write_adapter(root / name, seed)
    return {name: root / name for name in NAMES}


@pytest.fixture
def stored(folders):
    """A function that makes a store with all five adapters."""

    def make(on_device=2, in_memory=5) -> AdapterStore:
        store = AdapterStore(tiny_model(), on_device, in_memory)
        for name, folder in folders.items():
            store.register(name, folder)
        return store

    return make


def answers(store: AdapterStore, *names: str | None):
    """The logits of the same tokens under each adapter, after the store has put them on."""
    store.use(names)
    with adapters(store.model, names):
        return store.model(ids(1, 7).expand(len(names), 7))


def alone(folder):
    model = tiny_model()
    load_adapter(model, folder)
    return model(ids(1, 7))[0]


# ---- which adapters are where ---------------------------------------------------------------------------------


class Store(RuleBasedStateMachine):
    """Beside each store a list of names, in which whoever is used goes to the end."""

    folders: dict

    @initialize(on_device=st.integers(1, 3), more=st.integers(0, 2))
    def start(self, on_device, more):
        self.store = AdapterStore(tiny_model(), on_device, on_device + more)
        self.recent, self.device, self.memory = [], set(), set()
        self.counts = dict.fromkeys(
            "hits loads_from_memory loads_from_disk evictions_from_device evictions_from_memory".split(), 0
        )
        for name in NAMES[:4]:
            self.register(name)

    def trim_memory(self):
        while len(self.memory) > self.store.in_memory:
            self.memory.remove(next(n for n in self.recent if n in self.memory - self.device))
            self.counts["evictions_from_memory"] += 1

    @rule(name=st.sampled_from(NAMES))
    def register(self, name):
        if name in self.recent:
            with pytest.raises(UserError, match="registered already"):
                self.store.register(name, self.folders[name])
            return
        self.store.register(name, self.folders[name])
        self.recent.append(name)
        self.memory.add(name)
        self.trim_memory()

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name):
        if name not in self.recent:
            with pytest.raises(UserError, match="no adapter is registered"):
                self.store.forget(name)
            return
        self.store.forget(name)
        self.recent.remove(name)
        self.device.discard(name)
        self.memory.discard(name)

    @rule(names=st.lists(st.sampled_from([*NAMES[:4], None]), max_size=4))
    def use(self, names):
        wanted = list(dict.fromkeys(n for n in names if n))
        if not set(wanted) <= set(self.recent) or len(wanted) > self.store.on_device:
            for ask in (self.store.use, self.store.changes):
                with pytest.raises(UserError, match="no adapter is registered|more than on_device"):
                    ask(names)
            return
        assert self.store.changes(names) == (not set(wanted) <= self.device)
        self.store.use(names)
        for name in wanted:
            if name in self.device:
                self.counts["hits"] += 1
                continue
            self.counts["loads_from_memory" if name in self.memory else "loads_from_disk"] += 1
            if len(self.device) == self.store.on_device:
                self.device.remove(next(n for n in self.recent if n in self.device - set(wanted)))
                self.counts["evictions_from_device"] += 1
            self.device.add(name)
            self.memory.add(name)
        self.recent = [n for n in self.recent if n not in wanted] + wanted
        self.trim_memory()

    @invariant()
    def the_store_agrees(self):
        figures = self.store.figures()
        assert adapter_names(self.store.model) == sorted(figures["bytes_on_device"]) == sorted(self.device)
        assert figures["bytes_in_memory"].keys() == self.memory
        assert {key: figures[key] for key in self.counts} == self.counts
        assert self.store.names == sorted(self.recent)

    @invariant()
    def nothing_is_trained_or_active(self):
        assert not any(
            p.requires_grad for layer in adapted_layers(self.store.model).values() for p in layer.parameters()
        )
        assert all(layer.active is None for layer in adapted_layers(self.store.model).values())


def test_a_store_holds_what_a_list_of_the_last_uses_says(folders):
    machine = type("Machine", (Store,), {"folders": folders}).TestCase
    machine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
    machine().runTest()


def test_names_that_are_on_the_model_need_no_move_and_are_noted_inside_a_mixture(stored):
    store = stored()
    store.use(["a", "b"])
    with adapters(store.model, ["a", "b"]):
        store.use(["a"])
        store.register("again", store._registered["a"][0])  # reads, and changes no layer
        with pytest.raises(UserError, match="leave `with adapters`"):
            store.use(["c"])
        with pytest.raises(UserError, match="leave `with adapters`"):
            store.forget("b")
    store.use(["c"])
    assert adapter_names(store.model) == ["a", "c"]


def test_adapters_that_others_put_on_the_model_stay_and_their_names_are_taken(folders):
    model = tiny_model()
    load_adapter(model, folders["a"], name="mine")
    store = AdapterStore(model, on_device=1)
    with pytest.raises(UserError, match="already has an adapter called 'mine'"):
        store.register("mine", folders["a"])
    for name in ("b", "c"):
        store.register(name, folders[name])
        store.use([name])
    assert adapter_names(model) == ["c", "mine"]


# ---- the same numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        dict(use_dora=True),
        dict(use_vera=True, lora_alpha=64),
        dict(modules_to_save=["lm_head", "norm"]),
        dict(target_modules=["q_proj", "embed_tokens"]),
        dict(trainable_token_indices=(3, 5)),
    ],
    ids=lambda config: next(iter(config), "plain"),
)
def test_an_adapter_of_the_store_answers_as_load_adapter_makes_it_also_when_it_comes_back(
    config, stored, tmp_path
):
    write_adapter(tmp_path / "odd", 9, **config)
    expected, store = alone(tmp_path / "odd"), stored(on_device=1, in_memory=1)
    store.register("odd", tmp_path / "odd")
    first = answers(store, "odd")[0]
    # A batch of one row has one segment: the products are of the same sizes as without a mixture, and differ
    # in the order of a sum at most.
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    answers(store, "a")
    assert torch.equal(answers(store, "odd")[0], first)
    assert store.figures()["loads_from_disk"] >= 2
    base = tiny_model()
    store.forget("odd")
    assert torch.equal(store.model(ids(1, 7)), base(ids(1, 7)))


def test_two_hundred_loads_leave_as_many_bytes_and_tensors_as_ten(stored):
    store, seen = stored(on_device=2, in_memory=3), []
    gc.collect()
    for load in range(200):
        store.use([NAMES[load % 5]])
        if load in (9, 199):
            gc.collect()
            tensors = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
            figures = store.figures()
            held = {key: sum(figures[key].values()) for key in ("bytes_on_device", "bytes_in_memory")}
            seen.append((sum(p.nbytes for p in store.model.parameters()), tensors, held))
    assert figures["loads_from_disk"] + figures["loads_from_memory"] == 200
    assert seen[0] == seen[1]
    # r = 2 on 2 layers: q 24 -> 24 and up 24 -> 40, in float32.
    assert held["bytes_on_device"] == 2 * 2 * 4 * 2 * (24 + 24 + 24 + 40)


# ---- folders that change --------------------------------------------------------------------------------------


def edited(folder) -> None:
    """Change a folder's configuration so that another adapter is meant, at another time."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 400}))


@pytest.fixture
def copies(folders, tmp_path):
    return {name: shutil.copytree(folder, tmp_path / name) for name, folder in folders.items()}


def store_of(copies, **sizes) -> AdapterStore:
    store = AdapterStore(tiny_model(), **sizes)
    for name, folder in copies.items():
        store.register(name, folder)
    return store


def test_an_adapter_in_memory_is_a_copy_that_no_change_of_its_file_reaches(copies, folders):
    store = store_of(copies, on_device=1, in_memory=5)
    weights = copies["a"] / "adapter_model.safetensors"
    with weights.open("r+b") as file:  # in place: safetensors maps the file into memory
        file.write(b"\0" * weights.stat().st_size)
    torch.testing.assert_close(answers(store, "a")[0], alone(folders["a"]), rtol=1e-5, atol=1e-5)  # as above


@pytest.mark.parametrize(
    "change",
    [
        edited,
        shutil.rmtree,
        lambda folder: time.sleep(0.01) or (folder / "adapter_model.safetensors").touch(),
    ],
)
def test_a_folder_that_changed_is_refused_until_it_is_registered_again_and_the_model_stays(change, copies):
    store = store_of(copies, on_device=2, in_memory=2)
    before = answers(store, "a", "b")
    change(copies["d"])
    figures = store.figures()
    with pytest.raises(UserError, match="adapter 'd': .*(changed since it was registered|no adapter_config)"):
        store.use(["c", "d"])
    assert store.figures() == figures and adapter_names(store.model) == ["a", "b"]
    assert not store.changes(["a", "b"])
    assert torch.equal(answers(store, "a", "b"), before)
    store.forget("d")
    if copies["d"].exists():
        store.register("d", copies["d"])
        store.use(["d", "c"])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt, UserError])
def test_a_load_that_fails_half_way_leaves_the_model_as_it_was(error, stored, monkeypatch):
    store = stored(on_device=2, in_memory=2)
    before, names = answers(store, "a", "b"), [name for name, _ in store.model.named_parameters()]
    figures, original = store.figures(), LoraConfig.scaling_of

    def fails(config, r, alpha):  # within the second adapter, at its third layer
        calls.append(1)
        if len(calls) == 7:
            raise error("no more")
        return original(config, r, alpha)

    calls = []
    monkeypatch.setattr(LoraConfig, "scaling_of", fails)
    with pytest.raises(error):
        store.use(["c", "d"])
    assert store.figures() == figures
    assert sorted(name for name, _ in store.model.named_parameters()) == sorted(names)
    assert torch.equal(answers(store, "a", "b"), before)


# ---- what is refused ------------------------------------------------------------------------------------------


def test_an_adapter_of_a_larger_vocabulary_is_refused_with_both_sizes(tmp_path):
    whole = dict(modules_to_save=["embed_tokens", "lm_head"])
    write_adapter(tmp_path / "larger", 0, tiny_model(vocab_size=64), **whole)
    write_adapter(tmp_path / "equal", 0, **whole)
    store = AdapterStore(tiny_model())
    with pytest.raises(UserError, match="vocabulary of 64 tokens, and the model has 61") as refusal:
        store.register("larger", tmp_path / "larger")
    assert "\n" not in str(refusal.value) and store.names == []
    store.register("equal", tmp_path / "equal")


@pytest.mark.parametrize(
    "name, said", [("v1.2", "without dots"), ("", "without dots"), ("keys", "PyTorch uses")]
)
def test_a_name_that_no_adapter_can_have_is_refused_before_a_file_is_read(name, said, monkeypatch, folders):
    monkeypatch.setattr(store_module, "read_adapter", None)
    with pytest.raises(UserError, match=said):
        AdapterStore(tiny_model()).register(name, folders["a"])


def test_an_adapter_of_another_model_is_refused_when_it_is_registered(tmp_path, folders):
    config = folders["a"] / "adapter_config.json"
    named = json.loads(config.read_text()) | dict(base_model_name_or_path="owner/other")
    shutil.copytree(folders["a"], tmp_path / "a")
    (tmp_path / "a" / config.name).write_text(json.dumps(named))
    with pytest.raises(UserError, match="a does not fit the model: it was made for 'owner/other'; "):
        AdapterStore(tiny_model(hidden_size=32)).register("a", tmp_path / "a")
    with pytest.raises(UserError, match="is not an adapter"):
        AdapterStore(tiny_model()).register("a", tmp_path)


def test_numbers_that_cannot_be_and_near_names_are_told(stored):
    for sizes, said in (((0, 2), "on_device must be at least 1"), ((3, 2), "in_memory must be at least 3")):
        with pytest.raises(UserError, match=said):
            AdapterStore(tiny_model(), *sizes)
    store = stored()
    with pytest.raises(UserError, match="registered as 'aa'.*'a'"):
        store.use(["aa"])


def test_after_a_move_no_adapter_is_active_and_the_base_is_as_it_was(stored):
    store = stored()
    base = store.model(ids(1, 7))
    store.use(["a"])
    set_adapter(store.model, "a")
    assert not torch.equal(store.model(ids(1, 7)), base)
    store.use(["b", "a"])
    assert torch.equal(store.model(ids(1, 7)), base)


def narrower(folder) -> None:
    """Cut the matrices that VeRA's layers share."""
    path = folder / "adapter_model.safetensors"
    cut = {key: t[:, :20].clone() if key.endswith("vera_A") else t for key, t in load_file(path).items()}
    save_file(cut, path)


REFUSED_KINDS = {
    "a start in 4 bits": (dict(), dict(init_lora_weights="pissa"), "q_proj is in 4 or 8 bits"),
    "a rank above a side": (dict(r=30), dict(init_lora_weights="olora"), "lora_rank 30 exceeds"),
    "a start of the embedding": (
        dict(target_modules=["embed_tokens"]),
        dict(init_lora_weights="olora"),
        "not supported on the embedding",
    ),
    "a row twice": (
        dict(trainable_token_indices=(3, 5)),
        dict(trainable_token_indices=[3, 3]),
        "names one row twice",
    ),
    "small shared matrices": (dict(use_vera=True, lora_alpha=64), {}, "too small for 24 inputs"),
}


@pytest.mark.parametrize("kind", REFUSED_KINDS)
def test_a_kind_that_the_model_cannot_have_is_refused_when_it_is_registered(kind, tmp_path):
    config, keys, said = REFUSED_KINDS[kind]
    write_adapter(tmp_path, 0, **config)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    if config.get("use_vera"):
        narrower(tmp_path)
    model = tiny_model()
    if "4 bits" in kind:
        for name, layer in list(model.model.layers.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                model.model.layers.set_submodule(name, Linear4bit(quantize_4bit(layer.weight.data), None))
    store = AdapterStore(model)
    with pytest.raises(UserError, match=said):
        store.register("odd", tmp_path)
    assert store.names == [] and adapter_names(model) == []


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_that_peft_writes_can_be_put_on_once_it_is_registered(kind, tmp_path):
    peft_model(KINDS[kind], tmp_path / "base").save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "base")
    grow_vocabulary(model, KINDS[kind].vocab_size or 0)
    store = AdapterStore(model)
    store.register("it", tmp_path / "adapter")
    store.use(["it"])
    assert adapter_names(model) == ["it"]
