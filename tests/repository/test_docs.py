"""The pages describe all that the code offers, and the code has all that the pages promise."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.remote_server import listening_server
from tests.helpers.support import Server
from tools import reference
from vllm_hotswap import errors, failpoints
from vllm_hotswap.cli import remote
from vllm_hotswap.cli.main import make_parser
from vllm_hotswap.config.reader import load_config
from vllm_hotswap.demo import quickstart as demo
from vllm_hotswap.demo.quickstart import write
from vllm_hotswap.states import REQUEST_TRANSITIONS, TRANSITIONS, Residency, Step, SwitchPhase
from vllm_hotswap.telemetry.metrics import COUNTERS, HISTOGRAMS, MODEL_GAUGES, SERVER_GAUGES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text()


def subclasses(kind: type[errors.HotswapError]) -> list[type[errors.HotswapError]]:
    return [kind, *(sub for child in kind.__subclasses__() for sub in subclasses(child))]


@pytest.mark.parametrize("kind", [e for e in subclasses(errors.HotswapError) if e.status != 500])
def test_every_error_that_a_client_may_get_is_in_the_table(
    kind: type[errors.HotswapError],
) -> None:
    """Every error that a client may get is in the table, with its status and its code."""
    assert f"| {kind.status} `{kind.code}` |" in page("reference/errors.md")


def test_troubleshooting_names_errors_and_events_that_exist() -> None:
    """Troubleshooting names error codes with their status, and events that the log has."""
    text = page("guides/troubleshooting.md")
    named = set(re.findall(r"\b(\d{3}) `(\w+)`", text))
    events = set(re.findall(r"`(event=\w+)`", text))
    code = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))

    assert len(named) > 20
    assert named <= {(str(e.status), e.code) for e in subclasses(errors.HotswapError)}
    assert events
    assert {event for event in events if event not in code} == set()


def test_the_table_of_errors_is_in_order() -> None:
    """The table of errors is sorted by status, then by code."""
    rows = re.findall(r"^\| (\d{3}) `(\w+)` \|", page("reference/errors.md"), re.MULTILINE)

    assert len(rows) > 40
    assert sorted(rows) == rows


def test_the_reference_is_the_one_of_the_code() -> None:
    """The reference has all settings, flags, variables and commands; `make reference` writes it."""
    assert reference.page() == page("reference/settings.md")
    assert reference.commands_page() == page("reference/cli.md")


def test_the_table_of_vllms_state_is_the_one_of_the_code() -> None:
    """The table has all places with owners and reasons; `make reference` writes it."""
    text = page("internals/vllm-state.md")
    assert reference.with_state_table(text) == text


def test_every_setting_has_a_meaning() -> None:
    """Every row of a setting, a flag or an argument in the reference has a meaning."""
    for name in ("reference/settings.md", "reference/cli.md"):
        assert [] == re.findall(r"^\|.*\| *\|$", page(name), re.MULTILINE)


def test_every_metric_is_described() -> None:
    """Every metric is described by its exposed name."""
    text = page("reference/metrics.md")
    names = [metric.name for metric in (*HISTOGRAMS, *SERVER_GAUGES, *MODEL_GAUGES)]
    for name in (*names, *(f"{metric.name}_total" for metric in COUNTERS)):
        assert f"`{name}`" in text


def test_every_phase_is_described() -> None:
    """Every phase is described in the design."""
    text = page("internals/design.md")
    for word in SwitchPhase:
        assert f"| `{word}` |" in text


def test_every_failpoint_is_described() -> None:
    """Every failpoint is described with all its actions."""
    text = page("internals/reliability.md")
    assert [] == [p for p in failpoints.PLACES if f"`{p}`" not in text]
    assert [] == [a for a in failpoints.ACTIONS if not re.search(rf"`{a}[`(]", text)]


def test_every_state_is_described() -> None:
    """Every state is described in the guide to memory and residency."""
    text = page("guides/memory.md")
    for word in Residency:
        assert f"| `{word}` |" in text


def test_the_table_of_steps_is_the_one_of_the_code() -> None:
    """The table has every step of every state, and no other; `fail` has a line of its own."""
    lines = re.findall(r"^\| `(\w+)` \| (`.*) \|$", page("internals/residency.md"), re.MULTILINE)
    written = {state: set(re.findall(r"`(\w+)`: (\w+)", steps)) for state, steps in lines}

    assert written == {
        state.value: {(step.value, to.value) for step, to in steps.items() if step != "fail"}
        for state, steps in TRANSITIONS.items()
    }
    assert all(Step.FAIL in TRANSITIONS[state] for state in Residency if state != "failed")


def test_the_table_of_requests_is_the_one_of_the_code() -> None:
    """The design page has every step of every state of a request, and no other."""
    lines = re.findall(r"^\| `(\w+)` \| (`\w+`: .*) \|$", page("internals/design.md"), re.MULTILINE)
    written = {state: dict(re.findall(r"`(\w+)`: (\w+)", steps)) for state, steps in lines}

    assert written == {
        state.value: {step.value: to.value for step, to in steps.items()}
        for state, steps in REQUEST_TRANSITIONS.items()
    }


@pytest.mark.parametrize("name", ["README.md", "docs/guides/install.md", "docs/guides/gaudi.md"])
def test_the_configuration_of_the_readme_is_the_one_of_the_quickstart(
    tmp_path: Path, name: str
) -> None:
    """The configuration on each of these pages is accepted as it stands."""
    example = re.search(r"```yaml\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
    assert example is not None
    path = tmp_path / "models.yaml"
    path.write_text(example.group(1))

    assert ("llama", "qwen") == load_config(path).aliases


def test_the_demo_writes_a_configuration_that_is_accepted(tmp_path: Path) -> None:
    """The demo's configuration has three aliases, llama as default, and models beside the file."""
    config = load_config(write(tmp_path / "demo"))

    assert ("llama", ("llama", "qwen", "embed")) == (config.default_model, config.aliases)
    assert all(model.is_folder for model in config.models)


