"""The ONNX target: export, rounding and engine against PyTorch, and a bundle that is served."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import onnx as onnx_protobuf
import onnx_ir
import pytest
from click.testing import CliRunner

from lightship import costs
from lightship.bundle import Bundle
from lightship.calibration import default_text
from lightship.checkpoint import Checkpoint
from lightship.cli.convert import command as convert_command
from lightship.cli.ship import command as ship_command
from lightship.cli.show import command as show_command
from lightship.engine import EngineSettings, GenerationParams
from lightship.errors import (
    ContextTooLong,
    EngineError,
    LimitExceeded,
    RequestError,
    SourceError,
    UnknownName,
    UnsupportedError,
)
from lightship.evaluation import divergence, parity
from lightship.evaluation.text import scoring_set, tokeniser
from lightship.pipeline import check, convert, ship
from lightship.recipe import KLD_LIMITS, Precision, Recipe
from lightship.serving.server import running
from lightship.sources import peek
from lightship.targets import onnx, pytorch
from tests.matrix.families import WINDOW, make
from tests.tiny import tiny_gpt2, tiny_llama

PROMPT = list(range(20, 60))


def gpt2_with_biases(folder):
    """Fresh biases are zero and vanish in the export; these do not."""
    from safetensors.torch import load_file, save_file

    path = tiny_gpt2(folder).folder / "model.safetensors"
    state = load_file(path)
    for name in state:
        if name.endswith("bias"):
            state[name].uniform_(-0.5, 0.5)
    save_file(state, path, metadata={"format": "pt"})
    return Checkpoint(folder)


MODELS = {
    "tied": tiny_llama,
    "untied": lambda folder: tiny_llama(folder, tie_word_embeddings=False),
    "gpt2": gpt2_with_biases,
}


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory):
    """(checkpoint, its runtime folder in fp32) of each architecture."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = MODELS[request.param](folder / "model")
    onnx.export(checkpoint, folder / "runtime", "float32")
    return checkpoint, folder / "runtime"


def gate_of(checkpoint, folder):
    """What the gates compare with."""
    original = pytorch.open_scorer(checkpoint.folder)
    tokens = scoring_set(default_text(), tokeniser(checkpoint)[0], 1024, 1).sequences[0]
    return divergence.record(original, parity.gate_batches(tokens, checkpoint.context_length, original.greedy), folder)


@pytest.fixture(scope="module")
def gate(exported, tmp_path_factory):
    return gate_of(exported[0], tmp_path_factory.mktemp("reference"))


def test_the_export_is_the_original(exported, gate):
    """Rows of different lengths, and 1 024 tokens read in blocks."""
    found = parity.parity(gate, onnx.open_scorer(exported[1]))
    assert found.mean_kld < 1e-6 and found.top1 == 1.0 and found.greedy == 1.0


@pytest.mark.parametrize(
    "precision",
    [Precision(name="fp32"), Precision(name="int8"), Precision(name="int4", group_size=32),
     Precision(name="int4", group_size=16, tables="int4")],
    ids=["fp32", "int8", "int4", "int4 everywhere"],
)  # fmt: skip
def test_weights_are_as_large_as_predicted(exported, tmp_path, precision):
    """Their scales included; the graph's description lies in a file of its own."""
    checkpoint, runtime = exported
    if precision.name == "int4" and checkpoint.config["model_type"] == "gpt2":
        pytest.skip("a table of positions, not told from the body, is half of this tiny model")
    if precision.name != "fp32":
        onnx.quantise(runtime, tmp_path, precision)
        runtime = tmp_path
    shape = replace(peek(str(checkpoint.folder)).shape, layers=0)
    stored = (runtime / onnx.DATA).stat().st_size
    assert costs.served_bytes(shape, precision, "onnx") == pytest.approx(stored, rel=0.03)


