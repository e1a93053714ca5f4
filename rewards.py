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
    FILE.py:FUNCTION.SCORE  one score of your function's dict: SCORE -> (P,) tensor

A weight follows the last `=` of an item. At weight 0 a score is logged, even NaN, but not summed.
Scores of one dict, as in mine.py:f.sharp=2,mine.py:f.red=0, share one call of f. Where two scores
have the same name, each is logged by its item without the weight. A further model is a factory in
FACTORIES.

Weights come from the Hugging Face hub: xswu/HPSv2 (Apache-2.0; 6.2 GB with Stable Diffusion v1.4),
yuvalkirstain/PickScore_v1 (MIT), and for aesthetic openai/clip-vit-large-patch14 (MIT) and
trl-lib/ddpo-aesthetic-predictor (Apache-2.0). Licences are as far as we know. Without a network
give copies: hpsv2:FILE_OR_FOLDER, HPS_v2_compressed.pt or for hpsv2.1 HPS_v2.1_compressed.pt;
pickscore:FOLDER; aesthetic:FOLDER, the files of that CLIP and the predictor's .pth.

Preference scores and clip are cosines, without CLIP's factor of 100. HPSv2's images are resized
with antialiasing, as its own code does since torchvision 0.17; it moves scores by up to 9e-4 on
random weights. A call gets at most --micro_batch_size images, rounded to 8 bits as in a saved
picture. Scorers compute in float32, also under autocast or TF32. Only what a spec names is loaded.
"""

import contextlib
import functools
import importlib.util
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor, nn

from prompts.sets import UserError, explain, split_list

# Else transformers posts the id of a repository without safetensors to a service that converts its
# weights, and then downloads them a second time.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

Scorer = Callable[[Tensor, list[str]], Tensor]


class RewardError(RuntimeError):
    """A scorer failed. The message names it and says why."""


class Reward:
    """A weighted sum of scorers, as Table 4's multi-reward is; a single reward is a sum of one."""

    def __init__(self, scorers: dict[str, Scorer], weights: dict[str, float]):
        self.scorers, self.weights = scorers, weights

    @torch.no_grad()
    def terms(self, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Every scorer's raw, unweighted scores.

        images: (P, 3, H, W) float in [0, 1]; prompts: P strings. Returns name -> (P,) float32, in
        the scorer's own unit, NaN for an image that is not finite. Raises RewardError if a scorer
        fails, UserError if it returns other than P numbers; both name it. A user's function gets
        copies of images and prompts, and `contained` restores what it sets.
        """
        is_finite = images.isfinite().flatten(1).all(1)  # (P,); in 8 bits NaN would be black
        images = images.mul(255).round().clamp(0, 255).to(torch.uint8)
        scores = {}
        for name, scorer in self.scorers.items():
            with contained(f"reward {name!r}", images.device):
                score = scorer(images, prompts)
            found = f"a {type(score).__name__}"
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                score = torch.as_tensor(score).detach()
                found = f"shape {tuple(score.shape)}"
            if found != f"shape ({len(prompts)},)":
                raise UserError(f"reward {name!r} returned {found}; it must return one number an "
                                f"image, shape ({len(prompts)},), or for FUNCTION.SCORE a dict")
            scores[name] = score.to(images.device, torch.float32).where(is_finite, math.nan)
        call_function.cache_clear()
        return scores

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """sum over scorers of weight * score, (P,) float32; a weight of 0 leaves even NaN out."""
        return sum(weight * terms[name] for name, weight in self.weights.items() if weight)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """r(x_0, c): images (P, 3, H, W) float in [0, 1] and P prompts -> (P,) float32."""
        return self.total(self.terms(images, prompts))


def load_reward(spec: str, device: torch.device | str) -> Reward:
    """Build the reward of a spec (see the module's docstring), its networks on `device`. Raises
    UserError for a spec that is not clear and for weights that cannot be loaded, RewardError for
    a reward file that fails. Both name the scorer."""
    for name in [name for name in sys.modules if name.startswith(f"{MODULE}/")]:
        del sys.modules[name]  # a reward file is read as it is now, in a notebook too
    scorers, weights = {}, {}
    for name, (scorer, factory, weight) in parse_reward(spec).items():
        try:
            scorers[name], weights[name] = factory(scorer, device), weight
        except Exception as error:
            if factory is load_function or isinstance(error, torch.OutOfMemoryError):
                raise
            hint = "" if ":" in scorer else f"; a local copy is given as {scorer}:PATH"
            raise UserError(
                f"--reward {scorer} cannot be loaded ({explain(error)}){hint}") from error
    return Reward(scorers, weights)


def parse_reward(spec: str) -> dict[str, tuple[str, Callable, float]]:
    """The terms of a spec, by the name under which each is logged: what stands in the spec, its
    factory and its weight. It loads nothing. Raises UserError for a spec that is not clear."""
    terms, parsed, items = [], {}, split_list(spec, "--reward")
    try:
        for item in items:
            scorer, _, weight = item.rpartition("=") if "=" in item else (item, "", "1")
            file, _, function = scorer.rpartition(":")
            if file.endswith(".py"):
                name, factory = function.partition(".")[2] or function, load_function
            elif not (factory := FACTORIES.get(name := scorer.partition(":")[0])):
                raise ValueError(f"unknown reward {scorer!r}; there are {', '.join(FACTORIES)} and "
                                 "FILE.py:FUNCTION")
            if scorer == "clip" or scorer.endswith(":"):
                raise ValueError(f"{scorer!r} lacks what a colon gives: a folder, file or function")
            terms.append((name, (scorer, factory, float(weight))))
        names = ["kl", *(name for name, _ in terms)]  # as kl is a row of --evaluate
        for name, term in terms:  # without slashes, as a run's folder is named after them
            name = (term[0] if names.count(name) > 1 else name).replace("/", "-")
            if name in parsed:
                raise ValueError(f"{name!r} is given twice")
            parsed[name] = term
        if not 0 < sum(abs(weight) for _, _, weight in parsed.values()) < math.inf:
            raise ValueError("weights must be finite, and at least one of them not 0")
    except ValueError as error:
        raise UserError(f"--reward {spec}: {error}") from None
    return parsed


@contextlib.contextmanager
def contained(name: str, device: torch.device | str) -> Iterator[None]:
    """Run a scorer. Its errors name it. Dtype, TF32, grad mode, directory are restored after it."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    dtype, *allow_tf32 = torch.get_default_dtype(), matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with (contextlib.chdir("."), torch.set_grad_enabled(torch.is_grad_enabled()),
              torch.autocast(torch.device(device).type, enabled=False)):
            yield
    except (KeyboardInterrupt, torch.OutOfMemoryError, UserError):
        raise  # no fault of the code, or said already
    except BaseException as error:  # SystemExit too, which would end the run as if all were well
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RewardError(f"{name} failed: {cause}") from error
    finally:
        torch.set_default_dtype(dtype)
        matmul.allow_tf32, cudnn.allow_tf32 = allow_tf32


def load_hpsv2(spec: str, device: torch.device | str) -> Scorer:
    """A finetuned open_clip ViT-H-14 (Wu et al., 2023): "hpsv2" or "hpsv2.1", ":FILE_OR_FOLDER"."""
    import open_clip
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    version, _, local = spec.partition(":")
    name = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}[version]
    file = Path(local or hf_hub_download("xswu/HPSv2", name))
    network = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14")).to(device).eval()
    file = file / name if file.is_dir() else file
    network.load_state_dict(torch.load(file, "cpu", weights_only=True)["state_dict"])
    tokenizer = open_clip.get_tokenizer("ViT-H-14")

    def image_features(images: Tensor) -> Tensor:
        # As in the official code, the longer side becomes 224 and black pads the shorter one.
        size = network.visual.image_size  # 224, 224
        sides = [round(side * size[0] / max(images.shape[-2:])) for side in images.shape[-2:]]
        images = vision.resize(images / 255, sides, InterpolationMode.BICUBIC, antialias=True)
        images = vision.center_crop(images, size)  # pads, as no side is longer
        return network.encode_image(vision.normalize(
            images, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))

    return cosine(image_features, lambda prompt: network.encode_text(tokenizer(prompt).to(device)))


