"""The text that the character model learns: small stories from a grammar of a few dozen words.

`text.txt` is `make_text(seed=0, length=60_000)`. Verbs agree with their subjects, each place has
verbs of its own, and answers come from where the story is: there is more to learn than letters.
"""

from __future__ import annotations

import random
import textwrap

_ANIMALS = (
    *(("fox", "foxes"), ("hen", "hens"), ("goose", "geese"), ("mouse", "mice")),
    *(("wolf", "wolves"), ("otter", "otters"), ("crow", "crows"), ("badger", "badgers")),
)
_KINDS = ("old", "young", "grey", "hungry", "quiet", "clever", "sleepy", "little")
_PLACES = {
    "river": ("swims across", "drinks from", "looks into"),
    "field": ("runs across", "walks around", "waits in"),
    "barn": ("sleeps behind", "hides under", "looks into"),
    "forest": ("walks around", "hides in", "runs through"),
    "hill": ("climbs up", "rolls down", "sits on"),
}
_TIMES = ("in the morning", "at noon", "before the rain", "after supper", "every night")
_THINGS = ("bread", "apples", "corn", "a silver bell", "warm milk", "seven eggs")
_FEELINGS = ("is afraid of", "dreams of", "laughs at", "sings about", "talks about")


def make_text(seed: int, length: int) -> str:
    """Stories of `length` characters at least, in lines of up to 72; the same for the same seed."""
    draw = random.Random(seed)
    stories: list[str] = []
    while sum(map(len, stories)) < length:
        sentences = " ".join(_scene(draw) for _ in range(draw.randint(2, 4)))
        stories.append(textwrap.fill(sentences, 72))
    return "\n\n".join(stories) + "\n"


def _scene(draw: random.Random) -> str:
    """Two or three sentences about one animal, or several of a kind."""
    many = draw.random() < 0.4
    names = draw.choice(_ANIMALS)
    who = f"the {draw.choice(_KINDS)} {names[many]}"
    place = draw.choice(sorted(_PLACES))
    verb = _agree(draw.choice(_PLACES[place]), many)
    sentences = [f"{draw.choice(_TIMES)} {who} {verb} the {place}."]
    pronoun = "they" if many else "it"
    feeling = _agree(draw.choice(_FEELINGS), many)
    sentences.append(f"{pronoun} {feeling} {draw.choice(_THINGS)}.")
    if draw.random() < 0.5:
        other = draw.choice([animal[0] for animal in _ANIMALS if animal is not names])
        sentences.append(f'"where are you?" asks the {other}. "By the {place}," {pronoun} '
                         f"{_agree('answers', many)}.")  # fmt: skip
    return " ".join(map(_with_capital, sentences))


def _agree(verb: str, many: bool) -> str:
    """The verb of 'the fox sleeps behind' as it is after 'the foxes'."""
    if not many:
        return verb
    first, _, rest = verb.partition(" ")
    first = "are" if first == "is" else first.removesuffix("s")
    return f"{first} {rest}".strip()


def _with_capital(sentence: str) -> str:
    """A capital for the first letter, inside quotation marks too."""
    start = 1 if sentence[0] == '"' else 0
    return sentence[:start] + sentence[start].upper() + sentence[start + 1 :]
