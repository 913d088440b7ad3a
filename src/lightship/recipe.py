"""What to build: source, target, precision, evaluation, limits. Data only; nothing in a recipe can run code."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lightship.errors import UsageError

PrecisionName = Literal["fp32", "bf16", "int8", "int4"]
PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "bf16", "int8", "int4")
# Mean KL divergence (nats per token) from the original that a candidate may reach before the run stops.
KLD_LIMITS: dict[str, float] = {"fp32": 1e-4, "bf16": 1e-2, "int8": 2e-2, "int4": 0.15}


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Precision(_Data):
    """The precision of the weights. Every option after `arithmetic` concerns int4 only."""

    name: PrecisionName = "int8"
    arithmetic: Literal["auto", "f32"] = Field("auto", description="what it computes in; auto: the processor's fastest")
    group_size: int = Field(64, ge=16, le=1024, description="weights along the input that share one scale")
    ratio: float = Field(1.0, ge=0.0, le=1.0, description="share of the body in int4; the rest is int8")
    all_layers: bool = Field(False, description="embedding and head in int4 too (else int8)")
    awq: bool = Field(True, description="activation-aware weight scaling (Lin et al. 2023, arXiv:2306.00978)")
    scale_estimation: bool = Field(True, description="scales that minimise the layer's output error")
    gptq: bool = Field(False, description="error-compensated rounding (Frantar et al. 2022, arXiv:2210.17323)")


class Recipe(_Data):
    """One ship run. `accept` replaces the default limits on purpose and is recorded in the report."""

    source: str
    revision: str | None = None
    target: str = "openvino"
    precision: Precision = Precision()
    evaluate: Literal["quick", "full"] = "quick"
    text: str | None = Field(None, description="file to score on: plain text or chat JSONL")
    golden: str | None = Field(None, description="file of golden cases (JSONL)")
    accept: tuple[str, ...] = ()

    @field_validator("accept")
    @classmethod
    def _readable(cls, accept: tuple[str, ...]) -> tuple[str, ...]:
        parse_accepts(accept)
        return accept

    def kld_limit(self) -> float:
        """The limit on mean KLD, an accepted one before the default."""
        return parse_accepts(self.accept).get("kld", KLD_LIMITS[self.precision.name])


def parse_accepts(accepts: tuple[str, ...]) -> dict[str, float]:
    """`("kld<=0.3",)` → `{"kld": 0.3}`. Raises `UsageError` for anything else."""
    limits = {}
    for text in accepts:
        name, separator, value = text.partition("<=")
        try:
            limits[name.strip()] = float(value)
        except ValueError:
            separator = ""
        if not separator or name.strip() != "kld" or not 0 < limits[name.strip()] < float("inf"):
            raise UsageError(f"cannot read the limit {text!r}", hint='write for example --accept "kld<=0.3"')
    return limits
