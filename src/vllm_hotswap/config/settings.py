"""Every setting of this project, once: its key, type, default and meaning.

The YAML file, the JSON schema, flags, environment variables and the reference page are all made
from this module. Settings of vLLM are not listed: they are read from vLLM's own parser.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass as plain_dataclass, field, fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, SecretStr
from pydantic.dataclasses import dataclass

from vllm_hotswap import states
from vllm_hotswap.access import Sharing
from vllm_hotswap.config.sampling import SamplingPolicy
from vllm_hotswap.config.sizes import ByteSize, MemoryBudget

STRICT = ConfigDict(extra="forbid", strict=True)

ALL = "all"
"""Stands for a list of all aliases."""

LoadWhen = Literal["startup", "on_demand"]
DrainAction = states.DrainAction
SwitchingMode = Literal["manual", "auto"]


@plain_dataclass(frozen=True, slots=True)
class Expected:
    """What a value must be, for the error that refuses it: `it must be ...`."""

    text: str


@plain_dataclass(frozen=True, slots=True)
class Secret:
    """Marks a field whose value must not be in any message."""


SECRET = Secret()

Text = Annotated[str, Field(pattern=r"\S")]
Seconds = Annotated[float, Field(ge=0, lt=1e9, allow_inf_nan=False)]
SecondsAboveZero = Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]

Count = Annotated[int, Field(ge=0, lt=10**9)]
CountAboveZero = Annotated[int, Field(gt=0, lt=10**9)]
Priority = Annotated[int, Field(ge=-100, le=100)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
PerSecond = Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]

AT_LEAST_ZERO = Expected("a number of at least 0")
ABOVE_ZERO = Expected("a number above 0")
SHARE = Expected("a number above 0, and 1 at most")
PER_MINUTE = Expected("a whole number of at least 0, or null")
PRIORITY = Expected("a whole number from -100 to 100")
SIZE = Expected("bytes, or a size such as 64MiB")
IDLE = Expected("a number of seconds above 0, or null")
NAMES = Expected("a list of names")


@dataclass(frozen=True, slots=True, config=STRICT)
class SwitchingConfig:
    """The `switching` section."""

    mode: Annotated[
        SwitchingMode,
        Expected("manual or auto"),
        Field(
            description="`manual`: only the active model is served, until an admin switches. "
            "`auto`: requests for all models are accepted, and the server switches by "
            "`policy`"
        ),
    ] = "manual"
    policy: Annotated[
        Text,
        Expected("the name of a policy"),
        Field(
            description="when to switch in the mode `auto`: `batch`, `fifo`, `round_robin`, or one "
            "that an installed package adds"
        ),
    ] = "batch"
    max_wait: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(
            description="auto: seconds after which a waiting request is due. Its model is next, "
            "whatever the policy says"
        ),
    ] = 30.0
    min_active: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(
            description="`batch`: minimum seconds that a model stays active, unless a request "
            "is due"
        ),
    ] = 0.0
    slice: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(description="`round_robin`: seconds that a model of weight 1 stays active"),
    ] = 2.0
    drain_timeout: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(
            description="seconds that a switch waits for running requests, unless the request "
            "gives a value"
        ),
    ] = 60.0
    on_drain_timeout: Annotated[
        DrainAction,
        Expected("abort, park or refuse"),
        Field(
            description="what happens to requests still running then, unless the request gives "
            "a value: `abort` ends them with an error, `park` freezes them until their "
            "model "
            "is active again, `refuse` cancels the switch"
        ),
    ] = "abort"
    max_parked: Annotated[
        Count,
        AT_LEAST_ZERO,
        Field(description="requests of one model that may be parked; others are aborted"),
    ] = 1024
    parked_timeout: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(
            description="seconds that a request may stay parked; then it is aborted with an error"
        ),
    ] = 600.0
    max_waiting: Annotated[
        Count,
        AT_LEAST_ZERO,
        Field(description="requests that may be held for the target of a switch; more get 429"),
    ] = 1024
    wait_timeout: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(description="seconds that a request may wait; then it gets 504"),
    ] = 600.0
    verify: Annotated[
        bool,
        Expected("true or false"),
        Field(
            description="whether a model that was loaded or woken is checked before it is "
            "served: it generates a canary token, which must equal that of its first load"
        ),
    ] = True
    predict: Annotated[
        bool,
        Expected("true or false"),
        Field(
            description="whether the model that is likely to be next is prepared: its files are "
            "read ahead into spare `memory.host`, or, on CUDA, it is woken early"
        ),
    ] = True
    return_to_default: Annotated[
        SecondsAboveZero | None,
        IDLE,
        Field(
            description="seconds without a request and without a job lease after which the server "
            "switches back to the default model"
        ),
    ] = None
    max_lease: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(description="seconds that a job lease may last; it can be renewed"),
    ] = 3600.0
    rate: Annotated[
        PerSecond,
        ABOVE_ZERO,
        Field(description="sustained switches per second; additional requests get 429"),
    ] = 20.0
    burst: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(description="switches allowed in one burst, before `rate` applies"),
    ] = 2000


@dataclass(frozen=True, slots=True, config=STRICT)
class LimitsConfig:
    """The `limits` section."""

    body_bytes: Annotated[
        ByteSize, SIZE, Field(description="size of a request's body; a longer one gets 413")
    ] = 64 << 20
    body_values: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="values in a JSON body, counted by commas and opening brackets. More "
            "get 413, because vLLM answers no other request while it parses a body"
        ),
    ] = 1_000_000
    held_bytes: Annotated[
        ByteSize,
        SIZE,
        Field(
            description="bytes that all requests together may hold, from the first byte of a "
            "body to the end of its response. While a body is read, what has arrived of it "
            "counts. Then JSON counts twice, or four times where its texts are not ASCII or "
            "are escaped (`\\u`), plus 160 bytes for each value. A request beyond it gets "
            "429"
        ),
    ] = 1 << 30
    held_share: Annotated[
        Share,
        SHARE,
        Field(
            description="share of `held_bytes` that one caller may hold, where keys are "
            "required. A caller is a group of `rights`, or a key outside of them. The more "
            "others hold, the less one may hold, so that some is always left. Admins may "
            "hold all of it"
        ),
    ] = 0.5
    engine_share: Annotated[
        Share,
        SHARE,
        Field(
            description="share of an engine's places (`max_num_seqs`), and of what two of its "
            "steps take (`max_num_batched_tokens`), that one caller's requests may have while "
            "others use the model, where keys are required. Its other requests wait in front of "
            "the engine, taking turns with other callers. A caller that was alone for a minute "
            "may have all. Admins never wait. 1: first come, first served, as in vLLM"
        ),
    ] = 0.5
    body_timeout: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(description="seconds within which a request's body must arrive; then it gets 408"),
    ] = 300.0
    body_rate: Annotated[
        ByteSize,
        SIZE,
        Field(
            description="minimum bytes per second at which a body must arrive, in every 20 "
            "seconds, after its first 64 KiB; a slower one gets 408"
        ),
    ] = 4 << 10
    in_flight: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="requests that one model may have in flight; each prompt, item and "
            "choice of a request counts. More get 429"
        ),
    ] = 65_536
    requests_per_call: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="engine requests that one request may become: its prompts, items, "
            "documents or conversations times `n`; more get 413"
        ),
    ] = 2048
    answers_per_call: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="engine requests that one generating request may become: vLLM writes all "
            "of their responses at once, and serves no other request while it does"
        ),
    ] = 1024
    grammar_bytes: Annotated[
        ByteSize,
        SIZE,
        Field(
            description="size of the schemas, choices and grammars of a request, including "
            "tools that are strict or must be called; more get 413"
        ),
    ] = 64 << 10
    grammar_values: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="what those may contain: properties, members of lists, alternatives, a "
            "tenth of what `minItems`, `maxItems`, `minLength`, `maxLength`, `minProperties` and "
            "`maxProperties` ask for, and the largest repetition (`{m,n}`) in each regular "
            "expression or grammar. Regular expressions in a grammar weigh ten each, and more "
            "where several must match one text (`allOf`). More get 413"
        ),
    ] = 2000
    grammar_timeout: Annotated[
        SecondsAboveZero | None,
        IDLE,
        Field(
            description="seconds within which vLLM must check a request with one of those, and "
            "again from when an engine gets it to its first token. Then it gets 504; a "
            "compilation that has not started does not start. null: no limit"
        ),
    ] = 300.0
    grammar_memory: Annotated[
        ByteSize,
        SIZE,
        Field(
            description="memory that compiling one of those may take, unless it is plain; more "
            "get 413"
        ),
    ] = 512 << 20
    grammar_seconds: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(
            description="CPU seconds that compiling one of those may take, unless it is plain; "
            "more get 413"
        ),
    ] = 60.0
    requests_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(
            description="requests per minute for each key, however many prompts each has; more "
            "get 429. 0: any number; null: any number on loopback, 30000 elsewhere. A number "
            "also applies to callers without a key, to all of them together"
        ),
    ] = None
    tokens_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(
            description="tokens of prompts and answers per minute for each user key, counted "
            "when a request ends; null: any number on loopback, 6000000 elsewhere"
        ),
    ] = None
    switches_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(
            description="switches per minute for each user key: requests to move models, and, in "
            "the mode `auto`, requests that are the first to wait for a model; null: any "
            "number on loopback, 60 elsewhere"
        ),
    ] = None
    kept_responses: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="responses of the Responses API that are kept, where they are stored; "
            "the oldest are dropped"
        ),
    ] = 10_000
    client_timeout: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(
            description="seconds without progress after which a client that does not read is "
            "disconnected and its request aborted; at most twice as long"
        ),
    ] = 60.0
    head_bytes: Annotated[
        ByteSize,
        SIZE,
        Field(
            description="size of a request's head, its first line and header fields; a larger one "
            "gets 431"
        ),
    ] = 64 << 10
    head_fields: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(description="number of header fields of a request; more get 431"),
    ] = 256
    url_bytes: Annotated[
        ByteSize,
        SIZE,
        Field(description="length of a request's URL, query included; a longer one gets 414"),
    ] = 16 << 10
    head_timeout: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(
            description="seconds within which a head must arrive, counted from the connection "
            "or from the head's first byte; then it gets 408"
        ),
    ] = 30.0
    connections: Annotated[
        CountAboveZero | None,
        Expected("a whole number above 0, or null"),
        Field(
            description="simultaneous connections; null: what the limit of open files leaves. "
            "When all are busy, new ones get 503, except health checks and admins"
        ),
    ] = None
    connections_per_address: Annotated[
        CountAboveZero | None,
        Expected("a whole number above 0, or null"),
        Field(
            description="simultaneous connections from one client address (IPv6: from one /64 "
            "network); null: half of all. A proxy named by `--forwarded-allow-ips`, and a "
            "Unix domain socket, may use all"
        ),
    ] = None
    refusals_per_second: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="refusals (4xx) per second that a client address, or a known key, gets "
            "without delay, and three times as many in one burst. Additional ones are "
            "delayed, by at most 5 seconds. Behind a proxy, name the proxy with "
            "`--forwarded-allow-ips`"
        ),
    ] = 10


@dataclass(frozen=True, slots=True, config=STRICT)
class IsolationConfig:
    """The `isolation` section."""

    prefix_cache: Annotated[
        Sharing | None,
        Expected("shared, group or key, or null"),
        Field(
            description="which callers share a model's prefix cache. `shared`: all; a caller "
            "can then find out, from response times and cache metrics, whether another one "
            "has sent the same beginning of a prompt. `group`: the keys of one group of "
            "`rights`; keys in no group form one, admins another. `key`: each key alone. "
            "null: `group` where `rights` has groups with keys, else `shared`"
        ),
    ] = None
    observers: Annotated[
        Literal["users", "admins"],
        Expected("users or admins"),
        Field(
            description="who may read `/metrics`, `/admin/status`, `/admin/events` and "
            "`/admin/leases`. They show the models, tokens and times of all requests, but "
            "no text"
        ),
    ] = "users"


@dataclass(frozen=True, slots=True, config=STRICT)
class RecoveryConfig:
    """The `recovery` section."""

    max_restarts: Annotated[
        Count,
        AT_LEAST_ZERO,
        Field(
            description="restarts of the engine host allowed within `restart_window`; at the "
            "next death the server exits with status 1"
        ),
    ] = 5
    restart_window: Annotated[
        SecondsAboveZero, ABOVE_ZERO, Field(description="seconds in which restarts are counted")
    ] = 600.0
    max_backoff: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(description="maximum seconds between two attempts to recover"),
    ] = 60.0
    hang_timeout: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(
            description="seconds without a sign of life after which the engine host is killed "
            "and restarted"
        ),
    ] = 30.0
    step_timeout: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(
            description="seconds that one step of an engine may take; "
            "then the engine host is killed and restarted"
        ),
    ] = 600.0
    load_timeout: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(
            description="seconds that the load of a model, or the start of the engine host, may "
            "take; then the engine host is killed and restarted"
        ),
    ] = 1800.0
    command_timeout: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(
            description="seconds that any other command to an engine may take; then the engine "
            "host is killed and restarted"
        ),
    ] = 300.0


def _folders(value: object) -> object:
    return tuple(value.split(os.pathsep)) if isinstance(value, str) else value


@dataclass(frozen=True, slots=True, config=STRICT)
class AdapterConfig:
    """The `adapters` section."""

    folders: Annotated[
        tuple[Text, ...],
        BeforeValidator(_folders),
        Field(
            strict=False,
            description="folders, relative to the file, below which adapters may be that are "
            "added while the server runs; default: none, so no adapter can be added",
        ),
        Expected("a list of folders"),
    ] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelKeys:
    """The keys of a model, and of `defaults`, that are ours. Every other one is vLLM's."""

    model: Annotated[
        Text,
        Expected("a folder or a model hub's name"),
        Field(
            description="a folder with a checkpoint (Hugging Face's or Mistral's format) or a GGUF "
            "file, absolute or relative to the file; or a model hub's name"
        ),
    ]
    aliases: Annotated[
        tuple[Text, ...],
        Field(strict=False, description="additional names that clients may use for this model"),
        NAMES,
    ] = ()
    load: Annotated[
        LoadWhen,
        Expected("startup or on_demand"),
        Field(
            description="`startup`: loaded before the server accepts requests. `on_demand`: "
            "loaded by its first switch"
        ),
    ] = "startup"
    pinned: Annotated[
        bool,
        Expected("true or false"),
        Field(description="whether it is never moved down to make room for another model"),
    ] = False
    idle_sleep: Annotated[
        SecondsAboveZero | None,
        IDLE,
        Field(
            description="seconds without a request after which it sleeps, once it is not "
            "active; in the mode `auto` also while it is active, if no requests are pending"
        ),
    ] = None
    idle_unload: Annotated[
        SecondsAboveZero | None,
        IDLE,
        Field(description="seconds without a request after which it is unloaded, in the same way"),
    ] = None
    priority: Annotated[
        Priority,
        PRIORITY,
        Field(description="auto: models with a higher priority are served first"),
    ] = 0
    max_wait: Annotated[
        Seconds | None,
        Expected("a number of at least 0, or null"),
        Field(description="auto: `switching.max_wait` for this model; null: the value given there"),
    ] = None
    weight: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(description="auto: the model's share of time, compared with those of others"),
    ] = 1.0
    quant_config: Annotated[
        Text | None,
        Expected("the path of a file, or null"),
        Field(
            description="file for the variable `QUANT_CONFIG` while the model is loaded and active "
            "(absolute or relative to the YAML file); `null` clears the variable; left out, the "
            "variable is what it was when the server started"
        ),
    ] = None
    sampling: Annotated[
        SamplingPolicy,
        Field(description="what happens to sampling parameters of requests"),
    ] = Field(default_factory=SamplingPolicy)


