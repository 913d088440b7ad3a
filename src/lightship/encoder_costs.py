"""What a run costs with an encoder, stage by stage; beside `costs`, which holds decoders and what both share.

One function a stage. The constants were fitted to all-MiniLM-L6-v2, to a random BERT of the base size, and to a short
one of 2 048 tokens of context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightship.costs import FLOAT, WIDTHS, WRITE, Cost, Costs, Rates
from lightship.recipe import Precision


@dataclass(frozen=True)
class EncoderShape:
    """An encoder as its headers describe it. `table` is the share of `parameters` that is only looked up, `hidden` the
    width of a token's vector, `heads` those of attention; the rest as in `costs.Shape`."""

    architecture: str
    layers: int
    parameters: int
    table: int
    hidden: int
    heads: int
    context: int
    width: int
    size: int
    files: int


@dataclass(frozen=True)
class EncoderAmount:
    """What is computed on. `gate` and `score` count positions with their padding, `gate_calls` and `score_calls` the
    batches they come in; the largest batch has `widest` positions, in rows of `longest`. Speed is measured in
    `speed_calls` calls on `speed` positions, `speed_widest` at most in one, of the original and of each target."""

    gate: int
    gate_calls: int
    score: int
    score_calls: int
    widest: int
    longest: int
    speed: int
    speed_calls: int
    speed_widest: int


# ── Constants ───────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Target:
    """What differs between runtimes. Seconds: to trace a graph and each of its layers, to open it and each of its
    layers, to quantise and for each byte of what is quantised. Bytes: RSS of the libraries, of the quantiser's, of a
    layer's description. Copies of the weights: of an open graph, its file apart; of float32 ones what stays in memory
    once a graph was open, and what quantising takes; of the scores of attention, those that are there at a time."""

    trace: float
    trace_layer: float
    open: float
    open_layer: float
    quantise: float
    quantise_byte: float
    libraries: float
    quantiser: float
    layer: float
    opened: float
    kept: float
    quantised: float
    scores: float


TARGETS = {
    "openvino": _Target(
        trace=0.4, trace_layer=0.4, open=0.4, open_layer=0.05, quantise=1.6, quantise_byte=7e-9,
        libraries=0.07e9, quantiser=0.05e9, layer=40e3, opened=1.35, kept=0.0, quantised=1.35,
        scores=0.0,
    ),
    "onnx": _Target(
        trace=0.8, trace_layer=1.1, open=0.2, open_layer=0.03, quantise=0.5, quantise_byte=15e-9,
        libraries=0.11e9, quantiser=0.0, layer=20e3, opened=1.0, kept=2.0, quantised=4.6,
        scores=2.2,
    ),
}  # fmt: skip
FIRST, AGAIN, PROBE = 4.2, 0.3, 0.8  # the original with PyTorch's import; once more; a fresh process
EXPORTERS, CALL_LAYER = 3.0, 1e-3  # their import; a layer of one call
PYTORCH = 0.4  # speed of the original over `Rates.exact`
SCORE = 5e-9  # a score of attention, from which a probability is made
PACK = 2e-9  # a byte of weights in float32, brought into the order that the processor wants

LIBRARIES, EXPORTING = 0.41e9, 0.05e9  # RSS with PyTorch loaded; more of it with its exporters
ACTIVATIONS = 18  # vectors of float32 that a position of a batch takes


# ── The stages ──────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Run:
    """What every stage's function needs; `targets` in the order of their turns."""

    shape: EncoderShape
    precision: Precision
    amount: EncoderAmount
    rates: Rates
    targets: Sequence[str]

    @property
    def floats(self) -> float:
        """All weights in float32."""
        return float(FLOAT * self.shape.parameters)

    def exported(self, target: str) -> float:
        """The graph as it is exported; to ONNX always in float32."""
        width = FLOAT if target == "onnx" else WIDTHS.get(self.precision.name, self.shape.width)
        return self.shape.parameters * width + TARGETS[target].layer * self.shape.layers

    def served(self, target: str) -> float:
        """The graph as it is served."""
        if self.precision.name == "int8":
            return self.shape.parameters + TARGETS[target].layer * self.shape.layers
        return self.exported(target)

    def runtime(self, target: str) -> float:
        """The runtime folder."""
        return self.served(target) + self.shape.files

    @property
    def hashing(self) -> float:
        """Seconds to read and hash the checkpoint, as each stage that depends on it does."""
        return self.shape.size / self.rates.file

    def computed(self, positions: int, length: int, calls: int, rate: float) -> float:
        """Seconds to compute `positions` in rows of `length`: every weight but the table's, and attention."""
        shape = self.shape
        each = 2 * (shape.parameters - shape.table) + 4 * length * shape.hidden * shape.layers
        scores = SCORE * positions * length * shape.heads * shape.layers
        return positions * each / rate + scores + calls * CALL_LAYER * shape.layers * self.rates.slow

    def gated(self, rate: float) -> float:
        """Seconds to compute the gate's rows; most positions are those of the batch with the longest one."""
        return self.computed(self.amount.gate, self.amount.longest, self.amount.gate_calls, rate)

    def scored(self, rate: float) -> float:
        """Seconds to compute the rows that are scored."""
        return self.computed(self.amount.score, 0, self.amount.score_calls, rate)

    def timed(self, rate: float) -> float:
        """Seconds to measure speed."""
        return self.computed(self.amount.speed, 0, self.amount.speed_calls, rate)

    @property
    def original(self) -> float:
        """Operations a second of the original."""
        return PYTORCH * self.rates.exact

    @property
    def candidate(self) -> float:
        """Operations a second of what is served."""
        return self.rates.exact if self.precision.name == "fp32" else self.rates.fast

    def opened(self, target: str) -> float:
        """Seconds to open a graph."""
        constants = TARGETS[target]
        return (constants.open + constants.open_layer * self.shape.layers) * self.rates.slow + PACK * self.floats

    def libraries(self, target: str) -> float:
        """RSS of what is loaded in the turn of `target`: PyTorch, and this and the earlier targets' libraries."""
        turns = [TARGETS[name] for name in self.targets[: list(self.targets).index(target) + 1]]
        quantisers = sum(each.quantiser for each in turns) if self.precision.name == "int8" else 0.0
        return LIBRARIES + EXPORTING + sum(each.libraries for each in turns) + quantisers

    def held(self, target: str) -> float:
        """Memory that is taken once a graph of `target` was open, whatever follows."""
        return self.libraries(target) + TARGETS[target].kept * self.floats

    def open_memory(self, target: str, size: float) -> float:
        """A graph of `size` at work: its file is mapped, its weights are laid out anew."""
        weights = max((1 + TARGETS[target].opened) * size, TARGETS[target].kept * self.floats)
        return self.libraries(target) + weights + self.batch_memory(target)

    def batch_memory(self, target: str) -> float:
        """What a graph computes of the largest batch."""
        scores = FLOAT * self.amount.widest * self.amount.longest * self.shape.heads
        return self.activations(self.amount.widest) + TARGETS[target].scores * scores

    @property
    def original_memory(self) -> float:
        """The original in float32; what is in 16 bits is widened."""
        return self.floats if self.shape.width == FLOAT else self.shape.size + self.floats

    def activations(self, positions: int) -> float:
        """What is computed of a batch, as much as is there at a time."""
        return float(ACTIVATIONS * FLOAT * self.shape.hidden * positions)


