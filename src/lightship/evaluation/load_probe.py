"""Run by `lightship tune` in a fresh process: put a load on one target with given settings, or judge it.

The order comes on standard input, as JSON: `what` is `load`, or `quality` by the golden rows. What was found is printed
as one JSON line.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lightship.bundle import Bundle
from lightship.engine import Engine, EngineSettings
from lightship.errors import LightshipError, LimitExceeded
from lightship.evaluation import load, replay
from lightship.find import find


def main() -> None:
    """Read the order, do it, print."""
    order = json.load(sys.stdin)
    settings = EngineSettings(**order["settings"])
    try:
        found = {"load": _load, "quality": _quality}[order["what"]](order, settings)
    except LimitExceeded as error:
        found = {"broken": error.message}
    except LightshipError as error:
        found = {"failed": error.message}
    print(json.dumps(found))


def _load(order: dict[str, Any], settings: EngineSettings) -> dict[str, Any]:
    """One run of the load after a warm-up, which the engine needs to allocate and to compile its kernels."""
    engine: Engine = find("targets", order["target"]).open(Path(order["folder"]), settings)
    try:
        prompts, clients = order["prompts"], order["clients"]
        load.run(engine, order["warm"], len(order["warm"]), min(order["new"], 8))
        found = load.run(
            engine, prompts, clients, order["new"], deadline=order["deadline"], ignore_eos=order["ignore_eos"]
        )
    finally:
        engine.close()
    return asdict(found)


def _quality(order: dict[str, Any], settings: EngineSettings) -> dict[str, Any]:
    """The golden rows in one pass, and on the served path, the only one that knows the precision of the KV cache; at
    these settings. The parent has verified the bundle."""
    bundle, limit = Bundle(Path(order["bundle"]), {}, ""), float(order["limit"])
    rows, arrays = bundle.golden()
    target, folder = find("targets", order["target"]), Path(order["folder"])
    kld = replay.replay(rows, arrays, [target.open_scorer(folder, settings)] * len(rows))
    gc.collect()
    engine = target.open(folder, replace(settings, prefix_cache=False))  # with it prompts cannot be scored
    try:
        served = replay.replay_served(rows, arrays, [engine.prompt_logprobs(row) for row in rows])
    finally:
        engine.close()
    bound = math.sqrt(2 * limit)
    problem = None
    if not kld.value <= limit:
        problem = f"mean KLD {kld.value:.3g} of the golden rows exceeds the bundle's limit {limit:g}"
    elif not served.value <= bound:
        problem = f"mean |Δ log p| {served.value:.3g} as served exceeds {bound:.3g} (√(2 · KLD limit))"
    return {"kld": kld.value, "served": served.value, "problem": problem}


if __name__ == "__main__":
    main()
