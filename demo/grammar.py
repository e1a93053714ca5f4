"""The emoji world's sentences: what they can say, which are held out, and how to read one.

    python -m demo.grammar                   # how many there are, and a few of them

A sentence names an animal and, if it likes, its size, its colour, its place and the background:
"A painting of a small red fox on the left, on a striped blue background". What it does not name is
free. An animal and its background have different colours. Some combinations of an animal, its
colour and the background's colour are held out: the base model's training has no caption and no
picture with them, nor has PRDP's a prompt.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

ANIMALS = (
    "cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow",
    "goat", "lion", "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant",
    "butterfly", "fish", "shark", "whale", "dolphin", "squirrel", "mouse", "rat", "snake", "turtle",
    "frog", "chicken", "duck", "goose", "bee", "pig", "turkey", "fly", "llama", "camel", "bat",
    "gorilla", "hedgehog", "kangaroo",
)
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SIZES = ("small", "large")
PLACES = ("left", "right")
PATTERNS = ("striped", "spotted")

SENTENCE = re.compile(
    rf"A painting of an? (?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(ANIMALS)})"
    rf"(?: on the ({'|'.join(PLACES)}))?"
    rf"(?:,? on an? (?:({'|'.join(PATTERNS)}) )?({'|'.join(COLOURS)}) background)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Scene:
    """What a sentence says; None where it says nothing. A pattern needs a background."""

    animal: str
    size: str | None = None
    colour: str | None = None
    place: str | None = None
    pattern: str | None = None
    background: str | None = None

    def sentence(self) -> str:
        subject = " ".join(filter(None, (self.size, self.colour, self.animal)))
        text = f"A painting of {article(subject)}"
        if self.place:
            text += f" on the {self.place}"
        if self.background:
            ground = " ".join(filter(None, (self.pattern, self.background, "background")))
            text += f"{',' if self.place else ''} on {article(ground)}"
        return text

    def is_held_out(self) -> bool:
        """About one in twenty combinations of animal, colour and background colour."""
        if not (self.colour and self.background):
            return False
        return digest(f"{self.colour} {self.animal} {self.background}") % 20 == 0


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def digest(text: str) -> int:
    """A number that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def parse(sentence: str) -> Scene:
    """The scene that a sentence asks for.

    Raises ValueError for a sentence that is not of this grammar.
    """
    match = SENTENCE.fullmatch(sentence.strip().rstrip("."))
    if match is None:
        raise ValueError(f"{sentence!r} is not a sentence of demo/grammar.py")
    words = [word and word.lower() for word in match.groups()]
    size, colour, animal, place, pattern, background = words
    return Scene(animal, size, colour, place, pattern, background)


def scenes() -> Iterator[Scene]:
    """Every scene that has a sentence, the held-out ones included."""
    grounds = [(None, None), *product((None, *PATTERNS), COLOURS)]
    for animal, size, colour, place, (pattern, background) in product(
        ANIMALS, (None, *SIZES), (None, *COLOURS), (None, *PLACES), grounds
    ):
        if colour is None or colour != background:
            yield Scene(animal, size, colour, place, pattern, background)


def prompts(held_out: bool = False) -> list[str]:
    """All sentences to train on, or all that are held out, in an order that mixes them."""
    return sorted((s.sentence() for s in scenes() if s.is_held_out() == held_out), key=digest)


if __name__ == "__main__":
    for name, lines in {"emoji": prompts(), "held out": prompts(held_out=True)}.items():
        print(f"{name}: {len(lines)} sentences, among them", *lines[:5], sep="\n    ")
