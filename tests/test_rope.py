"""Every scaling of the rotation against transformers': frequencies, logits with and without a cache, and training."""

import copy
import json
import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aquila2_tut.config import PRESETS, Aquila2Config, ConfigError
from aquila2_tut.model import Aquila2ForCausalLM, attention_factor, inverse_frequencies, rotary_tables, torch_products
from aquila2_tut.model.rope import ntk_theta, yarn_kept

TRAINED = 64
LENGTHS = {"below": 48, "at": TRAINED, "beyond": 4 * TRAINED}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "ntk": {"rope_type": "ntk", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn's own numbers": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 48,
        "beta_fast": 6.0,
        "beta_slow": 0.5,
        "attention_factor": 1.3,
    },
}
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": TRAINED,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def for_llama(rope: dict, dim: int) -> dict:
    """The same scaling for transformers, which has no static NTK: it is the plain rotation with a larger theta."""
    if rope["rope_type"] != "ntk":
        return dict(rope)
    return {"rope_type": "default", "rope_theta": rope["rope_theta"] * rope["factor"] ** (dim / (dim - 2))}


def pair(kind: str, seed: int = 0) -> tuple[LlamaForCausalLM, Aquila2ForCausalLM]:
    torch.manual_seed(seed)
    rope = {"rope_theta": 10000.0, **SCALINGS[kind]}
    reference = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=for_llama(rope, 32))).eval()
    ours = Aquila2ForCausalLM(Aquila2Config(**SHAPE, rope_parameters=dict(rope))).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


def tokens(length: int) -> torch.Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("kind", sorted(set(SCALINGS) - {"default", "ntk"}))
def test_frequencies_equal_those_of_transformers(kind, dim, theta):
    shape = SHAPE | {"hidden_size": 3 * dim, "head_dim": dim, "max_position_embeddings": 2048}
    rope = {**SCALINGS[kind], "rope_theta": theta}
    theirs, ours = LlamaConfig(**shape, rope_parameters=dict(rope)), Aquila2Config(**shape, rope_parameters=dict(rope))
    for length in (1, 2047, 2048, 2049, 8192, 40000):
        expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, seq_len=length)
        torch.testing.assert_close(inverse_frequencies(ours, length), expected, rtol=0, atol=0)
        assert attention_factor(ours) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("where", LENGTHS)
@pytest.mark.parametrize("kind", SCALINGS)
@torch.no_grad()
def test_logits_equal_llama(kind, where):
    reference, ours = pair(kind)
    ids = tokens(LENGTHS[where])
    expected = reference(ids).logits
    with torch_products():
        assert torch.equal(ours(ids).logits, expected)
    torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SCALINGS)
@torch.no_grad()
def test_logits_equal_llama_while_a_cache_grows_past_the_limit(kind):
    reference, ours = pair(kind)
    ids, theirs, mine = tokens(2 * TRAINED), None, None
    steps = [(0, TRAINED - 4), *((i, i + 1) for i in range(TRAINED - 4, TRAINED + 20)), (TRAINED + 20, 2 * TRAINED)]
    for start, end in steps:
        there = reference(ids[:, start:end], past_key_values=theirs, use_cache=True)
        here = ours(ids[:, start:end], past_key_values=mine, use_cache=True)
        theirs, mine = there.past_key_values, here.past_key_values
        torch.testing.assert_close(here.logits, there.logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_dynamic_scaling_remembers_nothing():
    reference, ours = pair("dynamic")
    ids = tokens(4 * TRAINED)
    expected = copy.deepcopy(reference)(ids[:, : 2 * TRAINED]).logits
    ours(ids)
    reference(ids)
    torch.testing.assert_close(ours(ids[:, : 2 * TRAINED]).logits, expected, rtol=0, atol=1e-6)
    # The reference keeps the frequencies of the longest text so far.
    assert (reference(ids[:, : 2 * TRAINED]).logits - expected).abs().max() > 1e-4


@torch.no_grad()
def test_pieces_of_a_text_can_be_turned_for_all_of_it():
    _, ours = pair("dynamic")
    ids = tokens(4 * TRAINED)
    whole, cache, pieces = ours(ids).logits, None, []
    for start in range(0, ids.shape[1], TRAINED):
        piece = ids[:, start : start + TRAINED]
        out = ours(piece, past_key_values=cache, use_cache=True, rotary_length=ids.shape[1])
        cache = out.past_key_values
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SCALINGS)
def test_training_sees_the_scaling(kind):
    reference, ours = pair(kind)
    ids = tokens(2 * TRAINED)
    ours.gradient_checkpointing_enable()
    for model in (reference.train(), ours.train()):
        model(ids, labels=ids).loss.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        floor = 2e-6 * theirs[name].grad.abs().max().item()
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=0, atol=floor)


