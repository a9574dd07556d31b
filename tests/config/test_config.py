"""The YAML file: what is accepted, and how every mistake is reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_hotswap.access.rights import Rights
from vllm_hotswap.config.reader import (
    ServerConfig,
    load_config,
    parse_config,
    read_config,
    unknown_key,
)
from vllm_hotswap.config.sampling import SamplingPolicy
from vllm_hotswap.config.settings import SwitchingConfig, overrides
from vllm_hotswap.config.sizes import MemoryBudget
from vllm_hotswap.errors import ConfigError

Load = Callable[[str], ServerConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load a text as `models.yaml`, beside a checkpoint `tiny` and an empty folder `empty`."""
    for name in ("tiny", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")

    def write_and_load(text: str) -> ServerConfig:
        path = tmp_path / "models.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path)

    return write_and_load


@pytest.fixture
def refusal(load: Load) -> Callable[[str], str]:
    """Return the message with which a text is refused."""

    def refuse(text: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text)
        return caught.value.message

    return refuse


# --- accepted files -------------------------------------------------------------------------


def test_shortest_file_has_one_model(load: Load) -> None:
    """A file may be one alias with a model; everything else has a default."""
    config = load("models: {llama: {model: org/llama}}")

    assert ("llama",) == config.aliases
    assert "llama" == config.default_model
    assert "startup" == config.models[0].load
    assert SwitchingConfig() == config.switching


def test_first_model_is_the_default(load: Load) -> None:
    """The first model in the file counts if `default_model` is left out."""
    config = load("models: {b: {model: org/b}, a: {model: org/a}}")

    assert ("b", "a") == config.aliases
    assert "b" == config.default_model


def test_default_model_is_taken_from_the_file(load: Load) -> None:
    """`default_model` may name any configured alias."""
    config = load("default_model: a\nmodels: {b: {model: org/b}, a: {model: org/a}}")

    assert "a" == config.default_model


def test_other_keys_are_settings_of_vllm(load: Load) -> None:
    """Keys that are not ours are kept unchanged for vLLM's own parser."""
    config = load("models: {a: {model: org/a, max_model_len: 64, enforce_eager: true}}")

    assert {"max_model_len": 64, "enforce_eager": True} == config.models[0].settings


def test_load_may_wait_for_the_first_switch(load: Load) -> None:
    """`load: on_demand` is accepted, and is not passed to vLLM."""
    model = load("models: {a: {model: org/a, load: on_demand}}").models[0]

    assert "on_demand" == model.load
    assert {} == model.settings


def test_switching_section_is_read(load: Load) -> None:
    """Every key of `switching` may be set, to zero as well."""
    config = load(
        "models: {a: {model: org/a}}\n"
        "switching: {drain_timeout: 0, max_waiting: 3, wait_timeout: 1.5}"
    )

    assert SwitchingConfig(drain_timeout=0, max_waiting=3, wait_timeout=1.5) == config.switching


def test_empty_switching_section_means_the_defaults(load: Load) -> None:
    """A section whose keys are all commented out is not a mistake."""
    assert SwitchingConfig() == load("models: {a: {model: org/a}}\nswitching:").switching


def test_memory_section_is_read(load: Load) -> None:
    """Memory sizes may be in bytes, in words, or fractions; what is left out has a default."""
    config = load("models: {a: {model: org/a}}\nmemory: {device: 20GiB, host: 25%}")

    assert MemoryBudget(20 << 30, 0.25) == config.memory
    assert MemoryBudget(0.8, None) == load("models: {a: {model: x}}\nmemory: {device: 0.8}").memory


@pytest.mark.parametrize("section", ["", "\nmemory:", "\nmemory: {}"])
def test_memory_section_may_be_left_out(load: Load, section: str) -> None:
    """A missing or empty section gives both budgets their defaults."""
    assert MemoryBudget(None, None) == load("models: {a: {model: org/a}}" + section).memory


def test_residency_of_a_model_is_configured_beside_it(load: Load) -> None:
    """`pinned` and idle times are our settings, not vLLM's; times may be null."""
    models = load(
        "models:\n"
        "  a: {model: org/a, pinned: true, idle_sleep: 60, idle_unload: 0.5}\n"
        "  b: {model: org/b, pinned: false, idle_sleep: null}\n"
        "  c: {model: org/c}"
    ).models

    assert [(True, 60.0, 0.5), (False, None, None), (False, None, None)] == [
        (model.pinned, model.idle_sleep, model.idle_unload) for model in models
    ]
    assert [{}, {}, {}] == [model.settings for model in models]


@pytest.mark.parametrize("written", ["tiny", "./tiny", "tiny/", "../{parent}/tiny"])
def test_relative_folder_starts_at_the_file(load: Load, tmp_path: Path, written: str) -> None:
    """A relative folder is relative to the YAML file, wherever the server is started."""
    model = load(f"models: {{a: {{model: '{written.format(parent=tmp_path.name)}'}}}}").models[0]

    assert str(tmp_path.resolve() / "tiny") == model.model
    assert model.is_folder


def test_absolute_folder_is_kept(load: Load, tmp_path: Path) -> None:
    """An absolute folder stays what it is."""
    model = load(f"models: {{a: {{model: '{tmp_path}/tiny'}}}}").models[0]

    assert str(tmp_path.resolve() / "tiny") == model.model


def test_home_is_expanded(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` is expanded to the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))

    assert str(tmp_path.resolve() / "tiny") == load("models: {a: {model: ~/tiny}}").models[0].model


@pytest.mark.parametrize("name", ["org/llama", "gpt2"])
def test_hub_name_is_kept(load: Load, name: str) -> None:
    """A name that is not a folder here is a model hub's name."""
    model = load(f"models: {{a: {{model: {name}}}}}").models[0]

    assert name == model.model
    assert not model.is_folder


def test_merge_keys_share_settings(load: Load) -> None:
    """YAML's `<<` shares settings, and an entry's own keys have precedence."""
    config = load(
        "models:\n"
        "  a: &a {model: org/a, dtype: float32, seed: 1}\n"
        "  b: {<<: *a, model: org/b, seed: 2}\n"
    )

    assert "org/b" == config.models[1].model
    assert {"dtype": "float32", "seed": 2} == config.models[1].settings


# --- unreadable files -----------------------------------------------------------------------


def test_missing_file_is_named_with_a_way_to_get_one(tmp_path: Path) -> None:
    """The message has the missing file and the way to create one."""
    with pytest.raises(ConfigError, match=r"nowhere\.yaml' does not exist; `vllm-hotswap demo"):
        load_config(tmp_path / "nowhere.yaml")


def test_folder_is_no_configuration_file(tmp_path: Path) -> None:
    """The message for a folder says what to do, without the number of a descriptor."""
    with pytest.raises(ConfigError, match=r"^'.*' is a folder; name the YAML file in it$"):
        load_config(tmp_path)


def test_file_must_be_text(tmp_path: Path) -> None:
    """Bytes that are not UTF-8 make the file unreadable."""
    path = tmp_path / "models.yaml"
    path.write_bytes(b"\xff\xfe\x00")

    with pytest.raises(ConfigError, match="is not UTF-8 text; save it as UTF-8"):
        load_config(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_a_file_in_another_encoding_is_told_with_what_to_do(tmp_path: Path, encoding: str) -> None:
    """For other encodings, as UTF-16 of some editors, the message says what to do."""
    path = tmp_path / "models.yaml"
    path.write_text("models: {é: {model: org/a}}", encoding=encoding)

    with pytest.raises(ConfigError, match=r"models\.yaml' is not UTF-8 text; save it as UTF-8$"):
        load_config(path)


# --- impossible settings --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models: [", "is not valid YAML: expected the node content, but found"),
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("models: {a: {model: x, seed: 1, seed: 2}}", "key 'seed' is given twice"),
        ("? [a]\n: 1", "a key must be a scalar"),
        ("models: !!python/name:os.system x", "could not determine a constructor"),
    ],
)
def test_text_that_is_no_yaml_is_refused(
    refusal: Callable[[str], str], text: str, expected: str
) -> None:
    """YAML's own message is passed on, on one line; a key given twice is one such mistake."""
    message = refusal(text)

    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must be a mapping with the keys default_model and models, not empty"),
        ("[1]", "must be a mapping with the keys default_model and models, not list [1]"),
        ("just text", "not str 'just text'"),
        ("default_model: a", "models must be a mapping of alias to settings, not empty"),
        ("models: [a]", "models must be a mapping of alias to settings, not list ['a']"),
        ("models: {}", "models is empty; name at least one model"),
        ("models: {a: }", "models.a must be a mapping with at least the key model, not empty"),
        ("models: {a: org/a}", "models.a must be a mapping with at least the key model, not str"),
        ("models: {1: {model: x}}", "an alias must be a non-empty string; put it in quotes"),
        ("models: {'': {model: x}}", "an alias must be a non-empty string"),
        ("models: {' ': {model: x}}", "an alias must be a non-empty string"),
        (
            "models: {a: {seed: 1}}",
            "models.a.model is missing; name a folder or a model hub's name",
        ),
        ("models: {a: {model: ''}}", "model is ''; it must be a folder or a model hub's name"),
        ("models: {a: {model: 7}}", "model is 7; it must be a folder or a model hub's name"),
        ("models: {a: {model: x, 1: 2}}", "models.a: every key must be a string"),
        (
            "models: {a: {model: x, load: later}}",
            "load is 'later'; it must be startup or on_demand",
        ),
        ("models: {a: {model: x, load: true}}", "load is True; it must be startup or on_demand"),
        ("models: {a: {model: x, load: [1]}}", "load is [1]; it must be startup or on_demand"),
    ],
)
def test_shape_that_cannot_work_is_named(
    refusal: Callable[[str], str], text: str, expected: str
) -> None:
    """The message has the place, what is there, and what belongs there."""
    message = refusal(text)

    assert expected in message
    assert "models.yaml" in message


