"""The emoji world's judge: does a picture show what its prompt asks for?

    --reward clip:demo/clip,demo/judge.py:animal=0,demo/judge.py:all_right=0     # only logged

`animal`, `size`, `colour`, `place`, `background` and `all_right` are reward functions that return 1
or 0 for each image. What a prompt does not name counts as right: "A painting of a fox" is all right
with any fox. `background` covers its colour and its pattern. The judge is a small convolutional
network that was trained on pictures of its own (demo/make_demo.py). It shares nothing with the
reward demo/clip, and no training may use it; so it tells learning from reward hacking.
"""

import math
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from demo.grammar import ANIMALS, COLOURS, PATTERNS, PLACES, SIZES, Scene, parse

WEIGHTS = Path(__file__).parent / "judge.safetensors"
ANSWERS = {  # what each head of the network tells apart; None: not named by the true sentence
    "animal": (*ANIMALS, None),  # None: no animal, or a mixture of several
    "size": (*SIZES, None),
    "colour": COLOURS,  # of an animal in its own colours: the most similar
    "place": (*PLACES, None),
    "background": COLOURS,
    "pattern": (*PATTERNS, None),
}


class Judge(nn.Module):
    """images (P, 3, 64, 64) in [0, 1] -> the logits of each head's answers."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs),
                nn.ReLU())

        self.body = nn.Sequential(
            block(3, 24, 2), block(24, 24, 1), block(24, 48, 2), block(48, 48, 1),
            block(48, 96, 2), block(96, 96, 1), block(96, 128, 2), block(128, 48, 1),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(48 * 4 * 4, 192), nn.ReLU())
        self.heads = nn.ModuleDict(
            {name: nn.Linear(192, len(answers)) for name, answers in ANSWERS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(2 * images - 1)
        return {name: head(features) for name, head in self.heads.items()}


@cache
def load_judge(device: torch.device) -> Judge:
    judge = Judge()
    try:
        judge.load_state_dict(load_file(WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ValueError(f"the judge's weights {WEIGHTS} are missing or damaged; "
                         "`git checkout` brings them back, `python -m demo.make_demo judge` makes "
                         "them anew") from error
    return judge.to(device).eval()


@torch.no_grad()
def seen(images: Tensor) -> list[Scene]:
    """What the judge sees in each image (P, 3, 64, 64), float in [0, 1]."""
    logits = load_judge(images.device)(images.float())
    chosen = [[ANSWERS[name][i] for i in logits[name].argmax(1).tolist()] for name in ANSWERS]
    return [Scene(**dict(zip(ANSWERS, answers, strict=True))) for answers in zip(*chosen,
                                                                              strict=True)]


def check(images: Tensor, prompts: list[str], *names: str) -> Tensor:
    """(P,) 1.0 where each named attribute is as the prompt asks or not named by it, else 0.0; NaN
    for a prompt that is not a sentence of the grammar."""
    right = []
    for prompt, found in zip(prompts, seen(images), strict=True):
        try:
            asked = parse(prompt)
        except ValueError:
            right.append(math.nan)
        else:
            right.append(float(all(getattr(asked, name) in (None, getattr(found, name))
                                   for name in names)))
    return torch.tensor(right, device=images.device)


def animal(images: Tensor, prompts: list[str]) -> Tensor:
    """1 where the animal is the one asked for; 0 also for a mixture of animals or fragments."""
    return check(images, prompts, "animal")


def size(images: Tensor, prompts: list[str]) -> Tensor:
    """1 where the animal is as small or large as asked."""
    return check(images, prompts, "size")


def colour(images: Tensor, prompts: list[str]) -> Tensor:
    """1 where the animal has the colour asked for."""
    return check(images, prompts, "colour")


def place(images: Tensor, prompts: list[str]) -> Tensor:
    """1 where the animal is on the side asked for."""
    return check(images, prompts, "place")


def background(images: Tensor, prompts: list[str]) -> Tensor:
    """1 where the background has the colour and the pattern asked for."""
    return check(images, prompts, "background", "pattern")


def all_right(images: Tensor, prompts: list[str]) -> Tensor:
    """1 where all of the above are right."""
    return check(images, prompts, *ANSWERS)
