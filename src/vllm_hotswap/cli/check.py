"""`vllm-hotswap check`: everything about a configuration that can be known without loading it.

Checks every model and reports every mistake, while a start stops at the first one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from vllm_hotswap.access import read_members
from vllm_hotswap.config import ModelConfig, ReadConfig, ServerConfig
from vllm_hotswap.engines import expected_memory
from vllm_hotswap.errors import ConfigError, ConfigMistakes, HotswapError, Mistake, one_line
from vllm_hotswap.host import Variables, device_of
from vllm_hotswap.launch import (
    ModelLaunch,
    check_names,
    check_weights,
    inspected_here,
    model_namespace,
    parse_server_flags,
    plan_memory,
    prepare_model,
    rehearsal as trial,
    serve_parser,
    setting_mistakes,
    weight_files,
)
from vllm_hotswap.tasks import gc_paused
from vllm_hotswap.telemetry import CheckProgress

T = TypeVar("T")


@dataclass(slots=True)
class ModelReport:
    """Findings about one model."""

    alias: str
    task: str = "-"
    max_model_len: int | None = None
    weights_bytes: int | None = None
    kv_bytes: int | None = None
    notes: list[str] = field(default_factory=list)
    """Facts that are not mistakes, but may surprise."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """Reasons why it cannot work, by step."""


@dataclass(slots=True)
class Report:
    """Findings about the whole configuration."""

    models: list[ModelReport] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    """Everything that is wrong with the file and with its models, in the order of its lines."""
    problems: list[str] = field(default_factory=list)
    """Problems of all models together."""
    budget_bytes: int | None = None

    @property
    def is_good(self) -> bool:
        return not self.problems and not self.mistakes


def check(
    read: ReadConfig, flags: Sequence[str], notify: Callable[[str], None] = lambda _: None
) -> Report:
    """Check every model, and whether they fit together.

    Args:
        read: the YAML file, and its mistakes that are known already.
        flags: flags of `vllm serve`, as at a start.
        tell: called with the name of each model before it is checked.

    Raises:
        ConfigError: a flag of the command line cannot work, or there is no model to check.
    """
    config = read.config or read.whole()
    parser = serve_parser("vllm-hotswap check")
    parse_server_flags(parser, flags)
    report, variables = Report(), Variables()
    found = list(read.mistakes)
    launches: list[ModelLaunch] = []
    for model in config.models:
        notify(model.alias)
        model_check = _ModelCheck(parser, flags, config, variables, model)
        report.models.append(model_check.report)
        launches += (
            model_check.settings_only() if model.alias in read.unusable else model_check.run_all()
        )
        found += model_check.mistakes
    if read.mistakes or len(launches) < len(config.models):
        report.problems.append("memory: skipped until the errors are fixed")
    else:
        _check_memory(config, launches, report, notify)
    _check_adapters(config, launches, report)
    _check_rights(config, report)
    report.mistakes = list(ConfigMistakes(found).mistakes)
    return report


def _check_rights(config: ServerConfig, report: Report) -> None:
    """Check the key files of groups, as the user who runs the check."""
    try:
        read_members(config.rights)
    except ConfigError as error:
        report.problems.append(error.message)


def _check_adapters(config: ServerConfig, launches: Iterable[ModelLaunch], report: Report) -> None:
    """Check adapters across models; those of one model were checked with it."""
    try:
        check_names(config, {launch.alias: launch.adapters for launch in launches})
        _ = config.adapter_folders
    except ConfigError as error:
        report.problems.append(error.message)


class _ModelCheck:
    """Checks one model, step by step."""

    def __init__(
        self,
        parser: argparse.ArgumentParser,
        flags: Sequence[str],
        config: ServerConfig,
        variables: Variables,
        model: ModelConfig,
    ) -> None:
        self._parser = parser
        self._flags = flags
        self._config = config
        self._variables = variables
        self._model = model
        self.report = ModelReport(model.alias)
        self.mistakes: list[Mistake] = []

    def settings_only(self) -> tuple[ModelLaunch, ...]:
        """Check only the settings, with vLLM's parser: the file's errors rule out a launch."""
        self.report.problems["file"] = ["it has errors in the file"]
        found = setting_mistakes(self._parser, [self._model], self._config.path)
        self._add("settings", found)
        return ()

    def run_all(self) -> Iterator[ModelLaunch]:
        """Check all steps; yield what a start would launch, if its settings allow that."""
        config, model = self._config, self._model
        args = self._try(
            "settings",
            lambda: model_namespace(self._parser, self._flags, model, config.path),
        )
        if args is None:
            return
        launch = self._try(
            "config.json", lambda: prepare_model(model, args, config, self._variables)
        )
        if launch is None:
            return
        vllm = launch.vllm_config.model_config
        self.report.task = str(vllm.runner_type)
        self.report.max_model_len = vllm.max_model_len
        self.report.weights_bytes = launch.weights_bytes
        self._try("weights", lambda: self._check_weights(launch), "model")
        self._check_text(launch)
        yield launch

    def _check_weights(self, launch: ModelLaunch) -> None:
        path = Path(self._model.model)
        if path.is_dir():
            check_weights(path)
            if launch.vllm_config.load_config.load_format == "auto" and not weight_files(path):
                raise ConfigError(f"no weight files in {str(path)!r}")
        elif not path.is_absolute():
            self.report.notes.append("a model hub's name: its files were not checked")

    def _check_text(self, launch: ModelLaunch) -> None:
        tokenizer = self._try(
            "tokenizer", lambda: trial.make_tokenizer(launch.vllm_config), "tokenizer"
        )
        if tokenizer is None or not trial.generates(launch.vllm_config):
            return
        self._try("parsers", lambda: trial.make_parsers(launch.args, tokenizer), "tool_call_parser")
        rendered = self._try(
            "chat template",
            lambda: trial.render_once(launch.args, launch.vllm_config, tokenizer),
            "chat_template",
        )
        if rendered == "":
            self.report.notes.append("no chat template: chat requests will be refused")

    def _try(self, step: str, do: Callable[[], T], key: str = "") -> T | None:
        """Return what `do` returns; if it raises, note a problem of the key `key`, return None."""
        try:
            return do()
        except ConfigMistakes as error:
            self._add(step, error.mistakes)
        except Exception as error:  # noqa: BLE001  # libraries may raise anything
            place = self._model.at(self._config.path, key if key in self._model.lines else "")
            message = one_line(error)
            start = f"{self._config.path}:"
            message = message if message.startswith(start) else f"{place}: {step}: {message}"
            self._add(step, [Mistake(place.line, message)])
        return None

    def _add(self, step: str, found: Iterable[Mistake]) -> None:
        hide = self._config.references.hide
        hidden = [Mistake(mistake.line, hide(mistake.message)) for mistake in found]
        if hidden:
            self.mistakes += hidden
            self.report.problems[step] = [mistake.message for mistake in hidden]


def _check_memory(
    config: ServerConfig,
    launches: Sequence[ModelLaunch],
    report: Report,
    notify: Callable[[str], None],
) -> None:
    """Plan the memory as a start would, with what is free now."""
    try:
        memory = expected_memory(device_of(launches[0].vllm_config), notify)
        budget, needs = plan_memory(launches, config.memory, memory)
        report.budget_bytes = budget.device
    except HotswapError as error:
        report.problems.append(f"memory: {one_line(error)}")
        return
    for model in report.models:
        model.kv_bytes = needs[model.alias].kv_bytes


# --- the command ------------------------------------------------------------------------------


def run(read: ReadConfig, flags: Sequence[str], as_json: bool) -> int:
    """Check, print a table (or JSON), and return the exit status: 1 if anything cannot work."""

    config = read.config or read.whole()
    aliases = [model.alias for model in config.models]
    with (
        contextlib.redirect_stdout(sys.stderr),  # vLLM logs to stdout, where the report goes
        CheckProgress(aliases) as progress,
        gc_paused(),  # collection takes a tenth of the time of importing vLLM
        inspected_here(),
    ):
        report = check(read, flags, progress.begin)
    print(json.dumps(asdict(report), indent=2) if as_json else table(report))
    return 0 if report.is_good else 1


def table(report: Report) -> str:
    """Format the report as text."""
    rows = [("model", "task", "max length", "weights", "KV memory", "result")]
    rows += [
        (
            model.alias,
            model.task,
            "-" if model.max_model_len is None else str(model.max_model_len),
            _mib(model.weights_bytes),
            _mib(model.kv_bytes),
            ", ".join(model.problems) or "ok",
        )
        for model in report.models
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if report.budget_bytes is not None:
        lines.append(f"memory for models: {_mib(report.budget_bytes)}")
    lines += [f"note: {model.alias}: {note}" for model in report.models for note in model.notes]
    lines += [f"error: {mistake.message}" for mistake in report.mistakes]
    lines += [f"error: {problem}" for problem in report.problems]
    return "\n".join(lines)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / (1 << 20):.1f} MiB"