def _read(run: _Run) -> Cost:
    """Headers and text."""
    return Cost(2 * run.rates.slow + run.hashing, 0.13e9)


def _original(run: _Run) -> Cost:
    """The gate's rows through the original in float32; what they mean is written."""
    seconds = FIRST * run.rates.slow + run.hashing + run.gated(run.original)
    return Cost(seconds, LIBRARIES + run.original_memory + run.activations(run.amount.widest))


def _export(run: _Run, target: str) -> Cost:
    """The graph traced and written."""
    constants, exported = TARGETS[target], run.exported(target)
    first = EXPORTERS if target == run.targets[0] else 0.0
    seconds = (first + constants.trace + constants.trace_layer * run.shape.layers) * run.rates.slow + WRITE * exported
    memory = run.libraries(target) + run.original_memory
    return Cost(seconds + run.hashing, memory, kept=exported + run.shape.files)


def _gate_export(run: _Run, target: str) -> Cost:
    """The gate's rows through the export in float32; of OpenVINO while the checkpoint is still mapped."""
    seconds = run.opened(target) + run.gated(run.rates.exact)
    weights = run.exported(target) + TARGETS[target].opened * run.floats
    memory = run.libraries(target) + weights + run.batch_memory(target)
    return Cost(seconds, memory + (run.shape.size if target == "openvino" else 0.0))


def _quantise(run: _Run, target: str) -> Cost:
    constants, exported = TARGETS[target], run.exported(target)
    if run.precision.name != "int8":
        return Cost(2 * exported / run.rates.file, run.held(target), kept=run.runtime(target))
    seconds = constants.quantise * run.rates.slow + constants.quantise_byte * exported
    return Cost(seconds, run.libraries(target) + constants.quantised * run.floats, kept=run.runtime(target))


def _gate(run: _Run, target: str) -> Cost:
    """The gate's rows through what is served."""
    seconds = run.opened(target) + run.gated(run.candidate)
    return Cost(seconds, run.open_memory(target, run.served(target)))


def _evaluate(run: _Run) -> Cost:
    """Held-out rows through original and candidates; then the speed of each in a process of its own, beside this."""
    slow = run.rates.slow
    seconds = AGAIN * slow + run.hashing + run.scored(run.original)
    seconds += (PROBE + FIRST) * slow + run.timed(run.original)
    for target in run.targets:
        seconds += run.opened(target) + run.scored(run.candidate)
        seconds += PROBE * slow + run.opened(target) + run.timed(run.candidate)
    probe = LIBRARIES + run.shape.size + run.activations(run.amount.speed_widest)
    return Cost(seconds, run.held(run.targets[-1]) + probe)


def _pack(run: _Run) -> Cost:
    """The runtime folders copied and hashed, twice."""
    size = sum(run.runtime(target) for target in run.targets)
    return Cost(2 * run.rates.slow + 3 * size / run.rates.file, run.held(run.targets[-1]), kept=size)


EACH = {"export": _export, "gate export": _gate_export, "quantise": _quantise, "gate": _gate}


def predict(
    shape: EncoderShape, precision: Precision, amount: EncoderAmount, rates: Rates, targets: Sequence[str]
) -> Costs:
    """What each stage costs with `targets`."""
    run = _Run(shape, precision, amount, rates, targets)
    found = {"read": _read(run), "original": _original(run)}
    for target in targets:
        found |= {f"{name} {target}": stage(run, target) for name, stage in EACH.items()}
    return {**found, "evaluate": _evaluate(run), "pack": _pack(run)}
