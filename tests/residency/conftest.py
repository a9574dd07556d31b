"""Servers with little memory."""

from __future__ import annotations

import pytest

from tests.conftest import MakeServer
from tests.helpers.support import Server
from tests.residency.models import ONE_AND_A_HALF, sized


@pytest.fixture
async def tight(make_server: MakeServer) -> Server:
    """llama is active, the others are cold; there is memory for one and a half."""
    return await make_server(load=("llama",), settings=sized(), budget=ONE_AND_A_HALF)
