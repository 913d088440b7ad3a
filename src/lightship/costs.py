"""What a run costs, stage by stage: seconds, memory and disk from a model's shape and a few rates of this machine.

A plain model, one function a stage, that anyone can check by hand. Its constants were fitted to runs on one machine
(docs/benchmarks.md compares it with new ones), so what it gives is "about". Sizes are bytes, speeds a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lightship import machine
from lightship.recipe import NNCF, Precision

Costs = dict[str, "Cost"]


@dataclass(frozen=True)
class Shape:
    """A decoder language model as its headers describe it. `table` is the embedding's share of `parameters`; `tied`
    says that it is the output layer too. `width` is bytes of a weight in the checkpoint that is read, `size` that of
    all its weights, `files` of its tokenizer; `unpacked`: bytes of the file that it is unpacked from, `adapter`: of
    the adapter that is merged into it."""

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
    adapter: int = 0

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
    # Measured first: the threads of a BLAS go on spinning for a while. On a shared machine a short loop runs up to 1.8
    # times slower from one second to the next, and a whole run does not: only what is slower still counts.
    slow = max(1.0, REFERENCE_ROUNDS / machine.interpreter_rate() / 1.8)
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


def exported_bytes(shape: Shape, precision: Precision, target: str = "openvino") -> float:
    """The graph as it is exported; to ONNX always in float32."""
    width = FLOAT if target == "onnx" else WIDTHS.get(precision.name, shape.width)
    return shape.parameters * width + TARGETS[target].graph_layer * shape.layers


def served_bytes(shape: Shape, precision: Precision, target: str = "openvino") -> float:
    """The graph as it is served. OpenVINO's scales are of 2 bytes, in int8 too few to count but for the head's, one for
    64 weights; ONNX Runtime's are of 4, one for each group, in int8 of 64."""
    if precision.name not in ("int8", "int4"):
        return exported_bytes(shape, precision, target)
    tables = shape.table * (1 if shape.tied else 2)
    body = 0.0 if precision.name == "int8" else (shape.parameters - tables) * precision.ratio
    if body and precision.bits is not None:  # a limit, and what it leaves in int8 is only known once it is measured
        return precision.bits / 8 * shape.parameters
    narrow = body + (tables if precision.tables == "int4" else 0)
    if target == "onnx":
        scales = 4 * shape.parameters / (64 if precision.name == "int8" else precision.group_size)
    else:
        scales = 2 * body / precision.group_size + 2 * tables / 64
    return shape.parameters - narrow / 2 + scales + TARGETS[target].graph_layer * shape.layers


def recorded_bytes(shape: Shape, positions: int) -> float:
    """Log-probabilities of the original over the whole vocabulary, as `divergence.record` writes them."""
    return float(positions) * shape.vocabulary * FLOAT


# ── Constants ───────────────────────────────────────────────────────────────
# Seconds were taken on 2 cores of an AMD EPYC with AVX-512; `slow` carries those that plain Python takes elsewhere.


@dataclass(frozen=True)
class _Target:
    """What differs between runtimes. Seconds: an export and each of its layers, with the tokenizer's conversion; a
    graph opened, each of its layers, each byte of its floats or integers; quantising, each layer, each byte exported.
    Speed over float32 of what is quantised, None where it is that of the processor's fastest arithmetic. Bytes: of a
    layer's description, of memory that tracing a layer takes, of the runtime at work. Files of the tokenizer over those
    of the checkpoint. Copies of the weights in memory: of an open graph; of the export, what stays once it was open;
    `mapped`: quantising leaves the export mapped, and the checkpoint is while the export is compared."""

    trace: float
    trace_layer: float
    open: float
    open_layer: float
    floats: float
    integers: float
    quantise: float
    quantise_layer: float
    quantise_byte: float
    faster: float | None
    graph_layer: float
    trace_memory: float
    runtime: float
    tokenizers: float
    opened: float
    kept: float
    mapped: bool


