"""The API of encoders over real HTTP: labels, answers and embeddings equal to the original's, and what is refused."""

import base64

import httpx
import numpy as np
import openai
import pytest

from lightship.encoder import Encoder, row_of
from lightship.pipeline import ship
from lightship.recipe import Precision, Recipe
from lightship.serving.encoder import best_span
from lightship.serving.server import running
from tests.test_structure import BLOCK
from tests.test_structure import run as in_a_fresh_process
from tests.tiny import tiny_encoder

TEXTS = ["a short text", "if the value is not found, a KeyError is raised by the mapping type", "x"]


def shipped(folder, architecture, **changes):
    checkpoint = tiny_encoder(folder / "model", architecture, **changes)
    ship(Recipe(source=str(checkpoint.folder), target="onnx", precision=Precision(name="fp32")), folder / "tiny")
    return checkpoint, folder / "tiny"


def original(checkpoint, *texts):
    """What PyTorch and transformers' own tokenizer make of one text or pair."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    given = tokenizer(*texts, return_tensors="pt", truncation=False, padding=False)
    given.pop("token_type_ids", None)
    if len(texts) > 1:  # as BERT counts them: [CLS] first [SEP] are 0, second [SEP] are 1
        ids = given["input_ids"]
        given["token_type_ids"] = torch.arange(ids.shape[1])[None] > (ids[0] == 3).nonzero()[0]
        given["token_type_ids"] = given["token_type_ids"].long()
    model = checkpoint.load("float32")
    with torch.inference_mode():
        return model(**given), given


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    checkpoint, bundle = shipped(tmp_path_factory.mktemp("embedder"), "BertModel")
    with running(bundle) as url:
        yield checkpoint, bundle, url


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    labels = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    checkpoint, bundle = shipped(tmp_path_factory.mktemp("classifier"), "RobertaForSequenceClassification", **labels)
    with running(bundle) as url:
        yield checkpoint, bundle, url


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    checkpoint, bundle = shipped(tmp_path_factory.mktemp("qa"), "BertForQuestionAnswering")
    with running(bundle) as url:
        yield checkpoint, bundle, url


def post(url, route, body):
    return httpx.post(url + route, json=body, timeout=30)


def test_embeddings_with_the_openai_client(embedder):
    """Its own base64 and plain numbers, one text and several, equal to the mean over PyTorch's hidden states."""
    checkpoint, _, url = embedder
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.embeddings.create(model="tiny", input=TEXTS)
    plain = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    tokens = 0
    for text, packed, numbers in zip(TEXTS, answer.data, plain.data, strict=True):
        found, given = original(checkpoint, text)
        tokens += given["input_ids"].shape[1]
        expected = found.last_hidden_state[0].mean(0).numpy()
        np.testing.assert_allclose(packed.embedding, expected, atol=1e-4)
        np.testing.assert_allclose(numbers.embedding, packed.embedding, atol=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
    single = client.embeddings.create(model="tiny", input=TEXTS[1])
    np.testing.assert_allclose(single.data[0].embedding, answer.data[1].embedding, atol=1e-4)
    assert [model.id for model in client.models.list().data] == ["tiny"]


def test_base64_is_what_openai_documents(embedder):
    body = {"input": "a text", "encoding_format": "base64"}
    raw = post(embedder[2], "/v1/embeddings", body).json()["data"][0]["embedding"]
    numbers = post(embedder[2], "/v1/embeddings", {"input": "a text"}).json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), np.array(numbers, np.float32))


def test_token_ids_and_one_token(embedder):
    encoder = Encoder.load(embedder[0].folder)
    ids = encoder.encode("a text").ids
    by_text = post(embedder[2], "/v1/embeddings", {"input": "a text"}).json()["data"][0]["embedding"]
    by_ids = post(embedder[2], "/v1/embeddings", {"input": [ids, [2]]}).json()
    np.testing.assert_allclose(by_ids["data"][0]["embedding"], by_text, atol=1e-5)
    assert by_ids["usage"]["prompt_tokens"] == len(ids) + 1 and len(by_ids["data"][1]["embedding"]) == 64


