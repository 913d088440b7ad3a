"""What a run costs, stage by stage: seconds, memory and disk from a model's shape and a few rates of this machine.

A plain model, one function a stage, that anyone can check by hand. Its constants were fitted to runs on one machine
(docs/benchmarks.md compares it with new ones), so what it gives is "about". Sizes are bytes, speeds a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lightship import machine
from lightship.recipe import Precision

Costs = dict[str, "Cost"]


@dataclass(frozen=True)
class Shape:
    """A decoder language model as its headers describe it. `table` is the embedding's share of `parameters`; `tied`
    says that it is the output layer too. `width` is bytes of a weight in the checkpoint that is read, `size` that of
    all its weights, `files` of its tokenizer; `unpacked`: bytes of the file that it is unpacked from."""

    architecture: str
    layers: int
    parameters: int
    table: int
    tied: bool
    vocabulary: int
    context: int
    width: int
    size: int
    files: int
    unpacked: int = 0

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with: all but a table that is only looked up."""
        return self.parameters - (0 if self.tied else self.table)


@dataclass(frozen=True)
class Amount:
    """The tokens of a run. `gate` positions are computed on, in rows of up to `longest`, and `gate_kept` of them
    recorded; `greedy` single steps of the original come with them. `passages` of `passage` tokens are scored,
    `score_kept` recorded. `calibrate` tokens are quantised with. Speed is measured `speed_runs` times on `prompt`
    tokens and `new_tokens` single ones, of original and candidate."""

    gate: int
    gate_kept: int
    longest: int
    greedy: int
    passages: int
    passage: int
    score_kept: int
    calibrate: int
    speed_runs: int
    prompt: int
    new_tokens: int

    @property
    def score(self) -> int:
        """Positions of all passages."""
        return self.passages * self.passage


@dataclass(frozen=True)
class Rates:
    """How fast this machine is: multiplications and additions in float32 and as its fastest arithmetic, memory bytes,
    file bytes read and hashed, each a second; `slow`: seconds that plain Python takes for one on the reference."""

    exact: float
    fast: float
    memory: float
    file: float
    slow: float


@dataclass(frozen=True)
class Cost:
    """Of one stage: `memory` is the largest RSS of the process, with that of a process it starts; `kept` stays on disk
    until the run ends, `passing` while the stage lasts."""

    seconds: float
    memory: float
    kept: float = 0.0
    passing: float = 0.0


# ── Measured here, in half a second ─────────────────────────────────────────

REFERENCE_ROUNDS = 29e6  # rounds a second of `machine.interpreter_rate` where the seconds below were taken
LIBRARY = 1.65  # float32 of PyTorch and OpenVINO over NumPy's BLAS
FASTER = {"amx_bf16": 3.4, "avx512_bf16": 3.4}  # bf16 over float32; AMX is faster still, how much is not measured


def rates(file: Path | None, arithmetic: str) -> Rates:
    """Measure this machine; `file` is the source's weights, None when nothing is read."""
    slow = REFERENCE_ROUNDS / machine.interpreter_rate()  # first: the threads of a BLAS go on spinning for a while
    exact = LIBRARY * machine.matmul_rate()
    features = machine.machine()["features"]
    factor = next((FASTER[name] for name in FASTER if name in features), 1.0) if arithmetic == "auto" else 1.0
    return Rates(
        exact=exact,
        fast=exact * factor,
        memory=machine.memory_bandwidth(2**25, 2),
        file=1e9 if file is None else machine.read_rate(file),
        slow=slow,
    )


# ── Sizes ───────────────────────────────────────────────────────────────────

FLOAT = 4
WIDTHS = {"fp32": 4, "bf16": 2}  # bytes of a weight where the precision, not the source, decides
BLOCK = 128  # positions compared at a time
SCALE = 2  # bytes of a scale of int4
GRAPH_LAYER = 75e3  # bytes of a layer's description in the graph
TOKENIZERS = 1.75  # files of the tokenizer in a runtime folder over those of the checkpoint


def exported_bytes(shape: Shape, precision: Precision) -> float:
    """The graph as it is exported."""
    return shape.parameters * WIDTHS.get(precision.name, shape.width) + GRAPH_LAYER * shape.layers


def served_bytes(shape: Shape, precision: Precision) -> float:
    """The graph as it is served."""
    if precision.name not in ("int8", "int4"):
        return exported_bytes(shape, precision)
    tables = shape.table * (1 if shape.tied else 2)
    narrow = 0.0 if precision.name == "int8" else shape.parameters - (0 if precision.all_layers else tables)
    narrow *= precision.ratio
    return shape.parameters - narrow / 2 + narrow * SCALE / precision.group_size + GRAPH_LAYER * shape.layers


