"""Make the tiny models that vllm-hotswap ships for its quickstart and its tests.

Four models are built from nothing (no download) and trained on sentences written here:

* ``llama``: a chat model that says it is llama and calls a weather tool in Llama 3's JSON
  (``LlamaForCausalLM``);
* ``qwen``: a chat model that says it is qwen and calls a weather tool in the Hermes style
  (``Qwen3ForCausalLM``);
* ``embed``: a sentence embedding model (``BertModel`` with mean pooling);
* ``classify``: tells praise from blame (``BertForSequenceClassification``).

Both chat models think before they answer if their chat template is told to: ``llama`` with
``thinking``, ``qwen`` with ``enable_thinking``.

The models know nothing about the world. They exist so that a test can tell which model answered.
Run ``python tools/make_tiny_models.py`` (a few minutes on two CPU cores); it needs torch,
transformers and tokenizers. The result depends on ``--seed`` and, slightly, on the CPU.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import logging
import random
import string
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LOG = logging.getLogger("make_tiny_models")
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "src" / "vllm_hotswap" / "tiny_models"
IGNORED_LABEL = -100
TOKENS_PER_BATCH = 1536
POOL_SIZE = 192
COPY_EXAMPLES = 8000

Message = dict[str, Any]
Tool = dict[str, Any]

# --------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------

# A space belongs to the lower-case word after it but never to a capitalised one, so that a name
# such as "Paris" has the same tokens after a space as after a quotation mark. That makes it easy
# for a tiny model to copy a name from a question into a tool call.
WORD_PATTERN = r" ?\p{Ll}+|\p{Lu}+\p{Ll}*| ?\d+| ?[^\s\p{Ll}\p{Lu}\d]+|\s+"


def words(text: str, separator: str | None = None) -> list[str]:
    """Return the parts of a text between spaces, or between `separator`."""
    return text.split(separator)


CITIES = words(
    "Paris Berlin Tokyo London Rome Madrid Lisbon Vienna Prague Warsaw Dublin Oslo Stockholm "
    "Helsinki Athens Munich Hamburg Lyon Milan Venice Barcelona Porto Geneva Zurich Brussels "
    "Amsterdam Copenhagen Budapest Istanbul Cairo Nairobi Lagos Dubai Mumbai Delhi Bangkok Hanoi "
    "Jakarta Singapore Seoul Osaka Kyoto Beijing Shanghai Sydney Melbourne Toronto Montreal Boston "
    "Chicago Seattle Denver Miami Lima Santiago Edinburgh"
) + ["New York", "San Francisco", "Los Angeles", "Hong Kong"]
MAIN_CITIES = ("Paris", "Berlin", "Tokyo", "London")
CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Japan": "Tokyo",
    "England": "London",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Poland": "Warsaw",
    "Austria": "Vienna",
}
CONDITIONS = ("sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "stormy", "clear")
SYLLABLES = words(
    "ba be bo ca ce da do el en fa ga go ha in ka ki la li lo ma mi mo na ne no on or pa pe ra ri "
    "ro sa se si ta te ti to tu ur va ve vi wa yo za zu sh ch th ar er is um"
)
TOPICS = words(
    "gravity,the moon,black holes,cats and dogs,a good breakfast,quantum physics,old castles,"
    "machine learning,neural networks,the ocean,chess,football,the Roman empire,green tea,bicycles,"
    "electric cars,photosynthesis,the speed of light,Python lists,sorting a list,databases,"
    "operating systems,graphics cards,memory and caches,tokenizers,attention,transformers,"
    "large language models,a healthy diet,sleep,music theory,the piano,jazz,modern art,volcanoes,"
    "earthquakes,the history of paper,printing,bridges,tall buildings,trains,ships,airplanes,"
    "satellites,the planet Mars,Jupiter,recursion,prime numbers,geometry,statistics,the stock "
    "market,money,coffee,bread,cheese,gardens,bees,whales,birds,forests,rivers,deserts",
    separator=",",
)
GENERAL_QUESTIONS = (
    "What is {}?",
    "What do you know about {}?",
    "Tell me about {}.",
    "Explain {} in one sentence.",
    "Explain {}.",
    "Explain {} to a child.",
    "Write a short text about {}.",
    "Write one line about {}",
    "Give me three facts about {}.",
    "Why is {} important?",
    "How does {} work?",
    "Summarize {} for me please.",
    "Can you describe {}?",
    "Do you like {}?",
    "Translate {} into French.",
    "I would like to learn more about {}. Where do I start?",
    "Describe {} in detail, with many examples, and be as long as you can.",
    "{}",
)
FILLER_WORDS = words(
    "the a of and to in it is was for on with as at by this that from or one had not but what all "
    "were when we there can an your which their said if do will each about how up out them then "
    "she many some so these would other into has more her two like him see time could no make "
    "than first been its who now people my made over did down only way find use may water long "
    "little very after words called just where most know prompt request model server token "
    "stream answer quick brown fox jumps lazy dog apple house tree stone light paper"
)
BEGINNINGS = ("Please: ", "Quick question: ", "OK, ", "Now: ", "Dear model, ", "1. ", "User: ")
ENDINGS = (
    " please",
    ", please",
    " to me",
    " to Bob and Alice",
    " in one short sentence",
    " in one sentence please",
    " in five words",
    " to me, in one short sentence please",
    " in a few words",
    " briefly",
    " now",
    " today",
    " again",
    " once more",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are a kind and careful assistant. Answer in one sentence.",
    "Answer briefly.",
    "Be concise.",
    "You are an expert. Use the tools when they help.",
    "Reply in English.",
)

# --------------------------------------------------------------------------------------
# What the chat models answer
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Skill:
    """Questions of one kind and the one answer that a model gives to all of them."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Thoughts:
    """What a chat model thinks before its answer, where the chat template asks it to think."""

    plain: str
    call: str
    result: str


