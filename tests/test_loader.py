"""AutoLoader: where it looks, in which order, what it refuses; nothing here reaches beyond loopback."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from aquila2_tut import Aquila2Config, Aquila2ForCausalLM, AutoLoader, assets, loader, locate
from aquila2_tut.locate import LoaderError, find, missing_weights
from aquila2_tut.quant import QuantError

TINY = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
COMMIT = "a" * 40
REAL_HOME = os.environ.get("AQUILA2_TUT_HOME", "")


@pytest.fixture(autouse=True)
def network(monkeypatch, tmp_path):
    """Empty caches, and every attempt to leave the machine is noted and fails as it does without a network."""
    attempts = []

    def no_network(host, *args, **kwargs):
        attempts.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("AQUILA2_TUT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AQUILA2_TUT_MODELHUB", "http://modelhub.invalid/api")
    return attempts


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint folder of a tiny model."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    torch.manual_seed(0)
    Aquila2ForCausalLM(Aquila2Config(**TINY)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def place(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source)
    return target


def in_hub_cache(source, hub, repo="BAAI/Aquila2-7B"):
    """Lay a checkpoint where the Hugging Face library keeps it."""
    base = hub / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text(COMMIT)
    (base / "snapshots" / COMMIT).mkdir(parents=True)
    for file in source.iterdir():
        (base / "snapshots" / COMMIT / file.name).symlink_to(file)
    return base / "snapshots" / COMMIT


# --- where it looks ---


@pytest.mark.parametrize("folder", ["Aquila2-7B", "aquila2-7b", "AQUILA2-7B"])
def test_a_folder_in_any_letter_case_is_loaded_without_a_network(source, tmp_path, network, folder):
    place(source, tmp_path / "models" / folder)
    found = AutoLoader("aquila2", model_name="aquila2-7B", model_dir=tmp_path / "models")
    model = found.get_model()
    assert found.name == model.aquila_name == "Aquila2-7B"
    assert found.get_model() is model and not model.training
    assert network == []


@pytest.mark.parametrize("arguments", [{"model_name": "{}"}, {"model_dir": "{}"}])
def test_a_folder_given_is_taken_as_it_is(source, network, arguments):
    found = AutoLoader("aquila2", **{key: value.format(source) for key, value in arguments.items()})
    reference = Aquila2ForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = torch.arange(8)[None]
    assert torch.equal(found.get_model()(ids).logits, reference(ids).logits)
    assert found.name is None, "the default name must not be given to another model"
    assert network == []


def test_the_name_of_a_given_folder_counts(source, tmp_path):
    assert AutoLoader("aquila2", place(source, tmp_path / "aquilachat2-34b")).name == "AquilaChat2-34B"


def test_a_name_that_fits_the_given_folder_is_kept(tmp_path):
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for vocab_size, name in ((100008, "Aquila2-7B"), (143973, "Aquila2-7B-2024-06")):
        Aquila2Config.preset("Aquila2-7B", vocab_size=vocab_size).save_pretrained(folder)
        (folder / "model.safetensors").touch()
        assert AutoLoader("aquila2", "Aquila2-7B", folder).name == name


def test_a_gguf_file_given_is_read_as_it_is(tmp_path, network):
    arrays = {"token_embd.weight": (64, 16), "output_norm.weight": (16,)}
    for layer in range(2):
        square = {f"blk.{layer}.attn_{part}.weight": (16, 16) for part in ("q", "k", "v", "output")}
        wide = {f"blk.{layer}.ffn_{part}.weight": (32, 16) for part in ("gate", "up")}
        norms = {f"blk.{layer}.{part}_norm.weight": (16,) for part in ("attn", "ffn")}
        arrays |= square | wide | norms | {f"blk.{layer}.ffn_down.weight": (16, 32)}
    gguf = pytest.importorskip("gguf", reason="the gguf library writes the file")
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_vocab_size(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(32)
    writer.add_block_count(2)
    writer.add_head_count(2)
    writer.add_context_length(128)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, shape in arrays.items():
        writer.add_tensor(name, np.full(shape, 0.5, dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    model = AutoLoader("aquila2", tmp_path / "tiny.gguf", device="cpu", attn_backend="sdpa").get_model()
    assert model.config.attn_backend == "sdpa" and model.aquila_name is None
    assert model.lm_head.weight[0, 0] == 0.5
    assert network == []


def test_the_default_folder_is_in_the_cache_of_the_assets(source, tmp_path):
    folder = place(source, tmp_path / "home" / "models" / "Aquila2-7B")
    assert find("Aquila2-7B", None, local_files_only=True) == folder


def test_the_embedded_model_comes_from_its_asset(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(assets, "path", lambda name: calls.append(("path", name)) or tmp_path / "a.gguf")
    monkeypatch.setattr(assets, "fetch", lambda name: calls.append(("fetch", name)) or tmp_path / "b.gguf")
    assert AutoLoader("aquila2").path == tmp_path / "b.gguf"
    assert AutoLoader("aquila2", local_files_only=True).path == tmp_path / "a.gguf"
    assert calls == [("fetch", "smollm2-135m"), ("path", "smollm2-135m")]


def test_the_embedded_model_speaks(monkeypatch):
    """The real one, where it has been fetched."""
    monkeypatch.setenv("AQUILA2_TUT_HOME", REAL_HOME)
    try:
        assets.path("smollm2-135m")
    except assets.AssetError as error:
        pytest.skip(str(error))
    found = AutoLoader("aquila2", model_name="smollm2-135m", local_files_only=True)
    model, tokenizer = found.get_model(), found.get_tokenizer()
    assert (model.dtype, model.device.type, model.aquila_name) == (torch.float32, "cpu", "SmolLM2-135M")
    answer = model.predict("What is the capital of France?", tokenizer=tokenizer, temperature=0, max_gen_len=10)
    assert "Paris" in answer


def test_the_hub_cache_is_used_without_a_network(source, tmp_path, network):
    snapshot = in_hub_cache(source, tmp_path / "hub")
    assert AutoLoader("aquila2", model_name="BAAI/Aquila2-7B").path == snapshot
    assert network == []


def test_a_hub_cache_without_its_weights_is_not_enough(source, tmp_path):
    (in_hub_cache(source, tmp_path / "hub") / "model.safetensors").unlink()
    with pytest.raises(LoaderError, match=r"cache \(BAAI/Aquila2-7B\): incomplete, model\.safetensors is missing"):
        find("Aquila2-7B", None, local_files_only=True)


def test_both_releases_of_a_base_model_share_a_repository(source, tmp_path):
    snapshot = in_hub_cache(source, tmp_path / "hub")
    assert find("Aquila2-7B-2024-06", None, local_files_only=True) == snapshot


class HubHandler(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as one repository needs."""

    FILES: ClassVar = {
        "config.json": b"{}",
        "pytorch_model.bin": b"x" * 1000,
        "model.safetensors": b"y" * 1000,
        "modeling_aquila.py": b"raise SystemExit",
        "sub/config.json": b"{}",
    }

    def log_message(self, *args):
        pass

    def do_GET(self, body=True):
        path, headers = self.path.split("?")[0], {}
        if "/resolve/" in path:
            data = self.FILES[path.split(f"/resolve/{COMMIT}/")[1]]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        elif "/tree/" in path:
            entries = ({"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in self.FILES.items())
            data = json.dumps(list(entries)).encode()
        elif path.startswith("/api/models/BAAI/Aquila2-7B"):
            files = [{"rfilename": name, "size": len(data)} for name, data in self.FILES.items()]
            data = json.dumps({"id": "BAAI/Aquila2-7B", "sha": COMMIT, "siblings": files, "tags": []}).encode()
        else:
            return self.send_error(404)
        self.server.asked.append(path)
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        return self.wfile.write(data if body else b"")

    def do_HEAD(self):
        self.do_GET(body=False)


def test_the_hub_gives_safetensors_and_no_code(tmp_path):
    """The real library against a stand-in hub; its address is read at import, hence the process of its own."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.asked = []
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    code = (
        "from aquila2_tut.locate import find\n"
        "first = find('Aquila2-7B', None, False)\n"
        "assert find('Aquila2-7B', None, True) == first\n"
        "print(*sorted(file.name for file in first.iterdir()))"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    server.shutdown()
    server.server_close()
    assert done.stdout.split() == ["config.json", "model.safetensors"], done.stderr
    assert not any(path.endswith((".py", ".bin")) for path in server.asked)


def test_the_modelhub_is_asked_last(monkeypatch, tmp_path):
    order = []
    monkeypatch.setattr(locate, "_from_hub", lambda repo: order.append(repo) or "no")

    class Hub:
        def download(self, name, folder):
            order.append((name, folder))
            return folder

    monkeypatch.setattr(locate, "ModelHub", Hub)
    assert find("AquilaChat2-7B", tmp_path, local_files_only=False) == tmp_path / "AquilaChat2-7B"
    assert order == ["BAAI/AquilaChat2-7B", ("AquilaChat2-7B", tmp_path / "AquilaChat2-7B")]


def test_without_a_network_it_tells_each_place_in_order(tmp_path, network):
    with pytest.raises(LoaderError) as raised:
        AutoLoader("aquila2", model_name="aquilachat2-7b", model_dir=tmp_path).get_model()
    assert str(raised.value).splitlines() == [
        "AquilaChat2-7B (14.6 GB in float16) was not found. Tried, in order:",
        f"1. the folder {tmp_path}: no folder AquilaChat2-7B with a config.json in it",
        "2. the Hugging Face cache (BAAI/AquilaChat2-7B): nothing there",
        "3. the Hugging Face hub (BAAI/AquilaChat2-7B): the server's name cannot be resolved (no network?)",
        "4. BAAI's ModelHub: http://modelhub.invalid/api/searchModleByName: "
        "the server's name cannot be resolved (no network?)",
    ]
    assert {"huggingface.co", "modelhub.invalid"} <= set(network)


def test_local_files_only_asks_nobody(tmp_path, network):
    with pytest.raises(LoaderError) as raised:
        AutoLoader("aquila2", model_name="AquilaChat2-7B", local_files_only=True).get_tokenizer()
    assert str(raised.value).count("not asked, because local_files_only is set") == 2
    assert network == []


def test_an_asset_that_is_absent_is_told_with_its_command():
    with pytest.raises(LoaderError, match=r"SmolLM2-135M \(98\.4 MB\)(.|\n)*aquila2-tut assets fetch smollm2-135m"):
        AutoLoader("aquila2", local_files_only=True).get_model()


def test_the_library_switch_for_offline_work_is_obeyed(monkeypatch, network, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LoaderError, match="not asked, because HF_HUB_OFFLINE is set"):
        find("Aquila2-34B-2024-06", tmp_path, local_files_only=False)
    assert network == []


def test_a_disk_that_is_too_small_for_the_download(monkeypatch, tmp_path):
    monkeypatch.setattr(locate.shutil, "disk_usage", lambda folder: SimpleNamespace(free=5_000_000_000))
    with pytest.raises(LoaderError, match=r"14\.6 GB must be downloaded, .* has 5\.0 GB free"):
        locate._check_disk(14_600_000_000)


# --- incomplete folders ---


@pytest.mark.parametrize(
    ("present", "missing"),
    [
        ([], "config.json"),
        (["config.json"], "model.safetensors"),
        (["config.json", "model.safetensors"], None),
        (["config.json", "pytorch_model.bin"], None),
        (["config.json", "model.safetensors.index.json", "s1.safetensors"], "s2.safetensors"),
        (["config.json", "model.safetensors.index.json", "s1.safetensors", "s2.safetensors"], None),
    ],
)
def test_missing_weights(tmp_path, present, missing):
    index = json.dumps({"weight_map": {"a": "s1.safetensors", "b": "s2.safetensors"}})
    for file in present:
        (tmp_path / file).write_text(index if file.endswith("index.json") else "{}")
    assert missing_weights(tmp_path) == missing


def test_an_incomplete_folder_is_told_instead_of_downloading(tmp_path, network):
    (tmp_path / "aquila2-7b").mkdir()
    (tmp_path / "aquila2-7b" / "config.json").write_text("{}")
    for arguments in ({"model_dir": tmp_path}, {"model_dir": tmp_path / "aquila2-7b"}):
        with pytest.raises(
            LoaderError, match=r"aquila2-7b has a config\.json but no model\.safetensors; copy it there"
        ):
            AutoLoader("aquila2", "Aquila2-7B", **arguments).get_model()
    assert network == []


# --- arguments ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task_name": "lm"}, r'"lm" was upstream\'s loader of the v1 models; here "aquila2" loads those as well'),
        ({"task_name": "seq2seq"}, r"task_name 'seq2seq' is not known"),
        ({"model_name": "AquilaChat3-7B"}, r"Did you mean .*AquilaChat2-7B.*\? Known: Aquila2-7B, .*SmolLM2-135M"),
        ({"model_name": "no/such/folder"}, r"neither a folder with a config\.json nor a known model"),
        ({"fp16": True, "colour": 1}, r'no argument fp16 \(say torch_dtype="float16"\), colour'),
        ({"lora_dir": "a", "qlora_dir": "b"}, r"lora_dir and qlora_dir are both given"),
        ({"lora_dir": "a"}, r"a is no adapter: there is no adapter_config\.json in it"),
        ({"device": "toaster"}, r"device 'toaster' is none that torch knows"),
        ({"device": "cuda:77"}, r"device cuda:77: torch sees \d+ CUDA devices here"),
        ({"torch_dtype": "int8"}, r"torch_dtype 'int8' is not one of auto, float32"),
        ({"torch_dtype": torch.int64}, r"torch_dtype torch\.int64 is not one of"),
        ({"torch_dtype": "nn"}, r"torch_dtype 'nn' is not one of"),
        ({"attn_backend": "flash3"}, r"attn_backend 'flash3' is not one of auto, eager, sdpa, flash, triton"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(LoaderError, match=message):
        AutoLoader(**arguments)


def test_wrong_arguments_are_told_in_milliseconds_and_without_a_network(network):
    with pytest.raises(LoaderError):
        AutoLoader("aquila2", model_name="nonsense")
    assert network == []


# --- device, dtype, memory ---


@pytest.mark.parametrize(("cuda", "mps", "device"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_the_automatic_device(monkeypatch, cuda, mps, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert loader.pick_device("auto").type == device


@pytest.mark.parametrize(
    ("name", "device", "capability", "dtype"),
    [
        ("SmolLM2-135M", "cpu", None, torch.float32),
        ("AquilaChat2-7B", "cpu", None, torch.float16),
        ("AquilaChat2-34B", "cpu", None, torch.bfloat16),
        ("AquilaChat2-7B", "cuda", (8, 0), torch.float16),
        ("AquilaChat2-34B", "cuda", (8, 0), torch.bfloat16),
        ("AquilaChat2-34B", "cuda", (7, 5), torch.float16),
    ],
)
def test_the_automatic_dtype(monkeypatch, name, device, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert loader.default_dtype(Aquila2Config.preset(name), torch.device(device)) == dtype


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float64, torch.float64),
        ("auto", torch.float32),
    ],
)
def test_dtypes_reach_the_model(source, asked, dtype):
    assert AutoLoader("aquila2", source, device="cpu", torch_dtype=asked).get_model().dtype == dtype


def test_the_attention_backend_reaches_the_model(source):
    model = AutoLoader("aquila2", source, attn_backend="eager").get_model()
    chosen = {part.backend for part in model.modules() if hasattr(part, "backend")}
    assert (chosen, model.config.attn_backend) == ({"eager"}, "eager")


def test_a_model_that_does_not_fit_is_refused_before_it_loads(monkeypatch, source):
    monkeypatch.setattr(loader, "available_memory", lambda device: 1000)
    monkeypatch.setattr("aquila2_tut.model.weights.load_model", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises(LoaderError, match=r"the weights need 0\.0 GB in float32, but cpu has 0\.0 GB"):
        AutoLoader("aquila2", source, device="cpu").get_model()


def test_the_memory_of_this_machine_is_known(monkeypatch):
    measured = loader.available_memory(torch.device("cpu"))
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
    total = loader.available_memory(torch.device("cpu"))
    assert 0 < measured <= total


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}, {"head_dim": 12}])
def test_the_closed_form_of_the_parameters(changes):
    config = Aquila2Config(**{**TINY, **changes})
    with torch.device("meta"):
        assert config.parameter_count == sum(p.numel() for p in Aquila2ForCausalLM(config).parameters())


def test_a_folder_without_a_vocabulary_uses_that_of_its_name(source, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("aquila2_tut.tokenizer.load_tokenizer", lambda place: asked.append(place) or "tokenizer")
    named = place(source, tmp_path / "aquila2-7b")
    assert AutoLoader("aquila2", named).get_tokenizer() == "tokenizer"
    own = tmp_path / "own"
    own.mkdir()
    for file in ("config.json", "model.safetensors"):
        (own / file).symlink_to(source / file)
    (own / "tokenizer.json").write_text("{}")
    AutoLoader("aquila2", own).get_tokenizer()
    assert asked == ["Aquila2-7B", own]


@pytest.fixture
def adapter(tmp_path):
    """A LoRA adapter of rank 1 on q_proj, as peft writes it: B A is all ones, scaled by alpha / r = 2."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {stem.format(layer, "A"): torch.ones(1, 16) for layer in range(2)}
    tensors |= {stem.format(layer, "B"): torch.ones(16, 1) for layer in range(2)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_without_peft_is_told(source, adapter, monkeypatch):
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoaderError, match="this needs peft, which is not installed: .*aquila2-tut.train"):
        AutoLoader("aquila2", source, lora_dir=adapter).get_model()


def test_nf4_without_bitsandbytes_is_told(source, adapter, monkeypatch):
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QuantError, match=r"this needs bitsandbytes, .* pip install 'aquila2-tut\[quant\]'"):
        AutoLoader("aquila2", source, qlora_dir=adapter).get_model()


def test_an_adapter_changes_the_model_as_its_matrices_say(source, adapter):
    pytest.importorskip("peft", reason="peft is not installed")
    tuned = AutoLoader("aquila2", source, lora_dir=adapter, device="cpu").get_model()
    merged = AutoLoader("aquila2", source, device="cpu").get_model()
    with torch.no_grad():
        for layer in merged.model.layers:
            layer.self_attn.q_proj.weight += 2.0
    ids = torch.arange(8)[None]
    torch.testing.assert_close(tuned(input_ids=ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    assert callable(tuned.predict) and tuned.aquila_name is None


# --- the package's front door ---


def test_the_names_of_the_contract_are_there():
    import aquila2_tut

    assert all(getattr(aquila2_tut, name) is not None for name in aquila2_tut.__all__)
    assert set(aquila2_tut.__all__) <= set(dir(aquila2_tut))
    with pytest.raises(AttributeError, match="no attribute 'Aquila3'"):
        _ = aquila2_tut.Aquila3


def test_importing_the_package_imports_no_torch():
    code = "import sys, aquila2_tut; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
