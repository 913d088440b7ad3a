"""A `.gguf` file of llama.cpp, de-quantised to safetensors."""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from lightship.checkpoint import Checkpoint, now, require, write_json
from lightship.costs import Shape
from lightship.errors import SourceError, UnsupportedError
from lightship.preflight import Seen

EXTRA = "build"
HALF = {"F16": "float16", "BF16": "bfloat16"}
BAR = "GGUF tensors...:"
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's codes
STRING, ARRAY = 8, 9
HALF_TYPES = {1: "F16", 30: "BF16"}
TOKENIZER_BYTES = 70  # of tokenizer.json for every token, as seen with 49 152 of them
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def read(source: str, folder: Path, log: Callable[[str], None]) -> Checkpoint:
    """Write the model in the GGUF file `source` into `folder` as a checkpoint, quantised tensors as float32.

    A file of 16-bit floats only keeps its type. Raises `SourceError` when the file is damaged, `UnsupportedError` when
    transformers would not read all of it.
    """
    path = Path(source)
    reader = _open(path)
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    _refuse_what_would_be_dropped(path, reader)
    log(f"GGUF tensors: {', '.join(f'{count} {name}' for name, count in types.most_common())}")
    model, tokenizer = _load(path, dtype_for(types), log)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    template = getattr(tokenizer, "chat_template", None)
    if template and not (folder / "chat_template.jinja").exists():
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    entry = {
        "step": "gguf",
        "options": {},
        "source": path.name,
        "digest": digest,
        "bytes": path.stat().st_size,
        "precision": dict(types),
        "time": now(),
    }
    write_json(folder / "lineage.json", [entry])
    return Checkpoint(folder)


def peek(path: Path) -> Seen:
    """The shape of the model in the file, from its header alone and without the package gguf, whose reader takes
    seconds. Raises `SourceError` when the header is damaged."""
    values, tensors = _header(path)
    name = str(values.get("general.architecture"))
    vocabulary = values.get(f"{name}.vocab_size", values.get("tokenizer.ggml.tokens"))
    numbers = (values.get(f"{name}.block_count"), values.get(f"{name}.context_length"), vocabulary)
    layers, context, vocabulary = (each if isinstance(each, int) else 0 for each in numbers)
    if not layers or not context or not vocabulary:
        return Seen(path, reason=f"the header of {path.name} does not give layers, context and vocabulary")
    if values.get(f"{name}.expert_count"):
        return Seen(path, reason="mixtures of experts have not been measured")
    elements = {tensor: count for tensor, (_, count) in tensors.items()}
    types = Counter(HALF_TYPES.get(kind, "F32" if kind == 0 else "quantised") for kind, _ in tensors.values())
    width = 4 if dtype_for(types) == "float32" else 2
    parameters = sum(elements.values())
    return Seen(path, shape=Shape(
        name, layers, parameters, elements.get("token_embd.weight", 0), "output.weight" not in elements, vocabulary,
        context, width, parameters * width, vocabulary * TOKENIZER_BYTES, unpacked=path.stat().st_size,
    ))  # fmt: skip


class _Cursor:
    """Little-endian values, one after the other; past the end `struct.error`."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._at = data, 0

    def take(self, code: str) -> Any:
        found = struct.unpack_from(f"<{code}", self._data, self._at)[0]
        self._at += struct.calcsize(f"<{code}")
        return found

    def text(self) -> str:
        length = self.take("Q")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        """A value of a GGUF type; of an array only its length, its elements are passed over."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.take(NUMBERS[kind])
        kind, count = self.take("I"), self.take("Q")
        if kind in NUMBERS:
            self._at += count * struct.calcsize(f"<{NUMBERS[kind]}")
        else:
            for _ in range(count):
                self.value(kind)
        return count