def curl_lines(text: str) -> list[str]:
    """Return the commands in a page's code blocks that call a server, without output filters."""
    blocks = "\n".join(re.findall(r"```(?:\w*)\n(.*?)```", text, re.DOTALL))
    found = re.findall(r"^(?:\$ )?(curl (?:\\\n|'[^']*'|[^'\n])*)", blocks, re.MULTILINE)
    return [line.partition(" | jq")[0] for line in found]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize(("path", "count"), [("README.md", 2), ("docs/guides/gaudi.md", 4)])
def test_calls_in_the_pages_work_as_they_are(path: str, count: int) -> None:
    """Calls in the pages work, with only the address replaced."""
    lines = curl_lines((ROOT / path).read_text())
    assert count == len(lines)
    with listening_server() as running:
        for line in lines:
            command = re.sub(r"(http://)?localhost:\d+", running.url, line)
            ran = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=True)
            assert "error" not in json.loads(ran.stdout), command


def mentioned() -> set[str]:
    """Return our commands that pages and messages mention, with each alternative apart."""
    paths = [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "src").rglob("*.py")]
    texts = [re.findall(r"`vllm-hotswap ([a-z][^`\n]*)`", path.read_text()) for path in paths]
    lines = {line for found in texts for line in found}
    return {
        f"{name}{rest}"
        for line in lines
        for names, rest in re.findall(r"^([a-z|]+)(.*)$", line)
        for name in names.split("|")
    }


