"""Reward models behind one signature: `reward(images, prompts) -> scores`.

    reward = load_reward("clip:demo/clip", device)
    scores = reward(images, prompts)        # images (P, 3, H, W) float in [0, 1] -> (P,) float32

A spec is one scorer or a weighted sum of several, "clip:demo/clip=10,jpeg_compressibility=0.05":

    clip:PATH_OR_HUB_ID     cosine similarity of a transformers CLIP model, no logit scale
    jpeg_compressibility    minus the size of the quality-95 JPEG, kB; needs no weights
    jpeg_incompressibility  plus that size
    FILE.py:FUNCTION        your own: function(images, prompts) -> (P,) tensor

A further model is a factory in FACTORIES, below; HPSv2, PickScore and LAION aesthetic will be.

Scorers see what a saved picture would hold: images are rounded to 8 bits at the door. Each scorer's
factory imports what only it needs: a run with one reward neither imports nor downloads others.
"""

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Scorer = Callable[[Tensor, list[str]], Tensor]


class Reward:
    """A weighted sum of scorers, as Table 4's multi-reward is; a single reward is a sum of one."""

    def __init__(self, scorers: dict[str, Scorer], weights: dict[str, float]):
        self.scorers, self.weights = scorers, weights

    @torch.no_grad()
    def terms(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Every scorer's raw, unweighted scores.

        images: (P, 3, H, W) float in [0, 1]; prompts: P strings. Returns name -> (P,) float32, in
        the scorer's own unit. Raises ValueError naming a scorer whose output is not P numbers.
        """
        images = images.mul(255).round().clamp(0, 255).to(torch.uint8)
        scores = {}
        for name, scorer in self.scorers.items():
            with torch.autocast(images.device.type, enabled=False):
                score = torch.as_tensor(scorer(images, prompts))
            if score.shape != (len(prompts),):
                raise ValueError(
                    f"reward {name!r} returned shape {tuple(score.shape)}; it must return one "
                    f"number an image, shape ({len(prompts)},)"
                )
            scores[name] = score.to(images.device, torch.float32)
        return scores

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """sum over scorers of weight * score, (P,) float32."""
        return sum(self.weights[name] * score for name, score in terms.items())

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """r(x_0, c): images (P, 3, H, W) float in [0, 1] and P prompts -> (P,) float32."""
        return self.total(self.terms(images, prompts))


def load_reward(spec: str, device: torch.device | str) -> Reward:
    """Build the reward of a spec (see the module's docstring), its networks on `device`.

    Raises ValueError for an unknown name, a missing file or function, or a weight not a number.
    """
    scorers, weights = {}, {}
    for part in spec.split(","):
        scorer, _, weight = part.strip().partition("=")
        name, _, argument = scorer.partition(":")
        factory = load_function if name.endswith(".py") else FACTORIES.get(name)
        if factory is None:
            known = ", ".join([*FACTORIES, "FILE.py:FUNCTION"])
            raise ValueError(f"--reward {spec}: unknown reward {name!r}; there are {known}")
        logged_as = argument if factory is load_function else name
        if logged_as in scorers:
            raise ValueError(f"--reward {spec}: {logged_as!r} is given twice")
        try:
            weights[logged_as] = float(weight or 1)
        except ValueError:
            raise ValueError(f"--reward {spec}: the weight {weight!r} is not a number") from None
        scorers[logged_as] = factory(scorer, device)
    return Reward(scorers, weights)


# Factories: the scorer's part of the spec and a device -> scorer of (P, 3, H, W) uint8 images.


class ClipScorer:
    """Cosine similarity of image and text embeddings of a transformers CLIP model, in [-1, 1]."""

    def __init__(self, spec: str, device: torch.device | str):
        from transformers import CLIPModel, CLIPProcessor

        model = spec.partition(":")[2]
        try:
            self.model = CLIPModel.from_pretrained(model, dtype=torch.float32).to(device).eval()
            self.processor = CLIPProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ValueError(f"--reward {spec}: {model!r} is neither a folder of a CLIP model and "
                             "its processor nor a hub id that can be reached "
                             f"({str(error).splitlines()[0]})") from None

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        # uint8 images, because the processor divides by 255 whatever it is given.
        inputs = self.processor(text=prompts, images=list(images), return_tensors="pt",
                                padding=True, truncation=True)
        output = self.model(**inputs.to(images.device))
        return (output.image_embeds * output.text_embeds).sum(-1)


def jpeg_kilobytes(images: Tensor) -> Tensor:
    """Size in kB (1000 bytes) of each image's quality-95 JPEG, the reward of the DDPO paper."""
    from torchvision.transforms.functional import to_pil_image

    sizes = []
    for image in images.cpu():
        with io.BytesIO() as file:
            to_pil_image(image).save(file, format="JPEG", quality=95)
            sizes.append(file.tell() / 1000)
    return torch.tensor(sizes)


def load_function(spec: str, device: torch.device | str) -> Scorer:
    """FUNCTION of FILE.py, which gets float images in [0, 1]."""
    file, _, function = spec.partition(":")
    if not Path(file).is_file():
        raise ValueError(f"--reward {spec}: there is no file {file}")
    module_spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--reward {spec}: {file} defines no function {function!r}")
    return lambda images, prompts: getattr(module, function)(images / 255, prompts)


FACTORIES = {
    "clip": ClipScorer,
    "jpeg_compressibility": lambda spec, device: lambda images, prompts: -jpeg_kilobytes(images),
    "jpeg_incompressibility": lambda spec, device: lambda images, prompts: jpeg_kilobytes(images),
}
