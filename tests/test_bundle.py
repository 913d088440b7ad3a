"""A bundle opens only as it was sealed; every difference is an error that names the file."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lightship.bundle import Bundle, pack
from lightship.errors import BundleError, IncompleteBundle, TamperedBundle, UnsupportedError
from lightship.report import Report

V1 = Path(__file__).parent / "bundles" / "v1"


@pytest.fixture
def bundle(tmp_path):
    folder = tmp_path / "b"
    (folder / "targets" / "openvino").mkdir(parents=True)
    (folder / "targets" / "openvino" / "graph.bin").write_bytes(b"weights")
    (folder / "report.json").write_text(Report(()).to_json())
    return pack(folder, {"name": "b", "targets": ["openvino"]})


def test_round_trip(bundle):
    again = Bundle.open(bundle.folder)
    assert again == bundle and again.targets == ["openvino"]
    assert again.target_folder("openvino") == bundle.folder / "targets" / "openvino"
    raw = (bundle.folder / "manifest.json").read_bytes()
    canonical = json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n"
    assert raw == canonical.encode()


def edit(bundle, **changes):
    path = bundle.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_byte(bundle):
    (bundle.folder / "targets/openvino/graph.bin").write_bytes(b"Weights")


def truncate(bundle):
    (bundle.folder / "targets/openvino/graph.bin").write_bytes(b"weigh")


def add(bundle):
    (bundle.folder / "targets/openvino/graph.bin.bak").write_bytes(b"x")


def link(bundle):
    path = bundle.folder / "targets/openvino/graph.bin"
    outside = bundle.folder.parent / "graph.bin"
    path.rename(outside)
    path.symlink_to(outside)


def link_folder(bundle):
    path = bundle.folder / "targets/openvino"
    outside = bundle.folder.parent / "graph.bin"
    path.rename(outside)
    path.symlink_to(outside)


def hard_link(bundle):
    os.link(bundle.folder / "targets/openvino/graph.bin", bundle.folder.parent / "graph.bin")


def fifo(bundle):
    os.mkfifo(bundle.folder / "targets/openvino/graph.bin.bak")


@pytest.mark.parametrize("tamper", [change_byte, truncate, add, link, link_folder, hard_link, fifo])
def test_tampering_is_found_and_named(bundle, tamper):
    tamper(bundle)
    with pytest.raises(TamperedBundle, match=r"graph\.bin|targets/openvino"):
        Bundle.open(bundle.folder)


@pytest.mark.parametrize(
    "path", ["../b/report.json", "/etc/passwd", "a//b", "./report.json", "a\\b", ".", "", "a/../b"]
)
def test_paths_that_leave_the_bundle(bundle, path):
    files = json.loads((bundle.folder / "manifest.json").read_text())["files"]
    edit(bundle, files={**files, path: {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(TamperedBundle, match="outside"):
        Bundle.open(bundle.folder)


@pytest.mark.parametrize("target", ["../b", "/tmp", ".."])
def test_targets_that_leave_the_bundle(bundle, target):
    edit(bundle, targets=[target])
    with pytest.raises(TamperedBundle, match="outside"):
        Bundle.open(bundle.folder)


def test_missing_file_is_named(bundle):
    (bundle.folder / "targets/openvino/graph.bin").unlink()
    with pytest.raises(IncompleteBundle, match=r"graph\.bin is missing"):
        Bundle.open(bundle.folder)


def test_no_manifest_is_not_a_bundle(bundle):
    (bundle.folder / "manifest.json").unlink()
    with pytest.raises(IncompleteBundle, match="never finished"):
        Bundle.open(bundle.folder)
    with pytest.raises(BundleError, match="not a folder"):
        Bundle.open(bundle.folder / "nothing")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"format":"other"}', '{"format":"lightship-bundle"}'])
def test_broken_manifests(bundle, text):
    (bundle.folder / "manifest.json").write_text(text)
    with pytest.raises((TamperedBundle, UnsupportedError)):
        Bundle.open(bundle.folder)


def test_a_newer_version_is_refused_with_the_way_out(bundle):
    edit(bundle, version=2)
    with pytest.raises(UnsupportedError, match="upgrade"):
        Bundle.open(bundle.folder)


def test_version_1_opens_for_ever(tmp_path):
    """The fixture is never made again; a copy, since git may hard-link."""
    shutil.copytree(V1, tmp_path / "v1")
    bundle = Bundle.open(tmp_path / "v1")
    assert bundle.manifest["version"] == 1 and bundle.targets == ["openvino"]
    assert bundle.report.get("kld") is not None
    rows, arrays = bundle.golden()
    assert len(rows[0]) == len(arrays["ids"]) == len(arrays["logprobs"])


def test_version_1_still_generates(tmp_path):
    from lightship.engine import GenerationParams
    from lightship.targets import openvino

    shutil.copytree(V1, tmp_path / "v1")
    engine = openvino.open(Bundle.open(tmp_path / "v1").target_folder("openvino"))
    engine.submit([5, 6, 7], GenerationParams(max_tokens=4, ignore_eos=True))
    found = []
    while engine.busy():
        found += [token for event in engine.step() for token in event.token_ids]
    engine.close()
    assert len(found) == 4