def test_many_inputs_keep_their_order(embedder):
    texts = [f"text {'word ' * (number % 7)}{number}" for number in range(70)]  # more than two batches
    data = post(embedder[2], "/v1/embeddings", {"input": texts}).json()["data"]
    assert [each["index"] for each in data] == list(range(70))
    for number in (0, 33, 69):
        alone = post(embedder[2], "/v1/embeddings", {"input": texts[number]}).json()["data"][0]["embedding"]
        np.testing.assert_allclose(data[number]["embedding"], alone, atol=1e-4)


def test_labels(classifier):
    checkpoint, _, url = classifier
    answer = post(url, "/predict", {"input": TEXTS}).json()
    for text, labels in zip(TEXTS, answer["output"], strict=True):
        expected = original(checkpoint, text)[0].logits[0].softmax(-1).numpy()
        got = {entry["label"]: entry["probability"] for entry in labels}
        np.testing.assert_allclose([got[name] for name in ("bad", "fair", "good")], expected, atol=1e-5)
        assert [entry["probability"] for entry in labels] == sorted(got.values(), reverse=True)
    alone = post(url, "/predict", {"input": TEXTS[0]}).json()["output"]
    assert [entry["label"] for entry in alone] == [entry["label"] for entry in answer["output"][0]]


def slow_span(start, end, inside):
    """Every span of the context, one at a time."""
    chances = {
        (first, last): start[first] * end[last]
        for first in inside for last in inside if first <= last < first + 30
    }  # fmt: skip
    best = max(chances, key=chances.get)
    return best, chances[best] / (start[inside].sum() * end[inside].sum())


def test_answers(answerer):
    checkpoint, _, url = answerer
    question, context = "What is raised?", "If the Value is not found, a KeyError is raised by the mapping."
    body = {"input": {"question": question, "context": context}}
    answer = post(url, "/predict", body).json()["output"]
    found, given = original(checkpoint, question, context)
    encoding = Encoder.load(checkpoint.folder).encode(question, context)
    assert given["input_ids"][0].tolist() == encoding.ids
    inside = [index for index, part in enumerate(encoding.sequence_ids) if part == 1]
    start, end = (row[0].softmax(-1).numpy() for row in (found.start_logits, found.end_logits))
    (first, last), score = slow_span(start, end, inside)
    assert (answer["start"], answer["end"]) == (encoding.offsets[first][0], encoding.offsets[last][1])
    assert answer["answer"] == context[answer["start"] : answer["end"]] != ""
    assert answer["score"] == pytest.approx(score, rel=1e-3)
    many = post(url, "/predict", {"input": [body["input"], {"question": "x", "context": "y"}]}).json()
    assert many["output"][0]["answer"] == answer["answer"] and many["output"][1]["answer"] == "y"


def test_the_span_search_keeps_to_the_context(answerer):
    """The question never answers, whatever the model says of it; nor does an end before its start."""
    encoding = Encoder.load(answerer[0].folder).encode("what is it", "one two three")
    meaning = np.full((2, len(encoding.ids)), -9, np.float32)
    inside = [index for index, part in enumerate(encoding.sequence_ids) if part == 1]
    meaning[:, 1] = 0
    meaning[0, inside[-1]], meaning[1, inside[0]] = -1, -1
    found = best_span(encoding, meaning, "one two three")
    assert 0 <= found["start"] < found["end"] <= len("one two three")