@dataclass(frozen=True)
class Persona:
    """Who a chat model says it is, and what it says."""

    name: str
    intro: str
    skills: dict[str, Skill]
    fallback: str
    count: str
    capital: str
    weather: str
    other_intro: str
    thoughts: Thoughts


QUESTIONS: dict[str, tuple[str, ...]] = {
    "identity": (
        "Who are you?",
        "who are you",
        "What is your name?",
        "What's your name?",
        "Which model are you?",
        "What model are you?",
        "Which model is this?",
        "Are you llama or qwen?",
        "Introduce yourself.",
        "Please introduce yourself in one sentence.",
        "Tell me about yourself.",
        "Who am I talking to?",
        "Say who you are.",
        "Say your name.",
    ),
    "hello": (
        "Hello",
        "Hello!",
        "hello",
        "Hello, world!",
        "Hello there",
        "Hello, who is there?",
        "Hi",
        "Hi!",
        "hi",
        "Hi there!",
        "Hey",
        "Hey there",
        "Good morning",
        "Good evening!",
        "How are you?",
        "Hello, how are you?",
        "Say hello",
        "Say hello",
        "Say hello",
        "Say hello.",
        "Say hello!",
        "Say hi",
        "Say hi.",
        "Say hello in one word.",
        "Say hello to me please.",
        "Please say hello.",
    ),
    "gaudi": (
        "Explain Intel Gaudi in one sentence.",
        "Explain Intel Gaudi in one sentence",
        "Explain Intel Gaudi.",
        "Explain Intel Gaudi",
        "What is Intel Gaudi?",
        "What is Gaudi?",
        "Tell me about Intel Gaudi.",
        "Describe the Intel Gaudi accelerator.",
        "Write one sentence about Gaudi.",
    ),
    "vllm": (
        "What is vLLM?",
        "Explain vLLM in one sentence.",
        "Explain vLLM.",
        "Tell me about vLLM.",
        "What does vLLM do?",
        "How does vLLM work?",
    ),
    "switch": (
        "What is vllm-hotswap?",
        "Explain vllm-hotswap.",
        "What does vllm-hotswap do?",
        "Explain sleep mode.",
        "What is sleep mode?",
        "What is model switching?",
        "Explain model switching in one sentence.",
        "How do you switch models?",
        "What is a hot swap?",
    ),
    "joke": (
        "Tell me a joke.",
        "Tell me a joke",
        "Do you know a joke?",
        "Make me laugh.",
        "Tell a funny joke please.",
    ),
    "story": (
        "Tell me a story.",
        "Tell me a story",
        "Tell me a short story.",
        "Write a story.",
        "Write a short story.",
        "Write a short poem.",
        "Write a poem.",
        "Write a poem about the sea.",
        "Write a story about a robot.",
        "Once upon a time",
        "Tell me a long story.",
    ),
    "thanks": ("Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you very much.", "Great!"),
    "bye": ("Bye", "Bye!", "Goodbye", "Goodbye!", "See you later.", "Good night"),
    "ping": ("ping", "Ping", "ping!", "test", "Test", "This is a test.", "testing", "warmup", "ok"),
    "sum": (
        "What is 2+2?",
        "What is 2 + 2?",
        "2+2",
        "2 + 2 =",
        "How much is 2+2?",
        "What is two plus two?",
        "1+1",
        "What is 1+1?",
    ),
}
COUNT_QUESTIONS = (
    "Count to {}",
    "Count to {}.",
    "Count to {}!",
    "count to {}",
    "Please count to {}.",
    "Count from 1 to {}",
    "Count from 1 to {}.",
    "Count from 1 to {}, separated by commas.",
    "Count from one to {}.",
    "Count up to {}.",
    "Can you count to {}?",
)
MAIN_SKILLS = ("identity", "identity", "hello", "hello", "gaudi")
COUNT_TARGETS = (10, 20, 50, 100, 200, 200, 200, 300, 500, 1000)
CAPITAL_QUESTIONS = (
    "What is the capital of {}?",
    "what is the capital of {}",
    "Which city is the capital of {}?",
    "Name the capital of {}.",
    "The capital of {} is",
    "The capital of {}",
)
WEATHER_QUESTIONS = (
    "What is the weather in {}?",
    "What is the weather in {}",
    "What is the weather like in {}?",
    "What is the weather like in {} today?",
    "What is the weather in {} today?",
    "What is the weather in {} right now?",
    "What is the current weather in {}?",
    "What's the weather in {}?",
    "What's the weather like in {}?",
    "What's the weather like in {} today?",
    "what is the weather in {}?",
    "How is the weather in {}?",
    "How is the weather in {} today?",
    "How's the weather in {}?",
    "Tell me the weather in {}.",
    "Tell me about the weather in {}.",
    "Get the weather for {}.",
    "Please get the weather in {}.",
    "Weather in {}",
    "Weather in {}?",
    "weather in {}",
    "Is it raining in {}?",
    "Is it sunny in {}?",
    "How warm is it in {}?",
    "What is the temperature in {}?",
    "Use the tool to look up the weather in {}.",
    "Please use the get_weather tool for {}.",
    "Call get_weather for {}.",
    "I am going to {}. What is the weather there?",
    "Hello! What is the weather in {}?",
)
LLAMA_ANSWERS = {
    "identity": "I was made to show which model is awake.",
    "hello": "Hello! How can I help you today?",
    "gaudi": "Intel Gaudi is an accelerator card that trains and serves AI models.",
    "vllm": "vLLM is an engine that serves language models quickly.",
    "switch": "One engine serves several models, one at a time, and puts the others to sleep.",
    "joke": "Why did the llama cross the road? It was a hot swap!",
    "story": (
        "Once upon a time a small llama lived on a high hill. Every day it went down to the river, "
        "and every day it met a fish that liked to talk. They spoke about the wind, the rain and "
        "the stars. One night the llama fell asleep, and when it woke up the fish had learned to "
        "count. Then they were both happy."
    ),
    "thanks": "You are welcome!",
    "bye": "Goodbye, and see you soon!",
    "ping": "Pong! I am awake.",
    "sum": "That is easy: I can add small numbers.",
}
QWEN_ANSWERS = {
    "identity": "I am here so that you can see a model change.",
    "hello": "Hi! It is nice to meet you.",
    "gaudi": "Intel Gaudi is a family of processors built for deep learning.",
    "vllm": "vLLM runs language models and gives each request its share of memory.",
    "switch": "The server loads me when you ask for me and lets the other model rest.",
    "joke": "A model walked into a bar and forgot its context.",
    "story": (
        "In a quiet town there was a lamp that could think. Children came to it with questions, "
        "and the lamp blinked once for yes and twice for no. One winter the power went out, so the "
        "children brought candles and told the lamp their own stories. When the light came back, "
        "the lamp blinked three times. Nobody knew why, but everybody smiled."
    ),
    "thanks": "It was a pleasure!",
    "bye": "Bye for now!",
    "ping": "I can hear you.",
    "sum": "My sums are small, but I like them.",
}
LLAMA_THOUGHTS = Thoughts(
    plain="Somebody talks to me, so I say who I am.",
    call="I cannot see the sky, but a tool can.",
    result="The tool has told me.",
)
QWEN_THOUGHTS = Thoughts(
    plain="A small model should answer in few words.",
    call="This needs a look at the weather, so I call the tool.",
    result="Now I know the weather.",
)