def recorded_bytes(shape: Shape, positions: int) -> float:
    """Log-probabilities of the original over the whole vocabulary, as `divergence.record` writes them."""
    return float(positions) * shape.vocabulary * FLOAT


# ── The stages ──────────────────────────────────────────────────────────────
# Seconds were taken on 2 cores of an AMD EPYC with AVX-512; `slow` carries those that plain Python takes elsewhere.

IMPORT, OPEN, PROBE = 5.0, 1.5, 2.0  # PyTorch and transformers; a graph in OpenVINO; a fresh process
TRACE, TRACE_LAYER = 20.0, 1.2  # export, with the tokenizer's conversion
QUANTISE, QUANTISE_LAYER = 5.0, 0.2
SEARCH = 3.8e-7  # a weight of the body, whose scale is searched with calibration data
OPEN_LAYER, STEP_LAYER = 0.05, 1e-3  # a graph compiled; one token through PyTorch
UNPACK = 1.5e-7  # a parameter out of a GGUF file
LOAD, WIDEN = 3.0, 1.2e-9  # the original, once in memory; one of its 16-bit parameters widened for a pass
WRITE = 3e-9  # a byte of a graph, made and written
PACK_FLOATS, PACK_INTEGERS = 1e-9, 4e-9  # a byte of weights, brought into the order that the processor wants
RECORD, COMPARE, SORT = 6e-9, 20e-9, 85e-9  # a log-probability
STREAM = 0.45  # share of the memory rate at which single tokens read the weights

LIBRARIES, HEAP = 0.45e9, 0.75e9  # RSS with PyTorch loaded; after an export, which leaves something behind
RUNTIME = 0.35e9  # OpenVINO at work, weights apart
TRACE_MEMORY = 11e6  # of a layer
UNPACK_MEMORY = 1.55  # copies of the weights
SEARCH_MEMORY = 3.55  # copies of the graph


@dataclass(frozen=True)
class _Run:
    """What every stage's function needs."""

    shape: Shape
    precision: Precision
    amount: Amount
    rates: Rates

    @property
    def exported(self) -> float:
        return exported_bytes(self.shape, self.precision)

    @property
    def served(self) -> float:
        return served_bytes(self.shape, self.precision)

    @property
    def runtime(self) -> float:
        """The runtime folder."""
        return self.served + TOKENIZERS * self.shape.files

    @property
    def hashing(self) -> float:
        """Seconds to read and hash the checkpoint, as each stage that depends on it does."""
        return self.shape.size / self.rates.file

    def operations(self, positions: float) -> float:
        return 2.0 * self.shape.multiplied * positions

    def logits(self, positions: int) -> float:
        return recorded_bytes(self.shape, positions)

    def exact(self, positions: int, passes: int) -> float:
        """Seconds of the original in float32; 16-bit weights are widened anew in each pass."""
        widening = WIDEN * self.shape.parameters * passes if self.shape.width == 2 else 0.0
        return self.operations(positions) / self.rates.exact + widening

    def compared(self) -> float:
        """Seconds to compare two models on the gate's rows."""
        return COMPARE * self.amount.gate_kept * self.shape.vocabulary

    def step(self) -> float:
        """Seconds of one token through the original: its weights are read once."""
        return self.shape.size / (STREAM * self.rates.memory) + STEP_LAYER * self.shape.layers * self.rates.slow

    def opened(self, size: float, byte: float) -> float:
        """Seconds to open a graph of `size` bytes, `byte` for each of them."""
        return (OPEN + OPEN_LAYER * self.shape.layers) * self.rates.slow + byte * size

    @property
    def opened_served(self) -> float:
        """Seconds to open the graph that is served."""
        integers = self.precision.name in ("int8", "int4")
        return self.opened(self.served, PACK_INTEGERS if integers else PACK_FLOATS)

    def original_memory(self, positions: int) -> float:
        """The checkpoint with the logits of `positions`; 16-bit weights are widened module by module, so the table."""
        widened = self.shape.table * FLOAT if self.shape.width == 2 else 0
        return self.shape.size + self.logits(positions) + widened + 0.1e9

    def graph_memory(self, size: float) -> float:
        """A graph: its file is mapped, its weights are laid out anew; logits of a block."""
        return 2 * size + RUNTIME + 3 * self.logits(BLOCK)


def _read(run: _Run) -> Cost:
    """Headers and text; a file is unpacked into a checkpoint."""
    shape, slow = run.shape, run.rates.slow
    if not shape.unpacked:
        return Cost(2 * slow + run.hashing, 0.1e9)
    seconds = (2 + IMPORT + UNPACK * shape.parameters) * slow + WRITE * shape.size + run.hashing
    memory = LIBRARIES + shape.unpacked + UNPACK_MEMORY * FLOAT * shape.parameters
    return Cost(seconds, memory, kept=shape.size + shape.files)


