"""A recipe is data: every mistake in it is one line that names the key."""

import json
import re

import pytest
from jsonschema import Draft202012Validator

from lightship.errors import UnsupportedError, UsageError
from lightship.recipe import Precision, Recipe, commented, read_recipe


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_whole_recipe(tmp_path):
    text = "source: org/model\nname: mine\nprecision: {name: int4, group_size: 32}\n"
    text += "accept: ['kld<=0.3']\nevaluate: full\n"
    exact = Precision(name="int4", group_size=32)
    expected = Recipe(source="org/model", name="mine", precision=exact, accept=("kld<=0.3",), evaluate="full")
    assert read_recipe(write(tmp_path, text)) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("source: x\nprecison: {}\n", "unknown key 'precison'; did you mean 'precision'?"),
        ("source: x\nprecision: {group: 3}\n", "unknown key 'precision.group'; did you mean 'group_size'?"),
        ("source: x\nzzz: 1\n", "known are version, name"),
        ("source: x\nprecision: {name: int3}\n", "precision.name"),
        ("source: x\nprecision: {group_size: 1}\n", "precision.group_size"),
        ("source: x\naccept: ['ppl<=1']\n", "cannot read the limit"),
        ("source: x\nname: ../up\n", "name"),
        ("precision: {name: int8}\n", "source: Field required"),
        ("source: x\nsource: y\n", "the key 'source' is given twice"),
        ("source: [", "is not YAML"),
        ("", "holds NoneType"),
        ("- source\n", "holds list"),
        ("source: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("a: &a [1]\nb: *c\n", "is not YAML"),
        ("source: \xff\n", None),
        ("version: 0\nsource: x\n", "version"),
        (
            "source: x\nsteps: [{svd: {keep: 0.9}, depth: {drop: 1}}]\n",
            "one step an entry of the list, but here are svd",
        ),
    ],
)
def test_mistakes_name_the_key(tmp_path, text, says):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"recipe\.yaml|limit") as caught:
        read_recipe(path)
    assert says is None or says in str(caught.value)


def test_options_that_contradict_each_other_are_named_alone(tmp_path):
    with pytest.raises(UsageError) as caught:
        read_recipe(write(tmp_path, "source: x\nprecision: {name: int8, group_size: 32}\n"))
    assert str(caught.value).endswith("precision: group_size changes nothing at int8: it is for int4")


def test_a_name_is_a_precision_and_a_limit_a_list_of_one(tmp_path):
    short = read_recipe(write(tmp_path, "source: x\nprecision: fp32\naccept: kld<=0.3\n"))
    assert short == Recipe(source="x", precision=Precision(name="fp32"), accept=("kld<=0.3",))


def test_a_newer_recipe_is_not_guessed_at(tmp_path):
    with pytest.raises(UnsupportedError, match="version 2"):
        read_recipe(write(tmp_path, "version: 2\nsource: x\nshiny: true\n"))


def test_a_recipe_of_a_megabyte_is_refused(tmp_path):
    with pytest.raises(UsageError, match="larger than"):
        read_recipe(write(tmp_path, "source: x\n#" + "x" * 2**20))


def test_the_commented_recipe_is_the_default_one(tmp_path):
    text = commented("demo")
    assert read_recipe(write(tmp_path, text)) == Recipe(source="demo")
    uncommented = "\n".join(re.sub(r"^(\s*)# ", r"\1", line) for line in text.splitlines()[1:])
    assert read_recipe(write(tmp_path, uncommented)) == Recipe(source="demo")  # every line is a key at its default


def test_the_schema_accepts_what_we_accept():
    schema = Recipe.model_json_schema()
    Draft202012Validator.check_schema(schema)
    good = json.loads(Recipe(source="demo").model_dump_json())
    assert not list(Draft202012Validator(schema).iter_errors(good))
    assert list(Draft202012Validator(schema).iter_errors({**good, "shiny": 1}))


def test_runs_of_two_targets_have_two_names():
    """They would take each other's stages and bundle otherwise."""
    assert Recipe(source="some/model/").label == "model-int8"
    assert Recipe(source="x.gguf", target="onnx", precision=Precision(name="int4")).label == "x-int4-onnx"
    assert Recipe(source="x", target="onnx", name="mine").label == "mine"
    assert Recipe(source="x", target=("openvino", "onnx")).label == "x-int8-openvino-onnx"


def test_targets_in_a_recipe(tmp_path):
    """A name, or a list of names; a list of one is that one."""
    read = [read_recipe(write(tmp_path, f"source: x\ntarget: {target}")) for target in ("onnx", "[onnx]", "[a, onnx]")]
    assert [recipe.target for recipe in read] == ["onnx", "onnx", ("a", "onnx")]
    assert [recipe.targets for recipe in (*read, Recipe(source="x"))] == [("onnx",), ("onnx",), ("a", "onnx"), ()]
    for wrong in ("[]", "[onnx, onnx]", "3"):
        with pytest.raises(UsageError, match="target"):
            read_recipe(write(tmp_path, f"source: x\ntarget: {wrong}"))
