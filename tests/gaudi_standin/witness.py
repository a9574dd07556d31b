"""Which configuration of the Gaudi plugin each step of a server used."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

PLUGINS = Path(__file__).resolve().parent / "plugins"


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step: the process's settings in place, and whose buckets were used."""

    model_type: str
    max_model_len: int
    max_num_seqs: int
    blocks: int
    """The limit of the buckets of blocks."""
    is_active: bool
    """Whether these buckets are the ones that code without a runner at hand would find."""


class Witness:
    """A file in which a plugin of vLLM's writes down a server's steps."""

    def __init__(self, file: Path) -> None:
        self._file, self._read = file, 0

    def environment(self) -> dict[str, str]:
        """Return variables with which a server writes it."""
        path = os.pathsep.join([str(PLUGINS), os.environ.get("PYTHONPATH", "")])
        return {"GAUDI_WITNESS": str(self._file), "PYTHONPATH": path}

    def new_steps(self) -> list[Step]:
        """Return the steps since the last call."""
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        new, self._read = lines[self._read :], len(lines)
        return [Step(**json.loads(line)) for line in new]