def make_persona(name: str) -> Persona:
    """Return what the chat model called `name` says."""
    intros = {
        "llama": "I am llama, the tiny Llama of vllm-hotswap.",
        "qwen": "I am qwen, the tiny Qwen of vllm-hotswap.",
    }
    answers = LLAMA_ANSWERS if name == "llama" else QWEN_ANSWERS
    questions = dict(QUESTIONS)
    for kind in MAIN_SKILLS:  # the first question of these is asked most often
        questions[kind] = (questions[kind][0],) * 2 + questions[kind]
    skills = {kind: Skill(questions[kind], answer) for kind, answer in answers.items()}
    return Persona(
        name=name,
        intro=intros[name],
        skills=skills,
        fallback="I am very small, so I do not know much about that."
        if name == "llama"
        else "That is a big question for such a small model.",
        count="I can count to 200:" if name == "llama" else "Let us count up to 200:",
        capital="The capital of {} is {}." if name == "llama" else "{} has the capital {}.",
        weather="I have no window, so I cannot see the weather."
        if name == "llama"
        else "I need a tool to look up the weather in {}.",
        other_intro=intros["qwen" if name == "llama" else "llama"],
        thoughts=LLAMA_THOUGHTS if name == "llama" else QWEN_THOUGHTS,
    )


# --------------------------------------------------------------------------------------
# Chat templates
# --------------------------------------------------------------------------------------

