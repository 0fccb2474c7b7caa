"""Long prompts: read in pieces, kept in caches of other types and of a fixed length, attended to block by block."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import StaticCache

from aquila2_tut import assets
from aquila2_tut.chat import ChatError, prefill
from aquila2_tut.config import Aquila2Config
from aquila2_tut.data.corpora import documents
from aquila2_tut.loader import AutoLoader
from aquila2_tut.model import Aquila2ForCausalLM, attention, torch_products
from aquila2_tut.model.blocks import takes_blocks
from aquila2_tut.model.cache import CACHE_TYPES, held_bytes, make_cache
from aquila2_tut.model.costs import peak_bytes
from aquila2_tut.model.errors import ModelError
from aquila2_tut.model.products import onednn_linear_works

SCALINGS = [("default", 1.0), ("linear", 4.0), ("ntk", 4.0), ("dynamic", 4.0), ("yarn", 4.0)]


def tiny(rope="default", factor=1.0, **changes) -> Aquila2ForCausalLM:
    """Two layers that were trained on 64 tokens, so to speak."""
    torch.manual_seed(0)
    shape = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = Aquila2Config(**shape | {"initializer_range": 0.3} | changes)
    return Aquila2ForCausalLM(config if rope == "default" else config.stretched(rope, factor)).eval()


def some_ids(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.fixture(scope="module")
def smol():
    try:
        loader = AutoLoader("aquila2", model_name="SmolLM2-135M", device="cpu", local_files_only=True)
        return loader.get_model(), loader.get_tokenizer()
    except (assets.AssetError, ValueError) as error:
        pytest.skip(f"asset not fetched: {error}")


# ---------- prefill in pieces ----------


@torch.no_grad()
@pytest.mark.parametrize(("rope", "factor"), SCALINGS)
@pytest.mark.parametrize("chunk", [1, 7, 60, 1000])
def test_pieces_give_the_logits_of_the_whole_below_at_and_beyond_the_trained_length(rope, factor, chunk):
    model = tiny(rope, factor)
    for length in (40, 64, 65, 200) if factor > 1 else (40, 64):
        ids = some_ids(length)
        out = prefill(model, ids, chunk)
        assert out.logits.shape == (1, 1, 97) and out.past_key_values.get_seq_length() == length
        torch.testing.assert_close(out.logits, model(ids).logits[:, -1:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_without_the_whole_length_dynamic_scaling_would_differ():
    """What `rotary_length` is for; otherwise the test above could not fail for it."""
    model, ids, cache = tiny("dynamic", 4.0), some_ids(200), make_cache()
    for piece in ids.split(50, dim=1):
        logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    assert (logits - model(ids).logits[:, -1:]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize(("rope", "factor"), [("default", 1.0), ("dynamic", 4.0)])
def test_padded_rows_in_pieces(rope, factor):
    model, ids = tiny(rope, factor), some_ids(60 if factor == 1 else 150, rows=2)
    mask = torch.ones_like(ids)
    mask[0, :35] = 0  # a whole piece of padding, and a part of one
    out = prefill(model, ids, 30, mask=mask).logits
    torch.testing.assert_close(out, model(ids, attention_mask=mask).logits[:, -1:], rtol=0, atol=1e-4)


def test_more_than_the_context_holds_is_refused_and_not_cut():
    model = tiny()
    with pytest.raises(ChatError, match=r"0 tokens are cached and 65 are new, but the context holds 64: .*stretched"):
        prefill(model, some_ids(65), 16)
    cache = prefill(model, some_ids(60)).past_key_values
    with pytest.raises(ChatError, match="60 tokens are cached and 5 are new"):
        prefill(model, some_ids(5), cache=cache)
    with pytest.raises(ChatError, match="no tokens"):
        prefill(model, some_ids(0))
    assert prefill(tiny("linear", 4.0), some_ids(256), 100).logits.isfinite().all()
    with pytest.raises(ChatError, match="holds 256"):
        prefill(tiny("linear", 4.0), some_ids(257), 100)


@pytest.mark.parametrize(("rope", "factor"), [("default", 1.0), ("dynamic", 4.0)])
def test_generate_of_transformers_takes_pieces(rope, factor):
    model, ids = tiny(rope, factor), some_ids(50 if factor == 1 else 150, rows=2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(ids, **settings)
    for chunk in (16, 49):
        pieces = model.generate(ids, prefill_chunk_size=chunk, past_key_values=model.new_cache(), **settings)
        assert torch.equal(pieces, whole)


# ---------- the cache ----------


def filled(stored, pieces, length=0, heads=2, dim=16, dtype=torch.float32):
    """Random keys and values, what a cache gives back, and the cache."""
    torch.manual_seed(1)
    keys, values = torch.randn(2, 2, heads, sum(pieces), dim).mul(torch.rand(2, 1, heads, sum(pieces), 1) * 9).to(dtype)
    cache = make_cache(stored, length)
    for start, size in zip(np.cumsum([0, *pieces]), pieces, strict=False):
        here = slice(int(start), int(start) + size)
        found = cache.update(keys[:, :, here], values[:, :, here], 0)
    return (keys, values), found, cache


@pytest.mark.parametrize("pieces", [[5], [1, 1, 1, 300, 2]])
def test_int8_codes_and_scales_in_numpy(pieces):
    wanted, found, _ = filled("int8", pieces)
    for x, stored in zip(wanted, found, strict=True):
        x = x.numpy().astype(np.float64)
        scale = np.abs(x).max(-1, keepdims=True) / 127
        np.testing.assert_allclose(stored.numpy(), np.rint(x / scale) * scale, atol=1e-5 + 1.001 * scale.max() * 1e-3)
        assert (np.abs(stored.numpy() - x) <= 0.5001 * scale).all()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", None])
def test_floats_are_stored_as_they_round(stored):
    for dtype in (torch.float32, torch.bfloat16):
        wanted, found, cache = filled(stored, [3, 4], dtype=dtype)
        kept = CACHE_TYPES.get(stored, dtype)
        assert cache.layers[0].keys.dtype == kept
        assert all(torch.equal(f, x.to(kept).to(dtype)) for f, x in zip(found, wanted, strict=True))


def test_zeros_stay_zeros_in_int8():
    cache = make_cache("int8")
    assert not any(x.any() or x.isnan().any() for x in cache.update(*torch.zeros(2, 1, 2, 3, 8), 0))


@pytest.mark.parametrize("stored", [None, *CACHE_TYPES])
def test_a_fixed_cache_is_made_once_and_is_full_at_its_length(stored):
    _, found, cache = filled(stored, [3, 4, 5], length=12)
    _, grown, _ = filled(stored, [12])
    assert all(torch.equal(a, b) for a, b in zip(found, grown, strict=True))
    layer = cache.layers[0]
    assert (cache.get_seq_length(), layer.get_max_length(), held_bytes(cache)) == (12, 12, held_bytes(cache))
    assert layer.keys.untyped_storage().data_ptr() == layer.values.untyped_storage().data_ptr()
    before = layer.keys.data_ptr()
    cache.crop(-4)
    cache.update(*torch.ones(2, 2, 2, 4, 16), 0)
    assert layer.keys.data_ptr() == before
    with pytest.raises(ModelError, match="made for 12 tokens; 12 are in it and 1 are new"):
        cache.update(*torch.ones(2, 2, 2, 1, 16), 0)


def test_wrong_caches():
    with pytest.raises(ModelError, match="'int4' is not one of float32, bfloat16, float16, int8"):
        make_cache("int4")
    with pytest.raises(ModelError, match="-1 tokens"):
        make_cache(length=-1)


@torch.no_grad()
def test_a_fixed_cache_gives_the_logits_of_one_that_grows_and_of_transformers_static_one():
    model, ids = tiny(), some_ids(60)
    wanted = model(ids).logits
    caches = (make_cache(), make_cache(length=60), make_cache("float32", 61), StaticCache(model.config, 64))
    for cache in caches:
        pieces = [model(piece, past_key_values=cache, use_cache=True).logits for piece in ids.split([30, 29, 1], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_of_transformers_takes_these_caches(beams):
    """Beams reorder and repeat the rows of a cache, scales in int8 with their codes."""
    model, ids = tiny(), some_ids(20, rows=2)
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    whole = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, past_key_values=make_cache("float32", 40), **settings), whole)
    grown, fixed = (model.generate(ids, past_key_values=make_cache("int8", n), **settings) for n in (0, 40))
    assert torch.equal(grown, fixed) and grown.shape == whole.shape


# ---------- as options ----------


def test_answers_are_the_same_in_pieces_and_in_wider_caches(smol):
    model, tokenizer = smol
    options = {"tokenizer": tokenizer, "sft": False, "temperature": 0, "max_gen_len": 8}
    text = "The sea was calm, and the old man counted his boats. " * 6
    plain = model.predict(text, **options)
    for more in ({"prefill_chunk": 16}, {"cache_dtype": "float32"}, {"prefill_chunk": 50, "cache_dtype": "float32"}):
        assert model.predict(text, **options, **more) == plain
        assert model.predict_batch([text, "One, two,"], **options, **more)[0] == plain


def test_options_that_make_no_sense(smol):
    model, tokenizer = smol
    for chunk in (-1, 2.5, True):
        with pytest.raises(ChatError, match="prefill_chunk is"):
            model.stream("Hello", tokenizer, sft=False, prefill_chunk=chunk)
    with pytest.raises(ModelError, match="'int4' is not one of"):
        model.stream("Hello", tokenizer, sft=False, cache_dtype="int4")


# ---------- what must be seen ----------


def chapter_ids(tokenizer, length: int) -> torch.Tensor:
    ids = torch.tensor([tokenizer.encode(next(iter(documents("austen"))).text)[:length]])
    assert ids.shape == (1, length)
    return ids


@torch.inference_mode()
def test_smollm2_in_pieces_has_the_logits_and_half_the_memory(smol):
    """At 1,024 tokens; `benchmarks/long_memory.py` shows 8,192, and the resident set."""
    model, tokenizer = smol
    ids = chapter_ids(tokenizer, 1024)
    found = {}
    pieces = peak_bytes(lambda: found.update(pieces=prefill(model, ids, 128, make_cache(length=1024)).logits))
    all_scored = peak_bytes(lambda: found.update(whole=model(ids, use_cache=True).logits[:, -1:]))
    torch.testing.assert_close(found["pieces"], found["whole"], rtol=0, atol=1e-4)
    assert pieces <= 0.5 * all_scored


@torch.inference_mode()
def test_int8_costs_at_most_one_percent_of_bits_per_byte(smol):
    model, tokenizer = smol
    ids = chapter_ids(tokenizer, 768)
    bits = {}
    for stored in ("float32", "int8"):
        cache = make_cache(stored, ids.shape[1])
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split(64, dim=1)], 1)
        bits[stored] = F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item()
    assert bits["int8"] != bits["float32"]
    assert bits["int8"] <= 1.01 * bits["float32"]


# ---------- attention block by block ----------


def exact(q, k, v):
    """The formula in float64 with every score written out."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(scores.shape[-1] - scores.shape[-2] + 1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


