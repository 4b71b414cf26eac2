"""Every kind of LoRA adapter that PEFT writes, on tiny bases: what the tests compare, and the matrix in docs/."""

from dataclasses import dataclass, field

import pytest
import torch

from support.families import transformers_model


@dataclass(frozen=True)
class Kind:
    """An adapter as PEFT makes it."""

    lora: dict  # PEFT's LoraConfig, but for r, lora_alpha and target_modules where these are as usual
    family: str = "llama-mha"
    vocab_size: int | None = None  # the base's vocabulary is resized before the adapter is added
    saving: dict = field(default_factory=dict)  # for save_pretrained
    vera: bool = False

    def config(self):
        """PEFT's configuration."""
        peft = pytest.importorskip("peft")
        usual = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        if self.vera:
            return peft.VeraConfig(**usual | self.lora)
        return peft.LoraConfig(**usual | dict(lora_alpha=8) | self.lora)

    @property
    def doubled(self) -> bool:
        """Whether PEFT took a part out of W. We save such an adapter as plain LoRA of twice the rank."""
        return self.lora.get("init_lora_weights") in ("pissa", "olora")


TIED = "qwen2-bias-tied"
_EMBEDDINGS = ["embed_tokens", "lm_head"]

KINDS = {
    "plain": Kind({}),
    "rslora": Kind(dict(use_rslora=True)),
    "dora": Kind(dict(use_dora=True)),
    "all-linear": Kind(dict(target_modules="all-linear")),
    "regex": Kind(dict(target_modules=r".*layers\.[02]\.self_attn\.[qv]_proj")),
    "names of other families": Kind(dict(target_modules=["q_proj", "v_proj", "out_proj", "fc1"])),
    "modules_to_save": Kind(dict(modules_to_save=_EMBEDDINGS)),
    "modules_to_save, tied": Kind(dict(modules_to_save=_EMBEDDINGS), TIED),
    "modules_to_save, the embedding of a tied base": Kind(dict(modules_to_save=["embed_tokens"]), TIED),
    "modules_to_save, norms": Kind(dict(modules_to_save=["norm"])),
    "modules_to_save, a linear layer": Kind(dict(modules_to_save=["k_proj"]), TIED),
    "modules_to_save, a block of layers": Kind(dict(modules_to_save=["mlp"])),
    "resized vocabulary": Kind({}, vocab_size=101),
    "resized vocabulary, tied": Kind({}, TIED, vocab_size=101),
    "resized vocabulary, trained": Kind(dict(modules_to_save=_EMBEDDINGS), vocab_size=101),
    "resized vocabulary, trained rows": Kind(dict(trainable_token_indices=[97, 98]), vocab_size=101),
    "resized vocabulary, trained rows, tied": Kind(
        dict(trainable_token_indices=[97, 98]), TIED, vocab_size=101
    ),
    "resized vocabulary, trained rows of both": Kind(
        dict(trainable_token_indices={"embed_tokens": [97, 98], "lm_head": [97]}), vocab_size=101
    ),
    "embeddings saved unchanged": Kind({}, saving=dict(save_embedding_layers=True)),
    "LoRA on lm_head": Kind(dict(target_modules=["q_proj", "v_proj", "lm_head"])),
    "LoRA on lm_head, tied": Kind(dict(target_modules=["q_proj", "v_proj", "lm_head"]), TIED),
    "LoRA on embed_tokens": Kind(dict(target_modules=["q_proj", "v_proj", "embed_tokens"])),
    "LoRA on both embeddings, tied": Kind(dict(target_modules=["q_proj", "v_proj", *_EMBEDDINGS]), TIED),
    "LoRA on both embeddings, resized": Kind(
        dict(target_modules=["q_proj", "v_proj", *_EMBEDDINGS]), vocab_size=101
    ),
    "rank_pattern": Kind(dict(rank_pattern={"q_proj": 2})),
    "rank_pattern, full names": Kind(
        dict(rank_pattern={"model.layers.0.self_attn.q_proj": 2, "^model.layers.1.self_attn.v_proj": 8})
    ),
    "rank_pattern that matches nothing": Kind(dict(rank_pattern={"up_proj": 2})),
    "alpha_pattern": Kind(dict(alpha_pattern={r"layers\.[12]\..*v_proj": 32.0})),
    "rank_pattern and alpha_pattern, rslora": Kind(
        dict(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}, use_rslora=True)
    ),
    "layers_to_transform": Kind(dict(layers_to_transform=[1])),
    "layers_to_transform, all": Kind(dict(layers_to_transform=[0, 1, 2])),
    "layers_pattern": Kind(dict(layers_to_transform=[0, 2], layers_pattern="layers")),
    "exclude_modules": Kind(dict(exclude_modules=["layers.1.self_attn.q_proj"])),
    "exclude_modules that name nothing": Kind(dict(exclude_modules=["lm_head"])),
    "lora_bias": Kind(dict(lora_bias=True)),
    "bias, lora_only": Kind(dict(bias="lora_only"), TIED),
    "bias, all": Kind(dict(bias="all"), TIED),
    "trainable_token_indices": Kind(dict(trainable_token_indices=[5, 6])),
    "trainable_token_indices, tied": Kind(dict(trainable_token_indices=[5, 6]), TIED),
    "trainable_token_indices of both": Kind(
        dict(trainable_token_indices={"embed_tokens": [5], "lm_head": [3, 4]})
    ),
    "trainable_token_indices and modules_to_save": Kind(
        dict(trainable_token_indices=[5], modules_to_save=["lm_head"])
    ),
    "a LoftQ configuration left over": Kind(dict(loftq_config={"loftq_bits": 4, "loftq_iter": 1})),
    "gaussian, written with a capital": Kind(dict(init_lora_weights="Gaussian")),
    "orthogonal": Kind(dict(init_lora_weights="orthogonal")),
    "pissa": Kind(dict(init_lora_weights="pissa")),
    "olora": Kind(dict(init_lora_weights="olora", rank_pattern={"q_proj": 2}, use_rslora=True)),
    "vera": Kind(dict(r=6, target_modules=["q_proj", "v_proj", "down_proj"]), vera=True),
    "vera, the matrices drawn again": Kind(dict(save_projection=False, projection_prng_key=7), vera=True),
}


def base_of(kind: Kind):
    """The base model in transformers, with the vocabulary of before."""
    return transformers_model(kind.family)


def peft_model(kind: Kind, directory, base=None):
    """A PEFT model of this kind with random values everywhere, in evaluation mode; its base is saved in `directory`."""
    peft = pytest.importorskip("peft")
    base = base or base_of(kind)
    base.save_pretrained(directory)
    if kind.vocab_size:
        torch.manual_seed(1)
        base.resize_token_embeddings(kind.vocab_size)
    model = peft.get_peft_model(base, kind.config())
    model.peft_config["default"].base_model_name_or_path = str(directory)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def peft_again(kind: Kind, directory):
    """What PEFT makes of an adapter directory, on a base whose vocabulary is resized as PEFT demands."""
    peft = pytest.importorskip("peft")
    base = base_of(kind)
    if kind.vocab_size:
        torch.manual_seed(1)
        base.resize_token_embeddings(kind.vocab_size)
    return peft.PeftModel.from_pretrained(base, directory).eval()
