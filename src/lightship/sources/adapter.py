"""A PEFT adapter (LoRA), merged into its base in float32 and rounded once; what cannot be merged exactly is refused."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveInt, ValidationError

from lightship import costs
from lightship.checkpoint import Checkpoint, read_json, require, safetensors_header, save
from lightship.errors import SourceError, UnsupportedError
from lightship.preflight import Seen
from lightship.sources import pickle

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from lightship.sources import Found

# The package peft is not used: the settings may name a module that it then imports, it drops tensors that fit nowhere,
# and merging a change of the output layer it changes the embedding table tied to it as well. The tests compare with it.
EXTRA = "build"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in the file
A, B, BIAS, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
# Settings that concern training, or that the layers themselves answer (fan_in_fan_out: the type of the layer does).
WITHOUT_EFFECT = {"auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config",
                  "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
                  "runtime_config"}  # fmt: skip
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # every other one changes the base before training
PATTERN_SECONDS = 10.0
MATCH = """import json, re, sys
names, patterns = json.load(sys.stdin)
json.dump([[name for name in names if re.fullmatch(each, name)] for each in patterns], sys.stdout)"""
SHOWN = 3  # mistakes told one by one
Shape = tuple[int, ...]
Value = TypeVar("Value")


class Settings(BaseModel):
    """What `adapter_config.json` says about a LoRA adapter, as PEFT 0.21 writes it; the rest is in `model_extra`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    base_model_name_or_path: str = ""
    revision: str | None = None
    task_type: str | None = None
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, FiniteFloat] = {}
    target_modules: str | list[str] = []
    exclude_modules: str | list[str] = []
    layers_to_transform: int | list[int] = []
    layers_pattern: str | list[str] = []
    modules_to_save: list[str] = []
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True


# ── The folder ──────────────────────────────────────────────────────────────


def alone(folder: Path) -> bool:
    """Whether `folder` holds an adapter and no model of its own."""
    models = [path for path in folder.glob("*.safetensors*") if path.name != WEIGHTS]
    return (folder / CONFIG).is_file() and not models and not any(folder.glob("pytorch_model*"))


def settings(folder: Path) -> Settings:
    """The settings of the adapter in `folder`, its files looked over, no tensor read.

    Raises `UnsupportedError` for what could not be merged exactly, `UnsafeSource` for pickled weights, `SourceError`
    for missing or damaged files.
    """
    path, weights = folder / CONFIG, folder / WEIGHTS
    given = {name: value for name, value in read_json(path).items() if value is not None}
    if given.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"{path}: peft_type is {given.get('peft_type')!r}; only LORA can be merged into a model",
            hint="give a LoRA adapter, or a model into which it was merged",
        )
    try:
        found = Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise SourceError(f"{path}: {place}: {first['msg']}, received {str(first['input'])[:80]!r}") from error
    _refuse_inexact(path, found)
    if not weights.is_file():
        pickled = sorted(folder.glob("adapter_model*.bin"))
        if pickled:
            pickle.read(str(pickled[0]), folder, lambda line: None)
        raise SourceError(f"{folder} lacks {WEIGHTS}", hint="the download or the training run is incomplete")
    if not safetensors_header(weights):
        raise SourceError(f"{weights} holds no tensor", hint="the download or the training run is incomplete")
    return found


def _refuse_inexact(path: Path, found: Settings) -> None:
    """Refuse settings under which W + scaling·B·A is not the model that was trained, and those nobody here knows."""
    extra = {name for name, value in (found.model_extra or {}).items() if value} - WITHOUT_EFFECT
    reason = ""
    if extra:
        reason = f"{', '.join(sorted(extra))}: set, and not known to merge exactly"
    elif found.task_type not in (None, "CAUSAL_LM"):
        reason = f"task_type is {found.task_type!r}, expected CAUSAL_LM: lightship ships models that generate text"
    elif found.init_lora_weights not in PLAIN_STARTS:
        reason = f"init_lora_weights is {found.init_lora_weights!r}, which changed the base itself before training"
    elif not found.target_modules:
        reason = "no target_modules"
    if reason:
        raise UnsupportedError(f"{path}: {reason}", hint="merge it with PEFT where it was trained: merge_and_unload()")


