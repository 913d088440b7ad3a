"""Finished stages are found again by what they depend on, and by nothing else."""

import pytest

from lightship import work as module
from lightship.errors import LightshipError
from lightship.work import Work


@pytest.fixture
def made():
    """The names of the stages that were really made."""
    return []


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path / "runs", ("first", "second thing"), lambda line: None)


def maker(made, name, text="x"):
    def make(folder):
        made.append(name)
        (folder / "file").write_text(text)
        return {"figure": 1.5}

    return make


def test_a_stage_is_announced_with_the_predicted_share_before_it(tmp_path):
    said = []
    timed = Work(
        tmp_path, ("first", "second thing", "last"), said.append, {"first": 1.0, "second thing": 0.0, "last": 3.0}
    )
    assert [timed.announce(name) for name in timed.names] == [1, 2, 3]
    assert said == ["[1/3, 0%] first", "[2/3, 25%] second thing", "[3/3, 25%] last"]
    said.clear()
    for seconds in ({}, dict.fromkeys(timed.names, 0.0)):  # nothing is known, or all of it is done
        Work(tmp_path, timed.names, said.append, seconds).announce("last")
    assert said == ["[3/3] last", "[3/3] last"]


def test_a_second_run_finds_what_the_first_made(work, made):
    one = work.stage("first", {"a": 1}, maker(made, "first"))
    two = work.stage("first", {"a": 1}, maker(made, "first"))
    assert made == ["first"] and not one.found and two.found
    assert (two.folder, two.result, two.digest) == (one.folder, {"figure": 1.5}, one.digest)
    assert one.folder.name == f"01-first-{one.digest[:12]}" and (one.folder / "file").read_text() == "x"


def test_every_dependency_counts(work, made, monkeypatch):
    one = work.stage("first", {"a": 1}, maker(made, "a1"))
    work.stage("first", {"a": 2}, maker(made, "a2"))
    work.stage("second thing", {"a": 1}, maker(made, "second"))
    monkeypatch.setattr(module, "versions", lambda: {"openvino": "2099.1"})
    other = work.stage("first", {"a": 1}, maker(made, "newer library"))
    assert made == ["a1", "a2", "second", "newer library"] and other.digest != one.digest


def test_an_interrupted_stage_is_made_again(work, made):
    def interrupt(folder):
        (folder / "file").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.stage("first", {}, interrupt)
    stage = work.stage("first", {"option": 2}, maker(made, "first", "whole"))
    assert (stage.folder / "file").read_text() == "whole"
    assert [path.name for path in work.folder.iterdir()] == [stage.folder.name]  # the half-made one is gone


def test_a_damaged_record_is_said(work, made):
    stage = work.stage("first", {}, maker(made, "first"))
    (stage.folder / "done.json").write_text("{")
    with pytest.raises(LightshipError, match=r"done\.json is damaged"):
        work.stage("first", {}, maker(made, "first"))
