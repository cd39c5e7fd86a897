"""What the bus tests share."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from hostpassd import names
from hostpassd.bus.router import Batch, Router
from hostpassd.bus.spec import Specification
from tests.bus.busd import Client, PrivateBus, brokers
from tests.bus.fakebus import FakeBus
from tests.bus.told import DEVICE, MANAGER, MANAGER_PATH, NET, ONE, TWO, device, manager, net

NewClient = Callable[[int], Awaitable[Client]]


@pytest.fixture(scope="session")
def specification() -> Specification:
    """The shipped one."""
    return Specification.load()


BROKERS, WHY_NOT_ALL = brokers()


def pytest_report_header() -> str:
    """Says on which message buses the tests run, and why not on others."""
    return f"message buses: {', '.join(BROKERS)}{WHY_NOT_ALL and f' ({WHY_NOT_ALL})'}"


@pytest.fixture(params=BROKERS)
def broker(request: pytest.FixtureRequest) -> str:
    """Each of the programs that are a message bus."""
    return str(request.param)


@pytest.fixture
def bus(broker: str) -> Iterator[PrivateBus]:
    """A private bus."""
    with PrivateBus(broker=broker) as private:
        yield private


@pytest.fixture
async def router(bus: PrivateBus, specification: Specification) -> AsyncIterator[Router]:
    """A router that owns the name."""
    made = Router(specification, log=logging.getLogger("hostpassd"))
    await made.connect(bus.address)
    await made.own_name(names.BUS_NAME)
    yield made
    await made.close()


@pytest.fixture
def served(router: Router) -> Router:
    """A router with the Manager and two devices."""
    router.publish(Batch(added={MANAGER_PATH: {MANAGER: manager()}}))
    router.publish(Batch(added={ONE: {DEVICE: device()}, TWO: {DEVICE: device(Kind="net"), NET: net()}}))
    return router


@pytest.fixture
async def new_client(bus: PrivateBus) -> AsyncIterator[NewClient]:
    """Makes callers: await new_client(uid)."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(uid: int) -> Client:
            client = Client(uid)
            await client.start(bus.address)
            stack.push_async_callback(client.stop)
            return client

        yield make


@pytest.fixture
async def client(new_client: NewClient) -> Client:
    """A caller that is nobody."""
    return await new_client(65534)


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeBus]:
    """A bus that the test plays."""
    async with FakeBus(tmp_path).serving() as made:
        yield made


@pytest.fixture
async def alone(fake: FakeBus, specification: Specification) -> AsyncIterator[Router]:
    """A router on it."""
    made = Router(specification, log=logging.getLogger("hostpassd"))
    await made.connect(fake.address)
    yield made
    await made.close()
