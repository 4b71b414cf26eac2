"""VeRA against PEFT: shared matrices, forward and gradients through the layers of LoRA."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import relative_error, same_model_here, transformers_model
from support.tiny import AFTER_20_STEPS, ALL_SEVEN, TOLERANCE, ids
from support.vera import peft_vera, vectors_of

from minilora import LoraConfig, add_lora
from minilora.lora import lora_layers
from minilora.optim import make_optimizer
from minilora.vera import factors, initial_vectors, shared_projections


class OurVera:
    """Our model with the same vectors: LoRA's layers, given the factors that VeRA computes."""

    def __init__(self, theirs, family="llama-gqa"):
        self.vectors = {
            layer: tuple(v.detach().clone().requires_grad_() for v in pair)
            for layer, pair in vectors_of(theirs).items()
        }
        self.model = same_model_here(transformers_model(family))
        r = len(next(iter(self.vectors.values()))[0])
        add_lora(self.model, LoraConfig(r=r, lora_alpha=r, target_modules=tuple(self.vectors)))
        self.widths = {n: layer.base_layer.in_features for n, layer in lora_layers(self.model).items()}
        widest_out = max(len(b) for _, b in self.vectors.values())
        self.shared = shared_projections(r, max(self.widths.values()), widest_out, seed=0)

    def __call__(self, batch, **labels):
        """The same call as the model's, with factors in place of its parameters."""
        parameters = {}
        for layer, pair in self.vectors.items():
            A, B = factors(*pair, *self.shared, self.widths[layer])
            parameters |= {f"{layer}.lora_A.default": A, f"{layer}.lora_B.default": B}
        return torch.func.functional_call(self.model, parameters, (batch,))

    def loss(self, batch):
        logits = self(batch)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**63])
@pytest.mark.parametrize("r", [1, 8])
def test_shared_matrices_are_bit_identical_to_pefts(seed, r):
    theirs = peft_vera(r=r, projection_prng_key=seed, target_modules=list(ALL_SEVEN)).base_model
    A, B = shared_projections(r, 80, 80, seed)  # the widest in and out of the model
    assert torch.equal(A, theirs.vera_A["default"]) and torch.equal(B, theirs.vera_B["default"])


def test_shared_matrices_are_the_same_whatever_pytorchs_defaults_and_state_are():
    A, B = shared_projections(4, 8, 6, 3)
    torch.manual_seed(99)
    with torch.device("meta"):
        again = shared_projections(4, 8, 6, 3)
    assert torch.equal(A, again[0]) and torch.equal(B, again[1])


def test_vectors_start_as_pefts_so_that_the_model_starts_as_the_base_model():
    theirs = peft_vera(randomize=False, d_initial=0.25)
    for lambda_d, lambda_b in vectors_of(theirs).values():
        mine = initial_vectors(6, len(lambda_b), d_initial=0.25)
        assert torch.equal(mine[0], lambda_d) and torch.equal(mine[1], lambda_b)
    ours, base = OurVera(theirs), same_model_here(transformers_model("llama-gqa"))
    assert torch.equal(ours(ids(2, 12)), base(ids(2, 12)))


@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window", "qwen2-bias-tied", "qwen3-qk-norm"])
def test_forward_and_the_gradients_of_both_vectors_are_pefts(family):
    theirs = peft_vera(family, target_modules=list(ALL_SEVEN))
    ours, batch = OurVera(theirs, family), ids(2, 20)
    assert relative_error(ours(batch), theirs(input_ids=batch).logits) <= TOLERANCE
    ours.loss(batch).backward()
    theirs(input_ids=batch, labels=batch).loss.backward()
    for layer, expected in vectors_of(theirs).items():
        for mine, other in zip(ours.vectors[layer], expected, strict=True):
            # A sum over all tokens and a row's or a column's numbers, which may cancel: twice a weight's bound.
            assert other.grad.any() and relative_error(mine.grad, other.grad) <= 2 * TOLERANCE, layer


def test_20_adamw_steps_are_pefts():
    theirs = peft_vera(randomize=False)
    ours, generator = OurVera(theirs), torch.Generator().manual_seed(3)
    names = {f"{layer}.{i}": v for layer, pair in ours.vectors.items() for i, v in enumerate(pair)}
    optimizer = make_optimizer("adamw_torch", names, lr=1e-2, weight_decay=0.01)
    reference = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01
    )
    for _ in range(20):
        batch = torch.randint(0, 97, (2, 16), generator=generator)
        ours.loss(batch).backward()
        theirs(input_ids=batch, labels=batch).loss.backward()
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    for layer, expected in vectors_of(theirs).items():
        for mine, other in zip(ours.vectors[layer], expected, strict=True):
            assert relative_error(mine, other) <= AFTER_20_STEPS, layer
    assert all(v.abs().max() > 0.05 for _, v in ours.vectors.values())  # lambda_b was trained, from 0


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    spare=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_factors_are_the_papers_and_gradients_are_row_sums(shape, spare, seed):
    r, in_features, out_features = shape
    A, B = shared_projections(r, in_features + spare[0], out_features + spare[1], seed)
    generator = torch.Generator().manual_seed(seed)
    lambda_d, lambda_b = (torch.randn(n, generator=generator, requires_grad=True) for n in (r, out_features))
    found_A, found_B = factors(lambda_d, lambda_b, A, B, in_features)
    assert torch.equal(found_A, torch.diag(lambda_d) @ A[:, :in_features])
    assert torch.equal(found_B, torch.diag(lambda_b) @ B[:out_features])
    dA, dB = (torch.randn(t.shape, generator=generator) for t in (found_A, found_B))
    grads = torch.autograd.grad((found_A, found_B), (lambda_d, lambda_b), (dA, dB))
    torch.testing.assert_close(
        grads[0], (dA * A[:, :in_features]).sum(1), rtol=0, atol=1e-5
    )  # <= 9 terms, |x| < 40
    torch.testing.assert_close(grads[1], (dB * B[:out_features]).sum(1), rtol=0, atol=1e-5)
