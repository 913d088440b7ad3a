"""What `lightship tune` found out about a bundle on a machine: a file next to the bundle, which `serve` reads.

`<bundle folder>.tuned.json` is not signed. So it holds settings of the engine within bounds, figures and words, and
nothing that names a file or could run; whoever can write it can make a server slow or less exact, and no more.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lightship import machine
from lightship.draft import TARGET
from lightship.engine import EngineSettings
from lightship.errors import LightshipError, UsageError
from lightship.report import figure, table

FORMAT: Literal["lightship-tuned"] = "lightship-tuned"
VERSION: Literal[1] = 1
SIZE_LIMIT = 2**20  # bytes
MOST_ENTRIES = 64
LIBRARIES = ("lightship", "openvino", "openvino-genai", "onnxruntime")  # what the speed of a served decoder depends on
Text = Annotated[str, Field(max_length=300)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Chosen(_Data):
    """The settings that may be tuned, each within its bounds; those of `EngineSettings` that are not here may not."""

    inference_precision: Literal["f32", "bf16", "f16"] | None = None
    kv_precision: Literal["f32", "bf16", "f16", "u8", "u4"] | None = None
    dynamic_quantisation_group: int | None = Field(None, ge=0, le=4096)
    max_batched_tokens: int = Field(EngineSettings.max_batched_tokens, ge=16, le=2**16)
    max_num_seqs: int = Field(EngineSettings.max_num_seqs, ge=1, le=4096)
    prefix_cache: bool = EngineSettings.prefix_cache
    threads: int | None = Field(None, ge=1, le=1024)
    prompt_lookup: int = Field(0, ge=0, le=64)
    draft_tokens: int = Field(0, ge=0, le=64)

    @staticmethod
    def of(settings: EngineSettings) -> Chosen:
        """Those of `settings`."""
        return Chosen(**{name: getattr(settings, name) for name in Chosen.model_fields})

    def on(self, given: EngineSettings) -> EngineSettings:
        """`given` with these in place of what it leaves at its default."""
        usual, found = EngineSettings(), dict(self)
        return replace(given, **{n: v for n, v in found.items() if getattr(given, n) == getattr(usual, n)})


class Workload(_Data):
    """The load that was put on: `clients` ask one request after the other, prompts of `tokens_in`, answers of
    `tokens_out` tokens at most. `shared`: the share of a prompt that all have in common. `limits`: seconds of the 90th
    percentiles of `ttft` and `tpot` that were to be kept."""

    clients: int = Field(ge=1, le=4096)
    tokens_in: int = Field(ge=1, le=10**7)
    tokens_out: int = Field(ge=2, le=10**7)
    task: Literal["text", "copy"] = "text"
    shared: float = Field(0.0, ge=0, le=1)
    kv_cache_gb: int = Field(1, ge=1, le=1024)
    limits: dict[Literal["ttft", "tpot"], Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}

    def said(self) -> str:
        """`16 clients, 200 tokens in, 64 out`."""
        clients = "1 client" if self.clients == 1 else f"{self.clients} clients"
        task = ", copying" if self.task == "copy" else ""
        shared = f" ({self.shared:.0%} shared)" if self.shared else ""
        return f"{clients}, {self.tokens_in} tokens in{shared}, {self.tokens_out} out{task}"


class Figures(_Data):
    """Medians over `n` runs of a load, seconds and output tokens a second; `least` and `most` are the slowest and the
    fastest run."""

    tokens_per_second: Number
    least: Number
    most: Number
    n: int = Field(ge=1, le=10**6)
    ttft_p50: Number
    ttft_p90: Number
    tpot_p50: Number
    tpot_p90: Number


class Row(_Data):
    """One candidate of the table. `verdict` begins with `winner`, `kept`, `no better`, `stopped`, `rejected`, `failed`
    or `not measured`. `screening` is the first short run, `final` the repeated, alternating ones; `kld` of the golden
    rows and `served` (mean |Δ log p| of the served path), nats, where they were asked for."""

    label: Text
    target: str = Field(pattern=r"^[a-z][a-z0-9_]{0,40}$")
    settings: Chosen
    verdict: Text
    screening: Figures | None = None
    final: Figures | None = None
    kld: float | None = Field(None, allow_inf_nan=False)
    served: Number | None = None

    @property
    def figures(self) -> Figures | None:
        """The best that is known of its speed."""
        return self.final or self.screening


class Entry(_Data):
    """One run of `tune`: of which bundle and draft, by their digests, where, with what, under which load, and what came
    out. The winner is in `rows` too."""

    bundle: str = Field(pattern=r"^[0-9a-f]{64}$")
    draft: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    machine: dict[Text, Text | int | float | list[Text] | None]
    versions: dict[Text, Text]
    workload: Workload
    target: str = Field(pattern=r"^[a-z][a-z0-9_]{0,40}$")
    settings: Chosen
    figures: Figures
    baseline: Figures
    kld: float | None = Field(None, allow_inf_nan=False)
    limit_kld: Number
    rows: list[Row] = Field(max_length=200)
    seconds: Number
    created: Text

    def fits(
        self, bundle: str, here: Mapping[str, Any], with_: Mapping[str, str], draft: str | None = None
    ) -> str | None:
        """None when it was measured on that bundle, machine and versions, with that draft; else what differs."""
        if self.bundle != bundle:
            return "it was measured with another bundle"
        if self.draft != draft and (draft or self.settings.draft_tokens):
            return "it was measured with another draft or none" if draft else "it was measured with a draft"
        if self.machine != here:
            return f"it was measured on another machine ({self.machine.get('cpu')}, {self.machine.get('cores')} cores)"
        differ = [name for name in {*self.versions, *with_} if self.versions.get(name) != with_.get(name)]
        return f"it was measured with other versions of {', '.join(sorted(differ))}" if differ else None


class _File(_Data):
    format: Literal["lightship-tuned"]
    version: Literal[1]
    entries: list[Entry] = Field(max_length=MOST_ENTRIES)


def here() -> dict[str, Any]:
    """What a figure depends on of this machine, and what would not change under it from one start to the next."""
    import psutil

    found, memory = machine.machine(), psutil.virtual_memory().total
    return {"cpu": found["cpu"], "cores": found["cores"], "features": found["features"],
            "cpu_quota": machine.cpu_quota(), "memory_gb": round(memory / machine.GB)}  # fmt: skip


def versions() -> dict[str, str]:
    """The versions of what serves."""
    return {name: version for name, version in machine.versions().items() if name in LIBRARIES}


def place(bundle: Path) -> Path:
    """Where the file of the bundle in that folder lies: next to the folder itself, not to a link to it."""
    folder = bundle.resolve()
    return folder.parent / f"{folder.name}.tuned.json"


# ── Reading ─────────────────────────────────────────────────────────────────


def read(path: Path) -> list[Entry]:
    """The entries in the file at `path`. Raises `UsageError` for one that is not what `write` writes; never follows a
    link. `FileNotFoundError` when there is none."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with open(path, "rb", opener=lambda name, _: os.open(name, flags)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UsageError(f"{path} is not a regular file")
            raw = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if len(raw) > SIZE_LIMIT:
        raise UsageError(f"{path} is larger than {SIZE_LIMIT} bytes")
    return _parsed(path, raw)