KNOWN = (
    "known keys: default_model, defaults, models, switching, limits, isolation, recovery, memory, "
    "adapters, rights"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modles: {}", "unknown key 'modles'; did you mean 'models'?"),
        ("default: a", "unknown key 'default'; did you mean 'defaults'?"),
        ("xyz: 1", f"unknown key 'xyz'; {KNOWN}"),
        ("1: 1", f"unknown key 1; {KNOWN}"),
        (
            "models: {a: {model: x}}\nswitching: {drain_timout: 1}",
            "switching: unknown key 'drain_timout'; did you mean 'drain_timeout'?",
        ),
        (
            "models: {a: {model: x}}\nmemory: {mode: auto}",
            "memory: unknown key 'mode'; known keys: device, host",
        ),
        (
            "models: {a: {model: x}}\nmemory: {gpu: 1GiB}",
            "memory: unknown key 'gpu'; known keys: device, host",
        ),
        (
            "models: {a: {model: x}}\nmemory: {devices: 1GiB}",
            "memory: unknown key 'devices'; did you mean 'device'?",
        ),
    ],
)
def test_unknown_key_is_answered_with_the_nearest_one(
    refusal: Callable[[str], str], text: str, expected: str
) -> None:
    """A typing mistake gets the right key, any other unknown key gets the whole list."""
    assert refusal(text).endswith(expected)


