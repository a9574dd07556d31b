"""Every setting of this project, once: its key, type, default and meaning.

The YAML file, the JSON schema, flags, environment variables and the reference page are all made
from what stands here. Settings of vLLM are not listed: they are taken from vLLM's own parser.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass as plain_dataclass, field, fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, SecretStr
from pydantic.dataclasses import dataclass

from vllm_hotswap import states
from vllm_hotswap.budget import ByteSize, MemoryBudget
from vllm_hotswap.sampling import SamplingPolicy

STRICT = ConfigDict(extra="forbid", strict=True)

ALL = "all"
"""In the place of a list of aliases."""

LoadWhen = Literal["startup", "on_demand"]
DrainPolicy = states.DrainPolicy
SwitchingMode = Literal["manual", "auto"]


@plain_dataclass(frozen=True, slots=True)
class Wanted:
    """What a value must be, for the error that refuses another one: `it must be ...`."""

    text: str


@plain_dataclass(frozen=True, slots=True)
class Secret:
    """Marks a field whose value no message may show."""


SECRET = Secret()

Text = Annotated[str, Field(pattern=r"\S")]
Seconds = Annotated[float, Field(ge=0, lt=1e9, allow_inf_nan=False)]
SecondsAboveZero = Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]

Count = Annotated[int, Field(ge=0, lt=10**9)]
CountAboveZero = Annotated[int, Field(gt=0, lt=10**9)]
Priority = Annotated[int, Field(ge=-100, le=100)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
PerSecond = Annotated[float, Field(gt=0, lt=1e9, allow_inf_nan=False)]

AT_LEAST_ZERO = Wanted("a number of at least 0")
ABOVE_ZERO = Wanted("a number above 0")
SHARE = Wanted("a number above 0, and 1 at most")
PER_MINUTE = Wanted("a whole number of at least 0, or null")
PRIORITY = Wanted("a whole number from -100 to 100")
SIZE = Wanted("bytes, or a size such as 64MiB")
IDLE = Wanted("a number of seconds above 0, or null")
NAMES = Wanted("a list of names")


@dataclass(frozen=True, slots=True, config=STRICT)
class SwitchingConfig:
    """The `switching` section."""

    mode: Annotated[
        SwitchingMode,
        Wanted("manual or auto"),
        Field(
            description="`manual`: only the active model is served, and somebody switches. `auto`: "
            "requests for every model are accepted, and the server switches by `policy`"
        ),
    ] = "manual"
    policy: Annotated[
        Text,
        Wanted("the name of a policy"),
        Field(
            description="when to switch in the mode `auto`: `batch`, `fifo`, `round_robin`, or one "
            "that an installed package adds"
        ),
    ] = "batch"
    max_wait: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(
            description="auto: seconds after which a request that waits is due: its model is next, "
            "whatever the policy says"
        ),
    ] = 30.0
    min_active: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(description="`batch`: seconds that a model stays active at least, if nobody is due"),
    ] = 0.0
    slice: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(description="`round_robin`: seconds of a model with the weight 1"),
    ] = 2.0
    drain_timeout: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(
            description="seconds that a switch waits for running requests, if the call is silent"
        ),
    ] = 60.0
    on_drain_timeout: Annotated[
        DrainPolicy,
        Wanted("abort, park or refuse"),
        Field(
            description="what becomes of requests that still run then, if the call is silent: "
            "`abort` ends them with an error, `park` freezes them until their model is active "
            "again, `refuse` gives the switch up"
        ),
    ] = "abort"
    max_parked: Annotated[
        Count,
        AT_LEAST_ZERO,
        Field(description="requests of one model that may be parked; more are ended"),
    ] = 1024
    parked_timeout: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(description="seconds that a request may be parked; then it is ended with an error"),
    ] = 600.0
    max_waiting: Annotated[
        Count,
        AT_LEAST_ZERO,
        Field(description="requests that may be held for the target of a switch; more get 429"),
    ] = 1024
    wait_timeout: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(description="seconds that a request may be held; then it gets 504"),
    ] = 600.0
    verify: Annotated[
        bool,
        Wanted("true or false"),
        Field(
            description="whether a model that was loaded or woken generates a canary token, which "
            "is compared with that of its first load, before it is served"
        ),
    ] = True
    predict: Annotated[
        bool,
        Wanted("true or false"),
        Field(
            description="whether the model that is likely to be next is prepared: its files are "
            "read ahead into what `memory.host` has to spare, or it wakes where it sleeps on CUDA"
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
        Field(description="switches per second in the long run; calls beyond it get 429"),
    ] = 20.0
    burst: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(description="switches that may come at once before `rate` counts"),
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
            description="values in a JSON body, counted by commas and opening brackets; more get "
            "413, because nobody else is answered while vLLM parses a body"
        ),
    ] = 1_000_000
    held_bytes: Annotated[
        ByteSize,
        SIZE,
        Field(
            description="bytes that all requests may hold together, from the first byte of a body "
            "to the end of its answer: what has come of it while it is read, then, for JSON, twice "
            "that, four times where texts have other characters than ASCII or are escaped (`\\u`), "
            "and 160 bytes for each value. A request beyond it gets 429"
        ),
    ] = 1 << 30
    held_share: Annotated[
        Share,
        SHARE,
        Field(
            description="share of `held_bytes` that one caller alone may hold, where keys are "
            "asked for: a group of `rights`, or a key outside of them. The more others hold, the "
            "less it may, so that there is always some left. Admins may hold all of it"
        ),
    ] = 0.5
    engine_share: Annotated[
        Share,
        SHARE,
        Field(
            description="share of an engine's places (`max_num_seqs`), and of what two of its "
            "steps take (`max_num_batched_tokens`), that one caller's requests may have while "
            "others use the model, where keys are asked for; the rest of them wait before the "
            "engine, in turns with those of others. Who was alone for a minute may have all. "
            "Admins never wait. 1: first come, first served, as in vLLM"
        ),
    ] = 0.5
    body_timeout: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(description="seconds in which a request's body must have arrived; then it gets 408"),
    ] = 300.0
    body_rate: Annotated[
        ByteSize,
        SIZE,
        Field(
            description="bytes per second at least with which a body has to come, in every 20 "
            "seconds, once there are 64 KiB of it; a slower one gets 408"
        ),
    ] = 4 << 10
    in_flight: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="requests that one model may have in flight, each prompt, item and answer "
            "of a call counted; more get 429"
        ),
    ] = 65_536
    requests_per_call: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="engine requests that one call may become: its prompts, items, documents "
            "or conversations times `n`; more get 413"
        ),
    ] = 2048
    answers_per_call: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="engine requests that one call may become where a model is to generate: "
            "vLLM writes all of their answers in one piece, while nobody else is answered"
        ),
    ] = 1024
    grammar_bytes: Annotated[
        ByteSize,
        SIZE,
        Field(
            description="size of the schemas, choices and grammars of a request, tools that have "
            "to be called or are strict included; more get 413"
        ),
    ] = 64 << 10
    grammar_values: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="what may be in those: properties, members of lists, alternatives, a "
            "tenth of what `minItems`, `maxItems`, `minLength`, `maxLength`, `minProperties` and "
            "`maxProperties` ask for, and the largest repetition (`{m,n}`) in each regular "
            "expression or grammar. Regular expressions in a grammar weigh ten each, and more "
            "where several have to fit one text (`allOf`); more get 413"
        ),
    ] = 2000
    grammar_timeout: Annotated[
        SecondsAboveZero | None,
        IDLE,
        Field(
            description="seconds in which vLLM has to have checked a request with one of those; "
            "and from the time when an engine gets it to its first token. Then it gets 504; "
            "if compilation had not begun, it does not begin. null: without end"
        ),
    ] = 300.0
    grammar_memory: Annotated[
        ByteSize,
        SIZE,
        Field(
            description="memory that it may take to compile one of those, unless it is plain; "
            "more get 413"
        ),
    ] = 512 << 20
    grammar_seconds: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(
            description="seconds of processors that it may take to compile one of those, unless "
            "it is plain; more get 413"
        ),
    ] = 60.0
    requests_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(
            description="calls that each key may make in a minute, however many prompts each has; "
            "more get 429. 0: any number; null: 30000 where the server listens elsewhere than on "
            "loopback, there any number. A number counts for callers without a key, too, for all "
            "of them together"
        ),
    ] = None
    tokens_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(
            description="tokens of prompts and answers that each user key may use in a minute, "
            "counted when a request ends; null: 6000000, but on loopback any number"
        ),
    ] = None
    switches_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(
            description="switches that each user key may ask for in a minute: calls that move "
            "models, and, in the mode `auto`, requests that are the first to wait for a model; "
            "null: 60, but on loopback any number"
        ),
    ] = None
    kept_responses: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="responses of the Responses API that are kept, where they are; then the "
            "oldest are forgotten"
        ),
    ] = 10_000
    client_timeout: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(
            description="seconds in which nothing more could be sent to a client; then, or at most "
            "after twice as long, its connection is closed and its request ended"
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
        Field(description="header fields of a request; more get 431"),
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
            description="seconds in which a head must have arrived, counted from the connection or "
            "from the head's first byte; then it gets 408"
        ),
    ] = 30.0
    connections: Annotated[
        CountAboveZero | None,
        Wanted("a whole number above 0, or null"),
        Field(
            description="connections at a time; null: what the limit of open files leaves. Where "
            "all are busy, others get 503, but for health checks and admins"
        ),
    ] = None
    connections_per_address: Annotated[
        CountAboveZero | None,
        Wanted("a whole number above 0, or null"),
        Field(
            description="connections of one client's address at the same time (IPv6: of one "
            "network of 64 bits); null: half of all. A proxy that `--forwarded-allow-ips` names, "
            "and a Unix domain socket, have all"
        ),
    ] = None
    refusals_per_second: Annotated[
        CountAboveZero,
        ABOVE_ZERO,
        Field(
            description="refusals (4xx) a second that a client's address, or a key that is "
            "known, gets without a wait, and three times as many in one go; further ones come "
            "late, by 5 seconds at most. Behind a proxy, name it with `--forwarded-allow-ips`"
        ),
    ] = 10


Sharing = Literal["shared", "group", "key"]


@dataclass(frozen=True, slots=True, config=STRICT)
class IsolationConfig:
    """The `isolation` section."""

    prefix_cache: Annotated[
        Sharing | None,
        Wanted("shared, group or key, or null"),
        Field(
            description="whose prompts find each other in a model's prefix cache. `shared`: all; "
            "who shares it can find out whether somebody else has sent the same beginning of a "
            "prompt, by the time of the answer and by the cache's metrics. `group`: those of one "
            "group of `rights`, where keys in no group are one, and admins are one. `key`: those "
            "of one key. null: `group` where `rights` has groups with keys, else `shared`"
        ),
    ] = None
    observers: Annotated[
        Literal["users", "admins"],
        Wanted("users or admins"),
        Field(
            description="who may read `/metrics`, `/admin/status`, `/admin/events` and "
            "`/admin/leases`, which tell of everybody's requests: their models, tokens and times, "
            "but no text"
        ),
    ] = "users"


@dataclass(frozen=True, slots=True, config=STRICT)
class RecoveryConfig:
    """The `recovery` section."""

    max_restarts: Annotated[
        Count,
        AT_LEAST_ZERO,
        Field(
            description="restarts of the engine host within `restart_window`; at the next death "
            "the server ends with status 1"
        ),
    ] = 5
    restart_window: Annotated[
        SecondsAboveZero, ABOVE_ZERO, Field(description="seconds in which restarts are counted")
    ] = 600.0
    max_backoff: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(description="seconds between two attempts to recover, at most"),
    ] = 60.0
    hang_timeout: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(
            description="seconds without a sign of life of the engine host after which it is "
            "killed and restarted"
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
            description="seconds that anything else may take that an engine is told to do; "
            "then the engine host is killed and restarted"
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
            description="folders below which adapters may lie that are added while the server "
            "runs, relative to the file; default: none, so that none can be added",
        ),
        Wanted("a list of folders"),
    ] = ()


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelKeys:
    """The keys of a model, and of `defaults`, that are ours. Every other one is vLLM's."""

    model: Annotated[
        Text,
        Wanted("a folder or a model hub's name"),
        Field(
            description="a folder with a checkpoint (Hugging Face's or Mistral's format) or a GGUF "
            "file, absolute or relative to the file; or a model hub's name"
        ),
    ]
    aliases: Annotated[
        tuple[Text, ...],
        Field(strict=False, description="further names that clients may send for this model"),
        NAMES,
    ] = ()
    load: Annotated[
        LoadWhen,
        Wanted("startup or on_demand"),
        Field(
            description="`startup`: made before the server accepts requests. `on_demand`: made by "
            "its first switch, in the running host"
        ),
    ] = "startup"
    pinned: Annotated[
        bool,
        Wanted("true or false"),
        Field(description="whether it is never moved down to make room for another model"),
    ] = False
    idle_sleep: Annotated[
        SecondsAboveZero | None,
        IDLE,
        Field(
            description="seconds without a request after which it sleeps, once it is not active; "
            "auto: also while it is, if nobody has a request for any model"
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
        Field(description="auto: requests of a model with a higher one go first"),
    ] = 0
    max_wait: Annotated[
        Seconds | None,
        Wanted("a number of at least 0, or null"),
        Field(description="auto: `switching.max_wait` for this model; null: as given there"),
    ] = None
    weight: Annotated[
        SecondsAboveZero,
        ABOVE_ZERO,
        Field(description="auto: the model's share of time, compared with those of others"),
    ] = 1.0
    quant_config: Annotated[
        Text | None,
        Wanted("the path of a file, or null"),
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
        Wanted("a list of texts"),
        Field(
            strict=False,
            description="its keys, which count as user keys; `${NAME}` keeps them out of the file; "
            "the group `default` has none",
        ),
    ] = field(default=(), repr=False)
    key_file: Annotated[
        Text | None,
        SECRET,
        Wanted("the path of a file, or null"),
        Field(
            description="a file with more of them, one a line (absolute or relative to the YAML "
            "file); read again on SIGHUP"
        ),
    ] = None
    switch_to: Annotated[
        Literal["all"] | tuple[str, ...],
        BeforeValidator(_all_or_names),
        Field(
            description="auto: models to which its requests may cause a switch: `all`, or a list "
            "of aliases, which may be empty",
        ),
    ] = "all"
    max_priority: Annotated[
        Priority,
        PRIORITY,
        Field(
            description="auto: the highest priority that its requests get by "
            "`x-hotswap-priority`, where their model's own is not higher"
        ),
    ] = 0
    min_max_wait: Annotated[
        Seconds,
        AT_LEAST_ZERO,
        Field(description="auto: the shortest time, in seconds, that `x-hotswap-max-wait` gives"),
    ] = 5.0
    requests_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(
            description="`limits.requests_per_minute` for each of its keys; null: as given there"
        ),
    ] = None
    tokens_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(description="`limits.tokens_per_minute` for each of its keys; null: as given there"),
    ] = None
    switches_per_minute: Annotated[
        Count | None,
        PER_MINUTE,
        Field(
            description="`limits.switches_per_minute` for each of its keys; null: as given there"
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
"""Settings of the server as a whole, by section. Each may be given as a flag or a variable, too."""

TOP_LEVEL: Mapping[str, str] = {
    "default_model": "the alias that is active after the start; default: the first one",
    "defaults": "keys of a model (but `model` and `aliases`) that count for every model",
    "models": "the models: a mapping of alias to keys",
    "switching": "how switches go",
    "limits": "what requests and clients may take",
    "isolation": "what keys may find out of each other's requests",
    "recovery": "what happens when engines or the engine host fail",
    "memory": "what all models together may hold",
    "adapters": "adapters that are added while the server runs",
    "rights": "who may cause which switch: a mapping of a group's name to its keys and rights; "
    "`default` is for everybody else",
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
    """The settings that may be given as a flag or as an environment variable, too."""
    yield Setting("", "default_model", TOP_LEVEL["default_model"])
    for section, kind in SECTIONS.items():
        for item in fields(kind):
            yield Setting(section, item.name, describe(kind, item.name))


def describe(kind: type[Any], name: str) -> str:
    """What the field of that name means."""
    description: str = kind.__pydantic_fields__[name].description or ""
    return description


def wanted(kind: type[Any], name: str) -> str | None:
    """What the value of a field must be, in words of ours where there are any."""
    metadata = kind.__pydantic_fields__[name].metadata
    return next((item.text for item in metadata if isinstance(item, Wanted)), None)


def is_secret(kind: type[Any], name: str) -> bool:
    return SECRET in kind.__pydantic_fields__[name].metadata


@plain_dataclass(frozen=True, slots=True)
class Override:
    """A setting given as a flag or as an environment variable."""

    section: str
    key: str
    value: str = field(repr=False)
    origin: str
    """How it was given, for messages."""


def overrides(environment: Mapping[str, str], flags: Mapping[str, str | None]) -> list[Override]:
    """What variables and flags say, flags last, so that they count more.

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
"""Environment variables that may name the YAML file, the first one set wins."""

FORWARDED_VARIABLE = "FORWARDED_ALLOW_IPS"

VARIABLES: Mapping[str, str] = {
    CONFIG_VARIABLES[0]: "the YAML file, for the quickstart's start",
    CONFIG_VARIABLES[1]: "the same, as the quickstart names it",
    "VLLM_SERVER_DEV_MODE": "`1` opens our own routes that change state without an admin key, and "
    "none of vLLM's",
    "VLLM_HOTSWAP_ALLOW": "what `--allow` accepts; the flag adds to it",
    "VLLM_HOTSWAP_ADMIN_KEY": "admin keys, with commas or spaces between; `--admin-key` wins over "
    "it",
    "VLLM_HOTSWAP_ADMIN_KEY_FILE": "a file with admin keys; `--admin-key-file` wins over it",
    "VLLM_HOTSWAP_API_KEY_FILE": "a file with user keys; `--api-key-file` wins over it",
    "VLLM_HOTSWAP_PASS_ON": "names, with commas between, of variables that the engine host is to "
    "have although it would not get them ([configuration](configuration.md#what-the-engine-host-"
    "is-told))",
    "VLLM_HOTSWAP_AUDIT_LOG": "a file for a line of every call that changes state; `--audit-log` "
    "wins over it",
    "VLLM_HOTSWAP_CUDA_SLEEP": "`0`: on CUDA, models lie in torch's own memory, and are parked or "
    "unloaded ([NVIDIA GPUs](guides/gpu.md#without-sleep))",
    "VLLM_HOTSWAP_URL": "the server that `vllm-hotswap status` and the other commands point at",
    "VLLM_API_KEY": "user keys, with commas or spaces between; `--api-key` wins over it",
    FORWARDED_VARIABLE: "uvicorn's: proxies whose word counts for where a request comes from; "
    "`--forwarded-allow-ips` wins over it",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "accepted, not needed, not passed on",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "accepted, not needed, not passed on; see `adapters`",
    "VLLM_HOTSWAP_FAILPOINTS": "for tests: where the server is to fail; see "
    "[reliability](reliability.md#failpoints)",
    "QUANT_CONFIG": "kept for models without `quant_config`, replaced or cleared for those with it",
    "VLLM_CPU_OMP_THREADS_BIND": "CPU: cores of the compute threads, as in vLLM. Here `auto` uses "
    "every physical core of a NUMA node; vLLM keeps one for its scheduler process, which does not "
    "exist here",
}
"""Environment variables that this project reads, besides those of `server_settings`."""
