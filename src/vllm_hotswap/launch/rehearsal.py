"""Tries, without an engine, what a model's frontend does at its first request.

Relies on: `cached_tokenizer_from_config` and its cache, `safe_apply_chat_template`,
`load_chat_template`, the managers of parsers. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from vllm_hotswap.errors import ConfigError, one_line
from vllm_hotswap.host import find
from vllm_hotswap.launch.checkpoint import json_object
from vllm_hotswap.launch.vllm_config import reasoning_parser

T = TypeVar("T")

MESSAGES = [{"role": "user", "content": "Hello"}]

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model*",
    "tekken.json",
    "vocab.*",
    "*.tiktoken",
    "*.bpe.model",
    "spiece.model",
    "tokenization_*.py",
)
"""Files that hold a tokenizer's vocabulary, by their usual names; or its own code."""

DESCRIPTIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files of a tokenizer that are JSON objects."""

TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look something up",
        "parameters": {"type": "object", "properties": {"name": {"type": "string"}}},
    },
}


def generates(config: Any) -> bool:
    """Whether the model generates text, rather than embedding, classifying or scoring it."""
    return str(config.model_config.runner_type) == "generate"


def make_tokenizer(config: Any) -> Any:
    """Return the model's tokenizer; None if it is configured to have none.

    Raises whatever vLLM and transformers raise; a `ConfigError` if it has no files, where
    transformers would say that a package is missing.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    try:
        return cached_tokenizer_from_config(config.model_config)
    except Exception as error:
        folder = Path(str(config.model_config.tokenizer))
        if folder.is_dir() and not has_tokenizer(folder):
            raise ConfigError(
                f"no tokenizer.json in {str(folder)!r}, nor any other tokenizer's file; copy it "
                "from the checkpoint's source, or name another place with the key `tokenizer`"
            ) from error
        if folder.is_dir():
            _check_json(folder)
        raise


def _check_json(folder: Path) -> None:
    """Raise `ConfigError` for a tokenizer's file that is not even a JSON object."""
    for name in DESCRIPTIONS:
        if (folder / name).is_file():
            json_object(folder / name)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has the vocabulary of a tokenizer of any kind."""
    return any(file for pattern in VOCABULARIES for file in folder.glob(pattern))


def make_parsers(args: argparse.Namespace, tokenizer: Any) -> None:
    """Make the tool and the reasoning parser: several refuse a tokenizer without their tokens."""
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    if args.tool_call_parser:
        ToolParserManager.get_tool_parser(args.tool_call_parser)(tokenizer)
    if name := reasoning_parser(args):
        ReasoningParserManager.get_reasoning_parser(name)(tokenizer)


def rehearse(args: argparse.Namespace, config: Any) -> None:
    """Make what a frontend needs of the model's files, and drop it again.

    A template that cannot render this conversation is not a reason to refuse a model: it may be
    meant for others. A template that cannot be compiled renders none.

    Raises:
        ConfigError: something cannot be made; the message names it.
    """
    tokenizer = _made("tokenizer", lambda: make_tokenizer(config))
    try:
        if tokenizer is not None and generates(config):
            _made("parsers", lambda: make_parsers(args, tokenizer))
            _made("chat template", lambda: _compile_template(args, config, tokenizer))
    except ConfigError:
        _forget_tokenizers()  # so that files are read again once they are repaired
        raise


def _forget_tokenizers() -> None:
    with suppress(ImportError, AttributeError):
        from vllm.tokenizers.registry import cached_get_tokenizer

        cached_get_tokenizer.cache_clear()


def _made(what: str, make: Callable[[], T]) -> T:
    try:
        return make()
    except Exception as error:
        raise ConfigError(f"{what}: {one_line(error)}") from error


def _compile_template(args: argparse.Namespace, config: Any, tokenizer: Any) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        render_once(args, config, tokenizer)
    except Exception as error:
        if isinstance(error, TemplateSyntaxError) or isinstance(
            error.__cause__, TemplateSyntaxError
        ):
            raise


def render_once(args: argparse.Namespace, config: Any, tokenizer: Any) -> str | None:
    """Render a short conversation by the chat template, with a tool if the model has a parser.

    Returns the empty text without a template; None if the tokenizer renders by other means.
    """
    from vllm.renderers.hf import ChatTemplateResolutionError, safe_apply_chat_template

    if not hasattr(tokenizer, "get_chat_template"):
        return None
    try:
        text: str = safe_apply_chat_template(
            config.model_config,
            tokenizer,
            list(MESSAGES),
            tools=[TOOL] if args.tool_call_parser else None,
            chat_template=find("load_chat_template")(args.chat_template),
            **{
                "add_generation_prompt": True,
                **(args.default_chat_template_kwargs or {}),
                "tokenize": False,
            },
        )
    except ChatTemplateResolutionError:
        return ""
    return text