def test_a_wrong_rope_base_is_caught(llama, tmp_path):
    gate = gate_of(llama, tmp_path / "reference")
    wrong = Checkpoint(shutil.copytree(llama.folder, tmp_path / "wrong"))
    config = {**wrong.config, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    (wrong.folder / "config.json").write_text(json.dumps(config))
    onnx.export(wrong, tmp_path / "runtime")
    with pytest.raises(LimitExceeded):
        found = parity.parity(gate, onnx.open_scorer(tmp_path / "runtime"))
        parity.check_parity(found, KLD_LIMITS["int4"], "gate")


def test_nothing_of_this_machine_is_in_the_graph(exported):
    graph = (exported[1] / "model.onnx").read_bytes()
    assert b".py" not in graph and b"/" + b"site-packages" not in graph


def stored_outside(graph):
    """(name of the file, its length in bytes) of every weight; the graph itself holds a few numbers at most."""
    model = onnx_protobuf.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx_protobuf.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            yield entries["location"], int(entries["length"])
        else:
            assert tensor.ByteSize() < 1024


def test_weights_always_lie_beside_the_graph(exported, tmp_path):
    """Protobuf ends at 2 GB. The file is named without a folder, so a bundle may be moved and nothing else is read."""
    checkpoint, runtime = exported
    onnx.quantise(runtime, tmp_path, Precision(name="int8"))
    for folder, bytes_a_weight in ((runtime, 4), (tmp_path, 1)):
        names, sizes = zip(*stored_outside(folder / "model.onnx"), strict=True)
        assert set(names) == {"model.onnx.data"}
        assert sum(sizes) > 0.98 * bytes_a_weight * checkpoint.weight_bytes / 4
        assert (folder / "model.onnx.data").stat().st_size >= sum(sizes)


def test_weights_outside_the_folder_are_not_read(exported, tmp_path):
    """A graph may name any file as its weights; the runtime refuses those that its folder does not hold."""
    _, runtime = exported
    folder = shutil.copytree(runtime, tmp_path / "runtime")
    (folder / "model.onnx.data").rename(tmp_path / "model.onnx.data")
    model = onnx_protobuf.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../model.onnx.data"
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="cannot load"):
        onnx.open(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_more_than_two_gigabytes(tmp_path):
    checkpoint = tiny_llama(tmp_path / "model", hidden_size=2048, intermediate_size=65_536, num_hidden_layers=1,
                            vocab_size=131_072, initializer_range=0.05)  # fmt: skip
    onnx.export(checkpoint, tmp_path / "runtime")
    assert (tmp_path / "runtime" / "model.onnx.data").stat().st_size > 2.5 * 2**30
    onnx.quantise(tmp_path / "runtime", tmp_path / "int8", Precision(name="int8"))
    ids = np.array([PROMPT])
    original = pytorch.open_scorer(checkpoint.folder).logits(ids, np.ones_like(ids))
    for name, error in (("runtime", 1e-3), ("int8", 0.1)):
        logits = onnx.open_scorer(tmp_path / name).logits(ids, np.ones_like(ids))
        assert np.abs(logits - original).mean() < error * np.abs(original).mean()


def test_the_engine_is_greedy_as_pytorch(exported):
    checkpoint, runtime = exported
    engine = onnx.open(runtime, EngineSettings(max_batched_tokens=16))  # the prompt in three chunks
    expected = pytorch.open_scorer(checkpoint.folder).greedy([PROMPT], 60)[0]
    assert generate(engine, PROMPT, max_tokens=60, ignore_eos=True) == expected


@pytest.fixture(scope="module", params=["mistral", "gemma2", "gemma3"])
def windowed(request, tmp_path_factory):
    """(checkpoint, its runtime folder in fp32): every layer of mistral has a window of 128, one of two of the others.
    The capped scores of gemma2 are computed outside the fused attention."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = make(request.param, folder / "model")
    onnx.export(checkpoint, folder / "runtime")
    return checkpoint, folder / "runtime"


def test_windows_are_kept_however_the_text_is_read(windowed, tmp_path):
    """PyTorch reads all in one pass without a cache; the graph in one pass too, in pieces that end anywhere in the
    window, and token by token."""
    checkpoint, runtime = windowed
    ids = np.random.default_rng(0).integers(2, checkpoint.vocabulary, (1, 1024))
    mask = np.ones_like(ids)
    expected = pytorch.open_scorer(checkpoint.folder).logits(ids, mask)
    scorer = onnx.open_scorer(runtime)
    for size, length in ((1024, 1024), (300, 1024), (1, 400)):
        found = np.concatenate(list(scorer.blocks(ids[:, :length], mask[:, :length], size)), axis=1)
        assert np.abs(found - expected[:, :length]).max() < 1e-3

    blind = Checkpoint(shutil.copytree(checkpoint.folder, tmp_path / "blind"))  # the window is what was measured
    (blind.folder / "config.json").write_text(json.dumps({**blind.config, "sliding_window": 4096}))
    apart = np.abs(pytorch.open_scorer(blind.folder).logits(ids, mask) - expected)[0].max(-1)
    assert apart[:WINDOW].max() < 1e-3 and apart[WINDOW : 2 * WINDOW].mean() > 0.1


def test_the_engine_is_greedy_as_pytorch_beyond_the_window(windowed):
    checkpoint, runtime = windowed
    prompt = [int(token) for token in np.random.default_rng(1).integers(2, checkpoint.vocabulary, 200)]
    engine = onnx.open(runtime, EngineSettings(max_batched_tokens=150))
    expected = pytorch.open_scorer(checkpoint.folder).greedy([prompt], 150)[0]
    assert generate(engine, prompt, max_tokens=150, ignore_eos=True) == expected


def test_only_fused_attention_appends_to_its_cache(windowed):
    """Elsewhere the graph hands out a longer copy; the tests above read both kinds."""
    checkpoint, runtime = windowed
    graph = onnx_ir.load(runtime / "model.onnx").graph
    past, present = graph.inputs[3], next(value for value in graph.outputs if value.name.startswith(onnx.PRESENT))
    assert past.name.startswith(onnx.PAST)
    assert (past.shape == present.shape) == (checkpoint.config["model_type"] != "gemma2")


def test_another_state_than_keys_and_values_is_refused(tmp_path):
    """Convolutions keep their last inputs."""
    import torch
    from transformers import GenerationConfig, Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, vocab_size=512, layer_types=["conv", "full_attention"])  # fmt: skip
    torch.manual_seed(0)
    model = Lfm2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="conv_states"):
        onnx.export(Checkpoint(tmp_path / "model"), tmp_path / "runtime")


# ── Rounding ────────────────────────────────────────────────────────────────


def weight_bytes(runtime):
    tensors = [each.const_value for each in onnx_ir.load(runtime / "model.onnx").graph.initializers.values()]
    return sum(tensor.nbytes for tensor in tensors if tensor.dtype.name != "INT64")


@pytest.mark.parametrize(
    ("options", "table_bits", "body_bits"),
    [
        ({"name": "int8"}, 8, 8),
        ({"name": "int4", "group_size": 32}, 8, 4),
        ({"name": "int4", "group_size": 32, "tables": "int4"}, 4, 4),
    ],
    ids=["int8", "int4", "int4-all"],
)
def test_rounded_weights_are_near_and_stored_once(exported, gate, tmp_path, options, table_bits, body_bits):
    checkpoint, runtime = exported
    precision, _ = onnx.settle(Precision(**options))
    onnx.quantise(runtime, tmp_path, precision)
    found = parity.parity(gate, onnx.open_scorer(tmp_path))
    assert 1e-5 < found.mean_kld < {"int8": 0.02, "int4": 1.5}[precision.name]  # random models of 64 channels
    tables = matrices = other = 0
    for name, tensor in checkpoint.load().named_parameters():  # a tied table is named once
        size = tensor.numel()
        if tensor.ndim < 2:
            other += 4 * size
        elif any(part in name for part in ("embed", "lm_head", "wte", "wpe")):
            tables += size
        else:
            matrices += size
    scales = 4 * (tables + matrices) / precision.group_size
    expected = tables * table_bits / 8 + matrices * body_bits / 8 + scales + other
    assert weight_bytes(tmp_path) == pytest.approx(expected, rel=0.03)
    assert (tmp_path / "tokenizer.json").is_file()


def test_float32_arithmetic_is_nearer(exported, gate, tmp_path):
    """`arithmetic: auto` rounds activations too; the difference must be there, or the option would do nothing."""
    drift = {}
    for arithmetic in ("auto", "f32"):
        onnx.quantise(exported[1], tmp_path / arithmetic, Precision(name="int8", arithmetic=arithmetic))
        drift[arithmetic] = parity.parity(gate, onnx.open_scorer(tmp_path / arithmetic)).mean_kld
    assert 0 < drift["f32"] < 0.8 * drift["auto"]


def test_what_does_not_fill_its_last_block(tmp_path):
    """Inputs of 80 and 48 in groups of 64: the table's rows are cut to size again."""
    checkpoint = tiny_llama(tmp_path / "model", hidden_size=80, head_dim=16, intermediate_size=48)
    onnx.export(checkpoint, tmp_path / "runtime")
    onnx.quantise(tmp_path / "runtime", tmp_path / "int8", Precision(name="int8"))
    ids = np.array([PROMPT])
    exact, rounded = (onnx.open_scorer(tmp_path / name).logits(ids, np.ones_like(ids)) for name in ("runtime", "int8"))
    assert 0 < np.abs(exact - rounded).mean() < 0.1 * np.abs(exact).mean()


@pytest.mark.parametrize(
    ("precision", "says"),
    [
        ({"name": "bf16"}, "fp32, int8 or int4"),
        ({"name": "int4", "gptq": True}, "gptq"),
        ({"name": "int4", "awq": True}, "awq"),
        ({"name": "int4", "ratio": 0.5}, "ratio"),
        ({"name": "int4", "group_size": 48}, "group-size of 16, 32, 64"),
    ],
    ids=str,
)
@pytest.mark.parametrize("walk", [ship, convert])
def test_what_onnx_cannot_do_is_refused_before_any_work(walk, precision, says, tmp_path):
    """The source does not even exist."""
    recipe = Recipe(source=str(tmp_path / "nowhere"), target="onnx", precision=Precision(**precision))
    with pytest.raises(UnsupportedError, match=says):
        walk(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_targets_are_checked_by_name(tmp_path):
    with pytest.raises(UnknownName, match="onnx, openvino"):
        convert(Recipe(source="nowhere", target="onyx"), tmp_path / "out")
    with pytest.raises(UnsupportedError, match="not made to be shipped"):
        convert(Recipe(source="nowhere", target="pytorch"), tmp_path / "out")


@pytest.mark.parametrize("command", [ship_command, convert_command])
def test_the_target_is_an_option(command, tmp_path):
    for options, error in (("--target onyx", UnknownName), ("--target onnx -p bf16", UnsupportedError)):
        done = CliRunner().invoke(command, [str(tmp_path / "nowhere"), "-o", str(tmp_path / "out"), *options.split()])
        assert isinstance(done.exception, error)
    assert "openvino|onnx" in CliRunner().invoke(command, ["--help"]).stdout


def test_data_aware_options_are_off_and_said_to_be(llama, tmp_path):
    said = []
    recipe = Recipe(source=str(llama.folder), target="onnx", accept=("kld<=2",), precision=Precision(name="int4"))
    runtime = convert(recipe, tmp_path / "out", progress=said.append)
    assert said[0] == "fit off: for ONNX weights are rounded to nearest"
    assert "rounded to nearest" in json.loads((runtime / "engine.json").read_text())["weights"]


# ── The engine ──────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def bundle(llama, tmp_path_factory):
    """The tiny llama shipped to int8 for ONNX Runtime, all gates passed."""
    recipe = Recipe(source=str(llama.folder), target="onnx", accept=("kld<=0.1",))
    return ship(recipe, tmp_path_factory.mktemp("ship") / "tiny")


@pytest.fixture(scope="module")
def engine(bundle):
    opened = onnx.open(bundle.target_folder("onnx"), EngineSettings(threads=1, max_batched_tokens=32))
    yield opened
    opened.close()


def events(engine, tokens, **params):
    engine.submit(tokens, GenerationParams(**params))
    found = []
    while engine.busy():
        found += engine.step()
    return found


def generate(engine, tokens, **params):
    return [token for event in events(engine, tokens, **params) for token in event.token_ids]


def test_the_same_seed_gives_the_same_text(engine):
    options = {"max_tokens": 30, "temperature": 1.0, "ignore_eos": True}
    first, again, other = (generate(engine, PROMPT, seed=seed, **options) for seed in (5, 5, 6))
    assert first == again != other
    assert generate(engine, PROMPT, seed=5, **{**options, "top_k": 1}) == generate(engine, PROMPT, max_tokens=30,
                                                                                   ignore_eos=True)  # fmt: skip


def test_logprobs_are_those_of_the_scorer(engine, bundle):
    found = events(engine, PROMPT, max_tokens=12, ignore_eos=True, logprobs=True)
    whole = PROMPT + [event.token_ids[0] for event in found]
    ids = np.array([whole])
    logits = onnx.open_scorer(bundle.target_folder("onnx")).logits(ids, np.ones_like(ids))[0]
    expected = divergence.log_softmax(logits)[np.arange(len(whole) - 1), whole[1:]]
    np.testing.assert_allclose([event.logprobs[0] for event in found], expected[len(PROMPT) - 1 :], atol=1e-3)
    np.testing.assert_allclose(engine.prompt_logprobs(whole), expected, atol=1e-3)


def test_stop_tokens_end_the_text_unseen(engine):
    text = generate(engine, PROMPT, max_tokens=20, ignore_eos=True)
    stop = next(token for token in text[5:] if token not in text[:5])
    found = events(engine, PROMPT, max_tokens=20, stop_token_ids=(stop,))
    assert [event.finish_reason for event in found][-1] == "stop"
    assert [token for event in found for token in event.token_ids] == text[: text.index(stop)]


def test_requests_wait_their_turn_and_can_be_cancelled(engine):
    alone = generate(engine, PROMPT, max_tokens=8, ignore_eos=True)
    params = GenerationParams(max_tokens=8, ignore_eos=True)
    first, second, third = (engine.submit(PROMPT, params) for _ in range(3))
    assert engine.stats()["waiting"] == 3 and engine.stats()["batching"] == "none"
    engine.step()
    engine.step()
    engine.cancel(first)
    engine.cancel(second)
    engine.cancel(99)
    found = []
    while engine.busy():
        found += engine.step()
    assert {event.request_id for event in found} == {third}
    assert [event.token_ids[0] for event in found] == alone and found[-1].finish_reason == "length"


def test_what_cannot_be_served_is_refused(engine, bundle, tmp_path):
    for tokens in ([], [512], [-1], [1] * 2048):
        with pytest.raises(ContextTooLong if len(tokens) > 1 else RequestError):
            engine.submit(tokens, GenerationParams(max_tokens=1))
    small = onnx.open(bundle.target_folder("onnx"), EngineSettings(kv_cache_gb=100 * 512 / 2**30))  # 100 tokens
    with pytest.raises(ContextTooLong, match="KV cache of 100"):
        small.submit([1] * 101, GenerationParams(max_tokens=1))
    found = events(small, PROMPT, max_tokens=90, ignore_eos=True)  # who asks for more than there is gets what fits
    assert len(found) == 62 and found[-1].error == "the KV cache is exhausted"
    shutil.copyfile(bundle.target_folder("onnx") / "config.json", tmp_path / "config.json")
    with pytest.raises(SourceError, match=r"holds no model\.onnx"):
        onnx.open(tmp_path)


def test_the_cache_grows_up_to_its_budget(bundle):
    """What does not fit the budget is refused by the engine; a scorer reads it all the same."""
    decoder = onnx._Decoder(bundle.target_folder("onnx"), EngineSettings(kv_cache_gb=600 * 512 / 2**30))  # 600 tokens
    past = decoder.empty()
    for new, capacity in ((200, 256), (57, 512), (300, 600), (43, 600), (10, 610)):
        decoder.read(np.full(new, 20), past)
        assert {value.shape()[2] for value in past.values.values()} == {capacity}


def test_it_opens_without_the_build_packages(bundle):
    code = f"""
import sys
for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "nncf", "openvino"):
    sys.modules[name] = None
from pathlib import Path
import numpy as np
from lightship.engine import GenerationParams
from lightship.targets import onnx
folder = Path({str(bundle.target_folder("onnx"))!r})
engine = onnx.open(folder)
engine.submit([20, 21], GenerationParams(max_tokens=1, ignore_eos=True))
print(len(engine.step()), onnx.open_scorer(folder).logits(np.array([[20, 21]]), np.ones((1, 2))).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1 (1, 2, 512)\n"), done.stderr


def test_show_says_that_requests_wait(bundle, bundle_path):
    for folder, says in (
        (bundle.folder, "targets   onnx (one request at a time)\n"),
        (bundle_path, "targets   openvino\n"),
    ):
        assert says in CliRunner().invoke(show_command, [str(folder)]).stdout


def test_the_bundle_is_served_and_checked(bundle):
    """One request at a time is computed, and said; two clients at once both get their answer."""
    with running(bundle) as url:
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["batching"] == "none"

        def ask(number):
            body = {"model": "tiny", "prompt": PROMPT[number:], "max_tokens": 20, "temperature": 0}
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200 and 1 <= answer.json()["usage"]["completion_tokens"] <= 20
            return answer.json()["choices"][0]["text"]

        alone = [ask(number) for number in range(4)]
        with ThreadPoolExecutor(4) as clients:
            assert list(clients.map(ask, range(4))) == alone and len(set(alone)) > 1
    assert check(bundle.folder, repeats=1).get("golden_kld").value < 0.1
    assert Bundle.open(bundle.folder).report.meta["precision"]["name"] == "int8"
