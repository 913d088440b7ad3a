"""A trained model at rest: safetensors, configuration, tokenizer, `structure.json` and `lineage.json` in one folder."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.errors import MissingExtra, SourceError, UnsupportedError, UsageError
from lightship.kept import FILE as KEPT_FILE
from lightship.kept import Kept
from lightship.kind import AUTO, Kind, kind_of
from lightship.structure import Structure, structure_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from transformers import PreTrainedModel

HEADER_LIMIT = 100 * 2**20  # bytes, as the safetensors format itself sets it
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors name → torch name
TOOL_USE = "additional_chat_templates/tool_use.jinja"  # the template for chats with tools, where it is one of its own
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "*.model", TOOL_USE, KEPT_FILE,
)  # fmt: skip
CARRIED = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    TOOL_USE, "special_tokens_map.json", "structure.json", KEPT_FILE, "modules.json", "sentence_bert_config.json",
)  # fmt: skip


def context_length(config: Mapping[str, Any]) -> int | None:
    """Tokens of context that a configuration names, None when it names none."""
    return next((config[key] for key in CONTEXT_KEYS if isinstance(config.get(key), int)), None)


def require(*packages: str, extra: str = "build") -> None:
    """Raise `MissingExtra` naming the first of `packages` that is not installed. Imports none of them."""
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtra(f"the package {package!r} is not installed", hint=f'pip install "lightship[{extra}]"')


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `SourceError` naming the file when it is missing or not one."""
    value = _parse(path)
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path} is missing", hint="a checkpoint folder needs it") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from error


def check_config(config: Mapping[str, Any], where: Path | str) -> None:
    """Raise `UnsupportedError` for a model that `load` refuses by its configuration: own code, quantised weights."""
    if "auto_map" in config:
        raise UnsupportedError(
            f"{where} needs its own code (auto_map in config.json); lightship runs no code from a model",
            hint="use a release of this model that transformers supports natively",
        )
    if config.get("quantization_config"):
        raise UnsupportedError(
            f"{where} is already quantised (quantization_config in config.json)",
            hint="give the original weights: quantising twice loses twice",
        )


