"""The memory that an answer takes: predicted against real caches and against the account of real runs."""

import json

import pytest
import torch

from aquila2_tut.chat import prefill
from aquila2_tut.cli import main
from aquila2_tut.config import Aquila2Config
from aquila2_tut.memory import GPUS, Answering, RehearsalError, cache_bytes_per_token, context_that_fits, measure
from aquila2_tut.memory.unseen import CUDA_CONTEXT
from aquila2_tut.model import Aquila2ForCausalLM, torch_products
from aquila2_tut.model.cache import CACHE_TYPES, held_bytes, make_cache


def model_of(heads: int, kv_heads: int, ffn: int) -> Aquila2ForCausalLM:
    shape = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": ffn}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 4096}
    return Aquila2ForCausalLM(Aquila2Config(**shape, attn_backend="sdpa")).eval()


SHAPES = [(4, 4, 48), (4, 2, 160), (8, 1, 96)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", CACHE_TYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_is_as_large_as_predicted(shape, stored, rows):
    model, cache = model_of(*shape), make_cache(stored, length=50)
    prefill(model, torch.ones(rows, 50, dtype=torch.long), 20, cache)
    assert held_bytes(cache) == rows * 50 * cache_bytes_per_token(model.config, stored)


def test_the_released_models_by_hand():
    """Layers x key-value heads x 128 numbers, twice; int8 adds a float32 to each 128 numbers."""
    by_hand = {"Aquila2-7B": 2 * 32 * 32 * 128, "Aquila2-34B": 2 * 60 * 8 * 128, "Aquila2-70B-Expr": 2 * 80 * 8 * 128}
    for name, numbers in by_hand.items():
        found = {stored: cache_bytes_per_token(Aquila2Config.preset(name), stored) for stored in CACHE_TYPES}
        assert found == {
            "float32": 4 * numbers,
            "bfloat16": 2 * numbers,
            "float16": 2 * numbers,
            "int8": numbers + 4 * numbers // 128,
        }
    for name, saved in (("Aquila2-7B", 1), ("Aquila2-34B", 6), ("Aquila2-70B-Expr", 8)):
        config = Aquila2Config.preset(name)
        alone = Aquila2Config.preset(name, num_key_value_heads=config.num_attention_heads)
        assert cache_bytes_per_token(alone) == saved * cache_bytes_per_token(config)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(("tokens", "chunk"), [(768, 64), (768, 256), (256, 256), (300, 1)])
def test_the_working_set_against_a_run(shape, stored, tokens, chunk):
    """On a CPU a mask is not written out as numbers, nor are heads repeated: the other moments are what is seen."""
    model, cache = model_of(*shape), make_cache(stored, length=tokens)
    ids = torch.randint(0, 64, (1, tokens))
    with torch_products():
        before = prefill(model, ids[:, :-chunk], 64, cache).past_key_values if tokens > chunk else cache
        with measure(model) as found:
            for layer in cache.layers:
                if layer.is_initialized:
                    found.tracker.adopt(layer.keys, "workspace", "cache")
            prefill(model, ids[:, -chunk:], chunk, before)
    answering = Answering(model.config, "fp32", stored, chunk=chunk)
    terms, moments = answering.terms(tokens), answering.moments(tokens)
    seen = max(size for name, size in moments.items() if name != "attention")
    working = found.peak_bytes - terms["weights"] - terms["cache"]
    assert working == pytest.approx(seen, rel=0.015 if chunk > 1 else 0.15)
    assert terms["working set"] == max(moments.values())


def test_a_card_is_full_at_the_length_that_fits():
    for gpu, model in (("A100-80G", "Aquila2-34B"), ("T4", "Aquila2-7B"), ("A100-40G", "SmolLM2-135M")):
        for stored in ("bfloat16", "int8"):
            tokens = context_that_fits(model, gpu, stored)
            answering = Answering(Aquila2Config.preset(model), cache_dtype=stored)
            one, other = (sum(answering.terms(n).values()) + CUDA_CONTEXT for n in (tokens, tokens + 1))
            room = GPUS[gpu].usable - (8 * 2**20 + 128 * 2**10)  # cuBLAS works in two pieces of 4 MiB, eight of 16 KiB
            assert one <= room < other
    assert context_that_fits("Aquila2-70B-Expr", "A100-80G") == 0  # 140 GB of weights


def test_what_makes_a_text_fit_longer():
    def fits(*stored, **changes):
        return context_that_fits("Aquila2-34B", "A100-80G", *stored, **changes)

    assert fits("int8") > 1.7 * fits()
    assert fits(weights="nf4-dq") > 3 * fits()
    assert fits(chunk=64) > fits() > fits(chunk=8192)
    assert fits(batch=2) < fits() / 1.9
    assert fits(backend="flash") > fits()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "A101"}, "gpu: 'A101' is not one of"),
        ({"model": "Aquila2-8B"}, "model: no model named 'Aquila2-8B'"),
        ({"cache_dtype": "int4"}, "cache_dtype: 'int4' is not one of"),
        ({"weights": "int8"}, "weights: 'int8' is not one of"),
        ({"backend": "eager"}, "backend: 'eager' is not one of"),
        ({"chunk": 0}, "chunk: must be at least 1"),
        ({"batch": -1}, "batch: must be at least 1"),
    ],
)
def test_what_is_not_known(arguments, message):
    with pytest.raises(RehearsalError, match=message):
        context_that_fits(**{"model": "Aquila2-7B", "gpu": "T4", **arguments})


def test_the_command(capsys):
    assert main(["plan", "--gpu", "A100-40G", "--context", "--json"]) == 0
    rows = {(row["model"], row["weights"], row["cache_dtype"]): row for row in json.loads(capsys.readouterr().out)}
    assert ("AquilaChat2-34B-16K", "bf16", "bfloat16") not in rows  # 67 GB of weights
    row = rows["AquilaChat2-7B-16K", "bf16", "int8"]
    assert (row["tokens"], row["own"]) == (context_that_fits("AquilaChat2-7B-16K", "A100-40G", "int8"), 16384)
    for language, word in (("en", "prompt and answer"), ("zh", "提示加回答")):
        assert main(["plan", "--gpu", "A100-40G", "--context", "--lang", language]) == 0
        shown = capsys.readouterr().out
        assert word in shown and f"{row['tokens']}*" in shown
