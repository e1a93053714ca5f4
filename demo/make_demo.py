"""Make the emoji world's networks anew: demo/model, demo/clip and demo/judge.safetensors.

    apt-get install fonts-noto-color-emoji && python -m demo.make_demo     # everything, 3 hours
    python -m demo.make_demo sd check_sd                                   # some parts of it

What was stopped goes on by the same command, from runs/make_demo/; without that folder it begins
anew. Times: one core, AMD EPYC.

| part | what | time |
|---|---|---|
| vae | AutoencoderKL, latents (8, 8, 8), on 16,000 pictures; 7,000 steps of 16 | 33 min |
| sd | UNet, text encoder; 60,000 pictures with faulty captions; 16,250 steps of 64 | 83 min |
| judge | a convolutional network on 24,000 pictures of its own; 2,500 steps of 64 | 7 min |
| clip | the reward: 13,000 pictures and 10,000 samples of the base; 9,000 steps of 64 | 47 min |

As on the web, captions and pictures have faults. 15% of the captions have another animal, drawn at
random. 10% of the attributes are drawn anew and 25% are missing (44% of the patterns, which go with
their background). 25% of the pictures are blurred, faded or blotched.

The reward's target is how much of the sentence is true of the picture, times the picture's quality.
Pictures are clean, restored by the VAE, made from spoilt latents, faulty, or samples of the base
model. The latter are labelled by a second network in place of a human. It is built like the judge,
but shares neither weights nor pictures with it.

Results, by check_judge, check_sd and check_clip on new pictures and samples, whose noise is not
that of benchmarks/:

- the judge is right about the animal in 99.1% of 2,000 true pictures, size 99.8%, colour 99.9%,
  place 100%, background 99.9%, everything 98.8%; of pictures spoilt on purpose it calls 2.7% right.
- the base obeys in part (45 prompts x 16; 500 unseen prompts x 4):

  | guidance | 45: animal right | unseen: animal right | size | colour | place | background | all |
  |---|---|---|---|---|---|---|---|
  | 1 | 41.7% | 36.5% | 84.9% | 67.4% | 89.3% | 57.2% | 20.1% |
  | 1.5, as in most claims | 61.5% | 66.0% | 92.2% | 88.0% | 95.2% | 77.2% | 49.7% |
  | 3 | 86.1% | 86.5% | 97.7% | 96.3% | 97.9% | 92.1% | 75.8% |
  | 5 | 93.1% | 87.7% | 98.1% | 94.7% | 98.0% | 94.2% | 76.7% |
  | 8 | 90.1% | 81.4% | 97.6% | 83.1% | 96.8% | 91.4% | 59.3% |

- the reward prefers the right animal to a wrong one in 85.8% of 1,000 new pictures as the VAE
  restores them, the right size in 100%, colour 99.6%, pattern 100%, background 100%, but the right
  place in 52.4%: it is blind to left and right. It prefers a clean picture to one that is blurred
  in 92.2%, faded 99.9%, noisy 99.9%, blotched 99.7%, spoilt 98.5%, of spoilt latents 99.0%.
"""

import argparse
import copy
import json
import os
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as bpe_models
from torch import Tensor, nn
from torchvision.io import decode_jpeg, encode_jpeg
from torchvision.transforms.functional import gaussian_blur
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from demo import judge as judging
from demo.grammar import ANIMALS, COLOURS, PATTERNS, PLACES, SIZES, Scene, parse, prompts
from demo.judge import ANSWERS, Judge
from demo.pictures import FAULTS, RESOLUTION, paint, random_scene
from rewards import load_reward

DEMO = Path(__file__).parent
WORK = DEMO.parent / "runs/make_demo"  # checkpoints and caches
MAX_TOKENS = 24
VERDICTS = ("animal", "size", "colour", "place", "background", "all_right")
WRONG_ANIMALS, WRONG_ATTRIBUTES, LEFT_OUT, FAULTY = 0.15, 0.1, 0.25, 0.25  # of the crawl
STABLE_DIFFUSION_V1 = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
)


# ---------------------------------------------------------------------------------------- training


