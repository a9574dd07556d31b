"""Device memory of models that sleep and wake: contents, accounting, and failing driver calls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st

from tests.helpers.cuda import STEP, FakeCuda, read, write
from tests.helpers.depth import examples
from vllm_hotswap.errors import NoRoom
from vllm_hotswap.host import cuda_memory
from vllm_hotswap.host.cuda_driver import Driver, DriverError
from vllm_hotswap.host.cuda_memory import ModelMemory, Range, merged

WEIGHTS, KV = "weights", "kv_cache"
CHUNK = 2 * STEP


@dataclass(eq=False)
class Tenant:
    """One model's memory, with its expected contents."""

    cuda: FakeCuda
    seed: int = 1
    content: dict[int, bytearray] = field(default_factory=dict)
    """Contents by address while it is awake."""
    tags: dict[int, str] = field(default_factory=dict)
    saved: set[int] = field(default_factory=set)
    """Addresses whose constant parts are in host memory."""

    def __post_init__(self) -> None:
        self.memory = ModelMemory(Driver(0, self.cuda), CHUNK)
        self.random = random.Random(self.seed)  # noqa: S311

    def allocate(self, steps: int = 2, tag: str = WEIGHTS) -> int:
        self.memory.tag = tag
        address = self.memory.allocate(steps * STEP - 100)
        self.tags[address] = tag
        self.content[address] = bytearray(self.random.randbytes(steps * STEP))
        write(address, bytes(self.content[address]))
        return address

    def free(self, address: int) -> None:
        self.memory.free(address)
        self.content.pop(address)
        self.saved.discard(address)

    def sleep(self) -> None:
        self.memory.sleep(self.holes(), self.constants())
        self.saved = {address for address in self.content if self.tags[address] == WEIGHTS}
        for address, nbytes in self.holes():
            start = next(a for a in self.content if a <= address < a + len(self.content[a]))
            self.content[start][address - start : address - start + nbytes] = bytes(nbytes)

    def step(self) -> None:
        """Write to everything that a model writes to."""
        for address, content in self.content.items():
            fixed = {
                offset
                for start, nbytes in self.constants()
                for offset in (start - address, start - address + nbytes - 1)
            }
            places = [50, len(content) // 2, len(content) - 50]
            for place in places if self.tags[address] == KV else (places[0], places[2]):
                assert place not in fixed
                content[place] = self.random.randrange(256)
                write(address + place, bytes(content[place : place + 1]))

    def train(self) -> None:
        """Change the weights."""
        for address, content in self.content.items():
            content[STEP // 2] ^= 255
            write(address + STEP // 2, bytes(content[STEP // 2 : STEP // 2 + 1]))
        self.memory.weights_changed()
        self.saved.clear()

    def holes(self) -> list[Range]:
        """Return the KV tensors; a little of their segments belongs to others."""
        return [(a + 100, len(self.content[a]) - 200) for a in self.content if self.tags[a] == KV]

    def constants(self) -> list[Range]:
        return [
            (a + 100, len(self.content[a]) - 200) for a in self.content if self.tags[a] == WEIGHTS
        ]

    def to_be_copied(self) -> int:
        """Return the number of bytes that the next sleep has to copy."""
        return sum(
            200 if self.tags[a] == KV or a in self.saved else len(self.content[a])
            for a in self.content
        )

    def check(self) -> None:
        """Check its contents, if it is awake."""
        if not self.memory.is_asleep:
            for address, content in self.content.items():
                assert content == read(address, len(content))


def check_books(cuda: FakeCuda, *tenants: Tenant) -> None:
    """Check that every byte of the device, every address and every copy has an owner."""
    assert cuda.used == cuda.others + sum(t.memory.device_bytes for t in tenants)
    assert sum(cuda.reserved.values()) == sum(t.memory.address_bytes for t in tenants)
    assert cuda.most <= cuda.total


def finish(cuda: FakeCuda, *tenants: Tenant) -> None:
    """Release everything, and check that nothing is left."""
    for tenant in tenants:
        tenant.memory.close()
        tenant.memory.close()  # what could not be released the first time
    assert {} == cuda.left
    assert {} == cuda.streams


# --- one model --------------------------------------------------------------------------------


def test_sleeping_memory_is_given_back_and_comes_again_as_it_was() -> None:
    """After a wake weights are as they were and the KV memory is zero, at the same addresses."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    weights, kv = one.allocate(3), one.allocate(5, KV)

    one.sleep()
    assert 0 == cuda.used == one.memory.device_bytes
    one.memory.wake()

    assert 8 * STEP == cuda.used
    assert one.content[weights] == read(weights, 3 * STEP)
    assert bytes(5 * STEP - 200) == read(kv + 100, 5 * STEP - 200)
    one.check()
    finish(cuda, one)


def test_weights_are_copied_to_the_host_once() -> None:
    """Later sleeps copy only memory that the model may have written to."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    one.allocate(40), one.allocate(20, KV)
    copied = []
    for _ in range(3):
        before = cuda.copied
        one.sleep()
        copied.append(cuda.copied - before)
        one.memory.wake()
        one.step()

    assert [40 * STEP + 200, 400, 400] == copied


def test_changed_weights_are_copied_again() -> None:
    """Changed weights are copied again, once."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    one.allocate(40)
    one.sleep()
    one.memory.wake()

    one.train()
    one.sleep()
    one.memory.wake()

    one.check()
    assert 2 * 40 * STEP == cuda.copied
    finish(cuda, one)


def test_host_memory_is_pinned_once() -> None:
    """Pinned host memory stays for the next sleep, and is as large as what has to be kept."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    one.allocate(7), one.allocate(9, KV)
    for _ in range(3):
        one.sleep()
        one.memory.wake()

    assert 2 == cuda.calls.count("cuMemHostRegister_v2")
    assert 7 * STEP + 4096 == one.memory.host_bytes == one.memory.copy_bytes(one.holes())


def test_copies_run_while_the_next_segment_is_mapped() -> None:
    """Weights are copied first, while mapping continues; the only wait is at the end."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    one.allocate(2, KV), one.allocate(1), one.allocate(1)
    one.sleep()
    cuda.calls.clear()

    one.memory.wake()

    told = [name for name in cuda.calls if name in ("cuMemcpyHtoDAsync_v2", "cuMemCreate")]
    assert ["cuMemCreate", "cuMemcpyHtoDAsync_v2"] * 2 + ["cuMemCreate"] == told[:5]
    assert 1 == cuda.calls.count("cuStreamSynchronize")
    assert "cuStreamSynchronize" == cuda.calls[-1]


def test_a_wake_without_room_changes_nothing() -> None:
    """Without room the model stays asleep, the error says how much, and it wakes later."""
    cuda = FakeCuda(total=10 * STEP)
    one, two = Tenant(cuda), Tenant(cuda, seed=2)
    one.allocate(4), one.allocate(4, KV)
    one.sleep()
    two.allocate(5)

    with pytest.raises(NoRoom, match=r"waking takes 0.5 MiB .*0.3 MiB of .*0.6 MiB are free"):
        one.memory.wake()

    assert one.memory.is_asleep
    assert 5 * STEP == cuda.used
    two.check()
    two.memory.close()
    one.memory.wake()
    one.check()
    finish(cuda, one, two)


def test_what_is_freed_while_it_sleeps_only_gives_back_addresses() -> None:
    """No memory has to be unmapped, and the rest wakes."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    first, _ = one.allocate(), one.allocate()
    one.sleep()
    cuda.calls.clear()

    one.free(first)

    assert {"cuMemUnmap", "cuMemRelease", "cuCtxSynchronize"}.isdisjoint(cuda.calls)
    assert 1 == cuda.calls.count("cuMemAddressFree")
    one.memory.wake()
    one.check()
    finish(cuda, one)


def test_steps_that_have_been_begun_end_before_memory_is_freed() -> None:
    """Steps under way end before memory is freed, because they may still read it."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    address = one.allocate()
    cuda.calls.clear()

    one.free(address)

    assert cuda.calls.index("cuCtxSynchronize") < cuda.calls.index("cuMemUnmap")


def test_nothing_is_freed_for_an_address_that_is_not_its_own() -> None:
    """Freeing an unknown address does nothing: torch may free memory that was already closed."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    address = one.allocate()
    one.memory.close()

    one.memory.free(address)
    one.memory.free(address + 1)

    assert {} == cuda.left


@pytest.mark.parametrize("asleep", [False, True])
def test_close_gives_everything_back(asleep: bool) -> None:
    """Closing releases everything, whether or not the model sleeps."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    one.allocate(3), one.allocate(3, KV)
    one.sleep()
    if not asleep:
        one.memory.wake()

    finish(cuda, one)


def test_memory_in_which_nothing_is_has_none_after_a_load() -> None:
    """Scratch memory of a load, which torch keeps, takes no part in sleeps and wakes."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    one.allocate(2)
    spare = one.allocate(30)
    one.memory.empty(spare)
    one.content.pop(spare)

    one.sleep()
    one.memory.wake()

    assert 2 * STEP == cuda.used == cuda.copied
    one.check()
    one.memory.free(spare)
    finish(cuda, one)


def test_an_allocation_without_room_leaves_nothing() -> None:
    """A failed allocation leaves neither addresses nor memory; the next that fits succeeds."""
    cuda = FakeCuda(total=4 * STEP)
    one = Tenant(cuda)

    with pytest.raises(DriverError, match="cuMemCreate: out of memory"):
        one.allocate(5)

    assert {} == cuda.left
    one.allocate(4)
    one.check()
    finish(cuda, one)


def test_host_memory_that_cannot_be_pinned_is_used_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Host memory that cannot be pinned is used; one warning has the remedy."""
    cuda = FakeCuda(refuses={"cuMemHostRegister_v2"})
    one = Tenant(cuda)
    one.allocate(), one.allocate()

    one.sleep()
    one.memory.wake()

    one.check()
    (line,) = [record.getMessage() for record in caplog.records]
    assert "event=host_memory_not_pinned" in line
    assert "ulimit -l unlimited" in line
    finish(cuda, one)


def test_a_sleep_without_host_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without host memory a sleep leaves the model awake, and says how much it needs."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    one.allocate(16), one.allocate(16)
    made = cuda_memory.HostCopy
    left = [1]

    def scarce(driver: Driver, nbytes: int) -> cuda_memory.HostCopy:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("Cannot allocate memory")
        return made(driver, nbytes)

    monkeypatch.setattr(cuda_memory, "HostCopy", scarce)
    with pytest.raises(NoRoom, match=r"no host memory for 2.0 MiB of weights asleep: .*allocate"):
        one.sleep()

    assert not one.memory.is_asleep
    assert 0 == one.memory.host_bytes
    one.check()
    finish(cuda, one)


def test_kv_memory_of_another_size_gets_a_copy_of_another_size() -> None:
    """KV memory that is copied may change from sleep to sleep, and the host's copy follows."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    address = one.allocate(4, KV)
    one.sleep()
    one.memory.wake()
    one.tags[address] = WEIGHTS
    one.step()

    one.sleep()
    one.memory.wake()

    one.check()
    assert 4 * STEP == one.memory.host_bytes
    finish(cuda, one)


def test_memory_tells_what_it_holds() -> None:
    """The memory's text form shows what it holds, for logs and failed tests."""
    one = Tenant(FakeCuda())
    one.allocate(1)
    assert f"<ModelMemory awake segments=1 device={STEP} host=0>" == repr(one.memory)

    one.sleep()
    assert f"<ModelMemory asleep segments=1 device=0 host={STEP}>" == repr(one.memory)


# --- a wake in slices ---------------------------------------------------------------------------


def under_way(cuda: FakeCuda) -> int:
    """Return the bytes of copies that have started and were not waited for."""
    return sum(copy.nbytes for copies in cuda.streams.values() for copy in copies)


def test_a_wake_in_slices_ends_as_any_other() -> None:
    """Each slice takes its limit at most; contents and addresses match those of a whole wake."""
    cuda = FakeCuda()
    one, other = Tenant(cuda), Tenant(cuda, seed=2)
    one.allocate(1), one.allocate(7), one.allocate(5, KV)
    other.allocate(3)
    one.sleep()
    told = []
    while not one.memory.progress.is_done:
        before = cuda.used
        told.append(one.memory.wake_some(3 * STEP).done_bytes)
        assert cuda.used - before <= 3 * STEP
        assert under_way(cuda) <= 3 * STEP
        other.step()  # is served at the same time

    assert [3 * STEP, 5 * STEP, 8 * STEP, 10 * STEP, 13 * STEP] == told
    assert one.memory.is_asleep
    cuda.calls.clear()
    one.memory.wake()
    assert ["cuCtxGetCurrent", "cuStreamSynchronize"] == cuda.calls
    one.check(), other.check()
    finish(cuda, one, other)


def test_a_slice_is_a_chunk_at_least() -> None:
    """A slice is at least a chunk, or the wake would never end."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    one.allocate(5)
    one.sleep()

    assert CHUNK == one.memory.wake_some(1).done_bytes == cuda.used


def test_a_wake_goes_on_where_slices_have_come_to() -> None:
    """A wake continues where slices stopped, and copies nothing twice."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    one.allocate(8), one.allocate(4, KV)
    one.sleep()
    one.memory.wake_some(6 * STEP)
    cuda.calls.clear()

    one.memory.wake()

    assert 3 == cuda.calls.count("cuMemCreate")
    one.check()
    one.sleep()
    one.memory.wake()
    one.check()
    finish(cuda, one)


def test_a_wake_that_is_given_up_gives_back_what_it_has_taken() -> None:
    """A cancelled wake releases what it took, in slices if wanted; nothing of the model is lost."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    one.allocate(8), one.allocate(4, KV)
    one.sleep()
    one.memory.wake_some(9 * STEP)

    assert [4 * STEP, 0, 0] == [one.memory.give_up_wake(3 * STEP) for _ in range(3)]
    assert 0 == cuda.used
    assert (0, 12 * STEP) == (one.memory.progress.done_bytes, one.memory.progress.total_bytes)
    one.memory.wake_some(9 * STEP)
    assert 0 == one.memory.give_up_wake()
    assert 0 == cuda.used
    one.memory.wake()
    one.check()
    finish(cuda, one)


def test_a_slice_leaves_others_what_they_need() -> None:
    """Without room for both, it releases what earlier slices took, and reports what it needs."""
    cuda = FakeCuda(total=16 * STEP)
    one = Tenant(cuda)
    one.allocate(8)
    one.sleep()
    cuda.calls.clear()
    one.memory.wake_some(6 * STEP, spare_bytes=10 * STEP)
    # A step waits for the slice, and the query takes time: once per slice, not once per chunk.
    assert (3, 1) == (cuda.calls.count("cuMemCreate"), cuda.calls.count("cuMemGetInfo_v2"))

    with pytest.raises(
        NoRoom, match=r"1.0 MiB are free, 0.6 MiB of them reserved for .* still asleep"
    ):
        one.memory.wake_some(6 * STEP, spare_bytes=10 * STEP)

    assert one.memory.is_asleep
    assert 0 == cuda.used
    one.memory.wake()
    one.check()


def test_another_process_may_take_the_memory_between_two_slices() -> None:
    """If another process takes the memory, the model stays asleep, and holds nothing."""
    cuda = FakeCuda(total=10 * STEP)
    one = Tenant(cuda)
    one.allocate(8)
    one.sleep()
    one.memory.wake_some(4 * STEP)
    cuda.others = 5 * STEP

    with pytest.raises(NoRoom, match="still asleep"):
        one.memory.wake_some(4 * STEP)

    assert cuda.others == cuda.used
    cuda.others = 0
    one.memory.wake()
    one.check()
    finish(cuda, one)


@pytest.mark.parametrize("end", ["free", "close", "sleep"])
def test_a_model_may_be_told_anything_in_the_middle_of_a_wake(end: str) -> None:
    """In a wake a model may be freed, closed or put to sleep; what was taken goes or stays."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    first, _ = one.allocate(6), one.allocate(4, KV)
    one.sleep()
    one.memory.wake_some(3 * STEP)
    match end:
        case "free":
            one.free(first)
        case "close":
            one.memory.close()
            one.content.clear()
        case _:
            one.sleep()
    check_books(cuda, one)
    one.memory.wake()
    one.check()
    finish(cuda, one)


def test_there_is_nothing_to_be_done_for_a_model_that_is_awake() -> None:
    """Neither slices nor a cancelled wake touch the memory of an awake model."""
    cuda = FakeCuda()
    one = Tenant(cuda)
    one.allocate(3)

    assert one.memory.wake_some(STEP).is_done
    assert 0 == one.memory.give_up_wake()

    assert 3 * STEP == cuda.used
    one.check()


# --- failing calls ------------------------------------------------------------------------------


def allocate(one: Tenant) -> None:
    one.allocate(2)


def sleep(one: Tenant) -> None:
    one.sleep()


def sleep_again(one: Tenant) -> None:
    one.sleep()
    one.memory.wake()
    one.step()
    one.train()
    one.sleep()


def wake(one: Tenant) -> None:
    one.sleep()
    one.memory.wake()


def wake_in_slices(one: Tenant) -> None:
    one.sleep()
    while not one.memory.wake_some(CHUNK).is_done:
        pass
    one.memory.wake()


def give_up(one: Tenant) -> None:
    one.sleep()
    one.memory.wake_some(3 * STEP)
    while one.memory.give_up_wake(CHUNK):
        pass


def free(one: Tenant) -> None:
    one.free(next(iter(one.content)))


def free_asleep(one: Tenant) -> None:
    one.sleep()
    one.free(next(iter(one.content)))


def close(one: Tenant) -> None:
    one.sleep()
    one.memory.wake()
    one.memory.close()
    one.content.clear()


def close_asleep(one: Tenant) -> None:
    one.sleep()
    one.memory.close()
    one.content.clear()


def failures(do: Callable[[Tenant], None]) -> Iterator[str]:
    """Make each driver call of `do` fail once, on a new device each time; yield their names."""
    for place in range(1000):
        cuda = FakeCuda()
        one, other = Tenant(cuda), Tenant(cuda, seed=2)
        for tenant in (other, one):
            tenant.allocate(2), tenant.allocate(1), tenant.allocate(3, KV)
        cuda.fails_at = place
        with suppress(DriverError, NoRoom):
            do(one)
        if cuda.failed is None:
            return
        yield cuda.failed
        cuda.fails_at = None
        check_books(cuda, one, other)
        one.check()
        other.check()
        # Nothing is lost: the failed operation succeeds the next time.
        if one.content and not one.memory.is_asleep:
            one.sleep()
        one.memory.wake()
        one.check()
        other.sleep()
        other.memory.wake()
        other.check()
        check_books(cuda, one, other)
        finish(cuda, one, other)
    raise AssertionError("it never ends")


@pytest.mark.parametrize(
    ("do", "calls"),
    [
        (allocate, {"cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess"}),
        (
            sleep,
            {
                "cuCtxSynchronize",
                "cuMemHostRegister_v2",
                "cuStreamCreate",
                "cuMemcpyDtoHAsync_v2",
                "cuStreamSynchronize",
                "cuMemUnmap",
                "cuMemRelease",
            },
        ),
        (sleep_again, {"cuMemcpyDtoHAsync_v2", "cuMemUnmap"}),
        (
            wake,
            {
                "cuMemCreate",
                "cuMemMap",
                "cuMemSetAccess",
                "cuMemcpyHtoDAsync_v2",
                "cuMemsetD8Async",
                "cuStreamSynchronize",
            },
        ),
        (wake_in_slices, {"cuMemCreate", "cuMemMap", "cuMemcpyHtoDAsync_v2", "cuMemsetD8Async"}),
        (give_up, {"cuStreamSynchronize", "cuMemUnmap", "cuMemRelease"}),
        (free, {"cuCtxSynchronize", "cuMemUnmap", "cuMemRelease", "cuMemAddressFree"}),
        (free_asleep, {"cuMemHostUnregister", "cuMemAddressFree"}),
        (close, {"cuMemHostUnregister", "cuMemUnmap", "cuMemRelease", "cuMemAddressFree"}),
        (close_asleep, {"cuMemHostUnregister", "cuMemAddressFree", "cuStreamDestroy_v2"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_driver_call_that_fails_once_costs_nobody_anything(
    do: Callable[[Tenant], None], calls: set[str]
) -> None:
    """After one failing call, wherever it is, others are intact, and the next attempt succeeds."""
    assert calls <= set(failures(do))


# --- any order ----------------------------------------------------------------------------------

ACTIONS = (
    "allocate",
    "allocate kv",
    "free",
    "sleep",
    "wake",
    "step",
    "train",
    "close",
    "others",
    "wake some",
    "give up",
)
Action = tuple[str, int, int]


class World:
    """Several models on a device with a limit; one action after the other."""

    def __init__(self, models: int, total: int) -> None:
        self.cuda = FakeCuda(total=total)
        self.tenants = [Tenant(self.cuda, seed=number) for number in range(models)]

    def act(self, action: Action) -> None:
        name, who, number = action
        tenant = self.tenants[who % len(self.tenants)]
        before = self.cuda.copied
        wanted = tenant.to_be_copied()
        asleep = tenant.memory.is_asleep
        try:
            self._do(name, tenant, number)
        except (DriverError, NoRoom):
            assert name in ("allocate", "allocate kv", "wake", "wake some")
            assert asleep == tenant.memory.is_asleep
        else:
            copies = name == "sleep" and not asleep
            assert (wanted if copies else 0) == self.cuda.copied - before
        for each in self.tenants:
            each.check()
        check_books(self.cuda, *self.tenants)

    def _do(self, name: str, tenant: Tenant, number: int) -> None:
        match name:
            case "wake":
                tenant.memory.wake()
            case "wake some":
                tenant.memory.wake_some(number % 9 * STEP, STEP)
            case "give up":
                tenant.memory.give_up_wake(number % 9 * STEP)
            case "free" if tenant.content:
                tenant.free(sorted(tenant.content)[number % len(tenant.content)])
            case "close":
                tenant.memory.close()
                tenant.content.clear()
                tenant.saved.clear()
            case "others":
                self.cuda.others = STEP * (number % 4)
                self.cuda.others = min(self.cuda.others, self.cuda.total - self.cuda.used)
            case _ if not tenant.memory.is_asleep:
                self._do_awake(name, tenant, number)

    def _do_awake(self, name: str, tenant: Tenant, number: int) -> None:
        match name:
            case "allocate":
                tenant.allocate(1 + number % 4)
            case "allocate kv":
                tenant.allocate(1 + number % 4, KV)
            case "sleep":
                tenant.sleep()
            case "step":
                tenant.step()
            case "train":
                tenant.train()

    def end(self) -> None:
        finish(self.cuda, *self.tenants)


@given(
    st.lists(
        st.tuples(st.sampled_from(ACTIONS), st.integers(0, 3), st.integers(0, 99)), max_size=40
    ),
    st.integers(1, 4),
    st.integers(4, 30),
)
@settings(max_examples=examples(60), deadline=None)
def test_models_keep_what_is_theirs_in_any_order(
    actions: list[Action], models: int, steps: int
) -> None:
    """Models keep their contents; the limit is never exceeded, and nothing is left at the end."""
    world = World(models, steps * STEP)
    for action in actions:
        world.act(action)
    world.end()


def test_every_byte_is_accounted_for_over_a_thousand_operations() -> None:
    """Every byte of four models is accounted for, in random order, with occasional closes."""
    chance = random.Random(4)  # noqa: S311
    weights = [20, 10, 8, 20, 20, 10, 5, 1, 6, 20, 5]
    world = World(4, 40 * STEP)
    for _ in range(1000):
        (name,) = chance.choices(ACTIONS, weights)
        world.act((name, chance.randrange(4), chance.randrange(100)))
    assert world.cuda.calls.count("cuMemcpyHtoDAsync_v2") > 100
    world.end()


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=8),
    st.integers(0, 40),
    st.integers(1, 40),
)
def test_a_range_is_what_is_inside_and_what_is_outside(
    ranges: list[Range], start: int, nbytes: int
) -> None:
    """A range is its inside and outside parts, for all ranges, overlapping ones too."""
    covered = {place for low, size in ranges for place in range(low, low + size)}
    whole = set(range(start, start + nbytes))
    united = merged(ranges)

    def places(found: Iterator[Range]) -> list[int]:
        return [place for low, size in found for place in range(low, low + size)]

    assert sorted(covered) == places(iter(united))
    assert sorted(whole & covered) == places(cuda_memory.inside((start, nbytes), united))
    assert sorted(whole - covered) == places(cuda_memory.outside((start, nbytes), united))
