"""Which cores engines get, on machines described by files as the kernel writes them."""

import json
import os

import pytest

from lightship.engine import EngineSettings
from lightship.errors import UnsupportedError, UsageError
from lightship.serving.deployment import Decoder
from lightship.serving.fleet import Fleet
from lightship.serving.placement import Place, beside, listed, parsed, places
from lightship.serving.server import Serving
from lightship.serving.settings import ServeSettings
from tests.serving.test_reload import fake_bundle


def machine(folder, nodes, siblings=()):
    """`nodes`: lists of cores; `siblings`: pairs that share a core."""
    for number, cores in enumerate(nodes):
        (folder / "node" / f"node{number}").mkdir(parents=True)
        (folder / "node" / f"node{number}" / "cpulist").write_text(cores + "\n")
    for pair in siblings:
        for core in pair:
            (folder / "cpu" / f"cpu{core}" / "topology").mkdir(parents=True)
            (folder / "cpu" / f"cpu{core}" / "topology" / "thread_siblings_list").write_text(listed(pair))
    return folder


def test_one_engine_is_held_to_nothing_unless_a_quota_says_so():
    assert places(1, usable=range(8), quota=64) == (Place(),)
    assert places(1, usable=range(8), quota=2.5) == (Place(None, 2),)
    assert places(1, usable=range(8), quota=0.5) == (Place(None, 1),)


def test_auto_makes_one_for_each_node_inside_the_affinity_mask(tmp_path):
    system = machine(tmp_path, ["0-3", "4-7", ""])
    both = places("auto", usable=range(8), quota=64, system=system)
    assert both == (Place(frozenset({0, 1, 2, 3}), 4), Place(frozenset({4, 5, 6, 7}), 4))
    part = places("auto", usable=[0, 1, 6, 7], quota=64, system=system)
    assert part == (Place(frozenset({0, 1}), 2), Place(frozenset({6, 7}), 2))
    assert places("auto", usable=[4, 5], quota=64, system=system) == (Place(),)


def test_auto_on_one_node_is_one_engine_held_to_nothing(tmp_path):
    assert places("auto", usable=range(4), quota=64, system=machine(tmp_path, ["0-3"])) == (Place(),)
    assert places("auto", usable=range(4), quota=64, system=tmp_path / "none") == (Place(),)


def test_a_quota_is_filled_by_as_few_nodes_as_can_be_and_shared_evenly(tmp_path):
    system = machine(tmp_path, ["0-7", "8-15"])
    assert places("auto", usable=range(16), quota=6, system=system) == (Place(frozenset(range(8)), 6),)
    ten = places("auto", usable=range(16), quota=10, system=system)
    assert [place.threads for place in ten] == [5, 5] and ten[1].cores == frozenset(range(8, 16))


def test_a_number_of_engines_gets_equal_parts_that_split_no_core(tmp_path):
    system = machine(tmp_path, ["0-7"], siblings=[(0, 4), (1, 5), (2, 6), (3, 7)])
    two = places(2, usable=range(8), quota=64, system=system)
    assert [place.cores for place in two] == [frozenset({0, 4, 1, 5}), frozenset({2, 6, 3, 7})]
    three = places(3, usable=range(8), quota=64, system=system)
    assert sorted(core for place in three for core in place.cores) == list(range(8))
    assert [place.threads for place in places(2, usable=range(8), quota=2, system=system)] == [1, 1]
    with pytest.raises(UsageError, match="9 engines on 8 cores"):
        places(9, usable=range(8), quota=64, system=system)
    with pytest.raises(UsageError, match="3 engines on 2 cores"):
        places(3, usable=range(8), quota=2, system=system)


def test_sets_of_different_sizes_have_a_thread_for_each_core_unless_a_quota_binds():
    for quota, threads in ((64, [12, 4]), (8, [4, 4])):
        found = places(1, ("0-11", "12-15"), usable=range(16), quota=quota)
        assert [place.threads for place in found] == threads
    assert sum(place.threads for place in places(3, usable=range(8), quota=64)) == 8


def test_given_sets_are_taken_as_they_are():
    found = places("auto", ("0-1,4", "2"), usable=range(8), quota=64)
    assert found == (Place(frozenset({0, 1, 4}), 3), Place(frozenset({2}), 1))
    assert places(1, ("2-3",), usable=range(8), quota=64) == (Place(frozenset({2, 3}), 2),)


@pytest.mark.parametrize("sets, says", [
    (("0-1", "1-2"), "core 1 is given to two"), (("0-9",), "core 8 is not one"), (("0-x",), "no list of cores"),
    (("3-1",), "no list of cores"), ((",",), "no list of cores"),
])  # fmt: skip
def test_sets_that_cannot_be_are_refused(sets, says):
    with pytest.raises(UsageError, match=says):
        places(1, sets, usable=range(8), quota=64)


def test_a_number_that_contradicts_the_sets_is_refused():
    with pytest.raises(UsageError, match="3 and 2 sets"):
        places(3, ("0", "1"), usable=range(8), quota=64)


def test_lists_of_cores_are_read_and_written_as_the_kernel_does():
    assert parsed("0-2,8,10-11\n") == [0, 1, 2, 8, 10, 11] and parsed("\n") == []
    assert listed([11, 10, 8, 2, 1, 0]) == "0-2,8,10-11"


def test_the_machine_that_runs_this_has_a_place():
    found = places("auto")
    assert len(found) >= 1 and all(place.cores is None or place.cores <= os.sched_getaffinity(0) for place in found)


def test_a_quota_is_kept_by_all_that_a_server_computes_with(monkeypatch, tmp_path):
    monkeypatch.setattr("lightship.serving.placement.cpu_quota", lambda: 1.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    for asked, threads in ((None, 1), (3, 3)):
        settings = ServeSettings(keys=None, engine=EngineSettings(threads=asked))
        with Serving(settings, "127.0.0.1", 0) as serving:
            chosen = serving.chosen(fake_bundle(tmp_path / str(threads)).folder, str)
            assert chosen.engine.threads == threads
            assert (
                serving.engine("fake", chosen)._settings.threads == threads == serving.engine("fake")._settings.threads
            )


def test_what_computes_beside_the_engines_takes_the_cores_they_leave():
    two = (Place(frozenset({0, 1}), 2), Place(frozenset({2, 3}), 2))
    assert beside(two, usable=range(7)) == Place(frozenset({4, 5, 6}), 2)  # no more threads than an engine
    assert beside(two, usable=range(5)) == Place(frozenset({4}), 1)
    assert beside(two, usable=range(4)) == two[1]
    assert beside([Place(None, 3)], usable=range(4)) == Place(None, 3) and beside([Place()]) == Place()


def test_grammars_and_scores_of_a_deployment_have_their_place(tmp_path):
    engines = [Place(frozenset({0}), 1), Place(frozenset({1}), 1)]
    where = beside(engines)
    bundle = fake_bundle(tmp_path / "bundle")
    settings = ServeSettings(keys=None, engine=EngineSettings(threads=64))
    decoder = Decoder.of(bundle, Fleet("fake", settings.engine, settings.cared, engines), settings, "x")
    for process in (decoder.grammars._child, decoder.scoring._child):
        assert process._cores == ",".join(map(str, sorted(where.cores)))
    assert json.loads(decoder.scoring._child._arguments[-1])["threads"] == where.threads == 1


def test_an_encoder_has_one_engine():
    with (
        Serving(ServeSettings(keys=None, cores=("0",)), "127.0.0.1", 0) as serving,
        pytest.raises(UnsupportedError, match="an encoder is served by one engine"),
    ):
        serving.server(None, None)