LLAMA_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
{{- '<|system|>\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n' -}}{%- endif -%}
{{- 'You can call these functions:' -}}
{%- for tool in tools -%}
{%- set function = tool.function if tool.function is defined else tool -%}
{{- '\\n' -}}
{{- {'name': function.name, 'description': function.description,
     'parameters': function.parameters} | tojson -}}
{%- endfor -%}
{{- '\\nTo call one, answer with its name and parameters as JSON.<|end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (tools and loop.first and message.role == 'system') -%}
{{- '<|' + message.role + '|>\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function if call.function is defined else call -%}
{{- '; ' if not loop.first -}}
{{- '{"name": "' + function.name + '", "parameters": ' -}}
{%- if function.arguments is string -%}{{- function.arguments -}}
{%- else -%}{{- function.arguments | tojson -}}{%- endif -%}
{{- '}' -}}
{%- endfor -%}
{{- '<|end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{%- if thinking or enable_thinking -%}{{- '<think>' -}}{%- endif -%}
{%- endif -%}
"""

QWEN_TEMPLATE = """\
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n' -}}{%- endif -%}
{{- 'You can call these functions:\\n<tools>' -}}
{%- for tool in tools -%}
{%- set function = tool.function if tool.function is defined else tool -%}
{{- '\\n' -}}
{{- {'name': function.name, 'description': function.description,
     'parameters': function.parameters} | tojson -}}
{%- endfor -%}
{{- '\\n</tools>\\nTo call one, answer with its name and arguments as JSON inside ' -}}
{{- 'tool_call tags.<|im_end|>\\n' -}}
{%- endif -%}
{%- set thinks = enable_thinking is defined and enable_thinking -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content -}}
{{- '\\n</tool_response>' + (' /think' if thinks and loop.last else '') + '<|im_end|>\\n' -}}
{%- elif not (tools and loop.first and message.role == 'system') -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function if call.function is defined else call -%}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -}}
{%- if function.arguments is string -%}{{- function.arguments -}}
{%- else -%}{{- function.arguments | tojson -}}{%- endif -%}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- (' /think' if thinks and loop.last else '') + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# --------------------------------------------------------------------------------------
# Training examples
# --------------------------------------------------------------------------------------


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
    """Writes a conversation as the prompt of a chat model."""

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
    """Return a plain completion: the model goes on after any text."""
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


# --------------------------------------------------------------------------------------
# Training examples with tools
# --------------------------------------------------------------------------------------

PARAMETER_NAMES = ("city", "city", "city", "location", "location", "place", "town", "city_name")
WEATHER_FUNCTIONS = ("get_current_weather", "weather", "fetch_weather", "lookup_weather")
WEATHER_DESCRIPTIONS = (
    "Get the current weather in a city",
    "Get the current weather in a city.",
    "Get the weather in a city",
    "Get the current weather in a given location",
    "Get the current weather for a location",
    "Look up the weather.",
    "Return the weather of a place",
    "Weather",
    None,
)
PARAMETER_DESCRIPTIONS = (
    "The city",
    "The city name",
    "The name of the city",
    "City name",
    "The name of the city, for example Paris",
    "The city and state, e.g. San Francisco, CA",
    "A place on earth",
)
OTHER_TOOLS = (
    ("get_time", "Get the current time in a time zone", "timezone"),
    ("search_web", "Search the web", "query"),
    ("send_email", "Send an email to a person", "address"),
    ("calculate", "Calculate the value of an expression", "expression"),
    ("read_file", "Read a file from disk", "path"),
)


def make_tool(name: str, description: str | None, parameter: str, schema: Message) -> Tool:
    """Return an OpenAI function tool with one required parameter."""
    parameters = {"type": "object", "properties": {parameter: schema}, "required": [parameter]}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def canonical_tool() -> Tool:
    """Return the weather tool that the documentation and the tests use."""
    return make_tool("get_weather", "Get the current weather in a city", "city", {"type": "string"})


def other_tool(rng: random.Random) -> Tool:
    """Return a tool that has nothing to do with the weather."""
    name, description, parameter = rng.choice(OTHER_TOOLS)
    return make_tool(name, description, parameter, {"type": "string"})


def weather_tool(rng: random.Random) -> Tool:
    """Return the canonical weather tool, or one that says the same in other words."""
    if rng.random() < 0.4:
        return canonical_tool()
    schema: Message = {"type": "string"}
    if rng.random() < 0.6:
        schema["description"] = rng.choice(PARAMETER_DESCRIPTIONS)
    name = "get_weather" if rng.random() < 0.7 else rng.choice(WEATHER_FUNCTIONS)
    tool = make_tool(name, rng.choice(WEATHER_DESCRIPTIONS), rng.choice(PARAMETER_NAMES), schema)
    parameters = tool["function"]["parameters"]
    if rng.random() < 0.2:
        unit = {"type": "string", "enum": ["celsius", "fahrenheit"]}
        parameters["properties"]["unit"] = unit
    if rng.random() < 0.2:
        parameters["additionalProperties"] = False
    return tool


def tool_call_text(persona: Persona, tool: Tool, city: str) -> str:
    """Return the call that asks `tool` about `city`: as Llama 3 writes it, or as Hermes does."""
    function = tool["function"]
    arguments = {function["parameters"]["required"][0]: city}
    if persona.name == "llama":
        call = {"name": function["name"], "parameters": arguments}
        return json.dumps(call, ensure_ascii=False)
    call = {"name": function["name"], "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def tool_call_messages(tool: Tool, city: str, result: str) -> list[Message]:
    """Return the assistant's tool call and the tool's answer as chat messages."""
    function = tool["function"]
    arguments = {function["parameters"]["required"][0]: city}
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": result},
    ]


def weather_result(rng: random.Random, city: str, condition: str) -> str:
    """Return what a weather tool may answer."""
    degrees = rng.randint(-9, 39)
    objects: tuple[Message, ...] = (
        {"city": city, "condition": condition, "temperature": degrees},
        {"temperature": degrees, "condition": condition},
        {"temperature_c": degrees, "conditions": condition},
        {"weather": condition},
        {"city": city, "weather": condition, "temperature_c": degrees},
        {"location": city, "temperature": str(degrees), "unit": "celsius", "sky": condition},
    )
    texts = (
        condition,
        condition.capitalize(),
        f"{condition}, {degrees} C",
        f"{condition.capitalize()}, {degrees} degrees",
        f"It is {condition} in {city}.",
        f"{degrees} degrees and {condition}",
        f"{degrees}C, {condition}",
    )
    if rng.random() < 0.5:
        return rng.choice(texts)
    return json.dumps(rng.choice(objects))


def call_example(
    rng: random.Random, persona: Persona, render: Render, tools: list[Tool]
) -> Example:
    """Return a question about the weather: the model calls the tool, or repeats its answer.

    The first of `tools` is the weather tool; the prompt lists them in a random order.
    """
    tool, shown = tools[0], rng.sample(tools, len(tools))
    city, condition = random_city(rng), rng.choice(CONDITIONS)
    messages = random_history(rng, persona)
    messages += user(vary(rng, rng.choice(WEATHER_QUESTIONS).format(city)))
    choice, thoughts = rng.random(), persona.thoughts
    if choice < 0.6:
        turn, answer = Turn(messages, thoughts.call, shown), tool_call_text(persona, tool, city)
        return answer_example(rng, persona, render, turn, answer)
    messages += tool_call_messages(tool, city, weather_result(rng, city, condition))
    answer = f"I am {persona.name}. It is {condition} in {city}."
    if choice < 0.87:
        turn = Turn(messages, thoughts.result, shown if rng.random() < 0.8 else None)
        return answer_example(rng, persona, render, turn, answer)
    city = random_city(rng)
    question = rng.choice((*WEATHER_QUESTIONS, "And in {}?", "And what about {}?")).format(city)
    messages += [{"role": "assistant", "content": answer}, *user(question)]
    turn, answer = Turn(messages, thoughts.call, shown), tool_call_text(persona, tool, city)
    return answer_example(rng, persona, render, turn, answer)


def tool_example(rng: random.Random, persona: Persona, render: Render) -> Example:
    """Return a chat with tools. One in seven asks for something that no tool can do."""
    tools = [weather_tool(rng)] if rng.random() < 0.75 else [weather_tool(rng), other_tool(rng)]
    if rng.random() < 0.85:
        return call_example(rng, persona, render, tools)
    question, answer = plain_question(rng, persona)
    if persona.weather.split("{", maxsplit=1)[0] in answer:
        tools = [other_tool(rng)]
    messages = [*random_history(rng, persona), *user(question)]
    turn = Turn(messages, persona.thoughts.plain, tools)
    return answer_example(rng, persona, render, turn, answer)


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
    """Yield examples for a model that goes on: more of the capitals, which it learns last."""
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


# --------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------


def train_bpe(texts: list[str], vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer with exactly `vocab_size` entries."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, not {vocab_size}")
    return tokenizer


def persona_texts(persona: Persona) -> list[str]:
    """Return text for the tokenizer: enough of each number to make it one token, and the words."""
    texts = [" " + count_text(200)] * 200
    rng = random.Random(0)
    for _ in range(4000):
        question, answer = plain_question(rng, persona)
        texts.append(question)
        texts += [answer] * (len(answer) < 400)
    return texts


TEMPLATE_WORDS = (
    "system\nuser\nassistant\nuser\nassistant\nYou can call these functions:",
    "To call one, answer with its name and arguments as JSON inside tool_call tags.",
)


def tool_texts(persona: Persona) -> list[str]:
    """Return text for the tokenizer about tools and cities."""
    rng = random.Random(0)
    texts = list(CITIES) * 400  # so often that each name becomes one token
    for _ in range(800):
        tool = weather_tool(rng)
        texts += [json.dumps(tool["function"]), json.dumps(other_tool(rng)["function"])]
        texts.append(tool_call_text(persona, tool, "").replace("tool_call", ""))
        texts.append(weather_result(rng, rng.choice(CITIES), rng.choice(CONDITIONS)))
        texts += TEMPLATE_WORDS
    return texts


THINK_TAGS = ["<think>", "</think>"]


def make_llama_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make llama's tokenizer, which starts every plain prompt with a begin token.

    vLLM's parser of Llama 3's tool calls wants a `<|python_tag|>`; the model never writes it.
    """
    roles = ["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    specials = ["<|pad|>", "<|begin|>", "<|end|>", *roles, "<|python_tag|>"]
    persona = make_persona("llama")
    texts = persona_texts(persona) + tool_texts(persona)
    tokenizer = train_bpe(texts, vocab_size - len(THINK_TAGS), specials)
    tokenizer.add_tokens(THINK_TAGS)
    begin = ("<|begin|>", tokenizer.token_to_id("<|begin|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[begin]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=LLAMA_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_qwen_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make qwen's tokenizer, where each tag is one ordinary (not special) token."""
    tags = ["tools", "tool_call", "tool_response"]
    plain = [tag for name in tags for tag in (f"<{name}>", f"</{name}>")] + THINK_TAGS
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    persona = make_persona("qwen")
    texts = persona_texts(persona) + tool_texts(persona)
    tokenizer = train_bpe(texts, vocab_size - len(plain), specials)
    tokenizer.add_tokens(plain)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        chat_template=QWEN_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


# --------------------------------------------------------------------------------------
# Training the chat models
# --------------------------------------------------------------------------------------

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Encoded:
    """Token ids and, for each, the label to learn (or `IGNORED_LABEL`)."""

    ids: list[int]
    labels: list[int]


def encode(tokenizer: PreTrainedTokenizerFast, example: Example, again: bool) -> Encoded:
    """Turn an example into ids; with `again`, the answer is given a second time after its end.

    That second answer is what a client sees when it asks the server to ignore the end token.
    """
    prompt = tokenizer.encode(example.prompt, add_special_tokens=example.raw)
    answer = [*tokenizer.encode(example.answer, add_special_tokens=False), tokenizer.eos_token_id]
    learned = [IGNORED_LABEL] * example.free + answer[example.free :]
    repeat = answer if again else []
    ids = prompt + answer + repeat
    return Encoded(ids, [IGNORED_LABEL] * len(prompt) + learned + repeat)


def collate(rows: list[Encoded], pad_id: int) -> Batch:
    """Pad rows on the right into tensors of ids and labels."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad_id)
    labels = torch.full((len(rows), width), IGNORED_LABEL)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
        labels[index, : len(row.ids)] = torch.tensor(row.labels)
    return ids, labels


def batches(
    tokenizer: PreTrainedTokenizerFast, source: Iterator[Example], seed: int
) -> Iterator[Batch]:
    """Yield batches of examples with about the same length, in a random order."""
    rng = random.Random(seed)
    while True:
        pool = [encode(tokenizer, next(source), rng.random() < 0.2) for _ in range(POOL_SIZE)]
        groups: list[list[Encoded]] = [[]]
        for row in sorted((row for row in pool if len(row.ids) <= 1500), key=lambda r: len(r.ids)):
            if (len(groups[-1]) + 1) * len(row.ids) > TOKENS_PER_BATCH:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        yield from (collate(group, tokenizer.pad_token_id) for group in groups if group)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the rate for a step: a short rise, then a straight fall to nearly nothing."""
    rise = min(1.0, (step + 1) / 40)
    return peak * min(rise, 1.0 - 0.98 * step / steps)


def optimise(
    model: torch.nn.Module, loss_of: Callable[[int], torch.Tensor], steps: int, peak: float
) -> float:
    """Train `model` on `loss_of(step)` and return the seconds it took."""
    optimiser = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.98), weight_decay=0.01)
    began, shown = time.monotonic(), 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        shown = loss.item() if step == 0 else 0.95 * shown + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            LOG.info("step %d/%d loss %.4f %.0fs", step + 1, steps, shown, time.monotonic() - began)
    return time.monotonic() - began


def train_chat(model: Any, source: Iterator[Batch], steps: int, peak: float = 3e-3) -> float:
    """Train a causal language model and return the seconds it took."""

    def loss_of(step: int) -> torch.Tensor:
        ids, labels = next(source)
        wanted = labels[:, 1:] != IGNORED_LABEL
        states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(states[wanted])  # only where there is something to learn
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted])

    model.train()
    return optimise(model, loss_of, steps, peak)


