"""Cut MLP channels and whole key-value groups of heads; what remains can be fitted to what was there.

Importance by activation is that of Wanda-sp and FLAP (An et al. 2024, arXiv:2312.11983), here in the metric of the
answers' Fisher information too; Minitron (arXiv:2407.14679) cuts alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lightship.checkpoint import Checkpoint
from lightship.compression._activations import norms, second_moments
from lightship.compression._gradients import fisher, gradient_bytes
from lightship.compression._rebuilt import changed, check_rebuilt
from lightship.compression._units import Kind, Units, allocate, heads, inputs_of, mlps, refit, spread
from lightship.errors import UsageError
from lightship.step import Context, Need, WeightStep
from lightship.structure import llama_layers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CHANNELS = ("intermediate_size", "n_inner", "d_ff", "hidden_dim", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")
MOMENTS = 2**30  # bytes of second moments that are held at a time
RIDGE = 0.1  # of the mean of the diagonal; at 0.001 a fit to 3 000 tokens made the demo model worse than none


class Width(WeightStep):
    """Cut heads and MLP channels out of every layer: as much less work, in every runtime. Heads are cut together with
    their keys and values, in whole groups."""

    serves: ClassVar[Need] = "compute"
    trial: ClassVar[Mapping[str, Any]] = {"mlp": 0.9}

    heads: float = Field(1.0, gt=0.0, le=1.0, description="share of the key-value groups that stay, at most")
    mlp: float = Field(0.9, gt=0.0, le=1.0, description="share of the MLP's channels that stay, at most")
    uniform: bool = Field(
        True,
        description="cut every layer to the same sizes, so that config.json says all; else the least important go "
        "wherever they are, and structure.json has the sizes",
    )
    importance: Literal["fisher", "activation", "magnitude", "random"] = Field(
        "fisher",
        description="of a unit: the energy that it adds to the output on the calibration set (activation), weighted "
        "by what the answers depend on (fisher); the size of its weights; or random, a control",
    )
    update: bool = Field(True, description="fit the weights that read the rest to what the whole layer computes")
    multiple: int = Field(64, ge=1, description="channels stay in multiples of this: groups of weights share a scale")

    def predicted_bytes(self, checkpoint: Checkpoint) -> int:
        sizes = [checkpoint.config.get(name) for name in CHANNELS]
        largest = max((size for size in sizes if isinstance(size, int)), default=0)
        more = gradient_bytes(checkpoint) if self.importance == "fisher" else 0
        return super().predicted_bytes(checkpoint) + self.update * (MOMENTS + 8 * largest**2) + more

    def change(self, model: PreTrainedModel, context: Context) -> dict[str, Any]:
        before = sum(each.numel() for each in model.parameters())
        kinds = self._kinds(model)
        if not kinds:
            raise self._nothing()
        if self.uniform:
            counts = {name: _even(kind) for name, kind in kinds.items()}
            changes = configuration(model, kinds, counts)  # refused before anything is read
        scores = self._scores(model, kinds, context)
        if not self.uniform:
            counts = {name: allocate(scores[name], kind.share, kind.multiple) for name, kind in kinds.items()}
        cut = [(units, _best(score, left)) for name, kind in kinds.items()
               for units, score, left in zip(kind.units, scores[name], counts[name], strict=True)
               if left < units.count]  # fmt: skip
        if not cut:
            raise self._nothing()
        for some in _batched(cut) if self.update else [cut]:
            moments = second_moments(model, {each.name: each.reader for each, _ in some}, context.batches) \
                if self.update else {}  # fmt: skip
            for units, kept in some:
                self._cut(units, kept, moments.get(units.name))
        for name, value in (changes if self.uniform else {}).items():
            setattr(model.config, name, value)
        check_rebuilt(model, hint="other shares, or uniform=false, may do")
        after = sum(each.numel() for each in model.parameters())
        context.say(f"{after / before:.1%} of the parameters stay")
        return {"kept": counts, "parameters": after, "of": before}

    def _nothing(self) -> UsageError:
        return UsageError(f"width: heads={self.heads:g} and mlp={self.mlp:g} would cut nothing",
                          hint=f"channels are cut in steps of {self.multiple} (the option multiple)")  # fmt: skip

    def _kinds(self, model: PreTrainedModel) -> dict[str, Kind]:
        """What is to be cut, by the name of its option."""
        if not self.uniform:
            llama_layers(model)  # others cannot differ from layer to layer
        found = {}
        if self.heads < 1.0:
            found["heads"] = Kind("heads", heads(model), self.heads, 1)
        if self.mlp < 1.0:
            found["mlp"] = Kind("mlp", mlps(model), self.mlp, self.multiple)
        return found

    def _scores(
        self, model: PreTrainedModel, kinds: dict[str, Kind], context: Context
    ) -> dict[str, list[torch.Tensor]]:
        """The importance of every unit, such that layers can be compared: nats of the answers, or the share of what
        all of its kind have in its layer."""
        import torch

        draw = torch.Generator().manual_seed(context.seed)
        readers = {units.name: units.reader for kind in kinds.values() for units in kind.units}
        seen = norms(model, readers, context.batches) if self.importance in ("fisher", "activation") else {}
        asked = fisher(model, readers, context.batches, context.seed) if self.importance == "fisher" else {}
        found: dict[str, list[torch.Tensor]] = {}
        for name, kind in kinds.items():
            found[name] = []
            for units in kind.units:
                if self.importance == "random":
                    score = torch.rand(units.count, generator=draw, dtype=torch.float64)
                elif self.importance == "magnitude":
                    score = units.size()
                else:
                    score = units.energy(seen[units.name], asked.get(units.name))
                found[name].append(score if self.importance == "fisher" else score / score.sum())
        return found

    def _cut(self, units: Units, kept: torch.Tensor, moments: torch.Tensor | None) -> None:
        """Leave the units `kept`, their reader fitted where `moments` of what it reads are given."""
        new = None
        if moments is not None:
            new = refit(inputs_of(units.reader), moments, spread(kept, units.width), RIDGE)
        units.keep(kept, new)


def _even(kind: Kind) -> list[int]:
    """The same number of units for every layer. Raises `UsageError` where none would be left, or where the layers have
    different numbers already."""
    sizes = {units.count for units in kind.units}
    if len(sizes) > 1:
        raise UsageError(f"width: layers have from {min(sizes)} to {max(sizes)} units of {kind.name} already",
                         hint="go on with uniform=false")  # fmt: skip
    (size,) = sizes
    left = int(kind.share * size + 1e-9) // kind.multiple * kind.multiple
    if not left:
        least = min(kind.multiple, size)
        raise UsageError(f"width: {kind.name}={kind.share:g} leaves none of {size} in steps of {kind.multiple}",
                         hint=f"at least {least / size:.3g}, or a smaller multiple")  # fmt: skip
    return [left] * len(kind.units)


def _best(score: torch.Tensor, count: int) -> torch.Tensor:
    """The indices of the `count` largest, ascending; of equal ones the first."""
    found: torch.Tensor = score.argsort(descending=True, stable=True)[:count].sort().values
    return found


def _batched(cut: Sequence[tuple[Units, torch.Tensor]]) -> Iterator[list[tuple[Units, torch.Tensor]]]:
    """`cut` in parts whose second moments fit into `MOMENTS` bytes; one at least."""
    held: list[tuple[Units, torch.Tensor]] = []
    size = 0
    for units, kept in cut:
        here = 8 * (units.count * units.width) ** 2
        if held and size + here > MOMENTS:
            yield held
            held, size = [], 0
        held.append((units, kept))
        size += here
    if held:
        yield held


def configuration(model: PreTrainedModel, kinds: dict[str, Kind], counts: dict[str, list[int]]) -> dict[str, int]:
    """What the configuration must say of layers that are all of these sizes. Raises `UnsupportedError` where
    transformers does not take it."""
    config = model.config
    changes: dict[str, int] = {}
    if "heads" in kinds:
        size, left = model.get_submodule(kinds["heads"].owner).head_dim, counts["heads"][0]
        changes |= {"num_attention_heads": left * kinds["heads"].units[0].width // size, "num_key_value_heads": left}
        changes |= {"head_dim": size}
    if "mlp" in kinds:
        before, left = kinds["mlp"].units[0].count, counts["mlp"][0]
        names = [name for name in CHANNELS if getattr(config, name, None) == before]
        changes |= dict.fromkeys(names or ["n_inner"], left)
    changed(model, changes, hint="another share of heads, or uniform=false")
    return changes
