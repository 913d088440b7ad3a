"""What a model is for, by its configuration: a decoder goes on with a text, an encoder-decoder (`seq2seq`) writes
another; an encoder classifies, embeds, or finds answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from lightship.errors import UnsupportedError

Kind = Literal["decoder", "seq2seq", "classifier", "embedder", "qa"]
KINDS: tuple[Kind, ...] = get_args(Kind)
GENERATORS: tuple[Kind, ...] = ("decoder", "seq2seq")
ENDINGS: dict[str, Kind] = {
    "ForCausalLM": "decoder", "LMHeadModel": "decoder", "ForSequenceClassification": "classifier",
    "ForQuestionAnswering": "qa",
}  # fmt: skip
# The class of transformers that loads each.
AUTO: dict[Kind, str] = {
    "decoder": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM",
    "classifier": "AutoModelForSequenceClassification", "embedder": "AutoModel", "qa": "AutoModelForQuestionAnswering",
}  # fmt: skip
# Encoder-decoders of text, by model type: others of that build hear or see.
SEQ2SEQ = frozenset({
    "bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5", "umt5",
})  # fmt: skip
SEQ2SEQ_ENDINGS = ("ForConditionalGeneration", "MTModel")
# Bare encoders, whose last hidden state is pooled. The bare body of a decoder embeds nothing without training for it.
BODIES = frozenset({
    "AlbertModel", "BertModel", "CamembertModel", "DebertaModel", "DebertaV2Model", "DistilBertModel", "ElectraModel",
    "ErnieModel", "MPNetModel", "ModernBertModel", "NomicBertModel", "RobertaModel", "XLMRobertaModel",
})  # fmt: skip
SUPPORTED = "…ForCausalLM, …LMHeadModel, …ForSequenceClassification, …ForQuestionAnswering, and encoders such as "


def kind_of(config: Mapping[str, Any]) -> Kind:
    """What the model of a `config.json` is, by its `architectures`; one that names none is taken for a decoder.

    Raises `UnsupportedError` for everything else.
    """
    named = config.get("architectures") or []
    hint = f"supported are {SUPPORTED}{', '.join(sorted(BODIES))}"
    if config.get("is_encoder_decoder") or config.get("model_type") in SEQ2SEQ:
        return _seq2seq(config, named)
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


def _seq2seq(config: Mapping[str, Any], named: Any) -> Kind:
    """`seq2seq`, if it is one that is known and has its head."""
    kind = config.get("model_type")
    headed = not named or (isinstance(named, list) and len(named) == 1 and str(named[0]).endswith(SEQ2SEQ_ENDINGS))
    if kind in SEQ2SEQ and headed:
        return "seq2seq"
    problem = f"the architecture {str(named)[:100]}" if kind in SEQ2SEQ else f"the encoder-decoder {str(kind)[:60]!r}"
    raise UnsupportedError(
        f"{problem} is not supported",
        hint=f"supported are encoder-decoders that write text: {', '.join(sorted(SEQ2SEQ))}, with their language head",
    )
