"""Reward models behind one signature: `reward(images, prompts) -> scores`.

    reward = load_reward("pickscore=10,hpsv2=2,aesthetic=0.05", device)
    scores = reward(images, prompts)        # images (P, 3, H, W) float in [0, 1] -> (P,) float32

A spec is one scorer or a weighted sum of several:

    hpsv2, hpsv2.1          Human Preference Score v2.0 (the paper's) and v2.1, about 0.27
    pickscore               PickScore v1, about 0.21
    aesthetic               LAION aesthetic predictor, about 1..10; reads no prompt
    clip:FOLDER_OR_HUB_ID   any transformers CLIP model
    jpeg_compressibility    minus the size of the quality-95 JPEG, kB; needs no weights
    jpeg_incompressibility  plus that size
    FILE.py:FUNCTION        your own: function(images, prompts) -> (P,) tensor

Preference scores and clip are cosine similarities, without CLIP's logit scale of 100. Weights come
from the Hugging Face hub, or without a network from what follows a colon:

    hpsv2:FILE_OR_FOLDER    HPS_v2_compressed.pt, for hpsv2.1 HPS_v2.1_compressed.pt
    pickscore:FOLDER        yuvalkirstain/PickScore_v1 with the files of its CLIP processor
    aesthetic:FOLDER        openai/clip-vit-large-patch14 with the predictor's .pth

Scorers see what a saved picture would hold: images are rounded to 8 bits at the door. They compute
in float32 whatever the caller's autocast. Each one's factory imports what only it needs: a run with
one reward neither imports nor downloads others. A further model is a factory in FACTORIES, below.
"""

import contextlib
import functools
import importlib.util
import io
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

Scorer = Callable[[Tensor, list[str]], Tensor]


