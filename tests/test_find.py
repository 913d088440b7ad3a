"""A part is found by its file name, exactly and loudly; nothing is imported on the way that was not asked for."""

import importlib
import sys
from importlib import metadata
from types import ModuleType

import pytest

import lightship
from lightship import find as module
from lightship.errors import MissingExtra, UnknownName, UsageError
from lightship.find import find, names


@pytest.fixture
def gadgets(tmp_path, monkeypatch):
    """`lightship.gadgets`, a folder of parts that only this test knows."""
    folder = tmp_path / "gadgets"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "lever.py").write_text("LENGTH = 3\n")
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    monkeypatch.setattr(lightship, "__path__", [*lightship.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.startswith("lightship.gadgets")]:
        del sys.modules[name]
    vars(lightship).pop("gadgets", None)


def write(gadgets, name, text):
    (gadgets / f"{name}.py").write_text(text)
    importlib.invalidate_caches()


@pytest.fixture
def plugins(monkeypatch):
    """Entry points that the fixture's list holds."""
    points = []

    def entry_points(group, name=None):
        return [point for point in points if point.group == group and name in (None, point.name)]

    monkeypatch.setattr(metadata, "entry_points", entry_points)
    return points


def plugin(name, value, group="lightship.gadgets"):
    return metadata.EntryPoint(name, value, group)


def test_names_are_the_files(gadgets):
    for name in ("_hidden", "Upper", "two-words", "axle"):
        write(gadgets, name, "")
    assert names("gadgets") == ["axle", "lever"]


def test_a_file_is_found_and_imported(gadgets):
    found = find("gadgets", "lever")
    assert found.LENGTH == 3 and found.__name__ == "lightship.gadgets.lever"


def test_real_folders():
    assert {"openvino", "pytorch"} <= set(names("targets"))
    assert find("targets", "fake").__name__ == "lightship.targets.fake"


@pytest.mark.parametrize("name", ["../lever", "lever.x", "Lever", "__init__", "", "lever\n", "l/ever", "léver", "1a"])
def test_names_that_are_none_import_nothing(gadgets, name, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(UnknownName, match="known are lever"):
        find("gadgets", name)


def test_a_module_that_is_importable_and_no_file_of_ours_is_unknown(gadgets, monkeypatch):
    """The file is looked for before the import: what else is on the path cannot take the name."""
    monkeypatch.setitem(sys.modules, "lightship.gadgets.planted", ModuleType("planted"))
    with pytest.raises(UnknownName):
        find("gadgets", "planted")


def test_an_unknown_name_lists_the_known_and_the_nearest(gadgets):
    with pytest.raises(UnknownName, match=r"no gadget is called 'levr'; known are lever\n.*did you mean 'lever'"):
        find("gadgets", "levr")
    with pytest.raises(UnknownName) as caught:
        find("gadgets", "zzzzzz")
    assert caught.value.hint is None


@pytest.mark.parametrize("folder", ["..", "gadgets/../../x", "", "Gadgets"])
def test_folders_that_are_none(folder):
    with pytest.raises(UnknownName, match="folder"):
        names(folder)
    with pytest.raises(UnknownName, match="folder"):
        find(folder, "lever")


def test_an_empty_folder(gadgets, plugins):
    assert names("nothing") == []
    with pytest.raises(UnknownName, match="known are none"):
        find("nothing", "lever")


@pytest.mark.parametrize(("text", "extra"), [
    ("import no_such_package_at_all\n", "build"),
    ('"""Doc."""\nEXTRA = "ray"\nimport no_such_package_at_all\n', "ray"),
    ('from typing import Final\nimport no_such_package_at_all\nEXTRA: Final = "seq2seq"\n', "seq2seq"),
    ("import no_such_package_at_all.deep\nEXTRA = 3\n", "build"),
])  # fmt: skip
def test_a_missing_package_names_its_extra(gadgets, text, extra):
    write(gadgets, "heavy", text)
    with pytest.raises(MissingExtra, match="heavy needs the package 'no_such_package_at_all'") as caught:
        find("gadgets", "heavy")
    assert caught.value.hint == f'pip install "lightship[{extra}]"'


def test_a_package_of_another_version_names_its_extra(gadgets):
    write(gadgets, "heavy", "from numpy import no_such_thing_in_any_version\n")
    with pytest.raises(MissingExtra, match="no_such_thing_in_any_version"):
        find("gadgets", "heavy")


@pytest.mark.parametrize("text", [
    "import lightship.no_such_module\n", "from lightship import no_such_name\n", "from json import no_such_name\n",
    "raise ValueError('x')\n",
])  # fmt: skip
def test_a_mistake_of_ours_is_no_missing_package(gadgets, text):
    write(gadgets, "wrong", text)
    with pytest.raises((ImportError, ValueError)):
        find("gadgets", "wrong")


def test_a_package_that_only_begins_like_ours_is_missing(gadgets):
    write(gadgets, "heavy", "import lightship_no_such_plugin\n")
    with pytest.raises(MissingExtra, match="lightship_no_such_plugin"):
        find("gadgets", "heavy")


def test_plugins_come_after_our_files(gadgets, plugins):
    plugins += [plugin("wheel", "json"), plugin("lever", "json"), plugin("Odd", "json"), plugin("x", "json", "other")]
    assert names("gadgets") == ["lever", "wheel"]
    assert find("gadgets", "wheel").__name__ == "json"
    assert find("gadgets", "lever").LENGTH == 3  # nobody replaces a part of ours


def test_plugins_that_cannot_be_used(gadgets, plugins):
    plugins += [plugin("gone", "no_such_package_at_all"), plugin("thing", "json:dumps")]
    with pytest.raises(MissingExtra, match="gone of no_such_package_at_all needs the package"):
        find("gadgets", "gone")
    with pytest.raises(UsageError, match="must name a module"):
        find("gadgets", "thing")
