"""Take a LoRA adapter out of two models: the nearest one to the difference of their weights.

    python scripts/extract.py --base mistralai/Mistral-7B-v0.1 --tuned my-finetune --lora_rank 16 --output new

    --base MODEL            the model before training, directory or hub id
    --tuned MODEL           the model after training, directory or hub id
    --output DIRECTORY      a new directory
    --lora_rank RANK        of the adapter; default: 16
    --lora_target NAMES     of layers, with commas between them; default: all-linear

For each linear layer, tuned - base is a matrix of any rank. The r largest parts of its singular value
decomposition are the nearest matrix of rank r. The script prints each layer's error, the norm of what is left
out over the norm of the difference. It names the other tensors that differ: embeddings, the output head and
norms are no part of this adapter. Files are read tensor by tensor. The output appears complete or not at all.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import argparse
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minilora.adapters.arithmetic import errors_text, extract
from minilora.adapters.lint import findings_text, lint_adapter
from minilora.adapters.plain import write_plain_adapter
from minilora.formats.weights import StoredTensors, read_config
from minilora.model import CausalLM
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script, summarize
from minilora.system.files import check_writable
from minilora.system.hub import resolve_model
from minilora.system.outputs import check_output, whole_output
from minilora.wrapping import match_targets


def main() -> None:
    options = parse_options()
    check_options(options)
    models = Models(resolve_model(options.base), resolve_model(options.tuned))
    layers = match_targets(models.shape, options.lora_target)
    models.check(layers, options.lora_rank)
    factors, errors = {}, {}
    for layer in tqdm(layers, unit=" layers", leave=False, disable=None):
        factors[layer], errors[layer] = extract(*models.weights(f"{layer}.weight"), options.lora_rank)
    if not any(B.any() for _, B in factors.values()):
        raise UserError(f"{options.tuned} has the weights of {options.base} in every layer that is adapted")
    with whole_output("output", options.output) as part:
        write_plain_adapter(part, factors, models.target_names(layers), options.base)
    print("error of each layer against the difference of the two models")
    print(errors_text(errors))
    if different := Counter(models.other_differences(layers)):
        counted = ", ".join(f"{count} {kind}" for kind, count in different.items())
        print(f"note: other tensors differ, too, and are left out: {counted}")
    print(f"{options.output} holds the difference as plain LoRA: r {options.lora_rank}, scaling 1")
    print(findings_text(lint_adapter(options.output, models.config)))


def parse_options() -> argparse.Namespace:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--base", required=True)
    parser.add_argument("--tuned", required=True)
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--lora_target", default="all-linear")
    parser.add_argument("--output", type=local_path, required=True)
    options = parser.parse_args()
    if options.lora_target != "all-linear":
        options.lora_target = options.lora_target.split(",")
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raise UserError for an impossible rank, and for an output that cannot be written."""
    if options.lora_rank < 1:
        raise UserError(f"--lora_rank must be at least 1, not {options.lora_rank}")
    if options.output.exists():
        raise UserError(f"output {options.output} exists; choose another directory, or remove it first")
    check_writable("output", options.output, parents=True)
    check_output("output", options.output)


class Models:
    """The files of two models of one shape, read tensor by tensor."""

    def __init__(self, base: Path, tuned: Path):
        self.config = read_config(base)
        self.stored = StoredTensors(base), StoredTensors(tuned)
        with torch.device("meta"):
            self.shape = CausalLM(self.config)
        self.shapes = {name: tuple(p.shape) for name, p in self.shape.named_parameters()}

    def check(self, layers: list[str], rank: int) -> None:
        """Raise UserError for weights that are missing or of another shape, and for too large a rank."""
        for name in (f"{layer}.weight" for layer in layers):
            if rank > min(self.shapes[name]):
                raise UserError(f"--lora_rank {rank} exceeds a side of {name}, {self.shapes[name]}; lower it")
        for stored in self.stored:
            problems = []
            for name in (f"{layer}.weight" for layer in layers):
                found = self.shapes[name] if name in stored.quantized else stored.shapes.get(name)
                if found != self.shapes[name]:
                    problems.append(f"missing {name}" if found is None else f"{name} is {found}")
            if problems:
                raise UserError(
                    f"{stored.directory} has another shape than the base: {summarize(problems, 3)}"
                )

    def weights(self, name: str) -> list[Tensor]:
        """A tensor of both models, float32. 4-bit weights are dequantized."""
        found = []
        for stored in self.stored:
            if name in stored.quantized:
                packed = stored.read_quantized(name, self.shapes[name], torch.float32, "cpu")
                weight = packed.dequantize(torch.float32)
            else:
                weight = stored.read(name, torch.float32, "cpu")
            if not weight.isfinite().all():
                raise UserError(f"{name} in {stored.directory} is infinite or NaN in places")
            found.append(weight)
        return found

    def target_names(self, layers: list[str]) -> list[str]:
        """Leaf names if they choose exactly these layers, else full names."""
        leaves = sorted({layer.rpartition(".")[2] for layer in layers})
        return leaves if match_targets(self.shape, leaves) == layers else layers

    def other_differences(self, layers: list[str]) -> list[str]:
        """Ends of the names, such as norm.weight, of tensors that differ and that no adapted layer has."""
        adapted = {f"{layer}.weight" for layer in layers}
        names = [name for name in self.shapes if name not in adapted and self._differs(name)]
        return [".".join(name.split(".")[-2:]) for name in names]

    def _differs(self, name: str) -> bool:
        if any(stored.shapes.get(name) != self.shapes[name] for stored in self.stored):
            return True  # one of them lacks it, has another vocabulary, or holds 4 bits a weight
        base, tuned = (stored.read(name, torch.float32, "cpu") for stored in self.stored)
        return not torch.equal(base, tuned)


if __name__ == "__main__":
    run_script(main)
