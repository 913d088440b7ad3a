"""A draft from the command line to the served model: what may be one, what is said of it, and what becomes of it."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import httpx
import pytest
from click.testing import CliRunner

from lightship import tune_pipeline, tuning
from lightship.bundle import Bundle, pack
from lightship.cli import cli
from lightship.draft import DRAFT_TOKENS, GRAPH, TARGET, cache_gb, check_draft, open_draft
from lightship.engine import EngineSettings
from lightship.errors import TamperedBundle, UnsupportedError, UsageError
from lightship.search.settings import Candidate
from lightship.serving import reload
from lightship.serving.reload import check_memory, check_same_draft
from lightship.serving.server import running
from lightship.serving.settings import ServeSettings
from lightship.serving.tuned import with_tuned
from lightship.tune_pipeline import Processes, _entry, dimensions, tune
from lightship.tuning import Chosen, Row, Workload
from tests.serving.test_reload import change, fake_bundle
from tests.test_tuning import entry

LOAD = Workload(clients=2, tokens_in=40, tokens_out=8)
START = Candidate("openvino", Chosen())


def variant(bundle_path, folder, change=lambda runtime: None, **manifest):
    """A sealed copy of the tiny bundle, its runtime folder changed."""
    shutil.copytree(bundle_path, folder)
    change(folder / "targets" / "openvino")
    stated = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    return pack(folder, {**stated, "name": folder.name, **manifest})


def edit(name, **fields):
    def change(runtime):
        path = runtime / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}, indent=3))

    return change


def swap(runtime):
    """Two tokens exchange their ids."""
    path = runtime / "tokenizer.json"
    stated = json.loads(path.read_text())
    vocabulary = stated["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(stated))


@pytest.fixture
def bundle(bundle_path, tmp_path):
    """A copy, next to which a test may write."""
    return Bundle.open(shutil.copytree(bundle_path, tmp_path / "tiny"))


@pytest.fixture
def draft(bundle_path, tmp_path):
    """The same weights, another bundle; its tokenizer is written otherwise, and says the same."""
    return open_draft(variant(bundle_path, tmp_path / "small", edit("tokenizer.json")).folder)


# ── What may be a draft ─────────────────────────────────────────────────────


def test_what_has_the_same_tokens_may_be_one(bundle, draft):
    assert draft.digest != bundle.digest
    check_draft(draft, bundle, "openvino")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (swap, "tokenizers differ"),
        (edit("config.json", vocab_size=520), "520 token ids, the model 512"),
        (edit("config.json", max_position_embeddings=128), "context of 128 tokens, the model one of 2048"),
    ],
)
def test_what_does_not_fit_is_refused(bundle, bundle_path, tmp_path, changed, says):
    draft = open_draft(variant(bundle_path, tmp_path / "small", changed).folder)
    with pytest.raises(UnsupportedError, match=says):
        check_draft(draft, bundle, "openvino")
    with pytest.raises(UnsupportedError, match=says), running(bundle, settings=ServeSettings(keys=None, draft=draft)):
        pass
    with pytest.raises(UnsupportedError, match=says.split(" tokens")[0]):
        tune(bundle.folder, LOAD.model_copy(update={"tokens_in": 200}), draft=draft)


def test_a_shorter_context_is_enough_where_no_more_is_served(bundle, bundle_path, tmp_path):
    short = edit("config.json", max_position_embeddings=128)
    check_draft(open_draft(variant(bundle_path, tmp_path / "small", short).folder), bundle, "openvino", 128)


def test_what_cannot_propose_is_refused(bundle_path, tmp_path, bundle, draft):
    with pytest.raises(UnsupportedError, match="for fake"):
        open_draft(fake_bundle(tmp_path / "fake").folder)
    with pytest.raises(UnsupportedError, match="kind classifier"):
        open_draft(variant(bundle_path, tmp_path / "encoder", kind="classifier").folder)
    with pytest.raises(UnsupportedError, match="served with onnx"):
        check_draft(draft, bundle, "onnx")


def test_a_draft_is_verified_and_no_link_can_change_it(draft, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(draft.folder)
    assert open_draft(link).folder == draft.folder.resolve()
    weights = draft.folder / "targets" / "openvino" / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(TamperedBundle, match="was changed"):
        open_draft(link)


# ── Served ──────────────────────────────────────────────────────────────────


def chunks(url, **more):
    """The pieces of a streamed answer."""
    body = {"prompt": "the statement", "max_tokens": 40, "stream": True, "ignore_eos": True, **more}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = [json.loads(line[6:]) for line in answer.iter_lines() if line and line != "data: [DONE]"]
    return [choice["text"] for line in lines for choice in line["choices"]]


def test_it_is_served_and_the_answers_are_the_same(bundle, draft):
    exact = EngineSettings(inference_precision="f32", kv_precision="f32", dynamic_quantisation_group=0)
    asked = [{"temperature": 0}, {"temperature": 0.7, "seed": 3}]
    with running(bundle, settings=ServeSettings(engine=exact, keys=None)) as url:
        (plain,) = httpx.get(f"{url}/v1/models").json()["data"]
        expected = ["".join(chunks(url, **more)) for more in asked]
    with running(bundle, settings=ServeSettings(engine=exact, keys=None, draft=draft)) as url:
        (card,) = httpx.get(f"{url}/v1/models").json()["data"]
        found = [chunks(url, **more) for more in asked]
    assert ["".join(pieces) for pieces in found] == expected
    assert len(found[0]) <= 40 // 2  # several tokens a step
    assert plain["draft"] is None
    assert card["draft"] == {"name": "small", "digest": draft.digest, "tokens": DRAFT_TOKENS}


def test_the_command_says_it(bundle, draft):
    command = [sys.executable, "-m", "lightship", "serve", str(bundle.folder), "--port", "0"]
    with subprocess.Popen([*command, "--draft", str(draft.folder)], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert "intact" in process.stderr.readline()
            assert process.stderr.readline() == f"small is its draft and proposes {DRAFT_TOKENS} tokens a step\n"
        finally:
            process.kill()


def test_another_bundle_keeps_the_draft_or_is_refused(bundle, bundle_path, draft, tmp_path):
    new, wrong = variant(bundle_path, tmp_path / "new"), variant(bundle_path, tmp_path / "wrong", swap)
    with running(bundle, settings=ServeSettings(keys=None, draft=draft)) as url:
        refused = change(url, wrong.folder)
        assert refused.status_code >= 400 and "verify failed" in refused.text and "tokenizers differ" in refused.text
        assert change(url, new.folder).json()["digest"] == new.digest
        (card,) = httpx.get(f"{url}/v1/models").json()["data"]
        assert (card["digest"], card["draft"]["digest"]) == (new.digest, draft.digest)


def test_a_draft_that_was_replaced_is_not_loaded(bundle, bundle_path, draft):
    chosen = with_tuned(bundle.folder, ServeSettings(draft=draft), pytest.fail)
    check_same_draft(chosen, bundle)
    shutil.rmtree(draft.folder)
    variant(bundle_path, draft.folder)
    with pytest.raises(UsageError, match="another draft"):
        check_same_draft(chosen, bundle)


def test_memory_is_asked_for_both(bundle, draft, monkeypatch):
    """As much for the model, for the draft, and for each of the caches."""
    alone = EngineSettings(kv_cache_gb=1)
    both = replace(alone, draft=str(draft.target_folder("openvino")), draft_tokens=4)
    one = (bundle.report.get("peak_pss") or bundle.report.get("peak_rss")).value + 2**30
    monkeypatch.setattr(reload, "memory_available", lambda: 1.5 * one)
    check_memory(bundle, None, 1, alone, draft)
    with pytest.raises(UsageError, match="in memory together"):
        check_memory(bundle, None, 1, both, draft)


# ── Tuned ───────────────────────────────────────────────────────────────────


def chosen_with(bundle, draft, said):
    return with_tuned(bundle.folder, ServeSettings(draft=draft), said.append)


def test_what_was_tuned_with_a_draft_is_used_with_that_one_only(bundle, draft, bundle_path, tmp_path):
    found = entry(bundle=bundle.digest, draft=draft.digest, settings=Chosen(draft_tokens=7, max_num_seqs=8))
    tuning.write(bundle.folder, found)
    assert str(draft.folder) not in tuning.place(bundle.folder).read_text()  # its digest, no path
    engine = chosen_with(bundle, draft, []).engine
    assert (engine.draft_tokens, engine.max_num_seqs) == (7, 8)
    assert engine.draft == str(draft.target_folder("openvino"))
    other = open_draft(variant(bundle_path, tmp_path / "other").folder)
    for given, tokens, says in ((other, DRAFT_TOKENS, "another draft"), (None, 0, "with a draft")):
        said = []
        engine = chosen_with(bundle, given, said).engine
        assert (engine.draft_tokens, engine.max_num_seqs) == (tokens, 256) and says in said[0]


def test_a_draft_that_does_not_pay_is_left_out(bundle, draft):
    tuning.write(bundle.folder, entry(bundle=bundle.digest, draft=draft.digest, settings=Chosen(max_num_seqs=8)))
    said = []
    engine = chosen_with(bundle, draft, said).engine
    assert (engine.draft, engine.draft_tokens, engine.max_num_seqs) == (None, 0, 8) and "left out" in said[-1]
    assert chosen_with(bundle, None, []).engine == engine  # what was measured without it holds without it


def test_what_was_tuned_without_does_not_hold_with_one(bundle, draft):
    tuning.write(bundle.folder, entry(bundle=bundle.digest, settings=Chosen(prompt_lookup=5)))
    engine = chosen_with(bundle, draft, []).engine
    assert (engine.prompt_lookup, engine.draft_tokens) == (0, DRAFT_TOKENS)


def test_a_draft_is_tried_where_there_is_one_and_never_with_lookup(bundle):
    copying = LOAD.model_copy(update={"task": "copy"})
    for best in (START.with_(prompt_lookup=5), START.with_(draft_tokens=8)):
        for drafted, expected in ((False, set()), (True, {3, 5, 8})):
            tried = [dimension(best) for dimension in dimensions(bundle, copying, drafted)]
            proposing = [each.settings for found in tried for each in found if each.settings != best.settings]
            counts = {settings.draft_tokens for settings in proposing if not settings.prompt_lookup}
            assert counts - {best.settings.draft_tokens, 0} == expected - {best.settings.draft_tokens}
            assert not any(settings.prompt_lookup and settings.draft_tokens for settings in proposing)
    order = [dimension(START) for dimension in dimensions(bundle, LOAD, drafted=True)]
    names = [next(iter(dict(each[0].settings).items() - dict(Chosen()).items()))[0] if each else "" for each in order]
    assert names.index("draft_tokens") > names.index("kv_precision")


def test_tuning_tries_it(bundle, draft, monkeypatch):
    def some(*_):
        return [lambda best: [best.with_(draft_tokens=3)]]

    monkeypatch.setattr(tune_pipeline, "dimensions", some)
    load = ["--clients", "2", "--in", "40", "--out", "8", "--budget", "2"]
    done = CliRunner().invoke(cli, ["tune", str(bundle.folder), *load, "--draft", str(draft.folder)])
    assert done.exit_code == 0, done.output
    (found,) = tuning.read(tuning.place(bundle.folder))
    (row,) = (row for row in found.rows if row.settings.draft_tokens == 3)
    assert found.draft == draft.digest and not row.verdict.startswith(("failed", "not measured"))


def fallen_back(url, tokens=DRAFT_TOKENS):
    """The card of a server whose tuned settings could not be used: it has the draft as with `--untuned`."""
    (card,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert "tuned_ignored" in card and card["target"] == "openvino"
    assert card["draft"]["tokens"] == tokens and "tuned" not in card["measured"]
    assert "".join(chunks(url))
    return card["tuned_ignored"]["reason"]


REFUSED = Chosen(draft_tokens=3, prompt_lookup=3)


def test_the_defaults_have_the_draft_too(bundle, draft, bundle_path, tmp_path):
    """Both at the start and for another bundle."""
    other = variant(bundle_path, tmp_path / "other")
    for each in (bundle, other):
        tuning.write(each.folder, entry(bundle=each.digest, draft=draft.digest, settings=REFUSED))
    with running(bundle, settings=ServeSettings(keys=None, draft=draft)) as url:
        assert "prompt_lookup 3" in fallen_back(url)
        answer = change(url, other.folder)
        assert answer.status_code == 200 and "tuned_ignored" in answer.json(), answer.text
        assert "prompt_lookup 3" in fallen_back(url)


@pytest.fixture
def both(both_path, tmp_path):
    """With two targets, and tuned with a draft for the one that takes none."""
    return Bundle.open(shutil.copytree(both_path, tmp_path / "both"))


def test_a_target_that_takes_no_draft_is_passed_over(both, draft):
    settings = Chosen(draft_tokens=3)
    tuning.write(both.folder, entry(bundle=both.digest, draft=draft.digest, target="onnx", settings=settings))
    said = []
    chosen = chosen_with(both, draft, said)
    assert (chosen.tuned, chosen.engine.draft_tokens) == (None, DRAFT_TOKENS) and "onnx takes none" in said[0]


def test_a_draft_that_fails_with_tuned_settings_only_does_not_end_the_start(both, bundle, draft, monkeypatch):
    monkeypatch.setattr(tuning, "TARGET", "onnx")  # so that such an entry is taken
    settings = Chosen(draft_tokens=3)
    tuning.write(both.folder, entry(bundle=both.digest, draft=draft.digest, target="onnx", settings=settings))
    with running(both, settings=ServeSettings(keys=None, draft=draft)) as url:
        assert "takes no draft" in fallen_back(url)
    with running(bundle, settings=ServeSettings(keys=None, draft=draft)) as url:
        answer = change(url, both.folder)
        assert answer.status_code == 200 and [step["step"] for step in answer.json()["steps"]] == [
            "verify", "memory", "load", "warm up", "golden", "shift"], answer.text  # fmt: skip
        assert "takes no draft" in fallen_back(url)


def test_memory_that_lacks_with_tuned_settings_only_does_not_end_a_change(bundle, both, monkeypatch):
    tuning.write(both.folder, entry(bundle=both.digest, target="onnx", settings=Chosen(threads=1)))
    measured = reload._measured
    monkeypatch.setattr(reload, "_measured", lambda of, target: measured(of, target) * (1 if target == TARGET else 1e6))
    with running(bundle, settings=ServeSettings(keys=None)) as url:
        answer = change(url, both.folder)
        assert answer.status_code == 200, answer.text
        assert "in memory together" in answer.json()["tuned_ignored"]["reason"]


def test_a_draft_that_the_defaults_cannot_use_ends_the_start_at_once(bundle, bundle_path, tmp_path):
    """Whatever was tuned with it."""
    wrong = open_draft(variant(bundle_path, tmp_path / "wrong", swap).folder)
    tuning.write(bundle.folder, entry(bundle=bundle.digest, draft=wrong.digest, settings=Chosen(draft_tokens=3)))
    done = CliRunner().invoke(cli, ["serve", str(bundle.folder), "--port", "0", "--draft", str(wrong.folder)])
    assert isinstance(done.exception, UnsupportedError) and "tokenizers differ" in str(done.exception)
    assert done.exception.exit_code == 2 and "loading" not in done.output


@pytest.mark.parametrize(("verdict", "recorded"), [
    ("not measured: the budget was used up", False), ("failed: refused", False),
    ("stopped: less than 0.8× the best before it", True), ("no better: 1.01× the best before it", True),
])  # fmt: skip
def test_a_draft_that_was_never_measured_is_not_left_out(bundle, draft, verdict, recorded):
    (winner,) = entry().rows
    row = Row(label="openvino", target="openvino", settings=Chosen(draft_tokens=3), verdict=verdict)
    trials = Processes(bundle, LOAD, 0.02, 0.0, 1.0, draft)
    found = _entry(trials, winner, winner, [winner, row], 1.0)
    assert found.draft == (draft.digest if recorded else None)
    tuning.write(bundle.folder, found)
    assert chosen_with(bundle, draft, []).engine.draft_tokens == (0 if recorded else DRAFT_TOKENS)


@pytest.mark.parametrize("shape", ["?,?,?,16", "?,2,?,?"])
def test_a_graph_that_does_not_tell_its_cache_is_refused(tmp_path, shape):
    (tmp_path / GRAPH).write_text(f'<data variable_shape="{shape}"/>')
    with pytest.raises(UnsupportedError, match="no keys and values of the usual shape"):
        cache_gb(tmp_path, tmp_path, 1)