@pytest.mark.parametrize(
    ("known", "hint"),
    [
        (["max_model_len", "seed"], "; did you mean 'max_model_len'?"),
        (["seed", "dtype"], "; known keys: seed, dtype"),
        ([f"flag_{number}" for number in range(99)], ""),
    ],
)
def test_long_list_of_known_keys_is_not_recited(known: list[str], hint: str) -> None:
    """Of vLLM's hundreds of flags, a message names only a near one."""
    assert (
        f"here: unknown key 'max_model_length'{hint}"
        == unknown_key("here", "max_model_length", known).message
    )


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        ("lama", "'lama' is not configured; configured: llama, qwen; did you mean 'llama'?"),
        ("xyz", "'xyz' is not configured; configured: llama, qwen"),
        ("[llama]", "['llama'] is not configured"),
        ("", "None is not configured; configured: llama, qwen"),
    ],
)
def test_default_model_must_be_configured(
    refusal: Callable[[str], str], default: str, expected: str
) -> None:
    """An unknown default model is refused with the nearest alias and all aliases."""
    text = f"default_model: {default}\nmodels: {{llama: {{model: x}}, qwen: {{model: y}}}}"

    assert expected in refusal(text)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("./nowhere", "the folder '/"),
        ("/nowhere", "the folder '/"),
        ("../nowhere", "the folder '/"),
        ("~/nowhere", "the folder '/"),
        ("./no.gguf", "the file '/"),
    ],
)
def test_folder_that_does_not_exist_is_named(
    refusal: Callable[[str], str], model: str, expected: str
) -> None:
    """A value written as a path must be a folder, or a GGUF file."""
    message = refusal(f"models: {{a: {{model: {model}}}}}")

    assert f"models.a.model: {expected}" in message
    assert message.endswith("' does not exist")


def test_file_of_another_kind_is_no_checkpoint(refusal: Callable[[str], str]) -> None:
    """A file that exists, but is of another kind, is refused."""
    message = refusal("models: {a: {model: ./models.yaml}}")

    assert message.endswith("models.yaml' is neither a folder nor a .gguf file")


@pytest.mark.parametrize("model", ["empty", "./empty", "."])
def test_folder_without_a_checkpoint_is_refused(refusal: Callable[[str], str], model: str) -> None:
    """Without config.json, the folder would only fail later, with a less clear message."""
    assert refusal(f"models: {{a: {{model: {model}}}}}").endswith(
        "has no config.json; it is not a checkpoint"
    )


