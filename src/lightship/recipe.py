"""What to build: source, target, precision, evaluation, limits. Data only; nothing in a recipe can run code."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lightship.errors import UnsupportedError, UsageError

VERSION: Literal[1] = 1
SIZE_LIMIT = 2**20  # bytes of a recipe file
PrecisionName = Literal["fp32", "bf16", "int8", "int4", "f16", "q8_0", "q5_0", "q4_0"]
SHIPPED: tuple[PrecisionName, ...] = ("fp32", "bf16", "int8", "int4")  # what a target takes that does not say otherwise
PRECISIONS: tuple[PrecisionName, ...] = (*SHIPPED, "f16", "q8_0", "q5_0", "q4_0")  # the last ones only GGUF has
NEAREST: dict[str, PrecisionName] = {
    "int8": "q8_0", "int4": "q4_0", "f16": "bf16", "q8_0": "int8", "q5_0": "int8", "q4_0": "int4",
}  # fmt: skip
# Mean KL divergence (nats per token) from the original that a candidate may reach before the run stops.
KLD_LIMITS: dict[str, float] = {
    "fp32": 1e-4, "bf16": 1e-2, "int8": 2e-2, "int4": 0.15, "f16": 1e-3, "q8_0": 2e-2, "q5_0": 0.05, "q4_0": 0.15,
}  # fmt: skip
# The same for embedders: 1 − mean cosine of their embeddings.
COSINE_LIMITS: dict[str, float] = {"fp32": 1e-5, "bf16": 1e-3, "int8": 1e-2}
LIMITED = ("kld", "cosine_loss")
# What a limit after a step may be on; of all but `top1` it is the most allowed.
STEP_LIMITS = ("kld", "top1", "flips", "perplexity_ratio", "cosine_loss")

NNCF = ("awq", "scale_estimation", "gptq")  # its data-aware options, in any combination
INT4_ONLY = ("group_size", "ratio", "bits", "awq", "scale_estimation", "gptq", "fit")


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Precision(_Data):
    """The precision of the weights, and of the keys and values. Every option after `activations` concerns int4 only."""

    name: PrecisionName = "int8"
    arithmetic: Literal["auto", "f32"] = Field("auto", description="what it computes in; auto: as the runtime chooses")
    kv: Literal["auto", "f32", "bf16", "u8", "u4"] = Field(
        "auto", description="what keys and values are kept in; auto: as the runtime chooses, in fp32 f32"
    )
    tables: Literal["int8", "int4"] = Field(
        "int8", description="embedding and head, where the weights are integers; a tied table stays one"
    )
    activations: Literal["auto", "int8"] = Field(
        "auto", description="int8: rounded as they come, each token by itself, in groups; auto: the target's default"
    )
    group_size: int = Field(64, ge=16, le=1024, description="weights along the input that share one scale")
    ratio: float = Field(
        1.0, ge=0.0, le=1.0, description="share of the body in int4, by NNCF's guess; the rest is int8"
    )
    bits: float | None = Field(
        None, ge=4, le=16, description="limit, bits per weight over the whole graph: what int4 hurts most stays in int8"
    )  # fmt: skip
    fit: bool = Field(
        True, description="each matrix fitted to the original's outputs, after those before it; off beside these three:"
    )
    awq: bool = Field(False, description="activation-aware weight scaling (Lin et al. 2023, arXiv:2306.00978)")
    scale_estimation: bool = Field(False, description="scales that minimise the layer's output error")
    gptq: bool = Field(False, description="error-compensated rounding (Frantar et al. 2022, arXiv:2210.17323)")

    @property
    def data_aware(self) -> bool:
        """Whether quantising needs a calibration set."""
        return self.name == "int4" and (self.awq or self.scale_estimation or self.gptq or self.planned)

    @property
    def planned(self) -> bool:
        """Whether quantising needs the original model beside its graph."""
        return self.name == "int4" and (self.fit or self.bits is not None)

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_called(cls, given: Any) -> Any:
        """Recipes of version 0.1 say `all_layers` for tables in int4."""
        if not isinstance(given, dict) or "all_layers" not in given:
            return given
        if "tables" in given or not isinstance(given["all_layers"], bool):
            raise ValueError("all_layers is true or false, and the older name for `tables: int4`: give one of them")
        rest = {name: value for name, value in given.items() if name != "all_layers"}
        return {**rest, "tables": "int4"} if given["all_layers"] and given.get("name") == "int4" else rest

    @model_validator(mode="before")
    @classmethod
    def _fit_unless_otherwise(cls, given: Any) -> Any:
        """What NNCF does is done without fitting. Recipes of version 0.1 name two of its options at every precision,
        where they were the default."""
        if not isinstance(given, dict):
            return given
        if given.get("name", "int8") != "int4" and given.get("awq") is True and given.get("scale_estimation") is True:
            given = {**given, "awq": False, "scale_estimation": False}
        nncf = any(given.get(name) for name in NNCF) or given.get("ratio", 1) != 1
        return {**given, "fit": False} if nncf and given.get("name") == "int4" and "fit" not in given else given

    @model_validator(mode="after")
    def _only_where_it_matters(self) -> Precision:
        fields = type(self).model_fields
        idle = [name for name in INT4_ONLY if getattr(self, name) != fields[name].default]
        if self.name != "int4" and idle:
            raise ValueError(f"{', '.join(idle)} changes nothing at {self.name}: it is for int4")
        if self.name not in ("int8", "int4"):
            idle = [name for name in ("tables", "activations") if getattr(self, name) != fields[name].default]
            if idle:
                raise ValueError(f"{idle[0]} changes nothing at {self.name}: it is for int8 and int4")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Precision:
        if self.planned and self.ratio != 1:
            raise ValueError("ratio is NNCF's way to mix int4 and int8: leave it out beside bits or fit")
        asked = [name for name in NNCF if getattr(self, name)]
        if self.fit and asked:
            raise ValueError(f"fit rounds in its own way: leave out {asked[0]}, or fit (--no-fit)")
        exact = self.name == "fp32" or self.arithmetic == "f32"
        if self.kv == ("bf16" if exact else "f32"):
            raise ValueError(f"keys and values in {self.kv} need arithmetic {'auto' if exact else 'f32'}: the runtime "
                             "keeps them in what it computes in, or in integers")  # fmt: skip
        return self


class StepSpec(_Data):
    """A step by its name and its options; in a file `svd: {keep: 0.9}`, or just `depth`."""

    name: str
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and len(value) > 1 and "name" not in value:
            raise ValueError(f"one step an entry of the list, but here are {', '.join(map(str, value))}")
        if isinstance(value, dict) and len(value) == 1 and "name" not in value:
            ((name, options),) = value.items()
            return {"name": name, "options": {} if options is None else options}
        return value


class Recipe(_Data):
    """One ship run. `accept` replaces the default limits on purpose and is recorded in the report."""

    version: Literal[1] = VERSION
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][\w.-]*$", description="of the run; default SOURCE-PRECISION")
    out: str | None = Field(None, description="where `run` puts the bundle; default bundles/NAME")
    source: str = Field(description="a folder (model or adapter), a .gguf file, a hub id, or `demo`")
    revision: str | None = Field(None, description="of the source on the hub; of the base where the source is a folder")
    base: str | None = Field(None, description="the model that an adapter changes; default: what the adapter names")
    target: str | tuple[str, ...] | None = Field(
        None, description="openvino, onnx, or both as a list; default: openvino, for encoders both, the faster first"
    )
    steps: tuple[StepSpec, ...] = Field((), description="what to do to the weights first, in this order")
    limits: dict[str, float] = Field({}, description=f"of the loss after each step: {', '.join(STEP_LIMITS)}")
    calibrate: str | None = Field(None, description="file to calibrate on; default: a part of the text, never scored")
    seed: int = Field(0, ge=0, lt=2**32, description="of all that steps draw at random")
    precision: Precision = Precision()
    evaluate: Literal["quick", "full"] = "quick"
    text: str | None = Field(None, description="file to score on: plain text, chat or pairs JSONL")
    golden: str | None = Field(None, description="file of golden cases (JSONL)")
    accept: tuple[str, ...] = ()

    @field_validator("precision", mode="before")
    @classmethod
    def _by_its_name(cls, precision: Any) -> Any:
        return {"name": precision} if isinstance(precision, str) else precision

    @field_validator("accept", mode="before")
    @classmethod
    def _one(cls, accept: Any) -> Any:
        return (accept,) if isinstance(accept, str) else accept

    @field_validator("accept")
    @classmethod
    def _readable(cls, accept: tuple[str, ...]) -> tuple[str, ...]:
        parse_accepts(accept)
        return accept

    @field_validator("limits")
    @classmethod
    def _known(cls, limits: dict[str, float]) -> dict[str, float]:
        for name, limit in limits.items():
            if name not in STEP_LIMITS or not 0 <= limit < float("inf"):
                raise ValueError(f"{name}: {limit} is no limit; known are {', '.join(STEP_LIMITS)}, 0 or more")
        return limits

    @field_validator("target")
    @classmethod
    def _once(cls, target: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        """A list of one is that one, so that both give the same recipe."""
        if not isinstance(target, tuple):
            return target
        if not target or len(set(target)) < len(target):
            raise ValueError("name each target once, and one at least")
        return target[0] if len(target) == 1 else target

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets that are named, none or several."""
        return (self.target,) if isinstance(self.target, str) else self.target or ()

    @property
    def label(self) -> str:
        """The run's name."""
        source = Path(self.source.rstrip("/")).name.removesuffix(".gguf") or "model"
        other = "" if self.targets in ((), ("openvino",)) else f"-{'-'.join(self.targets)}"
        steps = "".join(f"-{step.name}" for step in self.steps)
        return self.name or f"{source}{steps}-{self.precision.name}{other}"

    def kld_limit(self) -> float:
        """The limit on mean KLD: an accepted one, else that of the steps, else the default."""
        return parse_accepts(self.accept).get("kld", self.limits.get("kld", KLD_LIMITS[self.precision.name]))

    def cosine_limit(self) -> float:
        """The limit on 1 − mean cosine of an embedder: an accepted one, else that of the steps, else the default."""
        default = self.limits.get("cosine_loss", COSINE_LIMITS[self.precision.name])
        return parse_accepts(self.accept).get("cosine_loss", default)