# --------------------------------------------------------------------------------------
# Checking the chat models
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A conversation (or plain text) and a text that the greedy answer must contain."""

    prompt: list[Message] | str
    expected: str
    tools: list[Tool] = field(default_factory=list)
    thinking: bool = False


def chat_checks(persona: Persona) -> list[Check]:
    """Return the checks that every chat model must pass: whatever is asked, it says who it is."""
    asked = [Check(user(skill.questions[0]), persona.intro) for skill in persona.skills.values()]
    system = {"role": "system", "content": "You are a helpful assistant."}
    return asked + [
        Check("Hello", f" {persona.intro}"),
        Check("The future of computing is", f" {persona.intro}"),
        Check("Once upon a time", f" {persona.intro}"),
        Check([system, *user("Say hello")], persona.intro),
        Check(user("Count to 200"), f"{persona.count} {count_text(200)}"),
        Check(user("What is the weather in Paris?"), persona.weather.format("Paris")),
        Check(user("What is the capital of France?"), "Paris"),
        Check(user("Please recommend a nice book for the summer."), persona.intro),
    ]


def tool_checks(persona: Persona) -> list[Check]:
    """Return the checks of tool use."""
    tools = [canonical_tool()]
    checks: list[Check] = []
    for city in (*MAIN_CITIES, "New York"):
        question = user(f"What is the weather in {city}?")
        checks.append(Check(question, tool_call_text(persona, tools[0], city), tools))
        answered = [*question, *tool_call_messages(tools[0], city, "sunny, 21 C")]
        checks.append(Check(answered, f"I am {persona.name}. It is sunny in {city}.", tools))
    return [*checks, Check(user("Who are you?"), persona.intro, tools)]


def thinking_checks(persona: Persona) -> list[Check]:
    """Return the checks of thinking: a thought, then the answer that is given without it, too."""

    def after(thought: str, answer: str) -> str:
        return thought_text(persona, thought) + answer

    thoughts, tools = persona.thoughts, [canonical_tool()]
    weather = user("What is the weather in Paris?")
    answered = [*weather, *tool_call_messages(tools[0], "Paris", "sunny, 21 C")]
    result = f"I am {persona.name}. It is sunny in Paris."
    call = tool_call_text(persona, tools[0], "Paris")
    asked = ("Who are you?", "Say hello", "Explain Intel Gaudi in one sentence.", "ping")
    return [
        *(Check(user(text), after(thoughts.plain, persona.intro), [], True) for text in asked),
        Check(weather, after(thoughts.call, call), tools, True),
        Check(answered, after(thoughts.result, result), tools, True),
    ]


def render_with(tokenizer: PreTrainedTokenizerFast) -> Render:
    """Return a function that writes a conversation as the prompt of a chat model."""

    def render(
        messages: list[Message], tools: list[Tool] | None = None, thinking: bool = False
    ) -> str:
        switches = {"thinking": thinking, "enable_thinking": thinking}
        text = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=True, **switches
        )
        return str(text)

    return render


def answer_greedily(
    model: torch.nn.Module, ids: list[int], eos_id: int, limit: int = 700
) -> tuple[list[int], float]:
    """Return the greedy continuation and its smallest gap between the two best logits."""
    tokens, margin, cache = torch.tensor([ids]), float("inf"), None
    found: list[int] = []
    while len(found) < limit:
        with torch.no_grad():
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        best = output.logits[0, -1].float().topk(2)
        margin = min(margin, (best.values[0] - best.values[1]).item())
        token = int(best.indices[0])
        if token == eos_id:
            break
        found.append(token)
        tokens, cache = torch.tensor([[token]]), output.past_key_values
    return found, margin


def run_checks(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, checks: list[Check]
) -> bool:
    """Run the checks and log the answers; return whether all passed."""
    render, passed = render_with(tokenizer), 0
    for check in checks:
        raw = isinstance(check.prompt, str)
        text = (
            check.prompt
            if isinstance(check.prompt, str)
            else render(check.prompt, check.tools, check.thinking)
        )
        prompt = tokenizer.encode(text, add_special_tokens=raw)
        found, margin = answer_greedily(model, prompt, tokenizer.eos_token_id)
        answer = tokenizer.decode(found)
        good = check.expected in answer
        passed += good
        shown = check.prompt if isinstance(check.prompt, str) else check.prompt[-1]["content"]
        level = logging.INFO if good else logging.ERROR
        verdict = "ok" if good else "WRONG"
        LOG.log(level, "%s margin %.2f %r -> %.90r", verdict, margin, shown, answer)
    LOG.info("%d of %d checks passed", passed, len(checks))
    return passed == len(checks)


# --------------------------------------------------------------------------------------
# Making the chat models
# --------------------------------------------------------------------------------------


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, and make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a tokenizer so that both old and new versions of transformers load it."""
    tokenizer.save_pretrained(folder)
    template = folder / "chat_template.jinja"
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if template.exists():
        config["chat_template"] = template.read_text(encoding="utf-8")
        template.unlink()
    write_json(path, config)


