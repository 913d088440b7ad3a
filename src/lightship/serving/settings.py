"""How a bundle is served: everything that `lightship serve` can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lightship.bundle import Bundle
from lightship.engine import MAX_CONCURRENT, EngineSettings
from lightship.serving.keys import usual_path
from lightship.serving.limits import Limits
from lightship.serving.placement import Workers
from lightship.serving.supervisor import Care
from lightship.tuning import Entry


@dataclass(frozen=True)
class ServeSettings:
    """Times are seconds.

    `workers` and `cores` say how many engines there are and where, see `placement.places`; what `engine`,
    `max_concurrent` and `care` say holds for each of them. `name`: of the model in the API, whatever bundle is served;
    None for that of the first. `keys`: the key file, None for a server without keys. `max_context`: tokens of prompt
    and answer together, None for what the model has. `max_concurrent`: sequences that run together; `max_queue`:
    requests that wait. `first_token_deadline`: from arrival to the first token; `total_deadline`: to the last, None for
    none. `drain`: what runs may take so long when the server ends. `use_tuned`: take what `lightship tune` found out
    here, where it fits; `tuned` is what was found, see `serving.tuned`, `tuned_ignored` the `file` and the `reason` why
    it could not be used; `target`: of the bundle, None for its first. `draft`: what `open_draft` opened, whose model
    proposes tokens to every bundle that is served.
    `metrics_port`: None puts /metrics beside the API. `vllm_names`: export metrics under vLLM's names too. `log`: a
    line for each request goes there; None for none, 2 for standard error.
    """

    engine: EngineSettings = field(default_factory=EngineSettings)
    workers: Workers = 1
    cores: tuple[str, ...] = ()
    name: str | None = None
    target: str | None = None
    use_tuned: bool = True
    tuned: Entry | None = None
    tuned_ignored: Mapping[str, str] | None = None
    draft: Bundle | None = None
    keys: Path | None = field(default_factory=usual_path)
    tls_cert: Path | None = None
    tls_key: Path | None = None
    behind_proxy: bool = False
    share_prefix_cache: bool = False
    max_context: int | None = None
    max_concurrent: int = MAX_CONCURRENT
    max_queue: int = 256
    first_token_deadline: float = 60.0
    total_deadline: float | None = None
    scoring: bool = True
    drain: float = 30.0
    metrics_port: int | None = None
    vllm_names: bool = False
    log: Path | int | None = None
    log_prompts: bool = False
    care: Care = field(default_factory=Care)
    limits: Limits = field(default_factory=Limits)

    @property
    def cared(self) -> Care:
        """`care`, which knows for how long requests wait for an engine."""
        return replace(self.care, wait=min(self.care.wait, self.first_token_deadline))
