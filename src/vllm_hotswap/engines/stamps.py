"""Compares the stamp on every output with the lease of its request. Checked on vLLM 0.32.0.

Relies on: `AsyncLLM.engine_core`, whose `add_request_async` and `get_output_async` are called once
per request and per step; `EngineCoreRequest.cache_salt`, which partitions the prefix cache;
`EngineCoreOutputs.weight_version`, which is new in 0.32: outputs of older versions have no stamp,
and are delivered unchecked.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from typing import Any

from vllm_hotswap.engines.engine_share import EngineShare
from vllm_hotswap.engines.sendable import check_sendable
from vllm_hotswap.errors import EngineUnavailable, GrammarTimeout, WrongStamp
from vllm_hotswap.host import grammars
from vllm_hotswap.models import OUTPUTS, Lease, Pace, current_lease, drain


def make_stamp(alias: str, epoch: int) -> str:
    return f"{alias}#{epoch}"


def read_stamp(stamp: str) -> tuple[str, int]:
    """Return alias and epoch; the epoch is -1 if the stamp is not one of ours."""
    alias, _, epoch = stamp.rpartition("#")
    return (alias, int(epoch)) if epoch.isdecimal() else (stamp, -1)


class StampedCore:
    """vLLM's client of one engine core, between it and the `AsyncLLM` that uses it.

    The mutable state is `_leases`, by the id that vLLM gives a request, from its start to its last
    output; `_held`, ids of requests that wait for their turn, or left while they waited;
    `_outputs_since_yield`, the outputs since the event loop last ran other tasks; and the last
    stamp, parsed.
    """

    def __init__(
        self,
        alias: str,
        core: Any,
        pace: Pace | None = None,
        share: EngineShare | None = None,
    ) -> None:
        """With `pace`, slow large requests down; with `share`, hold accounts to their share."""
        self._alias = alias
        self._core = core
        self._pace = pace
        self._share = share
        self._leases: dict[str, Lease] = {}
        self._held: set[str] = set()
        self._outputs_since_yield = 0
        self._stamp = ""
        self._owner = ("", -1)

    def __repr__(self) -> str:
        return f"<StampedCore {self._alias} requests={len(self._leases)} stamp={self._stamp!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    async def add_request_async(self, request: Any) -> None:
        check_sendable(request)
        lease = current_lease.get()
        if lease is not None:
            lease.requests.add(request.request_id)  # vLLM's frontend knows it already
            if lease.alias != self._alias:
                raise WrongStamp(lease.alias, self._alias)
            if lease.wait_for_turn is not None or lease.calls > 1 or lease.engine_share < 1:
                await self._until_its_turn(lease, request)
            if lease.cut is not None:  # while the request was being tokenised
                self._leave(request.request_id)
                raise EngineUnavailable(lease.cut.message)
            if lease.cache_salt:
                request.cache_salt = _salted(lease.cache_salt, request.cache_salt)
            lease.prompt_tokens += _prompt_tokens(request)
            # Before it is sent: an output whose request has no entry here is delivered unchecked.
            self._leases[request.request_id] = lease
            if grammars.has_grammar(request):
                grammars.sign(request, lease.account)
                self._await_first_output(request.request_id, lease)
        try:
            await self._core.add_request_async(request)
        except BaseException:
            self._leave(request.request_id)
            raise

    def _await_first_output(self, request_id: str, lease: Lease) -> None:
        """Abort the request unless an output of it comes in time; while it is parked, none can."""
        if (timeout_s := lease.grammar_timeout_s) is not None:
            late = GrammarTimeout(timeout_s)
            lease.count_down(request_id, timeout_s, lambda: drain.end([lease], late))

    async def _until_its_turn(self, lease: Lease, request: Any) -> None:
        """Hold the request here, where it has been checked, and before an engine has it."""
        self._held.add(request.request_id)
        if self._pace is not None:
            await self._pace.wait()
        if lease.wait_for_turn is not None:
            await lease.wait_for_turn(_most_tokens(request))
        if self._share is not None and lease.engine_share < 1 and self._is_held(request):
            tokens = _prompt_tokens(request)
            lease.held_back += 1
            try:
                await self._share.enter(
                    request.request_id, lease.account, tokens, lease.engine_share
                )
            finally:
                lease.held_back -= 1
        # An abort need not cancel this task, and sends the engine nothing for a held request. Sent
        # to the engine after that, the request would run with no client to read it.
        if not self._is_held(request):
            self._leave(request.request_id)
            raise asyncio.CancelledError
        self._held.discard(request.request_id)

    def _is_held(self, request: Any) -> bool:
        return request.request_id in self._held

    def _leave(self, request_id: str) -> None:
        if self._share is not None:
            self._share.leave(request_id)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        self.forget(request_ids)
        sent = [request_id for request_id in request_ids if request_id not in self._held]
        self._held.difference_update(request_ids)
        if sent:
            await self._core.abort_requests_async(sent)

    async def get_output_async(self) -> Any:
        # Outputs that have arrived already are read without letting other tasks run.
        if self._outputs_since_yield >= OUTPUTS:
            self._outputs_since_yield = 0
            await asyncio.sleep(0)
        outputs = await self._core.get_output_async()
        if outputs.outputs:
            self._outputs_since_yield += len(outputs.outputs)
            self._check(outputs, getattr(outputs, "weight_version", None))
        return outputs

    def forget(self, request_ids: Iterable[str]) -> None:
        """Forget requests whose clients are gone."""
        for request_id in list(request_ids):
            self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._leave(request_id)
        lease = self._leases.pop(request_id, None)
        if lease is not None:
            lease.stop_countdown(request_id)
            lease.requests.discard(request_id)

    def _check(self, outputs: Any, stamp: str | None) -> None:
        """Remove outputs that do not belong to their request, and abort the request.

        Outputs without a stamp are about requests that never ran, or come from an older version.
        """
        if stamp is not None and stamp != self._stamp:
            self._stamp, self._owner = stamp, read_stamp(stamp)
        leases, (alias, epoch) = self._leases, self._owner
        refused = set()
        for output in outputs.outputs:
            lease = leases.get(output.request_id)
            if lease is None:
                continue
            if stamp is not None and not lease.accepts_stamp(alias, epoch):
                refused.add(output.request_id)
                drain.end([lease], WrongStamp(lease.alias, stamp))
                continue
            if lease.countdowns:
                lease.stop_countdown(output.request_id)
            if self._share is not None:
                self._share.note_output(output.request_id)
            lease.output_tokens += len(output.new_token_ids)
            if output.finish_reason is not None:
                self._forget(output.request_id)
        if refused:
            outputs.outputs = [o for o in outputs.outputs if o.request_id not in refused]


def _salted(salt: str, own: str | None) -> str:
    """Return the caller's salt, combined with the one that the request asks for, if any."""
    return salt if own is None else json.dumps([salt, own])


def _prompt_tokens(request: Any) -> int:
    """Return the number of prompt tokens; embeddings given instead are not counted."""
    return len(request.prompt_token_ids or ())


def _most_tokens(request: Any) -> int:
    """Return the tokens of the prompt, plus those of the longest answer that is asked for."""
    sampling = request.sampling_params
    return _prompt_tokens(request) + ((sampling.max_tokens or 0) if sampling else 0)