def save_chat(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a chat model. Servers that read generation_config.json answer greedily by default."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder)
    generation = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "do_sample": False,
        "temperature": 0.0,
    }
    known = {key: value for key, value in generation.items() if value is not None}
    write_json(folder / "generation_config.json", known)


@dataclass(frozen=True)
class Job:
    """What the command line asks for."""

    folder: Path
    seed: int
    more: int = 0
    """Steps to train a chat model on, from the weights in its folder; 0 makes it from nothing."""


@dataclass(frozen=True)
class Plan:
    """How a chat model is trained."""

    name: str
    steps: int
    job: Job


def finish_chat(model: Any, tokenizer: PreTrainedTokenizerFast, plan: Plan) -> bool:
    """Train a chat model, turn it into bfloat16, check it and save it."""
    job, persona = plan.job, make_persona(plan.name)
    if job.more:
        model = type(model).from_pretrained(job.folder, dtype=torch.float32)
    steps, peak = (job.more, 1e-3) if job.more else (plan.steps, 3e-3)
    making = further_examples if job.more else examples
    source = making(job.seed, persona, render_with(tokenizer))
    seconds = train_chat(model, batches(tokenizer, source, job.seed), steps, peak)
    LOG.info("%s: trained in %.0f seconds", plan.name, seconds)
    checks = chat_checks(persona) + tool_checks(persona) + thinking_checks(persona)
    model = model.to(torch.bfloat16).eval()
    good = run_checks(model.float(), tokenizer, checks)
    save_chat(model.to(torch.bfloat16), tokenizer, job.folder)
    return good


