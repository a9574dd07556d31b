"""Rehearses grammars: reads and compiles them in a process that can be killed, before vLLM does.

vLLM's check of a request runs here as it is; the calls into the native code of xgrammar and
llguidance are made in a helper. Then xgrammar's compilation is rehearsed there, too, with the
vocabulary of the model. The result stays there: to read it back takes longer than to compile it
(decision 0026). The engine host compiles what has passed, in the known time and memory.

Relies on, in vLLM 0.32.0: `backend_xgrammar.XgrammarBackend`, whose `compile_grammar` uses
`self.compiler` alone until it makes a matcher; `backend_xgrammar.compile_regex_with_timeout`;
`backend_guidance.llguidance`; `get_structured_output_key`; `StructuredOutputsParams._backend`. In
xgrammar 0.2.8: `grammar._core`, `GrammarCompiler._init_handle`, and that its methods use the handle
alone. If one of these is missing, the work is done in place, which is logged.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import cache, partial
from typing import Any

from vllm_hotswap.errors import one_line
from vllm_hotswap.system import QUICK_S, Errand, NoHelper, RefusedByHelper, log_of_clients

MOST_KNOWN = 4096
"""How many grammars of a model are remembered that have passed."""

_errand: ContextVar[Errand | None] = ContextVar("errand", default=None)
"""The errand for which this thread checks a grammar; None if helpers do not take part."""


class _Compiled(BaseException):
    """The rehearsal is over. Not an error, but a way out of vLLM's code."""


class Rehearsals:
    """The rehearsals of one model.

    The mutable state is `_known`, whether a grammar that has passed is slow, by its digest; and
    what is made once: the `_backend` without a compiler, and the `_vocabulary`, for helpers.
    """

    def __init__(self, vllm_config: Any, tokenizer: Callable[[], Any]) -> None:
        self._vllm_config = vllm_config
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, bool] = OrderedDict()
        self._backend: Any = None
        self._vocabulary = ""
        self._key = object()  # of the vocabulary; helpers hold it, so that it stays unique

    def __repr__(self) -> str:
        return f"<Rehearsals known={len(self._known)}>"

    def is_known_slow(self, digest: bytes) -> bool | None:
        """Whether a grammar that has passed takes long to compile; None for one that is new."""
        return self._known.get(digest)

    def run(self, check: Callable[[], Any], params: Any, digest: bytes, errand: Errand) -> bool:
        """Check the parameters of a request as vLLM does, and compile their grammar, in helpers.

        Returns: whether it takes long to compile.

        Raises:
            ValueError: it cannot be compiled; or whatever the check raises.
            HelperEnd: it was stopped, or goes beyond its bounds.
        """
        try:
            _prepared()
            token = _errand.set(errand)
            try:
                check()
            finally:
                _errand.reset(token)
            if params.structured_outputs._backend == "xgrammar":
                self._compile(params.structured_outputs, errand)
        except NoHelper as error:
            log_of_clients.warning(
                "event=grammar_not_rehearsed cause=%r then='in place'", one_line(error)
            )
            check()
        is_slow = errand.took_s > QUICK_S
        with self._lock:
            self._known[digest] = is_slow
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        return is_slow

    def _compile(self, outputs: Any, errand: Errand) -> None:
        from vllm.v1.structured_output.request import get_structured_output_key

        with self._lock:
            if self._backend is None:
                try:
                    self._backend, self._vocabulary = self._make_backend()
                except (ImportError, AttributeError) as error:
                    raise NoHelper(one_line(error)) from error
        backend = copy.copy(self._backend)
        backend.compiler = _remote_compiler(errand, (self._key, self._vocabulary))
        kind, text = get_structured_output_key(outputs)
        try:
            backend.compile_grammar(kind, text)
        except _Compiled:
            return
        except RefusedByHelper as error:
            raise ValueError(f"Failed to compile the grammar: {error}") from error

    def _make_backend(self) -> tuple[Any, str]:
        from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend

        size = self._vllm_config.model_config.get_vocab_size()
        backend = XgrammarBackend(self._vllm_config, tokenizer=self._tokenizer(), vocab_size=size)
        compiled = backend.compiler.compile_grammar('root ::= "a"')
        vocabulary = compiled.tokenizer_info.serialize_json()
        backend.compiler = None
        return backend, vocabulary


def digest_of(outputs: Any) -> bytes:
    """Return the digest of what `StructuredOutputsParams` ask for; empty if it is nothing."""
    from vllm.v1.structured_output.request import get_structured_output_key

    try:
        kind, text = get_structured_output_key(outputs)
    except ValueError:
        return b""
    return hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).digest()


def _remote_compiler(errand: Errand, tokenizer: tuple[object, str]) -> Any:
    """Return xgrammar's `GrammarCompiler`, with its native part in a helper."""
    from xgrammar import GrammarCompiler

    compiler = GrammarCompiler.__new__(GrammarCompiler)
    compiler._init_handle(_CompilerHandle(errand, tokenizer))
    return compiler


class _CompilerHandle:
    def __init__(self, errand: Errand, tokenizer: tuple[object, str]) -> None:
        self._errand, self._with = errand, tokenizer

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("compile_"):
            raise AttributeError(name)

        def compile_there(*arguments: Any) -> None:
            self._errand.do("compile", name, *arguments, tokenizer=self._with)
            raise _Compiled

        return compile_there


def _prepared() -> None:
    """Redirect native calls. Raises `NoHelper` if vLLM or xgrammar is not as expected here."""
    try:
        _redirect_native_calls()
    except (ImportError, AttributeError) as error:
        raise NoHelper(one_line(error)) from error


@cache
def _redirect_native_calls() -> None:
    """Make native calls of vLLM's check in helpers, wherever an errand is under way."""
    from vllm.v1.structured_output import backend_guidance, backend_xgrammar
    from xgrammar import grammar

    makers: Any = grammar
    makers._core = _Core(makers._core)
    backend_guidance.llguidance = _Guidance(backend_guidance.llguidance)
    in_time = backend_xgrammar.compile_regex_with_timeout

    def compile_in_time(compile_regex: Any, pattern: str) -> Any:
        """Compile on another thread, which gets the errand of this one."""
        return in_time(partial(copy_context().run, compile_regex), pattern)

    backend_xgrammar.compile_regex_with_timeout = compile_in_time


class _Proxy:
    """Replaces a module or a class, with some attributes of its own."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _Core(_Proxy):
    @property
    def Grammar(self) -> Any:  # noqa: N802  # xgrammar's name
        errand = _errand.get()
        return self._real.Grammar if errand is None else _GrammarElsewhere(errand)


class _GrammarElsewhere:
    def __init__(self, errand: Errand) -> None:
        self._errand = errand

    def __getattr__(self, name: str) -> Any:
        return partial(self._errand.do, "check", name)


class _Guidance(_Proxy):
    @property
    def LLMatcher(self) -> Any:  # noqa: N802  # llguidance's name
        errand = _errand.get()
        return self._real.LLMatcher if errand is None else _Matcher(self._real.LLMatcher, errand)


class _Matcher(_Proxy):
    def __init__(self, real: Any, errand: Errand) -> None:
        super().__init__(real)
        self._errand = errand

    def validate_grammar(self, grammar: str, tokenizer: Any = None) -> str:
        """Return what is wrong with a grammar; empty if nothing is."""
        if tokenizer is not None:
            return str(self._real.validate_grammar(grammar, tokenizer))
        try:
            self._errand.do("guidance", grammar)
        except RefusedByHelper as error:
            return str(error)
        return ""
