"""Formats of weights that are not read here: refused by name, with the files to take instead.

Two places tell a quantized format: `quant_method` in `quantization_config` and, where a directory has no such
field, the names of the tensors beside each weight. To read them all would take a decoder for each, and most
exist to serve a model faster, not to train on it. LoRA is trained on the weights that they were made from.
"""

from collections.abc import Iterable
from pathlib import Path

from minilora.system.errors import UserError
from minilora.system.schema import shown, shown_name

_METHODS = {  # quant_method: its name among people
    "gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound", "intel/auto-round": "AutoRound",
    "fp8": "FP8 in blocks", "fbgemm_fp8": "FBGEMM's FP8", "compressed-tensors": "compressed-tensors (vLLM)",
    "modelopt": "NVIDIA's ModelOpt", "nvfp4": "NVFP4", "mxfp4": "MXFP4", "mxfp8": "MXFP8",
    "fouroversix": "Four over Six", "fp_quant": "FP-Quant", "quark": "AMD's Quark", "torchao": "torchao",
    "quanto": "Quanto", "hqq": "HQQ", "eetq": "EETQ", "aqlm": "AQLM", "vptq": "VPTQ", "spqr": "SpQR",
    "higgs": "HIGGS", "sinq": "SINQ", "quip": "QuIP#", "exl2": "ExLlamaV2", "exl3": "ExLlamaV3",
    "marlin": "Marlin", "squeezellm": "SqueezeLLM", "bitnet": "BitNet", "gguf": "GGUF", "metal": "Metal",
    "mlx": "MLX",
}  # fmt: skip
_TENSORS = {  # the last part of a tensor's name: the format that has it. The first one found counts.
    "g_idx": "GPTQ", "qzeros": "AWQ", "weight_packed": "compressed-tensors (vLLM)",
    "weight_scale_inv": "FP8 in blocks", "weight_scale_2": "NVIDIA's ModelOpt", "biases": "MLX", "W_q": "HQQ",
    "weight_scales": "EETQ", "codebooks": "AQLM", "centroids": "VPTQ", "dense_weights": "SpQR",
    "tables2": "HIGGS", "Qidxs": "QuIP#", "q_invperm": "ExLlamaV2", "trellis": "ExLlamaV3",
    "_data": "Quanto", "_weight_qdata": "torchao", "weight_scale": "scaled weights such as FP8",
}  # fmt: skip
_TAKE = (
    "only bitsandbytes in 4 or 8 bits is read: take the model that it was made from (its card names it), or "
    "one that bitsandbytes quantized"
)


def refuse_method(method: str | None, field: str) -> None:
    """Raise UserError that names the format which `field` of a config.json says the files are in."""
    name = _METHODS.get(method or "", "an unnamed method" if method is None else shown(method))
    raise UserError(f"{field} is of {name}; {_TAKE}")


def refuse_foreign_tensors(directory: Path, names: Iterable[str]) -> None:
    """Raise UserError if tensors are named as a format names them that is not read here."""
    leaves: dict[str, str] = {}
    for name in names:
        leaves.setdefault(name.rpartition(".")[2], name)
    if leaf := next((leaf for leaf in _TENSORS if leaf in leaves), None):
        raise UserError(f"{directory} holds {shown_name(leaves[leaf])}, as in {_TENSORS[leaf]}; {_TAKE}")


def foreign_files(directory: Path) -> str:
    """What lies in a directory without a model, and what to take instead: the end of a message, or ""."""
    files = sorted(filter(Path.is_file, directory.glob("*")))
    if found := [path.name for path in files if path.suffix == ".gguf"]:
        return (
            f" ({shown_name(found[0])} is GGUF, llama.cpp's format, which is written here but not read: take "
            "the model that it was made from, which its card names)"
        )
    if found := [path.name for path in files if path.suffix in (".pth", ".pt", ".bin")]:
        return f" ({shown_name(found[0])} has a layout of its own: take the model in Hugging Face's)"
    return ""
