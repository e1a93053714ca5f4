"""How much of the gradient of PRDP's loss is noise: the cosine between the gradients of epochs that
one policy, the demo's base model, samples at K = 1. A cosine of c means that the gradient of an
epoch and the mean gradient have a cosine of about the root of c.

    python benchmarks/trials/gradient_noise.py    # 10 minutes; writes gradient_noise.json
"""

import itertools
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
import prdp  # noqa: E402

EPOCHS = 4  # of 264 images
FLAGS = ("--preset demo --guidance_scale 1.5 --kl_weight 300 "
         "--prompts_per_epoch {} --images_per_prompt {}")
PROMPTS = {"44 of 45 prompts x 6 images": (45, 44, 6), "one prompt x 264 images": (1, 1, 264)}


def gradients(num_prompts: int, N: int, B: int) -> list[Tensor]:
    """Of the loss at the base's own samples of each epoch, (weights,)."""
    config = prdp.parse_config(FLAGS.format(N, B).split())
    models = prdp.load_models(config, torch.device("cpu"))
    (prompts,) = prdp.load_prompts("prompts/animals.txt", print).values()
    weights, found = list(models.policy.unet.parameters()), []
    for epoch in range(EPOCHS):
        samples = prdp.collect_epoch(config, models, prompts[:num_prompts], epoch, {})
        log_probs = samples.log_probs_old.clone().requires_grad_()
        loss = prdp.objective_loss(config, log_probs, samples)
        (grad,) = torch.autograd.grad(loss, log_probs)
        prdp.backward_log_probs(models.policy, samples, grad.flatten(0, 1), config.micro_batch_size)
        found.append(torch.cat([weight.grad.flatten().double() for weight in weights]))
        models.policy.unet.zero_grad()
    return found


if __name__ == "__main__":
    rows = {}
    for name, sizes in PROMPTS.items():
        of_epochs = gradients(*sizes)
        of_signs = [gradient.sign() for gradient in of_epochs]
        for kind, vectors in (("gradients", of_epochs), ("their signs", of_signs)):
            cosines = [torch.cosine_similarity(a, b, dim=0).item()
                       for a, b in itertools.combinations(vectors, 2)]
            rows[f"{name}, {kind}"] = {"mean": statistics.fmean(cosines), "cosines": cosines}
    text = json.dumps(rows, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n")
    print(text)
