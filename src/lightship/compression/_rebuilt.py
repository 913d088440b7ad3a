"""Whether a configuration still builds the layers that a cut model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightship.errors import UnsupportedError
from lightship.layers import stacks
from lightship.structure import STRUCTURE_FIELDS, structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

HINT = "this architecture gives its layers parts or numbers by their place; lightship cannot cut it so"


def changed(model: PreTrainedModel, changes: Mapping[str, Any], hint: str) -> PreTrainedConfig:
    """The configuration of `model` as it would be read with `changes`. Raises `UnsupportedError` where it would not be,
    as some architectures want a width that the number of heads divides."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        return type(model.config).from_dict({**model.config.to_dict(), **changes})
    except (ValueError, StrictDataclassError) as error:
        said = str(error).strip().splitlines()[-1].strip()
        raise UnsupportedError(f"{type(model).__name__} takes no such sizes: {said}", hint=hint) from error


def check_rebuilt(model: PreTrainedModel, hint: str = HINT) -> None:
    """Compare the layers of `model` with those that its configuration, as it is written, and its structure build: their
    modules, the shapes of their weights, and every number, flag or name that a module holds, such as the window of its
    attention. Nothing is computed. Raises `UnsupportedError` for the first that differs: the checkpoint would load as
    another model than was measured, or not at all.
    """
    import torch

    kind, config = type(model).__name__, changed(model, {}, hint)
    with torch.device("meta"):
        built = type(model)(config)
    structure_of(model).build(built)
    mine, theirs = _parts(model), _parts(built)
    for place in [*mine, *(theirs.keys() - mine.keys())]:
        found, expected = mine.get(place), theirs.get(place)
        if found == expected:
            continue
        if found is None or expected is None:
            raise UnsupportedError(f"{kind} {'lacks' if found is None else 'has no'} {place} once it is cut", hint=hint)
        differs = next(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise UnsupportedError(
            f"{kind} would be built with {differs} = {expected.get(differs)} in {place}, and has {found.get(differs)}",
            hint=hint,
        )


def _parts(model: Any) -> dict[str, dict[str, Any]]:
    """Every module in the stacks: its class, its plain attributes, the shapes of its own weights."""
    found = {}
    for stack, layers in stacks(model).items():
        for name, module in layers.named_modules():
            plain = {key: value for key, value in vars(module).items()
                     if isinstance(value, bool | int | float | str) and not key.startswith("_")}  # fmt: skip
            for ignored in ("training", *STRUCTURE_FIELDS):  # the shapes tell them
                plain.pop(ignored, None)
            shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
            found[f"{stack}.{name}".rstrip(".")] = {"class": type(module).__name__, **plain, **shapes}
    return found
