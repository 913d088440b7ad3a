"""A trained model at rest: safetensors, configuration, tokenizer, `structure.json` and `lineage.json` in one folder."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightship.errors import SourceError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `SourceError` naming the file when it is missing or not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path} is missing", hint="a checkpoint folder needs it") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


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
        """Tokens that the model was made for."""
        config = self.config
        return int(config.get("max_position_embeddings") or config.get("n_positions") or 2048)

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer."""
        return int(self.config["vocab_size"])

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end a text, from `generation_config.json`, else from `config.json`."""
        path = self.folder / "generation_config.json"
        found = read_json(path).get("eos_token_id") if path.is_file() else None
        found = self.config.get("eos_token_id") if found is None else found
        return () if found is None else (found,) if isinstance(found, int) else tuple(found)

    @property
    def dtype(self) -> str:
        """The dtype of the weights, such as `bfloat16`."""
        config = self.config
        return str(config.get("dtype") or config.get("torch_dtype") or "float32")

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """What made this checkpoint, oldest first."""
        path = self.folder / "lineage.json"
        return list(json.loads(path.read_text())) if path.is_file() else []

    @property
    def weight_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def digest(self) -> str:
        """SHA-256 over names and contents of the files that make the model, sorted by name."""
        total = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.is_file() and path.suffix in (".json", ".safetensors", ".jinja", ".model"):
                with path.open("rb") as file:
                    total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()

    def load(self, dtype: str | None = None) -> PreTrainedModel:
        """The model, in evaluation mode, its weights as `dtype` (default: as stored), tied weights tied.

        Raises `UnsupportedError` for custom code or an unknown architecture, `SourceError` when weights are
        missing, left over or of another shape than the configuration says.
        """
        from transformers import AutoConfig
        from transformers.utils import logging as transformers_logging

        config = self.config
        if "auto_map" in config:
            raise UnsupportedError(
                f"{self.folder} needs its own code (auto_map in config.json); lightship runs no code from a model",
                hint="use a release of this model that transformers supports natively",
            )
        transformers_logging.disable_progress_bar()
        try:
            parsed = AutoConfig.from_pretrained(self.folder, local_files_only=True)
        except (ValueError, KeyError, TypeError) as error:
            raise UnsupportedError(
                f"the installed transformers does not know the architecture {config.get('model_type')!r}",
                hint="check model_type in config.json, or the version of transformers",
            ) from error
        return self._load(parsed, dtype)

    def _load(self, config: Any, dtype: str | None) -> PreTrainedModel:
        import safetensors
        import torch
        from transformers import AutoModelForCausalLM

        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                self.folder,
                config=config,
                dtype=getattr(torch, dtype) if dtype else "auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
            raise SourceError(f"{self.folder} cannot be loaded: {str(error).splitlines()[0]}") from error
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
            if info.get(kind):
                found = sorted(str(key) for key in info[kind])
                raise SourceError(
                    f"{self.folder}: {kind.replace('_', ' ')}: {', '.join(found[:5])} ({len(found)} in all)"
                )
        loaded: PreTrainedModel = model.eval()
        return loaded
