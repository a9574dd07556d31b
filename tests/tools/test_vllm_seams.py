"""The check of another vLLM's sources notices whatever would break a start there."""

from __future__ import annotations

import ast
import dataclasses
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tools.vllm_seams import __main__ as command
from tools.vllm_seams.declared import seams
from tools.vllm_seams.imports import decided
from tools.vllm_seams.report import Known, changed, problems
from tools.vllm_seams.routes import handlers_in, routes_in
from tools.vllm_seams.state import seams_of_state
from tools.vllm_seams.tree import Tree
from tools.vllm_seams.uses import Uses, uses_in
from tools.vllm_seams.wheel import NoSources, _unpack, sources_of
from vllm_hotswap.config.code_settings import code_keys
from vllm_hotswap.host.vllm_state import Owner, State
from vllm_hotswap.host.vllm_versions import READ_ON, RUN_ON

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[2] / "src" / "vllm_hotswap"
MakeTree = Callable[..., Tree]

VLLM = {
    "__init__.py": "",
    "old.py": "def helper(a, b=1, *, c): ...\n",
    "new.py": "from vllm.old import helper as moved\n",
    "late/__init__.py": "NAMES = {'Late': '.x:Late'}\ndef __getattr__(name): ...\n",
    "engine.py": """
        class Base:
            kind: str = "base"
            def __init__(self, config, *, log=True):
                if config:
                    self.queue = []
            def step(self, number): ...
        class Engine(Base):
            def wake(self, tags=None): ...
    """,
    "outputs.py": """
        from dataclasses import dataclass
        @dataclass
        class Output:
            text: str
            stamp: str | None = None
    """,
    "entrypoints/api_router.py": """
        @router.post("/v1/answers", dependencies=[])
        def answer(): ...
        @router.websocket("/v1/live")
        def live(): ...
        @app.api_route("/odd", methods=["GET", "PUT"])
        def odd(): ...
        app.state.serving_answers = None
        state.other = None
    """,
}
OURS = """
    from vllm.engine import Engine
    from vllm.old import helper
    class Mine(Engine):
        def step(self, number):
            super().step(number)
    helper(1, c=2)
"""
UNANSWERED = """
    @router.post("/v1/answers")
    def answer(): ...
    state.other = 1
"""
KNOWN = Known(
    places={},
    optional=frozenset(),
    routes=frozenset(["POST /v1/answers", "WEBSOCKET /v1/live", "GET /odd", "PUT /odd"]),
    handlers={"/v1/answers": ("serving_answers",)},
    state=frozenset(["other"]),
    made_by_us=frozenset(),
)


@pytest.fixture
def make_tree(tmp_path: Path) -> MakeTree:
    """Make a small vLLM, with some of its files replaced."""

    def make(**replaced: str) -> Tree:
        folder = tmp_path / f"vllm{len(list(tmp_path.iterdir()))}"
        for name, text in {**VLLM, **{f"{key}.py": t for key, t in replaced.items()}}.items():
            path = folder / "vllm" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        return Tree(folder)

    return make


@pytest.fixture
def complaints(tmp_path: Path, make_tree: MakeTree) -> Callable[..., list[str]]:
    """Return the findings for `OURS` on a small vLLM with some of its files replaced."""
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "module.py").write_text(textwrap.dedent(OURS))

    def check(declared: str = "", known: Known = KNOWN, **replaced: str) -> list[str]:
        tree = make_tree(**replaced)
        return [str(p) for p in problems(tree, (1, 0), uses_in(ours, {}), seams(declared), known)]

    return check


@pytest.mark.parametrize(
    "name",
    [
        "vllm.old.helper",
        "vllm.new.moved",
        "vllm.late.Late",
        "vllm.engine.Engine.wake",
        "vllm.engine.Engine.step",
        "vllm.engine.Engine.queue",
        "vllm.engine.Engine.kind",
        "vllm.outputs.Output.stamp",
    ],
)
def test_a_name_is_found_where_python_would_find_it(make_tree: MakeTree, name: str) -> None:
    """A name is found through imports, base classes, `self`, and names that a module loads late."""
    assert make_tree().has(name)