def test_every_command_that_is_mentioned_exists() -> None:
    """Every mentioned command exists, with every flag that is mentioned with it."""
    lines = sorted(mentioned())
    assert len(lines) > 20
    for line in lines:
        name, *words = line.replace("[", "").replace("]", "").split()
        parser = make_parser(name)
        (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        flags = {word for word in words if word.startswith("--")}
        assert flags <= set(commands.choices[name]._option_string_actions), line


def test_there_is_one_port() -> None:
    """All pages name one port, except where they quote the quickstart or need a second one."""
    names = ("gaudi", "quickstart", "troubleshooting")
    quoting = {DOCS / "guides" / f"{name}.md" for name in names}
    pages = {ROOT / "README.md", ROOT / "Makefile", *DOCS.rglob("*.md")} - quoting
    address = r"(?:localhost:|127\.0\.0\.1:|--port |PORT=|PORT \?= )(\d+)"
    named = {port for path in pages for port in re.findall(address, path.read_text())}

    assert {str(demo.PORT)} == named - {"0"}  # which is any free port
    assert remote.DEFAULT_URL.endswith(f":{demo.PORT}")


TEST = r"`(tests/[\w/]+\.py)::(test_\w+)`"


@pytest.mark.parametrize(
    ("path", "name"),
    sorted(
        {
            test
            for path in (
                DOCS / "guides" / "quickstart.md",
                DOCS / "internals" / "fault-matrix.md",
                DOCS / "internals" / "reliability.md",
                DOCS / "internals" / "security-claims.md",
            )
            for test in re.findall(TEST, path.read_text())
        },
    ),
)
def test_what_is_promised_is_held_by_tests_that_exist(path: str, name: str) -> None:
    """Every test that the pages name exists."""
    assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_every_promise_of_the_quickstart_names_its_test() -> None:
    """Every promise of the quickstart names its test, except those listed as not promised."""
    rows = re.findall(
        r"^\| (?!promise|---)(.*?) \| (.*) \|$", page("guides/quickstart.md"), re.MULTILINE
    )

    assert len(rows) > 20
    assert [] == [promise for promise, held in rows if not re.search(TEST, held)]


def test_every_claim_about_security_names_its_tests() -> None:
    """Every claim about security names its tests, in the order of the page."""
    claims = (ROOT / "SECURITY.md").read_text()
    table = page("internals/security-claims.md")
    rows = re.findall(r"^\| (?!claim|---)(.*?) \| (.*) \|$", table, re.MULTILINE)

    assert re.findall(r"^- \*\*(.*?)\.?\*\*", claims, re.MULTILINE) == [row[0] for row in rows]
    assert [] == [claim for claim, held in rows if not re.search(TEST, held)]


def test_every_fault_of_the_matrix_is_shown_by_a_test() -> None:
    """Every fault has a test, or a reason; most tests use the real vLLM, or kill a process."""
    rows = [line.split(" | ") for line in page("internals/fault-matrix.md").splitlines()]
    faults = [row for row in rows if re.fullmatch(r"\| \d+", row[0])]

    assert [f"| {number}" for number in range(1, 61)] == [row[0] for row in faults]
    assert [] == [
        row[0]
        for row in faults
        if not re.search(TEST, row[-1]) and not row[3].startswith("does not apply: ")
    ]
    assert 50 <= sum(bool({"V", "P"} & set(row[5].split(", "))) for row in faults)


@pytest.mark.parametrize("path", sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")]))
def test_links_between_pages_lead_somewhere(path: Path) -> None:
    """Relative links between pages lead to existing files."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())

    assert [] == [link for link in links if not (path.parent / link).exists()]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, by GitHub's rules."""
    text = re.sub(r"^( *)```.*?^\1```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?)(?: +#+)? *$", text, re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


@pytest.mark.parametrize("path", sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")]))
def test_links_lead_to_headings_that_exist(path: Path) -> None:
    """Every `#anchor` of a relative link is that of a heading on the page that it names."""
    links = re.findall(r"\]\(([^)#:]*)#([^)]+)\)", path.read_text())

    assert [] == [
        f"{name}#{anchor}"
        for name, anchor in links
        if anchor not in anchors(path.parent / name if name else path)
    ]


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    """Case, signs, code, links and repeated headings become anchors as GitHub makes them."""
    path = tmp_path / "page.md"
    path.write_text(
        "# A switch, by where it was\n## `POST /v1/models/switch`\n## Rates\n### Rates\n"
        "## The [guide](a.md)'s `x_y`\n```\n# no heading\n```\n"
    )

    assert anchors(path) == {
        "a-switch-by-where-it-was",
        "post-v1modelsswitch",
        "rates",
        "rates-1",
        "the-guides-x_y",
    }


async def test_the_table_of_routes_is_the_one_of_the_code(server: Server) -> None:
    """The index has every route of ours and no other, each with its role and a page about it."""
    description = (await server.get("/admin/openapi.json")).json()
    rows = re.findall(
        r"^\| (`[A-Z]+ /.*?`) \| (\w+) \| .*? \| (.*?) ?\|$",
        page("reference/http-api.md").partition("## vLLM's routes")[0],
        re.MULTILINE,
    )
    listed = {
        (method.lower(), path, role)
        for routes, role, _ in rows
        for method, path in re.findall(r"`([A-Z]+) (/[^`]*)`", routes)
    }

    assert listed == {
        (method, path, operation["tags"][0])
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    }


def test_every_variable_of_ours_is_in_the_reference() -> None:
    """Every variable with our prefix that the code reads is in the reference."""
    read = {
        name
        for path in (ROOT / "src").rglob("*.py")
        for name in re.findall(r"\"(VLLM_HOTSWAP_[A-Z_]*[A-Z])\"", path.read_text())
    }

    assert set() == {name for name in read if f"`{name}`" not in page("reference/settings.md")}
