"""What engines are asked that propose tokens, and a model whose proposals are often right."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from lightship.engine import GenerationParams, Grammar
from lightship.pipeline import convert
from lightship.recipe import Precision, Recipe
from tests.tiny import tiny_llama


def circling(place, scale=0.01, **changes):
    """The runtime folder of a model whose layers add next to nothing, with a head of its own: what follows a token
    hardly depends on what was before it, so that a greedy answer soon goes in circles."""
    checkpoint = tiny_llama(place / "model", tie_word_embeddings=False, **changes)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter *= scale
    model.save_pretrained(checkpoint.folder)
    return convert(Recipe(source=str(checkpoint.folder), precision=Precision(name="fp32")), place / "runtime")


def rows(count=4, length=40):
    return np.random.default_rng(1).integers(4, 500, (count, length)).tolist()


def answers(engine, prompts, params, cancel=None):
    """Tokens, log-probabilities and finish reasons of requests that run together, and the steps it took."""
    ids = [engine.submit(prompt, params) for prompt in prompts]
    tokens, logprobs, reasons = ({key: [] for key in ids} for _ in range(3))
    steps = 0
    while engine.busy():
        if cancel == steps:
            engine.cancel(ids[0])
        steps += 1
        for event in engine.step():
            assert event.error is None
            tokens[event.request_id] += event.token_ids
            logprobs[event.request_id] += event.logprobs
            if event.finish_reason:
                reasons[event.request_id].append(event.finish_reason)
    return list(tokens.values()), list(logprobs.values()), list(reasons.values()), steps


ASKED = {
    "greedy": GenerationParams(max_tokens=96, ignore_eos=True),
    "one token": GenerationParams(max_tokens=1, ignore_eos=True),
    "log-probabilities": GenerationParams(max_tokens=96, ignore_eos=True, logprobs=True),
    "sampled": GenerationParams(max_tokens=96, ignore_eos=True, temperature=0.3, top_p=0.9, seed=7, logprobs=True),
    "penalties": GenerationParams(max_tokens=64, ignore_eos=True, repetition_penalty=1.1, presence_penalty=0.3,
                                  frequency_penalty=0.2),
    "regular expression": GenerationParams(max_tokens=96, grammar=Grammar("regex", "(ab|ba){1,60}")),
    "JSON": GenerationParams(max_tokens=96, grammar=Grammar("json_schema", '{"type":"array","items":{"enum":[1,2]}}')),
}  # fmt: skip


def check_same(pair, asked, prompts):
    """The second of two engines says what the first does."""
    without, given = (answers(engine, prompts, asked) for engine in pair)
    assert given[0] == without[0] and given[2] == without[2]
    for found, expected in zip(given[1], without[1], strict=True):
        assert len(found) == len(expected)
        np.testing.assert_allclose(found, expected, atol=1e-3)


def check_stops(pair):
    """A token that comes again in a circle, as a stop token: wherever it stands among those proposed, nothing after it
    may come out."""
    (answer,) = answers(pair[0], rows(1), ASKED["greedy"])[0]
    stops = {token: answer.index(token) for token in answer}
    for stop, place in list(stops.items())[-12:]:
        params = GenerationParams(max_tokens=96, stop_token_ids=(stop,))
        tokens, _, reasons, _ = answers(pair[1], rows(1), params)
        if 0 not in answer[:place]:  # the model's own end of text
            assert (tokens, reasons) == ([answer[:place]], [["stop"]])
