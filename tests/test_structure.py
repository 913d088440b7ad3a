"""The house rules that a machine can hold: who may import whom, what is public, what the server may load."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightship

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "lightship"
STAGES = {
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
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightship"):
            yield from (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "lightship" else [node.module]
            )
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
        assert place != "pipeline", f"{relative} imports the pipeline"
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


BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Refuse())
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
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
        text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0]
        if relative.name == "__init__.py":
            if len(relative.parts) > 1:
                lines.append(f"  {str(relative.parent) + '/':<26}{text}")
            continue
        indent = "  " * len(relative.parts)
        lines.append(f"{indent}{relative.name:<{28 - len(indent)}}{text}")
    return "\n".join(lines)


def test_the_tree_in_the_readme():
    found = re.search(r"<!-- tree -->\n```\n(.*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found and found.group(1) == tree(), "put this into the README:\n" + tree()


def test_no_socket_leaves_the_machine_while_shipping(llama, tmp_path):
    """`ship` in a process whose every socket connection fails loudly."""
    code = f"""
import socket
from pathlib import Path
def refuse(self, address):
    raise SystemExit(f"connected to {{address}}")
socket.socket.connect = refuse
socket.socket.connect_ex = refuse
def no_lookup(*a, **k):
    raise SystemExit(f"looked up {{a}}")
socket.getaddrinfo = no_lookup
from lightship.pipeline import ship
from lightship.recipe import Recipe
ship(Recipe(source={str(llama.folder)!r}, accept=("kld<=0.5",)), Path({str(tmp_path / "out")!r}))
print("shipped")
"""
    assert "shipped" in run(code)
