"""Runs a canary before all other requests of its engine, and apart from them.

After a wake, parked requests wait in the scheduler. Scheduled first, they would hold up the canary,
whose verdict they wait for. Scheduled with it, they would make another batch, which could round its
numbers differently. So they are set aside until the canary is done.

Relies on vLLM's `Scheduler.requests` and `Scheduler.waiting` with its `remove_requests` and
`prepend_request`. Checked on vLLM 0.32.0.
"""

from __future__ import annotations

from typing import Any

from vllm_hotswap.host.messages import CANARY_ID


class Canaries:
    """The canary of one engine, if one is expected or under way.

    The mutable state is `is_expected`, `_id` of the one under way, and `_aside`, the requests that
    wait for its end. All of it is changed on the compute thread.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget the canary and the requests set aside: the engine's requests are gone."""
        self.is_expected = False
        self._id: str | None = None
        self._aside: list[Any] = []

    @property
    def is_under_way(self) -> bool:
        return self._id is not None

    def expect(self, scheduler: Any, is_expected: bool) -> None:
        """Expect a canary, so that nothing is stepped before it arrives; or stop expecting one."""
        self._put_back(scheduler)
        self.is_expected = is_expected
        if is_expected:
            self._aside = list(scheduler.waiting)
            scheduler.waiting.remove_requests(self._aside)

    def note_request(self, request: Any) -> None:
        """Note a new request that is the canary."""
        if request.request_id.startswith(CANARY_ID):
            self._id, self.is_expected = request.request_id, False

    def after_step(self, scheduler: Any) -> None:
        """Put back the requests that were set aside, if the canary is done."""
        if self._id is not None and self._id not in scheduler.requests:
            self._put_back(scheduler)

    def _put_back(self, scheduler: Any) -> None:
        self._id = None
        for request in reversed(self._aside):
            if request.request_id in scheduler.requests:  # it may have been aborted since
                scheduler.waiting.prepend_request(request)
        self._aside = []
