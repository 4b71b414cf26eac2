"""Write docs/adapters.md: which kinds of LoRA adapters are read, run, trained, merged, saved, and load where.

    python scripts/dev/matrix.py

The kinds are those of tests/support/adapter_kinds.py. PEFT makes an adapter of each, on a tiny base model.
Every "yes" is a comparison with PEFT that ran when the page was written, within the bounds that the page
names. The columns of the two servers are the linter's verdicts (minilora/adapters/lint.py): they did not run.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minilora import CausalLM, UserError, load_adapter, save_adapter
from minilora.adapters.export import as_plain
from minilora.adapters.file import write_adapter
from minilora.adapters.lint import lint_adapter
from minilora.adapters.merging import Merging
from minilora.adapters.save_load import read_adapter
from minilora.formats.config_json import parse_config
from minilora.lora import trainable_parameters
from minilora.loss import causal_lm_loss
from minilora.system.errors import ArgumentParser, run_script
from minilora.system.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "adapters.md"
SAME, AFTER_20_STEPS = 1e-5, 1e-4  # the bounds of tests/support/tiny.py
COLUMNS = ("read", "run", "train", "merge", "PEFT loads ours", "vLLM", "SGLang", "exported as plain LoRA")


def main() -> None:
    ArgumentParser(help_text=__doc__).parse_args()  # it has no options
    sys.path.insert(0, str(ROOT / "tests"))
    from support.adapter_kinds import KINDS

    warnings.simplefilter("ignore")
    rows = {}
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as directory:
            rows[name] = Row(kind, Path(directory)).cells()
        print(f"{name}: {', '.join(rows[name])}", flush=True)
    write_whole(PAGE, page(rows))
    print(f"written: {PAGE}")


def page(rows: dict[str, list[str]]) -> str:
    """Return the page as Markdown. rows: a kind's name -> its cells."""
    lines = [f"| kind | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    table = "\n".join(lines)
    return f"""# Kinds of adapters

`python scripts/dev/matrix.py` writes this page. A kind is what the fields of PEFT's `LoraConfig` make of it
(`tests/support/adapter_kinds.py`). For each, PEFT trains an adapter on a tiny model and saves it. Then:

- **read**: `load_adapter` takes it.
- **run**: the logits here are PEFT's, within {SAME:g} of the largest.
- **train**: 20 steps of AdamW from it give the logits that 20 steps in PEFT give, within {AFTER_20_STEPS:g}.
- **merge**: the base model with the adapter merged in, file by file, has PEFT's logits, within {SAME:g}.
- **PEFT loads ours**: PEFT loads what `save_adapter` writes, and has its own logits again, within {SAME:g}.
- **vLLM, SGLang**: what `scripts/lint_adapter.py` says of the adapter. The servers themselves did not run.
- **exported as plain LoRA**: whether `scripts/merge.py --export_adapter` can express it, and which of the
  three programs load the result, by the linter. Where it cannot, merge.

{table}

`python scripts/lint_adapter.py ADAPTER --model BASE` gives the reason and the remedy for every other word.
SGLang refuses q_proj without v_proj in one layer, which `exclude_modules` leaves here; merge that, too.
"""


class Row:
    """One kind of adapter: PEFT's model, its adapter on disk, and what each program makes of it."""

    def __init__(self, kind, directory: Path):
        from support.adapter_kinds import base_of, peft_model
        from support.families import config_dict, same_model_here
        from support.tiny import ids

        self.kind, self.directory, self.base = kind, directory, base_of(kind)
        self.config = parse_config(config_dict(self.base))
        self.new_model = lambda: same_model_here(self.base)
        self.theirs = peft_model(kind, directory / "base")
        self.theirs.save_pretrained(directory / "adapter", **kind.saving)
        self.tokens = ids(2, 15, vocab=kind.vocab_size or self.config.vocab_size)
        self.expected = self.logits(self.theirs)

    @torch.no_grad()
    def logits(self, model) -> Tensor:
        return model(input_ids=self.tokens).logits

    def agrees(self, found: Tensor, bound: float = SAME) -> str:
        """`yes`, or the difference to PEFT's logits over the largest of them."""
        error = ((found - self.expected).abs().max() / self.expected.abs().max()).item()
        return "yes" if error <= bound else f"off by {error:.1e}"

    def cells(self) -> list[str]:
        checks = [self.read, self.run, self.merge, self.peft_loads_ours, self.train]  # training changes both
        cells = {check.__name__: self.outcome(check) for check in checks}
        order = (cells["read"], cells["run"], cells["train"], cells["merge"], cells["peft_loads_ours"])
        return [*order, *(self.verdict(server) for server in ("vLLM", "SGLang")), self.outcome(self.exported)]

    def outcome(self, check) -> str:
        """What a check says, or `refused` if this implementation refuses the adapter."""
        try:
            return check()
        except UserError:
            return "refused"

    def loaded(self) -> CausalLM:
        model = self.new_model()
        load_adapter(model, self.directory / "adapter")
        return model

    def read(self) -> str:
        self.loaded()
        return "yes"

    @torch.no_grad()
    def run(self) -> str:
        return self.agrees(self.loaded()(self.tokens))

    @torch.no_grad()
    def merge(self) -> str:
        weights = self.base.state_dict()
        merging = Merging(read_adapter(self.directory / "adapter"), self.config)
        merging.check({name: tuple(tensor.shape) for name, tensor in weights.items()})
        model = CausalLM(merging.config).eval()
        for name, parameter in model.named_parameters():
            source = weights[merging.source(name)]
            parameter.copy_(merging.merged(name, source) if merging.changes(name) else source)
        return self.agrees(model(self.tokens))

    def peft_loads_ours(self) -> str:
        from support.adapter_kinds import peft_again

        save_adapter(self.loaded(), self.directory / "ours", base_model_name_or_path="base")
        return self.agrees(self.logits(peft_again(self.kind, self.directory / "ours")))

    def train(self) -> str:
        ours = self.loaded()
        both = (
            list(trainable_parameters(ours).values()),
            [p for p in self.theirs.parameters() if p.requires_grad],
        )
        optimizers = [torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0) for parameters in both]
        for batch in self.batches(20):
            causal_lm_loss(ours, batch, batch).div(batch.numel() - len(batch)).backward()
            logits = self.theirs(input_ids=batch).logits[:, :-1]
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        self.expected = self.logits(self.theirs)
        with torch.no_grad():
            return self.agrees(ours(self.tokens), AFTER_20_STEPS)

    def batches(self, steps: int) -> Iterator[Tensor]:
        return (self.tokens.roll(step) for step in range(steps))

    def verdict(self, server: str, directory: str = "adapter") -> str:
        """The linter's worst word about a server."""
        words = [
            f.verdict for f in lint_adapter(self.directory / directory, self.config) if f.server == server
        ]
        return next(
            (w for w in ("will not load", "loads wrongly", "cannot tell", "loads, if") if w in words), "loads"
        )

    def exported(self) -> str:
        raw = json.loads((self.directory / "adapter" / "adapter_config.json").read_text())
        plain = as_plain(read_adapter(self.directory / "adapter"), raw)
        write_adapter(self.directory / "plain", plain.config, plain.tensors)
        loading = [s for s in ("PEFT", "vLLM", "SGLang") if self.verdict(s, "plain") == "loads"]
        return f"loads in {', '.join(loading)}" if loading else "refused"


if __name__ == "__main__":
    run_script(main)
