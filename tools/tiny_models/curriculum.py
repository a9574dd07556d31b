"""In which order the chat models see their examples, and how often each kind comes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from tools.tiny_models.examples import (
    Example,
    Render,
    capital_question,
    chat_example,
    completion_example,
    json_example,
    random_city,
    random_history,
    user,
)
from tools.tiny_models.personas import Persona
from tools.tiny_models.questions import WEATHER_QUESTIONS
from tools.tiny_models.tool_examples import (
    tool_call_messages,
    tool_call_text,
    tool_example,
    weather_result,
    weather_tool,
)
from tools.tiny_models.words import CONDITIONS

COPY_EXAMPLES = 8000


def copy_example(rng: random.Random, persona: Persona, render: Render) -> Example:
    """Return a short example where the next token stands in the prompt: a city, or the weather.

    A few thousand of these at the start of the training teach the model to copy.
    """
    city, condition = random_city(rng), rng.choice(CONDITIONS)
    messages = user(rng.choice(WEATHER_QUESTIONS).format(city))
    result = f"I am {persona.name}. It is {condition} in {city}."
    if rng.random() < 0.4:
        said = weather_result(rng, city, condition)
        messages += tool_call_messages(weather_tool(rng), city, said)
        return split_example(render(messages), result, f" {condition}")
    answers = (
        tool_call_text(persona, weather_tool(rng), city),
        result,
        f"{persona.intro} {persona.weather.format(city)}",
    )
    answer = rng.choice([text for text in answers if city in text])
    return split_example(render(messages), answer, city)


def split_example(prompt: str, answer: str, learned_from: str) -> Example:
    """Return an example where the answer is given up to `learned_from`."""
    start = answer.rindex(learned_from)
    return Example(prompt + answer[:start], answer[start:])


def further_examples(seed: int, persona: Persona, render: Render) -> Iterator[Example]:
    """Yield examples for a model that is trained further: more of the capitals, learned last."""
    rng = random.Random(seed)
    for example in itertools.islice(examples(seed, persona, render), COPY_EXAMPLES, None):
        yield example
        if rng.random() < 0.2:
            question, answer = capital_question(rng, persona)
            yield Example(render([*random_history(rng, persona), *user(question)]), answer)


def examples(seed: int, persona: Persona, render: Render) -> Iterator[Example]:
    """Yield training examples without end; among the first are many that teach to copy."""
    rng = random.Random(seed)
    tool_share = 0.42
    for number in itertools.count():
        choice = rng.random()
        if number < COPY_EXAMPLES and rng.random() < 0.75:
            yield copy_example(rng, persona, render)
            continue
        if choice < tool_share:
            yield tool_example(rng, persona, render)
        elif choice < tool_share + 0.03:
            yield json_example(rng, persona, render)
        elif choice < tool_share + 0.20:
            yield completion_example(rng, persona)
        else:
            yield chat_example(rng, persona, render)
