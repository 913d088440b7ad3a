"""Logits of another engine, computed with its own Python: `python peer_logits.py llama.cpp MODEL IDS LOGITS`, or `vllm
MODEL IDS LOGITS DTYPE`.

IDS is a .npy of token ids, (rows, length); LOGITS gets float32, (rows, length, vocabulary). Nothing of lightship is
imported: the environment is the other engine's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import numpy as np

Rows = np.ndarray


def llama(model: str, rows: Rows) -> Rows:
    """llama.cpp, by the bindings of llama-cpp-python."""
    from llama_cpp import Llama

    engine = Llama(model, n_ctx=rows.shape[1], n_batch=rows.shape[1], n_threads=os.cpu_count(), logits_all=True)
    found = []
    for row in rows:
        engine.reset()
        engine.eval(row.tolist())
        found.append(np.array(engine.scores[: len(row)], np.float32))
    return np.stack(found)


def vllm(model: str, rows: Rows, dtype: str) -> Rows:
    """vLLM in `dtype`. It computes the logits of a prompt where its log-probabilities are asked for; they are kept."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.model_executor.models.llama import LlamaForCausalLM

    kept: list[Rows] = []
    compute = LlamaForCausalLM.compute_logits

    def keep(self: object, hidden: object) -> object:
        logits = compute(self, hidden)
        kept.append(logits.float().numpy().copy())
        return logits

    LlamaForCausalLM.compute_logits = keep
    engine = LLM(model=model, dtype=dtype, enforce_eager=True, max_model_len=2 * rows.shape[1],
                 max_num_batched_tokens=2 * rows.shape[1], enable_prefix_caching=False)  # fmt: skip
    found = []
    for row in rows:
        kept.clear()
        engine.generate({"prompt_token_ids": row.tolist()}, SamplingParams(max_tokens=1, prompt_logprobs=1))
        prompt = max(kept, key=len)  # all but the last position, which the token to sample comes from
        last = next(logits for logits in kept if len(logits) == 1)
        found.append(np.concatenate([prompt[: len(row) - 1], last]))
    return np.stack(found)


if __name__ == "__main__":
    ENGINES: dict[str, Callable[..., Rows]] = {"llama.cpp": llama, "vllm": vllm}
    np.save(sys.argv[4], ENGINES[sys.argv[1]](sys.argv[2], np.load(sys.argv[3]), *sys.argv[5:]))
