"""RoPE and the ways to stretch its context, against transformers: frequencies to the bit, logits, and the cache.

Here a context is at first 32 tokens long, or 16 for LongRoPE. Documents of 12 tokens lie within, those of 40
and 60 beyond.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import FAMILIES, config_dict, relative_error, same_model_here, transformers_model
from support.pretended_gpu import PretendedGpu

from minilora import CausalLM, KVCache, generate
from minilora.backend import elementwise
from minilora.backend.choice import fastest
from minilora.backend.documents import PADDING, lengths_in_documents
from minilora.formats.config_json import parse_config, to_config_json
from minilora.inference.generation import pad_left
from minilora.ops import rope_definition
from minilora.rope import context_length, frequencies_at

transformers = pytest.importorskip("transformers")

from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

# Both sides compute in float32 and differ in the order of their sums: see test_model.
TOLERANCE = 1e-5
SIZES = dict(
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
SHORT, LONG = [1.0 + 0.03 * i for i in range(6)], [1.5 + 0.8 * i for i in range(6)]
LONGROPE = dict(
    rope_type="longrope",
    short_factor=SHORT,
    long_factor=[int(x) for x in LONG],  # whole numbers are numbers too
    original_max_position_embeddings=16,
)
KINDS = {
    "linear": dict(rope_type="linear", factor=3.0),
    "llama3": dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
    "yarn, from max_position_embeddings": dict(rope_type="yarn", factor=4.0),
    "yarn, factor by the contexts": dict(rope_type="yarn", factor=None, original_max_position_embeddings=8),
    "yarn, DeepSeek's attention factor": dict(
        rope_type="yarn", factor=4.0, mscale=1.5, mscale_all_dim=0.5, original_max_position_embeddings=16
    ),
    "yarn, one weight alone": dict(rope_type="yarn", factor=4.0, mscale=1.5),
    "yarn, its own attention factor": dict(rope_type="yarn", factor=4, attention_factor=0.7),
    "yarn, between pairs": dict(
        rope_type="yarn", factor=2.5, truncate=False, beta_fast=5, beta_slow=0.3, finetuned=True
    ),
    "yarn, betas of 0": dict(rope_type="yarn", factor=2.0, beta_fast=0, beta_slow=0),
    "dynamic": dict(rope_type="dynamic", factor=2.3),
    "longrope": LONGROPE,
    "longrope with a factor": LONGROPE | dict(factor=7.0),
    "longrope, its own attention factor": LONGROPE | dict(attention_factor=1.25),
    "longrope that stretches nothing": LONGROPE | dict(original_max_position_embeddings=32),
}
STRETCHED = {name: KINDS[name] for name in ("yarn", "dynamic", "longrope")}
BY_LENGTH = ["dynamic", "longrope"]


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def pair(kind: str, family: str = "llama-gqa"):
    """A transformers model of a family whose RoPE is of a kind, and the same model here."""
    head_dim = {} if family.startswith("qwen2") else dict(head_dim=12)
    rope = dict(rope_parameters=KINDS[kind] | dict(rope_theta=500.0))
    theirs = transformers_model(family, **SIZES | head_dim | rope)
    return theirs, same_model_here(theirs)


# ---- frequencies -----------------------------------------------------------------------------------------------------


def transformers_frequencies(fields: dict, length: int) -> tuple[torch.Tensor, float]:
    """Frequencies and attention factor of a fresh transformers model that reads a text so long."""
    rotary = LlamaRotaryEmbedding(transformers.LlamaConfig.from_dict(fields))
    rotary(torch.zeros(1), torch.tensor([[length - 1]]))
    return rotary.inv_freq, rotary.attention_scaling


@pytest.mark.parametrize("length", [1, 16, 17, 32, 33, 60, 4097])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_and_attention_factor_are_those_of_transformers_to_the_bit(kind, length):
    theta = dict(rope_theta=5e4)
    hub = SIZES | dict(model_type="llama", rope_scaling=KINDS[kind]) | theta
    older = hub | dict(
        rope_scaling={"type" if name == "rope_type" else name: value for name, value in KINDS[kind].items()}
    )
    new = SIZES | dict(model_type="llama", rope_parameters=KINDS[kind] | theta)
    ropes = [parse_config(fields).rope for fields in (hub, older, new)]
    assert ropes[0] == ropes[1] == ropes[2]
    for fields in (hub, older, new):
        expected, attention_factor = transformers_frequencies({**fields}, length)
        assert torch.equal(frequencies_at(ropes[0], 12, length), expected)
        assert ropes[0].attention_factor == attention_factor


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_config_is_the_same_rope_here_and_in_transformers(kind):
    config = parse_config(SIZES | dict(model_type="llama", rope_scaling=KINDS[kind], rope_theta=5e4))
    written = to_config_json(config)
    assert parse_config(written) == config
    expected, attention_factor = transformers_frequencies(written, 40)
    assert torch.equal(frequencies_at(config.rope, 12, 40), expected)
    assert config.rope.attention_factor == attention_factor


def test_an_original_context_beside_rope_scaling_goes_first_as_in_transformers():
    for name in ("llama3", "yarn", "longrope"):
        scaling = KINDS[name] | dict(original_max_position_embeddings=16)
        fields = SIZES | dict(model_type="llama", rope_scaling=scaling, original_max_position_embeddings=24)
        rope = parse_config(fields).rope
        assert rope.original_max_position_embeddings == 24
        expected, attention_factor = transformers_frequencies(fields | dict(rope_scaling={**scaling}), 20)
        assert torch.equal(frequencies_at(rope, 12, 20), expected)
        assert rope.attention_factor == attention_factor


def test_rope_scaling_goes_before_rope_parameters_as_in_transformers():
    both = dict(rope_scaling=KINDS["linear"], rope_parameters=KINDS["dynamic"] | dict(rope_theta=3.0))
    fields = SIZES | dict(model_type="llama", rope_theta=77.0) | both
    expected, _ = transformers_frequencies(fields, 20)
    assert torch.equal(frequencies_at(parse_config(fields).rope, 12, 20), expected)


@settings(max_examples=60, deadline=None)
@given(
    half=st.integers(2, 64),
    theta=st.floats(1.5, 1e7),
    factor=st.floats(1, 64),
    original=st.integers(2, 10**5),
    betas=st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)),
    truncate=st.booleans(),
    length=st.integers(1, 2**20),
    kind=st.sampled_from(["yarn", "dynamic"]),
)
def test_so_it_is_for_any_numbers(half, theta, factor, original, betas, truncate, length, kind):
    scaling = dict(rope_type=kind, factor=factor)
    if kind == "yarn":
        scaling |= dict(beta_fast=max(betas), beta_slow=min(betas), truncate=truncate)
    fields = SIZES | dict(model_type="llama", head_dim=2 * half, max_position_embeddings=original)
    fields |= dict(rope_scaling=scaling, rope_theta=theta)
    rope = parse_config(fields).rope
    expected, attention_factor = transformers_frequencies(fields | dict(rope_scaling={**scaling}), length)
    assert torch.equal(frequencies_at(rope, 2 * half, length), expected)
    assert rope.attention_factor == attention_factor


def test_at_the_new_length_dynamics_slowest_pair_turns_as_far_as_it_did_at_the_old_one():
    # With factor 1, by the derivation in docs/rope.md. Two float32 powers: some 4 units in the last place.
    rope = parse_config(
        SIZES | dict(model_type="llama", rope_scaling=dict(rope_type="dynamic", factor=1.0))
    ).rope
    old, new = frequencies_at(rope, 12, 32), frequencies_at(rope, 12, 320)
    assert (320 * new[-1]).item() == pytest.approx((32 * old[-1]).item(), rel=1e-6)
    assert new[0] == old[0] == 1


@pytest.mark.parametrize(
    "kind, tokens",
    [
        ("linear", 3 * 32),
        ("llama3", 32),  # whose files name the stretched context
        ("yarn", 4 * 16),
        ("yarn, between pairs", 80),  # 2.5 * 32
        ("dynamic", 73),  # 2.3 * 32 = 73.6
        ("longrope", 32),
    ],
)
def test_a_model_is_made_for_the_context_that_vllm_derives(kind, tokens):
    assert context_length(parse_config(SIZES | dict(model_type="llama", rope_scaling=KINDS[kind]))) == tokens
    assert context_length(parse_config(SIZES | dict(model_type="llama"))) == 32


# ---- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [12, 60])
@pytest.mark.parametrize("kind", STRETCHED)
@pytest.mark.parametrize("family", ["llama-gqa", "mistral-window", "qwen2-bias-tied", "qwen3-qk-norm"])
@torch.no_grad()
def test_logits_equal_transformers_within_the_original_context_and_beyond(family, kind, length):
    theirs, ours = pair(kind, family)
    ids = tokens(2, length)
    assert relative_error(ours(ids), theirs(ids).logits) <= TOLERANCE


@pytest.mark.parametrize("kind", STRETCHED)
@torch.no_grad()
def test_the_comparison_notices_rope_that_is_not_stretched(kind):
    theirs, _ = pair(kind)
    plain = CausalLM(parse_config(config_dict(theirs) | dict(rope_parameters=dict(rope_theta=500.0)))).eval()
    plain.load_state_dict(theirs.state_dict())
    ids = tokens(2, 60)
    assert relative_error(plain(ids), theirs(ids).logits) > 100 * TOLERANCE


@pytest.mark.parametrize("kind", STRETCHED)
def test_gradients_equal_transformers_with_cos_and_sin_times_the_attention_factor(kind):
    theirs, ours = pair(kind)
    ids = tokens(2, 40)
    weight = torch.randn(2, 40, 97, generator=torch.Generator().manual_seed(0))
    (ours(ids) * weight).sum().backward()
    (theirs(ids).logits * weight).sum().backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        # As the logits, once more: backward passes as many sums, of N = 80 tokens for a weight's gradient.
        assert relative_error(parameter.grad, expected[name]) <= 2 * TOLERANCE, name


@pytest.mark.parametrize("back", [False, True])
def test_the_c_form_turns_by_scaled_cos_and_sin_to_the_bit(back):
    q, k = torch.randn(2, 5, 4, 12), torch.randn(2, 5, 2, 12)
    angles = torch.randn(1, 5, 6).repeat(1, 1, 2)
    cos, sin = 1.37 * angles.cos(), 1.37 * angles.sin()
    if fastest("rope", q, rope_definition) is rope_definition:
        pytest.skip("the C library is not built here")
    found = elementwise.rope(q, k, cos, sin, back)
    assert all(map(torch.equal, found, rope_definition(q, k, cos, sin, back)))


# ---- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[10] + [1] * 40, [40, 1, 1, 8], [20, 20, 1]])
@pytest.mark.parametrize("kind", STRETCHED)
@torch.no_grad()
def test_with_a_cache_every_call_equals_transformers_with_its_cache(kind, chunks):
    """Each call turns its tokens by the length that it brings. Keys in the cache stay as they were turned."""
    theirs, ours = pair(kind)
    cache = KVCache(ours.config, 2, sum(chunks), torch.float32, "cpu")
    past = transformers.DynamicCache(config=theirs.config)
    for part in tokens(2, sum(chunks)).split(chunks, dim=1):
        expected = theirs(part, past_key_values=past, use_cache=True).logits
        assert relative_error(ours(part, cache=cache), expected) <= TOLERANCE


@pytest.mark.parametrize("kind", BY_LENGTH)
@torch.no_grad()
def test_across_the_original_context_the_cache_gives_other_numbers_than_reading_at_once(kind):
    """As in transformers, which docs/rope.md says."""
    _, ours = pair(kind)
    ids = tokens(1, 40)
    cache = KVCache(ours.config, 1, 40, torch.float32, "cpu")
    by_parts = torch.cat([ours(part, cache=cache) for part in ids.split([12, 28], dim=1)], dim=1)
    assert relative_error(by_parts, ours(ids)) > 100 * TOLERANCE


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", STRETCHED)
@torch.no_grad()
def test_greedy_tokens_across_the_original_context_equal_transformers(kind, use_cache):
    theirs, ours = pair(kind)
    prompt = tokens(1, 10)
    how = dict(max_new_tokens=40, use_cache=use_cache)
    mask = torch.ones_like(prompt)
    expected = theirs.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **how)
    assert torch.equal(generate(ours, prompt, **how), expected)


# ---- documents -------------------------------------------------------------------------------------------------------


def test_the_length_of_a_document_is_that_of_its_run():
    ids = torch.tensor([[7, 7, 7, 2, 2, 7], [0, 0, 0, 0, 0, 0]])
    assert lengths_in_documents(ids).tolist() == [[3, 3, 3, 2, 2, 1], [6] * 6]


@pytest.mark.parametrize("kind", STRETCHED)
@torch.no_grad()
def test_packed_documents_get_the_logits_that_transformers_gives_each_alone(kind):
    theirs, ours = pair(kind)
    lengths = [[12, 40, 8], [33, 17, 4, 6]]
    rows = [[tokens(1, n, seed=n) for n in row] for row in lengths]
    document_ids = torch.tensor([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    packed = ours(torch.cat([torch.cat(row, dim=1) for row in rows]), document_ids=document_ids)
    for found, row in zip(packed, rows, strict=True):
        expected = []
        for document in row:
            same_model_of_no_past(theirs)
            expected.append(theirs(document).logits[0])
        assert relative_error(found, torch.cat(expected)) <= TOLERANCE


def same_model_of_no_past(theirs) -> None:
    """Let transformers forget the longest text that dynamic RoPE has seen: a text within the context does that."""
    theirs(tokens(1, 2))


@pytest.mark.parametrize("kind", BY_LENGTH)
@torch.no_grad()
def test_transformers_takes_the_longest_of_a_batch_and_here_each_row_has_its_own(kind):
    theirs, ours = pair(kind)
    short, long = tokens(1, 12), tokens(1, 40, seed=2)
    padded = torch.cat([torch.cat([short, torch.zeros(1, 28, dtype=torch.long)], dim=1), long])
    alone, together = theirs(short).logits, theirs(padded).logits[:1, :12]
    assert relative_error(together, alone) > 100 * TOLERANCE
    document_ids = torch.tensor([[0] * 12 + [PADDING] * 28, [0] * 40])
    assert relative_error(ours(padded, document_ids=document_ids)[:1, :12], alone) <= TOLERANCE


@torch.no_grad()
def test_transformers_keeps_dynamic_rope_of_a_longer_text_before_and_here_each_text_has_its_own():
    theirs, ours = pair("dynamic")
    ids, longer = tokens(1, 40), tokens(1, 60)
    expected = theirs(ids).logits
    theirs(longer), ours(longer)
    assert relative_error(theirs(ids).logits, expected) > 100 * TOLERANCE
    assert relative_error(ours(ids), expected) <= TOLERANCE


@pytest.mark.parametrize("kind", STRETCHED)
@torch.no_grad()
def test_prompts_of_different_lengths_get_the_logits_they_get_alone_from_a_cache(kind):
    _, ours = pair(kind)
    rows = [tokens(1, n, seed=n)[0].tolist() for n in (36, 20)]  # 30 and 14 tokens are the prompt, 6 follow
    prompts, mask = pad_left([row[:-6] for row in rows], pad_id=0)
    ids = torch.cat([prompts, torch.tensor([row[-6:] for row in rows])], dim=1)
    document_ids = torch.cat(
        [torch.where(mask.bool(), 0, PADDING), torch.zeros(2, 6, dtype=torch.long)], dim=1
    )
    parts = [30, 1, 1, 1, 1, 1, 1]
    together = cached_logits(ours, ids, parts, document_ids)
    alone = (
        cached_logits(ours, torch.tensor([rows[0]]), parts),
        cached_logits(ours, torch.tensor([rows[1]]), [14, *parts[1:]]),
    )
    assert relative_error(together[:1], alone[0]) <= TOLERANCE
    assert relative_error(together[1:, 16:], alone[1]) <= TOLERANCE


def cached_logits(model, ids, parts, document_ids=None):
    """The logits of all tokens, read in parts."""
    cache = KVCache(model.config, *ids.shape, torch.float32, "cpu")
    given = [None] * len(parts) if document_ids is None else document_ids.split(parts, dim=1)
    pieces = zip(ids.split(parts, dim=1), given, strict=True)
    return torch.cat([model(part, document_ids=d, cache=cache) for part, d in pieces], dim=1)


@pytest.mark.parametrize("kind", BY_LENGTH)
@torch.no_grad()
def test_given_positions_bring_their_length_as_in_transformers(kind):
    theirs, ours = pair(kind)
    ids, positions = tokens(1, 10), torch.arange(30, 40).unsqueeze(0)
    expected = theirs(ids, position_ids=positions).logits
    assert relative_error(ours(ids, position_ids=positions), expected) <= TOLERANCE


@pytest.mark.parametrize("kind", BY_LENGTH)
@torch.no_grad()
def test_lengths_of_documents_make_the_host_wait_for_no_gpu(kind):
    pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")
    _, ours = pair(kind)
    ids, document_ids = tokens(1, 40), torch.tensor([[0] * 35 + [1] * 5])
    with PretendedGpu() as gpu:
        ours.cuda()
        there = ids.cuda()
        cache = KVCache(ours.config, 1, 42, torch.float32, torch.device("cuda", 0))

        def read() -> None:
            cache.length = 0
            ours(there, document_ids=document_ids)
            ours(there, document_ids=document_ids, cache=cache)
            ours(there[:, :1], document_ids=torch.ones(1, 1, dtype=torch.long), cache=cache)

        read()  # fills the caches of the device
        with gpu.during() as record:
            read()
        assert not record.waits and not gpu.faults


# ---- layers without RoPE ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_comparison_notices_a_layer_that_should_have_no_rope():
    assert "smollm3-no-rope" in FAMILIES
    theirs = transformers_model("smollm3-no-rope")
    assert theirs.config.no_rope_layers == [1, 1, 1, 0]
    raw = config_dict(theirs) | dict(no_rope_layers=[1, 1, 1, 1])
    wrong = CausalLM(parse_config(raw)).eval()
    wrong.load_state_dict(theirs.state_dict())
    ids = tokens(2, 40)
    assert relative_error(wrong(ids), theirs(ids).logits) > 100 * TOLERANCE
    assert relative_error(same_model_here(theirs)(ids), theirs(ids).logits) <= TOLERANCE


@pytest.mark.parametrize("window", [None, 5])
@torch.no_grad()
def test_packed_and_cached_layers_without_rope_equal_transformers_on_each_document_alone(window):
    # Without layer_types, SmolLM3's layers have a window where they have no RoPE.
    changes = dict(use_sliding_window=window is not None, sliding_window=window, no_rope_layers=[1, 0, 1, 0])
    theirs = transformers_model("smollm3-no-rope", **changes)
    ours = same_model_here(theirs)
    assert ours.config.layer_windows == (None, window, None, window)
    documents = [tokens(1, n, seed=n) for n in (14, 3, 9)]
    expected = torch.cat([theirs(document).logits for document in documents], dim=1)
    ids, document_ids = torch.cat(documents, dim=1), torch.tensor([[0] * 14 + [1] * 3 + [2] * 9])
    assert relative_error(ours(ids, document_ids=document_ids), expected) <= TOLERANCE
    assert relative_error(cached_logits(ours, ids, [10, 6, 1, 9], document_ids), expected) <= TOLERANCE


@pytest.mark.parametrize(
    "family", ["llama-gqa", "mistral-window", "ministral-some-windows", "qwen2-bias-tied", "smollm3-no-rope"]
)
@torch.no_grad()
def test_heads_whose_width_is_given_equal_transformers(family):
    theirs = transformers_model(family, head_dim=20)  # 4 heads of 20 on a width of 48
    ours, ids = same_model_here(theirs), tokens(2, 40)
    assert ours.config.head_dim == 20
    assert relative_error(ours(ids), theirs(ids).logits) <= TOLERANCE
