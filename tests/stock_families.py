"""Run by tests/model/test_stock_families.py with .venv-torch: stock transformers, nothing of ours.

    python stock_families.py FOLDER SETTINGS.json

SETTINGS has ``tokens``, ``layer``, ``vector`` and, for each model, its family and the keys of its configuration. FOLDER gets a random
model of each as transformers saves it, and beside its weights ``logits.npz``: float32 ``plain`` and ``steered``,
(tokens, vocabulary), the latter with the vector added to the output of the layer by a hook.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

out, settings = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
torch.set_num_threads(1)
tokens = torch.tensor(settings["tokens"])[None]
vector = torch.tensor(settings["vector"])


def add(module, arguments, result):
    return (result[0] + vector, *result[1:]) if isinstance(result, tuple) else result + vector


for name, (kind, keys) in settings["models"].items():
    try:
        config = transformers.AutoConfig.for_model(kind, **keys)
        torch.manual_seed(len(name))
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter) + 0.5 * (parameter.ndim == 1))
            model = model.float().eval()
            plain = model(tokens).logits[0]
            handle = model.model.layers[settings["layer"]].register_forward_hook(add)
            steered = model(tokens).logits[0]
            handle.remove()
        model.save_pretrained(out / name)
        np.savez(out / name / "logits.npz", plain=plain.numpy(), steered=steered.numpy())
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
print(transformers.__version__)
