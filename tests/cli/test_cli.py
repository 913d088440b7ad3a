"""The command line as a user meets it: one clear error, the right exit code, nothing left behind, nothing lost."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from lightship.bundle import Bundle, pack

COMMAND = [sys.executable, "-m", "lightship"]


def lightship(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=240, **options)


def refused(*arguments, says, code=2, **options):
    """The command ends with `code` and one message that says what is wrong; no traceback, nothing on stdout."""
    done = lightship(*arguments, **options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.count("lightship: ") == 1, done.stderr
    for words in [says] if isinstance(says, str) else says:
        assert words in done.stderr
    return done


@pytest.fixture
def copy(llama, tmp_path):
    """The tiny llama in a folder that a test may damage, the output going beside it."""
    folder = tmp_path / "model"
    shutil.copytree(llama.folder, folder)
    return folder


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ── Sources that cannot be shipped ──────────────────────────────────────────


def test_neither_a_folder_nor_a_hub_id(tmp_path):
    refused("ship", "no such thing", "-o", tmp_path / "out", says=["neither a folder, nor a file, nor a hub id", "→"])


def test_no_network(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    out = tmp_path / "out" / "bundle"
    refused("ship", "nobody/no-model", "-o", out, says="HF_HUB_OFFLINE is set", env=environment)
    assert list(out.parent.glob("*")) == []


def unknown_architecture(folder):
    edit(folder / "config.json", model_type="perceptron-9")


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def corrupt_header(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20:40] = b"\xff" * 20
    path.write_bytes(data)


def own_code(folder):
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "model.Mine"})


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


def broken_tokenizer_config(folder):
    (folder / "tokenizer_config.json").write_text("{")


def broken_template(folder):
    (folder / "chat_template.jinja").write_text("{% for %}")


def broken_config(folder):
    (folder / "config.json").write_text("{")


def not_finite(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    state = load_file(path)
    state["model.norm.weight"][0] = float("nan")
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (unknown_architecture, "does not know the architecture 'perceptron-9'"),
        (no_tokenizer, "no tokenizer.json"),
        (truncated, "its header describes"),
        (corrupt_header, "damaged safetensors header"),
        (own_code, "runs no code from a model"),
        (pickled, "pickled weights"),
        (broken_config, "not valid JSON"),
        (broken_tokenizer, "tokenizer.json cannot be read"),
        (broken_tokenizer_config, "tokenizer_config.json is not valid JSON"),
        (broken_template, "no valid Jinja"),
        (not_finite, "the original model itself computes NaN"),
    ],
)
def test_a_model_that_cannot_be_shipped(copy, tmp_path, damage, says):
    damage(copy)
    refused("ship", copy, "-o", tmp_path / "out" / "bundle", says=says)
    assert list((tmp_path / "out").glob("*")) == []  # what preflight refuses does not even make the folder


def test_an_adapter_without_its_base(llama, tmp_path):
    from safetensors.numpy import save_file

    adapter, out = tmp_path / "adapter", tmp_path / "out" / "bundle"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: np.ones((8, 32), np.float32)}, adapter / "adapter_model.safetensors")
    refused("ship", adapter, "-o", out, says=["does not name its base", "--base PATH|HUB_ID"])
    says = ["does not fit", "lora_A.weight: expected 8×64, found 8×32", "--base"]
    refused("ship", adapter, "--base", llama.folder, "-o", out, says=says)
    assert list(out.parent.iterdir()) == []


def test_a_cut_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\x03\x00\x00\x00" + b"\x01" * 40)
    refused("ship", tmp_path / "model.gguf", "-o", tmp_path / "out", says=["model.gguf", "damaged"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("ship", "x", "--accept", "kld<0.3"), "cannot read the limit"),
        (("ship", "x", "--group-size", "7", "-p", "int4"), "group_size"),
        (("ship", "x", "--group-size", "32"), "changes nothing at int8"),
        (("ship", "demo", "--revision", "v1"), "has no revisions"),
        (("show", "/nowhere/at/all"), "/nowhere/at/all"),
        (("check", "/nowhere/at/all"), "/nowhere/at/all"),
        (("serve", "/nowhere/at/all", "--port", "0"), "/nowhere/at/all"),
        (("chat", "http://127.0.0.1:9/"), "is the server running?"),
        (("chat", "127.0.0.1:9"), "a server's address begins with http://"),
    ],
)
def test_wrong_use(arguments, says, tmp_path):
    refused(*arguments, says=says, cwd=tmp_path, input="hello\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [("sihp",), ("ship",), ("ship", "x", "--precision", "int3"), ("serve", "b", "--port", "x")]
)
def test_what_click_refuses(arguments):
    done = lightship(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "Usage:" in done.stderr


def test_an_edited_bundle(bundle_path, tmp_path):
    edited = tmp_path / "edited"
    shutil.copytree(bundle_path, edited)
    with (edited / "report.md").open("a") as file:
        file.write("and it is the best\n")
    for verb in ("show", "check", "serve"):
        refused(verb, edited, says="report.md has", code=1)


def test_a_port_in_use(bundle_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused("serve", bundle_path, "--port", port, says=f"port {port} on 127.0.0.1 is in use")


def test_a_model_that_cannot_be_loaded_ends_the_server(bundle_path, tmp_path):
    """A graph that OpenVINO refuses behind a valid manifest: the server says so and ends."""
    broken = tmp_path / "broken"
    shutil.copytree(bundle_path, broken)
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").unlink()
    (broken / "targets" / "openvino" / "openvino_model.xml").write_text("<net/>")
    pack(broken, {key: manifest[key] for key in manifest if key not in ("files", "format", "version")})
    done = lightship("serve", broken, "--port", "0")
    assert done.returncode == 2 and "the engine cannot be loaded" in done.stderr and "Traceback" not in done.stderr


def test_serve_says_where(bundle_path):
    process = subprocess.Popen([*COMMAND, "serve", bundle_path, "--port", "0"], stderr=subprocess.PIPE, text=True)
    lines = [process.stderr.readline() for _ in range(2)]
    url = re.search(r"http://127\.0\.0\.1:(\d+)", lines[1])
    assert "is intact; loading" in lines[0] and url and int(url.group(1)) > 0
    assert httpx.get(f"{url.group()}/readyz", trust_env=False).status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    process.stderr.close()


# ── Verbs on a real bundle ──────────────────────────────────────────────────


def test_show_and_list(bundle_path):
    shown = lightship("show", bundle_path)
    assert shown.returncode == 0 and "intact" in shown.stdout and "| kld " in shown.stdout
    assert json.loads(lightship("show", bundle_path, "--json").stdout)["manifest"]["name"] == bundle_path.name
    assert "openvino" in json.loads(lightship("list", "--json").stdout)["targets"]


def test_evaluate_on_a_chat(bundle_path, llama, tmp_path):
    """Chat JSONL through the model's template: only the assistant's tokens count."""
    words = ["the harbour lamp burns all night long", "ships keep well clear of the rocks", "fog makes the horn sound"]
    rows = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} " + 12 * words[i % 3]}]
        for i in range(40)
    ]
    text = tmp_path / "chat.jsonl"
    text.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    before = Bundle.open(bundle_path).digest
    done = lightship("evaluate", bundle_path, llama.folder, "--text", text, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    metrics = {metric["name"]: metric for metric in report["metrics"]}
    assert metrics["kld"]["value"] < 1e-5 and 0 < metrics["kld"]["n"] < 6 * 256
    assert report["meta"]["text"]["name"] == "chat.jsonl" and "on your text" in report["meta"]["verdict"]
    assert Bundle.open(bundle_path).digest == before  # nothing was written into it


def test_chat_with_a_bundle(bundle_path):
    done = lightship("chat", bundle_path, "--max-tokens", "8", input="Hello\nAnd now?\n\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2 and "Traceback" not in done.stderr


def test_convert_leaves_a_gated_runtime_folder(llama, tmp_path):
    done = lightship("convert", llama.folder, "-o", tmp_path / "ir", "--accept", "kld<=0.5", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"folder": str(tmp_path / "ir")}
    assert json.loads((tmp_path / "ir" / "engine.json").read_text())["precision"] == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["ir"]


# ── Ctrl-C, and a disk that fills up ────────────────────────────────────────


def interrupted(arguments, seconds_or_line):
    """(exit code as a shell has it, output, errors) of a command that got Ctrl-C after some seconds, or at a line of
    progress. Python ends by the signal where it came while an extension ran Python code: to a shell 130 as well."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    seen = ""
    if isinstance(seconds_or_line, str):
        while seconds_or_line not in seen:
            line = process.stderr.readline()
            assert line, f"ended before {seconds_or_line}: {seen}"
            seen += line
    else:
        time.sleep(seconds_or_line)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    code = 128 - process.returncode if process.returncode < 0 else process.returncode
    return code, out, seen + err


