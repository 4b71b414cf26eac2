"""Adapters in any order of verbs: minilora and PEFT keep every promise, and a faulty library is caught."""

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from support.tiny import ids, tiny_model
from torch import nn

from minilora import (
    LoraConfig,
    add_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge_lora,
)
from minilora.lora import lora_layers
from minilora.testing import AdapterMachine

try:
    import peft
except ImportError:
    peft = None

BATCH = ids(1, 7)
SHORT = settings(
    max_examples=20,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    database=None,
    report_multiple_bugs=False,
    phases=(Phase.generate,),
)


def train(parameters, output):
    """A step of signs: every number moves by 0.01, so that updates stay smaller than W."""
    parameters = list(parameters)
    gradients = torch.autograd.grad(output.square().sum(), parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(0.01 * gradient.sign())


class Minilora(AdapterMachine):
    def new(self):
        self.model = tiny_model()

    def output(self):
        with torch.no_grad():
            return self.model.eval()(BATCH)

    def add(self, name):
        add_lora(self.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), name)

    def activate(self, name):
        set_adapter(self.model, name)

    def step(self):
        train(trainable_parameters(self.model).values(), self.model.train()(BATCH))

    def merge(self):
        merge_lora(self.model)

    def unmerge(self):
        unmerge_lora(self.model)

    def remove(self, name):
        remove_lora(self.model, name)

    def save(self, name, directory):
        save_adapter(self.model, directory, name=name)

    def load(self, name, directory):
        load_adapter(self.model, directory, name=name)


class Peft(AdapterMachine):
    def new(self):
        torch.manual_seed(0)
        layers = dict(up=nn.Linear(8, 12), act=nn.Tanh(), down=nn.Linear(12, 8))
        self.model, self.wrapped = nn.Sequential(*layers.values()), None

    def output(self):
        x = torch.linspace(-1, 1, 40).view(5, 8)
        with torch.no_grad():
            return (self.wrapped or self.model).eval()(x)

    def add(self, name):
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"])
        if self.wrapped is None:
            self.wrapped = peft.get_peft_model(self.model, config, adapter_name=name)
        else:
            self.wrapped.add_adapter(name, config)
        self.activate(name)

    def activate(self, name):
        if self.wrapped is None:
            return
        if name is None:
            self.wrapped.base_model.disable_adapter_layers()
        else:
            self.wrapped.base_model.enable_adapter_layers()
            self.wrapped.set_adapter(name)

    def step(self):
        trained = [p for p in self.wrapped.parameters() if p.requires_grad]
        train(trained, self.wrapped.train()(torch.linspace(-1, 1, 40).view(5, 8)))

    def merge(self):
        self.wrapped.base_model.merge_adapter()

    def unmerge(self):
        self.wrapped.base_model.unmerge_adapter()

    def remove(self, name):
        if set(self.wrapped.peft_config) == {name}:  # a PeftModel without adapters does not run
            self.model, self.wrapped = self.wrapped.unload(), None
            return
        was_active = name in self.wrapped.active_adapters
        self.wrapped.delete_adapter(name)
        if was_active:
            self.activate(None)  # PEFT makes another one active

    def save(self, name, directory):
        self.wrapped.save_pretrained(directory, selected_adapters=[name])

    def load(self, name, directory):
        (folder,) = (path.parent for path in directory.rglob("adapter_config.json"))
        if self.wrapped is None:
            self.wrapped = peft.PeftModel.from_pretrained(self.model, folder, name, is_trainable=True)
        else:
            self.wrapped.load_adapter(folder, name, is_trainable=True)
        self.activate(name)


def test_minilora_keeps_every_promise_in_any_order_of_verbs():
    run_state_machine_as_test(Minilora, settings=SHORT)


@pytest.mark.skipif(peft is None, reason="PEFT, another library, is not installed")
@pytest.mark.filterwarnings("ignore:::peft.*")
def test_peft_keeps_every_promise_in_any_order_of_verbs():
    run_state_machine_as_test(Peft, settings=SHORT)


class StepMovesAll(Minilora):
    """A step of training moves every adapter."""

    def step(self):
        super().step()
        with torch.no_grad():
            for layer in lora_layers(self.model).values():
                for B in layer.lora_B.values():
                    B.add_(0.01)


class UnmergeForgets(Minilora):
    def unmerge(self):
        for layer in lora_layers(self.model).values():
            layer.merged = None


class MergeForgetsALayer(Minilora):
    def merge(self):
        super().merge()
        layer = next(iter(lora_layers(self.model).values()))
        layer.unmerge()
        layer.merged = layer.active


class LoadGivesAnEmptyAdapter(Minilora):
    def load(self, name, directory):
        self.add(name)


class LoadKeepsTheFilesName(Minilora):
    """Saving writes whatever adapter is active."""

    def save(self, name, directory):
        active = next(iter(lora_layers(self.model).values())).active
        super().save(active or name, directory)


class RemoveLeavesTheUpdate(Minilora):
    def remove(self, name):
        set_adapter(self.model, name)
        merge_lora(self.model)
        super().remove(name)


STORIES = {  # a faulty library, and the verbs that show its fault
    StepMovesAll: "add add step",
    UnmergeForgets: "add step merge unmerge",
    MergeForgetsALayer: "add step step merge",
    LoadGivesAnEmptyAdapter: "add step save load",
    LoadKeepsTheFilesName: "add step add save0 load0",
    RemoveLeavesTheUpdate: "add step add remove0",
}


def play(machine, story):
    """Run rules of a machine, each with the number behind its name, and look at the output after each."""
    machine._begin()
    try:
        for word in story.split():
            verb = word.rstrip("01")
            numbers = [int(word[len(verb) :] or 0)] if verb in ("save", "load", "remove") else []
            getattr(machine, f"_{verb}")(*numbers)
            machine.the_output_is_that_of_the_active_adapter()
    finally:
        machine.teardown()


@pytest.mark.parametrize("faulty", STORIES)
def test_the_machine_sees_the_fault_of_a_library_when_its_verbs_are_called(faulty):
    play(Minilora(), STORIES[faulty])
    with pytest.raises(AssertionError, match=r"value \d+ is"):
        play(faulty(), STORIES[faulty])


def test_the_search_finds_a_fault_that_takes_three_verbs():
    with pytest.raises(AssertionError, match=r"value \d+ is .*, the output of "):
        run_state_machine_as_test(StepMovesAll, settings=settings(SHORT, max_examples=100))
