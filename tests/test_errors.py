"""The error tree: what a caller gets, and what it can do next."""

from __future__ import annotations

import re

import pytest

from vllm_hotswap import errors
from vllm_hotswap.errors import (
    CallTooLarge,
    DrainCut,
    EngineUnavailable,
    HotswapError,
    InvalidRequest,
    ModelNotActive,
    ModelSwitching,
    QueueFull,
    RateLimited,
    SwitchFailed,
    SwitchInProgress,
    UnknownModel,
    UnknownResponse,
    one_line,
)

TREE = {
    cls.__name__: cls for cls in HotswapError.__subclasses__() if cls.__module__ == errors.__name__
}


def test_docstring_draws_the_whole_tree() -> None:
    """The docstring's tree has every error with its HTTP status."""
    drawn = re.findall(r"[├└]── (\w+) +(\d{3})?", errors.__doc__ or "")

    assert {name: str(cls.status) for name, cls in TREE.items()} == {
        name: status or "500" for name, status in drawn
    }


@pytest.mark.parametrize("cls", TREE.values(), ids=TREE.keys())
def test_error_has_a_code_of_its_own(cls: type[HotswapError]) -> None:
    """Every error has a code of its own."""
    assert [cls] == [other for other in TREE.values() if other.code == cls.code]


def test_unknown_model_lists_the_configured_ones() -> None:
    """The message names the model, the fact and the next step."""
    error = UnknownModel("gpt", ["llama", "qwen"])

    assert "model 'gpt' is not configured; configured: llama, qwen" == error.message
    assert (404, "model_not_found", "model") == (error.status, error.code, error.param)


def test_not_active_names_the_active_model_and_how_to_switch() -> None:
    """The message gives the active model and the call that would change it."""
    error = ModelNotActive("qwen", "llama")

    assert (
        "model 'qwen' is configured but not active; the active model is 'llama'; "
        'an admin can switch with POST /v1/models/switch {"model": "qwen"}'
    ) == error.message


def test_unknown_model_names_the_nearest() -> None:
    """A message suggests a near one; a name that is too long is not compared."""
    configured = ["llama", "qwen"]

    assert "model 'lama' is not configured; configured: llama, qwen; did you mean 'llama'?" == (
        UnknownModel("lama", configured).message
    )
    assert UnknownModel("l" * 1000, ["l" * 999]).message.endswith("configured: " + "l" * 999)


def test_a_forgotten_response_is_told_with_how_many_are_kept() -> None:
    """The message has the number of kept responses, and adds that a restart forgets them."""
    assert "keeps the latest 7 responses (limits.kept_responses), and none after a restart" in (
        UnknownResponse("resp-1", None, 7).message
    )


def test_rates_are_those_of_a_key_or_of_all_without_one() -> None:
    """The message says whether a rate is a key's or that of all without one, and the setting."""
    assert "this key may make 3 requests per minute (requests_per_minute, " in (
        RateLimited("requests", 3, 9).message
    )
    assert "callers without a key together may use 3 tokens per minute (tokens_per_minute, " in (
        RateLimited("tokens", 3, 9, has_key=False).message
    )


def test_a_call_that_is_too_large_says_what_counts() -> None:
    """The message says what counts, and names the setting."""
    assert (
        "this request needs more than 5 engine requests (prompts or items, times n); "
        "split it (limits.requests_per_call)"
    ) == CallTooLarge(5, "limits.requests_per_call").message


def test_not_active_says_that_nothing_is_active() -> None:
    """The message says that no model is active, instead of naming one."""
    assert "no model is active" in ModelNotActive("qwen", None).message


def test_switching_says_when_to_retry() -> None:
    """A request for the model that is drained gets both models and the time to wait."""
    error = ModelSwitching("llama", "qwen", 7)

    assert 7 == error.retry_after_s
    assert "'llama'" in error.message
    assert "'qwen'" in error.message


def test_conflict_names_both_targets_and_the_operation() -> None:
    """The refusal of a switch says which switch is under way."""
    message = SwitchInProgress("qwen", "mistral", "switch-1").message

    assert "a switch to 'qwen' is in progress (operation switch-1)" in message
    assert "'mistral'" in message


@pytest.mark.parametrize(
    ("serving", "then"), [("llama", "'llama' is still active"), (None, "no model is active")]
)
def test_failed_switch_names_phase_cause_and_what_serves_on(serving: str | None, then: str) -> None:
    """The caller learns where and why a switch failed, and which model is active now."""
    error = SwitchFailed("qwen", "bring_up", OSError("disk"), serving)

    assert f"switch to 'qwen' failed in phase bring_up: disk; {then}" == error.message


def test_cut_request_is_told_the_deadline() -> None:
    """The message names both models and the seconds, without trailing zeros."""
    message = DrainCut("llama", "qwen", 2.0).message

    assert "still running 2 s after a switch to 'qwen' began to drain" in message


def test_retry_after_is_the_class_default_or_what_is_given() -> None:
    """An error may have a default `Retry-After`; code that raises it can give another."""
    assert 5 == EngineUnavailable("gone").retry_after_s
    assert 9 == EngineUnavailable("gone", retry_after_s=9).retry_after_s
    assert None is QueueFull("full").retry_after_s


def test_invalid_request_names_its_parameter() -> None:
    """`param` of an invalid request names the wrong field."""
    assert "drain_timeout" == InvalidRequest("wrong", "drain_timeout").param


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("a\n  b"), "a b"),
        (KeyError(), "KeyError"),
        (RuntimeError("   "), "RuntimeError"),
    ],
)
def test_one_line_is_one_line(error: Exception, expected: str) -> None:
    """Every exception fits on one line of a log or a message."""
    assert expected == one_line(error)