class Reward:
    """A weighted sum of scorers, as Table 4's multi-reward is; a single reward is a sum of one."""

    def __init__(self, scorers: dict[str, Scorer], weights: dict[str, float]):
        self.scorers, self.weights = scorers, weights

    @torch.no_grad()
    def terms(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Every scorer's raw, unweighted scores.

        images: (P, 3, H, W) float in [0, 1]; prompts: P strings. Returns name -> (P,) float32, in
        the scorer's own unit, NaN for an image that is not finite. Raises ValueError naming a
        scorer whose output is not P numbers.
        """
        is_finite = images.isfinite().flatten(1).all(1)  # (P,); in 8 bits NaN would be black
        images = images.mul(255).round().clamp(0, 255).to(torch.uint8)
        scores = {}
        for name, scorer in self.scorers.items():
            try:
                with torch.autocast(images.device.type, enabled=False):
                    score = scorer(images, prompts)
            except ValueError as error:  # a fault in a function, not a user's mistake in a flag
                raise RuntimeError(f"reward {name!r} failed: {cause(error)}") from error
            try:
                score = torch.as_tensor(score)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"reward {name!r} returned a {type(score).__name__}; it must "
                                 "return one number an image") from None
            if score.shape != (len(prompts),):
                raise ValueError(
                    f"reward {name!r} returned shape {tuple(score.shape)}; it must return one "
                    f"number an image, shape ({len(prompts)},)"
                )
            scores[name] = score.to(images.device, torch.float32).where(is_finite, math.nan)
        return scores

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """sum over scorers of weight * score, (P,) float32."""
        return sum(self.weights[name] * score for name, score in terms.items())

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """r(x_0, c): images (P, 3, H, W) float in [0, 1] and P prompts -> (P,) float32."""
        return self.total(self.terms(images, prompts))


def load_reward(spec: str, device: torch.device | str) -> Reward:
    """Build the reward of a spec (see the module's docstring), its networks on `device`.

    Raises ValueError for an unknown name, a weight that is not a number, or weights that are
    missing, damaged, or of another network; it names the spec and what was found.
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
            if not math.isfinite(weights[logged_as]):
                raise ValueError
        except ValueError:
            raise ValueError(f"--reward {spec}: the weight {weight!r} is not a number") from None
        scorers[logged_as] = factory(scorer, device)
    return Reward(scorers, weights)


# Factories: the scorer's part of the spec and a device -> scorer of (P, 3, H, W) uint8 images.


def load_hpsv2(spec: str, device: torch.device | str) -> Scorer:
    """A finetuned open_clip ViT-H-14 (Wu et al., 2023): "hpsv2" or "hpsv2.1", ":FILE_OR_FOLDER"."""
    import open_clip
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    version, _, local = spec.partition(":")
    name = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}[version]
    with loading(spec, local or "xswu/HPSv2"):
        file = Path(local) if local else download("xswu/HPSv2", name)
        network = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
        load_weights(network, file / name if file.is_dir() else file, "state_dict")
    network.to(device).eval()
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def image_features(images: Tensor) -> Tensor:
        # The longer side is resized to 224 and the shorter padded with black, as in the official
        # code; that leaves antialias to torchvision, whose default was False before version 0.17.
        # Scores differ by it: we fix what today's versions do.
        size = network.visual.image_size  # 224, 224
        sides = [round(side * size[0] / max(images.shape[-2:])) for side in images.shape[-2:]]
        images = vision.resize(images / 255, sides, InterpolationMode.BICUBIC, antialias=True)
        images = vision.center_crop(images, size)  # pads, as no side is longer
        return network.encode_image(vision.normalize(
            images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))

    return cosine(image_features,
                  lambda prompt: network.encode_text(tokenizer(prompt).to(device)))


def load_clip(spec: str, device: torch.device | str) -> Scorer:
    """A transformers CLIP: "clip:FOLDER_OR_HUB_ID", "pickscore" (Kirstain et al., 2023) or
    "pickscore:FOLDER"."""
    from transformers import CLIPModel, CLIPProcessor

    source = processor_source = spec.partition(":")[2]
    if spec == "pickscore":
        source = "yuvalkirstain/PickScore_v1"
        processor_source = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    if not source:
        raise ValueError(f"--reward {spec}: name the model, {spec.partition(':')[0]}:FOLDER")
    with loading(spec, source):
        network = load_network(CLIPModel, source)
    with loading(spec, processor_source):
        processor = CLIPProcessor.from_pretrained(processor_source, trust_remote_code=False)
        check_words(processor.tokenizer)
    network.to(device)
    longest = network.config.text_config.max_position_embeddings  # 77 tokens

    def image_features(images: Tensor) -> Tensor:
        # uint8 images, because the processor divides by 255 whatever it is given.
        inputs = processor.image_processor(list(images), return_tensors="pt").to(device)
        return network.visual_projection(network.vision_model(**inputs).pooler_output)

    def text_features(prompt: str) -> Tensor:
        inputs = processor.tokenizer(prompt, truncation=True, max_length=longest,
                                     return_tensors="pt").to(device)
        return network.text_projection(network.text_model(**inputs).pooler_output)

    return cosine(image_features, text_features)


def cosine(image_features: Callable[[Tensor], Tensor],
           text_features: Callable[[str], Tensor]) -> Scorer:
    """Cosine in [-1, 1] of the features (P, F) of images with those (1, F) of their prompts."""

    @functools.lru_cache(maxsize=4096)  # encode a prompt once, not once for each of its images
    def text_direction(prompt: str) -> Tensor:
        return nn.functional.normalize(text_features(prompt), dim=-1)[0]

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        text_directions = torch.stack([text_direction(prompt) for prompt in prompts])  # (P, F)
        return (nn.functional.normalize(image_features(images), dim=-1) * text_directions).sum(-1)

    return score


def load_aesthetic(spec: str, device: torch.device | str) -> Scorer:
    """A regression of human ratings from CLIP image features: "aesthetic", "aesthetic:FOLDER"."""
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    local = spec.partition(":")[2]
    source, head_source = (local or hub_id for hub_id in
                           ("openai/clip-vit-large-patch14", "trl-lib/ddpo-aesthetic-predictor"))
    with loading(spec, source):
        network = load_network(CLIPVisionModelWithProjection, source)
        processor = CLIPImageProcessor.from_pretrained(source)

    # No activations: as published, it is linear from end to end.
    head = nn.ModuleDict({"layers": nn.Sequential(
        nn.Linear(network.config.projection_dim, 1024), nn.Dropout(0.2),
        nn.Linear(1024, 128), nn.Dropout(0.2),
        nn.Linear(128, 64), nn.Dropout(0.1),
        nn.Linear(64, 16), nn.Linear(16, 1))})
    with loading(spec, head_source):
        name = "aesthetic-model.pth"
        load_weights(head, next(Path(local).glob("*.pth"), Path(local) / name) if local
                     else download(head_source, name))
    network.to(device)
    head.to(device).eval()

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        features = network(**processor(list(images), return_tensors="pt").to(device)).image_embeds
        return head["layers"](nn.functional.normalize(features, dim=-1)).squeeze(-1)

    return score


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
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise RuntimeError(f"--reward {spec}: {file} failed: {cause(error)}") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"--reward {spec}: {file} defines no function "
                         f"{function!r}; give FILE.py:FUNCTION")
    return lambda images, prompts: getattr(module, function)(images / 255, prompts)


