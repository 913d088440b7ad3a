"""Before anything is loaded: what a run will need, and whether this machine and what is installed on it have it.

Each refusal is one error with its way out: a package that is missing, an architecture that the installed transformers
or the target does not know, too little memory or disk.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightship import costs
from lightship.checkpoint import Checkpoint, check_config, context_length, require
from lightship.costs import Cost, Costs, Rates, Shape
from lightship.encoder import context_of
from lightship.encoder_costs import EncoderShape
from lightship.errors import UnsupportedError, UsageError
from lightship.find import find
from lightship.kind import kind_of
from lightship.machine import memory_available
from lightship.recipe import Recipe

ALWAYS = ("torch", "transformers", "safetensors")  # the original is computed with them, whatever the target
LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
WIDTH_KEYS, HEAD_KEYS = ("hidden_size", "dim"), ("num_attention_heads", "n_heads")
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
MEASURED = ("openvino", "onnx")  # the targets that `costs` and `encoder_costs` were fitted to
CLOSE = 0.9  # a need above this share of what is free is said


# ── What is seen ────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Seen:
    """What can be known of a source without loading it: where its weights are, its configuration where it has one, and
    its shape, or the `reason` why nothing is predicted."""

    file: Path | None = None
    config: Mapping[str, Any] | None = None
    shape: Shape | EncoderShape | None = None
    reason: str = ""


def seen_in(checkpoint: Checkpoint) -> Seen:
    """What configuration and safetensors headers of a checkpoint tell. Raises `SourceError` where they are damaged."""
    config, files = checkpoint.config, checkpoint.weight_files
    largest = max(files, key=lambda path: path.stat().st_size)
    layers = _first(config, LAYER_KEYS)
    vocabulary, context = config.get("vocab_size"), context_length(config)
    shapes = list(checkpoint.shapes.values())
    tables = [_product(shape) for shape in shapes if len(shape) == 2 and shape[0] == vocabulary]
    if any(config.get(key) for key in EXPERT_KEYS):
        return Seen(largest, config, reason="mixtures of experts have not been measured")
    if kind_of(config) == "seq2seq":
        return Seen(largest, config, reason="encoder-decoders have not been measured")
    if config.get("num_hidden_groups"):
        return Seen(largest, config, reason="layers that share their weights have not been measured")
    if layers is None or vocabulary is None or context is None or not tables:
        return Seen(largest, config, reason="config.json does not give layers, context and a vocabulary as the weights")
    name, parameters = str(config.get("model_type")), sum(map(_product, shapes))
    width = 2 if checkpoint.dtype in ("float16", "bfloat16") else 4
    size, tokenizer = checkpoint.weight_bytes, _size(checkpoint.folder / "tokenizer.json")
    shape: Shape | EncoderShape
    if kind_of(config) == "decoder":
        tied = len(tables) == 1
        shape = Shape(name, layers, parameters, tables[0], tied, vocabulary, context, width, size, tokenizer)
    else:
        hidden, heads, limit = _first(config, WIDTH_KEYS), _first(config, HEAD_KEYS), context_of(checkpoint)
        if hidden is None or heads is None:
            return Seen(largest, config, reason="config.json does not give the width of a layer and its heads")
        shape = EncoderShape(name, layers, parameters, tables[0], hidden, heads, limit, width, size, tokenizer)
    return Seen(largest, config, shape)


def _first(config: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    return next((config[key] for key in keys if isinstance(config.get(key), int)), None)


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def first_look(recipe: Recipe, peek: Callable[[str, str | None, str | None], Seen]) -> Seen:
    """What `peek(source, revision, base)` sees of the source. Raises when a package is missing, or the model is one
    that cannot be loaded or converted."""
    require(*ALWAYS)
    seen = peek(recipe.source, recipe.revision, recipe.base)
    if seen.config is not None:
        check_config(seen.config, recipe.source)
        check_architecture(seen.config)
    return seen


def check_files(recipe: Recipe) -> None:
    """Raise `UsageError` when a file that `recipe` names is not there."""
    for name in ("text", "calibrate", "golden"):
        path = getattr(recipe, name)
        if path is not None and not Path(path).is_file():
            raise UsageError(f"{name}: there is no file {path}", hint="paths are taken from the current folder")


def check_packages(targets: Sequence[str]) -> None:
    """Raise `MissingExtra` when a package that building for one of `targets` needs is missing."""
    for name in targets:
        target = find("targets", name)
        require(*getattr(target, "NEEDS", ()), extra=target.EXTRA)


# ── What is refused ─────────────────────────────────────────────────────────


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` when the installed transformers does not know the model's type, or it is of no kind that
    is converted."""
    name = str(config.get("model_type"))
    known = model_types()
    if known and name not in known:
        needs = config.get("transformers_version")
        written = f"; the model was written by {needs}" if needs else ""
        raise UnsupportedError(
            f"the installed transformers {metadata.version('transformers')} does not know the architecture {name!r}"
            f"{written}",
            hint="check model_type in config.json, or the version of transformers",
        )
    if kind_of(config) == "decoder" and known and name not in decoders():
        raise UnsupportedError(f"{name!r} has no decoder language model in the installed transformers")


