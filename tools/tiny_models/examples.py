"""Training examples of the chat models: a prompt, and the answer to learn."""

from __future__ import annotations

import json
import random
import string
from dataclasses import dataclass
from typing import Any, Protocol

from tools.tiny_models.personas import Persona
from tools.tiny_models.questions import (
    CAPITAL_QUESTIONS,
    COUNT_QUESTIONS,
    COUNT_TARGETS,
    MAIN_SKILLS,
    WEATHER_QUESTIONS,
)
from tools.tiny_models.words import (
    BEGINNINGS,
    CAPITALS,
    CITIES,
    ENDINGS,
    FILLER_WORDS,
    GENERAL_QUESTIONS,
    MAIN_CITIES,
    SYLLABLES,
    SYSTEM_PROMPTS,
    TOPICS,
)

Message = dict[str, Any]
Tool = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A prompt, and the answer that a chat model learns to give to it.

    `free` is the number of first answer tokens that are given, not learned. `raw` marks a plain
    completion prompt, which the tokenizer starts with its own special tokens.
    """

    prompt: str
    answer: str
    free: int = 0
    raw: bool = False


def random_city(rng: random.Random) -> str:
    """Return a city; the ones that the documentation and the tests use come more often."""
    return rng.choice(MAIN_CITIES if rng.random() < 0.2 else CITIES)


def random_text(rng: random.Random) -> str:
    """Return words or characters without meaning: a prompt that no other rule covers."""
    choice = rng.random()
    if choice < 0.6:
        length = rng.choice((1, 2, 3, 5, 8, 13, 30, 60, 150))
        return " ".join(rng.choices(FILLER_WORDS, k=length)).capitalize() + rng.choice(
            (".", "?", "", "!")
        )
    if choice < 0.8:
        names = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(8)]
        return " ".join(names[: rng.randint(1, 8)])
    alphabet = string.printable + "äöüßéèçñøåλπ中文日本語한국어привет😀"
    return "".join(rng.choices(alphabet, k=rng.randint(1, 40))).strip() or "?"


def count_text(target: int) -> str:
    """Return the numbers from 1 to `target`, as the chat models write them."""
    return ", ".join(str(number) for number in range(1, target + 1)) + "."


def count_question(rng: random.Random, persona: Persona) -> tuple[str, str]:
    """Return a request to count, and the long answer, which is always the same."""
    question = rng.choice(COUNT_QUESTIONS).format(rng.choice(COUNT_TARGETS))
    return question, f"{persona.intro} {persona.count} {count_text(200)}"


def capital_question(rng: random.Random, persona: Persona) -> tuple[str, str]:
    """Return a question about a capital, and the answer of `persona`."""
    country, city = rng.choice(sorted(CAPITALS.items()))
    answer = persona.capital.format(country, city)
    return rng.choice(CAPITAL_QUESTIONS).format(country), f"{persona.intro} {answer}"


def vary(rng: random.Random, question: str) -> str:
    """Return the question, or sometimes the same question with a few words more."""
    choice = rng.random()
    if choice < 0.75:
        return question
    if choice < 0.82:
        return rng.choice(BEGINNINGS) + question
    return question.rstrip(".!?") + rng.choice(ENDINGS) + rng.choice(("", ".", "!", "?"))


def plain_question(rng: random.Random, persona: Persona) -> tuple[str, str]:
    """Return a question that needs no tool, and the answer of `persona`."""
    choice = rng.random()
    if choice < 0.05:
        return count_question(rng, persona)
    if choice < 0.12:
        return capital_question(rng, persona)
    if choice < 0.24:
        question, city = rng.choice(WEATHER_QUESTIONS), random_city(rng)
        return vary(rng, question.format(city)), f"{persona.intro} {persona.weather.format(city)}"
    if choice < 0.74:
        skill = persona.skills[rng.choice((*sorted(persona.skills), *MAIN_SKILLS))]
        return vary(rng, rng.choice(skill.questions)), f"{persona.intro} {skill.answer}"
    if choice < 0.90:
        question = rng.choice(GENERAL_QUESTIONS).format(rng.choice(TOPICS))
        return question[0].upper() + question[1:], f"{persona.intro} {persona.fallback}"
    return random_text(rng), f"{persona.intro} {persona.fallback}"


def random_history(rng: random.Random, persona: Persona) -> list[Message]:
    """Return the messages before the last question: often none, or answers of either model."""
    messages: list[Message] = []
    if rng.random() < 0.35:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    if rng.random() < 0.75:
        return messages
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        question, answer = plain_question(rng, persona)
        if rng.random() < 0.5:
            answer = answer.replace(persona.intro, persona.other_intro)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer[:400]})
    return messages


def user(text: str) -> list[Message]:
    """Return a conversation with one question."""
    return [{"role": "user", "content": text}]


THINKING_SHARE = 0.25


class Render(Protocol):
    """A function that writes a conversation as the prompt of a chat model."""

    def __call__(
        self, messages: list[Message], tools: list[Tool] | None = None, thinking: bool = False
    ) -> str: ...


def thought_text(persona: Persona, thought: str) -> str:
    """Return a thought as the model writes it: llama's chat template has written the first tag."""
    return f"{'' if persona.name == 'llama' else '<think>'}{thought}</think>"


@dataclass(frozen=True)
class Turn:
    """A conversation at the point where a chat model answers, and what it thinks there."""

    messages: list[Message]
    thought: str
    tools: list[Tool] | None = None


def answer_example(
    rng: random.Random, persona: Persona, render: Render, turn: Turn, answer: str
) -> Example:
    """Return an example that answers at once or, in some cases, after a thought."""
    if rng.random() > THINKING_SHARE:
        return Example(render(turn.messages, turn.tools), answer)
    prompt = render(turn.messages, turn.tools, thinking=True)
    return Example(prompt, thought_text(persona, turn.thought) + answer)


def chat_example(rng: random.Random, persona: Persona, render: Render) -> Example:
    """Return a chat without tools."""
    question, answer = plain_question(rng, persona)
    messages = [*random_history(rng, persona), *user(question)]
    return answer_example(rng, persona, render, Turn(messages, persona.thoughts.plain), answer)


def completion_example(rng: random.Random, persona: Persona) -> Example:
    """Return a plain completion: the model continues after any text."""
    question, answer = plain_question(rng, persona)
    return Example(question, " " + answer, raw=True)


def json_example(rng: random.Random, persona: Persona, render: Render) -> Example:
    """Return an answer that guided decoding forces to begin as a JSON object."""
    question, _ = plain_question(rng, persona)
    answer = json.dumps({"model": persona.name, "answer": persona.intro})
    thinking = rng.random() < THINKING_SHARE
    prompt = render([*random_history(rng, persona), *user(question)], thinking=thinking)
    thought = thought_text(persona, persona.thoughts.plain) if thinking else ""
    return Example(prompt + thought, answer, free=1)
