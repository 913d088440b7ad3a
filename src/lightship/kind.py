"""What a model is for, by its configuration: a decoder generates; an encoder classifies, embeds, or finds answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from lightship.errors import UnsupportedError

Kind = Literal["decoder", "classifier", "embedder", "qa"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ENDINGS: dict[str, Kind] = {
    "ForCausalLM": "decoder", "LMHeadModel": "decoder", "ForSequenceClassification": "classifier",
    "ForQuestionAnswering": "qa",
}  # fmt: skip
# The class of transformers that loads each.
AUTO: dict[Kind, str] = {
    "decoder": "AutoModelForCausalLM", "classifier": "AutoModelForSequenceClassification", "embedder": "AutoModel",
    "qa": "AutoModelForQuestionAnswering",
}  # fmt: skip
# Bare encoders, whose last hidden state is pooled. The bare body of a decoder embeds nothing without training for it.
BODIES = frozenset({
    "AlbertModel", "BertModel", "CamembertModel", "DebertaModel", "DebertaV2Model", "DistilBertModel", "ElectraModel",
    "ErnieModel", "MPNetModel", "ModernBertModel", "NomicBertModel", "RobertaModel", "XLMRobertaModel",
})  # fmt: skip
SUPPORTED = "…ForCausalLM, …LMHeadModel, …ForSequenceClassification, …ForQuestionAnswering, and encoders such as "


def kind_of(config: Mapping[str, Any]) -> Kind:
    """What the model of a `config.json` is, by its `architectures`; one that names none is taken for a decoder.

    Raises `UnsupportedError` for everything else, encoder-decoders included.
    """
    named = config.get("architectures") or []
    hint = f"supported are {SUPPORTED}{', '.join(sorted(BODIES))}"
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(f"{config.get('model_type')!r} is an encoder-decoder, which is not supported", hint=hint)
    if not named:
        return "decoder"
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str):
        raise UnsupportedError(f"config.json names the architectures {str(named)[:200]}; expected exactly one", hint)
    for ending, kind in ENDINGS.items():
        if named[0].endswith(ending):
            return kind
    if named[0] in BODIES:
        return "embedder"
    raise UnsupportedError(f"the architecture {named[0][:100]!r} is not supported", hint=hint)