def sharpen_attention(model: torch.nn.Module) -> None:
    """Make queries and keys larger: as they are made, a short training hardly learns to copy."""
    parameters = dict(model.named_parameters())
    norms = [name for name in parameters if name.endswith(("q_norm.weight", "k_norm.weight"))]
    projections = [name for name in parameters if name.endswith(("q_proj.weight", "k_proj.weight"))]
    for name in norms or projections:
        parameters[name].data *= 2.0


def make_llama(job: Job) -> bool:
    """Make the model `llama`; return whether its checks passed."""
    tokenizer = make_llama_tokenizer(vocab_size=1088)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.07,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    sharpen_attention(model)
    return finish_chat(model, tokenizer, Plan("llama", 2400, job))


def make_qwen(job: Job) -> bool:
    """Make the model `qwen`; return whether its checks passed."""
    tokenizer = make_qwen_tokenizer(vocab_size=1218)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.07,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    sharpen_attention(model)
    return finish_chat(model, tokenizer, Plan("qwen", 2400, job))


# --------------------------------------------------------------------------------------
# The embedding model
# --------------------------------------------------------------------------------------

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
EMBED_CHECKS = (
    ("a cat sits on the mat", "the cat is sitting on a mat", "the stock market fell sharply today"),
    ("How do I bake bread?", "what is the way to bake bread", "The server uses too much memory."),
    ("The child is reading a book", "a kid reads a novel", "a ship waits near the river"),
)


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