@pytest.mark.parametrize(
    ("name", "factor"), [("AquilaChat2-7B-16K", 8.0), ("AquilaChat2-34B-16K", 4.0)], ids=lambda x: str(x)
)
@torch.no_grad()
def test_the_released_16k_configurations_are_applied(tmp_path, name, factor):
    """In the released form: the old key, over a `max_position_embeddings` that was left as it was."""
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
    stored = {
        **PRESETS[name],
        **small,
        **heads,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-5,
        "model_type": "aquila",
        "dtype": "float32",
    }
    Aquila2ForCausalLM(Aquila2Config(**stored)).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stored))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.rope_parameters["factor"] == factor and model.config.context_length == 16384
    assert model.config.max_position_embeddings == 16384 / factor
    reference = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in stored.items() if k != "model_type"})).eval()
    reference.load_state_dict(model.state_dict())
    ids = torch.randint(3, 97, (1, 600))
    for offset in (0, 16384 - 600):
        positions = torch.arange(offset, offset + 600)[None]
        expected = reference(ids, position_ids=positions).logits
        torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, rtol=0, atol=1e-6)


def test_ntk_leaves_the_fastest_pair_and_slows_the_slowest():
    plain = Aquila2Config.preset("Aquila2-7B")
    ratio = inverse_frequencies(plain).double() / inverse_frequencies(plain.stretched("ntk", 8.0)).double()
    assert ratio[0] == 1 and ratio[-1].item() == pytest.approx(8.0, rel=1e-5)
    assert ratio.diff().min() > 0
    assert ntk_theta(10000.0, 1.0, 128) == 10000.0


def test_yarn_tells_fast_pairs_from_slow_ones():
    """By their turns within what was trained, counted here from the frequencies."""
    plain = Aquila2Config.preset("Aquila2-7B")
    kept = yarn_kept(plain.stretched("yarn", 8.0))
    turns = inverse_frequencies(plain) * plain.max_position_embeddings / (2 * math.pi)
    # The ends of the ramp are rounded outwards, to whole pairs.
    assert (kept[turns > 32] > 0.95).all() and (kept[turns < 1] < 0.05).all()
    assert kept[0] == 1 and kept[-1] == 0 and (kept.diff() <= 0).all()
    cos, sin = rotary_tables(plain.stretched("yarn", 8.0), torch.arange(9)[None], torch.double)
    temperature = 1 / (0.1 * math.log(8) + 1) ** 2
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, 1 / temperature), rtol=1e-6, atol=0)


def test_a_stretched_configuration_keeps_all_else(tmp_path, caplog):
    plain = Aquila2Config.preset("AquilaChat2-34B-16K")
    with caplog.at_level(logging.WARNING):
        for kind in ("linear", "ntk", "dynamic", "yarn"):
            other = plain.stretched(kind, 2.0)
            assert (other.trained_length, other.context_length) == (4096, 8192)
            assert other.hidden_size == plain.hidden_size and other.dtype == plain.dtype
            other.save_pretrained(tmp_path)
            assert Aquila2Config.from_pretrained(tmp_path).rope_parameters == other.rope_parameters
        assert plain.stretched("default", 2.0).context_length == 4096
        # transformers' habit: max_position_embeddings says the length that was reached
        reached = Aquila2Config(
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        )
    assert (reached.trained_length, reached.context_length) == (2048, 8192)
    assert reached.stretched("linear", 2.0).context_length == 4096
    assert not caplog.records


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}, "mscale: would change nothing, .*'yarn' takes attention"),
        ({"rope_type": "default", "factor": 2.0}, "factor: would change nothing"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "beta_fast: would change nothing"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 0}, "beta_fast: must be a number above 0"),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "2k"}, "not '2k'"),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope_theta: with 1"),
        ({"rope_type": "ntk"}, "factor: ntk scaling needs"),
    ],
)
def test_scalings_that_cannot_be_are_refused(rope, message):
    with pytest.raises(ConfigError, match=message):
        Aquila2Config(rope_parameters=rope)


def test_a_single_pair_cannot_be_told_apart():
    with pytest.raises(ConfigError, match="head_dim: dynamic scaling"):
        Aquila2Config(hidden_size=64, num_attention_heads=32, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