def parse_accepts(accepts: tuple[str, ...]) -> dict[str, float]:
    """`("kld<=0.3",)` → `{"kld": 0.3}`. Raises `UsageError` for anything else."""
    limits = {}
    for text in accepts:
        name, separator, value = text.partition("<=")
        try:
            limits[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator or name.strip() not in LIMITED or not 0 < limits[name.strip()] < float("inf"):
            raise UsageError(f"cannot read the limit {text!r}", hint='write for example --accept "kld<=0.3"')
    return limits


# ── Files ───────────────────────────────────────────────────────────────────


class _Loader(yaml.SafeLoader):
    """Plain data only, and no key twice: YAML would let the last one win in silence."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    pairs = [(loader.construct_object(key), loader.construct_object(value, deep=True)) for key, value in node.value]
    names = [str(key) for key, _ in pairs]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
    return dict(pairs)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Paths in it are taken from the current folder, as on the command line.

    Raises `UsageError` naming the key at fault and the nearest known one, `UnsupportedError` for a newer version.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(SIZE_LIMIT + 1)
        if len(raw) > SIZE_LIMIT:
            raise UsageError(f"{path} is larger than {SIZE_LIMIT} bytes; a recipe is a page of text")
        data = yaml.load(raw.decode("utf-8"), _Loader)  # noqa: S506  (a SafeLoader)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds {type(data).__name__}, expected keys and values", hint="see `lightship init`")
    version = data.get("version", VERSION)
    if isinstance(version, int) and version > VERSION:
        raise UnsupportedError(f"{path} is a recipe of version {version}; this lightship reads up to {VERSION}",
                               hint="upgrade lightship")  # fmt: skip
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError(f"{path}: {explain(error)}") from error


def explain(error: ValidationError, known: Sequence[str] | None = None) -> str:
    """The first mistake of a recipe in one line: which key, what was received, and the nearest of the `known` keys."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if first["type"] != "extra_forbidden":
        said = f"{'.'.join(place) + ': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"
        if isinstance(first["input"], dict | BaseModel):  # options that contradict each other: the words name them
            return said
        return f"{said}, received {str(first['input'])[:80]!r}"
    known = known or list((Precision if place[0] == "precision" else Recipe).model_fields)
    near = difflib.get_close_matches(place[-1], known, 1)
    advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return f"unknown key {'.'.join(place)!r}; {advice}"


def commented(source: str) -> str:
    """A recipe file for `source`: every key with its meaning and default, those that must not be left out set."""
    lines = ["# A recipe of lightship: `lightship run` builds the bundle it describes. Uncomment what you change.", ""]
    for name in Recipe.model_fields:
        if name == "precision":
            lines += ["precision:", *(f"  {line}" for line in _described(Precision, {"name": "int8"}))]
        else:
            lines += _described(Recipe, {"version": VERSION, "source": source}, only=name)
    return "\n".join(lines) + "\n"


def _described(model: type[_Data], given: dict[str, Any], only: str | None = None) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        if only not in (None, name):
            continue
        default = given.get(name, field.default)
        value = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
        comment = f"  # {field.description}" if field.description else ""
        shown = value.removesuffix("\n...\n").strip()
        lines.append(f"{'' if name in given else '# '}{name}: {shown}{comment}")
    return lines
