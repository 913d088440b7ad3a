"""What an answer is held to: schemas as grammars, judged by jsonschema on what a tiny random model writes under them,
and compiling in a process that may be lost."""

import asyncio
import json
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import jsonschema
import openai
import psutil
import pytest

from lightship.engine import EngineSettings, GenerationParams, Grammar
from lightship.errors import EngineDied, Overloaded, RequestError
from lightship.find import find
from lightship.serving.grammar import MOST_WAITING, USES, Grammars
from lightship.serving.json_schema import MOST_BYTES, any_object, number_range, to_grammar
from lightship.serving.patterns import Untranslatable, translate
from lightship.serving.server import running
from lightship.tokenizer import load_tokenizer

BOOLEAN = {"type": "boolean"}
WORDS = ["cat", "category", "cater", "dog", "do", "dot", "a", "ab", "abc", "b", "ba", "bac"]  # begin alike

LATIN = [
    "größe",
    "°F",
    "ßa",
    "é1",
    "ñandú",
    "aé",
    "éÀb",
    "漢a",
    "Ā0",
    "🚢f",
]  # a digit or letter a … f behind U+0080 and up


def closed(optional=(), **properties):
    return {"type": "object", "properties": properties, "additionalProperties": False,
            "required": [name for name in properties if name not in optional]}  # fmt: skip


def integer(**bounds):
    return {"type": "integer", **bounds}


def number(**bounds):
    return {"type": "number", **bounds}


def pattern(text):
    return {"type": "string", "pattern": text}


NODE = closed(value=integer(minimum=0), next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})
ENFORCED = [
    {"type": "object"}, {}, {"type": "array"}, {"type": ["boolean", "null"]},
    closed(a=integer(), b=BOOLEAN), closed(("a", "c"), a=BOOLEAN, b=BOOLEAN, c=BOOLEAN),
    closed(WORDS, **{word: {"type": "null"} for word in WORDS}),
    closed(**{'q"uote': BOOLEAN, "back\\": {"const": "x\ny"}}),
    {"type": "object", "properties": {"a": BOOLEAN}, "required": ["a"], "additionalProperties": True},
    {"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": 2},
    {"type": "string", "maxLength": 5}, {"type": "string", "minLength": 2, "maxLength": 4},
    pattern(".{3}"), pattern("^[^ab]{1,2}$"), pattern(r"^[A-Z]{3}-\d{3,4}$"), pattern("^(cat|category|cater|c)$"),
    pattern(r"^\$\d{1,6}(\.\d\d)?$"), pattern("[a-c]{2,3}(?:x|y)*"),
    *({"type": "string", "format": name} for name in ("date", "time", "date-time", "uuid", "ipv4", "email")),
    integer(minimum=6), integer(maximum=-5), integer(minimum=18, maximum=120), integer(minimum=-7, maximum=1234),
    integer(exclusiveMinimum=-3, exclusiveMaximum=3), integer(minimum=99, maximum=1001), integer(minimum=0, maximum=0),
    number(minimum=0, maximum=1), number(minimum=-1, maximum=100), number(minimum=-50, maximum=-7), number(minimum=9.0),
    {"type": "array", "items": BOOLEAN, "minItems": 2, "maxItems": 3},
    {"type": "array", "items": integer(), "minItems": 1},
    {"type": "array", "prefixItems": [{"type": "null"}], "items": BOOLEAN, "maxItems": 3, "minItems": 2},
    {"type": "array", "prefixItems": [{"type": "null"}, BOOLEAN], "items": False}, {"type": "array", "maxItems": 0},
    {"enum": WORDS}, {"enum": list(range(-500, 500))}, {"enum": ["é", 1, None, 1.5, 'a"', {"b": [2]}]},
    {"type": "string", "enum": ["a", 1, "b"]}, {"const": {"a": '"x"'}}, {"anyOf": [{"const": word} for word in WORDS]},
    {"oneOf": [closed(kind={"const": "cat"}, x=BOOLEAN), closed(kind={"const": "category"}, y=BOOLEAN)]},
    {"anyOf": [closed(a=BOOLEAN), closed(a=integer(), b=BOOLEAN), closed(ab=BOOLEAN)]}, {"oneOf": [BOOLEAN, integer()]},
    {"enum": LATIN}, closed(LATIN, **{word: BOOLEAN for word in LATIN}), {"const": {"größe": ["°F"]}},
    pattern("^[°éA-F0-9]{3}$"), pattern("^(größe|°Fa|漢e)$"), pattern("^[^°-ÿ]{2}$"),
    {"$defs": {"node": NODE}, "$ref": "#/$defs/node"}, {"allOf": [BOOLEAN]},
]  # fmt: skip


