"""A VeRA adapter of PEFT on a tiny model."""

import pytest
import torch

from support.families import transformers_model


def peft_vera(family="llama-gqa", randomize=True, **changes):
    """A transformers model with a VeRA adapter of PEFT, whose vectors are random."""
    peft = pytest.importorskip("peft")
    config = dict(r=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM") | changes
    model = peft.get_peft_model(transformers_model(family), peft.VeraConfig(**config)).eval()
    if randomize:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "vera_lambda" in name:
                    parameter.copy_(
                        0.3 * torch.randn(parameter.shape, generator=generator)
                    )  # an update of W's size
    return model


def vectors_of(theirs) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """PEFT's lambda_d and lambda_b by layer."""
    return {
        path.removeprefix("base_model.model."): (
            layer.vera_lambda_d["default"],
            layer.vera_lambda_b["default"],
        )
        for path, layer in theirs.named_modules()
        if hasattr(layer, "vera_lambda_d")
    }