@pytest.mark.parametrize("model", ["mistral/params.json", "model.gguf"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_checkpoints_in_other_formats_are_accepted(tmp_path: Path, model: str, prefix: str) -> None:
    """A folder in Mistral's format, and a GGUF file, which is a checkpoint itself, are accepted."""
    file = tmp_path / model
    file.parent.mkdir(exist_ok=True)
    file.touch()
    checkpoint = file if file.suffix == ".gguf" else file.parent
    name = prefix + str(checkpoint.relative_to(tmp_path))

    config = parse_config({"models": {"a": {"model": name}}}, tmp_path / "models.yaml")

    assert str(checkpoint) == config.models[0].model


@pytest.mark.parametrize("model", ["~nobody-has-this-name/x", '"a\\0b"'])
def test_text_that_is_no_path_is_refused(refusal: Callable[[str], str], model: str) -> None:
    """A path with an unknown user or a null byte is a mistake of the file, not of the program."""
    assert "is not a valid path" in refusal(f"models: {{a: {{model: {model}}}}}")


@pytest.mark.parametrize("value", ["1", "yes please", "null", "[true]", '"true"', "0.5"])
def test_pinned_is_true_or_false(refusal: Callable[[str], str], value: str) -> None:
    """Values of `pinned` that only look like a boolean are refused."""
    message = refusal(f"models: {{a: {{model: x, pinned: {value}}}}}")

    assert "models.a.pinned is " in message
    assert message.endswith("it must be true or false")


@pytest.mark.parametrize("key", ["idle_sleep", "idle_unload"])
@pytest.mark.parametrize("value", ["0", "-1", "x", "true", ".nan", ".inf", "1.0e+10", "[1]", "60s"])
def test_idle_times_are_seconds_above_zero(
    refusal: Callable[[str], str], key: str, value: str
) -> None:
    """Negative and infinite times are refused, and zero, since such a model could never be used."""
    message = refusal(f"models: {{a: {{model: x, {key}: {value}}}}}")

    assert f"models.a.{key} is " in message
    assert message.endswith("it must be a number of seconds above 0, or null")


@pytest.mark.parametrize("key", ["device", "host"])
@pytest.mark.parametrize(
    "value", ["0", "-1", "1.5", "0%", "120%", "20 apples", "true", ".nan", "[1]", '""']
)
def test_memory_sizes_are_bytes_or_fractions(
    refusal: Callable[[str], str], key: str, value: str
) -> None:
    """Sizes are bytes or fractions; anything else is refused with what would be accepted."""
    message = refusal(f"models: {{a: {{model: x}}}}\nmemory: {{{key}: {value}}}")

    assert f"memory.{key} is " in message
    assert message.endswith("give bytes, a size such as 20GiB, or a fraction such as 0.8 or 80%")


def test_memory_must_be_a_mapping(refusal: Callable[[str], str]) -> None:
    """The section `memory` is a mapping, or left out."""
    assert "memory must be a mapping with the keys device and host, not str '20GiB'" in refusal(
        "models: {a: {model: x}}\nmemory: 20GiB"
    )


@pytest.mark.parametrize("key", ["drain_timeout", "wait_timeout", "max_wait", "max_waiting"])
@pytest.mark.parametrize("value", ["-1", "x", "true", ".nan", ".inf", "1.0e+10", "[1]", ""])
def test_switching_values_are_numbers_of_at_least_zero(
    refusal: Callable[[str], str], key: str, value: str
) -> None:
    """Values that are negative, infinite or not numbers are refused."""
    message = refusal(f"models: {{a: {{model: x}}}}\nswitching: {{{key}: {value}}}")

    assert f"switching.{key} is " in message
    assert message.endswith("it must be a number of at least 0")


def test_max_waiting_is_a_whole_number(refusal: Callable[[str], str]) -> None:
    """`max_waiting` is a whole number of requests."""
    assert "max_waiting is 1.5" in refusal("models: {a: {model: x}}\nswitching: {max_waiting: 1.5}")


def test_switching_must_be_a_mapping(refusal: Callable[[str], str]) -> None:
    """The section `switching` is a mapping, or left out."""
    assert ("memory must be a mapping with the keys device and host, not int 3") in refusal(
        "models: {a: {model: x}}\nmemory: 3"
    )


# --- defaults for several models ------------------------------------------------------------


def test_defaults_count_for_every_model(load: Load) -> None:
    """Defaults apply to our keys and vLLM's; a model's own value wins, even null."""
    config = load(
        "defaults: {max_model_len: 64, load: on_demand, idle_sleep: 5, seed: 1}\n"
        "models: {a: {model: x, seed: null, idle_sleep: null}, b: {model: y, load: startup}}"
    )
    a, b = config.models

    assert [("on_demand", None), ("startup", 5.0)] == [(m.load, m.idle_sleep) for m in (a, b)]
    assert {"max_model_len": 64, "seed": None} == a.settings
    assert {"max_model_len": 64, "seed": 1} == b.settings
    assert ["defaults.max_model_len", "models.a.seed"] == [
        a.place("max_model_len"),
        a.place("seed"),
    ]


@pytest.mark.parametrize(
    ("defaults", "expected"),
    [
        ("3", "defaults must be a mapping with keys of a model, not int 3"),
        ("{model: x}", "defaults: 'model' can't be shared; give it to each model"),
        ("{aliases: [x]}", "defaults: 'aliases' can't be shared; give it to each model"),
        ("{load: later}", "defaults.load is 'later'; it must be startup or on_demand"),
        ("{1: 2}", "defaults: every key must be a string, not 1"),
    ],
)
def test_a_mistake_in_defaults_is_named_there(
    refusal: Callable[[str], str], defaults: str, expected: str
) -> None:
    """A mistake in defaults is reported there, not in the first model that gets them."""
    assert refusal(f"defaults: {defaults}\nmodels: {{a: {{model: x}}}}").endswith(expected)


def test_a_model_may_have_several_names(load: Load) -> None:
    """A model may have additional names; the alias comes first, any may be the default."""
    config = load("default_model: gpt\nmodels: {a: {model: x}, b: {model: y, aliases: [gpt, q]}}")

    assert [("a",), ("b", "gpt", "q")] == [model.names for model in config.models]
    assert "b" == config.default_model


@pytest.mark.parametrize("names", ["[a]", "[b]", "[c, c]"])
def test_every_name_is_one_models(refusal: Callable[[str], str], names: str) -> None:
    """Another model's alias, its own, and a name given twice are refused."""
    message = refusal(f"models: {{a: {{model: x}}, b: {{model: y, aliases: {names}}}}}")

    assert "is taken by models." in message


@pytest.mark.parametrize("names", ["gpt", "[1]", "['']", "{a: 1}"])
def test_aliases_are_a_list_of_names(refusal: Callable[[str], str], names: str) -> None:
    """Aliases must be a list of names; anything else is refused with its place."""
    assert "models.a.aliases" in refusal(f"models: {{a: {{model: x, aliases: {names}}}}}")


# --- quantisation ---------------------------------------------------------------------------


def test_quant_config_is_a_file_or_null_or_left_out(load: Load, tmp_path: Path) -> None:
    """A path is relative to the YAML file; the three cases have different results."""
    (tmp_path / "quant.json").write_text("{}")
    config = load(
        "models:\n"
        "  relative: {model: x, quant_config: quant.json}\n"
        f"  absolute: {{model: x, quant_config: {tmp_path}/quant.json}}\n"
        "  cleared: {model: x, quant_config: null}\n"
        "  kept: {model: x}"
    )
    file = {"QUANT_CONFIG": str(tmp_path.resolve() / "quant.json")}

    assert [file, file, {"QUANT_CONFIG": None}, {}] == [m.environment for m in config.models]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("nowhere.json", "nowhere.json' does not exist"),
        ("7", "models.a.quant_config is 7; it must be the path of a file, or null"),
        ("tiny", "tiny' does not exist"),
    ],
)
def test_quant_config_that_is_no_file_is_named(
    refusal: Callable[[str], str], value: str, expected: str
) -> None:
    """A file of quantisation that is missing, or is a folder, is refused before the start."""
    assert refusal(f"models: {{a: {{model: x, quant_config: {value}}}}}").endswith(expected)


# --- sampling -------------------------------------------------------------------------------


