"""The chunked loss is the plain one, in a memory that does not grow with the logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pretended_gpu import PretendedGpu
from support.tiny import small_model

import minilora.loss
from minilora import trainable_parameters
from minilora.loss import IGNORE_INDEX, causal_lm_loss, linear_cross_entropy
from minilora.testing import peak_memory


def plain(hidden, weight, labels):
    """The whole logits at once, through PyTorch's autograd."""
    return F.cross_entropy(
        (hidden @ weight.T).float().flatten(0, -2),
        labels.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)).item()


@st.composite
def problems(draw):
    """(hidden, weight, labels): several rows with masks of their own, some of them empty."""
    B, T, D, V = (draw(st.integers(1, most)) for most in (3, 40, 48, 700))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    hidden = torch.randn(B, T, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * draw(st.sampled_from([0.02, 0.3, 1.0]))
    labels = torch.randint(0, V, (B, T), generator=generator)
    for row in labels:
        row[draw(st.integers(0, T)) :] = IGNORE_INDEX
        row[: draw(st.integers(0, T))] = IGNORE_INDEX
    return hidden, weight, labels


@settings(deadline=None)
@given(problems(), st.integers(1, 50), st.floats(0.001, 1000))
def test_loss_and_gradients_equal_the_plain_ones_over_ragged_masks_and_chunks(problem, places, factor):
    hidden, weight, labels = (t.requires_grad_(t.is_floating_point()) for t in problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minilora.loss, "LOGITS_BYTES", 4 * len(weight) * places)
        loss = linear_cross_entropy(hidden, weight, labels)
        found = torch.autograd.grad(factor * loss, (hidden, weight))
    expected_loss = plain(hidden, weight, labels)
    expected = torch.autograd.grad(factor * expected_loss, (hidden, weight))
    assert loss.dtype == torch.float32 and difference(loss, expected_loss) <= 1e-6
    # dh is a difference, of the mean row of W and the target's: the error is relative to what is subtracted.
    # A softmax is exp of a difference of logits: their size, up to some 25 here, times 2^-24 is its error,
    # 1.5e-6 for single places, less in the norm.
    with torch.no_grad():
        supervised = labels != IGNORE_INDEX
        h, d_logits = hidden[supervised], (hidden[supervised] @ weight.T).softmax(-1)
        d_logits += F.one_hot(labels[supervised], len(weight))
        terms = torch.zeros_like(hidden)
        terms[supervised] = factor * d_logits @ weight.abs()
        terms = terms, factor * d_logits.T @ h.abs()
    assert all((a - b).norm() <= 1.5e-6 * t.norm() for a, b, t in zip(found, expected, terms, strict=True))


@pytest.mark.parametrize("vocab_size", [1000, 32_000])
def test_at_the_sizes_of_a_model_gradients_are_within_1e6_of_the_plain_ones(vocab_size, monkeypatch):
    monkeypatch.setattr(minilora.loss, "LOGITS_BYTES", 4 * vocab_size * 50)
    torch.manual_seed(0)
    hidden, weight = (
        torch.randn(2, 70, 64, requires_grad=True),
        (0.02 * torch.randn(vocab_size, 64)).requires_grad_(),
    )
    labels = torch.randint(0, vocab_size, (2, 70)).masked_fill_(torch.rand(2, 70) < 0.3, IGNORE_INDEX)
    found = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), (hidden, weight))
    expected = torch.autograd.grad(plain(hidden, weight, labels), (hidden, weight))
    assert all(
        difference(a, b) <= 1e-6 for a, b in zip(found, expected, strict=True)
    )  # some ten float32 roundings, at random


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_at_least_as_exact_as_the_plain_one(dtype):
    torch.manual_seed(0)
    hidden, weight, labels = (
        torch.randn(40, 32).to(dtype),
        (0.3 * torch.randn(500, 32)).to(dtype),
        torch.randint(0, 500, (40,)),
    )
    hidden.requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(exact, weight.double(), labels), exact)
    errors = []
    for loss in (linear_cross_entropy, plain):
        (found,) = torch.autograd.grad(1024 * loss(hidden, weight, labels), hidden)  # under a loss scale
        assert found.dtype == dtype
        errors.append(difference(found / 1024, expected))
    assert errors[0] <= 1.05 * errors[1]