BAD = [
    ("embedder", "/v1/embeddings", {"input": ""}, 400, "the input is empty"),
    ("embedder", "/v1/embeddings", {"input": []}, 400, "the input is empty"),
    ("embedder", "/v1/embeddings", {"input": [[]]}, 400, "the input is empty"),
    ("embedder", "/v1/embeddings", {"input": "a " * 500}, 400, "maximum context length is 160 tokens"),
    ("embedder", "/v1/embeddings", {"input": [5] * 161}, 400, "maximum context length is 160 tokens"),
    ("embedder", "/v1/embeddings", {"input": [10**6]}, 400, "lie in"),
    ("embedder", "/v1/embeddings", {"input": ["x"] * 2049}, 400, "at most 2048"),
    ("embedder", "/v1/embeddings", {"input": "x", "dimensions": 5}, 400, "64 dimensions"),
    ("embedder", "/v1/embeddings", {"input": "x", "model": "other"}, 404, "'tiny' only"),
    ("embedder", "/v1/embeddings", {"input": "x", "colour": 1}, 400, "not known"),
    ("embedder", "/v1/chat/completions", {"messages": []}, 404, "/v1/embeddings"),
    ("embedder", "/predict", {"input": "x"}, 404, "/v1/embeddings"),
    ("classifier", "/predict", {"input": ""}, 400, "the input is empty"),
    ("classifier", "/predict", {"input": []}, 400, "the input is empty"),
    ("classifier", "/predict", {"input": ["x", ""]}, 400, "the input is empty"),
    ("classifier", "/predict", {"input": 5}, 400, "valid"),
    ("classifier", "/predict", {"input": ["fine", "a " * 500]}, 400, "maximum context length"),
    ("classifier", "/v1/embeddings", {"input": "x"}, 404, "/predict"),
    ("classifier", "/v1/completions", {"prompt": "x"}, 404, "/predict"),
    ("answerer", "/predict", {"input": []}, 400, "the input is empty"),
    ("answerer", "/predict", {"input": "x"}, 400, "valid"),
    ("answerer", "/predict", {"input": {"question": "x"}}, 400, "required"),
    ("answerer", "/predict", {"input": {"question": "x", "context": "\u200b"}}, 400, "context has no tokens"),
]


@pytest.mark.parametrize(("which", "route", "body", "status", "says"), BAD, ids=lambda value: str(value)[:40])
def test_bad_requests_get_the_envelope(request, which, route, body, status, says):
    url = request.getfixturevalue(which)[2]
    answer = post(url, route, body)
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert says in error["message"] and set(error) == {"message", "type", "param", "code"}
    assert len(answer.content) < 700 and httpx.get(f"{url}/readyz").status_code == 200


def test_a_generating_model_says_that_it_embeds_nothing(bundle_path):
    with running(bundle_path) as url:
        answer = post(url, "/v1/embeddings", {"input": "x"})
    assert answer.status_code == 404 and "gives no embeddings" in answer.json()["error"]["message"]


def test_the_bundle_tokenises_as_its_source(embedder):
    encoder = Encoder.load(embedder[1] / "targets" / "onnx")
    assert row_of(encoder.encode(TEXTS[0])) == row_of(Encoder.load(embedder[0].folder).encode(TEXTS[0]))


def test_an_encoder_is_served_without_the_build_packages(embedder):
    code = BLOCK.format(names={"torch", "transformers", "nncf", "onnx"})
    code += f"""
import httpx
from lightship.serving.server import running
with running({str(embedder[1])!r}) as url:
    print(len(httpx.post(url + "/v1/embeddings", json={{"input": "Hello"}}, timeout=60).json()["data"][0]["embedding"]))
"""
    assert int(in_a_fresh_process(code)) == 64


def test_an_encoder_changes_without_downtime_to_one_of_its_kind(embedder, classifier):
    """By the route of the server, its golden rows compared; what asks other routes is refused."""
    _, bundle, url = embedder

    def vector():
        return httpx.post(f"{url}/v1/embeddings", json={"input": TEXTS[1]}).json()["data"][0]["embedding"]

    before = vector()
    changed = httpx.post(f"{url}/admin/reload", json={"bundle": str(bundle)}, timeout=60)
    golden = changed.json()["golden"]
    assert changed.status_code == 200 and golden["what"] == "1 − mean cosine" and 0 <= golden["mean"] < 1e-4
    assert vector() == before
    refused = httpx.post(f"{url}/admin/reload", json={"bundle": str(classifier[1])}, timeout=60)
    assert refused.status_code == 400 and "is of the kind classifier, and embedder is served" in refused.text
    assert vector() == before
