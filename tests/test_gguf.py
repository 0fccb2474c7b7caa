"""The GGUF reader against the `gguf` package, and against damaged files."""

import numpy as np
import pytest

from aquila2_tut.gguf import GGUFError, GGUFFile

gguf = pytest.importorskip("gguf")
TYPES = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]


@pytest.fixture
def sample(tmp_path):
    """A file with a tensor of every known type and metadata of every kind, written by the `gguf` package."""
    path = tmp_path / "sample.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", False)
    writer.add_string("general.name", "样本 sample")
    writer.add_array("tokenizer.ggml.tokens", ["a", "你好", ""])
    writer.add_array("numbers", [1, 2, 3])
    values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata(sample):
    with GGUFFile(sample) as file:
        assert file.metadata["general.name"] == "样本 sample"
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "你好", ""]
        assert file.metadata["numbers"] == [1, 2, 3]
        assert file.metadata["tokenizer.ggml.add_bos_token"] is False
        assert file.metadata["llama.rope.freq_base"] == 1e4


@pytest.mark.parametrize("name", TYPES)
def test_tensors_equal_the_reference(sample, name):
    stored = next(t for t in gguf.GGUFReader(sample).tensors if t.name == name)
    expected = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(6, 64)
    with GGUFFile(sample) as file:
        np.testing.assert_array_equal(file.tensor(name), expected)


def test_every_truncation_is_refused(sample, tmp_path):
    whole = sample.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(5, 600, 7), len(whole) - 64]:  # the last bytes are padding
        cut.write_bytes(whole[:size])
        with pytest.raises(GGUFError, match=r"cut\.gguf: truncated"):
            GGUFFile(cut)


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(GGUFError, match="not a GGUF file"):
        GGUFFile(tmp_path / "x.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(GGUFError, match="not a GGUF file"):
        GGUFFile(tmp_path / "empty.gguf")


def test_unknown_version_and_unknown_tensor(sample, tmp_path):
    raw = bytearray(sample.read_bytes())
    raw[4] = 99
    (tmp_path / "v99.gguf").write_bytes(raw)
    with pytest.raises(GGUFError, match="version 99"):
        GGUFFile(tmp_path / "v99.gguf")
    with GGUFFile(sample) as file, pytest.raises(GGUFError, match="no tensor named nothing"):
        file.tensor("nothing")


def test_unknown_storage_type_is_named(tmp_path):
    path = tmp_path / "q6.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kind = gguf.GGMLQuantizationType.Q6_K
    writer.add_tensor("w", np.zeros((1, 210), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GGUFError, match="tensor w has ggml type 14; this reader knows F32"):
        GGUFFile(path)
