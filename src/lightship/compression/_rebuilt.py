"""Whether a configuration still builds the layers that a cut model has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightship.errors import UnsupportedError
from lightship.layers import stacks
from lightship.structure import structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HINT = "this architecture gives its layers parts or numbers by their place; lightship cannot cut it so"


def check_rebuilt(model: PreTrainedModel, hint: str = HINT) -> None:
    """Compare the layers of `model` with those that its configuration, as it is written, and its structure build: their
    modules, the shapes of their weights, and every number, flag or name that a module holds, such as the window of its
    attention. Nothing is computed. Raises `UnsupportedError` for the first that differs: the checkpoint would load as
    another model than was measured, or not at all.
    """
    import torch

    kind = type(model).__name__
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        with torch.device("meta"):
            built = type(model)(config)
    except (ValueError, TypeError, KeyError, IndexError) as error:
        said = str(error).strip().splitlines()[-1:] or [repr(error)]
        raise UnsupportedError(f"{kind} takes no such configuration: {said[0].strip()}", hint=hint) from error
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
            plain.pop("training", None)
            shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
            found[f"{stack}.{name}".rstrip(".")] = {"class": type(module).__name__, **plain, **shapes}
    return found
