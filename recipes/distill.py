"""From raw text to an evaluated student, stage by stage.

    accelerate launch recipes/distill.py recipes/gpt2.yaml --set train.max_steps=100

is `hf-distill run` on as many processes as accelerate starts.
"""

import sys

from hf_distill.cli import main

# prepare -> teacher -> student -> baseline -> train -> evaluate -> report:
# `hf_distill.stages.stages_of` lists them, and each is one short function beside it.
if __name__ == "__main__":
    sys.argv.insert(1, "run")
    main()