TARGETS = {
    "openvino": _Target(
        trace=20.0, trace_layer=1.2, open=1.5, open_layer=0.05, floats=1e-9, integers=4e-9, quantise=5.0,
        quantise_layer=0.2, quantise_byte=3e-9, faster=None, graph_layer=75e3, trace_memory=11e6, runtime=0.35e9,
        tokenizers=1.75, opened=2.0, kept=0.0, mapped=False,
    ),
    "onnx": _Target(
        trace=4.0, trace_layer=3.5, open=0.5, open_layer=0.03, floats=1e-9, integers=4e-9, quantise=0.3,
        quantise_layer=0.0, quantise_byte=1.5e-9, faster=1.5, graph_layer=5e3, trace_memory=22e6, runtime=0.0,
        tokenizers=1.0, opened=2.35, kept=2.0, mapped=True,
    ),
}  # fmt: skip
IMPORT, PROBE = 5.0, 2.0  # PyTorch and transformers; a fresh process
SEARCH = 3.8e-7  # a weight of the body, whose scale is searched with calibration data
FIT, CUBE = 5e-7, 7.7e-11  # a weight that is fitted; of the inputs of a matrix to the third power, once for each
TRIED, MATRICES = 512, 7  # tokens that tell what int4 costs a matrix; matrices of a gated layer
STEP_LAYER = 1e-3  # one token through PyTorch
UNPACK, MERGE = 1.5e-7, 1e-8  # a parameter out of a GGUF file; one that an adapter changes
LOAD, WIDEN = 3.0, 1.2e-9  # the original, once in memory; one of its 16-bit parameters widened for a pass
WRITE = 3e-9  # a byte of a graph, made and written
RECORD, COMPARE, SORT = 6e-9, 20e-9, 85e-9  # a log-probability
STREAM = 0.45  # share of the memory rate at which single tokens read the weights

LIBRARIES, HEAP = 0.45e9, 0.75e9  # RSS with PyTorch loaded; after an export, which leaves something behind
UNPACK_MEMORY = 1.55  # copies of the weights
SEARCH_MEMORY = 3.55  # copies of the graph


# ── The stages ──────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Run:
    """What every stage's function needs."""

    shape: Shape
    precision: Precision
    amount: Amount
    rates: Rates
    target: str

    @property
    def of(self) -> _Target:
        """The constants of the target."""
        return TARGETS[self.target]

    @property
    def exported(self) -> float:
        return exported_bytes(self.shape, self.precision, self.target)

    @property
    def served(self) -> float:
        return served_bytes(self.shape, self.precision, self.target)

    @property
    def quantised(self) -> bool:
        return self.precision.name in ("int8", "int4")

    @property
    def runtime(self) -> float:
        """The runtime folder."""
        return self.served + self.of.tokenizers * self.shape.files

    @property
    def fast(self) -> float:
        """Operations a second of what is served."""
        if self.of.faster is None:
            return self.rates.fast
        return self.rates.exact * (self.of.faster if self.quantised else 1.0)

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
        return (self.of.open + self.of.open_layer * self.shape.layers) * self.rates.slow + byte * size

    @property
    def opened_served(self) -> float:
        """Seconds to open the graph that is served."""
        return self.opened(self.served, self.of.integers if self.quantised else self.of.floats)

    def original_memory(self, positions: int) -> float:
        """The checkpoint with the logits of `positions`; 16-bit weights are widened module by module, so the table."""
        widened = self.shape.table * FLOAT if self.shape.width == 2 else 0
        return self.shape.size + self.logits(positions) + widened + 0.1e9

    def graph_memory(self, size: float) -> float:
        """A graph: its file is mapped, its weights are laid out anew; logits of a block."""
        return self.of.opened * size + self.of.runtime + 3 * self.logits(BLOCK)

    @property
    def held(self) -> float:
        """What stays of the export once it was open: its room is used again."""
        return self.of.kept * self.exported

    @property
    def served_memory(self) -> float:
        """The graph that is served, beside what its making left."""
        left = self.held + (self.exported if self.of.mapped and self.quantised else 0.0)
        return max(left, self.graph_memory(self.served))


