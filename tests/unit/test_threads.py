"""Calls made in a thread, in order."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import pytest

from hostpassd.base.threads import InOrder


def test_calls_are_made_in_order_in_one_thread_which_ends_when_nobody_can_make_one_any_more() -> None:
    made: list[int] = []
    in_order = InOrder("some")
    futures = [in_order.submit(made.append, number) for number in range(100)]
    thread = in_order.submit(threading.current_thread).result(60)
    assert all(future.done() for future in futures) and made == list(range(100))
    assert thread.name == "some" and thread is not threading.current_thread()
    del in_order
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_an_error_is_its_callers_and_what_was_cancelled_is_left_out() -> None:
    in_order, go_on = InOrder("some"), threading.Event()
    in_order.submit(go_on.wait)
    wrong, cancelled = in_order.submit(lambda: 1 // 0), in_order.submit(lambda: 1)
    cancelled.cancel()
    go_on.set()
    with pytest.raises(ZeroDivisionError):
        wrong.result(60)
    assert in_order.submit(lambda: 2).result(60) == 2


def test_a_call_that_hangs_does_not_keep_the_process() -> None:
    program = (
        "from hostpassd.base.threads import InOrder; import threading; InOrder('x').submit(threading.Event().wait)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
