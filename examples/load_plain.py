"""Load a compressed folder in plain transformers, in a process that never imports rankfold, and let it speak.

python examples/load_plain.py demo-out
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

prompt = sys.argv[2] if len(sys.argv) > 2 else "The history of the city begins"
inputs = tokenizer(prompt, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)

stored = sum(p.numel() * p.element_size() for p in model.parameters())
print(f"{type(model).__name__} from {folder}: {stored / 1e6:.1f} MB of weights")
print(tokenizer.decode(output[0], skip_special_tokens=True))