@pytest.fixture(scope="module")
def writer(bundle_path):
    """Writes under a grammar, at random: the texts that are finished, without those that are not Unicode (a random
    model writes any bytes)."""
    folder = bundle_path / "targets" / "openvino"
    engine, tokenizer = find("targets", "openvino").open(folder, EngineSettings()), load_tokenizer(folder)

    def write(grammar, count=24, tokens=120):
        texts = {}
        for seed in range(count):
            params = GenerationParams(max_tokens=tokens, temperature=1.5, seed=seed, grammar=grammar)
            texts[engine.submit([5, 6, 7 + seed], params)] = ([], [])
        while engine.busy():
            for event in engine.step():
                ids, ends = texts[event.request_id]
                ids.extend(event.token_ids)
                ends.append(event.finish_reason)
        found = [tokenizer.decode(ids) for ids, ends in texts.values() if ends[-1] == "stop"]
        return [text for text in found if "\ufffd" not in text]

    yield write
    engine.close()


@pytest.mark.parametrize("schema", ENFORCED, ids=lambda schema: json.dumps(schema)[:50])
def test_what_is_finished_is_valid(writer, schema):
    texts = writer(Grammar("ebnf", to_grammar(schema)))
    assert texts
    for text in texts:
        jsonschema.validate(json.loads(text), schema)


def test_any_object(writer):
    texts = writer(Grammar("ebnf", any_object()), count=48)
    assert texts and all(isinstance(json.loads(text), dict) for text in texts)


def test_the_other_kinds_of_grammars(writer):
    assert all(re.fullmatch("[ab]{3}", text) for text in writer(Grammar("regex", "[ab]{3}")))
    tags = {"type": "structural_tag", "format": {"type": "tag", "begin": "<a>", "end": "</a>", "content":
            {"type": "json_schema", "json_schema": BOOLEAN}}}  # fmt: skip
    found = writer(Grammar("tags", json.dumps(tags)))
    assert found and all(re.fullmatch(r"<a>\s*(true|false)\s*</a>", text) for text in found)
    assert all(isinstance(json.loads(text), dict) for text in writer(Grammar("json_object")))
    assert all(json.loads(text) in (True, False) for text in writer(Grammar("json_schema", json.dumps(BOOLEAN))))


@pytest.mark.parametrize("seed", range(6))
def test_random_bounds_and_names(writer, seed):
    chance = random.Random(seed)
    low, high = sorted(chance.sample(range(-3000, 3000), 2))
    names = sorted({"".join(chance.choices("ab", k=chance.randint(1, 4))) for _ in range(8)})
    chance.shuffle(names)
    optional = [name for name in names if chance.random() < 0.7]
    for schema in (integer(minimum=low, maximum=high), number(minimum=low, maximum=high),
                   closed(optional, **{name: {"const": 1} for name in names}), {"enum": names}):  # fmt: skip
        for text in writer(Grammar("ebnf", to_grammar(schema)), tokens=200):
            jsonschema.validate(json.loads(text), schema)