@pytest.mark.parametrize(
    "name", ["vllm.old.other", "vllm.nowhere.helper", "vllm.late.Other", "vllm.engine.Engine.sleep"]
)
def test_a_name_that_is_nowhere_is_not_found(make_tree: MakeTree, name: str) -> None:
    """A missing name is not found, also in a module that loads some names late."""
    assert not make_tree().has(name)


def test_nothing_is_said_of_a_version_that_has_everything(
    complaints: Callable[..., list[str]],
) -> None:
    """A version with all names, signatures, overrides, routes and handlers has no findings."""
    assert [] == complaints("vllm.engine.Engine.queue\nvllm.engine.Engine.wake(tags=)")


@pytest.mark.parametrize(
    ("replaced", "complaint"),
    [
        ({"old": "def renamed(): ..."}, "vllm.old.helper: does not exist (ours/module.py:3)"),
        ({"old": "def helper(a): ..."}, "vllm.old.helper(a): has no parameter c"),
        ({"old": "def helper(a, *, c, d): ..."}, "vllm.old.helper(a, c, d): also needs d"),
        ({"old": "def helper(*, c): ..."}, "takes 0 positional arguments, not 1"),
        ({"engine": "class Engine: ..."}, "vllm.engine.Engine.step: does not exist"),
        (
            {"engine": "class Engine:\n    def step(self, number, deadline): ..."},
            "vllm.engine.Engine.step(number, deadline): ours takes 1 positional arguments, not 2",
        ),
        (
            {"entrypoints/api_router": "@router.get('/v1/new')\ndef new(): ...\nstate.other = 1"},
            "GET /v1/new: is new; add it to",
        ),
        (
            {"entrypoints/api_router": UNANSWERED},
            "/v1/answers: has no handler serving_answers",
        ),
        ({"entrypoints/api_router": ""}, "app.state.other: is never set"),
    ],
)
def test_what_a_version_lacks_is_named(
    complaints: Callable[..., list[str]], replaced: dict[str, str], complaint: str
) -> None:
    """A finding has the name, what is wrong, and where it is used."""
    assert any(complaint in said for said in complaints(**replaced))


ARGUMENTS = """
    import enum
    from dataclasses import dataclass, field
    from typing import Annotated, Any, Literal
    Kind = Literal["a", "b"]
    class Level(enum.IntEnum):
        LOW = 1
    @dataclass
    class Inner:
        number: Annotated[int, "any"] = 1
        {inner}
    @dataclass
    class EngineArgs:
        kind: Kind | None = None
        level: Level = Level.LOW
        levels: "dict[str, list[Level]]" = None
        inner: Inner = None
        known: str = ""
        later: str = field(default="", init=False)
        {outer}
    class AsyncEngineArgs(EngineArgs):
        switch: bool = False
"""


@pytest.mark.parametrize(
    ("outer", "inner", "complaint"),
    [
        ("", "", ""),
        ("worker: str = ''", "", "AsyncEngineArgs.worker: str: is new, and may name code"),
        ("worker: 'Kind | str' = ''", "", "AsyncEngineArgs.worker: Kind | str: is new"),
        ("classes: list[Any] = ()", "", "AsyncEngineArgs.classes: list[Any]: is new"),
        ("free: dict = None", "", "AsyncEngineArgs.free: dict: is new"),
        ("other: Unheard = None", "", "AsyncEngineArgs.other: Unheard: is new"),
        ("", "backend: str = ''", "Inner.backend: str: is new"),
    ],
)
def test_a_setting_that_may_name_code_wants_a_decision(
    make_tree: MakeTree, outer: str, inner: str, complaint: str
) -> None:
    """A setting that may name code needs a decision, in any class; numbers and fixed sets don't."""
    text = ARGUMENTS.format(outer=outer or "pass", inner=inner or "pass")
    text = text.replace("        pass\n", "")
    tree = make_tree(**{"engine/__init__": "", "engine/arg_utils": text})
    known = dataclasses.replace(KNOWN, is_decided=lambda name: name == "known")

    said = [str(p) for p in problems(tree, (1, 0), Uses((), ()), (), known)]

    assert bool(complaint) == len(said)
    assert "".join(said).startswith(complaint)