def _original(run: _Run) -> Cost:
    """Every gate row through the original in float32, its greedy continuations, its log-probabilities written."""
    shape, rates, amount = run.shape, run.rates, run.amount
    kept = run.logits(amount.gate_kept)
    seconds = (LOAD + (0 if shape.unpacked else IMPORT)) * rates.slow + run.hashing + amount.greedy * run.step()
    seconds += run.exact(amount.gate, passes=3) + RECORD * kept / FLOAT
    return Cost(seconds, LIBRARIES + run.original_memory(amount.longest), kept=kept)


def _export(run: _Run) -> Cost:
    """The graph traced and written, the tokenizer converted."""
    shape = run.shape
    seconds = (TRACE + TRACE_LAYER * shape.layers) * run.rates.slow + WRITE * run.exported
    traced = TRACE_MEMORY * shape.layers
    converted = WIDTHS.get(run.precision.name, shape.width) != shape.width
    weights = run.exported + max(shape.size, traced) if converted else shape.size + traced
    return Cost(seconds, LIBRARIES + weights, kept=run.exported + TOKENIZERS * shape.files)


def _gate_export(run: _Run) -> Cost:
    """Every gate row through the export in float32, compared with the original."""
    seconds = run.opened(run.exported, PACK_FLOATS) + run.operations(run.amount.gate) / run.rates.exact + run.compared()
    return Cost(seconds, HEAP + run.graph_memory(run.exported))


def _quantise(run: _Run) -> Cost:
    if run.precision.name not in ("int8", "int4"):
        return Cost(2 * run.exported / run.rates.file, HEAP, kept=run.runtime)
    seconds = (QUANTISE + QUANTISE_LAYER * run.shape.layers) * run.rates.slow + WRITE * run.exported
    memory = HEAP + run.exported + run.served
    if run.precision.data_aware:
        seconds += run.operations(run.amount.calibrate) / run.rates.fast
        seconds += SEARCH * (run.shape.parameters - run.shape.table) * run.rates.slow
        memory = HEAP + SEARCH_MEMORY * run.exported
    return Cost(seconds, memory, kept=run.runtime)


def _gate(run: _Run) -> Cost:
    """Every gate row through the candidate."""
    seconds = run.opened_served + run.operations(run.amount.gate) / run.rates.fast + run.compared()
    return Cost(seconds, HEAP + run.graph_memory(run.served))


def _served_path(run: _Run) -> Cost:
    """The longest row through continuous batching."""
    seconds = OPEN * run.rates.slow + run.opened_served + run.operations(run.amount.longest) / run.rates.fast
    return Cost(seconds, HEAP + run.graph_memory(run.served))


def _evaluate(run: _Run) -> Cost:
    """Held-out passages through original and candidate; then the speed of each in a process of its own."""
    shape, rates, amount = run.shape, run.rates, run.amount
    passing = run.logits(amount.score_kept)
    seconds = LOAD * rates.slow + run.exact(amount.score, passes=amount.passages) + RECORD * passing / FLOAT
    seconds += run.opened_served + run.operations(amount.score) / rates.fast + COMPARE * passing / FLOAT
    speed = rates.fast if shape.width == 2 else rates.exact
    original = run.operations(amount.prompt) / speed + amount.new_tokens * run.step()
    token = run.served / (STREAM * rates.memory)
    candidate = run.operations(amount.prompt) / rates.fast + amount.new_tokens * token
    seconds += (2 * PROBE + IMPORT + LOAD) * rates.slow + run.opened_served
    seconds += amount.speed_runs * (original + candidate) + run.hashing
    memory = max(
        run.original_memory(amount.passage),
        run.graph_memory(run.served),
        LIBRARIES + shape.size + 0.1e9,  # the original in its own process, beside this one
    )
    return Cost(seconds, HEAP + memory, passing=passing)


def _pack(run: _Run) -> Cost:
    """The likeliest tokens of the longest row sorted out, the runtime folder copied and hashed, twice."""
    sorting = SORT * run.logits(run.amount.longest) / FLOAT
    return Cost(sorting + 3 * run.runtime / run.rates.file + run.hashing, HEAP, kept=run.runtime)


STAGES = {
    "read": _read,
    "original": _original,
    "export": _export,
    "gate export": _gate_export,
    "quantise": _quantise,
    "gate": _gate,
    "served path": _served_path,
    "evaluate": _evaluate,
    "pack": _pack,
}


def predict(shape: Shape, precision: Precision, amount: Amount, rates: Rates) -> Costs:
    """What each stage costs with the target openvino."""
    run = _Run(shape, precision, amount, rates)
    return {name: stage(run) for name, stage in STAGES.items()}