def test_sampling_of_a_model_is_read(load: Load) -> None:
    """All four keys of `sampling` are read; without it, requests are not changed."""
    given, none = load(
        "models:\n"
        "  a:\n"
        "    model: x\n"
        "    sampling: {defaults: {seed: 1}, force: {n: 1}, drop: [user], drop_unsupported: true}\n"
        "  b: {model: x, sampling: }"
    ).models

    assert SamplingPolicy({"seed": 1}, {"n": 1}, ["user"], True) == given.sampling
    assert none.sampling.is_empty


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("{defalts: {}}", "models.a.sampling: unknown key 'defalts'; did you mean 'defaults'?"),
        ("{defaults: 3}", "models.a.sampling.defaults is 3; it must be a valid dictionary"),
        ("{drop: [1]}", "models.a.sampling.drop.0 is 1; it must be a valid string"),
        ("{force: {model: x}}", "'model' is not a sampling parameter"),
        ("yes", "models.a.sampling must be a mapping with the keys defaults, force, drop and"),
    ],
)
def test_a_mistake_in_sampling_is_named(
    refusal: Callable[[str], str], section: str, expected: str
) -> None:
    """A mistake in sampling is reported with its place."""
    assert expected in refusal(f"models: {{a: {{model: x, sampling: {section}}}}}")


# --- flags and variables --------------------------------------------------------------------


@pytest.fixture
def load_given(tmp_path: Path) -> Callable[..., ServerConfig]:
    """Load a file with a drain timeout of 10 s, with variables and flags."""
    path = tmp_path / "models.yaml"
    path.write_text("models: {a: {model: x}, b: {model: y}}\nswitching: {drain_timeout: 10}")

    def load(variables: dict[str, str], **flags: str | None) -> ServerConfig:
        given = {"--" + name.replace("_", "-"): value for name, value in flags.items()}
        return load_config(path, overrides(variables, given))

    return load


def test_a_flag_counts_more_than_a_variable_and_that_more_than_the_file(
    load_given: Callable[..., ServerConfig],
) -> None:
    """Every setting of the server has all three; an empty variable counts as unset."""
    variables = {"VLLM_HOTSWAP_SWITCHING_DRAIN_TIMEOUT": "20", "VLLM_HOTSWAP_DEFAULT_MODEL": "b"}
    file = load_given({"VLLM_HOTSWAP_SWITCHING_DRAIN_TIMEOUT": ""})
    variable = load_given(variables)
    flag = load_given(variables, switching_drain_timeout="30", default_model=None)

    assert [(10, "a"), (20, "b"), (30, "b")] == [
        (config.switching.drain_timeout, config.default_model) for config in (file, variable, flag)
    ]


def test_sizes_may_be_given_as_flags(load_given: Callable[..., ServerConfig]) -> None:
    """Sizes as flags have the same form as in the file."""
    config = load_given({"VLLM_HOTSWAP_MEMORY_HOST": "25%"}, memory_device="20GiB")

    assert MemoryBudget(20 << 30, 0.25) == config.memory


@pytest.mark.parametrize(
    ("variables", "flags", "expected"),
    [
        ({}, {"switching_max_wait": "soon"}, "--switching-max-wait is 'soon'; it must be a number"),
        ({}, {"default_model": "c"}, "--default-model 'c' is not configured; configured: a, b"),
        (
            {"VLLM_HOTSWAP_MEMORY_DEVICE": "20 apples"},
            {},
            "VLLM_HOTSWAP_MEMORY_DEVICE is '20 apples'; give bytes",
        ),
    ],
)
def test_a_mistake_is_named_where_it_was_made(
    load_given: Callable[..., ServerConfig],
    variables: dict[str, str],
    flags: dict[str, str],
    expected: str,
) -> None:
    """A mistake is reported by its flag or variable, not by the key in the file."""
    with pytest.raises(ConfigError) as caught:
        load_given(variables, **flags)

    assert caught.value.message.startswith(expected)


def test_secrets_of_the_environment_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message shows a reference to the environment instead of its value."""
    monkeypatch.setenv("CANARY", "canary-secret")
    path = tmp_path / "models.yaml"
    path.write_text("models: {a: {model: x, load: '${CANARY}'}}")

    with pytest.raises(ConfigError) as caught:
        load_config(path)

    assert "models.a.load is '${CANARY}'; it must be startup" in caught.value.message


# --- forms of the file ----------------------------------------------------------------------


def test_dashes_and_underscores_are_the_same_key(load: Load) -> None:
    """A model's own key replaces the one of `defaults`, however each is written."""
    model = load(
        "defaults: {max-model-len: 64}\nmodels: {a: {model: x, max_model_len: 32}}"
    ).models[0]

    assert {"max_model_len": 32} == model.settings
    assert "models.a.max_model_len" == model.place("max_model_len")


def test_a_merged_mapping_may_be_merged_again(load: Load) -> None:
    """Keys that `<<` adds replace nothing, and do not count as given twice."""
    config = load(
        "models:\n  a: &a {model: x, seed: 1}\n  b: &b {<<: *a, seed: 2}\n  c: {<<: *b, seed: 3}\n"
    )

    assert [1, 2, 3] == [model.settings["seed"] for model in config.models]


@pytest.mark.parametrize("name", ["~nobody-has-this-name/x", "a" * 300, '"a\\0b"'])
@pytest.mark.parametrize("key", ["quant_config", "model"])
def test_what_can_be_no_path_is_named(refusal: Callable[[str], str], key: str, name: str) -> None:
    """An impossible path is reported for every key whose value is a path."""
    keys = {"model": "x", key: name}
    message = refusal(f"models: {{a: {{{', '.join(f'{k}: {v}' for k, v in keys.items())}}}}}")

    assert f"models.a.{key}: " in message
    assert "is not a valid path" in message


