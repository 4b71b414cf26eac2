"""Convert pickled weights to safetensors: the same names, the same numbers, and no pickle to read again.

    python scripts/convert.py --model old-model --output new-model        pytorch_model.bin, also in shards
    python scripts/convert.py --model old-adapter --output new-adapter    adapter_model.bin

The model is a directory or a hub id. Configuration, tokenizer, model card and licence are copied. The output
appears complete or not at all. `minilora/formats/pickled.py` tells what is read of a pickle, and what never.
"""

if __name__ == "__main__":
    import minilora.system.interrupts  # noqa: F401  first, for Ctrl-C during the other imports
    from minilora.system.early_help import answer_help

    answer_help(__doc__)

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minilora.adapters.peft_format import ADAPTER_WEIGHTS_FILE, PICKLED_WEIGHTS_FILE
from minilora.formats.pickled import read_pickled_tensors
from minilora.formats.weight_files import index_of, weight_files
from minilora.formats.weights import save_tensors, write_shards
from minilora.system.errors import ArgumentParser, UserError, local_path, run_script, summarize
from minilora.system.files import check_writable
from minilora.system.hub import MODEL_FILES, resolve_model
from minilora.system.outputs import check_output, whole_output
from minilora.system.schema import shown_name

COPIED = (*MODEL_FILES, "README.md", "LICENSE*", "NOTICE*")


def main() -> None:
    parser = ArgumentParser(help_text=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=local_path, required=True)
    options = parser.parse_args()
    if options.output.exists():
        raise UserError(f"output {options.output} exists; choose another directory, or remove it first")
    check_writable("output", options.output, parents=True)
    check_output("output", options.output)
    convert(resolve_model(options.model), options.output)


def convert(source: Path, output: Path) -> None:
    """Write the tensors of a directory as safetensors, with the other files of the model beside them."""
    adapter = source / PICKLED_WEIGHTS_FILE
    files = {adapter: set()} if adapter.exists() else weight_files(source)
    if found := sorted(path.name for path in source.glob("*.safetensors")):
        raise UserError(f"{source} holds {found[0]} already; there is nothing to convert")
    with whole_output("output", output) as part:
        part.mkdir()
        if adapter.exists():
            save_tensors({name: own(t) for name, t in tensors_of(files)}, part / ADAPTER_WEIGHTS_FILE)
        else:
            write_shards(({name: own(t)} for name, t in tensors_of(files)), part)
        for path in sorted({path for pattern in COPIED for path in source.glob(pattern)}):
            if path.is_file() and not path.name.endswith(".index.json"):
                shutil.copyfile(path, part / path.name)
    size = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    print(f"{output} holds the same tensors as safetensors, {size / 1e6:,.0f} MB")


def tensors_of(files: dict[Path, set[str]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, one file after the other. Raises UserError for one that is missing, or there twice."""
    seen = set()
    for path, promised in files.items():
        tensors = read_pickled_tensors(path)
        if lacking := sorted(promised - tensors.keys()):
            problem = f"{path} lacks {summarize([shown_name(name) for name in lacking], 3)}"
            raise UserError(f"{problem}, which {index_of(path)} puts there; download again")
        if twice := sorted(seen & tensors.keys()):
            raise UserError(f"{path} holds {shown_name(twice[0])}, which another file holds too")
        seen |= tensors.keys()
        yield from tensors.items()


def own(tensor: Tensor) -> Tensor:
    """A copy in rows, which shares its memory with no other tensor, as safetensors wants it."""
    return tensor.clone(memory_format=torch.contiguous_format)


if __name__ == "__main__":
    run_script(main)