def model_types() -> frozenset[str]:
    """The model types that the installed transformers knows; empty when it cannot be told."""
    return frozenset(_mapping("auto_mappings.py", "CONFIG_MAPPING_NAMES")) | frozenset(decoders())


def decoders() -> dict[str, str]:
    """Model type → class of its decoder language model, as the installed transformers has it."""
    return _mapping("modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


def _mapping(file: str, name: str) -> dict[str, str]:
    """`name = OrderedDict([(key, value), …])` of a file of transformers, read without importing it: that takes seconds,
    and torch with it. Empty where there is no such file or name."""
    spec = find_spec("transformers")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "models" / "auto" / file
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
            match node:
                case ast.Assign(targets=[ast.Name(id=found)], value=ast.Call(args=[pairs])) if found == name:
                    return dict(ast.literal_eval(pairs))
    return {}


# ── The plan ────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Step:
    """A stage of a plan; `cost` is None where nothing is predicted."""

    name: str
    done: bool
    cost: Cost | None


@dataclass(frozen=True)
class Plan:
    """What a run would do: its stages, where it works and writes, what is left to be spent, or why that is unknown."""

    steps: tuple[Step, ...]
    work: Path
    out: Path
    reason: str = ""

    def _left(self) -> Iterator[Cost]:
        return (step.cost for step in self.steps if step.cost and not step.done)

    @property
    def predicted(self) -> bool:
        """Whether every stage has its cost."""
        return all(step.cost for step in self.steps)

    @property
    def seconds(self) -> float:
        """Of the stages that are left."""
        return sum(cost.seconds for cost in self._left())

    @property
    def memory(self) -> float:
        """Bytes: the largest need of a stage that is left."""
        return max((cost.memory for cost in self._left()), default=0.0)

    @property
    def disk(self) -> float:
        """Bytes: the most that lies on disk at once, the result included."""
        kept = most = 0.0
        for cost in self._left():
            most = max(most, kept + cost.kept + cost.passing)
            kept += cost.kept
        return most

    @property
    def result(self) -> float:
        """Bytes of what appears at `out`: what the last stage that keeps anything made."""
        return next((step.cost.kept for step in reversed(self.steps) if step.cost and step.cost.kept), 0.0)

    @property
    def times(self) -> dict[str, float]:
        """Stage → the seconds it will take, none where it is done; empty when not every stage is predicted."""
        if not self.predicted:
            return {}
        return {step.name: step.cost.seconds if step.cost and not step.done else 0.0 for step in self.steps}

    def shortages(self) -> Iterator[tuple[bool, str]]:
        """What there is too little of, or nearly: (too little, sentence)."""
        needs = [(self.memory, memory_available(), "memory, {} available")]
        for folder, need in self._places():
            needs.append((need, shutil.disk_usage(folder).free, f"disk below {folder}, {{}} free"))
        for need, free, words in needs:
            if need > CLOSE * free:
                yield need > free, f"needs about {gigabytes(need)} of {words.format(gigabytes(free))}"

    def _places(self) -> list[tuple[Path, float]]:
        """Folders on different disks, with the bytes needed there: the result may lie on another than the work."""
        work, out = existing(self.work), existing(self.out)
        if work.stat().st_dev == out.stat().st_dev:
            return [(work, self.disk)]
        return [(work, self.disk - self.result), (out, self.result)]

    def check(self) -> None:
        """Raise `UnsupportedError` when memory or disk is too small by the prediction."""
        for short, sentence in self.shortages():
            if short:
                raise UnsupportedError(
                    sentence, hint="free some, or go on with --ignore-shortage: a prediction can be wrong"
                )

    def said(self) -> str:
        """The plan in one line."""
        done = sum(step.done for step in self.steps)
        before = f" ({done} of {len(self.steps)} stages are done)" if done else ""
        if not self.predicted:
            return f"what it needs is not predicted: {self.reason}{before}"
        if not self.seconds:
            return "nothing to do"
        near = "".join(f"; {sentence}" for _, sentence in self.shortages())
        return (
            f"needs about {gigabytes(self.memory)} of memory, {gigabytes(self.disk)} of disk and "
            f"{duration(self.seconds)}{before}{near}"
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data: bytes and seconds, null where nothing is predicted."""
        known = self.predicted
        return {
            "stages": [_described(step) for step in self.steps],
            "memory": round(self.memory) if known else None,
            "disk": round(self.disk) if known else None,
            "seconds": round(self.seconds, 1) if known else None,
            "result": round(self.result) if known else None,
            "not_predicted": self.reason or None,
            "work": str(self.work),
            "out": str(self.out),
        }


def plan(
    recipe: Recipe,
    seen: Seen,
    predict: Callable[[Rates], Costs],
    names: Sequence[str],
    out: Path,
    work: Path | None = None,
    done: Sequence[str] = (),
) -> Plan:
    """The stages `names` of `recipe`, those that are `done` marked, with what each costs on this machine.

    `predict(rates)`: what the stages of the `shape` that was seen cost. `work`: the folder of the stages, by default a
    hidden one beside `out`. What has not been measured is not predicted.
    """
    reason, known = seen.reason, Costs()
    unmeasured = [target for target in recipe.targets if target not in MEASURED]
    if seen.shape is not None and unmeasured:
        reason = f"the target {unmeasured[0]} has not been measured"
    elif seen.shape is not None and recipe.steps:
        reason = "what steps take has not been measured"
    elif seen.shape is not None and recipe.precision.gptq:
        reason = "gptq has not been measured"
    elif isinstance(seen.shape, Shape) and "onnx" in recipe.targets and recipe.precision.arithmetic == "f32":
        reason = "ONNX with the arithmetic f32 has not been measured"
    elif seen.shape is not None:
        known = predict(costs.rates(seen.file, recipe.precision.arithmetic))
    steps = tuple(Step(name, name in done, known.get(name)) for name in names)
    return Plan(steps, work or out.parent / f".{out.name}.partial", out, reason)


def _described(step: Step) -> dict[str, Any]:
    cost = step.cost
    return {
        "stage": step.name,
        "done": step.done,
        "seconds": None if cost is None else round(cost.seconds, 1),
        "memory": None if cost is None else round(cost.memory),
        "disk": None if cost is None else round(cost.kept + cost.passing),
    }


def existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def gigabytes(size: float) -> str:
    """`2.3 GB`; below one in MB, to two digits."""
    if size >= 0.995e9:
        return f"{size / 1e9:.1f} GB"
    megabytes = max(round(size / 1e6), 1)
    return f"{megabytes if megabytes < 100 else round(megabytes, -1)} MB"


def duration(seconds: float) -> str:
    """About how long, in the unit one would say."""
    for unit, size in (("hour", 3600), ("minute", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}s"
    return f"{seconds:.0f} seconds"
