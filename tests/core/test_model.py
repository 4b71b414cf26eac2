"""The decoder against transformers, against the written-out attention, and against itself with packed rows
and a cache.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import FAMILIES, relative_error, same_model_here, transformers_model
from support.pretended_gpu import PretendedGpu

from minilora import CausalLM, KVCache, ops
from minilora.backend.attention_mask import additive
from minilora.backend.documents import PADDING, positions_in_documents
from minilora.formats.config_json import parse_config
from minilora.model import attention_mask

# Both sides compute in float32 and differ in the order of their sums. A sum of n products errs by about
# sqrt(n) * 2^-24 relative (n <= 80 here), and the residual stream passes ~20 of them: 20 * 9 * 6e-8 = 1e-5.
# Seen: below 1e-6.
LOGITS_TOLERANCE = 1e-5


def random_ids(*shape: int, seed: int = 1, vocab: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def small_model(**changes) -> CausalLM:
    config = dict(
        model_type="mistral",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
    )
    model = CausalLM(parse_config(config | changes)).eval()
    model.init_weights(std=0.1)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(family):
    theirs = transformers_model(family)
    ours = same_model_here(theirs)
    ids = random_ids(2, 50)
    assert relative_error(ours(ids), theirs(ids).logits) <= LOGITS_TOLERANCE


@torch.no_grad()
def test_the_comparison_notices_a_wrong_window_and_a_missing_rope_scaling():
    for family, wrong in (
        ("mistral-window", dict(sliding_window=8)),
        ("llama3-rope", dict(rope_scaling=None, rope_parameters=None)),
    ):
        theirs = transformers_model(family)
        raw = theirs.config.to_dict() | {"architectures": [type(theirs).__name__]} | wrong
        ours = CausalLM(parse_config(raw)).eval()
        ours.load_state_dict(theirs.state_dict())
        ids = random_ids(2, 50)
        assert relative_error(ours(ids), theirs(ids).logits) > 100 * LOGITS_TOLERANCE


@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    st.integers(1, 9),
    st.integers(0, 6),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_fused_attention_equals_the_written_out_one(B, heads, T, past, masked):
    (H, G), S, K = heads, T + past, 8
    generator = torch.Generator().manual_seed(B + 10 * T + 100 * past)
    q, k, v = (torch.randn(B, n, t, K, generator=generator) for n, t in ((H, T), (G, S), (G, S)))
    documents = torch.randint(0, 2, (B, S), generator=generator).cumsum(1) if masked else None
    mask = attention_mask(T, S, window=3 if masked else None, document_ids=documents, device=q.device)
    # Softmax weights sum to 1, so the error is that of averaging S <= 15 values below 4: a few float32
    # roundings.
    torch.testing.assert_close(
        ops.attention(q, k, v, mask), ops.attention_reference(q, k, v, mask), rtol=0, atol=5e-6
    )


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.sampled_from([None, 4]), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_packed_documents_give_the_logits_of_the_documents_alone(lengths, window, padding):
    model = small_model(sliding_window=window)
    documents = [random_ids(1, n, seed=i) for i, n in enumerate(lengths)]
    ids = torch.cat([*documents, random_ids(1, padding, seed=99)], dim=1)
    document_ids = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)] + [PADDING] * padding])
    packed = model(ids, document_ids=document_ids)
    alone = torch.cat([model(d) for d in documents], dim=1)
    # The same numbers, but a masked softmax sums exact zeros in another order than a shorter one: float32
    # roundings only.
    assert relative_error(packed[:, : alone.shape[1]], alone) <= LOGITS_TOLERANCE


@torch.no_grad()
def test_a_token_of_another_document_changes_nothing():
    model = small_model()
    ids, document_ids = random_ids(1, 10), torch.tensor([[0] * 4 + [1] * 6])
    changed = ids.clone()
    changed[0, :4] = (ids[0, :4] + 1) % 97
    assert torch.equal(
        model(ids, document_ids=document_ids)[:, 4:], model(changed, document_ids=document_ids)[:, 4:]
    )


def test_positions_restart_with_every_document():
    ids = torch.tensor([[7, 7, 7, 2, 2, 7], [0, 0, 0, 0, 0, 0]])
    assert positions_in_documents(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 1, 11], [13, 7]])
@torch.no_grad()
def test_logits_with_the_cache_equal_those_without(window, chunks):
    model = small_model(sliding_window=window)
    ids = random_ids(2, 20)
    cache = KVCache(model.config, 2, 20, torch.float32, "cpu")
    with_cache = torch.cat([model(part, cache=cache) for part in ids.split(chunks, dim=1)], dim=1)
    assert cache.length == 20
    assert relative_error(with_cache, model(ids)) <= LOGITS_TOLERANCE


@torch.no_grad()
def test_logits_with_the_cache_equal_those_without_on_packed_rows():
    model = small_model(sliding_window=3)
    ids = random_ids(2, 12)
    document_ids = torch.tensor([[PADDING] * 3 + [0] * 9, [0] * 5 + [1] * 7])
    cache = KVCache(model.config, 2, 12, torch.float32, "cpu")
    parts = zip(ids.split([6, 1, 5], dim=1), document_ids.split([6, 1, 5], dim=1), strict=True)
    with_cache = torch.cat([model(i, document_ids=d, cache=cache) for i, d in parts], dim=1)
    without = model(ids, document_ids=document_ids)
    real = document_ids != PADDING  # padding's own numbers are arbitrary
    assert relative_error(with_cache[real], without[real]) <= LOGITS_TOLERANCE


def test_a_tied_head_is_the_embedding_itself():
    model = small_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


@torch.no_grad()
def test_half_precision_logits_stay_close_to_float32():
    model = small_model()
    ids = random_ids(1, 16)
    full = model(ids)
    # bfloat16 has 8 significand bits: a rounding errs by at most 2^-8, 0.2 % in the root mean square. About
    # 30 roundings lie between ids and logits, adding up like a random walk: sqrt(30) * 0.2 % = 1 % of the
    # largest logit; three times is allowed.
    assert relative_error(model.bfloat16()(ids).float(), full) < 0.03


def test_a_cache_of_padded_rows_asks_for_the_documents_of_new_tokens_and_the_gpu_is_not_asked():
    model = same_model_here(transformers_model("llama-gqa"))
    with torch.no_grad(), PretendedGpu() as gpu:
        model.cuda()
        padded, plain = (
            KVCache(model.config, 1, 8, torch.float32, torch.device("cuda", 0)) for _ in range(2)
        )
        tokens, token = torch.ones(1, 4, dtype=torch.long).cuda(), torch.ones(1, 1, dtype=torch.long).cuda()
        model(tokens, document_ids=torch.tensor([[PADDING, 0, 0, 0]]).cuda(), cache=padded)
        model(tokens, cache=plain)
        with gpu.during() as record:
            with pytest.raises(ValueError, match="document_ids"):
                model(token, cache=padded)
            model(token, cache=plain)
        assert plain.length == 5 and not record.waits and not gpu.faults


MASKED = {
    "packed": (dict(), torch.tensor([[0] * 4 + [1] * 5 + [2] * 4])),
    "windowed": (dict(model_type="mistral", sliding_window=3), None),
    "both": (dict(model_type="mistral", sliding_window=3), torch.tensor([[0] * 4 + [1] * 5 + [2] * 4])),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", MASKED)
def test_backward_needs_no_mask(case, dtype):
    changes, documents = MASKED[case]
    model = small_model(num_hidden_layers=3, **changes).to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        logits = model(torch.arange(13).unsqueeze(0), document_ids=documents)
    logits.float().sum().backward()
    assert (13, 4, 8) in kept and not any(shape[-2:] == (13, 13) for shape in kept)


def test_the_rows_of_a_mask_begin_at_multiples_of_8_numbers():
    mask = torch.rand(2, 1, 5, 11) < 0.5
    added = additive(mask, torch.empty(0, dtype=torch.bfloat16))
    assert added.stride() == (80, 80, 16, 1) and added.dtype == torch.bfloat16
    assert torch.equal(added.float().exp(), mask.float()) and additive(None, added) is None