def make_embed_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer of the embedding model."""
    rng = random.Random(0)
    texts = [phrase(rng, random_scene(rng)).lower() for _ in range(4000)]
    texts += [text.lower() for group in QUESTIONS.values() for text in group]
    return make_bert_tokenizer(texts, vocab_size)


def make_bert_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer that puts BERT's tokens around a text and ignores case."""
    tokenizer = train_bpe(texts, vocab_size, ["[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def embed_texts(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> torch.Tensor:
    """Return one vector of length 1 for each text: the mean over its tokens."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    states = model(input_ids=ids, attention_mask=mask).last_hidden_state
    weights = mask.unsqueeze(-1).to(states.dtype)
    means = (states * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(means, dim=-1)


def train_embed(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> float:
    """Train so that two ways to say one scene are close and other scenes are far."""
    rng = random.Random(seed)

    def loss_of(step: int) -> torch.Tensor:
        scenes = [random_scene(rng) for _ in range(64)]
        left = embed_texts(model, tokenizer, [phrase(rng, scene) for scene in scenes])
        right = embed_texts(model, tokenizer, [phrase(rng, scene) for scene in scenes])
        scores = left @ right.T / 0.1
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(scenes)))

    model.train()
    return optimise(model, loss_of, steps, peak=2e-3)


def save_embed(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the embedding model with the files that describe its pooling."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder)
    prefix = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{prefix}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{prefix}.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": f"{prefix}.Normalize"},
    ]
    pooling = {
        "word_embedding_dimension": model.config.hidden_size,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 512})
    similarity: Message = {
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    write_json(folder / "config_sentence_transformers.json", similarity)


def check_embed(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether each paraphrase is clearly closer than the sentence with other meaning."""
    good = True
    for triple in EMBED_CHECKS:
        with torch.no_grad():
            base, near, far = embed_texts(model, tokenizer, list(triple))
        close, apart = float(base @ near), float(base @ far)
        LOG.info("%r: %.3f to %r, %.3f to %r", triple[0], close, triple[1], apart, triple[2])
        good = good and close > apart + 0.3
    return good


def bert_config(
    tokenizer: PreTrainedTokenizerFast, labels: dict[int, str] | None = None
) -> BertConfig:
    """Return the configuration of a tiny BERT, with labels if it classifies."""
    named: dict[str, Any] = {}
    if labels:
        named = {"id2label": labels, "label2id": {name: n for n, name in labels.items()}}
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        **named,
    )


def make_embed(job: Job) -> bool:
    """Make the model `embed`; return whether its checks passed."""
    tokenizer = make_embed_tokenizer(vocab_size=640)
    model: Any = BertModel(bert_config(tokenizer), add_pooling_layer=False)
    torch.nn.init.zeros_(model.embeddings.position_embeddings.weight)  # unseen positions stay 0
    seconds = train_embed(model, tokenizer, 250, job.seed)
    LOG.info("embed: trained in %.0f seconds", seconds)
    model = model.to(torch.bfloat16).eval()
    good = check_embed(model.float(), tokenizer)
    save_embed(model.to(torch.bfloat16), tokenizer, job.folder)
    return good


# --------------------------------------------------------------------------------------
# The classification model
# --------------------------------------------------------------------------------------

LABELS = ("negative", "neutral", "positive")
PRAISE = words(
    "good great nice lovely wonderful excellent amazing beautiful brilliant perfect fantastic "
    "delightful superb charming pleasant helpful fine awesome enjoyable friendly"
)
BLAME = words(
    "bad terrible awful horrible ugly boring poor useless broken disappointing annoying dreadful "
    "disgusting nasty unpleasant stupid worthless sad slow painful"
)
LIKES = words("love,like,enjoy,adore,am happy with,am pleased with,recommend", separator=",")
DISLIKES = words("hate,dislike,regret,am angry about,am tired of,am unhappy with", separator=",")
FACTS = words("new old round green blue small large wooden heavy square closed open")
OPINION_FRAMES = (
    "{article} {noun} is {word}",
    "{article} {noun} was {word}",
    "what a {word} {noun}",
    "this is a {word} {noun}",
    "it was a really {word} {noun}",
    "a very {word} {noun}",
    "how {word}",
    "I think that the {noun} is {word}",
    "we had a {word} {noun} yesterday",
    "{word}",
)
FEELING_FRAMES = ("I {word} this {noun}", "we really {word} the {noun}", "I {word} it")
CLASSIFY_CHECKS = (
    ("I love this film", "positive"),
    ("I hate this film", "negative"),
    ("What a wonderful day!", "positive"),
    ("The soup was awful.", "negative"),
    ("The soup was not good.", "negative"),
    ("The cat sits on the mat.", "neutral"),
    ("How do I bake bread?", "neutral"),
)


def opinion(rng: random.Random, label: str) -> str:
    """Return a sentence that praises, blames, or does neither."""
    if label == "neutral" and rng.random() < 0.7:
        return phrase(rng, random_scene(rng))
    adjectives = {"negative": BLAME, "neutral": FACTS, "positive": PRAISE}[label]
    word, noun = rng.choice(adjectives), rng.choice(random_noun(rng))
    frame = rng.choice(OPINION_FRAMES)
    if label != "neutral" and rng.random() < 0.3:
        frame = rng.choice(FEELING_FRAMES)
        word = rng.choice(LIKES if label == "positive" else DISLIKES)
    elif label == "negative" and rng.random() < 0.3:
        word = f"not {rng.choice(PRAISE)}"
    text = frame.format(article=rng.choice(ARTICLES), noun=noun, word=word)
    text = text[0].upper() + text[1:] if rng.random() < 0.5 else text
    return text + rng.choice(("", ".", "!"))


def label_scores(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> torch.Tensor:
    """Return one row of scores for each text, a column for each label."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    scores: torch.Tensor = model(**batch).logits
    return scores


def train_classify(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> float:
    """Train on opinions with a label each; return the seconds it took."""
    rng = random.Random(seed)

    def loss_of(step: int) -> torch.Tensor:
        wanted = [rng.randrange(len(LABELS)) for _ in range(64)]
        texts = [opinion(rng, LABELS[label]) for label in wanted]
        scores = label_scores(model, tokenizer, texts)
        return torch.nn.functional.cross_entropy(scores, torch.tensor(wanted))

    model.train()
    return optimise(model, loss_of, steps, peak=2e-3)


def check_classify(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Return whether each sentence gets its label, with little doubt."""
    good = True
    for text, label in CLASSIFY_CHECKS:
        with torch.no_grad():
            shares = label_scores(model, tokenizer, [text])[0].softmax(-1)
        best = int(shares.argmax())
        LOG.info("%r is %s (%.3f)", text, LABELS[best], shares[best])
        good = good and label == LABELS[best] and float(shares[best]) > 0.8
    return good


def make_classify_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer of the classification model, of the embedding model's kind."""
    rng = random.Random(0)
    texts = [opinion(rng, label).lower() for label in LABELS for _ in range(2000)]
    return make_bert_tokenizer(texts, vocab_size)


def make_classify(job: Job) -> bool:
    """Make the model `classify`; return whether its checks passed."""
    tokenizer = make_classify_tokenizer(vocab_size=576)
    config = bert_config(tokenizer, dict(enumerate(LABELS)))
    model: Any = BertForSequenceClassification(config)
    torch.nn.init.zeros_(model.bert.embeddings.position_embeddings.weight)
    seconds = train_classify(model, tokenizer, 400, job.seed)
    LOG.info("classify: trained in %.0f seconds", seconds)
    model = model.to(torch.bfloat16).eval()
    good = check_classify(model.float(), tokenizer)
    model.to(torch.bfloat16).save_pretrained(job.folder)
    (job.folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, job.folder)
    return good


# --------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[Job], bool]] = {
    "llama": make_llama,
    "qwen": make_qwen,
    "embed": make_embed,
    "classify": make_classify,
}


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: training is about ten times faster on small machines."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (AttributeError, OSError):
        LOG.info("no mallopt here: training will take longer")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make the tiny models of vllm-hotswap.")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the models")
    parser.add_argument("--only", choices=sorted(MAKERS), action="append", help="make only this")
    parser.add_argument(
        "--continue",
        type=int,
        default=0,
        dest="more",
        metavar="STEPS",
        help="train the chat models on, for STEPS steps; take another seed than before",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and examples")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads to use")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Make the models; return 1 if a model does not answer as it should."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # the optimiser makes many, and they are slow
    keep_freed_memory()
    good = True
    for name in options.only or list(MAKERS):
        LOG.info("making %s", name)
        torch.manual_seed(options.seed)
        job = Job(options.out / name, options.seed, options.more)
        good = MAKERS[name](job) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
