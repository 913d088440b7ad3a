"""A bundle opens only as it was sealed; every difference is an error that names the file."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from lightship import bundle as module
from lightship.bundle import Bundle, pack, verify
from lightship.errors import BundleError, IncompleteBundle, TamperedBundle, UnsupportedError, UsageError
from lightship.report import Report

V1 = Path(__file__).parent / "bundles" / "v1"
GRAPH = "targets/openvino/graph.bin"


@pytest.fixture
def content(tmp_path):
    folder = tmp_path / "b"
    (folder / "targets" / "openvino").mkdir(parents=True)
    (folder / GRAPH).write_bytes(b"weights")
    (folder / "report.json").write_text(Report((), {"title": "b"}).to_json())
    return folder


@pytest.fixture
def bundle(content):
    return pack(content, {"name": "b", "targets": ["openvino"]})


def canonical(manifest) -> bytes:
    return (json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False) + "\n").encode()


def edit(bundle, **changes):
    """A manifest that differs from the sealed one in these fields alone."""
    (bundle.folder / "manifest.json").write_bytes(canonical({**bundle.manifest, **changes}))


def describe(data: bytes):
    return {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def test_round_trip(bundle):
    again = Bundle.open(str(bundle.folder))
    assert (again.manifest, again.digest) == (bundle.manifest, bundle.digest)
    assert (again.name, again.targets) == ("b", ["openvino"])
    assert again.target_folder("openvino") == bundle.folder / "targets" / "openvino"
    assert again.report == Report((), {"title": "b"})
    raw = (bundle.folder / "manifest.json").read_bytes()
    assert raw == canonical(json.loads(raw)) and bundle.digest == hashlib.sha256(raw).hexdigest()
    report = (bundle.folder / "report.json").read_bytes()
    assert bundle.manifest["files"] == {GRAPH: describe(b"weights"), "report.json": describe(report)}
    assert bundle.size_bytes == len(b"weights") + len(report)
    assert verify(bundle.folder) is None


def test_an_unknown_target_is_named(bundle):
    with pytest.raises(BundleError, match="no target 'onnx'; it has openvino"):
        bundle.target_folder("onnx")


def test_the_same_content_has_the_same_digest(bundle):
    assert pack(bundle.folder, {"targets": ["openvino"], "name": "b"}).digest == bundle.digest


def test_a_link_to_the_bundle_itself_is_fine(bundle, tmp_path):
    (tmp_path / "current").symlink_to(bundle.folder)
    assert Bundle.open(tmp_path / "current").digest == bundle.digest


# ── Tampering ───────────────────────────────────────────────────────────────


def change_byte(bundle):
    (bundle.folder / GRAPH).write_bytes(b"Weights")


def truncate(bundle):
    (bundle.folder / GRAPH).write_bytes(b"weigh")


def add(bundle):
    (bundle.folder / (GRAPH + ".bak")).write_bytes(b"x")


def link(bundle):
    """The content is right and even listed; what is wrong is that it can change from outside."""
    path, outside = bundle.folder / GRAPH, bundle.folder.parent / "graph.bin"
    path.rename(outside)
    path.symlink_to(outside)


def link_folder(bundle):
    path, outside = bundle.folder / "targets/openvino", bundle.folder.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def dangle(bundle):
    (bundle.folder / (GRAPH + ".bak")).symlink_to("nowhere")


def hard_link(bundle):
    os.link(bundle.folder / GRAPH, bundle.folder.parent / "graph.bin")


def hard_link_manifest(bundle):
    os.link(bundle.folder / "manifest.json", bundle.folder.parent / "manifest.json")


def link_manifest(bundle):
    """Not even read: what it points to is no manifest, and that is not what the error says."""
    path, outside = bundle.folder / "manifest.json", bundle.folder.parent / "manifest.json"
    outside.write_text("no manifest")
    path.unlink()
    path.symlink_to(outside)


def fifo(bundle):
    os.mkfifo(bundle.folder / (GRAPH + ".bak"))


TAMPERINGS = [
    (change_byte, r"graph\.bin was changed"),
    (truncate, r"graph\.bin has 5 bytes, the manifest states 7"),
    (add, r"graph\.bin\.bak is not in the manifest"),
    (link, r"graph\.bin is a symbolic link"),
    (link_folder, "targets/openvino is a symbolic link"),
    (dangle, r"graph\.bin\.bak is a symbolic link"),
    (hard_link, r"graph\.bin has a second hard link"),
    (hard_link_manifest, r"manifest\.json has a second hard link"),
    (link_manifest, r"manifest\.json is a symbolic link"),
    (fifo, r"graph\.bin\.bak is not a regular file"),
]


@pytest.mark.parametrize(("tamper", "says"), TAMPERINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_tampering_is_found_and_named(bundle, tamper, says):
    tamper(bundle)
    with pytest.raises(TamperedBundle, match=says):
        verify(bundle.folder)


def test_a_file_exchanged_for_a_link_after_the_walk_is_not_followed(bundle, monkeypatch):
    """Between looking and hashing a link takes the file's place; it has the same size, and leads to the same bytes."""
    walk = module._walk

    def walk_then_exchange(folder):
        yield from list(walk(folder))
        (folder / "x").write_bytes(b"weights")
        (folder / GRAPH).unlink()
        (folder / GRAPH).symlink_to("../../x")

    monkeypatch.setattr(module, "_walk", walk_then_exchange)
    with pytest.raises(BundleError, match=r"cannot read .*graph\.bin"):
        verify(bundle.folder)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_cannot_be_read_is_not_passed_over(bundle):
    (bundle.folder / "secret").mkdir(mode=0)
    with pytest.raises(BundleError, match="secret"):
        verify(bundle.folder)