def test_a_folder_of_adapters_that_can_be_no_path_is_named(load: Load) -> None:
    """An impossible path of an adapter folder is reported when it is used."""
    config = load("models: {a: {model: x}}\nadapters: {folders: [~nobody-has-this-name/x]}")

    with pytest.raises(ConfigError, match=r"adapters\.folders: .* is not a valid path"):
        _ = config.adapter_folders


def test_an_empty_flag_counts(load_given: Callable[..., ServerConfig]) -> None:
    """An empty flag replaces the file's value; an empty variable does not."""
    with pytest.raises(ConfigError, match="--switching-max-wait is None"):
        load_given({}, switching_max_wait="")


def test_a_long_value_is_not_repeated(refusal: Callable[[str], str]) -> None:
    """A message leaves out a long value, whatever it contains."""
    message = refusal("models: " + "x" * 200)

    assert message.endswith("models must be a mapping of alias to settings, not str")


# --- all mistakes, with their lines ---------------------------------------------------------


def test_all_mistakes_are_told_in_the_order_of_the_file(refusal: Callable[[str], str]) -> None:
    """Each mistake has one line: file, line, place, what is wrong and what to do."""
    text = """\
switchin: {}
default_model: d
models:
  a:
    model: ./nowhere
    pinnd: 1
    load: later
    priority: 1000
  b:
    model: y
    quant_config: gone.json
  c: 3
  d: {model: z, sampling: {drp: [], force: {model: x}}}
switching:
  drain_timout: 1
  max_wait: soon
  rate: -1
memory:
  device: 20 apples
adapters: []
rights:
  team: {key: [], switch_to: [x]}
  7: {}
"""
    expected = [
        "1: unknown key 'switchin'; did you mean 'switching'?",
        "5: models.a.model: the folder",
        "7: models.a.load is 'later'; it must be startup or on_demand",
        "8: models.a.priority is 1000; it must be a whole number from -100 to 100",
        "11: models.b.quant_config: the file",
        "12: models.c must be a mapping",
        "13: models.d.sampling: unknown key 'drp'; did you mean 'drop'?",
        "13: models.d.sampling.force is {'model': 'x'}; 'model' is not a sampling parameter",
        "15: switching: unknown key 'drain_timout'; did you mean 'drain_timeout'?",
        "16: switching.max_wait is 'soon'; it must be a number of at least 0",
        "17: switching.rate is -1; it must be a number above 0",
        "19: memory.device is '20 apples'; give bytes",
        "20: adapters must be a mapping with the key folders, not list",
        "22: rights.team: a key is unknown",
        "22: rights.team has no key",
        "23: rights: a group's name must be a string",
    ]

    lines = [line.partition("models.yaml:")[2] for line in refusal(text).splitlines()]

    assert expected == [line[: len(start)] for line, start in zip(lines, expected, strict=True)]


def test_a_mistake_in_defaults_is_told_once(refusal: Callable[[str], str]) -> None:
    """However many models get it, the message has one line, the line in `defaults`."""
    message = refusal("defaults:\n  load: later\nmodels: {a: {model: x}, b: {model: y}}")

    assert message.endswith(
        "models.yaml:2: defaults.load is 'later'; it must be startup or on_demand"
    )
    assert 1 == len(message.splitlines())


def test_a_key_with_dashes_has_its_line(refusal: Callable[[str], str]) -> None:
    """A key with dashes has its line, as one with underscores has."""
    assert "models.yaml:4: models.a.idle_sleep is -1" in refusal(
        "models:\n  a:\n    model: x\n    idle-sleep: -1"
    )


def test_variables_that_are_not_set_are_told_with_everything_else(load: Load) -> None:
    """Unset variables are all reported; a consequence of one is not a separate mistake."""
    with pytest.raises(ConfigError) as caught:
        load(
            "models:\n"
            "  a: {model: x, priority: '${NOT_SET_1}'}\n"
            "  b:\n"
            "    model: ${NOT_SET_2}\n"
            "    load: 1"
        )

    assert ["2: models.a.priority: the", "4: models.b.model: the", "5: models.b.load is 1; it"] == [
        " ".join(line.partition("models.yaml:")[2].split()[:n])
        for n, line in zip((3, 3, 5), caught.value.message.splitlines(), strict=True)
    ]


def test_what_can_be_read_is_there_beside_the_mistakes(tmp_path: Path) -> None:
    """Further checks get the good models, and the settings of the bad ones."""
    path = tmp_path / "models.yaml"
    path.write_text("models: {a: {model: ./gone, seed: 1}, b: {model: x}, c: 3}")

    read = read_config(path)

    assert read.config is not None
    assert ("a", "b") == read.config.aliases
    assert {"seed": 1} == read.config.models[0].settings
    assert frozenset(["a"]) == read.unusable
    assert 2 == len(read.mistakes)


def test_keys_that_are_not_indented_are_told_what_to_do(refusal: Callable[[str], str]) -> None:
    """A model's keys that stand beside it are reported with the advice to indent them."""
    message = refusal("models:\n  gemma:\n  model: ./gemma\n  seed: 1\n  other: {model: x}")

    assert message.endswith(
        "models.yaml:2: models.gemma is empty, and `model` and `seed` are beside it; indent "
        "`model` and `seed` below gemma"
    )


