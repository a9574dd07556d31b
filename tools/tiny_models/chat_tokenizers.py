"""Tokenizers of the chat models."""

from __future__ import annotations

import json
import random

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from tools.tiny_models.bpe import train_bpe
from tools.tiny_models.examples import count_text, plain_question
from tools.tiny_models.personas import Persona, make_persona
from tools.tiny_models.templates import LLAMA_TEMPLATE, QWEN_TEMPLATE
from tools.tiny_models.tool_examples import other_tool, tool_call_text, weather_result, weather_tool
from tools.tiny_models.words import CITIES, CONDITIONS


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
