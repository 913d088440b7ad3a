"""`tune` on the tiny bundle: real engines in processes of their own, real golden rows, and what `serve` makes of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import httpx
import pytest
from click.testing import CliRunner

from lightship import tune_pipeline, tuning
from lightship.bundle import Bundle
from lightship.cli import cli
from lightship.engine import EngineSettings
from lightship.errors import LimitExceeded, UnsupportedError, UsageError
from lightship.find import find
from lightship.search.settings import Candidate, Failed
from lightship.serving.placement import Place
from lightship.serving.server import Serving, running
from lightship.serving.settings import ServeSettings
from lightship.serving.tuned import facts, with_tuned
from lightship.tune_pipeline import Processes, dimensions, tune
from lightship.tuning import Chosen, Workload, place
from tests import processor
from tests.test_tuning import FIGURES, entry

LOAD = Workload(clients=2, tokens_in=40, tokens_out=8)
START = Candidate("openvino", Chosen())


@pytest.fixture
def bundle(bundle_path, tmp_path):
    """A copy, next to which a test may write."""
    return Bundle.open(shutil.copytree(bundle_path, tmp_path / "tiny"))


@pytest.fixture
def few(monkeypatch):
    """Two dimensions are enough to see how it works; each candidate takes a second."""

    def some(*_):
        return [lambda best: [best.with_(max_batched_tokens=256)], lambda best: [best.with_(kv_precision="u8")]]

    monkeypatch.setattr(tune_pipeline, "dimensions", some)


def processes(bundle, load=LOAD):
    return Processes(bundle, load, 1e-4, ends=1e18, timeout=120)


def test_from_the_command_line_to_a_served_model(bundle, few):
    load = ["--clients", "2", "--in", "40", "--out", "8", "--budget", "0.2"]
    done = CliRunner().invoke(cli, ["tune", str(bundle.folder), *load, "--json"])
    assert done.exit_code == 0, done.output
    found = tuning.read(place(bundle.folder))[0]
    assert found.bundle == bundle.digest and found.workload == LOAD and len(found.rows) == 3
    assert json.loads(done.stdout)["bundle"] == bundle.digest
    winner = next(row for row in found.rows if row.verdict.startswith("winner"))
    assert (winner.settings, winner.kld) == (found.settings, found.kld) and 0 <= abs(found.kld) < 1e-4
    Bundle.open(bundle.folder)  # nothing of it is in the bundle
    said = []
    settings = with_tuned(bundle.folder, ServeSettings(keys=None), said.append)
    assert settings.engine == found.settings.on(EngineSettings()) and settings.tuned == found
    assert said == [f"settings tuned here for {LOAD.said()}: {tuning.label(found.target, found.settings)}"]


@pytest.mark.parametrize("worse", [
    {"kv_precision": "u8"}, pytest.param({"inference_precision": "bf16", "kv_precision": "bf16"}, marks=processor.bf16),
])  # fmt: skip
def test_a_worse_precision_breaks_the_limit(bundle, worse):
    """Really: a bundle of float32 keeps 1e-4, which an 8-bit cache or bf16 arithmetic do not."""
    trials = processes(bundle)
    assert trials.judge(START).problem is None
    found = trials.judge(START.with_(**worse))
    assert found.problem is not None and "exceeds" in found.problem


def test_what_breaks_the_limit_does_not_win_however_fast(bundle, monkeypatch, few):
    """Speed is seeded here, quality is measured."""
    real = Processes.load

    def seeded(self, candidate, slowest=None):
        found = real(self, candidate, None)
        return found.model_copy(update={"tokens_per_second": 1e6 if candidate.settings.kv_precision == "u8" else 100.0})

    monkeypatch.setattr(Processes, "load", seeded)
    found = tune(bundle.folder, LOAD, budget=60)
    assert found.settings == Chosen()
    (rejected,) = (row for row in found.rows if row.settings.kv_precision == "u8")
    assert rejected.verdict.startswith("rejected: ") and "exceeds" in rejected.verdict


def test_a_bundle_that_breaks_its_own_limit_here(bundle, monkeypatch, few):
    monkeypatch.setattr(
        Processes, "judge", lambda self, candidate: tune_pipeline.Judgement(1.0, 1.0, "mean KLD 1 exceeds 1e-4")
    )
    with pytest.raises(LimitExceeded, match="breaks its own limit"):
        tune(bundle.folder, LOAD, budget=5)
    assert not place(bundle.folder).exists()


def test_settings_that_the_engine_refuses_are_a_failed_candidate(bundle):
    trials = processes(bundle)
    trials.prepare(START)
    with pytest.raises(Failed):
        trials.load(START.with_(inference_precision="bf16", kv_precision="f32" if processor.HAS_BF16 else "bf16"))
    assert trials.load(START, slowest=1e9) is None  # and one that is too slow is stopped


def test_prompt_lookup_is_tried_for_tasks_that_copy_only(bundle):
    def tried(task):
        found = [dimension(START) for dimension in dimensions(bundle, LOAD.model_copy(update={"task": task}))]
        return {candidate.settings.prompt_lookup for candidates in found for candidate in candidates}

    assert tried("text") == {0} and max(tried("copy")) > 0


# ── A bundle with two targets ───────────────────────────────────────────────


@pytest.fixture
def both(both_path, tmp_path):
    """A copy, next to which a test may write."""
    return Bundle.open(shutil.copytree(both_path, tmp_path / "both"))


def changed(settings):
    return {name for name, value in settings if value != dict(Chosen())[name]}


def changes_target(dimension):
    return {candidate.target for candidate in dimension(START)} == {"onnx"}


def test_each_target_is_tried_with_what_it_heeds(both):
    """ONNX Runtime has no precision to choose, and no prompt lookup."""
    every = dimensions(both, LOAD.model_copy(update={"task": "copy"}))
    (other,) = filter(changes_target, every)
    assert other(START) == [Candidate("onnx", Chosen())]
    found = [candidate.settings for dimension in every if dimension is not other
             for candidate in dimension(Candidate("onnx", Chosen()))]  # fmt: skip
    assert set.union(*map(changed, found)) == {"threads", "max_batched_tokens"}
    assert every.index(other) > 3, "the first target has its best arithmetic before another is compared with it"


def test_only_what_is_named_is_tried(both):
    (arithmetic,) = dimensions(both, LOAD, only=["dynamic_quantisation_group"])
    assert {name for each in arithmetic(START) for name in changed(each.settings)} == {"dynamic_quantisation_group"}
    (other,) = dimensions(both, LOAD, only=["target"])
    assert changes_target(other)
    with pytest.raises(UsageError, match="tempo is nothing that is tried"):
        dimensions(both, LOAD, only=["tempo"])


@pytest.mark.parametrize(("features", "integers"), [
    (["avx2"], False), (["avx2", "avx512f"], False), (["avx2", "avx_vnni"], True),
    (["avx2", "avx512f", "avx512_vnni"], True),
])  # fmt: skip
def test_integer_activations_are_tried_where_there_are_kernels(bundle, monkeypatch, features, integers):
    monkeypatch.setattr(tune_pipeline, "machine", lambda: {"features": features, "cores": 2})

    def tried(**only):
        return {name for dimension in dimensions(bundle, LOAD, **only) for candidate in dimension(START)
                for name in changed(candidate.settings)}  # fmt: skip

    assert ("dynamic_quantisation_group" in tried()) == integers and "kv_precision" in tried()
    assert tried(only=["dynamic_quantisation_group"]) == {"dynamic_quantisation_group"}, "who names it has it tried"


@pytest.mark.parametrize("fastest", ["openvino", "onnx"])
def test_a_search_offers_no_target_what_it_refuses(both, monkeypatch, fastest):
    """The whole of it, whoever is ahead when a dimension has its turn. Nothing is measured: every step is a gain."""
    speed = iter(range(1, 10_000))

    class Seeded(Processes):
        def prepare(self, start):
            pass

        def load(self, candidate, slowest=None):
            ahead = 1e6 if candidate.target == fastest else 1.0
            return FIGURES.model_copy(update={"tokens_per_second": ahead * 1.1 ** next(speed)})

        def judge(self, candidate):
            return tune_pipeline.Judgement(0.0, 0.0, None)

    monkeypatch.setattr(tune_pipeline, "Processes", Seeded)
    found = tune(both.folder, LOAD.model_copy(update={"task": "copy", "clients": 8}), budget=600)
    assert {row.target for row in found.rows} == {"openvino", "onnx"}
    for row in found.rows:
        assert changed(row.settings) <= set(find("targets", row.target).TUNABLE), row.label
    tried = {name for row in found.rows for name in changed(row.settings)}
    assert {"prompt_lookup", "threads", "max_batched_tokens"} <= tried
    assert any(row.target == "onnx" and changed(row.settings) for row in found.rows) == (fastest == "onnx")


def test_the_other_target_is_measured_and_served(both, monkeypatch):
    """Speed is seeded at the end, so that the other one wins; figures and quality of both are real."""
    real = Processes.load
    monkeypatch.setattr(tune_pipeline, "dimensions", lambda *given: list(filter(changes_target, dimensions(*given))))
    monkeypatch.setattr("lightship.search.settings.DROP", 0.0)  # who is slow here has its figures too
    monkeypatch.setattr(tune_pipeline, "SECONDS", 0.5)
    measured = []

    def seeded(self, candidate, slowest=None):
        found = real(self, candidate, slowest)
        measured.append((candidate.target, found))
        return found.model_copy(update={"tokens_per_second": 1e6 if candidate.target == "onnx" else 100.0})

    monkeypatch.setattr(Processes, "load", seeded)
    found = tune(both.folder, LOAD, budget=600)
    assert {target for target, _ in measured} == {"openvino", "onnx"}
    assert all(each.tokens_per_second > 0 and each.ttft_p50 > 0 and each.tpot_p50 > 0 for _, each in measured)
    (row,) = (row for row in found.rows if row.target == "onnx")
    assert row.final.n == 3 and abs(row.kld) < 1e-4 and row.served < 1e-2 and row.verdict.startswith("winner")
    assert "\n| onnx, defaults " in tuning.to_markdown(found)
    with running(both, settings=ServeSettings(keys=None)) as url:
        (card,) = httpx.get(f"{url}/v1/models").json()["data"]
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a b", "max_tokens": 4}, timeout=60)
    assert (card["target"], card["batching"], answer.status_code) == ("onnx", "none", 200)
    assert card["measured"]["tuned"]["settings"] == "onnx, defaults"
    assert card["measured"]["bundle"]["decode"]["value"] == both.measured("onnx").get("decode").value


def test_a_target_by_hand_takes_what_was_tuned_for_it(both):
    put(both, settings=Chosen(max_batched_tokens=256), workload=LOAD)
    put(both, target="onnx", settings=Chosen(threads=1))
    for target, engine in ((None, EngineSettings(threads=1)), ("onnx", EngineSettings(threads=1)),
                           ("openvino", EngineSettings(max_batched_tokens=256))):  # fmt: skip
        found = with_tuned(both.folder, ServeSettings(target=target), lambda line: None)
        assert (found.engine, found.target) == (engine, target or "onnx")


def test_what_the_target_refuses_does_not_keep_a_server_from_its_start(both):
    """Of the command itself: one line names the file and the reason, and the first target serves."""
    path = put(both, target="onnx", settings=Chosen(prompt_lookup=3))
    command = [sys.executable, "-m", "lightship", "serve", str(both.folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            while not lines or "serving on" not in lines[-1]:
                lines.append(process.stderr.readline())
                assert lines[-1], lines
            url = re.search(r"http://[\d.:]+", lines[-1]).group()
            (card,) = httpx.get(f"{url}/v1/models").json()["data"]
        finally:
            process.kill()
    (warned,) = (line for line in lines if "cannot be used" in line)
    assert str(path) in warned and "prompt lookup is there for decoders served with OpenVINO only" in warned
    assert card["target"] == "openvino" and "prompt lookup" in card["tuned_ignored"]["reason"]


def test_what_cannot_be_tuned_is_said(bundle, monkeypatch):
    with pytest.raises(UsageError, match="exceed the context"):
        tune(bundle.folder, LOAD.model_copy(update={"tokens_in": 5000}))
    with pytest.raises(UsageError, match="copy"):
        tune(bundle.folder, LOAD.model_copy(update={"task": "copy", "shared": 0.5}))
    monkeypatch.setattr(Bundle, "kind", "embedder")
    with pytest.raises(UnsupportedError, match="of kind embedder"):
        tune(bundle.folder, LOAD)


# ── As the server uses it ───────────────────────────────────────────────────


def put(bundle, **changes):
    return tuning.write(bundle.folder, entry(bundle=bundle.digest, **changes))


def test_by_hand_wins_and_untuned_ignores(bundle):
    put(bundle, settings=Chosen(threads=1, max_num_seqs=8))
    by_hand = with_tuned(bundle.folder, ServeSettings(engine=EngineSettings(threads=2)), lambda line: None)
    assert (by_hand.engine.threads, by_hand.engine.max_num_seqs) == (2, 8)
    given = ServeSettings(use_tuned=False)
    assert with_tuned(bundle.folder, given, pytest.fail) is given


def test_a_damaged_file_changes_nothing_but_is_told(bundle):
    place(bundle.folder).write_text("{")
    said, given = [], ServeSettings()
    assert with_tuned(bundle.folder, given, said.append) is given
    assert len(said) == 1 and "damaged" in said[0]


def test_tuned_settings_do_not_share_the_prefix_cache_between_keys(bundle, tmp_path):
    from lightship.serving.keys import KeyFile

    put(bundle, settings=Chosen(prefix_cache=True))
    file = KeyFile(tmp_path / "keys.json")
    file.create("one")
    with Serving(ServeSettings(keys=file.path), "127.0.0.1", 0) as serving:
        chosen = serving.chosen(bundle.folder, lambda line: None)
        assert chosen.tuned is not None and not chosen.engine.prefix_cache


def test_tuned_threads_are_for_one_engine(bundle):
    put(bundle, settings=Chosen(threads=1, max_num_seqs=8))
    places = [Place(frozenset({0}), 1), Place(frozenset({1}), 1)]
    one, two = (with_tuned(bundle.folder, ServeSettings(), lambda line: None, each) for each in (places[:1], places))
    assert (one.engine.threads, two.engine.threads, two.engine.max_num_seqs) == (1, None, 8)


def test_tuned_threads_go_before_those_of_a_quota(bundle, monkeypatch):
    """And what is measured as the defaults has the threads that a server has by default."""
    monkeypatch.setattr("lightship.serving.placement.cpu_quota", lambda: 3.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for tuned, threads in ((2, 2), (None, 3)):
        put(bundle, settings=Chosen(threads=tuned, max_num_seqs=8))
        with Serving(ServeSettings(keys=None), "127.0.0.1", 0) as serving:
            chosen = serving.chosen(bundle.folder, lambda line: None)
        assert (chosen.engine.threads, chosen.engine.max_num_seqs) == (threads, 8)
    orders = []
    monkeypatch.setattr(subprocess, "run", lambda command, input, **options: orders.append(json.loads(input)) or 1 / 0)
    for given, threads in ((None, 3), (2, 2)):
        with pytest.raises(ZeroDivisionError):
            Processes(bundle, LOAD, 1.0, 1e9, 1.0).judge(Candidate("openvino", Chosen(threads=given)))
        assert orders[-1]["settings"]["threads"] == threads


def test_the_card_shows_what_was_measured_here(bundle):
    put(bundle, settings=Chosen(max_batched_tokens=256, prompt_lookup=3))
    with running(bundle, settings=ServeSettings(keys=None)) as url:
        (card,) = httpx.get(f"{url}/v1/models").json()["data"]
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a b a b a", "max_tokens": 8}, timeout=60)
    assert answer.status_code == 200
    assert (card["id"], card["object"], card["owned_by"]) == ("tiny", "model", "lightship")
    assert (card["digest"], card["precision"], card["target"], card["signature"]) == (
        bundle.digest, "fp32", "openvino", "unsigned")  # fmt: skip
    assert card["measured"]["tuned"]["tokens_per_second"] == 10.0
    assert card["measured"]["tuned"]["settings"] == "openvino, max_batched_tokens 256, prompt_lookup 3"
    assert card["measured"]["bundle"]["decode"]["unit"] == "tokens/s"  # this machine made it


def test_figures_of_another_machine_are_not_shown(bundle, monkeypatch):
    from lightship.serving import tuned

    monkeypatch.setattr(tuned, "machine", lambda: {"cpu": "another"})
    assert facts(bundle, ServeSettings())["measured"] == "unmeasured here"
    other = entry(bundle="cd" * 32)  # nor those of another bundle
    assert facts(bundle, replace(ServeSettings(), tuned=other))["measured"] == "unmeasured here"


def test_serve_says_what_it_uses(bundle):
    """The line on standard error, of the command itself."""
    put(bundle, settings=Chosen(max_batched_tokens=256))
    command = [sys.executable, "-m", "lightship", "serve", str(bundle.folder), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert "max_batched_tokens 256" in process.stderr.readline()
        finally:
            process.kill()