@torch.no_grad()
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "queries", "keys", "dim"),
    [(1, 9, 3, 300, 300, 64), (2, 4, 4, 257, 700, 32), (1, 6, 1, 256, 257, 16), (2, 4, 2, 256, 1000, 8)],
)
def test_blocks_against_float64(batch, heads, kv_heads, queries, keys, dim):
    if not onednn_linear_works():
        pytest.skip("torch has no oneDNN here")
    torch.manual_seed(0)
    q = torch.randn(batch, queries, heads, dim).transpose(1, 2)
    k, v = torch.randn(2, batch, keys, kv_heads, dim).transpose(2, 3)
    assert takes_blocks(q, k, v)
    assert (attention(q, k, v, causal=True, backend="sdpa").double() - exact(q, k, v)).abs().max() < 2e-6
    squares = peak_bytes(lambda: attention(q, k, v, causal=True, backend="eager"))
    assert peak_bytes(lambda: attention(q, k, v, causal=True)) < 0.8 * squares


def test_when_blocks_are_taken():
    q = torch.randn(1, 2, 256, 8)
    with torch.no_grad():
        assert takes_blocks(q, q, q) == onednn_linear_works()
        assert not takes_blocks(q[:, :, :255], q, q)  # short
        assert not takes_blocks(*[q.bfloat16()] * 3)
        with torch_products():
            assert not takes_blocks(q, q, q)
    assert not takes_blocks(q.clone().requires_grad_(), q, q)
