"""What the engine's grammar compiler would misread is written another way, and means the same JSON."""

import json

import jsonschema
import pytest

from lightship.bundle import Bundle
from lightship.engine import EngineSettings, GenerationParams, Grammar
from lightship.errors import RequestError
from lightship.targets import openvino
from lightship.targets._openvino_schema import mend, mended
from lightship.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def answer(bundle_path):
    """Says what the engine writes under a grammar."""
    folder = Bundle.open(bundle_path).target_folder("openvino")
    engine, tokenizer = openvino.open(folder, EngineSettings(kv_cache_gb=1)), load_tokenizer(folder)

    def ask(grammar):
        engine.submit([5, 6, 7], GenerationParams(max_tokens=600, temperature=1.0, seed=1, grammar=grammar))
        ids = []
        while engine.busy():
            ids += [token for event in engine.step() for token in event.token_ids]
        return tokenizer.decode(ids, skip_special_tokens=False)

    yield ask
    engine.close()


def single(name):
    return {"type": "object", "properties": {name: {"const": 1}}, "required": [name], "additionalProperties": False}


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["°F"]},
        {"const": 'Größe "ße" (a.b)*\\d/'},
        {"enum": ["Zürich"]},  # nothing is wrong with this one
        {"type": "array", "items": {"anyOf": [{"const": "ïf"}]}, "minItems": 1, "maxItems": 1},
        {"enum": [["a"], "éa"]},
        single("größe"),
        single('a"b\\c\n'),
        single("日本a"),
        {"$defs": {"größe": single("é1")}, "$ref": "#/$defs/größe"},
    ],
    ids=str,
)
def test_the_engine_writes_what_the_schema_says(answer, schema):
    text = json.dumps(schema, ensure_ascii=False)
    jsonschema.validate(json.loads(answer(Grammar("json_schema", text))), schema)
    tags = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": schema}}
    jsonschema.validate(json.loads(answer(Grammar("tags", json.dumps(tags)))), schema)


def test_texts_of_bounded_length_are_json(answer):
    """Random weights like control characters, which the compiler lets through; what is no UTF-8 does not count."""
    for schema in ({"type": "string", "minLength": 3, "maxLength": 9}, {"type": "string", "maxLength": 0}):
        text = json.dumps({"type": "array", "items": schema, "minItems": 12, "maxItems": 12})
        found = [each for each in json.loads(answer(Grammar("json_schema", text))) if "\ufffd" not in each]
        jsonschema.validate(found, {"items": schema})
        assert len(found) > 5


def test_what_is_read_rightly_stays_as_it_is():
    schema = {
        "type": "object",
        "description": "Die Größe °F",
        "properties": {"stadt": {"enum": ["Zürich", 1, None]}, "enum": {"default": "°F"}},
        "required": ["stadt", "enum"],
        "items": [True],
    }
    assert mended(schema) == schema and mended(True) is True
    assert mend({"type": "tag", "begin": "a", "content": {"elements": [1, schema]}}) == {
        "type": "tag", "begin": "a", "content": {"elements": [1, schema]}
    }  # fmt: skip


def test_a_constant_that_cannot_be_written_is_refused():
    with pytest.raises(RequestError, match="Latin-1"):
        mended({"items": {"enum": [{"unit": "°F"}]}})