def _all_or_names(value: object) -> object:
    if value == ALL:
        return value
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError("it must be all, or a list of aliases")


@dataclass(frozen=True, slots=True, config=STRICT)
class GroupConfig:
    """A group of keys under `rights`."""

    keys: Annotated[
        tuple[SecretStr, ...],
        SECRET,
        Expected("a list of texts"),
        Field(
            strict=False,
            description="its user keys; `${NAME}` keeps them out of the file; the group "
            "`default` has no keys",
        ),
    ] = field(default=(), repr=False)
    key_file: Annotated[
        Text | None,
        SECRET,
        Expected("the path of a file, or null"),
        Field(
            description="a file with more keys, one per line (absolute or relative to the YAML "
            "file); reloaded on SIGHUP"
        ),
    ] = None
    switch_to: Annotated[
        Literal["all"] | tuple[str, ...],
        BeforeValidator(_all_or_names),
        Field(
            description="auto: models to which its requests may trigger a switch: `all`, or a "
            "list of aliases, which may be empty",
        ),
    ] = "all"
    max_priority: Annotated[
        Priority,
        PRIORITY,
        Field(
            description="auto: the highest priority that its requests can get with "
            "`x-hotswap-priority`, unless their model's own is higher"
        ),
    ] = 0
    min_max_wait: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(description="auto: the shortest time, in seconds, that `x-hotswap-max-wait` can set"),
    ] = 5.0
    requests_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(
            description="`limits.requests_per_minute` for each of its keys; null: the value "
            "given there"
        ),
    ] = None
    tokens_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(
            description="`limits.tokens_per_minute` for each of its keys; null: the value given "
            "there"
        ),
    ] = None
    switches_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(
            description="`limits.switches_per_minute` for each of its keys; null: the value "
            "given there"
        ),
    ] = None


