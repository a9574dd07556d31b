"""How many files a process may have open."""

from __future__ import annotations

import resource

WANTED_FILES = 65_535


def raised_file_limit() -> int:
    """Raise the soft limit of open files as far as it may be; return how many there may be.

    vLLM does so for its server. Processes that are started later have the limit, too. Idempotent.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if hard == resource.RLIM_INFINITY else min(WANTED_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return WANTED_FILES if soft == resource.RLIM_INFINITY else soft
