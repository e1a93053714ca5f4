"""Reward models behind one signature: `reward(images, prompts) -> scores`.

    reward = load_reward("clip:demo/clip", device)
    scores = reward(images, prompts)        # images (P, 3, H, W) float in [0, 1] -> (P,) float32

A spec is one scorer or a weighted sum of several, "pickscore=10,hpsv2=2,aesthetic=0.05":

    clip:PATH_OR_HUB_ID     cosine similarity of a transformers CLIP model, no logit scale
    jpeg_compressibility    minus the size of the quality-95 JPEG, kB; needs no weights
    jpeg_incompressibility  plus that size
    FILE.py:FUNCTION        your own: function(images, prompts) -> (P,) tensor

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
    """A weighted sum of scorers, Table 4's multi-reward; a single reward is a sum of one."""

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
        scorer_spec, equals, weight = part.strip().rpartition("=")
        if not equals:
            scorer_spec, weight = part.strip(), "1"
        try:
            weights_value = float(weight)
        except ValueError:
            raise ValueError(f"--reward {spec}: the weight {weight!r} is not a number") from None
        name = scorer_name(scorer_spec)
        if name in scorers:
            raise ValueError(f"--reward {spec}: {name!r} is given twice")
        scorers[name], weights[name] = load_scorer(scorer_spec, device), weights_value
    return Reward(scorers, weights)


def scorer_name(scorer_spec: str) -> str:
    """The name it is logged under: "clip:demo/clip" -> "clip", "my/file.py:score" -> "score"."""
    name, _, argument = scorer_spec.partition(":")
    return argument if name.endswith(".py") else name


def load_scorer(scorer_spec: str, device: torch.device | str) -> Scorer:
    """One scorer: images (P, 3, H, W) uint8 and P prompts -> (P,) scores."""
    name, _, argument = scorer_spec.partition(":")
    if name.endswith(".py"):
        return load_function(Path(name), argument)
    factories = {
        "clip": lambda: ClipScorer(argument, device),
        "jpeg_compressibility": lambda: lambda images, prompts: -jpeg_kilobytes(images),
        "jpeg_incompressibility": lambda: lambda images, prompts: jpeg_kilobytes(images),
    }
    if name not in factories:
        known = ", ".join([*factories, "FILE.py:FUNCTION"])
        raise ValueError(f"--reward: unknown reward {name!r}; there are {known}")
    return factories[name]()


class ClipScorer:
    """Cosine similarity of image and text embeddings of a transformers CLIP model, in [-1, 1]."""

    def __init__(self, model: str, device: torch.device | str):
        from transformers import CLIPModel, CLIPProcessor

        if not model:
            raise ValueError("--reward clip: name the model, as in clip:demo/clip")
        try:
            self.model = CLIPModel.from_pretrained(model, dtype=torch.float32).to(device).eval()
            self.processor = CLIPProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"--reward clip:{model}: neither a folder with a CLIP model and its processor "
                f"nor a hub id that can be reached ({reason})"
            ) from None

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        # uint8 in, because the image processor divides by 255 whatever it is given.
        inputs = self.processor(
            text=prompts, images=list(images), return_tensors="pt", padding=True, truncation=True
        )
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


def load_function(file: Path, function: str) -> Scorer:
    """FUNCTION of FILE.py, called with float images in [0, 1]."""
    if not file.is_file():
        raise ValueError(f"--reward {file}:{function}: there is no file {file}")
    module_spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--reward {file}:{function}: {file} defines no function {function!r}")
    return lambda images, prompts: getattr(module, function)(images / 255, prompts)
