"""Stream an answer and show at which layer each token left the backbone.

python examples/stream.py "Name three rivers."
"""

import sys

from river_llm import ExitPolicy, RiverLM

prompt = sys.argv[1] if len(sys.argv) > 1 else "Name three rivers."
lm = RiverLM.from_pretrained("smollm2", policy=ExitPolicy.similarity(0.97))
for response in lm.stream(prompt, max_new_tokens=40):
    print(f"{response.exit_layer:2d}  {response.text!r}")
print(f"mean exit depth {response.mean_exit_layer:.1f} of {lm.engine.num_layers}")
print(f"{response.decode_tokens_per_second:.1f} tokens/s")