def load_clip(spec: str, device: torch.device | str) -> Scorer:
    """A transformers CLIP: "clip:FOLDER_OR_HUB_ID", "pickscore" or "pickscore:FOLDER"."""
    from transformers import CLIPTokenizer

    source = spec.partition(":")[2] or "yuvalkirstain/PickScore_v1"
    network, image_features = load_clip_network(source, device)
    tokenizer = CLIPTokenizer.from_pretrained(source)
    check_words(tokenizer)
    longest = network.config.text_config.max_position_embeddings  # 77 tokens

    def text_features(prompt: str) -> Tensor:
        inputs = tokenizer(prompt, truncation=True, max_length=longest, return_tensors="pt")
        return network.text_projection(network.text_model(**inputs.to(device)).pooler_output)

    return cosine(image_features, text_features)


def load_clip_network(source: str, device: torch.device | str) -> tuple[nn.Module, Callable]:
    """A transformers CLIP, and its features (P, F) as a function of (P, 3, H, W) uint8 images."""
    # Not by CLIPProcessor, which refuses an image processor's old name, CLIPFeatureExtractor.
    from transformers import CLIPImageProcessor, CLIPModel

    network = load_network(CLIPModel, source).to(device)  # first, as it tells why the hub fails
    processor = CLIPImageProcessor.from_pretrained(source)

    def image_features(images: Tensor) -> Tensor:
        # uint8 images, because the processor divides by 255 whatever it is given.
        inputs = processor(list(images), return_tensors="pt").to(device)
        return network.visual_projection(network.vision_model(**inputs).pooler_output)

    return network, image_features


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
    local = spec.partition(":")[2]
    network, image_features = load_clip_network(local or "openai/clip-vit-large-patch14", device)
    # No activations: as published, it is linear from end to end.
    head = nn.ModuleDict({"layers": nn.Sequential(
        nn.Linear(network.config.projection_dim, 1024), nn.Dropout(0.2),
        nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64), nn.Dropout(0.1),
        nn.Linear(64, 16), nn.Linear(16, 1))}).to(device).eval()
    file = (next(Path(local).glob("*.pth"), Path(local, "*.pth")) if local else  # its name varies
            hf_hub_download("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"))
    head.load_state_dict(torch.load(file, "cpu", weights_only=True))

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        return head["layers"](nn.functional.normalize(image_features(images), dim=-1)).squeeze(-1)

    return score


