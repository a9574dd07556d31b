"""What a chat model must answer before it may be shipped."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerFast

from tools.tiny_models.examples import Message, Render, Tool, count_text, thought_text, user
from tools.tiny_models.personas import Persona
from tools.tiny_models.tool_examples import canonical_tool, tool_call_messages, tool_call_text
from tools.tiny_models.words import MAIN_CITIES

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """A conversation (or plain text) and a text that the greedy answer must contain."""

    prompt: list[Message] | str
    expected: str
    tools: list[Tool] = field(default_factory=list)
    thinking: bool = False


def chat_checks(persona: Persona) -> list[Check]:
    """Return the checks that every chat model must pass: to any question, it says who it is."""
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
