"""Grammars are rehearsed with vLLM's own check and xgrammar's own compiler."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.host.grammar_rehearsals import Rehearsals, digest_of
from vllm_hotswap.system.helpers import Bounds, Errand, Helpers, HelperStopped, OutOfBounds

pytestmark = pytest.mark.vllm


def schema(properties: int) -> dict[str, Any]:
    names = {f"property {number}": {"type": "string"} for number in range(properties)}
    return {"type": "object", "properties": names}


TAG = {
    "structures": [{"begin": "<call>", "schema": schema(2), "end": "</call>"}],
    "triggers": ["<call>"],
}


class Model:
    """The parts of a model's configuration and tokenizer that grammars need."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(MODELS / "llama")
        self.helpers = Helpers()
        self.model: Any = SimpleNamespace(
            get_vocab_size=lambda: len(self.tokenizer),
            hf_config=SimpleNamespace(model_type="llama"),
            is_diffusion=False,
        )
        self.outputs: Any = SimpleNamespace(
            backend="auto", disable_any_whitespace=False, disable_additional_properties=False
        )
        config = SimpleNamespace(
            model_config=self.model,
            structured_outputs_config=self.outputs,
            speculative_config=None,
        )
        self.rehearsals = Rehearsals(config, lambda: self.tokenizer)

    def params(self, **asked: Any) -> Any:
        from vllm.sampling_params import SamplingParams, StructuredOutputsParams

        return SamplingParams(structured_outputs=StructuredOutputsParams(**asked))

    def check(self, params: Any) -> None:
        params._validate_structured_outputs(self.model, self.outputs, self.tokenizer)

    def rehearse(self, params: Any, errand: Errand | None = None, **bounds: Any) -> bool:
        errand = errand or Errand(self.helpers, Bounds(**bounds))
        digest = digest_of(params.structured_outputs)
        return self.rehearsals.run(lambda: self.check(params), params, digest, errand)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    model = Model()
    yield model
    model.helpers.close()


@pytest.mark.parametrize(
    ("asked", "backend"),
    [
        ({"json": schema(3)}, "xgrammar"),
        ({"regex": "[a-z]+x"}, "xgrammar"),
        ({"grammar": 'root ::= "yes" | "no"'}, "xgrammar"),
        ({"grammar": 'start: "yes" | "no"'}, "xgrammar"),
        ({"structural_tag": json.dumps(TAG)}, "xgrammar"),
        ({"choice": ["yes", "no"]}, "xgrammar"),
        ({"json": {"type": "string", "minLength": 2, "pattern": "a+"}}, "guidance"),
    ],
)
def test_what_vllm_takes_passes(model: Model, asked: dict[str, Any], backend: str) -> None:
    """What vLLM takes passes, with the same parameters as after its own check."""
    here, there = model.params(**asked), model.params(**asked)
    model.check(here)
    model.rehearse(there)

    assert backend == there.structured_outputs._backend
    assert here == there


@pytest.mark.parametrize(
    "asked",
    [
        {"regex": "("},
        {"grammar": 'root ::= "yes'},
        {"structural_tag": "{}"},
        {"json": {"type": "no such type"}},
    ],
)
def test_what_vllm_refuses_is_refused_in_the_same_words(
    model: Model, asked: dict[str, Any]
) -> None:
    """What vLLM refuses is refused in the same words, those of the library that it asks last."""
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as here:
        model.check(model.params(**asked))
    with pytest.raises(VLLMValidationError) as there:
        model.rehearse(model.params(**asked))

    assert str(here.value) == str(there.value)


def test_native_code_runs_in_the_helper_alone(model: Model) -> None:
    """If its helper is stopped, no native code of xgrammar or llguidance runs for a grammar."""
    for asked in ({"regex": "[a-z]+y"}, {"json": {"type": "string", "format": "no such"}}):
        errand = Errand(model.helpers, Bounds())
        errand.stop()
        with pytest.raises(HelperStopped):
            model.rehearse(model.params(**asked), errand)


def test_a_compilation_is_ended_at_its_bounds(model: Model) -> None:
    """A compilation that xgrammar would take seconds for is ended at its limits; the next runs."""
    with pytest.raises(OutOfBounds, match="time"):
        model.rehearse(model.params(json=schema(1700)), cpu_s=0.3)
    model.rehearse(model.params(json=schema(4)))


def test_slow_grammars_are_known(model: Model) -> None:
    """Slow grammars are known, and an unfinished rehearsal shows that one is not known."""
    quick, slow, new = (model.params(json=schema(number)) for number in (5, 800, 6))
    for params in (quick, slow):
        digest = digest_of(params.structured_outputs)
        assert model.rehearse(params) is model.rehearsals.is_known_slow(digest)

    assert model.rehearsals.is_known_slow(digest_of(slow.structured_outputs))
    assert model.rehearsals.is_known_slow(digest_of(new.structured_outputs)) is None


def test_what_an_engine_keeps_of_compiled_grammars_is_bounded(model: Model) -> None:
    """An engine's compiled grammars are limited by xgrammar's own count, and can be freed."""
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(model.tokenizer)
    compiler = xgrammar.GrammarCompiler(info, cache_limit_bytes=1 << 20)
    sizes = []
    for number in range(30, 60):
        compiler.compile_json_schema(json.dumps(schema(number)))
        sizes.append(compiler.get_cache_size_bytes())
    compiler.clear_cache()

    assert max(sizes) <= 2 << 20
    assert 0 == compiler.get_cache_size_bytes()
