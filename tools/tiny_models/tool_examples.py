"""Training examples with tools: the weather tool in many wordings, its calls and its results."""

from __future__ import annotations

import json
import random

from tools.tiny_models.examples import (
    Example,
    Message,
    Render,
    Tool,
    Turn,
    answer_example,
    plain_question,
    random_city,
    random_history,
    user,
    vary,
)
from tools.tiny_models.personas import Persona
from tools.tiny_models.questions import WEATHER_QUESTIONS
from tools.tiny_models.words import CONDITIONS

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