REFUSED = [
    ({"not": BOOLEAN}, "not"), ({"minimum": 3}, "minimum"), ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    (integer(multipleOf=7), "multipleOf"), (number(minimum=0.5), "minimum"), (number(exclusiveMinimum=1), "exclusiveM"),
    ({"allOf": [BOOLEAN, {"type": "null"}]}, "allOf"), ({"oneOf": [integer(), number()]}, "oneOf"),
    ({"anyOf": [BOOLEAN], "type": "boolean"}, "type is not enforced beside anyOf"),
    ({"type": "object", "required": ["a"]}, "required"), ({"type": "object", "patternProperties": {}}, "patternProp"),
    ({"type": "string", "pattern": "a", "maxLength": 2}, "maxLength"), ({"type": "string", "format": "idn"}, "format"),
    ({"$ref": "http://192.0.2.1/x"}, "ref"), ({"$ref": "#/$defs/none"}, "nothing"), ({"$ref": "#/properties/a"}, "ref"),
    ({"$ref": "#"}, "leads back"), ({"anyOf": [BOOLEAN, {"$ref": "#"}]}, "leads back"),
    ({"type": "text"}, "type must be"), (integer(minimum=3, maximum=2), "bounds"),
    ({"type": "string", "enum": [1]}, "enum"),
    ({"properties": {"a": False}, "type": "object"}, "false"), ({"do-not-echo": 1}, "an unknown keyword"),
    ({"type": "string", "maxLength": 10**30}, "maxLength"), ({"type": "array", "minItems": True}, "minItems"),
    (integer(maximum=10**400), "maximum"), ({"enum": "abc"}, "enum"), ({"type": []}, "type"), ({"anyOf": []}, "anyOf"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "named"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_would_not_be_enforced_is_refused_by_name(schema, named):
    with pytest.raises(RequestError, match=re.escape(named)) as refused:
        to_grammar(schema)
    assert refused.value.param == "response_format" and "do-not-echo" not in refused.value.message


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


MONSTROUS = [
    nested(40), {"enum": list(range(1001))}, {"type": "string", "pattern": "a" * 501}, {"title": "x" * MOST_BYTES},
    {"type": "object", "properties": {f"p{number}": {} for number in range(501)}},
    {"anyOf": [{"type": "integer"}] * 2001}, {"enum": ["a" * length for length in range(1, 1001)]},
]  # fmt: skip


@pytest.mark.parametrize("schema", MONSTROUS, ids=lambda schema: str(schema)[:40])
def test_what_is_too_large_is_refused_before_anything(schema):
    began = time.monotonic()
    with pytest.raises(RequestError):
        to_grammar(schema)
    assert time.monotonic() - began < 2


BAD_PATTERNS = [
    "(?=a)b", "(?<n>a)", r"\bq", r"\S", r"(a)\1", "a++", "a*?", "[", "a{3", ")", "(", "[]", "[z-a]", 'say "x"', r"\\",
    "[ -~]",
    "^a|b$", "a^b", "a{1001}", "a{3,2}", "a*ab", "x?x", r"(cat\d|category)", r"\d{2,3}\d", "(" * 20 + ")" * 20, "\n",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_PATTERNS)
def test_patterns_that_cannot_be_held_exactly_are_refused(text):
    with pytest.raises(Untranslatable):
        translate(text)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (3, 17), (-5, 5), (99, 1001), (-120, -18), (7, 100_000)])
def test_ranges_hold_exactly_their_integers(low, high):
    """Against counting, with the grammar's body read as a regular expression."""
    body = number_range(low, high, True).replace('""', "").replace('"', "").replace(" ", "")
    wide = [*range(low - 300, min(high, low + 3000) + 300), high - 1, high, high + 1, high * 10]
    assert [value for value in wide if bool(re.fullmatch(body, str(value))) != (low <= value <= high)] == []
    assert not re.fullmatch(body, "007")


@pytest.mark.parametrize(("low", "high"), [(0, 0), (0, 1), (-1, 1), (9, 99), (-50, -7), (3, 120), (-10, 0)])
def test_ranges_hold_exactly_their_numbers(low, high):
    body = number_range(low, high, False).replace('""', "").replace('"', "").replace(" ", "")
    body = body.replace("fraction", r"(\.[0-9]{1,16})")
    texts = [f"{value}{rest}" for value in range(low - 20, high + 21) for rest in ("", ".0", ".5", ".99")]
    wrong = [text for text in texts if re.fullmatch(body, text) and not low <= float(text) <= high]
    missing = [text for text in texts if low <= float(text) <= high and not re.fullmatch(body, text)]
    assert wrong == [] and all(float(text) in (low, high) and "." in text for text in missing)


# ── The process that compiles ───────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(bundle_path):
    return bundle_path / "targets" / "openvino"


