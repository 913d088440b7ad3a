"""The checks of `conformance.py`, and that its page is what they wrote."""

import re

import pytest

from lightship.serving.server import running
from tests.serving import conformance


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    source, bundle = conformance.made(tmp_path_factory.mktemp("conformance"))
    with running(bundle) as url:
        yield conformance.Place(url, source, bundle / "targets" / "openvino")


@pytest.mark.parametrize("name", conformance.checks())
def test_client(place, name):
    try:
        conformance.checks()[name](place)
    except conformance.NotHere as missing:
        pytest.skip(f"{missing} is not installed")


def test_the_page_is_of_these_checks_and_all_passed():
    rows = re.findall(r"^\| (.+) \| (.+) \|$", conformance.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    rows = [row for row in rows if row != ("check", "result")]
    assert [row[0] for row in rows] == [conformance.proof(check) for check in conformance.checks().values()]
    assert {row[1] for row in rows} == {"passed"}


def test_a_check_that_fails_is_said_to():
    """With nothing behind the address, nothing passes."""
    place = conformance.Place("http://127.0.0.1:9", conformance.PAGE, conformance.PAGE)
    found = dict(conformance.results(place))
    assert set(found) == set(conformance.checks()) and "passed" not in found.values()
