"""The names that a client may ask for, and who speaks under each: an adapter with its own words.

An adapter has the tokenizer and the chat template of its own training run, as it has with scripts/chat.py;
the base model has those of the first adapter's. Equal tokenizers are kept once.

Adapters that clients load come from one directory that the server's owner names. Their files are a
stranger's: what `load_adapter` checks is checked, and a path that leads out of the directory is refused.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

from minilora.data.chat import ChatTemplate, load_chat_template
from minilora.data.tokenizer import Tokenizer
from minilora.inference.generation import end_tokens
from minilora.inference.load import (
    InferenceSetup,
    find_adapters,
    load_adapted_tokenizer,
    load_run_config,
)
from minilora.model import CausalLM
from minilora.system.errors import UserError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
MOST_MODELS = 4096  # that clients may have loaded at once


@dataclass(frozen=True)
class Served:
    """A name, and who speaks under it."""

    name: str
    adapter: str | None  # None: the base model
    root: str  # where its files lie, for GET /v1/models
    tokenizer: Tokenizer
    template: ChatTemplate | None
    end_ids: frozenset[int]
    created: int  # seconds since 1970

    def entry(self, base_name: str) -> dict:
        """Return what GET /v1/models says of it, as vLLM writes it."""
        own = dict(id=self.name, object="model", created=self.created, owned_by="minilora", root=self.root)
        return own | dict(parent=base_name if self.adapter else None)


class Models:
    """The base model and its adapters by name."""

    def __init__(self, setup: InferenceSetup, model: CausalLM, base_name: str, keys: Sequence[str]):
        self.setup, self.model, self.keys = setup, model, keys
        self.tokenizers = WeakValueDictionary({setup.tokenizer.fingerprint: setup.tokenizer})
        self.vocab_size = model.model.embed_tokens.weight.shape[0]
        base = self._served(base_name, None, str(setup.base), setup.tokenizer, setup.template)
        self.base_name, self.by_name = base_name, {base_name: base}
        self.leaving: set[str] = set()  # names of adapters that are unloaded once nobody uses them
        for name, directory in setup.adapters.items():
            self.by_name[name] = self.read(name, directory)

    def read(self, name: str, directory: Path) -> Served:
        """Return who speaks with an adapter. Raises UserError for files of its run that cannot be used."""
        adapters = {name: directory}
        tokenizer = load_adapted_tokenizer(self.setup.base, adapters)
        tokenizer = self.tokenizers.setdefault(tokenizer.fingerprint, tokenizer)
        template = load_chat_template(load_run_config(adapters, self.keys).template, tokenizer)
        return self._served(name, name, str(directory), tokenizer, template)

    def _served(
        self,
        name: str,
        adapter: str | None,
        root: str,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
    ) -> Served:
        ends = end_tokens(self.model, tokenizer, template and template.end_id)
        return Served(name, adapter, root, tokenizer, template, frozenset(ends), int(time.time()))

    def find(self, name: str, path: str, directory: Path) -> Path:
        """Return where an adapter lies that a client names: `path`, within `directory`. Raises UserError."""
        if not NAME.fullmatch(name):
            raise UserError(f"lora_name = {name!r} must be 1 to 64 letters, digits, _ or -")
        if name in self.by_name or name in self.leaving:
            raise UserError(
                f"lora_name = {name!r} is loaded already; unload it first, or choose another name"
            )
        if len(self.by_name) > MOST_MODELS:
            raise UserError(f"{MOST_MODELS} adapters are loaded, the most; unload one first")
        inside = directory.resolve()
        try:
            found = (inside / path).resolve()
            if "\0" in path or not found.is_relative_to(inside) or not found.is_dir():
                raise ValueError
        except (OSError, ValueError, RuntimeError) as error:  # too long a name, a circle of links
            raise UserError(f"lora_path = {path!r} is no folder within the server's --adapter_dir") from error
        (found,) = find_adapters([f"{name}={found}"]).values()
        return found

    def listed(self) -> list[dict]:
        """Return the entries of GET /v1/models."""
        return [served.entry(self.base_name) for served in list(self.by_name.values())]  # threads may add one