GOOD = Grammar("ebnf", 'root ::= "a" | "b"')
COSTLY = Grammar("regex", "(((([ab]{900}c){900}d){900}e){900}f){900}")


def test_it_is_held_to_its_cores(folder):
    core = max(os.sched_getaffinity(0))

    async def run():
        grammars = Grammars("openvino", folder, frozenset({core}))
        await grammars.check(GOOD, "x")
        assert psutil.Process(grammars._child.pid).cpu_affinity() == [core]
        await grammars.close()

    asyncio.run(run())


def test_compiling_says_what_is_wrong_and_survives_what_is_monstrous(folder):
    async def run():
        grammars = Grammars("openvino", folder)
        await grammars.check(GOOD, "x")
        first = grammars._child.pid
        for grammar in (Grammar("ebnf", "root ::= b"), Grammar("regex", "[a"), Grammar("json_schema", '{"type": 5}'),
                        Grammar("json_schema", "{"), Grammar("tags", '{"type": 1}')):  # fmt: skip
            with pytest.raises(RequestError, match="cannot be compiled") as refused:
                await grammars.check(grammar, "x")
            assert refused.value.param == "x" and "/" not in refused.value.message
        assert grammars._child.pid == first  # an error that is told ends nothing
        began = time.monotonic()
        with pytest.raises(RequestError, match="too costly"):
            await grammars.check(COSTLY, "x")
        spent = time.monotonic() - began
        await grammars.check(Grammar("ebnf", 'root ::= "c"'), "x")
        second = grammars._child.pid
        with pytest.raises(RequestError, match="too costly"):
            await grammars.check(COSTLY, "x")  # remembered: no process is lost again
        assert grammars._child.pid == second != first
        await grammars.close()
        assert grammars._child.pid is None
        return spent

    assert asyncio.run(run()) < 30


def test_a_process_that_is_killed_says_nothing_of_the_grammar(folder):
    """As the kernel kills when memory is short: that is no fault of the client, and is not remembered."""

    async def run():
        grammars = Grammars("openvino", folder)
        await grammars.check(GOOD, "x")
        asked = asyncio.create_task(grammars.check(COSTLY, "x"))
        await asyncio.sleep(0.3)
        os.kill(grammars._child.pid, signal.SIGKILL)
        with pytest.raises(EngineDied, match="could not be checked: it ended"):
            await asked
        with pytest.raises(RequestError, match="too costly"):
            await grammars.check(COSTLY, "x")
        grammars._child._command[0] = "/nonexistent"
        with pytest.raises(EngineDied, match="could not be started"):
            await grammars.check(Grammar("ebnf", 'root ::= "d"'), "x")
        await grammars.close()

    asyncio.run(run())


def test_a_process_that_has_compiled_much_is_no_stricter(folder):
    """And what is over its uses is replaced: compilers keep what they compiled."""

    async def run():
        grammars = Grammars("openvino", folder)
        large = Grammar("regex", "[a-z]{0,9}" * 20)
        pids = set()
        for number in range(USES + 2):
            await grammars.check(Grammar("regex", f"{number}{large.text}"), "x")
            pids.add(grammars._child.pid)
        await grammars.close()
        return len(pids)

    assert asyncio.run(run()) == 2


