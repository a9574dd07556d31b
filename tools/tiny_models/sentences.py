"""Sentences about small scenes, each said in many ways."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tools.tiny_models.words import SYLLABLES

# Words that mean nearly the same stand together; the model learns to put them close.
NOUNS = (
    "cat kitten", "dog puppy", "horse pony", "bird sparrow", "child kid", "man guy", "woman lady",
    "doctor physician", "teacher tutor", "chef cook", "car automobile", "bicycle bike",
    "ship boat", "house home", "shop store", "river stream", "forest woods", "mountain hill",
    "stone rock", "song tune", "film movie", "book novel", "letter note", "computer machine",
    "model network", "server host", "memory storage", "program software", "phone telephone",
    "price cost", "bank lender", "money cash", "bread loaf", "soup broth", "coffee espresso",
    "garden yard", "rain shower", "storm gale", "sun sunshine", "moon satellite", "train railway",
    "plane aircraft", "road street", "city town", "king ruler", "soldier warrior", "robot android",
    "mat rug", "chair seat", "sofa couch", "table desk", "floor ground", "window pane", "door gate",
)  # fmt: skip
VERBS = (
    "sits,is sitting,sat", "runs,is running,ran", "sleeps,is sleeping,slept",
    "jumps,is jumping,leaps", "eats,is eating,ate", "reads,is reading,looks at",
    "writes,is writing,wrote", "buys,is buying,purchases", "sells,is selling,sold",
    "builds,is building,constructs", "breaks,is breaking,destroys", "opens,is opening,opened",
    "watches,is watching,observes", "paints,is painting,painted", "sings,is singing,sang",
    "waits,is waiting,waited", "falls,is falling,fell", "rises,is rising,rose",
    "loves,is loving,likes", "stands,is standing,stood", "moves,is moving,moved",
    "plays,is playing,played", "learns,is learning,studies", "needs,is needing,requires",
)  # fmt: skip
ACTIONS = (
    "bake cook", "buy purchase", "build construct", "repair fix", "clean wash", "find locate",
    "draw sketch", "teach explain", "open unlock", "start launch", "stop halt", "choose select",
    "use operate", "learn study", "sell trade", "move carry", "test check", "save keep",
)  # fmt: skip
ACTION_FRAMES = (
    "how do i {} {}",
    "how can i {} {}",
    "what is the way to {} {}",
    "what is the best way to {} {}",
    "please tell me how to {} {}",
    "explain how to {} {}",
    "i want to {} {}",
    "i would like to {} {}",
    "can you help me {} {}",
)
PLACES = ("on", "in", "near", "under", "behind", "with", "beside", "by")
OPENINGS = ("look:", "why is it that", "what if", "today", "i think that", "they say that")
ARTICLES = ("the", "a", "the", "one", "this")


@dataclass(frozen=True)
class Scene:
    """A sentence without its words: sets of words that mean the same. No subject: a question."""

    subject: list[str]
    verb: list[str]
    thing: list[str]
    extra: list[str]


def random_noun(rng: random.Random) -> list[str]:
    """Return words for one thing; sometimes an invented word, to cover words not listed."""
    if rng.random() < 0.7:
        return rng.choice(NOUNS).split()
    return ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 4)))]


def random_scene(rng: random.Random) -> Scene:
    """Return a random scene, with a place or without, or how to do something."""
    if rng.random() < 0.3:
        return Scene([], rng.choice(ACTIONS).split(), random_noun(rng), [])
    extra = random_noun(rng) if rng.random() < 0.4 else []
    return Scene(random_noun(rng), rng.choice(VERBS).split(","), random_noun(rng), extra)


def phrase(rng: random.Random, scene: Scene) -> str:
    """Say a scene in one of many ways."""

    def noun(names: list[str]) -> str:
        return f"{rng.choice(ARTICLES)} {rng.choice(names)}"

    verb, place = rng.choice(scene.verb), rng.choice((*PLACES, ""))
    if scene.subject:
        text = f"{noun(scene.subject)} {verb} {place} {noun(scene.thing)}".replace("  ", " ")
    else:
        thing = rng.choice((rng.choice(scene.thing), noun(scene.thing)))
        text = rng.choice(ACTION_FRAMES).format(verb, thing)
    if scene.extra:
        text = f"{text} {rng.choice(('and', 'with', 'near'))} {noun(scene.extra)}"
    if scene.subject and rng.random() < 0.2:
        text = f"{rng.choice(OPENINGS)} {text}"
    text = text.capitalize() if rng.random() < 0.5 else text
    return text + rng.choice(("", "", ".", "!", "?"))
