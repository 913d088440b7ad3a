"""A `.gguf` file of llama.cpp, de-quantised to float32 safetensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lightship.checkpoint import Checkpoint
from lightship.errors import SourceError, UnsupportedError

EXTRA = "build"


def read(source: str, folder: Path, log: Callable[[str], None]) -> Checkpoint:
    """Write the model in the GGUF file `source` into `folder` as a checkpoint. Raises `SourceError` when damaged."""
    path = Path(source)
    types = tensor_types(path)
    log(f"GGUF tensors: {', '.join(f'{count} {name}' for name, count in types.most_common())}")
    model, tokenizer = _load(path)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    template = getattr(tokenizer, "chat_template", None)
    if template and not (folder / "chat_template.jinja").exists():
        (folder / "chat_template.jinja").write_text(template)
    entry = {
        "step": "gguf",
        "source": path.name,
        "bytes": path.stat().st_size,
        "precision": dict(types),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / "lineage.json").write_text(json.dumps([entry], indent=1) + "\n")
    return Checkpoint(folder)


def tensor_types(path: Path) -> Counter[str]:
    """How many tensors of each GGUF type the file holds. Raises `SourceError` when it is cut short or no GGUF file."""
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{path} does not begin with the GGUF magic", hint="it is damaged, or no GGUF file")
    try:
        tensors = GGUFReader(path).tensors
    except (ValueError, KeyError, IndexError, OverflowError, TypeError) as error:
        raise SourceError(f"{path} is cut short or damaged: {error}", hint="fetch the file again") from error
    end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in tensors), default=0)
    if not tensors or end > path.stat().st_size:
        raise SourceError(f"{path} is cut short: {path.stat().st_size} bytes of {end}", hint="fetch the file again")
    return Counter(tensor.tensor_type.name for tensor in tensors)


def _load(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer. The model is rebuilt from its config: the de-quantised one refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedError(f"transformers cannot read the architecture in {path}: {error}") from error
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    config.__dict__.pop("_model_name_or_path", None)
    config.architectures = [type(source).__name__]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig.from_model_config(config)
    return model, tokenizer
