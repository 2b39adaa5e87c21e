"""Run by tests/export/test_bake.py with .venv-torch: stock transformers, nothing of ours.

Each line of standard input is a JSON list: FOLDER, IN.npz, OUT.npz, COUNT. A line of standard output
follows when OUT is there.

IN has ``tokens``, of which the first ``prompt`` are a prompt; OUT gets float32 ``logits`` (tokens, vocabulary), ``greedy``, COUNT tokens after that, and
``encoded``, the tokens of ``text``.
"""

import json
import sys

import numpy as np
import torch
import transformers


def run(folder, source, out, count):
    with np.load(source) as arrays:
        tokens, text = torch.tensor(arrays["tokens"].tolist())[None], str(arrays["text"])
        prompt = tokens[:, : int(arrays["prompt"])]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    assert type(model).__module__.startswith("transformers."), type(model)
    with torch.no_grad():
        logits = model(tokens).logits[0].numpy()
        greedy = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
        )[0, prompt.shape[1] :]
    np.savez(out, logits=logits, greedy=greedy.numpy(), encoded=np.array(tokenizer.encode(text)))


for line in sys.stdin:
    run(*json.loads(line))
    print("done", flush=True)
