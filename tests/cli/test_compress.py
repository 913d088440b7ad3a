"""`lightship compress` as a user meets it."""

import json

import pytest

from lightship.cli.compress import _steps
from lightship.errors import UsageError
from tests.cli.test_cli import lightship, refused
from tests.tiny import tiny_llama


def test_an_option_belongs_to_the_step_before_it():
    found = _steps(["step", "step", "set", "set"], ["a", "b"], ["x=1", "y=2"])
    assert found == ({"name": "a", "options": {}}, {"name": "b", "options": {"x": "1", "y": "2"}})
    with pytest.raises(UsageError, match="before any --step"):
        _steps(["set", "step"], ["a"], ["x=1"])
    with pytest.raises(UsageError, match="given twice"):
        _steps(["step", "set", "set"], ["a"], ["x=1", "x=2"])
    with pytest.raises(UsageError, match="cannot read 'x'"):
        _steps(["step", "set"], ["a"], ["x"])


def test_from_model_to_checkpoint(tmp_path):
    model = tiny_llama(tmp_path / "llama", max_position_embeddings=128).folder
    options = ("--step", "magnitude", "--set", "sparsity=0.01", "--step", "magnitude", "--set", "sparsity=0.1")
    done = lightship("compress", model, *options, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["folder"] == "llama-magnitude-magnitude" and (tmp_path / found["folder"] / "lineage.json").is_file()
    assert [step["options"]["sparsity"] for step in found["steps"]] == [0.01, 0.1]
    table = lightship("compress", model, *options, "--force", cwd=tmp_path)
    assert "done before" in table.stderr and found["digest"][:16] in table.stdout and "2 magnitude" in table.stdout
    refused("compress", model, *options, "--limit", "kld=1e-9", "--force", cwd=tmp_path, code=1,
            says=["step 1 magnitude: kld", "exceeds the limit 1e-09"])  # fmt: skip
    refused("compress", model, *options, cwd=tmp_path, says="exists already")


def test_a_recipe_with_other_words_on_the_command_line(tmp_path):
    model = tiny_llama(tmp_path / "llama", max_position_embeddings=128).folder
    recipe = "source: elsewhere\nseed: 5\nsteps: [{magnitude: {sparsity: 0.01}}]\nlimits: {kld: 1e-9}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    given = ("compress", model, "--recipe", "recipe.yaml", "--out", "out", "--json")
    refused(*given, cwd=tmp_path, code=1, says="exceeds the limit 1e-09")
    done = lightship(*given, "--limit", "kld=9", "--seed", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"][0]["seed"] == 0, "what is given by hand wins, a default does not"
    refused(*given[:4], "--step", "magnitude", cwd=tmp_path, says="steps are given twice")


def test_what_it_refuses(tmp_path):
    refused("compress", tmp_path, says="no step is given")
    refused("compress", tmp_path, "--step", "magnitude", "--set", "sparsity=2", says="less than 1, received '2'")
    refused("compress", tmp_path, "--step", "magnitude", "--limit", "kld", says="cannot read 'kld'")
    refused("compress", tmp_path, "--step", "magnitude", "--limit", "kld<=0.3", says="example --limit kld=0.1")
    refused("compress", tmp_path, "--step", "magnitude", "--text", "none.txt", says="text: there is no file none.txt")
    bare = lightship("compress", "--step", "magnitude")
    assert bare.returncode == 2 and "Missing argument 'SOURCE'" in bare.stderr
    refused("compress", tmp_path, "--step", "magnitude", "--limit", "speed=2", says="known are kld")


def test_the_options_of_a_step(tmp_path):
    done = lightship("compress", "--step", "magnitude", "--describe")
    assert "sparsity=0.5" in done.stdout and "< 1.0" in done.stdout and "keep=" not in done.stdout
    assert "keep=0.9" in lightship("compress", "--describe").stdout
