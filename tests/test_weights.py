"""One model written in every layout that exists, read back, and every way in which a checkpoint can be broken."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from aquila2_tut import assets
from aquila2_tut.config import PRESETS, Aquila2Config, ConfigError
from aquila2_tut.model import Aquila2ForCausalLM
from aquila2_tut.model.layouts import ffn_width, half_rotation, split_groups
from aquila2_tut.model.weights import WeightsError, load_model

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = torch.arange(3, 23)[None]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Aquila2ForCausalLM(Aquila2Config(**SHAPE)).eval()


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `half_rotation`, written index by index."""
    out, dim = torch.empty_like(rows), rows.shape[0] // heads
    for head in range(heads):
        for pair in range(dim // 2):
            for which in range(2):
                out[head * dim + 2 * pair + which] = rows[head * dim + which * (dim // 2) + pair]
    return out


def same_logits(loaded: Aquila2ForCausalLM, model: Aquila2ForCausalLM) -> bool:
    return torch.equal(loaded(IDS).logits, model(IDS).logits)


def native(model: Aquila2ForCausalLM) -> dict[str, torch.Tensor]:
    names = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "post_attention_layernorm": "ffn_norm",
        "input_layernorm": "attention_norm",
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
    }
    stored = {}
    for name, tensor in model.state_dict().items():
        if "q_proj" in name:
            tensor = interleaved(tensor, 4)
        if "k_proj" in name:
            tensor = interleaved(tensor, model.config.num_key_value_heads)
        for here, there in names.items():
            name = name.replace(here, there)
        stored[name.removeprefix("model.")] = tensor.clone()
    return stored


def megatron(model: Aquila2ForCausalLM) -> dict[str, torch.Tensor]:
    state, stored, prefix = model.state_dict(), {}, "language_model.encoder."
    for layer in range(2):
        here, there = f"model.layers.{layer}.", f"{prefix}layers.{layer}."
        q, k, v = (state[f"{here}self_attn.{n}_proj.weight"] for n in "qkv")
        groups = [
            part
            for g in range(2)
            for part in (q[g * 32 : g * 32 + 32], k[g * 16 : g * 16 + 16], v[g * 16 : g * 16 + 16])
        ]
        stored[f"{there}self_attention.query_key_value.weight"] = torch.cat(groups)
        stored[f"{there}self_attention.dense.weight"] = state[f"{here}self_attn.o_proj.weight"]
        stored[f"{there}mlp.dense_h_to_4h.weight"] = torch.cat(
            [state[f"{here}mlp.gate_proj.weight"], state[f"{here}mlp.up_proj.weight"]]
        )
        stored[f"{there}mlp.dense_4h_to_h.weight"] = state[f"{here}mlp.down_proj.weight"]
        for norm in ("input", "post_attention"):
            stored[f"{there}{norm}_norm.weight"] = state[f"{here}{norm}_layernorm.weight"].clone()
    pad = torch.zeros(32, 64)
    stored["language_model.embedding.word_embeddings.weight"] = torch.cat([state["model.embed_tokens.weight"], pad])
    stored["language_model.output_layer.weight"] = torch.cat([state["lm_head.weight"], pad])
    stored[f"{prefix}final_norm.weight"] = state["model.norm.weight"]
    return stored


def test_huggingface_folder(folder, model):
    assert same_logits(load_model(folder), model)


def test_sharded_folder(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same_logits(load_model(tmp_path), model)


@pytest.mark.parametrize("architecture", ["AquilaModel", "AquilaForCausalLM", "LlamaForCausalLM"])
def test_every_released_architecture_name(folder, model, architecture):
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": [architecture],
        "auto_map": {
            "AutoConfig": "configuration_aquila.AquilaConfig",
            "AutoModelForCausalLM": "modeling_aquila.AquilaForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    assert same_logits(load_model(folder), model)
    assert same_logits(Aquila2ForCausalLM.from_pretrained(folder).eval(), model)
    # The repository's own code is named in its config.json, lies nowhere here, and is not asked for.
    assert type(automatic := AutoModelForCausalLM.from_pretrained(folder)) is Aquila2ForCausalLM
    assert same_logits(automatic.eval(), model)


def test_bin_files_as_released_by_baai(folder, model):
    (folder / "model.safetensors").unlink()
    state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    torch.save(state, folder / "pytorch_model.bin")
    assert same_logits(load_model(folder), model)


def test_native_v1_folder(model, tmp_path):
    torch.manual_seed(1)
    config = {"vocab_size": 96, "dim": 64, "n_heads": 4, "n_layers": 2, "multiple_of": 32, "norm_eps": 1e-5}
    full = Aquila2ForCausalLM(
        Aquila2Config(**SHAPE | {"num_key_value_heads": 4, "intermediate_size": ffn_width(64, 32)})
    ).eval()
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(native(full), tmp_path / "pytorch_model.bin")
    assert same_logits(load_model(tmp_path), full)


def test_megatron_fused_and_padded(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    save_file({k: v.contiguous() for k, v in megatron(model).items()}, tmp_path / "model.safetensors")
    assert same_logits(load_model(tmp_path), model)


def test_gguf_round_trip(model, tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(96)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if "q_proj" in name:
            tensor = interleaved(tensor, 4)
        if "k_proj" in name:
            tensor = interleaved(tensor, 2)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = load_model(path)
    assert loaded.config.rms_norm_eps == 1e-5
    assert same_logits(loaded, model)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(ValueError, match=r"cut\.gguf: truncated: tensor .* ends at byte"):
        load_model(cut)


def test_smollm2_header_gives_the_preset():
    loaded = load_model(assets.path("smollm2-135m"), torch_dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    preset = Aquila2Config.preset("SmolLM2-135M")
    for field in (*PRESETS["SmolLM2-135M"].keys() - {"rope_theta", "dtype"}, "rope_parameters", "rms_norm_eps"):
        assert getattr(loaded.config, field) == getattr(preset, field), field


def test_only_one_tensor_is_in_memory_besides_the_model(folder, monkeypatch):
    """Reads happen one at a time: when the next is read, the last has been handed over or dropped."""
    import weakref

    from aquila2_tut.model import weights

    alive, most = weakref.WeakSet(), 0
    original = weights._open_safetensors

    def watched(path, stack):
        def follow(read):
            def reader():
                nonlocal most
                most = max(most, len(alive))
                tensor = read().clone()
                alive.add(tensor)
                return tensor

            return reader

        return {name: follow(read) for name, read in original(path, stack).items()}

    monkeypatch.setattr(weights, "_open_safetensors", watched)
    load_model(folder, torch_dtype="bfloat16")
    assert most <= 1


def test_matrices_with_few_outputs_lie_by_columns_and_are_saved_all_the_same(tmp_path):
    torch.manual_seed(0)
    wide = SHAPE | {"hidden_size": 512, "intermediate_size": 576, "num_hidden_layers": 1}
    model = Aquila2ForCausalLM(Aquila2Config(**wide)).eval()
    model.save_pretrained(tmp_path / "first")
    loaded = load_model(tmp_path / "first")
    down, up = loaded.model.layers[0].mlp.down_proj.weight, loaded.model.layers[0].mlp.up_proj.weight
    assert down.stride() == (1, 512)
    assert up.is_contiguous()
    loaded.save_pretrained(tmp_path / "second")
    for name, tensor in load_model(tmp_path / "second").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_missing_shard(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(WeightsError, match=rf"1 of \d+ shards missing \({victim.name}\), and with them \d+ tensors"):
        load_model(tmp_path)


def test_damaged_safetensors(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"model\.safetensors: damaged or cut short"):
        load_model(folder)


def test_shape_mismatch_names_both(folder):
    with pytest.raises(
        WeightsError, match=r"has shape \(64, 96\), model\.layers\.0\.mlp\.down_proj\.weight needs \(64, 80\)"
    ):
        load_model(folder, Aquila2Config(**SHAPE | {"intermediate_size": 80}))


def test_wrong_vocabulary_size(folder):
    with pytest.raises(WeightsError, match="the vocabulary has 96 entries, vocab_size says 100"):
        load_model(folder, Aquila2Config(**SHAPE | {"vocab_size": 100}))


def test_missing_and_surplus_tensors(folder):
    with pytest.raises(WeightsError, match=r"9 of 30 tensors are missing, the first is model\.layers\.2"):
        load_model(folder, Aquila2Config(**SHAPE | {"num_hidden_layers": 3}))
    with pytest.raises(WeightsError, match="would be model.layers.1.*a model of 1 layers does not have"):
        load_model(folder, Aquila2Config(**SHAPE | {"num_hidden_layers": 1}))


def test_what_is_not_a_checkpoint(tmp_path, folder):
    with pytest.raises(WeightsError, match="no such file or folder"):
        load_model(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(WeightsError, match=r"no \.safetensors and no \.bin file"):
        load_model(empty)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(WeightsError, match="architectures .*BertModel"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_model(folder)


def test_pickled_code_is_never_run(folder):
    class Hostile:
        def __reduce__(self):
            return (print, ("this must not run",))

    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin: not a readable file of plain tensors"):
        load_model(folder)


def test_an_index_cannot_lead_out_of_its_folder(folder):
    index = {"weight_map": {"model.norm.weight": "../secrets.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="not a plain file name"):
        load_model(folder)


def test_a_type_that_is_none(folder):
    with pytest.raises(WeightsError, match="torch_dtype: 'float99'"):
        load_model(folder, torch_dtype="float99")
    with pytest.raises(WeightsError, match="torch_dtype: 'int8'"):
        load_model(folder, torch_dtype="int8")


def test_reordering_and_splitting_row_by_row():
    rows = torch.randn(32, 5)
    assert torch.equal(half_rotation(interleaved(rows, 2), 2), rows)
    config = Aquila2Config(**SHAPE)
    q, k, v = split_groups(torch.arange(128.0)[:, None].expand(128, 3), config)
    assert q[:, 0].tolist() == [*range(32), *range(64, 96)]
    assert k[:, 0].tolist() == [*range(32, 48), *range(96, 112)]
    assert v[:, 0].tolist() == [*range(48, 64), *range(112, 128)]


@pytest.mark.parametrize(
    ("hidden", "multiple", "factor", "width"),
    [(4096, 256, 1.0, 11008), (6144, 4096, 1.3, 24576), (8192, 4096, 1.3, 28672)],
)
def test_ffn_width_rule(hidden, multiple, factor, width):
    assert ffn_width(hidden, multiple, factor) == width


def test_config_errors_pass_through(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5, "head_dim": None}))
    with pytest.raises(ConfigError, match="num_attention_heads"):
        load_model(folder)
