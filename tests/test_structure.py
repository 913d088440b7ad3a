"""The house rules that a machine can hold: who may import whom, what is public, what the server may load."""

import ast
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import lightship

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "lightship"
WALKS = ("advise_pipeline", "compress_pipeline", "decoder_pipeline", "encoder_pipeline", "tune_pipeline")
STAGES = {
    "bench",
    "sources",
    "compression",
    "targets",
    "evaluation",
    "search",
    "security",
    "serving",
    "tasks",
    "knowledge",
    "scaling",
}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def part(module: str) -> str:
    """`lightship.targets.openvino` → `targets`."""
    return [*module.split("."), ""][1]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively, which hides where it points"
            if node.module == "lightship":  # a public name stands for the module that defines it
                yield from (f"lightship.{lightship._PLACES.get(alias.name, alias.name)}" for alias in node.names)
            elif (node.module or "").startswith("lightship."):
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("lightship"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_inwards(path):
    relative = path.relative_to(PACKAGE)
    home = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    if home in ("__init__", "__main__", "cli"):
        return  # the outermost layer
    for module in imports_of(path):
        place = part(module)
        assert place != "cli", f"{relative} imports the command line"
        if home == "pipeline":
            continue
        assert place != "pipeline", f"{relative} imports the verbs"
        if home in WALKS:
            assert place not in WALKS, f"{relative} knows of another walk"
            continue
        assert place not in WALKS, f"{relative} imports a walk"
        if place in STAGES:
            assert home == place, f"{relative} imports the stage {place}"
        if home == "errors":
            raise AssertionError("errors imports something")


def test_public_names():
    assert sorted(lightship.__all__) == [
        "Bundle", "Checkpoint", "Engine", "EngineSettings", "GenerationParams", "LightshipError", "Metric", "Precision",
        "Recipe", "Report", "check", "convert", "evaluate", "serve", "ship",
    ]  # fmt: skip
    assert all(getattr(lightship, name) is not None for name in lightship.__all__)


def test_every_stage_folder_is_known():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= STAGES | {"cli"}


MUTATORS = {"append", "add", "extend", "update", "setdefault", "pop", "clear", "insert", "remove", "discard"}


def state_of(path):
    """Lines where a function changes what belongs to the module: `global`, or a change to a module-level name."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    assigned = (node for node in module.body if isinstance(node, ast.Assign | ast.AnnAssign))
    targets = (target for node in assigned for target in getattr(node, "targets", [getattr(node, "target", None)]))
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    functions = (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    for function in functions:
        own = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own |= {argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg)}
        for node in ast.walk(function):
            changed = None
            if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
                changed = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
                changed = node.func.value
            if isinstance(node, ast.Global) or (isinstance(changed, ast.Name) and changed.id in names - own):
                yield f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_holds_mutable_state(path):
    assert sorted(state_of(path)) == []


def test_the_state_scan_sees_state(tmp_path):
    """A scan that finds nothing proves nothing unless it finds what is there."""
    file = tmp_path / "stateful.py"
    file.write_text(
        "SEEN = {}\nN = 0\ndef f(x):\n    SEEN[x] = 1\ndef g():\n    SEEN.clear()\ndef h():\n    global N\n"
    )
    assert list(state_of(file)) == ["stateful.py:4", "stateful.py:6", "stateful.py:8"]


def test_installing_names_no_package_index():
    """Where packages come from is the business of the machine that installs, not of this repository."""
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8").removeprefix("#!/usr/bin/env bash")
        assert not re.search(r"://|index-url|find-links|trusted-host", text), name
    written = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *modules()]
    for path in written:
        hosts = re.findall(r"https?://([\w.-]+)", path.read_text(encoding="utf-8"))
        bad = [host for host in hosts if re.search("pypi|pythonhosted|conda|registry|download", host)]
        assert not bad, f"{path.name} names {bad}"


def test_a_test_that_reaches_out_fails():
    """The guard in conftest, held to its word. 192.0.2.1 and `.invalid` are reserved: nothing answers there."""
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        for reach in (
            lambda: tcp.connect(("192.0.2.1", 80)),
            lambda: tcp.connect_ex(("127.example.invalid", 80)),
            lambda: udp.sendto(b"x", ("192.0.2.1", 53)),
            lambda: socket.getaddrinfo("example.invalid", 80),
        ):
            with pytest.raises(AssertionError, match="a test tried to"):
                reach()


BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Refuse())
"""


def run(code: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_server_works_without_the_build_packages(bundle_path):
    code = BLOCK.format(names={"torch", "transformers", "nncf", "onnx"})
    code += f"""
import httpx
from lightship.serving.server import running
with running({str(bundle_path)!r}) as url:
    answer = httpx.post(url + "/predict", json={{"input": "Hello", "max_tokens": 4}}, timeout=60).json()
print(answer["usage"]["completion_tokens"])
"""
    assert int(run(code)) <= 4


def test_importing_and_asking_for_help_load_nothing_heavy():
    code = """
import sys
import lightship
from lightship.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
heavy = {"torch", "transformers", "nncf", "openvino", "openvino_genai", "fastapi", "pydantic", "numpy", "rich"}
sys.exit(f"loaded: {heavy & set(sys.modules)}" if heavy & set(sys.modules) else 0)
"""
    assert "ship" in run(code)


def tree() -> str:
    """The package as the README shows it: every file with the first line of its docstring."""
    lines = ["src/lightship/"]
    for path in modules():
        relative = path.relative_to(PACKAGE)
        text = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
        if relative.name == "__init__.py":
            if len(relative.parts) > 1:
                lines.append(f"  {str(relative.parent) + '/':<26}{text}")
            continue
        indent = "  " * len(relative.parts)
        lines.append(f"{indent}{relative.name:<{28 - len(indent)}}{text}")
    return "\n".join(lines)


def test_the_tree_in_the_readme():
    found = re.search(r"<!-- tree -->\n```\n(.*?)\n```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found and found.group(1) == tree(), "put this into the README:\n" + tree()


WATCH = """
import os, socket
def noted(what):
    def refuse(*arguments, **options):
        with open(os.environ["LIGHTSHIP_TEST_ATTEMPTS"], "a") as file:
            print(what, [a for a in arguments if not isinstance(a, socket.socket)][:2], file=file)
        raise OSError("no network in this test")
    return refuse
socket.getaddrinfo = noted("looked up")
for method in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, method, noted(method))
"""


@pytest.fixture(scope="module")
def attempts(llama, tmp_path_factory) -> str:
    """What `ship` and every process it starts tried to reach, run as a user runs it: no switch set against telemetry.

    Attempts go to a file, since libraries swallow errors and send from forked children; `sitecustomize` is loaded by
    each Python below this one, so that the fresh processes which measure memory are watched too.
    """
    folder = tmp_path_factory.mktemp("watched")
    (folder / "sitecustomize.py").write_text(WATCH)
    file = folder / "attempts"
    file.touch()
    quiet = {"CI", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"}
    environment = {name: value for name, value in os.environ.items() if name not in quiet}
    above = os.environ.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), above] if above else [str(folder)])
    environment["LIGHTSHIP_TEST_ATTEMPTS"] = str(file)
    code = f"""
from pathlib import Path
from lightship.pipeline import ship
from lightship.recipe import Recipe
ship(Recipe(source={str(llama.folder)!r}, accept=("kld<=0.5",)), Path({str(folder / "out")!r}))
print("shipped")
"""
    assert "shipped" in run(code, environment)
    return file.read_text()


def test_no_socket_leaves_the_machine_while_shipping(attempts):
    assert attempts == ""