def _parsed(path: Path, raw: bytes) -> list[Entry]:
    try:
        data = json.loads(raw, parse_constant=_no_constant, object_pairs_hook=_once)
        if isinstance(data, dict) and data.get("format") == FORMAT and data.get("version") != VERSION:
            raise UsageError(f"{path} has version {str(data.get('version'))[:20]}; this lightship reads {VERSION}")
        return _File.model_validate(data).entries
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(map(str, first["loc"]))
        raise UsageError(f"{path} is damaged or was not written by lightship: {at}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; no key twice, or two readers could read two things."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


@dataclass(frozen=True)
class Found:
    """What `choose` found: the entry to use, if any, and what to tell about it."""

    entry: Entry | None
    said: str | None


def choose(bundle: Path, digest: str, targets: list[str], target: str | None = None, draft: str | None = None) -> Found:
    """The newest entry next to `bundle` that fits its `digest`, this machine, these versions, the digest of its
    `draft`, and one of its `targets`: `target`, where that is given. A file that is damaged or fits nothing here is
    passed over, and `said` tells why; raises nothing."""
    path = place(bundle)
    try:
        entries = read(path)
    except FileNotFoundError:
        return Found(None, None)
    except LightshipError as error:
        return Found(None, f"ignored the tuned settings: {error.message}; run `lightship tune` again")
    misfits = []
    for entry in reversed(entries):
        problem = entry.fits(digest, here(), versions(), draft)
        if problem is None and entry.target not in targets:
            problem = f"the bundle has no target {entry.target}"
        if problem is None and target not in (None, entry.target):
            problem = f"it was measured with {entry.target}, and {target} was asked for"
        if problem is None and entry.settings.draft_tokens and entry.target != TARGET:
            problem = f"it has a draft, and {entry.target} takes none"
        if problem is None:
            return Found(
                entry, f"settings tuned here for {entry.workload.said()}: {label(entry.target, entry.settings)}"
            )
        misfits.append(problem)
    said = f"ignored the tuned settings in {path.name}: {misfits[0]}; run `lightship tune` again" if misfits else None
    return Found(None, said)


def label(target: str, settings: Chosen, usual: Chosen | None = None) -> str:
    """`openvino, max_batched_tokens 1024`: what differs from the defaults; `openvino, defaults` for none."""
    base = usual or Chosen()
    changed = [f"{name} {_shown(value)}" for name, value in dict(settings).items() if value != getattr(base, name)]
    return ", ".join([target, *(changed or ["defaults"])])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return "auto" if value is None else str(value)


# ── Writing ─────────────────────────────────────────────────────────────────


def write(bundle: Path, entry: Entry) -> Path:
    """Add `entry` to the file next to `bundle`, in one rename; returns its path. What was measured before with the same
    machine, versions and load is replaced, what belongs to another bundle is dropped. A damaged file is replaced.

    Raises `UsageError` when the folder cannot be written to.
    """
    path = place(bundle)
    try:
        before = read(path)
    except (FileNotFoundError, UsageError):
        before = []
    kept = [old for old in before if old.bundle == entry.bundle and not _same(old, entry)]
    file = _File(format=FORMAT, version=VERSION, entries=[*kept, entry][-MOST_ENTRIES:])
    text = json.dumps(file.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("x", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", hint="tune a copy that lies in a folder of yours"
                         ) from error  # fmt: skip
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _same(old: Entry, new: Entry) -> bool:
    names = ("machine", "versions", "workload", "draft")
    return all(getattr(old, name) == getattr(new, name) for name in names)


# ── For people ──────────────────────────────────────────────────────────────


def parse_limits(limits: Sequence[str]) -> dict[str, float]:
    """`("ttft=3", "tpot=0.25")` → seconds by name. Raises `UsageError` for anything else."""
    found: dict[str, float] = {}
    for text in limits:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            found[name.strip()] = float("nan")
        if name.strip() not in ("ttft", "tpot") or not 0 < found[name.strip()] < float("inf"):
            raise UsageError(f"cannot read the limit {text!r}", hint="write for example --limit ttft=3")
    return found


def to_markdown(entry: Entry) -> str:
    """The table of an entry: what was tried, what came out, and why one was not taken."""
    head = ["settings", "tokens/s", "range", "n", "TTFT p50", "p90", "TPOT p50", "p90", "KLD", "verdict"]
    rows = [head, *map(_cells, sorted(entry.rows, key=_order))]
    on = f"{entry.machine.get('cpu')}, {entry.machine.get('cores')} cores"
    return "\n".join([
        f"**{entry.workload.said()}: {label(entry.target, entry.settings)}, "
        f"{figure(entry.figures.tokens_per_second)} tokens/s "
        f"(defaults {figure(entry.baseline.tokens_per_second)})**\n",
        table(rows),
        "- tokens/s are output tokens over the whole run; seconds of TTFT and TPOT; n runs, median",
        "- runs with n = 1 are short and only decide who goes on; the last ones, in turns, decide who wins",
        f"- limit on the KLD of the golden rows {entry.limit_kld:g}; {on}; "
        + ", ".join(f"{name} {version}" for name, version in sorted(entry.versions.items())),
        f"- {entry.seconds:.0f} s, {entry.created}",
    ])  # fmt: skip


def _order(row: Row) -> tuple[bool, float]:
    return not row.verdict.startswith("winner"), -(row.figures.tokens_per_second if row.figures else -1.0)


def _cells(row: Row) -> list[str]:
    found = row.figures
    kld = "" if row.kld is None else figure(row.kld)
    if found is None:
        return [row.label, *[""] * 7, kld, row.verdict]
    times = (found.ttft_p50, found.ttft_p90, found.tpot_p50, found.tpot_p90)
    spread = f"{figure(found.least)} – {figure(found.most)}" if found.n > 1 else ""
    return [row.label, figure(found.tokens_per_second), spread, str(found.n), *map(figure, times), kld, row.verdict]
