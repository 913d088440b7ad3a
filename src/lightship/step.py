"""A step changes a checkpoint into a lighter one. Each is one file in `compression/`, found by its name; its options
are the fields of its class, with meaning and range, so that recipes, help and checks follow from them."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from lightship.calibration import Text
from lightship.checkpoint import Checkpoint, save
from lightship.errors import LightshipError, UnsupportedError, UsageError
from lightship.find import find
from lightship.kind import GENERATORS
from lightship.machine import memory_available
from lightship.preflight import gigabytes
from lightship.recipe import explain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Need = Literal["memory", "compute", "nothing"]  # what a step saves in the runtimes
BOUNDS = {"ge": "≥ ", "gt": "> ", "le": "≤ ", "lt": "< "}  # of annotated-types, as people write them
Inputs = Mapping[str, npt.NDArray[np.int64]]  # what a model is called with: input_ids, attention_mask, …
# Stages of a run that goes on to a bundle after its steps: what their result says, and what the original says.
COMPRESSED, REFERENCE = "compressed", "reference"
ROW, TOGETHER = 512, 4  # tokens of a calibration row at most, and how many rows are read together


@dataclass(frozen=True)
class Lighter:
    """What steps made of an original."""

    original: Checkpoint
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Context:
    """What a step may look at, none of which is ever scored: `batches`, inputs of the model as (rows, tokens) padded as
    it expects, and the `text` they come from. `seed` decides all that is random; `say` tells a line of detail."""

    batches: tuple[Inputs, ...]
    text: Text
    seed: int = 0
    say: Callable[[str], None] = lambda line: None

    @property
    def tokens(self) -> int:
        """Real tokens in the batches."""
        return int(sum(batch["attention_mask"].sum() for batch in self.batches))


class Step(BaseModel, ABC):
    """The base of every step. A subclass has its options as fields and says in `apply` what it makes of a checkpoint;
    `WeightStep` is for those that change a loaded model only."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    serves: ClassVar[Need] = "nothing"  # which need it answers
    trial: ClassVar[Mapping[str, Any]] = {}  # the options with which `advise` tries it; without any it does not

    def refuse(self, config: Mapping[str, Any]) -> None:
        """Raise `UnsupportedError` for a model that this step cannot change, as far as its `config.json` tells: asked
        before any work."""

    def files(self) -> list[Path]:
        """The files that its options name: when they change, what it made is not found again."""
        return []

    def texts(self, checkpoint: Checkpoint) -> list[Text]:
        """What its options have it read beside the context's text: none of that may be scored. Raises `UsageError` for
        what cannot be read."""
        return []

    def predicted_bytes(self, checkpoint: Checkpoint) -> int:
        """Peak memory that the step needs beside the interpreter: a float32 copy of the weights, and the same again; of
        models that generate the logits of what is read together."""
        said = 4 * TOGETHER * ROW * checkpoint.vocabulary if checkpoint.kind in GENERATORS else 0
        return 2 * 4 * sum(map(prod, checkpoint.shapes.values())) + said

    def check_memory(self, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedError` where the step needs more memory than there is."""
        needed, available = self.predicted_bytes(checkpoint), memory_available()
        if needed > available:
            raise UnsupportedError(
                f"the step {self.name()} needs about {gigabytes(needed)} of memory, {gigabytes(available)} available",
                hint="free some, or go on with --ignore-shortage: a prediction can be wrong",
            )

    @abstractmethod
    def apply(self, checkpoint: Checkpoint, folder: Path, context: Context) -> Checkpoint:
        """`checkpoint` changed, written into the new `folder` in its own dtype."""

    def write(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        folder: Path,
        context: Context,
        figures: dict[str, Any],
        *,
        tokenizer_files: Path | None = None,
    ) -> Checkpoint:
        """Save `model` as what this step made of `checkpoint`, with the `tokenizer_files` of that or of another folder.
        Raises `LightshipError` for weights that are not finite."""
        import torch

        model.to(getattr(torch, checkpoint.dtype))
        bad = [name for name, each in model.named_parameters() if not torch.isfinite(each).all()]
        if bad:
            raise LightshipError(f"{self.name()} made weights that are not finite: {', '.join(bad[:3])}")
        entry = {"step": self.name(), "options": self.model_dump(mode="json"), "seed": context.seed,
                 "tokens": context.tokens, "calibration": context.text.digest, **figures}  # fmt: skip
        return save(model, tokenizer_files or checkpoint.folder, folder, entry, after=checkpoint)

    @classmethod
    def name(cls) -> str:
        """The name of its file."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def describe(cls) -> str:
        """What it does, and each option with its default and meaning, as lines for people."""
        lines = [f"{cls.name()}: {inspect.cleandoc(cls.__doc__ or '')}", ""]
        for option, field in cls.model_fields.items():
            bounds = ", ".join(sign + str(getattr(each, key)) for each in field.metadata
                               for key, sign in BOUNDS.items() if hasattr(each, key))  # fmt: skip
            lines.append(f"  {option}={field.default}  {field.description}{f' ({bounds})' if bounds else ''}")
        return "\n".join(lines)


class WeightStep(Step):
    """A step that changes the weights of a model, and its structure perhaps, but not its tokenizer."""

    @abstractmethod
    def change(self, model: PreTrainedModel, context: Context) -> dict[str, Any]:
        """Change `model`, loaded in float32, in place; returns figures to keep in the lineage (plain data)."""

    def apply(self, checkpoint: Checkpoint, folder: Path, context: Context) -> Checkpoint:
        import torch

        torch.manual_seed(context.seed)
        model = checkpoint.load("float32")
        figures = self.change(model, context)
        return self.write(model, checkpoint, folder, context, figures)


def step_class(name: str) -> type[Step]:
    """The step in the file `name` of `compression/`, or of a plug-in. Raises `UnknownName`, `MissingExtra`."""
    module = find("compression", name)
    found = [each for _, each in inspect.getmembers(module, inspect.isclass)
             if issubclass(each, Step) and each.__module__ == module.__name__]  # fmt: skip
    if len(found) != 1:
        raise UsageError(f"{module.__name__} defines {len(found)} steps, expected exactly one")
    return found[0]


def make_step(name: str, options: Mapping[str, Any]) -> Step:
    """The step `name` with `options`, text or plain data; in text a list is written with commas.

    Raises `UnknownName`, or `UsageError` naming the option at fault, what was received and the nearest known one.
    """
    kind = step_class(name)
    listed = {field for field, info in kind.model_fields.items() if "tuple" in str(info.annotation)}
    given = {key: value.split(",") if key in listed and isinstance(value, str) else value
             for key, value in options.items()}  # fmt: skip
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise UsageError(f"step {name}: {explain(error, list(kind.model_fields))}") from error