def test_float16_keeps_gradients_that_are_smaller_than_it_can_hold_until_they_are_scaled():
    """A nearly certain place: the other token's p = 2e-9 is nothing in float16, and something after the loss
    scale.
    """
    hidden = torch.ones(1, 16, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[0.0], [-20 / 16]], dtype=torch.float16).expand(2, 16)  # logits 0 and -20
    (found,) = torch.autograd.grad(65536.0 * linear_cross_entropy(hidden, weight, torch.tensor([0])), hidden)
    expected = 65536 * torch.sigmoid(torch.tensor(-20.0)) * -20 / 16
    # 1024 p = 2.1e-6 is between two multiples of float16's 2^-24 = 6e-8, half a step of which is 1.4 %.
    assert found.float().flatten().tolist() == pytest.approx([expected.item()] * 16, rel=0.02)


def test_memory_does_not_grow_with_vocabulary_times_length():
    """At V = 128k: 2048 places would be 1 GB of logits, and as much for their gradient."""
    D, V, limit = 16, 128_000, 16 << 20
    weight = torch.randn(V, D) * 0.02

    def peak(places: int) -> int:
        hidden, labels = torch.randn(places, D, requires_grad=True), torch.randint(0, V, (places,))
        return peak_memory(lambda: linear_cross_entropy(hidden, weight, labels).backward())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minilora.loss, "LOGITS_BYTES", limit)
        small, large = peak(256), peak(2048)
    # What may grow: hidden states of the learned places, their gradient twice (ours, and what backward
    # returns), labels; and the selection's index. 6 float32 tensors (places, D) and 4 int64 (places,) are
    # more than that.
    assert large - small <= (2048 - 256) * (6 * 4 * D + 4 * 8)
    assert large <= 2 * limit + 2048 * (6 * 4 * D + 4 * 8)  # logits, and what log_softmax makes of them


def test_nothing_supervised_is_a_loss_of_zero_with_zero_gradients():
    hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8)
    loss = linear_cross_entropy(hidden, weight, torch.full((2, 3), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any()


def test_a_head_with_an_adapter_has_the_loss_and_the_gradients_of_its_logits(monkeypatch):
    model = small_model(targets=["lm_head", "v_proj"], dropout=0.0)
    monkeypatch.setattr(minilora.loss, "LOGITS_BYTES", 4 * 97 * 5)
    ids = torch.randint(0, 97, (2, 12))
    parameters = list(trainable_parameters(model).values())
    found = torch.autograd.grad(causal_lm_loss(model, ids, ids), parameters)
    expected = torch.autograd.grad(
        F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"), parameters
    )
    # Sums over the places in another order: some ten float32 roundings.
    assert all(difference(a, b) <= 1e-6 for a, b in zip(found, expected, strict=True))


def test_evaluation_computes_no_gradient(monkeypatch):
    """The second product, with the head's weight, is left out."""
    products = []
    hidden, weight = torch.randn(3, 8), torch.randn(11, 8)
    monkeypatch.setattr(F, "linear", lambda *a, linear=F.linear: products.append(1) or linear(*a))

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            products.append(
                operation.overloadpacket.__name__
            ) if operation.overloadpacket.__name__ == "mm" else None
            return operation(*args, **(kwargs or {}))

    with Count():
        linear_cross_entropy(hidden, weight, torch.tensor([1, 2, 3]))
    assert products.count("mm") == 1


@pytest.mark.parametrize("targets", ["v_proj", "lm_head"])
def test_labels_of_the_host_and_labels_of_the_gpu_give_one_loss_and_only_these_are_waited_for(targets):
    model = small_model(targets=[targets], dropout=0.0)
    ids = torch.randint(0, 97, (2, 12))
    labels = ids.masked_fill(torch.rand(2, 12) < 0.5, IGNORE_INDEX)
    expected = causal_lm_loss(model, ids, labels).item()
    losses, waits = [], []
    with PretendedGpu() as gpu:
        model.cuda()
        ids = ids.cuda()
        causal_lm_loss(model, ids, labels).backward()  # fills the caches of the device
        for given_labels in (labels, labels.cuda()):
            with gpu.during() as record:
                loss = causal_lm_loss(model, ids, given_labels)
                loss.backward()
            losses.append(loss.item())
            waits.append(sum(record.waits.values()))
    assert losses == [pytest.approx(expected, rel=1e-5)] * 2 and losses[0] == losses[1]
    assert waits == [0, 1] and not gpu.faults
