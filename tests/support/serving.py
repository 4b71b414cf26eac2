"""A model with adapters for the tests of the server, and requests whose pieces are kept."""

import time
from collections.abc import Callable

import torch

from minilora import LoraConfig, add_lora, load_model, load_tokenizer, save_adapter
from minilora.inference.assistant import GenerationSettings
from minilora.serving.answers import Piece, Request
from support.project import ROOT
from support.tiny import randomize

BASE = ROOT / "assets" / "base"
TOKENIZER = load_tokenizer(BASE)
TARGETS = [["q_proj", "v_proj"], ["down_proj"], "all-linear"]


def assets_with_adapters(names):
    """The repository's own model in float32, with random adapters on different layers, of different ranks."""
    model = load_model(BASE, dtype=torch.float32)
    for i, name in enumerate(names):
        r = 2 + 3 * (i % 4)
        config = LoraConfig(r=r, lora_alpha=4 * r, target_modules=TARGETS[i % len(TARGETS)])
        add_lora(model, config, name)
    randomize(model, scale=0.07)
    return model.eval()


class EveryAdapter:
    """An adapter store of a model that has all its adapters."""

    def __init__(self, on_device: int):
        self.on_device = on_device

    def changes(self, names) -> bool:
        return False

    def use(self, names) -> None:
        pass


def request_for(
    prompt,
    adapter,
    settings: GenerationSettings | None = None,
    end_ids=(2,),
    tell: Callable[[Piece], None] = lambda piece: None,
    **more,
) -> Request:
    settings = settings or GenerationSettings()
    return Request(prompt, adapter, settings, frozenset(end_ids), TOKENIZER, tell, **more)


class Said:
    """Who said something, in order, and the last piece of each."""

    def __init__(self):
        self.speakers, self._last = [], {}

    def as_(self, name) -> Callable[[Piece], None]:
        def tell(piece: Piece) -> None:
            self.speakers.append(name)
            self._last[name] = piece

        return tell

    def wait_for(self, name, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while name not in self._last or not self._last[name].is_last:
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.01)

    def last(self, name) -> Piece:
        return self._last[name]


def save_adapters(directory, names) -> None:
    """Random adapters of the repository's model, a folder for each name."""
    model = assets_with_adapters(names)
    for name in names:
        save_adapter(model, directory / name, name, base_model_name_or_path="assets/base")