@pytest.mark.parametrize(
    "name",
    ["org/model:tag", "模型", "two words", "...", ".hidden", "./models/a", "é" * 256, "👩\u200d💻"],
)
def test_a_name_may_be_nearly_any_text(load: Load, name: str) -> None:
    """An alias, an additional name, and the name of a group may be nearly any text."""
    alias, further = (json.dumps(one, ensure_ascii=False) for one in (name, "b" + name[1:]))

    config = load(
        f"models: {{{alias}: {{model: x}}, b: {{model: y, aliases: [{further}]}}}}\n"
        f"rights: {{{alias}: {{keys: [k]}}}}"
    )

    assert (name, "b") == config.aliases


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (".", "it would be a relative path; choose another name"),
        ("..", "it would be a relative path; choose another name"),
        ("a\0", "U+0000 in it is a control character; leave it out"),
        ("\x1b[0m", "U+001B in it is a control character; leave it out"),
        ("a\nb", "U+000A in it is a control character; leave it out"),
        ("a\x85b", "U+0085 in it is a control character; leave it out"),
        ("a\u2028b", "U+2028 in it is a control character; leave it out"),
        ("x" * 257, "it has 257 characters; choose a name of at most 256"),
    ],
)
@pytest.mark.parametrize(
    "text",
    [
        "models:\n  {}: {{model: x}}",
        "models:\n  b: {{model: x, aliases: [c, {}]}}",
        "models: {{b: {{model: x}}}}\nrights: {{{}: {{keys: [k]}}}}",
    ],
)
def test_a_name_that_no_command_or_log_could_show_is_refused(
    refusal: Callable[[str], str], text: str, name: str, reason: str
) -> None:
    """A name that is not safe to print on one line is refused, for models and groups."""
    message = refusal(text.format(json.dumps(name)))

    assert "models.yaml:2: " in message
    assert message.endswith(reason)
    assert message.isprintable()
    assert len(message) < 400


def test_half_a_character_is_no_alias(refusal: Callable[[str], str]) -> None:
    """No client could send half of a surrogate pair."""
    message = refusal('models: {"a\\ud800": {model: x}}')

    assert "the alias 'a\\ud800' cannot be used: U+D800 in it is half of a character" in message


# --- values that YAML changes -----------------------------------------------------------------


@pytest.mark.parametrize("alias", ["yes", "1:30", "0512", "2", "1.10", "~"])
def test_an_alias_that_is_no_text_is_named_as_it_was_written(
    refusal: Callable[[str], str], alias: str
) -> None:
    """An alias that is not text is named as written, with the value that YAML makes of it."""
    message = refusal(f"models:\n  {alias}: {{model: x}}")

    assert f"models.yaml:2: models.{alias}: YAML reads this alias as " in message
    assert message.endswith("an alias must be a non-empty string; put it in quotes")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("priority: 010", "priority is 010, which YAML reads as 8; it must be a whole number"),
        ("idle_sleep: 1:30", "idle_sleep is 1:30, which YAML reads as 90; it must be a number"),
        ("max_wait: .inf", "max_wait is .inf, which YAML reads as inf; it must be a number"),
        ("weight: 1_000", "weight is 1_000, which YAML reads as 1000; it must be a number"),
        ("priority: 1e1", "priority is 1e1; it must be a whole number"),
        ("load: off", "load is off, which YAML reads as false; it must be startup"),
        ("aliases: [1.10]", "aliases.0 is 1.10; it must be a valid string"),
        ("aliases: [no]", "aliases.0 is no, which YAML reads as false; it must be a valid"),
        ("pinned: 0b1", "pinned is 0b1, which YAML reads as 1; it must be true or false"),
        (
            "sampling: {defaults: {stop: no}}",
            "sampling.defaults.stop is no, which YAML reads as false; write false, or 'no' in",
        ),
    ],
)
def test_a_value_that_yaml_changes_is_named_as_it_was_written(
    refusal: Callable[[str], str], text: str, expected: str
) -> None:
    """A value that YAML changes is named as written, and never interpreted in another sense."""
    assert f"models.a.{expected}" in refusal(f"models: {{a: {{model: x, {text}}}}}")


def test_yes_and_no_are_switches(load: Load) -> None:
    """`yes` and `no` are booleans where only these can be meant; `1e1` is a number, as in JSON."""
    config = load(
        "models: {a: {model: x, pinned: yes, weight: 1e1}}\nswitching: {verify: off, predict: NO}"
    )

    assert (True, 10.0) == (config.models[0].pinned, config.models[0].weight)
    assert (False, False) == (config.switching.verify, config.switching.predict)


@pytest.mark.parametrize("word", ["yes", "no", "on", "OFF"])
def test_drop_unsupported_is_a_switch(load: Load, word: str) -> None:
    """`drop_unsupported` is read like every other switch, although a parameter may be anything."""
    (model,) = load(f"models: {{a: {{model: x, sampling: {{drop_unsupported: {word}}}}}}}").models

    assert (word in ("yes", "on")) is model.sampling.drop_unsupported


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("pinned: yes, priority: 010", "models.a.priority is 010, which YAML reads as 8;"),
        ("aliases: b, pinned: yes", "models.a.aliases is 'b'; it must be"),
        ("sampling: {drop: [yes], drop_unsupported: no}", "models.a.sampling.drop.0 is yes, which"),
        ("sampling: {drop_unsupported: 010}", "models.a.sampling.drop_unsupported is 010, which"),
    ],
)
def test_a_switch_beside_a_mistake_is_none(
    refusal: Callable[[str], str], keys: str, expected: str
) -> None:
    """A switch with a mistake is not read as one; only the mistake is reported."""
    message = refusal(f"models: {{a: {{model: org/x, {keys}}}}}")

    assert expected in message
    assert 1 == len(message.splitlines())


def test_a_flag_is_read_as_the_file_is(load_given: Callable[..., ServerConfig]) -> None:
    """A flag refuses octal numbers and the like, as the file does, with the flag's name."""
    with pytest.raises(ConfigError) as caught:
        load_given({}, switching_max_wait="0512")

    assert caught.value.message.startswith("--switching-max-wait is 0512, which YAML reads as 330;")


