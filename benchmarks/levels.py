"""A reward whose level depends on the prompt, for claim M of claims.py.

    --reward clip:demo/clip,benchmarks/levels.py:level=1.8

A level is the same for all images of a prompt, so it says nothing about which of them is better.
Objectives that compare the images of one prompt do not see it. Statistics of a batch do.
"""

import hashlib
from statistics import NormalDist

import torch
from torch import Tensor

# The standard deviation of demo/clip's score within a prompt in the base's samples, guidance 1.5:
# 0.177 with --preset demo, 0.184 with --preset demo-large. It is the root of the mean over PRDP's
# runs, seeds 0 and 2 to 6, of reward_std**2 * (1 - between_prompt_variance) in epoch 1 of
# claims/*/PRDP-*/metrics.jsonl.
SPREAD = 0.18


def level(images: Tensor, prompts: list[str]) -> Tensor:
    """(P,) a standard normal number of each prompt, on any machine the same."""
    # The 500 sentences of emoji-unseen are those of the least hashes, hence the words in front.
    digests = [hashlib.sha256(f"level of {prompt}".encode()).digest()[:6] for prompt in prompts]
    uniform = [(int.from_bytes(digest) + 0.5) / 2**48 for digest in digests]  # never 0 or 1
    return torch.tensor([NormalDist().inv_cdf(u) for u in uniform], device=images.device)
