"""The operating system: processes, files, sockets, signals, the terminal, the log."""

from __future__ import annotations

from vllm_hotswap.system import terminal
from vllm_hotswap.system.addresses import ip_address, is_loopback, network_of
from vllm_hotswap.system.caches import make_folder
from vllm_hotswap.system.claims import claimed_port, give_back
from vllm_hotswap.system.environment import (
    shut_out_others,
    shut_out_others_without_cache,
    shut_out_writers,
    use_temporary_folder,
)
from vllm_hotswap.system.file_limit import raised_file_limit
from vllm_hotswap.system.forgotten import forget, set_aside, value_of
from vllm_hotswap.system.helpers import (
    QUICK_S,
    Bounds,
    Errand,
    HelperEnd,
    HelperFailed,
    Helpers,
    HelperStopped,
    NoHelper,
    OutOfBounds,
    RefusedByHelper,
)
from vllm_hotswap.system.log_lines import configure_logging, value_text
from vllm_hotswap.system.paths import replace_text, resolve_beside, try_to_write
from vllm_hotswap.system.quiet import Quiet, log_of_clients
from vllm_hotswap.system.signals import (
    EarlyStop,
    Stopped,
    has_terminal,
    interruptible,
    on_hangup,
    signal_when_orphaned,
    stop_signal,
)
from vllm_hotswap.system.trusted_files import doubt, read_private, read_trusted, refuse_foreign
from vllm_hotswap.system.unix_socket import FileIdentity, UnixSocket

__all__ = [
    "QUICK_S",
    "Bounds",
    "EarlyStop",
    "Errand",
    "FileIdentity",
    "HelperEnd",
    "HelperFailed",
    "HelperStopped",
    "Helpers",
    "NoHelper",
    "OutOfBounds",
    "Quiet",
    "RefusedByHelper",
    "Stopped",
    "UnixSocket",
    "claimed_port",
    "configure_logging",
    "doubt",
    "forget",
    "give_back",
    "has_terminal",
    "interruptible",
    "ip_address",
    "is_loopback",
    "log_of_clients",
    "make_folder",
    "network_of",
    "on_hangup",
    "raised_file_limit",
    "read_private",
    "read_trusted",
    "refuse_foreign",
    "replace_text",
    "resolve_beside",
    "set_aside",
    "shut_out_others",
    "shut_out_others_without_cache",
    "shut_out_writers",
    "signal_when_orphaned",
    "stop_signal",
    "terminal",
    "try_to_write",
    "use_temporary_folder",
    "value_of",
    "value_text",
]
