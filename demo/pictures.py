"""The emoji world's pictures: a scene of demo/grammar.py painted with an emoji font, and faults.

The animals are glyphs of Noto Color Emoji, by Google, under the SIL Open Font License 1.1
(demo/LICENSE-font.txt). Only the scripts that make demo/'s networks need the font.
"""

import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from demo.grammar import ANIMALS, COLOURS, PATTERNS, PLACES, SIZES, Scene

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
GLYPHS = (
    "🐱🐕🐴🐒🐰🦓🕷🐦🐑🦌🐮🐐🦁🐅🐻🦝🦊🐺🦎🪲🐜🦋🐠🦈🐳🐬🐿🐭🐀🐍🐢🐸🐓🦆🪿🐝🐷🦃🪰🦙🐫🦇🦍🦔🦘"
)
RGB = {
    "red": (220, 38, 38), "orange": (245, 130, 20), "yellow": (247, 216, 40),
    "green": (40, 160, 70), "blue": (40, 90, 225), "purple": (125, 45, 180),
    "pink": (250, 145, 195), "brown": (125, 80, 42), "black": (28, 28, 32),
    "white": (246, 246, 250),
}
RESOLUTION = 64
SIDE = {"small": 0.48, None: 0.66, "large": 0.86}  # of the glyph's longer side, in pictures
CENTRE = {"small": 0.27, None: 0.33, "large": 0.36}  # of an animal on the left
FAULTS = ("blurred", "faded", "noisy", "blotched")


@cache
def glyph(animal: str, colour: str | None) -> Image.Image:
    """An animal's emoji with transparency, in its own colours or drawn in shades of one."""
    canvas = Image.new("RGBA", (136, 128))
    font = ImageFont.truetype(FONT, 109)  # the one size that the font's bitmaps have
    ImageDraw.Draw(canvas).text((0, 0), GLYPHS[ANIMALS.index(animal)], font=font,
                                embedded_color=True)
    emoji = canvas.crop(canvas.getbbox())
    if colour is None:
        return emoji
    pixels = np.asarray(emoji).astype(float)
    grey, alpha = pixels[..., :3] @ [0.3, 0.59, 0.11], pixels[..., 3]
    low, middle, high = np.percentile(grey[alpha > 128], [2, 50, 98])
    # The picture's median grey becomes the colour itself, unless hardly anything is left beside it.
    middle = np.clip(middle, low + 0.35 * (high - low), low + 0.65 * (high - low))
    tone = np.interp(grey, [low, middle, high], [0, 0.5, 1])[..., None]
    base = np.array(RGB[colour], float)
    ends = {"black": (0, 110), "white": (120, 255)}
    dark, light = (np.broadcast_to(end, 3)
                   for end in ends.get(colour, (0.3 * base, 0.45 * base + 140)))
    shades = np.where(tone < 0.5, dark + 2 * tone * (base - dark),
                      base + (2 * tone - 1) * (light - base))
    return Image.fromarray(np.dstack([shades, alpha]).round().astype(np.uint8))


@cache
def ground(background: str, pattern: str | None) -> Image.Image:
    """A background; stripes and spots are a paler shade, of white and black a greyer one."""
    base = np.array(RGB[background])
    greys = {"black": (105, 105, 112), "white": (185, 187, 195)}
    pale = tuple(int(c) for c in greys.get(background, (base + 2 * 255) // 3))
    picture = Image.new("RGB", (2 * RESOLUTION, 2 * RESOLUTION), RGB[background])
    draw = ImageDraw.Draw(picture)
    for y in range(0, 2 * RESOLUTION, 32):
        if pattern == "striped":
            draw.rectangle((0, y, 2 * RESOLUTION, y + 15), fill=pale)
        if pattern == "spotted":
            for x in range(0, 2 * RESOLUTION, 32):
                draw.ellipse((x + 7, y + 7, x + 25, y + 25), fill=pale)
    return picture


def random_scene(rng: random.Random) -> Scene:
    """A scene with a background always, never one that is held out."""
    while True:
        scene = Scene(
            rng.choice(ANIMALS), rng.choice((None, *SIZES)),
            rng.choice(COLOURS) if rng.random() < 0.65 else None, rng.choice((None, *PLACES)),
            rng.choice((None, None, *PATTERNS)), rng.choice(COLOURS),
        )
        if scene.colour != scene.background and not scene.is_held_out():
            return scene


def paint(scene: Scene, rng: random.Random, faults: tuple[str, ...] = ()) -> np.ndarray:
    """One (64, 64, 3) uint8 picture of a scene that has a background; size, place, tilt vary.

    An animal of no named colour has its own colours, of no named size is of middle size, and of no
    named place is in the centre.
    """
    canvas = 2 * RESOLUTION
    picture = ground(scene.background, scene.pattern).copy()
    animal = glyph(scene.animal, scene.colour)
    animal = animal.rotate(rng.uniform(-6, 6), Image.Resampling.BICUBIC, expand=True)
    scale = SIDE[scene.size] * rng.uniform(0.95, 1.05) * canvas / max(animal.size)
    animal = animal.resize([round(scale * side) for side in animal.size], Image.Resampling.BICUBIC)
    left = CENTRE[scene.size]
    x = {"left": left, None: 0.5, "right": 1 - left}[scene.place] + rng.uniform(-0.02, 0.02)
    y = 0.5 + rng.uniform(-0.03, 0.03)
    corner = round(x * canvas - animal.width / 2), round(y * canvas - animal.height / 2)
    picture.paste(animal, corner, animal)
    if "blurred" in faults:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(3.5, 6)))
    if "faded" in faults:
        haze = Image.new("RGB", picture.size, tuple(rng.randint(110, 220) for _ in range(3)))
        picture = Image.blend(picture, haze, rng.uniform(0.5, 0.75))
    if "blotched" in faults:
        draw = ImageDraw.Draw(picture)
        for _ in range(rng.randint(3, 6)):
            x, y, radius = rng.randrange(canvas), rng.randrange(canvas), rng.randint(6, 16)
            box = (x - radius, y - radius * rng.uniform(0.5, 1), x + radius, y + radius)
            draw.ellipse(box, fill=tuple(rng.randrange(256) for _ in range(3)))
    pixels = np.asarray(picture.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX))
    if "noisy" in faults:
        noise = np.random.default_rng(rng.getrandbits(32)).normal(size=pixels.shape)
        pixels = (pixels + rng.uniform(25, 60) * noise).clip(0, 255).astype(np.uint8)
    return pixels