FACTORIES = {
    "hpsv2": load_hpsv2,
    "hpsv2.1": load_hpsv2,
    "pickscore": load_clip,
    "aesthetic": load_aesthetic,
    "clip": load_clip,
    "jpeg_compressibility": lambda spec, device: lambda images, prompts: -jpeg_kilobytes(images),
    "jpeg_incompressibility": lambda spec, device: lambda images, prompts: jpeg_kilobytes(images),
}


# Weights: from the hub or from disk, never by running code that is in a file.


@contextlib.contextmanager
def loading(spec: str, source: str) -> Iterator[None]:
    """Turn what the hub, a damaged file or a pickle with code in it can raise into a sentence."""
    try:
        yield
    except Exception as error:
        reason = f"--reward {spec}: {source} cannot be loaded ({cause(error)})"
        if not Path(source).exists():
            reason += (f"; without a network give a local copy, as in {spec.partition(':')[0]}:"
                       "PATH, or point HF_HOME at a cache that holds it")
        raise ValueError(reason) from error


def cause(error: Exception) -> str:
    """The first line of what an error says, which is all that fits into a sentence."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def download(repository: str, name: str) -> Path:
    """A file of a hub repository, from the cache if it is there."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, name))


def load_network(loader: type, source: str | Path, **options: str) -> nn.Module:
    """loader.from_pretrained(source) in float32 and eval mode.

    Raises ValueError for missing or misshapen weights, which it would fill with random numbers.
    """
    network, report = loader.from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    if misfits := sorted(report["missing_keys"]) + sorted(report["mismatched_keys"]):
        raise ValueError(f"it does not fit {loader.__name__}: {misfits[0]}")
    return network.float().eval()


def check_words(tokenizer: Callable) -> None:
    """Raise ValueError for the tokenizer without words that takes the place of missing files."""
    if tokenizer("a cat").input_ids == tokenizer("a dog").input_ids:
        raise ValueError("its tokenizer knows no words; are its files there?")


def load_weights(network: nn.Module, file: Path, key: str | None = None) -> None:
    """Load a pickled state_dict, or state_dict[key]; its names and shapes must be the network's."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        state = state if key is None else state[key]
    except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged or holds other things than this network's weights: "
                         f"{type(error).__name__}") from error
    wanted, found = ({name: tuple(weight.shape) for name, weight in weights.items()}
                     for weights in (network.state_dict(), state))
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise ValueError(f"{name} is {found.get(name, 'missing')} in {file} and "
                             f"{wanted.get(name, 'missing')} in the network")
    network.load_state_dict(state)
