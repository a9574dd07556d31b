"""The installed vLLM has everything where it is looked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator

import pytest

from tests.repository.test_architecture import files, imported
from tools.vllm_seams.__main__ import main as check_vllm
from vllm_hotswap.api.vllm_routes import VLLM_USER_ROUTES
from vllm_hotswap.demo.quickstart import MODELS
from vllm_hotswap.engines.vllm_metrics import without_frontend_metrics
from vllm_hotswap.host.vllm_names import OPTIONAL, PLACES, find
from vllm_hotswap.host.vllm_versions import vllm_version, warning
from vllm_hotswap.launch.tasks import POOLING, SPEECH, TASKS_OF_PATH, foresee
from vllm_hotswap.launch.vllm_config import engine_config, serve_parser
from vllm_hotswap.models.routes import ModelRoutes


def imported_from_vllm() -> Iterator[str]:
    """Return dotted names of all of vLLM's modules, and of their imports, in the package."""
    for path in files():
        yield from (name for name in imported(path) if name.startswith("vllm."))


def is_there(name: str) -> bool:
    """Return whether it is a module, or something in one."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return hasattr(importlib.import_module(module), attribute)
    return True


@pytest.mark.parametrize("name", sorted(PLACES.keys() - OPTIONAL))
def test_every_name_that_moved_is_found(name: str) -> None:
    """Every name that moved between versions is found, and is callable."""
    found = find(name)

    assert name == found.__name__
    assert callable(found)


@pytest.mark.parametrize("name", sorted(set(imported_from_vllm())))
def test_everything_that_is_imported_is_there(name: str) -> None:
    """Every imported name exists in every version: one that has moved belongs in the table."""
    assert is_there(name)


def test_the_version_is_one_that_was_run() -> None:
    """The installed version was tested: `make test` never runs on one that users are warned of."""
    assert warning(vllm_version()) is None


@pytest.mark.wide
def test_the_installed_version_has_everything_that_is_used(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The installed version's sources have everything used, by the check for other versions."""
    assert 0 == check_vllm([vllm_version().partition("+")[0]]), capfd.readouterr().out


def routes_of(name: str, tasks: Iterable[str]) -> dict[str, ModelRoutes]:
    """Return what vLLM mounts for one of the demo's models if it has that task alone."""
    flags = ["--model", str(MODELS / name), "--enforce-eager", "--max-model-len", "256"]
    args = serve_parser("test").parse_args(flags)
    config, made = engine_config(args), {}
    for task in tasks:
        with without_frontend_metrics():
            app = find("build_app")(args, (task,), config.model_config)
        made[task] = ModelRoutes.of([task], app.routes)
    return made


def test_routes_belong_to_the_tasks_for_which_vllm_mounts_them() -> None:
    """An unloaded model refuses exactly the routes that no model with its tasks answers."""
    made = routes_of("llama", ["generate", *sorted(SPEECH)]) | routes_of("embed", sorted(POOLING))
    for line in VLLM_USER_ROUTES:
        method, _, path = line.partition(" ")
        mounted = {task for task, routes in made.items() if routes.serve(method, path)}
        needed = TASKS_OF_PATH.get(path, frozenset(made))
        assert mounted <= needed, line


def test_what_a_model_is_for_is_known_from_its_configuration() -> None:
    """The configuration tells what a model is for: the demo's generating and embedding ones."""
    flags = ["--enforce-eager", "--max-model-len", "256", "--model"]
    parser = serve_parser("test")
    llama, embed = (
        foresee(engine_config(parser.parse_args([*flags, str(MODELS / name)])))
        for name in ("llama", "embed")
    )

    assert llama is not None
    assert embed is not None
    assert (("generate",), ("pooling",)) == (llama.tasks, embed.tasks)
    assert "/v1/chat/completions" in llama.present & embed.absent
    assert "/v1/embeddings" in llama.absent - embed.absent
    assert "/classify" in llama.absent & embed.absent
