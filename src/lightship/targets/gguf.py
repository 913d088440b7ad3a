"""GGUF: one file that llama.cpp loads, for llama and qwen2. Converted to and gated, not served: llama.cpp does that."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightship.checkpoint import Checkpoint
from lightship.engine import EngineSettings
from lightship.errors import EngineError, UnsupportedError
from lightship.recipe import Precision, PrecisionName
from lightship.targets import _gguf_model, _gguf_tokenizer
from lightship.targets.pytorch import TorchScorer
from lightship.tokenizer import load_tokenizer

EXTRA = "build"
NEEDS = ("gguf", "accelerate")
PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "bf16", "f16", "q8_0", "q5_0", "q4_0")
FILE, RECORD = "model.gguf", "engine.json"
STORED = {
    "float64": ("F32", "fp32"),
    "float32": ("F32", "fp32"),
    "float16": ("F16", "f16"),
    "bfloat16": ("BF16", "bf16"),
}
TABLES = ("token_embd.weight", "output.weight")  # in 8 bits where the rest has fewer: they hurt most
BLOCK = 32  # weights that share a scale
LARGEST_HALF = 65504.0
Floats = npt.NDArray[np.float32]


def settle(precision: Precision) -> tuple[Precision, list[str]]:
    """`precision` as it is. Raises `UnsupportedError` for an arithmetic or a precision of keys and values: the file
    fixes none."""
    for option in ("arithmetic", "kv"):
        if getattr(precision, option) != "auto":
            raise UnsupportedError(f"a GGUF file fixes no {option}; llama.cpp chooses it", hint=f"leave --{option} out")
    return precision, []


def refuse(config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedError` for a decoder that is not written, see `_gguf_model.refuse`."""
    _gguf_model.refuse(config)


def refuse_files(folder: Path) -> None:
    """Raise `UnsupportedError` for a checkpoint in `folder` whose layers differ, or whose `tokenizer.json` llama.cpp
    would not follow."""
    _refuse_cut(Checkpoint(folder))
    if (folder / "tokenizer.json").is_file():
        _gguf_tokenizer.pre_tokenizer_of(load_tokenizer(folder))


def _refuse_cut(checkpoint: Checkpoint) -> None:
    if checkpoint.structure:
        raise UnsupportedError("GGUF is written for models whose layers are all alike; structure.json says otherwise")


# ── Checkpoint → file ───────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be written: `shape` in the order of NumPy, `kind` a name of `gguf.GGMLQuantizationType`."""

    name: str
    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Floats]