def test_an_error_of_the_walk_is_raised(bundle, monkeypatch):
    def walk(folder, followlinks, onerror):
        onerror(PermissionError(13, "Permission denied", str(folder / "secret")))
        return iter(())

    monkeypatch.setattr(module.os, "walk", walk)
    with pytest.raises(BundleError, match="secret: Permission denied"):
        verify(bundle.folder)


@pytest.mark.parametrize(
    "path", ["../b/report.json", "..", "/etc/passwd", "a//b", "./a", "a\\b", ".", "", "a/../b", "a/", "manifest.json"]
)
def test_paths_that_leave_the_bundle(bundle, path):
    edit(bundle, files={**bundle.manifest["files"], path: {"sha256": "0" * 64, "size": 1}})
    with pytest.raises(TamperedBundle, match="outside") as caught:
        verify(bundle.folder)
    assert repr(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a\n", "a\x1b[2J", "c:a", "a.", "a /b", "a\u202eb", "a\0b"])
def test_names_that_mean_another_file_elsewhere(bundle, name):
    edit(bundle, files={**bundle.manifest["files"], name: describe(b"")})
    with pytest.raises(TamperedBundle, match="cannot hold the name"):
        verify(bundle.folder)


@pytest.mark.parametrize("target", ["../b", "/tmp", "..", "Openvino", "a/b", "", 3])
def test_targets_that_leave_the_bundle(bundle, target):
    edit(bundle, targets=[target])
    with pytest.raises(TamperedBundle, match="target outside"):
        verify(bundle.folder)


def test_a_target_without_files_is_incomplete(bundle):
    edit(bundle, targets=["openvino", "onnx"])
    with pytest.raises(IncompleteBundle, match="targets/onnx"):
        verify(bundle.folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"sha256": describe(b"weights")["sha256"]},
        {**describe(b"weights"), "size": 7.0},
        {**describe(b"weights"), "size": "7"},
        {**describe(b"weights"), "size": -1},
        {**describe(b"weights"), "sha256": describe(b"weights")["sha256"].upper()},
        {**describe(b"weights"), "more": 1},
        "x",
    ],
)
def test_entries_that_say_too_little_or_too_much(bundle, entry):
    edit(bundle, files={**bundle.manifest["files"], GRAPH: entry})
    with pytest.raises(TamperedBundle, match=r"graph\.bin' wrongly"):
        verify(bundle.folder)


def test_missing_file_is_named(bundle):
    (bundle.folder / "targets/openvino/graph.bin").unlink()
    with pytest.raises(IncompleteBundle, match=r"graph\.bin is missing"):
        verify(bundle.folder)


def test_no_manifest_is_not_a_bundle(bundle):
    (bundle.folder / "manifest.json").unlink()
    with pytest.raises(IncompleteBundle, match="never finished"):
        verify(bundle.folder)
    with pytest.raises(UsageError, match="not a folder"):
        verify(bundle.folder / "nothing")
    (bundle.folder / "config.json").write_text("{}")
    with pytest.raises(IncompleteBundle, match="is a model, not a bundle"):
        verify(bundle.folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"format":"other"}', '{"format":"lightship-bundle"}'])
def test_broken_manifests(bundle, text):
    (bundle.folder / "manifest.json").write_text(text)
    with pytest.raises(TamperedBundle, match="manifest"):
        verify(bundle.folder)


@pytest.mark.parametrize("rewrite", [
    lambda raw: raw.replace(b'"name":"b"', b'"name":"a","name":"b"'),  # another reader may take the first
    lambda raw: raw.replace(b":", b": "),
    lambda raw: raw.rstrip(),
    lambda raw: raw.decode().encode("utf-16"),
    lambda raw: b"\xef\xbb\xbf" + raw,
    lambda raw: raw.replace(b'"name"', b'"created":NaN,"name"'),
    lambda raw: raw.replace(b'"name":"b"', b'"name":"\\ud800"'),
], ids=["twice", "spaces", "newline", "utf-16", "bom", "nan", "surrogate"])  # fmt: skip
def test_only_the_canonical_form_opens(bundle, rewrite):
    path = bundle.folder / "manifest.json"
    raw = path.read_bytes()
    path.write_bytes(rewrite(raw))
    assert path.read_bytes() != raw
    with pytest.raises(TamperedBundle, match=r"canonical|may not hold"):
        verify(bundle.folder)


