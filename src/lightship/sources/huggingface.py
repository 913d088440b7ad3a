"""A Hugging Face folder or hub id: safetensors only, looked over before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lightship.checkpoint import Checkpoint, read_json, require, safetensors_header
from lightship.errors import SourceError, UnsupportedError
from lightship.preflight import Seen, seen_in
from lightship.sources import pickle

EXTRA = "build"
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.spm", "*.txt"]


def read(source: str, folder: Path, log: Callable[[str], None]) -> Checkpoint:
    """Check the checkpoint folder `source` and use it where it lies (it is never written to)."""
    place = Path(source)
    _refuse_adapter(place)
    config = read_json(place / "config.json")
    if "model_type" not in config:
        raise SourceError(f"{place / 'config.json'} has no model_type", hint="is this a transformers checkpoint?")
    for path in weight_files(place):
        check_safetensors(path)
    if not (place / "tokenizer.json").is_file():
        raise SourceError(
            f"{place} has no tokenizer.json",
            hint="save the model's fast tokenizer into the folder: AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        )
    read_json(place / "tokenizer.json")
    return Checkpoint(place)


def _refuse_adapter(place: Path) -> None:
    """An adapter beside a model: loading both would change the weights unseen, loading one would drop the other."""
    if (place / "adapter_config.json").is_file():
        raise UnsupportedError(
            f"{place} holds a model and an adapter (adapter_config.json); only one of them can be meant",
            hint="move adapter_config.json and adapter_model.safetensors into a folder of their own; that folder is "
            "merged into the base that --base names",
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`; those of the index where there is one, all inside the folder."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = read_json(index).get("weight_map", {})
        if not isinstance(named, dict) or not named:
            raise SourceError(f"{index} has no weight_map")
        files = sorted({str(name) for name in named.values()})
        for name in files:
            if Path(name).name != name:
                raise SourceError(f"{index} points outside its folder: {name!r}")
            if not name.endswith(".safetensors"):
                raise SourceError(f"{index} names {name!r}, which is no safetensors file")
            if not (folder / name).is_file():
                raise SourceError(f"{folder} lacks {name}, which its index names", hint="the download is incomplete")
        return [*Checkpoint(folder).weight_files]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = [path for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(suffix)]
        if pickled:
            pickle.read(str(pickled[0]), folder, lambda line: None)
        raise SourceError(f"{folder} holds no safetensors weights")
    return found


def check_safetensors(path: Path) -> None:
    """Raise `SourceError` when `path` is cut short or its header does not describe it exactly."""
    safetensors_header(path)


def download(name: str, revision: str | None, token: str | None = None) -> Path:
    """Fetch the hub model `name` (safetensors, configuration and tokenizer only) and return its folder.

    Honours HF_HUB_OFFLINE, HF_TOKEN (unless `token` is given) and HF_HOME as huggingface_hub does. Raises `SourceError`
    saying whether the model, the revision, the right to read it or the network is missing.
    """
    require("huggingface_hub")
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, token=token, allow_patterns=WANTED))
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE")
        reason = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else "the hub cannot be reached"
        raise SourceError(f"{name!r} is no folder here, and {reason}", hint="check the path or the network") from error
    except errors.GatedRepoError as error:
        raise SourceError(f"{name} is gated", hint="accept its licence on the hub and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{name} has no revision {revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"the hub has no model {name!r}, or it is private", hint="check the name; set HF_TOKEN"
        ) from error
    except errors.HFValidationError as error:
        raise UnsupportedError(f"{name!r} is not a hub id: {error}") from error
    except OSError as error:
        raise SourceError(f"{name} could not be fetched: {error}", hint="check the network and try again") from error


def peek(path: Path) -> Seen:
    """What configuration and headers of the folder `path` tell. Raises as `read` does."""
    return seen_in(read(str(path), path, lambda line: None))


def cached(name: str, revision: str | None) -> Seen:
    """What the hub model `name` tells as it lies in the cache, all of it or its configuration. Reaches no network."""
    require("huggingface_hub")
    from huggingface_hub import errors, snapshot_download

    missing = Seen(reason=f"{name} is not downloaded yet")
    try:
        place = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=WANTED))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return missing  # `download` says what is wrong
    if not (place / "config.json").is_file():
        return replace(missing, reason=f"{name} lies in the cache and is no whole model")
    try:
        weight_files(place)
    except SourceError:
        return replace(missing, config=read_json(place / "config.json"))
    return seen_in(Checkpoint(place))