def export(checkpoint: Checkpoint, folder: Path, dtype: str | None = None) -> None:
    """Write `checkpoint` as `model.gguf`, its matrices as `dtype` (default: as stored), norms and biases as float32,
    and check what the file says of the tokenizer.

    Raises `UnsupportedError` for what GGUF or llama.cpp has no place for.
    """
    refuse(checkpoint.config)
    _refuse_cut(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as carried:
        tokenizer = checkpoint.carry(Path(carried))
    vocabulary = _gguf_tokenizer.vocabulary_of(tokenizer, checkpoint.vocabulary, checkpoint.eos_token_ids)
    model: Any = checkpoint.load(dtype)
    config = model.config.to_dict()
    kind, precision = STORED[dtype or checkpoint.dtype]

    def describe(writer: Any) -> None:
        writer.add_name(_name(checkpoint))
        _gguf_model.describe(writer, config)
        vocabulary.describe(writer)
        _add_file_type(writer, precision)

    tensors = [_Tensor(name, shape, "F32" if len(shape) == 1 else kind, read)
               for name, shape, read in _gguf_model.tensors(model)]  # fmt: skip
    _write(folder / FILE, config["model_type"], describe, tensors)
    _gguf_tokenizer.check_ids(_metadata(_reader(folder)), tokenizer.backend_tokenizer)
    (folder / RECORD).write_text(json.dumps({"remarks": vocabulary.remarks}))


def _name(checkpoint: Checkpoint) -> str:
    """The name of the folder; of a hub's cache (models--OWNER--NAME/snapshots/COMMIT) the model's."""
    cached = checkpoint.revision is not None
    return checkpoint.folder.parent.parent.name.rpartition("--")[2] if cached else checkpoint.folder.resolve().name


def quantise(
    source: Path,
    folder: Path,
    precision: Precision,
    calibration: Sequence[Sequence[int]] = (),
    checkpoint: Checkpoint | None = None,
) -> None:
    """Write the file in `source` into `folder`, its matrices rounded to `precision` as llama.cpp's own reference does;
    no calibration is used. Tables stay in 8 bits below that, and what cannot be cut into blocks becomes F16 or F32."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = _reader(source)

    def describe(writer: Any) -> None:
        for key, field in reader.fields.items():
            if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
                kinds = field.types
                writer.add_key_value(key, field.contents(), kinds[0], sub_type=kinds[-1] if len(kinds) > 1 else None)
        _add_file_type(writer, precision.name)

    tensors = [_rounded(tensor, precision.name.upper()) for tensor in reader.tensors]
    _write(folder / FILE, _metadata(reader)["general.architecture"], describe, tensors)
    shutil.copyfile(source / RECORD, folder / RECORD)


def _rounded(tensor: Any, asked: str) -> _Tensor:
    """`tensor` of a `GGUFReader` as it is to be stored where `asked` is wanted."""
    from gguf import dequantize

    shape, name = tuple(int(size) for size in reversed(tensor.shape)), tensor.name

    def read() -> Floats:
        floats: Floats = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(shape)
        return floats

    if len(shape) == 1:
        return _Tensor(name, shape, "F32", read)
    kind = "Q8_0" if name in TABLES and asked in ("Q5_0", "Q4_0") else asked
    if kind != "F16" and shape[-1] % BLOCK:
        kind = "F16"
    if kind == "F16" and float(np.abs(read()).max()) > LARGEST_HALF:
        kind = "F32"
    return _Tensor(name, shape, kind, read)


def _add_file_type(writer: Any, precision: str) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_file_type(LlamaFileType["ALL_F32" if precision == "fp32" else f"MOSTLY_{precision.upper()}"])
    if "general.quantization_version" not in writer.kv_data[0]:
        writer.add_quantization_version(GGML_QUANT_VERSION)


def _write(path: Path, architecture: str, describe: Callable[[Any], None], tensors: Sequence[_Tensor]) -> None:
    """Write a GGUF file, one tensor in memory at a time."""
    from gguf import GGMLQuantizationType, GGUFWriter, quant_shape_to_byte_shape, quantize

    writer = GGUFWriter(path, architecture)
    describe(writer)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.kind]
        size = int(np.prod(quant_shape_to_byte_shape(tensor.shape, kind)))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(quantize(np.ascontiguousarray(tensor.read()), GGMLQuantizationType[tensor.kind]))
    writer.close()


def finish(folder: Path, precision: Precision) -> None:
    """Record precision, tensor types and remarks in `engine.json`; `settings` is what other targets have there."""
    remarks = list(json.loads((folder / RECORD).read_text())["remarks"])
    tensors = _reader(folder).tensors
    kinds = Counter(tensor.tensor_type.name for tensor in tensors)
    remarks.insert(0, f"GGUF tensors: {', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}")
    remarks += _fallbacks(tensors, precision.name)
    recorded: dict[str, Any] = {"precision": precision.name, "settings": {}, "tensors": kinds, "remarks": remarks}
    (folder / RECORD).write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")


def _fallbacks(tensors: Sequence[Any], precision: str) -> Iterator[str]:
    """A line for the matrices that could not be rounded as asked."""
    for kind in ("F16", "F32"):
        found = [each.name for each in tensors if each.tensor_type.name == kind and len(each.shape) > 1]
        if precision in ("f16", "q8_0", "q5_0", "q4_0") and found and precision.upper() != kind:
            why = f"no rows of whole blocks of {BLOCK}" if kind == "F16" else "values too large for F16"
            yield f"{len(found)} matrices are {kind}, not {precision} ({why}): {', '.join(found[:3])} …"


def remarks(folder: Path) -> list[str]:
    """What to tell about the finished `folder`."""
    found: list[str] = json.loads((folder / RECORD).read_text())["remarks"]
    return found


# ── File → Scorer ───────────────────────────────────────────────────────────


def _reader(folder: Path) -> Any:
    from gguf import GGUFReader

    return GGUFReader(folder / FILE)


def _metadata(reader: Any) -> dict[str, Any]:
    """Key → value of all the file says."""
    return {key: field.contents() for key, field in reader.fields.items()}


class GGUFScorer(TorchScorer):
    """A GGUF file de-quantised by transformers and computed in float32: what is in the file, not how llama.cpp rounds
    while it computes."""

    def __init__(self, folder: Path) -> None:
        self._wide = True
        self._model = _load(folder)


def open_scorer(folder: Path, settings: EngineSettings | None = None) -> GGUFScorer:
    """Load `folder` for scoring; `settings` has no effect here."""
    return GGUFScorer(folder)


def _load(folder: Path) -> Any:
    """The model as transformers reads it, with what its reader drops: the width of qwen2's heads and scaled RoPE."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reader = _reader(folder)
    said = StringIO()  # one progress bar is drawn whatever is set
    try:
        with redirect_stderr(said):
            config = AutoConfig.from_pretrained(folder, gguf_file=FILE)
            config.head_dim = reader.get_field(f"{config.model_type}.attention.key_length").contents()
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=FILE, config=config, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise EngineError(f"transformers cannot read {folder / FILE}: {error}\n{said.getvalue()[-500:]}") from error
    wrong = [*info["missing_keys"], *map(str, info["mismatched_keys"]), *info["unexpected_keys"]]
    if wrong:
        raise EngineError(f"{folder / FILE} lacks, or has too many, tensors: {', '.join(sorted(wrong)[:5])}")
    factors = _gguf_model.rope_factors_in(reader, config.model_type)
    if factors is not None:
        frequencies = model.model.rotary_emb.inv_freq
        frequencies /= torch.from_numpy(np.broadcast_to(factors, tuple(frequencies.shape)).copy())
    return model.eval()