def _header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """(key → value, tensor → (type number, elements)). Format: docs/gguf.md of ggml, version 2 and 3."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(data)
            cursor.take("8s")  # magic and version, which `_open` checks
            tensor_count, value_count = cursor.take("Q"), cursor.take("Q")
            values = {cursor.text(): cursor.value(cursor.take("I")) for _ in range(value_count)}
            tensors = {}
            for _ in range(tensor_count):
                name, elements = cursor.text(), 1
                for _ in range(cursor.take("I")):
                    elements *= cursor.take("Q")
                tensors[name] = (cursor.take("I"), elements)
                cursor.take("Q")  # its offset
    except (struct.error, KeyError, ValueError, OverflowError, RecursionError) as error:
        raise SourceError(f"{path} is cut short or damaged: {error}", hint="fetch the file again") from error
    return values, tensors


def tensor_types(path: Path) -> Counter[str]:
    """How many tensors of each GGUF type the file holds. Raises `SourceError` when it is cut short or no GGUF file."""
    return Counter(tensor.tensor_type.name for tensor in _open(path).tensors)


def dtype_for(types: Counter[str]) -> str:
    """The dtype to save in: 16 bits when the matrices are all of one such type, else float32, which loses nothing."""
    found = set(types) - {"F32"}  # norms and biases are F32 in every file
    return HALF.get(found.pop(), "float32") if len(found) == 1 else "float32"


def _open(path: Path) -> Any:
    """A `GGUFReader` whose tensors all lie inside the file."""
    require("gguf", "torch", "transformers", "accelerate")
    from gguf import GGUFReader

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SourceError(f"{path} does not begin with the GGUF magic", hint="it is damaged, or no GGUF file")

    class Bounded(GGUFReader):  # type: ignore[misc]
        """Past the end of the file the original answers empty arrays: a long enough array would be read for ever."""

        def _get(self, offset: int, dtype: Any, count: int = 1, *rest: Any, **named: Any) -> Any:
            found = super()._get(offset, dtype, count, *rest, **named)
            if len(found) < count:
                raise ValueError(f"it ends before byte {offset}")
            return found

    try:
        reader = Bounded(path)
    except (ValueError, LookupError, ArithmeticError, TypeError, MemoryError) as error:
        raise SourceError(f"{path} is cut short or damaged: {error}", hint="fetch the file again") from error
    end = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    if not reader.tensors or end > path.stat().st_size:
        raise SourceError(f"{path} is cut short: {path.stat().st_size} bytes of {end}", hint="fetch the file again")
    return reader


def _refuse_what_would_be_dropped(path: Path, reader: Any) -> None:
    """Refuse files of which transformers 5.23 drops a part without a word: the shards beside it, and scaled RoPE."""
    field = reader.get_field("split.count")
    if field is not None and int(field.contents()) > 1:
        raise UnsupportedError(f"{path} is one of {field.contents()} parts", hint="join them: llama-gguf-split --merge")
    kind = reader.get_field("general.architecture")
    architecture = str(kind.contents()) if kind is not None else ""
    if architecture == "gpt-oss":
        return  # the only one whose scaling is read
    scaling = reader.get_field(f"{architecture}.rope.scaling.type")
    named = scaling is not None and str(scaling.contents()) != "none"
    if named or any(tensor.name in ROPE_TENSORS for tensor in reader.tensors):
        raise UnsupportedError(
            f"{path} scales its rotary positions, and reading it would drop that: silently worse answers",
            hint="give the safetensors release of this model",
        )


def _load(path: Path, dtype: str, log: Callable[[str], None]) -> tuple[Any, Any]:
    """Model and tokenizer. The model is rebuilt from its config: the de-quantised one refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    said = StringIO()  # transformers draws one progress bar here that no setting of its own turns off
    try:
        with redirect_stderr(said):
            source, info = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UnsupportedError(f"transformers cannot read the architecture in {path}: {error}") from error
    except (OSError, RuntimeError, TypeError, LookupError) as error:
        raise SourceError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    for line in said.getvalue().replace("\r", "\n").splitlines():
        if line.strip() and BAR not in line:
            log(line.strip())
    missing = sorted(info["missing_keys"]) + sorted(str(each) for each in info["mismatched_keys"])
    if missing:  # left as they are, those weights would be random numbers
        raise SourceError(f"{path} lacks {', '.join(missing[:5])} ({len(missing)} in all)", hint="fetch the file again")
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    config.__dict__.pop("_model_name_or_path", None)
    config.architectures = [type(source).__name__]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig.from_model_config(config)
    return model, tokenizer
