"""Small tokenizer.json files of the three forms, and directories of JSON files."""

import json
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
CORPUS = [
    "Hello world, hello there! The sea is calm tonight.",
    "Grüße aus Köln",
    "日本語のテキスト 🙂🙃",
    "1 + 2 = 3\n\n\tx",
]


def write(directory: Path, **files: dict) -> Path:
    """A directory with JSON files, each named by its stem."""
    directory.mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def byte_level_json(bos: bool) -> dict:
    """A small byte-level BPE: Llama 3's form, with BOS by the post-processor, or Qwen's, without it and with NFC."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BOS, EOS, PAD],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 3, trainer)
    steps = [processors.ByteLevel(trim_offsets=False)]
    if bos:
        steps.append(
            processors.TemplateProcessing(
                single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
            )
        )
    else:
        backend.normalizer = normalizers.NFC()
    backend.post_processor = processors.Sequence(steps)
    return json.loads(backend.to_str())


def byte_fallback_json() -> dict:
    """A character vocabulary in the form of Llama 2's tokenizer.json: "▁" for spaces, bytes for the rest."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ehlorwdé", "he", "▁h"]
    vocab, merges = {piece: i for i, piece in enumerate(pieces)}, [("h", "e"), ("▁", "h")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(backend.to_str())