# --- links --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["./snapshots/abc/tiny.gguf", "snapshots/abc/tiny.gguf", "absolute"]
)
def test_a_gguf_file_of_the_hubs_cache_is_taken_by_its_own_name(
    load: Load, tmp_path: Path, how: str
) -> None:
    """A GGUF file in the hub's cache is named by its link: the target has no suffix."""
    folder = tmp_path / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123abcd").touch()
    link = folder / "tiny.gguf"
    link.symlink_to("../../blobs/0123abcd")

    model = load(f"models: {{a: {{model: {link if how == 'absolute' else how}}}}}").models[0]

    assert str(link.parent.resolve() / "tiny.gguf") == model.model


def test_a_link_to_a_folder_stays_what_it_is_called(load: Load, tmp_path: Path) -> None:
    """A link to a folder keeps its name: its target may change before the next start."""
    (tmp_path / "current").symlink_to("tiny")

    model = load("models: {a: {model: current}}").models[0]

    assert str(tmp_path.resolve() / "current") == model.model


def test_files_are_named_by_their_links(load: Load, tmp_path: Path) -> None:
    """Files of quantisation and of keys keep a link's name: their readers may need its suffix."""
    (tmp_path / "blob").write_text("{}")
    for name in ("quant.json", "keys.txt"):
        (tmp_path / name).symlink_to("blob")

    config = load(
        "models: {a: {model: x, quant_config: quant.json}}\nrights: {team: {key_file: keys.txt}}"
    )

    assert {"QUANT_CONFIG": str(tmp_path.resolve() / "quant.json")} == config.models[0].environment
    assert [tmp_path.resolve() / "keys.txt"] == config.rights[0].source.files


# --- rights -----------------------------------------------------------------------------------

ONE = "models: {llama: {model: org/a, aliases: [big]}, qwen: {model: org/b}}\n"


def test_groups_have_keys_and_rights(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups may have models by any name, keys as text, and key files beside the YAML file."""
    monkeypatch.setenv("TEAM_KEY", "00123")
    config = load(
        ONE + "rights:\n"
        "  team: {keys: ['${TEAM_KEY}', b], switch_to: [big], max_priority: 5, min_max_wait: 1}\n"
        "  jobs: {key_file: keys.txt, switch_to: all}\n"
        "  default: {switch_to: []}\n"
    )
    team, jobs, others = config.rights

    assert Rights("team", frozenset(["llama"]), 5, 1.0) == team.rights
    assert [True, True, False] == [team.source.given.know(key) for key in (b"00123", b"b", b"123")]
    assert (Rights("jobs"), [config.path.parent / "keys.txt"]) == (jobs.rights, jobs.source.files)
    assert (Rights("default", frozenset()), 0) == (others.rights, len(others.source.given))


@pytest.mark.parametrize("section", ["", "rights:", "rights: {}"])
def test_without_rights_there_are_no_groups(load: Load, section: str) -> None:
    """Without rights every caller's requests may trigger every switch."""
    assert () == load(ONE + section).rights


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("[sk-secret]", "rights must be a mapping of a group's name to its rights, not list"),
        ("{team: sk-secret}", "rights.team must be a mapping with the keys"),
        ("{team: [sk-secret]}", "rights.team must be a mapping with the keys"),
        ("{7: {keys: [sk-secret]}}", "rights: a group's name must be a string"),
        ("{team: {keys: sk-secret}}", "rights.team.keys cannot be used; it must be a list of"),
        ("{team: {keys: {sk-secret: 1}}}", "rights.team.keys cannot be used"),
        ("{team: {keys: [sk-secret, 5]}}", "rights.team.keys.1 cannot be used"),
        ("{team: {keys: ['sk secret']}}", "rights.team.keys: a key may only have printable ASCII"),
        ("{team: {keys: [sk-secret], key: 1}}", "rights.team: a key is unknown; known keys: keys"),
        ("{default: {keys: [sk-secret]}}", "rights.default applies to callers without a group"),
        ("{default: {key_file: sk-secret}}", "rights.default applies to callers without a group"),
        ("{team: {}}", "rights.team has no key; give it keys or a key_file"),
        ("{team: {keys: ['']}}", "rights.team has no key; give it keys or a key_file"),
        (
            "{team: {keys: [k], switch_to: [lama]}}",
            "team.switch_to 'lama' is not configured",
        ),
        (
            "{team: {keys: [k], switch_to: llama}}",
            "switch_to is 'llama'; it must be all, or a",
        ),
        ("{team: {keys: [k], switch_to: [1]}}", "switch_to is [1]; it must be all, or a list"),
        ("{team: {keys: [k], max_priority: 101}}", "it must be a whole number from -100 to 100"),
        ("{team: {keys: [k], min_max_wait: -1}}", "min_max_wait is -1; it must be a number of at"),
        (
            "{a: {keys: [sk-secret]}, b: {keys: [sk-secret]}}",
            "rights.b: one of its keys is also in",
        ),
    ],
)
def test_rights_that_cannot_work_are_refused_by_place(
    refusal: Callable[[str], str], section: str, message: str
) -> None:
    """Rights that cannot work are refused with their place, and no key is shown."""
    told = refusal(ONE + f"rights: {section}")

    assert message in told
    assert "secret" not in told


def test_key_that_came_from_the_environment_is_not_shown(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A printed configuration does not show it either."""
    monkeypatch.setenv("TEAM_KEY", "sk-secret")
    config = load(ONE + "rights: {team: {keys: ['${TEAM_KEY}']}}")

    assert "sk-secret" not in repr(config)
