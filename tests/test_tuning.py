"""The file of tuned settings: what is read from it, what is not, and that nobody gains by changing it."""

import json
import os

import pytest
from pydantic import ValidationError

from lightship import tuning
from lightship.engine import EngineSettings
from lightship.errors import UsageError
from lightship.tuning import Chosen, Entry, Figures, Row, Workload, choose, parse_limits, place, read, write

FIGURES = Figures(tokens_per_second=10.0, least=9.0, most=11.0, n=3, ttft_p50=0.1, ttft_p90=0.2, tpot_p50=0.01,
                  tpot_p90=0.02)  # fmt: skip
DIGEST = "ab" * 32


def entry(**changes):
    settings = changes.pop("settings", Chosen(max_batched_tokens=1024, kv_precision="u8"))
    row = Row(label="openvino", target="openvino", settings=settings, verdict="winner: 1.2× the defaults",
              screening=FIGURES, kld=-1e-12, served=0.001)  # fmt: skip
    fields = {
        "bundle": DIGEST, "machine": tuning.here(), "versions": tuning.versions(), "target": "openvino",
        "workload": Workload(clients=4, tokens_in=100, tokens_out=20, limits={"ttft": 3.0}), "settings": settings,
        "figures": FIGURES, "baseline": FIGURES, "kld": 0.001, "limit_kld": 0.02, "rows": [row], "seconds": 9.5,
        "created": "2026-11-27T20:00:00+00:00",
    }  # fmt: skip
    return Entry(**{**fields, **changes})


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def chosen(bundle, digest=DIGEST, targets=("openvino",)):
    return choose(bundle, digest, list(targets))


def test_what_is_written_is_read(bundle):
    path = write(bundle, entry())
    assert path == bundle.parent / "mine.tuned.json" and not list(bundle.iterdir())
    assert read(path) == [entry()]
    found = chosen(bundle)
    assert found.entry == entry() and "4 clients, 100 tokens in, 20 out" in found.said
    assert [file.name for file in bundle.parent.iterdir() if file.is_file()] == ["mine.tuned.json"]


def test_a_link_to_a_bundle_finds_the_same_file(bundle):
    write(bundle, entry())
    (bundle.parent / "current").symlink_to(bundle)
    assert chosen(bundle.parent / "current").entry == entry()


def test_no_file_is_no_news(bundle):
    assert chosen(bundle) == tuning.Found(None, None)


@pytest.mark.parametrize(("changes", "said"), [
    ({"bundle": "cd" * 32}, "another bundle"),
    ({"machine": {**tuning.here(), "cores": 999}}, "another machine"),
    ({"versions": {**tuning.versions(), "openvino-genai": "1999.1"}}, "other versions of openvino-genai"),
    ({"versions": {}}, "other versions of"),
    ({"target": "onnx"}, "no target onnx"),
])  # fmt: skip
def test_what_was_measured_elsewhere_is_ignored_loudly(bundle, changes, said):
    write(bundle, entry(**changes))
    found = chosen(bundle)
    assert found.entry is None and said in found.said and "lightship tune" in found.said


def test_the_newest_that_fits_is_taken(bundle):
    one, other = Workload(clients=1, tokens_in=9, tokens_out=9), Workload(clients=2, tokens_in=9, tokens_out=9)
    write(bundle, entry(workload=one))
    write(bundle, entry(workload=other))
    write(bundle, entry(machine={"cpu": "another", "cores": 1}))
    assert len(read(place(bundle))) == 3
    assert chosen(bundle).entry.workload == other
    write(bundle, entry(workload=one, seconds=1.0))  # measured again: it takes the place of the old one
    assert len(read(place(bundle))) == 3 and chosen(bundle).entry.seconds == 1.0


def test_entries_of_a_bundle_that_was_replaced_go(bundle):
    write(bundle, entry(bundle="cd" * 32))
    write(bundle, entry())
    assert [each.bundle for each in read(place(bundle))] == [DIGEST]


def tampered(change):
    data = json.loads(json.dumps({"format": "lightship-tuned", "version": 1,
                                  "entries": [entry().model_dump(mode="json")]}))  # fmt: skip
    change(data)
    return json.dumps(data)