SECTIONS: Mapping[str, type[Any]] = {
    "switching": SwitchingConfig,
    "limits": LimitsConfig,
    "isolation": IsolationConfig,
    "recovery": RecoveryConfig,
    "memory": MemoryBudget,
    "adapters": AdapterConfig,
}
"""Settings of the whole server, by section. Each may also be given as a flag or a variable."""

TOP_LEVEL: Mapping[str, str] = {
    "default_model": "the alias that is active after the start; default: the first one",
    "defaults": "keys of a model (except `model` and `aliases`) that apply to all models",
    "models": "the models: a mapping of alias to keys",
    "switching": "how switches work",
    "limits": "what requests and clients may use",
    "isolation": "what keys may learn about each other's requests",
    "recovery": "what happens when engines or the engine host fail",
    "memory": "the memory that all models together may use",
    "adapters": "adapters that are added while the server runs",
    "rights": "who may trigger which switch: a mapping of group names to keys and rights; "
    "`default` is for all other callers",
}


@plain_dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a section, with the three ways to give it."""

    section: str
    key: str
    description: str

    @property
    def flag(self) -> str:
        return "--" + "-".join(filter(None, (self.section, self.key))).replace("_", "-")

    @property
    def variable(self) -> str:
        return "VLLM_HOTSWAP_" + "_".join(filter(None, (self.section, self.key))).upper()


def server_settings() -> Iterator[Setting]:
    """Yield the settings that may also be given as a flag or an environment variable."""
    yield Setting("", "default_model", TOP_LEVEL["default_model"])
    for section, kind in SECTIONS.items():
        for item in fields(kind):
            yield Setting(section, item.name, describe(kind, item.name))


def describe(kind: type[Any], name: str) -> str:
    """Return what the field means."""
    description: str = kind.__pydantic_fields__[name].description or ""
    return description


def expected_text(kind: type[Any], name: str) -> str | None:
    """Return what the value of a field must be, in our own words if there are any."""
    metadata = kind.__pydantic_fields__[name].metadata
    return next((item.text for item in metadata if isinstance(item, Expected)), None)


def is_secret(kind: type[Any], name: str) -> bool:
    return SECRET in kind.__pydantic_fields__[name].metadata


@plain_dataclass(frozen=True, slots=True)
class Override:
    """A setting given as a flag or as an environment variable."""

    section: str
    key: str
    value: str = field(repr=False)
    origin: str
    """The flag or variable it came from, for messages."""


def overrides(environment: Mapping[str, str], flags: Mapping[str, str | None]) -> list[Override]:
    """Return what variables and flags set, flags last, so that they win.

    Args:
        environment: all variables; an empty one counts as not set.
        flags: values by flag; None for one that was not given.
    """
    settings = list(server_settings())
    variables = [(s, environment.get(s.variable) or None, s.variable) for s in settings]
    return [
        Override(setting.section, setting.key, value, origin)
        for setting, value, origin in [
            *variables,
            *((s, flags.get(s.flag), s.flag) for s in settings),
        ]
        if value is not None
    ]


CONFIG_VARIABLES = ("VLLM_HOTSWAP_CONFIG", "VLLM_HPU_MULTI_MODEL_CONFIG")
"""Environment variables that may name the YAML file; the first one set wins."""

FORWARDED_VARIABLE = "FORWARDED_ALLOW_IPS"

VARIABLES: Mapping[str, str] = {
    CONFIG_VARIABLES[0]: "the YAML file, for the quickstart's start",
    CONFIG_VARIABLES[1]: "the same, as the quickstart names it",
    "VLLM_SERVER_DEV_MODE": "`1` opens our routes that change state to callers without "
    "an admin key, and none of vLLM's",
    "VLLM_HOTSWAP_ALLOW": "what `--allow` accepts; the flag adds to it",
    "VLLM_HOTSWAP_ADMIN_KEY": "admin keys, separated by commas or spaces; "
    "`--admin-key` overrides it",
    "VLLM_HOTSWAP_ADMIN_KEY_FILE": "a file with admin keys; `--admin-key-file` overrides it",
    "VLLM_HOTSWAP_API_KEY_FILE": "a file with user keys; `--api-key-file` overrides it",
    "VLLM_HOTSWAP_PASS_ON": "comma-separated names of additional variables to pass on to "
    "the engine host ([configuration](../guides/configuration.md#the-engine-hosts-"
    "environment))",
    "VLLM_HOTSWAP_AUDIT_LOG": "a file that gets one line for each request that changes state; "
    "`--audit-log` overrides it",
    "VLLM_HOTSWAP_CUDA_SLEEP": "`0`: on CUDA, models use torch's own memory, and are parked or "
    "unloaded ([NVIDIA GPUs](../guides/gpu.md#without-sleep))",
    "VLLM_HOTSWAP_URL": "the server that `vllm-hotswap status` and the other commands point at",
    "VLLM_API_KEY": "user keys, separated by commas or spaces; `--api-key` overrides it",
    FORWARDED_VARIABLE: "uvicorn's: proxies that are trusted to name the client of a request; "
    "`--forwarded-allow-ips` overrides it",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "accepted, not needed, not passed on",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "accepted, not needed, not passed on; see `adapters`",
    "VLLM_HOTSWAP_FAILPOINTS": "for tests: where the server should fail; see "
    "[reliability](../internals/reliability.md#failpoints)",
    "QUANT_CONFIG": "kept for models without `quant_config`, replaced or cleared for those with it",
    "VLLM_CPU_OMP_THREADS_BIND": "CPU: cores of the compute threads, as in vLLM. Here `auto` uses "
    "every physical core of a NUMA node; vLLM keeps one for its scheduler process, which does not "
    "exist here",
}
"""Environment variables that this project reads, besides those of `server_settings`."""