def test_a_manifest_too_large_is_not_parsed(bundle, monkeypatch):
    monkeypatch.setattr(module, "MANIFEST_LIMIT", 100)
    with pytest.raises(TamperedBundle, match="larger than 100 bytes"):
        verify(bundle.folder)
    with pytest.raises(BundleError, match="at most 100"):
        pack(bundle.folder, {"name": "b", "targets": ["openvino"]})


def test_a_newer_version_is_refused_with_the_way_out(bundle):
    edit(bundle, version=2, files="of another shape")
    with pytest.raises(UnsupportedError, match="upgrade"):
        verify(bundle.folder)


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None])
def test_versions_that_are_none(bundle, version):
    edit(bundle, version=version)
    with pytest.raises(TamperedBundle, match="has version"):
        verify(bundle.folder)


# ── Packing ─────────────────────────────────────────────────────────────────


def odd_name(content):
    (content / "a\nb").write_bytes(b"")


def backslash(content):
    (content / "a\\b").write_bytes(b"")


def no_target(content):
    (content / GRAPH).unlink()


@pytest.mark.parametrize("spoil", [odd_name, backslash, no_target])
def test_what_would_not_open_is_not_packed(content, spoil):
    spoil(content)
    with pytest.raises(BundleError):
        pack(content, {"name": "b", "targets": ["openvino"]})
    assert not (content / "manifest.json").exists()


@pytest.mark.parametrize("place", [link, link_folder, hard_link, fifo])
def test_links_are_not_packed(content, place):
    place(Bundle(content, {}, ""))
    with pytest.raises(TamperedBundle, match=r"link|regular"):
        pack(content, {"name": "b", "targets": ["openvino"]})
    assert not (content / "manifest.json").exists()


def test_a_crash_while_writing_leaves_no_manifest_and_no_trace(content, monkeypatch):
    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", crash)
    with pytest.raises(OSError, match="No space"):
        pack(content, {"name": "b", "targets": ["openvino"]})
    assert sorted(path.name for path in content.iterdir()) == ["report.json", "targets"]


def test_what_an_interrupted_run_left_is_not_sealed(content):
    (content / ".manifest.json.writing").write_bytes(b"half")
    verify(pack(content, {"name": "b", "targets": ["openvino"]}).folder)


def test_what_json_cannot_say_is_refused(content):
    with pytest.raises(BundleError, match="JSON"):
        pack(content, {"name": "b", "targets": ["openvino"], "machine": {"load": float("nan")}})
    assert not (content / "manifest.json").exists()


# ── Golden values ───────────────────────────────────────────────────────────


def golden(content, rows=((1, 2), (3,)), ids=None, logprobs=None):
    (content / "golden").mkdir()
    (content / "golden/tokens.json").write_text(json.dumps({"rows": rows}))
    ids = np.zeros((3, 2), np.int32) if ids is None else ids
    logprobs = np.zeros((3, 2), np.float32) if logprobs is None else logprobs
    np.savez(content / "golden/logprobs.npz", ids=ids, logprobs=logprobs)
    return pack(content, {"name": "b", "targets": ["openvino"]})


def test_golden_round_trip(content):
    ids, logprobs = np.arange(6, dtype=np.int32).reshape(3, 2), -np.arange(6, dtype=np.float32).reshape(3, 2)
    rows, arrays = golden(content, ids=ids, logprobs=logprobs).golden()
    assert rows == [[1, 2], [3]] and set(arrays) == {"ids", "logprobs"}
    np.testing.assert_array_equal(arrays["ids"], ids)
    np.testing.assert_array_equal(arrays["logprobs"], logprobs)


@pytest.mark.parametrize("wrong", [
    {"rows": [[1, 2]]}, {"rows": [[1, 2], [-3]]}, {"rows": [[1, 2], [True]]}, {"rows": {"a": 1}},
    {"ids": np.zeros((3, 3), np.int32)}, {"ids": np.zeros((3, 2), np.int64)},
    {"logprobs": np.zeros((3, 2), np.float64)}, {"ids": np.zeros(3, np.int32)},
])  # fmt: skip
def test_golden_values_of_another_shape(content, wrong):
    with pytest.raises(BundleError, match="golden/ cannot be read"):
        golden(content, **wrong).golden()


def test_golden_values_are_never_unpickled(content):
    """An object array is a pickle, and reading a pickle can run any code."""
    with pytest.raises(BundleError, match="allow_pickle=False"):
        golden(content, ids=np.array([[print, 1]] * 3, dtype=object)).golden()


def test_golden_values_that_would_fill_the_memory(content, monkeypatch):
    monkeypatch.setattr(module, "GOLDEN_LIMIT", 100)
    with pytest.raises(BundleError, match="at most 100"):
        golden(content).golden()


def test_a_bundle_without_golden_values_says_so(bundle):
    with pytest.raises(IncompleteBundle, match=r"golden/tokens\.json"):
        bundle.golden()


# ── Old bundles ─────────────────────────────────────────────────────────────


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
