"""Put a river on a model of `transformers` that you have already, and take it off again.

python examples/attach.py
"""

import torch

from river_llm import ExitPolicy, RiverConfig, attach_river, detach_river
from river_llm.load.model import load_backbone

model, tokenizer = load_backbone("smollm2", torch.bfloat16)  # or AutoModelForCausalLM as usual
inputs = tokenizer("The river runs", return_tensors="pt")

attached = attach_river(model, RiverConfig(bits=4, group_size=64), policy=ExitPolicy.fixed(10))
tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(tokens[0]))
print(f"mean exit depth {attached.mean_exit_layer:.1f} of {attached.num_layers}")

attached.policy = ExitPolicy.similarity(0.98, batch="minimum")
beams = model.generate(**inputs, max_new_tokens=20, num_beams=3)
print(tokenizer.decode(beams[0]))

detach_river(model)  # bit for bit what it was
