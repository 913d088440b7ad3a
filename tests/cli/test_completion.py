"""Shell completion: the script a shell reads, and what is answered when it asks."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.cli.test_cli import lightship

ASK = "from lightship.cli import main; import sys; sys.argv[0] = 'lightship'; main()"


def completed(*words):
    """What is offered for the last of `words`, as bash asks: one `type,value` a line."""
    environment = {**os.environ, "_LIGHTSHIP_COMPLETE": "bash_complete", "COMP_WORDS": " ".join(["lightship", *words]),
                   "COMP_CWORD": str(len(words))}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_verbs():
    assert completed("sh") == ["plain,ship", "plain,show"]
    assert completed("comp") == ["plain,compress", "plain,completion"]


def test_options_and_their_values():
    assert {"plain,--precision", "plain,--dry-run"} <= set(completed("ship", "x", "--"))
    assert completed("ship", "x", "--precision", "int") == ["plain,int8", "plain,int4"]
    assert completed("completion", "z") == ["plain,zsh"]


@pytest.mark.parametrize("verb", ["ship", "convert", "init", "run", "show", "check", "serve", "chat"])
def test_files(verb):
    assert completed(verb, "de")[-1].startswith("file,")


def test_the_demo_model_is_offered():
    assert completed("ship", "de") == ["plain,demo", "file,de"]


@pytest.mark.parametrize(("shell", "place"), [("bash", "~/.bashrc"), ("zsh", "~/.zshrc"), ("fish", "config.fish")])
def test_the_script(shell, place):
    done = lightship("completion", shell)
    assert done.returncode == 0 and done.stderr == ""
    assert "_LIGHTSHIP_COMPLETE" in done.stdout and place in done.stdout.splitlines()[-1]
    if shutil.which(shell):
        checked = subprocess.run([shell, "-n"], input=done.stdout, capture_output=True, text=True)
        assert checked.returncode == 0 and checked.stderr == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_it(tmp_path):
    """A real bash takes the script and asks the command that is first on its path."""
    command = tmp_path / "lightship"
    command.write_text(f"#!{sys.executable}\nfrom lightship.cli import main\nmain()\n")
    command.chmod(0o755)
    script = lightship("completion", "bash").stdout
    ask = f'{script}\nCOMP_WORDS=(lightship sh) COMP_CWORD=1\n_lightship_completion lightship\necho "${{COMPREPLY[@]}}"'
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "--norc", "-c", ask], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["ship", "show"], done.stderr


def test_the_verbs_of_a_verb(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert completed("keys", "") == ["plain,create", "plain,list", "plain,revoke"]
    assert completed("keys", "create", "x", "--scope", "m") == ["plain,metrics"]
    assert completed("keys", "revoke", "") == []
    name = json.loads(lightship("keys", "create", "alice", "--json").stdout)["id"]
    assert completed("keys", "revoke", "") == ["plain,alice", f"plain,{name}"]
    other = tmp_path / "other.json"
    assert completed("keys", "revoke", "--keys", str(other), "") == []