def _read(run: _Run) -> Cost:
    """Headers and text; a file is unpacked into a checkpoint, an adapter merged into one."""
    shape, slow = run.shape, run.rates.slow
    if not (shape.unpacked or shape.adapter):
        return Cost(2 * slow + run.hashing, 0.1e9)
    seconds, memory, base = (2 + IMPORT) * slow + run.hashing, 0.0, 0.0
    if shape.unpacked:
        seconds += UNPACK * shape.parameters * slow + WRITE * shape.size
        memory = shape.unpacked + UNPACK_MEMORY * FLOAT * shape.parameters
    if shape.adapter:
        seconds += MERGE * shape.parameters * slow + WRITE * shape.size + run.hashing
        memory = max(memory, shape.size + shape.adapter + 0.1e9)
        base = float(shape.size) if shape.unpacked else 0.0  # the base is there until it is merged
    return Cost(seconds, LIBRARIES + memory, kept=shape.size + shape.files, passing=base)


def _original(run: _Run) -> Cost:
    """Every gate row through the original in float32, its greedy continuations, its log-probabilities written."""
    shape, rates, amount = run.shape, run.rates, run.amount
    kept = run.logits(amount.gate_kept)
    seconds = (
        (LOAD + (0 if shape.unpacked or shape.adapter else IMPORT)) * rates.slow
        + run.hashing
        + amount.greedy * run.step()
    )
    seconds += run.exact(amount.gate, passes=3) + RECORD * kept / FLOAT
    return Cost(seconds, LIBRARIES + run.original_memory(amount.longest), kept=kept)


def _export(run: _Run) -> Cost:
    """The graph traced and written, the tokenizer converted."""
    shape = run.shape
    seconds = (run.of.trace + run.of.trace_layer * shape.layers) * run.rates.slow + WRITE * run.exported
    traced = run.of.trace_memory * shape.layers
    width = FLOAT if run.target == "onnx" else WIDTHS.get(run.precision.name, shape.width)
    weights = run.exported + max(shape.size, traced) if width != shape.width else shape.size + traced
    return Cost(seconds, LIBRARIES + weights, kept=run.exported + run.of.tokenizers * shape.files)


def _gate_export(run: _Run) -> Cost:
    """Every gate row through the export in float32, compared with the original."""
    seconds = run.opened(run.exported, run.of.floats) + run.operations(run.amount.gate) / run.rates.exact
    mapped = run.shape.size if run.of.mapped else 0.0
    return Cost(seconds + run.compared(), HEAP + mapped + run.graph_memory(run.exported))


def _quantise(run: _Run) -> Cost:
    if not run.quantised:
        return Cost(2 * run.exported / run.rates.file, HEAP + run.held, kept=run.runtime)
    seconds = (run.of.quantise + run.of.quantise_layer * run.shape.layers) * run.rates.slow
    seconds += run.of.quantise_byte * run.exported
    memory = HEAP + max(run.served, run.held) + run.exported
    if run.precision.planned:
        more, room = _fitting(run) if run.precision.fit else (0.0, FLOAT * run.shape.parameters)
        seconds += more + (0.0 if run.precision.bits is None else _trying(run))
        memory = HEAP + run.exported + room
    if any(getattr(run.precision, name) for name in NNCF):
        seconds += run.operations(run.amount.calibrate) / run.fast
        seconds += SEARCH * (run.shape.parameters - run.shape.table) * run.rates.slow
        memory = HEAP + SEARCH_MEMORY * run.exported
    return Cost(seconds, memory, kept=run.runtime)


def _fitting(run: _Run) -> tuple[float, float]:
    """Seconds and bytes of fitting: the original in float32 reads the calibration set as two halves of one batch; of
    each layer the products of its inputs are taken, and its matrices solved for and rounded. The width of the MLP is
    that of a gated one with the layer's parameters."""
    shape, tokens = run.shape, run.amount.calibrate
    hidden = shape.table / shape.vocabulary
    body = shape.parameters - shape.table * (1 if shape.tied else 2)
    inner = max(hidden, (body / shape.layers / hidden - 2.5 * hidden) / 3)
    products = 4.0 * tokens * (3 * hidden**2 + inner**2) * shape.layers
    seconds = LOAD * run.rates.slow + (run.operations(2 * tokens) + products) / run.rates.exact
    seconds += (FIT * body + CUBE * inner**3 * shape.layers) * run.rates.slow
    return seconds, (FLOAT + 1) * shape.parameters + 2 * tokens * FLOAT * (5 * inner + 8 * hidden)


