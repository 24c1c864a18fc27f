"""Calls into library code that may never return, each with a deadline. Ray's own timeouts are not reliable.

Such a call runs on a daemon thread, so the caller can still handle signals. A thread cannot be killed: one that misses
its deadline keeps running, and the process must then exit without joining it (`cli.main` asks `left_behind`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from tercet.errors import ClusterError

T = TypeVar("T")

_left_behind = threading.Event()
_running: set[Future[Any]] = set()  # calls that have not returned, also those that nobody waits for any more


def call(what: str, timeout_s: float, function: Callable[..., T], *args: object) -> T:
    """The function's result, or what it raises; ClusterError `what did not end in ... s` if it takes longer."""
    future = start(function, *args)
    try:
        concurrent.futures.wait([future], timeout_s)
        if not future.done():
            raise _late(what, timeout_s)
        return future.result()
    finally:
        _note(future)


async def wait(what: str, timeout_s: float, function: Callable[..., T], *args: object) -> T:
    """`call` for an event loop. If it is cancelled, the function runs on and is left behind likewise."""
    running = start(function, *args)
    future = asyncio.wrap_future(running)
    try:
        await asyncio.wait([future], timeout=timeout_s)
        if not future.done():
            raise _late(what, timeout_s)
        return future.result()
    finally:
        future.cancel()
        _note(running)


async def settled(timeout_s: float) -> bool:
    """Whether all calls have returned, within that time: what they are inside may not be torn down before."""
    deadline = time.monotonic() + timeout_s
    while _running and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return not _running


def start(function: Callable[..., T], *args: object) -> Future[T]:
    """Run it on a daemon thread."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # so that it cannot be cancelled
    _running.add(future)
    future.add_done_callback(_running.discard)

    def run() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001, it is raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="bounded", daemon=True).start()
    return future


def leave_behind() -> None:
    """Have this process end without the exit handlers of foreign code, as if a call to it had never returned."""
    _left_behind.set()


def left_behind() -> bool:
    """Whether a call missed its deadline in this process; its thread may still be inside foreign code."""
    return _left_behind.is_set()


def _note(running: Future[T]) -> None:
    if not running.done():
        _left_behind.set()


def _late(what: str, timeout_s: float) -> ClusterError:
    return ClusterError(f"{what} did not end in {timeout_s:g} s")
