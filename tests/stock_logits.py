"""Run by tests/model/test_arithmetic.py with .venv-torch: stock transformers, nothing of ours.

    python stock_logits.py FOLDER OUT.npz

Every folder in FOLDER is a model. OUT gets its float32 logits (tokens, vocabulary) for the tokens 0 to 47 under
the folder's name; nothing for a model that transformers cannot load or run, and says why.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

models, out = sys.argv[1:]
torch.set_num_threads(1)
found = {}
for folder in sorted(Path(models).iterdir()):
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        with torch.no_grad():
            found[folder.name] = model(torch.arange(48)[None]).logits[0].numpy()
    except Exception as error:
        print(f"{folder.name}: {type(error).__name__}: {error}")
np.savez(out, **found)