def read(
    source: str, folder: Path, log: Callable[[str], None], *, base: Found, origin: Mapping[str, Any]
) -> Checkpoint:
    """Write `base` with the adapter in the folder `source` merged into it to `folder`, in the dtype of the base.

    The tokenizer is the adapter's where it has one, else the base's. `origin` is what lineage says of the adapter.
    Raises `SourceError` when the adapter does not fit the base.
    """
    require("torch", "transformers", "safetensors")
    place = Path(source)
    found, tensors = settings(place), _tensors(place / WEIGHTS)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".base-") as converted:  # where a GGUF base goes
        original = base.read(Path(converted) / "base", log)
        tokenizer = _tokenizer(place, original)
        model = original.load()
        changed = merge(model, found, tensors, base.name)
        log(f"LoRA of rank {found.r}, alpha {found.lora_alpha:g}: {changed} modules of {base.name} changed")
        known = set(Settings.model_fields) - {"base_model_name_or_path", "revision", "task_type", "init_lora_weights"}
        options = {name: value for name, value in found.model_dump(include=known).items() if value}
        entry = {"step": "adapter", "options": options, **origin, "base": base.origin}
        return save(model, tokenizer, folder, entry, after=original)


def peek(path: Path, base: Seen) -> Seen:
    """What the headers of the adapter in the folder `path` tell, with what was seen of its base. A change of a table
    that input and output share makes two of it."""
    shape = base.shape
    if shape is None:
        return Seen(reason=base.reason)
    if not isinstance(shape, costs.Shape):
        return Seen(reason="adapters are merged into decoders only")
    rows = {size for entry in safetensors_header(path / WEIGHTS).values() for size in entry["shape"]}
    table = shape.table if shape.tied and shape.vocabulary in rows else 0
    merged = replace(
        shape, adapter=(path / WEIGHTS).stat().st_size, tied=shape.tied and not table,
        parameters=shape.parameters + table, size=shape.size + table * shape.width,
    )  # fmt: skip
    return Seen(base.file, shape=merged)


def _tensors(path: Path) -> dict[str, Tensor]:
    import safetensors
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, KeyError, safetensors.SafetensorError) as error:
        raise SourceError(f"{path} cannot be loaded: {error}", hint="fetch it again") from error
    for name, tensor in found.items():
        if not name.startswith(PREFIX) or not tensor.is_floating_point():
            raise SourceError(f"{path} holds {name} ({tensor.dtype}), expected floats with names below {PREFIX}")
    return {name.removeprefix(PREFIX).replace(".base_layer.", "."): tensor for name, tensor in found.items()}


def _tokenizer(place: Path, base: Checkpoint) -> Path:
    """The folder whose tokenizer is taken. Raises `UnsupportedError` when it has ids that the base has no rows for."""
    path = place / "tokenizer.json"
    if not path.is_file():
        return base.folder
    last = _last_id(path)
    if last >= base.vocabulary and last > _last_id(base.folder / "tokenizer.json"):
        raise UnsupportedError(
            f"the adapter's tokenizer goes up to id {last}, its base ends at {base.vocabulary - 1}",
            hint="the embeddings were resized in training: give a base resized alike, or merge it where it was trained",
        )
    return place


def _last_id(path: Path) -> int:
    from tokenizers import Tokenizer

    try:
        return max(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values(), default=-1)
    except Exception as error:  # tokenizers raises nothing narrower
        raise SourceError(f"{path} is no tokenizer: {str(error)[:200]}") from error


# ── What the adapter must hold ──────────────────────────────────────────────


