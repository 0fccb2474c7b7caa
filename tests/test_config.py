"""Presets against the released shapes, and every impossible configuration with its message."""

import json

import pytest
import torch
from transformers import AutoConfig

from aquila2_tut.config import PRESETS, Aquila2Config, ConfigError, resolve_preset_name
from aquila2_tut.model import Aquila2ForCausalLM

# Totals as published with the checkpoints' shard sizes; a closed form is derived in the chapter.
TOTALS = {
    "Aquila2-7B": 7_295_537_152,
    "AquilaChat2-7B": 7_295_537_152,
    "AquilaChat2-7B-16K": 7_295_537_152,
    "Aquila2-34B": 33_693_554_688,
    "AquilaChat2-34B": 33_693_554_688,
    "AquilaChat2-34B-16K": 33_693_554_688,
    "Aquila2-70B-Expr": 70_090_891_264,
    "AquilaChat2-70B-Expr": 70_090_891_264,
    "Aquila2-7B-2024-06": 7_655_698_432,
    "Aquila2-34B-2024-06": 34_233_796_608,
    "Aquila-7B": 7_295_537_152,
    "AquilaChat-7B": 7_295_537_152,
    "Aquila-33B": 33_434_266_112,
    "SmolLM2-135M": 134_515_008,
    # not published but counted by hand: the table, and in each layer two norms, four projections and SwiGLU
    "Aquila2-Nano": 8192 * 256 + 8 * (2 * 256 + 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768) + 256,
    "Aquila2-Nano-Chat": 8192 * 256 + 8 * (2 * 256 + 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768) + 256,
}
TENSORS = {"Aquila2-7B": 291, "Aquila2-34B": 543, "Aquila2-70B-Expr": 723}


def test_every_preset_has_a_published_total():
    assert set(TOTALS) == set(PRESETS)


@pytest.mark.parametrize("name", TOTALS)
def test_parameter_totals(name):
    with torch.device("meta"):
        model = Aquila2ForCausalLM(Aquila2Config.preset(name))
    parameters = dict(model.named_parameters())
    if model.config.tie_word_embeddings:
        parameters.pop("lm_head.weight", None)
    assert sum(p.numel() for p in parameters.values()) == model.config.parameter_count == TOTALS[name]
    assert len(parameters) == TENSORS.get(name, len(parameters))


def test_the_16k_models_keep_their_trained_length():
    for name, trained in (("AquilaChat2-7B-16K", 2048), ("AquilaChat2-34B-16K", 4096)):
        config = Aquila2Config.preset(name)
        assert (config.max_position_embeddings, config.context_length) == (trained, 16384)


def test_names_in_any_case_and_near_misses():
    assert resolve_preset_name("aquilachat2-7b") == "AquilaChat2-7B"
    with pytest.raises(ConfigError, match="did you mean.*AquilaChat2-7B"):
        resolve_preset_name("AquilaChat2-7")
    with pytest.raises(ConfigError, match="known: Aquila2-7B"):
        Aquila2Config.preset("xyzzy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads: 5 heads do not divide hidden_size 4096"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: 5 key-value heads"),
        ({"head_dim": 7}, "head_dim: .* 7 is odd"),
        ({"vocab_size": 0}, "vocab_size: must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_act": "gelu"}, "hidden_act: .*'gelu'"),
        ({"attn_backend": "magic"}, "attn_backend: 'magic'"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_type: 'spiral' is not known; known: default"),
        ({"rope_scaling": {"type": "linear"}}, "factor: linear scaling needs a number of at least 1, not None"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, "factor: .*not '8'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0.5}}, "factor: dynamic .*not 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": float("nan")}}, "factor: dynamic .*not nan"),
        ({"rope_theta": -1.0}, "rope_theta: must be a number of at least 1"),
    ],
)
def test_impossible_configurations_name_the_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        Aquila2Config(**changes)


def test_a_key_given_twice_is_refused(tmp_path):
    # The released AquilaChat2-34B-16K once had exactly this: the second, null, silently won.
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "aquila", "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_scaling": null}')
    with pytest.raises(ConfigError, match=r"config\.json: the key 'rope_scaling' appears twice"):
        Aquila2Config.from_pretrained(tmp_path)


def test_broken_json_names_the_file_and_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "aquila",\n "hidden_size": }')
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON: .*line 2"):
        Aquila2Config.from_pretrained(tmp_path)


def test_round_trip_through_transformers(tmp_path):
    config = Aquila2Config.preset("AquilaChat2-34B-16K")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is Aquila2Config
    assert again.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}


def test_baai_config_file_is_understood(tmp_path):
    stored = {
        "architectures": ["AquilaForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_aquila.AquilaForCausalLM"},
        "model_type": "aquila",
        "pretraining_tp": 1,
        "num_key_value_heads": 32,
        "rope_scaling": {"type": "linear", "factor": 8.0},
        "rope_theta": 10000.0,
        "torch_dtype": "float16",
    }
    (tmp_path / "config.json").write_text(json.dumps(stored))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0}
    assert config.dtype == torch.float16