@pytest.mark.parametrize(
    ("line", "is_new"),
    [
        ("importlib.import_module(name)", True),
        ("import_module(f'.{name}', __name__)", True),
        ("resolve_obj_by_qualname(name)", True),
        ("__import__(name)", True),
        ("pickle.loads(name)", True),
        ("torch.load(name)", True),
        ("torch.load(name, weights_only=False)", True),
        ("exec(name)", True),
        ("importlib.import_module('triton')", False),
        ("torch.load(name, weights_only=True)", False),
        ("re.compile(name)", False),
    ],
)
def test_a_function_that_imports_by_name_wants_a_decision(
    make_tree: MakeTree, line: str, is_new: bool
) -> None:
    """A function that imports by name or unpickles needs a decision, unless the name is fixed."""
    tree = make_tree(old=f"class Loader:\n    def load(self, name):\n        {line}\n")
    known = dataclasses.replace(KNOWN, imports=frozenset(["vllm.old Loader.load"]))

    said = [str(p) for p in problems(tree, (1, 0), Uses((), ()), (), KNOWN)]
    after = list(problems(tree, (1, 0), Uses((), ()), (), known))

    assert is_new == any(s.startswith("vllm.old Loader.load: imports by name") for s in said)
    assert [] == after


def test_settings_that_reach_an_import_are_refused() -> None:
    """Each setting in the table that reaches an import is refused with a class as value."""
    reaching = {setting for setting in decided().values() if setting}
    values = {"kv_connector_extra_config", "media_io_kwargs", "hf_overrides"}

    for setting in reaching:
        *parents, key = setting.split(".")
        value: object = {"any": "evil.Cls"} if key in values else "evil.Cls"
        for parent in reversed([*parents, key]):
            value = {parent: value}
        assert isinstance(value, dict)
        assert list(code_keys(value)), setting
    assert "speculative_config.model" in reaching


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("vllm.engine.Engine.sleep", "vllm.engine.Engine.sleep: does not exist"),
        ("vllm.engine.Engine.wake(level=)", "has no parameter level"),
        ("vllm.engine.Engine.step()", "also needs number"),
        ("vllm.old says aot", "vllm.old: does not mention aot"),
    ],
)
def test_what_is_declared_is_looked_up(
    complaints: Callable[..., list[str]], line: str, complaint: str
) -> None:
    """A declared name that is missing, or is called in another way, is reported."""
    assert any(complaint in said for said in complaints(line))


@pytest.mark.parametrize(
    "line",
    [
        "vllm.engine.Engine.sleep since 1.1",
        "vllm.engine.Engine.sleep until 0.9",
        "vllm.engine|vllm.gone Engine.wake()",
        "vllm.entrypoints.api_router says serving_answers",
    ],
)
def test_a_declared_name_may_belong_to_some_versions_or_places(
    complaints: Callable[..., list[str]], line: str
) -> None:
    """A name declared for some versions or places is not missed in the others."""
    assert [] == complaints(line)


def test_a_declaration_that_cannot_be_read_is_refused() -> None:
    """A declaration that cannot be parsed is refused: it would never be looked up."""
    with pytest.raises(ValueError, match="names no seam: 'what is this"):
        seams("what is this, then?")


def test_routes_and_handlers_are_read_from_decorators_and_assignments(make_tree: MakeTree) -> None:
    """Routes and handlers are read from decorators and assignments, all methods and sockets."""
    tree = make_tree()

    assert KNOWN.routes == routes_in(tree).keys()
    assert {"serving_answers", "other"} == handlers_in(tree)


def test_functions_whose_code_differs_are_told(make_tree: MakeTree) -> None:
    """Functions with different code are reported; a comment or layout makes no difference."""
    old = make_tree()
    same = make_tree(old="def helper(a, b=1, *,\n  c):  # the same\n    ...\n")
    other = make_tree(old="def helper(a, b=2, *, c): ...\n")

    assert [] == list(changed(old, same, ["vllm.old.helper"]))
    assert ["vllm.old.helper"] == list(changed(old, other, ["vllm.old.helper"]))