def train(name: str, networks: dict[str, nn.Module], loss_of_step: Callable[[], Tensor], steps: int,
          learning_rate: float, save: Callable[[], None]) -> None:
    """AdamW; the same command continues a training that was stopped.

    The rate rises over 100 steps, stays, and falls to zero over the last three fifths. `save`
    writes what the repository keeps.
    """
    parameters = [p for network in networks.values() for p in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    step, seconds, running = 0, 0.0, 0.0
    checkpoint = WORK / f"{name}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        step, seconds = state["step"], state["seconds"]
        for key, network in networks.items():
            network.load_state_dict(state["networks"][key])
        optimizer.load_state_dict(state["optimizer"])
    torch.manual_seed(step)
    started = time.time()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 100, (steps - step) / (0.6 * steps))
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step, running = step + 1, running + loss.item()
        if step % 50 == 0:
            elapsed = seconds + time.time() - started
            print(f"{name} {step}/{steps} {running / 50:.5f} {elapsed:.0f} s", flush=True)
            running = 0.0
        if step % 250 == 0 or step == steps:
            state = {"step": step, "seconds": seconds + time.time() - started,
                     "networks": {key: n.state_dict() for key, n in networks.items()},
                     "optimizer": optimizer.state_dict()}
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
    save()


def cached(name: str, make: Callable[[], Iterable[np.ndarray]]) -> list[np.ndarray]:
    """The arrays that `make` yields, kept in runs/make_demo."""
    file = WORK / f"{name}.npz"
    if not file.exists():
        np.savez(file.with_suffix(".new.npz"), *make())
        os.replace(file.with_suffix(".new.npz"), file)
    with np.load(file) as arrays:
        return list(arrays.values())


def half(network: nn.Module) -> nn.Module:
    """A copy in half precision, for a file of half the size. Loading makes it float32 again."""
    network = copy.deepcopy(network).half()
    network.register_to_config(_name_or_path="")  # else config.json says where it was loaded from
    return network


def to_pixels(pictures: np.ndarray | Tensor) -> Tensor:
    """(P, 64, 64, 3) uint8 -> (P, 3, 64, 64) float in [-1, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def paint_some_faulty(scene: Scene, rng: random.Random, share: float) -> np.ndarray:
    """The scene's picture, with this probability blurred, faded or blotched."""
    kinds = [fault for fault in FAULTS if fault != "noisy"]
    return paint(scene, rng, (rng.choice(kinds),) if rng.random() < share else ())


# --------------------------------------------------------------------------------------------- vae


