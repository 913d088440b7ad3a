"""Leave out whole layers: exactly as much faster, and every runtime knows the result. Which, is told by block influence
(ShortGPT, Men et al. 2024, arXiv:2403.03853) or found greedily (SLEB, Song et al. 2024, arXiv:2402.09025)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lightship.compression._activations import read
from lightship.compression._rebuilt import check_rebuilt
from lightship.compression._stacks import Layers
from lightship.errors import UnsupportedError, UsageError
from lightship.step import Context, Inputs, Need, WeightStep

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

STAY = "each stack keeps a layer at least, and those that are built unlike its others"


class Depth(WeightStep):
    """Leave out whole layers. They are numbered from 0, those of a decoder after those of its encoder; one at least
    stays in each."""

    serves: ClassVar[Need] = "compute"
    trial: ClassVar[Mapping[str, Any]] = {"drop": 1, "method": "influence"}

    drop: int = Field(1, ge=1, description="layers to leave out")
    method: Literal["influence", "greedy", "random"] = Field(
        "greedy",
        description="influence: those that turn their input the least, in one pass; greedy: one by one, each time the "
        "layer whose absence costs the least KL divergence from the original; random: a control",
    )
    layers: tuple[int, ...] = Field((), description="leave out these, whatever drop and method say")
    rows: int = Field(4, ge=1, description="calibration rows that greedy reads for every layer that it tries")

    def change(self, model: PreTrainedModel, context: Context) -> dict[str, Any]:
        layers = Layers(model)
        self._check(layers)
        figures: dict[str, Any] = {"of": len(layers)}
        if self.layers:
            dropped = list(self.layers)
        elif self.method == "random":
            dropped = _random(layers, self.drop, context.seed)
        elif self.method == "influence":
            found = influence(layers, context.batches)
            figures["influence"] = [round(each, 6) for each in found]
            dropped = _first(layers, sorted(range(len(layers)), key=found.__getitem__), self.drop)
        else:
            dropped, costs = greedy(layers, context, self.drop, self.rows)
            figures["cost"] = [round(cost, 6) for cost in costs]
        layers.keep(set(range(len(layers))) - set(dropped))
        layers.renumber()
        check_rebuilt(model, hint="leave out others, named with the option layers")
        context.say(f"left out {', '.join(map(str, dropped))} of {len(layers)} layers")
        return {"dropped": dropped, **figures}

    def _check(self, layers: Layers) -> None:
        """Raise `UsageError` for more layers than may go, or for one that may not."""
        total, kept = len(layers), set(range(len(layers)))
        if not self.layers:
            most = len(_first(layers, range(total), total))
            if self.drop > most:
                raise UsageError(f"depth: cannot leave out {self.drop} of {total} layers, at most {most}", hint=STAY)
        if len(set(self.layers)) < len(self.layers) or not kept.issuperset(self.layers):
            raise UsageError(f"depth: layers are {list(self.layers)}, expected different numbers from 0 to {total - 1}")
        for number in self.layers:
            if number not in layers.droppable(kept):
                raise UsageError(f"depth: layer {number} cannot go", hint=STAY)
            kept.remove(number)


def _first(layers: Layers, order: Sequence[int], count: int) -> list[int]:
    """The first `count` of `order` that may go, one after the other."""
    kept, dropped = set(range(len(layers))), list[int]()
    for number in order:
        if len(dropped) < count and number in layers.droppable(kept):
            kept.remove(number)
            dropped.append(number)
    return dropped


def _random(layers: Layers, count: int, seed: int) -> list[int]:
    """`count` at random; with the same seed those of a smaller count are among them."""
    import numpy as np

    return _first(layers, np.random.default_rng(seed).permutation(len(layers)).tolist(), count)


# ── Block influence ─────────────────────────────────────────────────────────


def influence(layers: Layers, batches: Sequence[Inputs]) -> list[float]:
    """1 − E[cos(x_in, x_out)] of every layer over all real tokens, in float64."""
    import torch

    pairs: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def hook(number: int) -> Any:
        def note(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            before = arguments[0] if arguments else named["hidden_states"]
            pairs.append((number, before, output[0] if isinstance(output, tuple) else output))

        return note

    handles = [layer.register_forward_hook(hook(number), with_kwargs=True) for number, layer in enumerate(layers.all)]
    sums, counts = [0.0] * len(layers), [0] * len(layers)
    try:
        for _, real in read(layers.model, batches):
            for number, before, after in pairs:
                cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
                if cosine.shape == real.shape:  # the rows of a decoder have no padding of its encoder's length
                    cosine = cosine[real]
                sums[number] += float(cosine.sum())
                counts[number] += cosine.numel()
            pairs.clear()
    finally:
        for handle in handles:
            handle.remove()
    return [1.0 - total / count for total, count in zip(sums, counts, strict=True)]


# ── Greedy ──────────────────────────────────────────────────────────────────


def greedy(layers: Layers, context: Context, count: int, rows: int) -> tuple[list[int], list[float]]:
    """The layers left out in their order, and after each the distance from the original: the mean over the first `rows`
    calibration rows, each with the same weight.

    What the original says is computed anew for each row: kept, it would be as large as tokens times vocabulary.
    """
    kept, dropped, costs = set(range(len(layers))), list[int](), list[float]()
    batches = list(_rows(context.batches, rows))
    for _ in range(count):
        tried = layers.droppable(kept)
        totals = dict.fromkeys(tried, 0.0)
        for batch in batches:
            original = _outputs(layers, range(len(layers)), batch)
            for number, said in _without_each(layers, kept, tried, batch):
                totals[number] += distance(original, said)
        best = min(tried, key=totals.__getitem__)
        kept.remove(best)
        dropped.append(best)
        costs.append(totals[best] / len(batches))
        context.say(f"without layer {best}: {costs[-1]:.4f} from the original")
    return dropped, costs


def _without_each(
    layers: Layers, kept: Set[int], tried: Sequence[int], batch: Inputs
) -> Iterator[tuple[int, tuple[str, torch.Tensor]]]:
    """What the model with the layers `kept` says of one row without each of `tried`, which ascend. Layers before it say
    again what they said with all: only those after it are computed anew."""
    said: dict[int, Any] = {}

    def hook(number: int) -> Any:
        def note(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
            said[number] = output

        return note

    handles = [layers.all[number].register_forward_hook(hook(number)) for number in kept]
    try:
        _outputs(layers, kept, batch)
    finally:
        for handle in handles:
            handle.remove()
    try:
        for number in tried:
            for before in kept:
                if before < number:
                    vars(layers.all[before])["forward"] = partial(_again, said[before])
            yield number, _outputs(layers, kept - {number}, batch)
    finally:
        for before in kept:
            vars(layers.all[before]).pop("forward", None)


def _again(said: Any, *arguments: Any, **named: Any) -> Any:
    return said


def _rows(batches: Sequence[Inputs], count: int) -> Iterator[Inputs]:
    """The first `count` rows, one at a time."""
    rows = ((batch, row) for batch in batches for row in range(len(batch["attention_mask"])))
    for (batch, row), _ in zip(rows, range(count), strict=False):
        yield {name: values[row : row + 1] for name, values in batch.items()}


def _outputs(layers: Layers, kept: Collection[int], batch: Inputs) -> tuple[str, torch.Tensor]:
    """What the model with the layers `kept` says of one row: `logits` as log-probabilities (positions, classes), or
    `states` (positions, width). Positions that are padding are left out."""
    layers.keep(kept)
    ((output, real),) = read(layers.model, [batch])
    found, config = output[0][0], layers.model.config
    if found.ndim == 2 and "decoder_input_ids" not in batch:
        found = found[real[0]]
    exclusive = found.ndim == 2 or (config.num_labels > 1 and config.problem_type != "multi_label_classification")
    if "logits" in output and exclusive:
        return "logits", found.log_softmax(-1)
    if "last_hidden_state" in output:
        return "states", found
    raise UnsupportedError(
        f"greedy compares likelihoods or embeddings, and {type(layers.model).__name__} gives neither",
        hint="use method=influence",
    )


def distance(original: tuple[str, torch.Tensor], other: tuple[str, torch.Tensor]) -> float:
    """KL(original ‖ other) in nats, the mean over positions; of hidden states 1 − cos, alike."""
    import torch

    (kind, before), (_, after) = original, other
    if kind == "logits":
        return float((before.exp() * (before - after)).sum(-1).double().mean())
    return 1.0 - float(torch.nn.functional.cosine_similarity(before, after, dim=-1).double().mean())
