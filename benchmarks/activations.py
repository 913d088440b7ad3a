"""An embedder in int8, its activations in floats, rounded for a whole call, or for each token: loss, how far a text's
embedding moves with those beside it, and speed. all-MiniLM-L6-v2 on both targets; the runs of an arm take turns."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import models
from benchmarks.page import DOCS, put, section, spread, table
from lightship.calibration import default_text, paragraphs
from lightship.encoder import Encoder, row_of
from lightship.evaluation import memory
from lightship.evaluation.speed import SEQUENCE
from lightship.find import find
from lightship.pipeline import ship
from lightship.recipe import Precision, Recipe

PAGE = DOCS / "quantisation.md"
ARMS = {
    "openvino fp32": ("openvino", Precision(name="fp32")),
    "openvino int8, activations in floats": ("openvino", Precision(name="int8")),
    "openvino int8, each token": ("openvino", Precision(name="int8", activations="int8")),
    "openvino int8, each token, else f32": ("openvino", Precision(name="int8", activations="int8", arithmetic="f32")),
    "onnx int8, a whole call": ("onnx", Precision(name="int8")),
    "onnx int8, each token": ("onnx", Precision(name="int8", activations="int8")),
}
PAIRS, SHORTEST = 24, 200  # texts that are computed beside another; characters


def moved(target: str, folder: Path) -> float:
    """1 − mean cosine of the embeddings of texts alone and of the same beside another."""
    encoder, engine = Encoder.load(folder), find("targets", target).open_encoder(folder)
    bodies = (each for document in default_text().split()[1].documents for each in paragraphs(document.text))
    texts = [body[:SHORTEST] for body in bodies if len(body) >= SHORTEST][: 2 * PAIRS]

    def embedded(*given: str) -> np.ndarray:
        batch = encoder.pad_rows(row_of(encoder.encode(text)) for text in given)
        found = encoder.meaning(engine.run(batch.ids, batch.mask, batch.types), batch.mask)[0]
        return found / np.linalg.norm(found)

    lost = [1 - float(embedded(one) @ embedded(one, other)) for one, other in zip(texts[::2], texts[1::2], strict=True)]
    engine.close()
    return float(np.mean(lost))


def main() -> None:
    """Every arm."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.activations", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    name = section("activations", PAGE)
    speeds: dict[str, dict[str, list[float]]] = {label: {"batch1": [], "batch32": []} for label in ARMS}
    losses, moves = {}, {}
    with tempfile.TemporaryDirectory() as place:
        source = models.minilm(Path(place) / "minilm")
        folders = {}
        for label, (target, precision) in ARMS.items():
            recipe = Recipe(source=str(source.folder), target=target, precision=precision, accept=("cosine_loss<=1",))
            bundle = ship(recipe, Path(place) / label.replace(" ", "-").replace(",", ""))
            folders[label] = bundle.target_folder(target)
            losses[label] = bundle.report.get("cosine_loss")
            moves[label] = moved(target, folders[label])
        for turn in range(asked.rounds):
            for label in list(ARMS) if turn % 2 == 0 else list(ARMS)[::-1]:
                found = {each.name: each.value for each in memory.probe(ARMS[label][0], folders[label], repeats=5)}
                for size, values in speeds[label].items():
                    values.append(found[size])
                print(label, found["batch1"], found["batch32"], file=sys.stderr, flush=True)
    rows = [["", "1 − mean cosine", "moves with its neighbour", "1 at a time, sequences/s", "×", "32 together", "×"]]
    base = speeds["openvino int8, activations in floats"]
    for label in ARMS:
        cells = [f"{losses[label].value:.1e}", f"{moves[label]:.1e}"]
        for size, values in speeds[label].items():
            cells += [spread(values, ".0f"), spread([one / of for one, of in zip(values, base[size], strict=True)])]
        rows.append([label, *cells])
    put(name, f"{table(rows)}\n\nMedian (range) of {asked.rounds} rounds in turns; × against OpenVINO in int8 with "
        f"activations in floats, of the same round. Sequences of {SEQUENCE} tokens. Moves: 1 − mean cosine of {PAIRS} "
        "texts computed alone and beside another.", PAGE)  # fmt: skip


if __name__ == "__main__":
    main()