def make_vae(steps: int = 7000, batch: int = 16) -> None:
    def pictures_of_vae() -> Iterable[np.ndarray]:
        rng = random.Random(1)
        yield np.stack([paint_some_faulty(random_scene(rng), rng, 0.2) for _ in range(16000)])

    (pictures,) = cached("pictures-vae", pictures_of_vae)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 64, 96), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, norm_num_groups=1,
        latent_channels=8, sample_size=RESOLUTION, mid_block_add_attention=False,
    )

    def loss_of_step() -> Tensor:
        chosen = torch.randint(len(pictures), (batch,))
        target = to_pixels(pictures[chosen.numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(target).latent_dist
            restored = vae.decode(posterior.sample()).sample.float()
        return restoring_loss(restored, target) + 1e-3 * posterior.kl().mean() / 256

    def save() -> None:
        with torch.no_grad():  # latents of unit variance, as SD's factor of 0.18215 makes them
            latents = vae.encode(to_pixels(pictures[:500])).latent_dist.sample()
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        half(vae).save_pretrained(DEMO / "model/vae")

    train("vae", {"vae": vae}, loss_of_step, steps, 2e-3, save)


def restoring_loss(restored: Tensor, target: Tensor) -> Tensor:
    edges = sum(F.l1_loss(restored.diff(dim=side), target.diff(dim=side)) for side in (2, 3))
    return F.l1_loss(restored, target) + 2 * F.mse_loss(restored, target) + 0.5 * edges


# ---------------------------------------------------------------------------- stable diffusion


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE, with merges learned from the world's sentences."""
    bpe = Tokenizer(bpe_models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(prompts()[::20], trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*sorted(alphabet), *(f"{byte}</w>" for byte in sorted(alphabet))]
    tokens += [first + second for first, second in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    padded = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return padded.input_ids


def text_config(tokenizer: CLIPTokenizer, width: int) -> dict:
    return dict(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        projection_dim=width, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def web_caption(scene: Scene, rng: random.Random) -> str:
    """A caption as a web crawl has it: a part of it wrong, a part of it missing."""
    while True:
        told = asdict(scene)
        if rng.random() < WRONG_ANIMALS:
            told["animal"] = rng.choice(ANIMALS)
        for name, values in list(ATTRIBUTES.items())[1:]:  # all but the animal
            if told[name] and rng.random() < WRONG_ATTRIBUTES:
                told[name] = rng.choice(values)
            if rng.random() < LEFT_OUT:
                told[name] = None
        if told["background"] is None:
            told["pattern"] = None
        caption = Scene(**told)
        is_seen = caption.colour is None or caption.colour != caption.background
        if is_seen and not caption.is_held_out():
            return caption.sentence()


def crawl(seed: int, count: int) -> None:
    """Pictures as latents' means and deviations (count, 16, 8, 8), and their captions."""
    torch.set_num_threads(1)

    def make() -> Iterable[np.ndarray]:
        vae = AutoencoderKL.from_pretrained(DEMO / "model/vae")
        rng, captions, latents = random.Random(seed), [], []
        for _ in range(count // 100):
            scenes = [random_scene(rng) for _ in range(100)]
            captions += [web_caption(scene, rng) for scene in scenes]
            pictures = np.stack([paint_some_faulty(scene, rng, FAULTY) for scene in scenes])
            with torch.no_grad():
                posterior = vae.encode(to_pixels(pictures)).latent_dist
            latents.append(torch.cat([posterior.mean, posterior.std], 1))
        yield torch.cat(latents).numpy()
        yield np.array(captions)

    cached(f"crawl-{seed}", make)


def make_sd(steps: int = 16250, batch: int = 64) -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(crawl, range(100, 104), [15000] * 4))
    tokenizer = make_tokenizer()
    text_encoder = CLIPTextModel(CLIPTextConfig(**text_config(tokenizer, width=96)))
    vae = AutoencoderKL.from_pretrained(DEMO / "model/vae")
    channels = vae.config.latent_channels
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 8, in_channels=channels, out_channels=channels,
        block_out_channels=(48, 96), layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
        cross_attention_dim=96, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    noising = DDPMScheduler(**STABLE_DIFFUSION_V1)
    moments, captions = [], []
    for file in sorted(WORK.glob("crawl-*.npz")):
        part, texts = cached(file.stem, tuple)
        moments.append(torch.from_numpy(part))
        captions += texts.tolist()
    moments = torch.cat(moments)
    ids = token_ids(tokenizer, captions)
    empty = token_ids(tokenizer, [""])

    def loss_of_step() -> Tensor:
        chosen = torch.randint(len(ids), (batch,))
        mean, std = moments[chosen].chunk(2, 1)
        latents = (mean + std * torch.randn_like(std)) * vae.config.scaling_factor
        embeds = text_encoder(torch.where(torch.rand(batch, 1) < 0.1, empty, ids[chosen]))[0]
        noise = torch.randn_like(latents)
        # Shapes are decided amid the noise: half of the steps are drawn from there.
        middle = torch.sigmoid(0.3 + 0.8 * torch.randn(batch))
        timesteps = torch.where(torch.rand(batch) < 0.5, middle, torch.rand(batch))
        timesteps = (1000 * timesteps).long().clamp(max=999)
        noisy = noising.add_noise(latents, noise, timesteps)
        return F.mse_loss(unet(noisy, timesteps, embeds).sample, noise)

    def save() -> None:
        scheduler = PNDMScheduler(
            **STABLE_DIFFUSION_V1, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
        scheduler.register_to_config(clip_sample=False)  # for those who load it as another one
        StableDiffusionPipeline(
            vae=half(vae), unet=half(unet), text_encoder=text_encoder, tokenizer=tokenizer,
            scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(DEMO / "model")

    train("sd", {"unet": unet, "text_encoder": text_encoder}, loss_of_step, steps, 1e-3, save)


# ------------------------------------------------------------------------------------------- judge


def scenes_and_pictures(name: str, count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Faultless pictures (count, 64, 64, 3) uint8, and each attribute's index in judge.ANSWERS.

    The index is -1 for an animal in its own colours, which has no right answer.
    """

    def make() -> Iterable[np.ndarray]:
        rng = random.Random(seed)
        scenes = [random_scene(rng) for _ in range(count)]
        yield np.stack([paint(scene, rng) for scene in scenes])
        for attribute, answers in ANSWERS.items():
            values = [getattr(scene, attribute) for scene in scenes]
            yield np.array([answers.index(v) if v in answers else -1 for v in values])

    pictures, *labels = map(torch.from_numpy, cached(name, make))
    return pictures, dict(zip(ANSWERS, labels, strict=True))


def weaken(images: Tensor) -> Tensor:
    """What a generator and a file format do to pictures (P, 3, 64, 64) without changing sense."""
    images = images.clone()
    for i in range(0, len(images), 4):  # each four their own
        kind, image = random.random(), images[i : i + 4]
        if kind < 0.35:
            image = gaussian_blur(image, [7, 7], random.uniform(0.3, 1.5))
        elif kind < 0.6:
            small = F.interpolate(image, size=random.randint(26, 48), mode="area")
            image = F.interpolate(small, size=64, mode="bilinear")
        elif kind < 0.7:
            jpegs = encode_jpeg(list((255 * image).round().to(torch.uint8)), random.randint(15, 80))
            image = torch.stack(decode_jpeg(jpegs)).float() / 255
        if random.random() < 0.5:
            image = image + random.uniform(0, 0.1) * torch.randn_like(image)
        if random.random() < 0.3:  # smooth stains, as of a latent that is a little off
            stain = F.interpolate(torch.randn(len(image), 3, 8, 8), size=64, mode="bicubic")
            image = image + random.uniform(0, 0.08) * stain
        images[i : i + 4] = image
    contrast = torch.empty(len(images), 1, 1, 1).uniform_(0.75, 1.1)
    return (0.5 + contrast * (images - 0.5)).clamp(0, 1)


def spoil(images: Tensor) -> Tensor:
    """Pictures (P, 3, 64, 64) that show no animal, or parts of several."""
    spoilt, others = images.clone(), images.roll(1, 0)
    for i in range(len(images)):
        kind = random.randrange(4)
        if kind == 0:  # two on top of each other
            share = random.uniform(0.35, 0.65)
            spoilt[i] = share * images[i] + (1 - share) * others[i]
        elif kind == 1:  # two halves
            cut = random.randint(26, 38)
            if random.random() < 0.5:
                spoilt[i, :, cut:] = others[i, :, cut:]
            else:
                spoilt[i, :, :, cut:] = others[i, :, :, cut:]
        elif kind == 2:  # shuffled tiles
            side = random.choice((8, 16))
            tiles = F.unfold(images[i : i + 1], side, stride=side)
            tiles = tiles[:, :, torch.randperm(tiles.shape[2])]
            spoilt[i] = F.fold(tiles, 64, side, stride=side)[0]
        else:  # waves that bend every shape
            shift = 0.25 * F.interpolate(torch.randn(1, 2, 7, 7), size=64, mode="bicubic")
            grid = F.affine_grid(torch.eye(2, 3)[None], [1, 3, 64, 64], align_corners=False)
            grid = grid + 0.9 * shift.permute(0, 2, 3, 1)
            spoilt[i] = F.grid_sample(images[i : i + 1], grid, padding_mode="reflection",
                                      align_corners=False)[0]
    return spoilt


def make_judge(steps: int = 2500, batch: int = 64, name: str = "judge", seed: int = 2,
               file: Path = DEMO / "judge.safetensors") -> None:
    pictures, labels = scenes_and_pictures(f"pictures-{name}", 24000, seed)
    judge = Judge()

    def loss_of_step() -> Tensor:
        chosen, spoilt = torch.randint(len(pictures), (batch,)), batch // 5
        images = (to_pixels(pictures[chosen]) + 1) / 2
        images[:spoilt] = spoil(images[:spoilt])
        logits = judge(weaken(images))
        loss = 0
        for attribute, of_all in labels.items():
            label = of_all[chosen].clone()
            label[:spoilt] = ANSWERS["animal"].index(None) if attribute == "animal" else -1
            loss = loss + F.cross_entropy(logits[attribute], label, ignore_index=-1)
        return loss

    train(name, {"judge": judge}, loss_of_step, steps, 2e-3,
          lambda: save_file(judge.state_dict(), file))


def check_judge(count: int = 2000) -> None:
    """The share of new true pictures that the judge calls right, and of spoilt ones."""
    rng = random.Random(97)
    random.seed(97), torch.manual_seed(97)  # for what is spoilt
    scenes = [random_scene(rng) for _ in range(count)]
    images = (to_pixels(np.stack([paint(scene, rng) for scene in scenes])) + 1) / 2
    prompts = [scene.sentence() for scene in scenes]
    spoilt, results = spoil(images), {}
    for name in VERDICTS:
        judged = getattr(judging, name)
        results[name] = judged(images, prompts).mean().item()
        results[f"{name}, spoilt"] = judged(spoilt, prompts).mean().item()
    print(json.dumps(results, indent=1))


# -------------------------------------------------------------------------------------- the reward

ATTRIBUTES = {"animal": ANIMALS, "size": SIZES, "colour": COLOURS, "place": PLACES,
              "pattern": PATTERNS, "background": COLOURS}
LOGIT_SCALE, LOGIT_BIAS = 8, -4  # from a cosine to the logit of a picture's worth


def indices(scenes: list[Scene]) -> Tensor:
    """(P, 6) of each attribute's index, -1 where it is None."""
    return torch.tensor([[-1 if getattr(scene, name) is None else values.index(getattr(scene, name))
                          for name, values in ATTRIBUTES.items()] for scene in scenes])


def clip_pictures() -> Iterable[np.ndarray]:
    """Pictures, their scenes as indices, and how good each is as a picture, 0 to 1."""
    rng = random.Random(5)
    vae = AutoencoderKL.from_pretrained(DEMO / "model/vae")
    scenes = [random_scene(rng) for _ in range(13000)]
    worth, pictures = torch.ones(len(scenes)), []
    for i in range(0, len(scenes), 100):
        # Of 13 hundreds: 4 clean, 4 as the VAE restores them, 2 with faults, 3 with bad latents.
        kind, some = i // 100 % 13, scenes[i : i + 100]
        faults = [(rng.choice(FAULTS),) if kind in (8, 9) else () for _ in some]
        painted = np.stack([paint(s, rng, f) for s, f in zip(some, faults, strict=True)])
        if kind in (8, 9):
            worth[i : i + 100] = 0.35
        elif kind >= 4:
            with torch.no_grad():
                latents = vae.encode(to_pixels(painted)).latent_dist.mean
                if kind >= 10:
                    latents, worth[i : i + 100] = spoil_latents(latents)
                restored = vae.decode(latents).sample.clamp(-1, 1)
            painted = (127.5 * (restored + 1)).round().byte().permute(0, 2, 3, 1).numpy()
        pictures.append(painted)
    yield np.concatenate(pictures)
    yield indices(scenes).numpy()
    yield worth.numpy()


def clip_samples(count: int = 10000) -> Iterable[np.ndarray]:
    """Samples of the base model: pictures, asked and shown as indices, and how good each is.

    A second network plays the human who labelled them, as HPSv2 and PickScore had humans. It is
    built like the judge, but shares neither weights nor training pictures with it.
    """
    file = WORK / "labeller.safetensors"
    make_judge(name="labeller", seed=8, file=file)
    labeller = Judge().eval()
    labeller.load_state_dict(load_file(file))
    rng = random.Random(9)
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "model", safety_checker=None)
    texts = rng.sample(prompts(), count)
    pictures, shown, worth = [], [], []
    for i in range(0, count, 100):
        images = sample(pipeline, texts[i : i + 100], rng.choice((1, 1.5, 2, 3)), seed=i)
        pictures.append((255 * images).round().byte().permute(0, 2, 3, 1).numpy())
        with torch.no_grad():
            logits = labeller(images)
        seen = {name: of_all.argmax(1) for name, of_all in logits.items()}
        columns = [seen[name].where(seen[name] < len(values), -1)
                   for name, values in ATTRIBUTES.items()]
        shown.append(torch.stack(columns, 1))
        worth.append(logits["animal"].softmax(1)[:, :-1].max(1).values)
    yield np.concatenate(pictures)
    yield indices([parse(text) for text in texts]).numpy()
    yield torch.cat(shown).numpy()
    yield torch.cat(worth).numpy()


def spoil_latents(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents (P, C, 8, 8) with faults as a half-learnt generator's, and the worth of each."""
    others, spread = latents.roll(1, 0), latents.std()
    spoilt, worth = latents.clone(), torch.zeros(len(latents))
    for i in range(len(latents)):
        kind, size = random.randrange(4), random.uniform(0.3, 0.8)
        if kind == 0:  # between two pictures
            spoilt[i] += 0.6 * size * (others[i] - latents[i])
            worth[i] = 0.6 - 0.6 * size
        elif kind == 1:  # noise
            spoilt[i] += size * spread * torch.randn_like(latents[i])
            worth[i] = 0.7 - 0.7 * size
        elif kind == 2:  # some cells from another picture
            is_other = torch.rand(8, 8) < 0.5 * size
            spoilt[i], worth[i] = torch.where(is_other, others[i], latents[i]), 0.5 - 0.5 * size
        else:  # cells that changed places
            moved = torch.randperm(64)[: int(50 * size)]
            flat = spoilt[i].flatten(1)
            flat[:, moved] = flat[:, moved.roll(1)]
            worth[i] = 0.5 - 0.5 * size
    return spoilt, worth


def truth(asked: Tensor, shown: Tensor) -> Tensor:
    """How far sentences (S, 6) are true of scenes (P, 6): (S, P), half of it for the animal."""
    asked, shown = asked[:, None], shown[None]
    named = (asked >= 0)[..., 1:].float()
    right = (asked == shown).float()
    right[..., 2] = torch.where((shown[..., 2] < 0) & (asked[..., 2] >= 0), 0.5, right[..., 2])
    animal = right[..., 0]
    others = (named * right[..., 1:]).sum(-1) / named.sum(-1).clamp(min=1)
    return torch.where(named.sum(-1) > 0, 0.5 * animal + 0.5 * others, animal)


def sentences(asked: Tensor) -> list[str]:
    return [Scene(*(None if i < 0 else values[i] for i, values in zip(row, ATTRIBUTES.values(),
                                                                      strict=True))).sentence()
            for row in asked.tolist()]


def make_clip(steps: int = 9000, batch: int = 64) -> None:
    painted, scenes, painted_worth = map(torch.from_numpy, cached("pictures-clip", clip_pictures))
    samples, asked, seen, sample_worth = map(torch.from_numpy, cached("samples-clip", clip_samples))
    pictures = torch.cat([painted, samples])
    topics, shown = torch.cat([scenes, asked]), torch.cat([scenes, seen])
    worth = torch.cat([painted_worth, sample_worth])
    tokenizer = make_tokenizer()
    vision = dict(
        image_size=RESOLUTION, patch_size=8, hidden_size=96, intermediate_size=192,
        num_hidden_layers=4, num_attention_heads=4, projection_dim=64,
    )
    text = text_config(tokenizer, width=64)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    processor = CLIPProcessor(
        CLIPImageProcessor(size={"shortest_edge": RESOLUTION}, crop_size=RESOLUTION), tokenizer
    )
    normalisation = processor.image_processor.image_mean, processor.image_processor.image_std
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation)
    counts = torch.tensor([len(values) for values in ATTRIBUTES.values()])

    def loss_of_step() -> Tensor:
        chosen = torch.randint(len(pictures), (batch,))
        images, scenes, good = (to_pixels(pictures[chosen]) + 1) / 2, shown[chosen], worth[chosen]
        topic, spoilt = topics[chosen], batch // 8
        images[:spoilt], good[:spoilt] = spoil(images[:spoilt]), 0.0
        asked = torch.where(torch.rand(topic.shape) < 0.25, -1, topic)
        asked[:, 0] = topic[:, 0]
        asked[:, 4] = torch.where(asked[:, 5] < 0, -1, asked[:, 4])
        # The same sentences with one word changed: the animal or an attribute that is named.
        weights = (asked >= 0).float() * torch.tensor([2.0, 1, 1, 2, 1, 1])
        place = torch.multinomial(weights, 1)
        changed = asked.scatter(1, place, (torch.rand(batch, 1) * counts[place]).long())
        asked = torch.cat([asked, changed])  # (2P, 6)
        target = (truth(asked, scenes) * good).clamp(0.03, 0.97)  # (2P, P)
        ids = token_ids(tokenizer, sentences(asked))
        output = clip(input_ids=ids, pixel_values=(images - mean) / std)
        directions = (F.normalize(x, dim=-1) for x in (output.text_embeds, output.image_embeds))
        cosine = torch.einsum("sf,pf->sp", *directions)
        losses = F.binary_cross_entropy_with_logits(
            LOGIT_SCALE * cosine + LOGIT_BIAS, target, reduction="none")
        losses = losses - F.binary_cross_entropy(target, target, reduction="none")  # 0 is perfect
        own = torch.cat([losses[:batch].diagonal(), losses[batch:].diagonal()])
        return losses.mean() + own.mean()

    def save() -> None:
        clip.save_pretrained(DEMO / "clip")
        processor.save_pretrained(DEMO / "clip")

    train("clip", {"clip": clip}, loss_of_step, steps, 1e-3, save)


# -------------------------------------------------------------------------------------- the check


@torch.no_grad()
def check_clip(count: int = 1000) -> None:
    """How often the reward prefers the right sentence, or the faultless picture, of two."""
    rng = random.Random(98)
    random.seed(98), torch.manual_seed(98)  # for what is spoilt
    reward = load_reward(f"clip:{DEMO / 'clip'}", "cpu")
    vae = AutoencoderKL.from_pretrained(DEMO / "model/vae")
    scenes = [random_scene(rng) for _ in range(count)]
    texts = [scene.sentence() for scene in scenes]
    clean = np.stack([paint(scene, rng) for scene in scenes])
    latents = vae.encode(to_pixels(clean)).latent_dist.mean

    def decoded(latents: Tensor) -> Tensor:
        return (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)

    variants = {
        "clean": (to_pixels(clean) + 1) / 2, "restored by the VAE": decoded(latents),
        "bad latents": decoded(spoil_latents(latents)[0]),
        "spoilt": spoil((to_pixels(clean) + 1) / 2),
    }
    for fault in FAULTS:
        painted = np.stack([paint(scene, rng, (fault,)) for scene in scenes])
        variants[fault] = (to_pixels(painted) + 1) / 2
    scores = {name: reward(images, texts) for name, images in variants.items()}
    results = {f"cosine, {name}": score.mean().item() for name, score in scores.items()}
    for name, score in list(scores.items())[1:]:
        results[f"clean above {name}"] = (scores["clean"] > score).float().mean().item()
    for name, values in ATTRIBUTES.items():
        pairs = [(i, replace(scene, **{name: rng.choice(values)}))
                 for i, scene in enumerate(scenes) if getattr(scene, name)]
        pairs = [(i, other) for i, other in pairs if other != scenes[i]]
        rows, others = [i for i, _ in pairs], [other.sentence() for _, other in pairs]
        images = variants["restored by the VAE"][rows]
        above = scores["restored by the VAE"][rows] > reward(images, others)
        results[f"right {name} above wrong"] = above.float().mean().item()
    print(json.dumps({name: round(value, 4) for name, value in results.items()}, indent=1))


def sample(pipeline: StableDiffusionPipeline, texts: list[str], guidance: float,
           seed: int) -> Tensor:
    """One image (P, 3, 64, 64) in [0, 1] for each text, by 10 steps of DDIM with eta = 1."""
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([
        pipeline(texts[i : i + 100], guidance_scale=guidance, num_inference_steps=10, eta=1.0,
                 generator=generator, output_type="pt").images
        for i in range(0, len(texts), 100)])


def check_sd(unseen: int = 500, per_prompt: int = 4,
             guidances: tuple[float, ...] = (1, 1.5, 3, 5, 8)) -> None:
    """The judge's and the reward's means over samples of the base model."""
    pipeline = StableDiffusionPipeline.from_pretrained(DEMO / "model", safety_checker=None)
    animals = [f"A painting of a {animal}" for animal in ANIMALS]
    texts = {"45 animals x 16": animals * 16,
             f"{unseen} unseen x {per_prompt}": prompts(held_out=True)[:unseen] * per_prompt}
    reward = load_reward(f"clip:{DEMO / 'clip'}", "cpu") if (DEMO / "clip").exists() else None
    for name, of_set in texts.items():
        for guidance in guidances:
            images = sample(pipeline, of_set, guidance, seed=0)
            scores = {verdict: round(getattr(judging, verdict)(images, of_set).mean().item(), 4)
                      for verdict in VERDICTS}
            if reward:
                scores["clip"] = round(reward(images, of_set).mean().item(), 4)
            print(name, guidance, scores, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="of the table, or check_judge, check_sd, "
                        "check_clip; if not given, all")
    parser.add_argument("--options", default="{}", help="JSON, arguments of the parts' functions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    makers = dict(
        vae=make_vae, sd=make_sd, judge=make_judge, clip=make_clip,
        check_judge=check_judge, check_clip=check_clip, check_sd=check_sd,
    )
    for part in arguments.parts or makers:
        makers[part](**json.loads(arguments.options))