def module_configs(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and configuration of each module in `modules.json` (sentence-transformers), such as `Pooling`; none without
    that file. Raises `SourceError` when it is not well formed or points elsewhere."""
    return [(name, read_json(folder / file) if file else {}) for name, file in _modules(folder)]


def module_files(folder: Path) -> list[str]:
    """The configuration files of the modules in `modules.json`, relative to `folder`."""
    return [file for _, file in _modules(folder) if file]


def _modules(folder: Path) -> list[tuple[str, str]]:
    """Name of each module, and its configuration file below `folder` where it has one."""
    path = folder / "modules.json"
    if not path.is_file():
        return []
    entries = _parse(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SourceError(f"{path} is no list of modules")
    found = []
    for entry in entries:
        place, kind = str(entry.get("path") or ""), str(entry.get("type") or "")
        if place and not re.fullmatch(r"[A-Za-z0-9][\w-]*", place):
            raise SourceError(f"{path} points outside its folder: {place[:200]!r}")
        file = f"{place}/config.json"
        found.append((kind.rpartition(".")[2], file if place and (folder / file).is_file() else ""))
    return found


def safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Name → dtype, shape and `data_offsets` of the tensors in `path`, no tensor read.

    Raises `SourceError` when the file is cut short or its header does not describe it exactly. Format: 8 bytes
    little-endian header length, JSON header, then the tensors without holes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise SourceError(f"{path} is cut short or no safetensors file ({size} bytes)", hint="fetch it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            spans = sorted((int(entry["data_offsets"][0]), int(entry["data_offsets"][1])) for entry in tensors.values())
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise SourceError(f"{path} has a damaged safetensors header: {error}", hint="fetch it again") from error
    end = 0
    for start, stop in spans:
        if start != end or stop < start:
            raise SourceError(f"{path} has tensors that overlap or leave holes at byte {start}", hint="fetch it again")
        end = stop
    if size != 8 + length + end:
        raise SourceError(f"{path} has {size} bytes, its header describes {8 + length + end}", hint="fetch it again")
    return tensors


@dataclass(frozen=True)
class Checkpoint:
    """A folder that `load` turns into a model. Nothing else in lightship loads weights."""

    folder: Path

    @property
    def config(self) -> dict[str, Any]:
        """The parsed `config.json`."""
        return read_json(self.folder / "config.json")

    @property
    def context_length(self) -> int:
        """Tokens that the model was made for. Raises `SourceError` when the configuration does not say."""
        config = self.config
        found = context_length(config)
        if found is None:
            raise SourceError(
                f"{self.folder / 'config.json'} does not say how many tokens of context the model was made for",
                hint=f"add one of {', '.join(CONTEXT_KEYS)}",
            )
        return found

    @property
    def kind(self) -> Kind:
        """What it is for. Raises `UnsupportedError` when that is nothing known here."""
        return kind_of(self.config)

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer. Raises `SourceError` when the configuration does not say."""
        found = self.config.get("vocab_size")
        if not isinstance(found, int):
            raise SourceError(f"{self.folder / 'config.json'} has no vocab_size", hint="is it a text model?")
        return found

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, from `generation_config.json`, else from `config.json`."""
        path = self.folder / "generation_config.json"
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        found = self.config.get("eos_token_id") if found is None else found
        return () if found is None else (found,) if isinstance(found, int) else tuple(int(each) for each in found)

    @property
    def dtype(self) -> str:
        """The dtype that most bytes of the weights have, such as `bfloat16`; the configuration is not believed."""
        sizes: Counter[str] = Counter()
        for path in self.weight_files:
            for entry in safetensors_header(path).values():
                if entry.get("dtype") in DTYPES:
                    sizes[DTYPES[entry["dtype"]]] += entry["data_offsets"][1] - entry["data_offsets"][0]
        if sizes:
            return sizes.most_common(1)[0][0]
        config = self.config
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """What made this checkpoint, oldest first: step, options, source, digest of the source, time."""
        path = self.folder / "lineage.json"
        if not path.is_file():
            return []
        entries = _parse(path)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise SourceError(f"{path} is no list of objects")
        return entries

    @property
    def structure(self) -> Structure:
        """How the model differs from `config.json`; empty where it does not."""
        path = self.folder / "structure.json"
        return Structure.read(read_json(path), path, self.config) if path.is_file() else Structure()

    @property
    def kept(self) -> Kept | None:
        """What `vocabulary.json` says, where the vocabulary was cut; else None."""
        path = self.folder / KEPT_FILE
        return Kept.read(read_json(path), path, self.vocabulary) if path.is_file() else None

    @property
    def kept_tokens(self) -> npt.NDArray[np.int64] | None:
        """The ids that its tokens have in the original, ascending, where the vocabulary was cut; else None."""
        kept = self.kept
        return None if kept is None else kept.ids

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files that `load` reads: `model.safetensors`, else those of the index, else all."""
        single, index = self.folder / "model.safetensors", self.folder / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return [self.folder / str(name) for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored tensor by name, from the headers."""
        headers = (safetensors_header(path) for path in self.weight_files)
        return {name: tuple(entry["shape"]) for header in headers for name, entry in header.items()}

    @property
    def weight_bytes(self) -> int:
        """Bytes of the safetensors files that make the model."""
        return sum(path.stat().st_size for path in self.weight_files)

    @property
    def size_bytes(self) -> int:
        """Bytes of weights, configuration and tokenizer; what else lies in the folder does not count."""
        others = (path for path in self.folder.iterdir() if path.suffix in (".json", ".jinja", ".model"))
        return self.weight_bytes + sum(path.stat().st_size for path in others if path.is_file())

    @property
    def revision(self) -> str | None:
        """The commit of a checkpoint that lies in the hub's cache (…/snapshots/COMMIT), None for any other."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def digest(self) -> str:
        """SHA-256 over names and contents of the files that make the model, sorted by name.

        `lineage.json` is left out: it tells when and from what the model was made, not what it is.
        """
        total = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            makes = path.suffix in (".json", ".safetensors", ".jinja", ".model", ".spm") and path.name != "lineage.json"
            if makes and path.is_file():
                with path.open("rb") as file:
                    total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        for name in [*module_files(self.folder), *([TOOL_USE] if (self.folder / TOOL_USE).is_file() else [])]:
            total.update(f"{name}\0{sha256(self.folder / name)}\n".encode())
        return total.hexdigest()

    def load(self, dtype: str | None = None) -> PreTrainedModel:
        """The model, in evaluation mode, its weights as `dtype` (default: as stored), tied weights tied.

        Raises `UnsupportedError` for custom code, an unknown architecture or quantised weights, `SourceError` when
        weights are missing, left over or of another shape than configuration and structure say.
        """
        require("torch", "transformers", "safetensors")
        from transformers import AutoConfig
        from transformers.utils import logging as transformers_logging

        config = self.config
        check_config(config, self.folder)
        structure, kept = self.structure, dtype or self.dtype
        transformers_logging.disable_progress_bar()
        try:
            parsed = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        except (ValueError, KeyError, TypeError) as error:
            raise UnsupportedError(
                f"the installed transformers does not know the architecture {config.get('model_type')!r}",
                hint="check model_type in config.json, or the version of transformers",
            ) from error
        return self._load_cut(parsed, kept, structure) if structure else self._load(parsed, kept)

    def carry(self, folder: Path) -> Any:
        """Copy the configuration and tokenizer files that a runtime folder carries; returns the fast tokenizer, saved
        as `tokenizer.json`. Raises `UnsupportedError` when the model has none."""
        from transformers import AutoTokenizer

        self.carry_files(folder)
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError(
                f"{self.folder} has no fast tokenizer (tokenizer.json)",
                hint="save it once with transformers' AutoTokenizer.from_pretrained(…, use_fast=True)",
            )
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        return tokenizer

    def carry_files(self, folder: Path) -> None:
        """Copy, as they are, the configuration and tokenizer files that a runtime folder carries."""
        for name in (*CARRIED, *module_files(self.folder)):
            if (self.folder / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.folder / name, folder / name)

    def _load(self, config: Any, dtype: str) -> PreTrainedModel:
        import safetensors
        import torch
        import transformers

        kind = self.kind
        try:
            model, info = getattr(transformers, AUTO[kind]).from_pretrained(
                self.folder,
                config=config,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # its own error names none of them; they are refused below
            )
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SourceError(f"{self.folder} cannot be loaded: {reason}") from error
        for problem in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
            keys = info.get(problem) or ()
            if kind == "embedder":  # a pooler reads the first token for tasks of its own; embeddings do not use it
                keys = [key for key in keys if not str(key).startswith("pooler.")]
            _none_left(self.folder, problem, keys)
        loaded: PreTrainedModel = model.eval()
        return loaded

    def _load_cut(self, config: Any, dtype: str, structure: Structure) -> PreTrainedModel:
        """The model that differs from its configuration: built by that, given its structure, then filled by name."""
        import safetensors
        import torch
        import transformers
        from safetensors.torch import load_file
        from transformers.initialization import no_init_weights

        with no_init_weights():
            model = getattr(transformers, AUTO[self.kind]).from_config(config, dtype=getattr(torch, dtype))
        model.tie_weights()  # skipped together with the initialisation
        structure.build(model)
        stored: dict[str, torch.Tensor] = {}
        try:
            for path in self.weight_files:
                stored.update(load_file(path))
        except (OSError, safetensors.SafetensorError) as error:
            raise SourceError(f"{self.folder} cannot be loaded: {error}") from error
        expected = model.state_dict(keep_vars=True)
        given = {id(expected[name]) for name in stored if name in expected}  # tied names share one tensor
        _none_left(self.folder, "missing_keys", [name for name, each in expected.items() if id(each) not in given])
        _none_left(self.folder, "unexpected_keys", stored.keys() - expected.keys())
        _none_left(
            self.folder, "mismatched_keys", [name for name in stored if stored[name].shape != expected[name].shape]
        )
        model.load_state_dict(stored, strict=False)  # copies, so dtype and ties stay as built
        if model.can_generate() and (self.folder / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(self.folder)
        loaded: PreTrainedModel = model.eval()
        return loaded


def _none_left(folder: Path, kind: str, keys: Any) -> None:
    if keys:
        found = sorted(str(key) for key in keys)
        raise SourceError(f"{folder}: {kind.replace('_', ' ')}: {', '.join(found[:5])} ({len(found)} in all)")


# ── Writing ─────────────────────────────────────────────────────────────────


def save(
    model: PreTrainedModel,
    tokenizer_files_from: Path,
    folder: Path,
    lineage_entry: Mapping[str, Any],
    *,
    after: Checkpoint | None = None,
) -> Checkpoint:
    """Write `model` into the new folder `folder`, with the tokenizer files in `tokenizer_files_from`.

    `lineage_entry` needs `step`; `options`, `source`, `digest` and `time` are filled in, and the lineage of `after` is
    continued (default: the checkpoint in `tokenizer_files_from`). Raises `UsageError` when `folder` holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", hint="a checkpoint is written into a new folder, never over another")
    if not lineage_entry.get("step"):
        raise UsageError(f"a lineage entry needs the step that it records, got {dict(lineage_entry)}")
    before = after or Checkpoint(tokenizer_files_from)
    folder.mkdir(parents=True, exist_ok=True)
    model.config._name_or_path = ""
    structure = structure_of(model)
    if structure:  # read by name again: as the model calls its weights, and none left out
        model._keys_to_ignore_on_save = None
    model.save_pretrained(folder, save_original_format=not structure)
    for pattern in TOKENIZER_FILES:
        for path in sorted(tokenizer_files_from.glob(pattern)):
            place = folder / path.relative_to(tokenizer_files_from)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
    for name in ("modules.json", "sentence_bert_config.json", *module_files(before.folder)):  # how an embedder pools
        if (before.folder / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(before.folder / name, folder / name)
    if structure:
        write_json(folder / "structure.json", structure.written())
    entry = {"options": {}, "source": before.folder.name, "time": now(), **lineage_entry}
    entry.setdefault("digest", before.digest())
    write_json(folder / "lineage.json", [*before.lineage, entry])
    return Checkpoint(folder)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex. Raises `UsageError` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, readable, with a final newline."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def now() -> str:
    """The time as lineage records it: UTC, ISO 8601, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")
