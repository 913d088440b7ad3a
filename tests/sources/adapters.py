"""Adapters made by PEFT, what they compute, and how they are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightship.sources import read

TOKENS = torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(3))
ATTENTION = ["q_proj", "v_proj"]


def adapt(base, folder, **options):
    """A LoRA adapter made by PEFT, every trained tensor moved by noise: B starts as zero, which would hide all."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(1)
    model = get_peft_model(base.load(), LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    change(folder, base_model_name_or_path=str(base.folder))
    return folder


def change(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def rewrite(folder, edit):
    path = folder / "adapter_model.safetensors"
    save_file(edit(load_file(path)), path)


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def of_peft(base, adapter):
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(base.load(), adapter))


def refused(kind, says, source, tmp_path, **options):
    """Refused with these words, nothing left behind."""
    with pytest.raises(kind) as caught:
        read(str(source), tmp_path / "work" / "model", **options)
    for words in [says] if isinstance(says, str) else says:
        assert words in str(caught.value)
    assert not (tmp_path / "work").exists() or not list((tmp_path / "work").iterdir())