def load_jpeg(spec: str, device: torch.device | str) -> Scorer:
    """Minus or plus the kB (1000 bytes) of the quality-95 JPEG, a reward of the DDPO paper."""
    from torchvision.transforms.functional import to_pil_image

    sign = {"jpeg_compressibility": -1, "jpeg_incompressibility": 1}[spec]

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        files = [io.BytesIO() for _ in images]
        for image, file in zip(images.cpu(), files, strict=True):
            to_pil_image(image).save(file, format="JPEG", quality=95)
        return torch.tensor([sign * file.tell() / 1000 for file in files])

    return score


def load_function(spec: str, device: torch.device | str) -> Scorer:
    """FUNCTION of FILE.py, which gets float images in [0, 1], or SCORE of the dict it returns."""
    file, _, name = spec.rpartition(":")
    name, _, key = name.partition(".")
    if not Path(file).is_file():
        raise UserError(f"--reward {spec}: there is no file {file}")
    with contained(f"--reward {spec}: {file}", device):  # import splits a name at its dots
        module = importlib.import_module(MODULE + str(Path(file).resolve()).replace(".", "%2E"))
    if not callable(getattr(module, name, None)):
        raise UserError(f"--reward {spec}: there is no function {name!r} in {file}")

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        scores = call_function(module, name, images, tuple(prompts))
        if not key:
            return scores
        returned = f"--reward {spec}: {name} returned"
        if not isinstance(scores, dict):
            raise UserError(f"{returned} a {type(scores).__name__}, not a dict")
        if key not in scores:
            raise UserError(f"{returned} no score {key!r}, but {', '.join(scores)}")
        return scores[key]

    return score


# A reward file is the module rewards./PATH, a name that hides no other module. This is how import
# finds it, in a reward's worker processes too: to import it they import rewards first.
MODULE, __path__ = f"{__name__}.", []
sys.meta_path.append(SimpleNamespace(find_spec=lambda name, *_: (
    importlib.util.spec_from_file_location(name, name.removeprefix(MODULE).replace("%2E", "."))
    if name.startswith(f"{MODULE}/") else None)))


@functools.cache  # until the batch is scored: the scores of a dict share a call
def call_function(module: ModuleType, name: str, images: Tensor, prompts: tuple[str]) -> Tensor:
    return getattr(module, name)(images / 255, list(prompts))


FACTORIES = {  # (the scorer's part of the spec, device) -> scorer of (P, 3, H, W) uint8 images
    "hpsv2": load_hpsv2, "hpsv2.1": load_hpsv2, "pickscore": load_clip, "clip": load_clip,
    "aesthetic": load_aesthetic, "jpeg_compressibility": load_jpeg,
    "jpeg_incompressibility": load_jpeg,
}


def load_network(loader: type, source: str | Path, **options: str) -> nn.Module:
    """loader.from_pretrained(source) in float32 and eval mode; a half-precision file only where
    there is no other. Raises ValueError for weights that are missing or misshapen, which it would
    fill with random numbers."""
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)
    try:
        network, report = loader.from_pretrained(source, **options)
    except OSError as error:  # a broken file is an error, no reason to load another one
        cause = error.__cause__ or error.__context__
        if "no file named" not in str(error) or isinstance(cause, LocalEntryNotFoundError):
            raise
        network, report = loader.from_pretrained(source, variant="fp16", **options)
        print(f"{source}: of {options.get('subfolder', 'it')} there is half precision only")
    if misfits := sorted(report["missing_keys"]) + sorted(report["mismatched_keys"]):
        raise ValueError(f"it does not fit {loader.__name__}: {misfits[0]}")
    return network.float().eval()


def check_words(tokenizer: Callable) -> None:
    """Raise ValueError for the empty tokenizer that transformers returns for missing files."""
    if tokenizer("a cat").input_ids == tokenizer("a dog").input_ids:
        raise ValueError("its tokenizer knows no words; are its files there?")