TAMPERINGS = {
    "an unknown setting": lambda d: d["entries"][0]["settings"].update(plugin="/tmp/evil.so"),
    "a setting that is not tuned": lambda d: d["entries"][0]["settings"].update(kv_cache_gb=1000),
    "out of range": lambda d: d["entries"][0]["settings"].update(threads=10**9),
    "a path for a target": lambda d: d["entries"][0].update(target="../../evil"),
    "a path for a precision": lambda d: d["entries"][0]["settings"].update(inference_precision="/tmp/x"),
    "text for a number": lambda d: d["entries"][0]["settings"].update(max_batched_tokens="1024"),
    "true for a number": lambda d: d["entries"][0]["settings"].update(threads=True),
    "another format": lambda d: d.update(format="other"),
    "a newer version": lambda d: d.update(version=2),
    "too many entries": lambda d: d.update(entries=d["entries"] * 100),
    "no entries": lambda d: d.pop("entries"),
    "a long text": lambda d: d["entries"][0].update(created="x" * 10**5),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_file_that_was_changed_is_ignored_loudly(bundle, name):
    place(bundle).write_text(tampered(TAMPERINGS[name]))
    found = chosen(bundle)
    assert found.entry is None and found.said.startswith("ignored the tuned settings")
    write(bundle, entry())  # and `tune` replaces it
    assert chosen(bundle).entry == entry()


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**5, b'{"format": "lightship-tuned", "format": 1}',
    b'{"entries": NaN}', b" " * (2**20 + 1),
])  # fmt: skip
def test_rubbish_is_ignored_loudly(bundle, text):
    place(bundle).write_bytes(text)
    found = chosen(bundle)
    assert found.entry is None and found.said


def test_infinite_figures_are_refused(bundle):
    text = tampered(lambda d: d["entries"][0]["figures"].update(most="@")).replace('"@"', "1e999")
    place(bundle).write_text(text)
    assert chosen(bundle).entry is None


def test_links_and_pipes_are_not_followed(bundle):
    elsewhere = write(bundle, entry()).rename(bundle.parent / "elsewhere")
    place(bundle).symlink_to(elsewhere)
    assert chosen(bundle).entry is None and "cannot be read" in chosen(bundle).said
    place(bundle).unlink()
    os.mkfifo(place(bundle))
    assert chosen(bundle).entry is None and "not a regular file" in chosen(bundle).said


def test_a_folder_that_cannot_be_written_to_is_an_error(bundle, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UsageError, match="cannot write"):
        write(bundle, entry())
    assert [path.name for path in bundle.parent.iterdir()] == ["mine"]


def test_given_by_hand_wins():
    tuned = Chosen(threads=2, max_num_seqs=8, prefix_cache=True, prompt_lookup=5)
    assert tuned.on(EngineSettings()) == EngineSettings(threads=2, max_num_seqs=8, prompt_lookup=5)
    given = EngineSettings(threads=7, max_num_seqs=1, prefix_cache=False, kv_cache_gb=3)
    assert tuned.on(given) == EngineSettings(
        threads=7, max_num_seqs=1, prefix_cache=False, kv_cache_gb=3, prompt_lookup=5
    )


def test_every_tuned_setting_is_one_of_the_engine():
    """And its default is the engine's, else an entry of the defaults would change something."""
    assert Chosen().on(EngineSettings()) == EngineSettings() and Chosen.of(EngineSettings()) == Chosen()


def test_limits_are_read():
    assert parse_limits(["ttft=3", "tpot=0.25"]) == {"ttft": 3.0, "tpot": 0.25}
    for wrong in ("ttft", "ttft=", "e2e=3", "ttft=-1", "tpot=nan", "tpot=inf"):
        with pytest.raises(UsageError, match="cannot read the limit"):
            parse_limits([wrong])


def test_the_table_names_every_candidate():
    text = tuning.to_markdown(entry())
    assert "openvino, kv_precision u8, max_batched_tokens 1024, 10 tokens/s" in text and "winner: 1.2×" in text


def test_nothing_odd_is_written():
    with pytest.raises(ValidationError):
        Chosen(threads=0)