def _targets(model: PreTrainedModel, found: Settings) -> list[str]:
    """The modules that `target_modules` and its companions choose, by PEFT's rules."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    modules = {name: module for name, module in model.named_modules() if name}
    wanted = found.target_modules
    if wanted == "all-linear":
        head = model.get_output_embeddings()
        chosen = {name for name, each in modules.items() if isinstance(each, nn.Linear | Conv1D) and each is not head}
    else:
        chosen = _chosen(wanted, modules)
    if isinstance(wanted, list) and found.layers_to_transform != []:
        chosen = {name for name in chosen if name in wanted or _in_layers(name, found)}
    chosen -= _chosen(found.exclude_modules, modules)
    return [name for name in modules if name in chosen
            and not any(f".{saved}." in f".{name}." for saved in found.modules_to_save)]  # fmt: skip


def _chosen(wanted: str | list[str], names: Iterable[str]) -> set[str]:
    """A string is a regular expression for the whole name, a list has names or ends of names."""
    if isinstance(wanted, str):
        return _matching([wanted], [*names])[0]
    return {name for name in names if any(name == each or name.endswith(f".{each}") for each in wanted)}


def _in_layers(name: str, found: Settings) -> bool:
    """Whether the first number in `name` (later ones count experts) is one of `layers_to_transform`."""
    layers, owners = found.layers_to_transform, found.layers_pattern
    owner = "|".join(re.escape(each) for each in ([owners] if isinstance(owners, str) else owners)) or r"[^.]+"
    number = re.search(rf"(?:^|\.)(?:{owner})\.(\d+)\.", name)
    return number is not None and int(number[1]) in ([layers] if isinstance(layers, int) else layers)


def _by_pattern(values: Mapping[str, Value], names: Sequence[str]) -> dict[str, Value]:
    """By name: the value of the first pattern that matches its end."""
    matched = _matching([rf"(.*\.)?({pattern})" for pattern in values], names)
    return {name: value for value, those in [*zip(values.values(), matched, strict=True)][::-1] for name in those}


def _matching(patterns: Sequence[str], names: Sequence[str]) -> list[set[str]]:
    """For each of `patterns`, those of `names` that it matches from end to end.

    In a process of its own: a regular expression cannot be interrupted, and one from a file may need for ever.
    """
    if not patterns:
        return []
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", MATCH],
            input=json.dumps([names, patterns]),
            capture_output=True,
            text=True,
            timeout=PATTERN_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise SourceError(
            f"{CONFIG} has a pattern that needs more than {PATTERN_SECONDS:g} s: {patterns}"[:500],
            hint="list the names of the modules instead",
        ) from error
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2]
        raise SourceError(f"{CONFIG} has a pattern that cannot be used: {reason}: {patterns}"[:500])
    return [set(each) for each in json.loads(done.stdout)]


@dataclass(frozen=True)
class Change:
    """What LoRA does to one module: the `shapes` of its tensors by name, and the `scaling` of B·A."""

    shapes: Mapping[str, Shape]
    scaling: float


def _changes(model: PreTrainedModel, found: Settings) -> dict[str, Change]:
    """By module. Raises `UnsupportedError` where LoRA has no exact merge."""
    targets, changes = _targets(model, found), {}
    ranks, alphas = _by_pattern(found.rank_pattern, targets), _by_pattern(found.alpha_pattern, targets)
    for name in targets:
        rank, alpha = ranks.get(name, found.r), alphas.get(name, found.lora_alpha)
        scaling = alpha / math.sqrt(rank) if found.use_rslora else alpha / rank  # rsLoRA: Kalajdzievski 2023
        changes[name] = Change(_shapes(name, model.get_submodule(name), rank, found), scaling)
    return changes


def _shapes(name: str, module: Any, rank: int, found: Settings) -> dict[str, Shape]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding) and not found.use_dora:
        return {EMBEDDING_A: (rank, module.num_embeddings), EMBEDDING_B: (module.embedding_dim, rank)}
    if not isinstance(module, nn.Linear | Conv1D) or (found.lora_bias and module.bias is None):
        how = ("DoRA" if found.use_dora else "LoRA") + (" with lora_bias" if found.lora_bias else "")
        raise UnsupportedError(f"{name}: {how} cannot be merged into {module!r}"[:500])
    outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
    shapes: dict[str, Shape] = {A: (rank, inputs), B: (outputs, rank)}
    if found.use_dora:
        shapes[MAGNITUDE] = (outputs,)
    if found.lora_bias:
        shapes[BIAS] = (outputs,)
    return shapes


def _saved(model: PreTrainedModel, found: Settings) -> set[str]:
    """The parameters of `modules_to_save`, the ends of names, each in its own place even where it is shared."""
    ends = tuple(found.modules_to_save)
    modules = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name.endswith(ends)]
    return {f"{name}.{parameter}" for name, module in modules for parameter, _ in module.named_parameters()}


def _refuse_misfits(
    tensors: Mapping[str, Tensor], required: Mapping[str, Shape], optional: Mapping[str, Shape], base: str
) -> None:
    """Raise `SourceError` unless every tensor has a place, its shape fits, and none is missing."""
    mistakes = []
    for name in sorted(tensors.keys() | required.keys()):
        got = tuple(tensors[name].shape) if name in tensors else None
        expected = required.get(name, optional.get(name))
        if got != expected:
            mistakes.append(f"{name}: expected {_shape(expected)}, found {_shape(got)}")
    if mistakes:
        more = f"; {len(mistakes)} mistakes in all" if len(mistakes) > SHOWN else ""
        raise SourceError(
            f"the adapter does not fit {base}: {'; '.join(mistakes[:SHOWN])}{more}",
            hint="give the model that it was trained on with --base; when its embeddings were resized in training, "
            "one resized alike",
        )


def _shape(shape: Shape | None) -> str:
    return "nothing" if shape is None else "×".join(map(str, shape))


# ── Merging ─────────────────────────────────────────────────────────────────


def merge(model: PreTrainedModel, found: Settings, tensors: Mapping[str, Tensor], base: str = "the base") -> int:
    """Merge the adapter `tensors` into `model` in place; returns how many modules LoRA changed.

    Raises `SourceError` when the adapter was made for another base, before anything is changed. A table that input and
    output share becomes two when the adapter changes one of them, as it did in training.
    """
    import torch

    changes, saved, tables = _changes(model, found), _saved(model, found), _tables(model)
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
    required = {f"{name}.{part}": shape for name, change in changes.items() for part, shape in change.shapes.items()}
    required |= {name: shapes[name] for name in saved}
    biases = {name for name in shapes if name.endswith(".bias")} if found.bias != "none" else set()
    others = {name: shapes[name] for name in (biases | {f"{name}.weight" for name in tables}) - saved}
    _refuse_misfits(tensors, required, others, base)
    with torch.no_grad():
        for name in tensors:
            if name in others:
                model.get_parameter(name).copy_(tensors[name])
        if any(name in changes or f"{name}.weight" in saved for name in tables):
            _untie(model)
        for name in saved:
            model.get_parameter(name).copy_(tensors[name])
        for name, change in changes.items():
            parts = {part: tensors[f"{name}.{part}"] for part in change.shapes}
            _change(name, model.get_submodule(name), parts, change.scaling)
    return len(changes)


def _tables(model: PreTrainedModel) -> list[str]:
    """The names of the embedding table and the output layer."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [name for name, module in model.named_modules() if any(module is each for each in both)]