@pytest.mark.parametrize("line", ["] read", "] original", "] export", "] quantise", "] served path", "] evaluate"])
def test_ctrl_c_leaves_nothing_and_loses_nothing(llama, bundle_path, tmp_path, line):
    """With --force over an earlier bundle: it stands unharmed until the new one is complete."""
    out = tmp_path / "bundle"
    shutil.copytree(bundle_path, out)
    code, printed, said = interrupted(["ship", llama.folder, "-o", out, "--force", "-p", "fp32"], line)
    assert code == 130 and printed == "" and "Traceback" not in said, said
    assert "stopped; nothing was left behind" in said
    assert Bundle.open(out).digest == Bundle.open(bundle_path).digest
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize("moment", [random.Random(seed).uniform(0, 6) for seed in range(4)])
def test_ctrl_c_at_any_moment(llama, tmp_path, moment):
    code, _, said = interrupted(["ship", llama.folder, "-o", tmp_path / "bundle", "-p", "fp32"], moment)
    assert code == 130 and "Traceback" not in said, said
    assert list(tmp_path.iterdir()) == []


def may_mount() -> bool:
    """Whether a file system of a fixed size can be mounted for one process."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a small tmpfs (root on Linux)")
@pytest.mark.parametrize("size", ["200k", "1500k", "2600k", "3000k", "3500k"])
def test_a_full_disk(llama, tmp_path, size):
    """The disk fills in one stage or another, which preflight did not keep from happening: one error, and the disk is
    as it was."""
    script = 'place="$2"; mount -t tmpfs -o size="$1" x "$place"; shift 2; "$@"; code=$?; ls -A "$place"; exit $code'
    ship = [*COMMAND, "ship", str(llama.folder), "-o", str(tmp_path / "bundle"), "-p", "fp32", "--ignore-shortage"]
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", size, str(tmp_path), *ship],
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "is full" in done.stderr and done.stdout == ""


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount a small tmpfs (root on Linux)")
def test_a_small_disk_is_refused_first(llama, tmp_path):
    script = 'mount -t tmpfs -o size=2m x "$1"; shift; "$@"'
    ship = [*COMMAND, "ship", str(llama.folder), "-o", str(tmp_path / "bundle"), "-p", "fp32"]
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", str(tmp_path), *ship],
                          capture_output=True, text=True, timeout=240)  # fmt: skip
    assert done.returncode == 2 and f"of disk below {tmp_path}, 2 MB free" in done.stderr, done.stderr
    assert "] read" not in done.stderr and done.stdout == ""
