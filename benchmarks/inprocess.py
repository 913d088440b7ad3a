"""The bare continuous-batching pipeline in one process: the same requests, closed loop, no HTTP. Baseline of `serve`.

Prints `ready`, waits for a line on standard input, works, prints the run as one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lightship.engine import EngineSettings
from lightship.targets.openvino import properties


def run(folder: Path, prompts: list[list[int]], clients: int, new_tokens: int) -> dict[str, Any]:
    """Tokens, seconds, and the times to the first token and between tokens."""
    import openvino as ov
    import openvino_genai as genai

    settings = EngineSettings()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = round(settings.kv_cache_gb)
    scheduler.max_num_seqs = settings.max_num_seqs
    scheduler.max_num_batched_tokens = settings.max_batched_tokens
    scheduler.enable_prefix_caching = settings.prefix_cache
    pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties(folder, settings))
    eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    config = genai.GenerationConfig()
    config.max_new_tokens = new_tokens
    config.set_eos_token_id(eos if isinstance(eos, int) else eos[0])

    def loop(rows: list[list[int]]) -> dict[str, Any]:
        waiting, running = list(rows)[::-1], {}
        number = tokens = 0
        ttft, tpot = [], []
        began = time.perf_counter()
        while waiting or running:
            while waiting and len(running) < clients:
                number += 1
                ids = ov.Tensor(np.array([waiting.pop()], np.int64))
                running[number] = [pipeline.add_request(number, ids, config), time.perf_counter(), 0.0, 0.0, 0]
            pipeline.step()
            for key, entry in list(running.items()):
                handle, start, *_ = entry
                while handle.can_read():
                    for output in handle.read().values():
                        entry[3] = time.perf_counter()
                        entry[2] = entry[2] or entry[3]
                        entry[4] += len(output.generated_ids)
                if handle.get_status() != genai.GenerationStatus.RUNNING:
                    tokens += entry[4]
                    ttft.append(entry[2] - start)
                    if entry[4] > 1:
                        tpot.append((entry[3] - entry[2]) / (entry[4] - 1))
                    del running[key]
        return {"tokens": tokens, "seconds": time.perf_counter() - began, "ttft": ttft, "tpot": tpot}

    loop(prompts[:clients])  # warm-up, with prompts that are not measured
    print("ready", flush=True)
    sys.stdin.readline()
    return loop(prompts[clients:])


def main() -> None:
    """Print the run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inprocess", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--new", type=int, default=64)
    asked = parser.parse_args()
    print(json.dumps(run(asked.folder, json.loads(asked.prompts.read_text()), asked.clients, asked.new)))


if __name__ == "__main__":
    main()