@pytest.mark.parametrize(
    ("place", "since", "complaints"),
    [
        ("vllm.engine:Engine.kind", "", []),
        ("vllm.engine:Engine.gone", "", ["vllm.engine.Engine.gone: does not exist (declared)"]),
        ("vllm.engine:Engine.gone", "1.1", []),
        ("vllm.engine:Base.kind.*.queue", "", []),
        ("vllm.engine:Base.kind.*.gone", "", ["vllm.engine: does not mention gone (declared)"]),
        ("vllm.gone:*", "", ["vllm.gone: does not exist (declared)"]),
        ("vllm.gone.*:name", "", []),
        ("os:environ[NAME]", "", []),
    ],
)
def test_listed_state_is_looked_up(
    make_tree: MakeTree, place: str, since: str, complaints: list[str]
) -> None:
    """Listed state is looked up: a renamed one would silently not be moved."""
    found = seams_of_state([State(place, Owner.ENGINE, "a reason", since)])

    said = problems(make_tree(), (1, 0), Uses((), ()), found, KNOWN)

    assert complaints == [str(problem) for problem in said]


def test_an_unpacking_that_was_interrupted_is_not_taken_for_complete(tmp_path: Path) -> None:
    """An interrupted unpacking leaves nothing that looks complete."""
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "first")
        archive.writestr("vllm/late.py", "late")
    text = wheel.read_bytes()
    wheel.write_bytes(text.replace(b"late", b"fate", 1).replace(b"late", b"gate"))
    folder = tmp_path / "vllm-9.9.9"
    with pytest.raises(Exception, match=r".*"):
        _unpack(wheel, folder)
    assert [wheel] == list(tmp_path.iterdir())

    wheel.write_bytes(text)
    _unpack(wheel, folder)

    assert [folder] == list(tmp_path.iterdir())
    assert "late" == (folder / "vllm" / "late.py").read_text()


def test_every_declared_name_is_used() -> None:
    """Every declared name is used; unused ones must leave the list."""
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py"))
    names = [seam.names[0].rpartition(".")[2] for seam in seams()]

    assert [] == [name for name in names if name not in text]


def test_vllms_own_names_are_found_in_our_sources() -> None:
    """The reader finds a call, an override and a looked-up name of today in our sources."""
    uses = uses_in(SOURCE, {"build_app": {"0.29": "vllm.entrypoints.launchers.app"}})
    names = {use.name for use in uses.names}

    assert {"vllm.v1.engine.async_llm.AsyncLLM", "build_app"} <= names
    assert "vllm.v1.engine.core.EngineCoreProc.has_work" in {o.name for o in uses.overrides}
    assert all(isinstance(o.node, ast.FunctionDef | ast.AsyncFunctionDef) for o in uses.overrides)


def test_versions_that_are_only_read_are_newer_than_those_that_run() -> None:
    """Versions that are only read are newer than those that run; a run one changes lists."""
    assert not set(READ_ON) & set(RUN_ON)
    assert READ_ON > RUN_ON[-1:]


def test_a_folder_without_vllm_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without vLLM is an error in one line, with an exit status of its own."""
    assert 2 == command.main(["9.9.9", "--sources", str(tmp_path)])
    assert f"check-vllm: error: there is no folder 'vllm' in {tmp_path}" in capsys.readouterr().err


def test_sources_that_were_unpacked_before_are_read_again(tmp_path: Path) -> None:
    """Sources that were unpacked before are read again without the network."""
    folder = tmp_path / "vllm-9.9.9" / "vllm"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()

    assert tmp_path / "vllm-9.9.9" == sources_of("9.9.9", tmp_path)


def test_a_version_that_cannot_be_had_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unavailable version is an error that says what to name instead."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(NoSources, match=r"no wheel of vllm 9\.9\.9.*--sources DIR"):
        sources_of("9.9.9", tmp_path / "cache")
