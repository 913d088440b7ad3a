"""Rows of the tables that a vocabulary has in a model: embedding, head, and what is added to the head's logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightship.compression._named_ids import mapped
from lightship.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

PROBE = 24  # tokens to compare both models on
AGREES = 1e-4  # of the largest output: the same sums, blocked in another way


def cut_tables(model: Any, kept: Sequence[int]) -> None:
    """Leave the rows `kept` of every table of `model`, and name the new ids in its configuration. Tables that were one
    stay one.

    Raises `UnsupportedError` when the model does not compute what it did: then it uses ids in a way not known here.
    """
    import torch

    ids = torch.tensor(list(kept))
    new = {token: row for row, token in enumerate(kept)}
    probe = ids[torch.linspace(0, len(ids) - 1, min(PROBE, len(ids))).long()][None]
    before = _outputs(model, probe)
    if model.get_output_embeddings() is not None:
        before = before[..., ids]
    _cut(model, ids, new)
    after = _outputs(model, torch.tensor([[new[token] for token in probe[0].tolist()]]))
    if after.shape != before.shape or (after - before).abs().max() > AGREES * before.abs().max():
        raise UnsupportedError(f"{type(model).__name__} computes something else after its vocabulary was cut",
                               hint="it uses token ids in a way that this step does not know")  # fmt: skip


def _cut(model: Any, ids: torch.Tensor, new: Mapping[int, int]) -> None:
    import torch

    from lightship.low_rank import LowRank, LowRankEmbedding

    tables = {id(table.weight): table.weight for table in _tables(model)}
    rows = {key: torch.nn.Parameter(weight.data[ids], weight.requires_grad) for key, weight in tables.items()}
    for module in model.modules():
        key = id(getattr(module, "weight", None))
        if key not in rows or isinstance(module, LowRank | LowRankEmbedding):  # of those the part with the rows
            continue
        module.weight = rows[key]
        if isinstance(module, torch.nn.Embedding):
            module.num_embeddings, module.padding_idx = len(ids), new.get(module.padding_idx)
        else:
            module.out_features = len(ids)
            if module.bias is not None:
                module.bias = torch.nn.Parameter(module.bias.data[ids], module.bias.requires_grad)
    if getattr(model, "final_logits_bias", None) is not None:
        model.final_logits_bias = model.final_logits_bias[:, ids]
    for config in (model.config, getattr(model, "generation_config", None)):
        before = {} if config is None else config.to_dict()
        after = mapped(before, new)
        for name in ("vocab_size", "decoder_vocab_size"):
            if after.get(name) is not None:
                after[name] = len(ids)
        for name, value in after.items():
            if value != before[name]:
                setattr(config, name, value)


def _tables(model: Any) -> list[Any]:
    """The modules whose weight has a row for each token: of the model, and of its encoder and decoder."""
    parts = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else []
    found = [part.get_input_embeddings() for part in (model, *parts)]
    return [table for table in (*found, model.get_output_embeddings()) if table is not None]


def _outputs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    import torch

    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids
    with torch.inference_mode():
        found: torch.Tensor = model(**given).to_tuple()[0]
    return found