def test_leaving_while_it_compiles_does_not_mix_the_answers_up(folder):
    async def run():
        grammars = Grammars("openvino", folder)
        await grammars.check(GOOD, "x")
        leaving = asyncio.create_task(grammars.check(Grammar("ebnf", "root ::= b"), "x"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        leaving.cancel()
        await grammars.check(Grammar("ebnf", 'root ::= "d"'), "x")
        await grammars.close()

    asyncio.run(run())


def numbered(number):
    """A grammar that no other test has."""
    return Grammar("ebnf", f'root ::= "line {number}"')


def test_keys_take_turns_and_none_may_have_too_many_waiting(folder):
    async def run():
        grammars, ends = Grammars("openvino", folder), []
        await grammars.check(GOOD, "x")

        async def one(key, number):
            await grammars.check(numbered(number), "x", key)
            ends.append(key)

        flood = [asyncio.create_task(one("flood", number)) for number in range(MOST_WAITING)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="too many schemas") as refused:
            await grammars.check(numbered(-1), "x", "flood")
        assert refused.value.http_status == 429 and refused.value.retry_after == 24
        await one("other", 100)
        assert len(ends) <= 3  # one of the flood was at work, one before it in the line
        await asyncio.gather(*flood)
        assert ends.count("flood") == MOST_WAITING and not grammars._lines
        await grammars.close()

    asyncio.run(run())


def test_the_same_schema_of_many_requests_is_compiled_once(folder):
    async def run():
        grammars = Grammars("openvino", folder)
        await grammars.check(GOOD, "x")
        used = grammars._child._used
        await asyncio.gather(*(grammars.check(numbered(400), "x", "one") for _ in range(3 * MOST_WAITING)))
        await grammars.close()
        return grammars._child._used - used

    assert asyncio.run(run()) == 1


def test_closing_begins_nothing_for_those_that_wait(folder):
    async def run():
        grammars = Grammars("openvino", folder)
        await grammars.check(GOOD, "x")
        waiting = [
            asyncio.create_task(grammars.check(numbered(number), "x", str(number))) for number in range(500, 510)
        ]
        await asyncio.sleep(0)
        await grammars.close()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        with pytest.raises(EngineDied):
            await grammars.check(numbered(510), "x")
        return ends, grammars._child.pid

    ends, pid = asyncio.run(run())
    assert pid is None and all(end is None or isinstance(end, EngineDied) for end in ends)
    assert sum(isinstance(end, EngineDied) for end in ends) >= 8


def test_who_left_before_its_turn_costs_nothing(folder):
    async def run():
        grammars = Grammars("openvino", folder)
        await grammars.check(GOOD, "x")
        used = grammars._child._used
        leaving = [
            asyncio.create_task(grammars.check(numbered(number), "x", str(number))) for number in range(200, 220)
        ]
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        await grammars.check(numbered(300), "x")
        await grammars.close()
        return grammars._child._used - used

    assert asyncio.run(run()) <= 2  # the one whose turn it was, and the last


# ── Over HTTP ───────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def url(bundle_path):
    with running(bundle_path) as url:
        yield url


ASK = {"messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 200, "temperature": 1.2}
PERSON = closed(name={"type": "string", "maxLength": 8}, age=integer(minimum=0, maximum=130), tags={
    "type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2})  # fmt: skip


def formatted(schema, **more):
    return {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, **more}}


@pytest.mark.parametrize("strict", [True, False, None])
def test_an_answer_is_held_to_its_schema(url, strict):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    ended = 0
    for seed in range(8):
        answer = client.chat.completions.create(
            model="tiny", seed=seed, response_format=formatted(PERSON, strict=strict), **ASK
        )
        content = answer.choices[0].message.content
        if answer.choices[0].finish_reason == "stop" and "\ufffd" not in content:
            ended += 1
            jsonschema.validate(json.loads(content), PERSON)
    assert ended > 2


def test_any_json_object_and_text(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for seed in range(6):
        answer = client.chat.completions.create(
            model="tiny", seed=seed, response_format={"type": "json_object"}, **ASK
        ).choices[0]
        assert answer.message.content.startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.message.content), dict)


def test_bad_schemas_beside_healthy_answers(url):
    """Each gets its 400, and nothing that runs is disturbed."""
    large = pattern("^(?:(?:(?:[ab]{1000}c){1000}d){1000}e){1000}$")
    bad = [
        *map(formatted, ({"not": {}}, pattern("("), nested(60), {"$ref": "http://192.0.2.1/s"}, large)),
        {"type": "json_schema"},
    ]

    def ask(form, tokens=300):
        body = {**ASK, "max_tokens": tokens, "seed": 1, "response_format": form}
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)

    with ThreadPoolExecutor(16) as pool:
        healthy = [pool.submit(ask, {"type": "text"}) for _ in range(4)]
        refused = [pool.submit(ask, form) for form in bad]
        for answer in refused:
            assert answer.result().status_code == 400, answer.result().text
            assert answer.result().json()["error"]["param"].startswith("response_format")
            assert len(answer.result().text) < 500
        assert all(answer.result().status_code == 200 for answer in healthy)
    assert ask(formatted(BOOLEAN), 5).status_code == 200