def _trying(run: _Run) -> float:
    """Seconds to measure what int4 costs each matrix by itself: from its layer on the original reads `TRIED` tokens
    anew, and what it says is compared."""
    shape = run.shape
    body = shape.parameters - shape.table * (1 if shape.tied else 2)
    each = 2.0 * TRIED * (body / 2 + shape.table) / run.rates.exact + COMPARE * TRIED * shape.vocabulary
    return MATRICES * shape.layers * each


def _gate(run: _Run) -> Cost:
    """Every gate row through the candidate."""
    seconds = run.opened_served + run.operations(run.amount.gate) / run.fast + run.compared()
    return Cost(seconds, HEAP + run.served_memory)


def _served_path(run: _Run) -> Cost:
    """The longest row through the engine that serves."""
    seconds = run.of.open * run.rates.slow + run.opened_served + run.operations(run.amount.longest) / run.fast
    return Cost(seconds, HEAP + run.served_memory)


def _evaluate(runs: Sequence[_Run]) -> Cost:
    """Held-out passages through original and candidates; then the speed of each in a process of its own."""
    run, held = runs[0], sum(each.held for each in runs)
    shape, rates, amount = run.shape, run.rates, run.amount
    passing = run.logits(amount.score_kept)
    seconds = LOAD * rates.slow + run.exact(amount.score, passes=amount.passages) + RECORD * passing / FLOAT
    speed = rates.fast if shape.width == 2 else rates.exact
    original = run.operations(amount.prompt) / speed + amount.new_tokens * run.step()
    seconds += (PROBE + IMPORT + LOAD) * rates.slow + amount.speed_runs * original + run.hashing
    for each in runs:
        token = each.served / (STREAM * rates.memory)
        candidate = each.operations(amount.prompt) / each.fast + amount.new_tokens * token
        seconds += each.opened_served + each.operations(amount.score) / each.fast + COMPARE * passing / FLOAT
        seconds += PROBE * rates.slow + each.opened_served + amount.speed_runs * candidate
    memory = max(
        run.original_memory(amount.passage),
        *(each.graph_memory(each.served) for each in runs),
        LIBRARIES + shape.size + 0.1e9,  # the original in its own process, beside this one
    )
    return Cost(seconds, HEAP + held + memory, passing=passing)


def _pack(runs: Sequence[_Run]) -> Cost:
    """The likeliest tokens of the longest row sorted out, the runtime folders copied and hashed, twice."""
    run, size = runs[0], sum(each.runtime for each in runs)
    sorting = SORT * run.logits(run.amount.longest) / FLOAT
    memory = HEAP + sum(each.held for each in runs)
    return Cost(sorting + 3 * size / run.rates.file + run.hashing, memory, kept=size)


EACH = {
    "export": _export,
    "gate export": _gate_export,
    "quantise": _quantise,
    "gate": _gate,
    "served path": _served_path,
}


def predict(shape: Shape, amount: Amount, rates: Rates, targets: Mapping[str, Precision]) -> Costs:
    """What each stage costs with `targets`, which have their turns in that order, each with its precision."""
    runs = [_Run(shape, precision, amount, rates, target) for target, precision in targets.items()]
    found, held = {"read": _read(runs[0]), "original": _original(runs[0])}, 0.0
    for run in runs:
        for name, stage in EACH.items():
            cost = stage(run)
            found[f"{name} {run.target}"] = replace(cost, memory=cost.memory + held)
        held += run.held  # what an earlier target leaves behind in this process
    return {**found, "evaluate": _evaluate(runs), "pack": _pack(runs)}