def _untie(model: PreTrainedModel) -> None:
    """Give the output layer weights of its own, where it shares those of the embedding table."""
    from torch import nn

    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is table.weight:
        head.weight = nn.Parameter(table.weight.detach().clone())
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def _change(name: str, module: Any, parts: Mapping[str, Tensor], scaling: float) -> None:
    """W ← W + scaling·B·A (Hu et al. 2021) in float32 or better, rounded once; with DoRA (Liu et al. 2024) each
    output's row is then given the length in `lora_magnitude_vector`."""
    import torch
    from torch import nn

    exact = torch.promote_types(module.weight.dtype, torch.float32)
    part = {each: tensor.to(exact) for each, tensor in parts.items()}
    a, b = (part[A], part[B]) if A in part else (part[EMBEDDING_A], part[EMBEDDING_B])
    turned = not isinstance(module, nn.Linear)  # Conv1D and Embedding keep inputs in rows
    weight = (module.weight.T if turned else module.weight).to(exact) + scaling * (b @ a)
    if MAGNITUDE in part:
        weight *= (part[MAGNITUDE] / torch.linalg.norm(weight, dim=1))[:, None]
    module.weight.copy_(weight.T if turned else weight)
    if BIAS in part:
        module.bias.copy_(module.bias.to(exact) + scaling * part[BIAS])
    if not bool(torch.isfinite(module.weight).all()):
        raise SourceError(f"{name} is not finite once merged", hint="the adapter or its base is damaged")
