"""The thread pool of the NumPy bodies: order, errors, settings, and where its threads run."""

import gc
import os
import threading
import time
import weakref

import numpy as np
import pytest

from gpulayers.ops.host import threads as host_threads
from gpulayers.ops.host.settings import BUFFER, quiet
from gpulayers.ops.host.threads import InOrder, run_ahead, run_tasks


@pytest.fixture
def pool(monkeypatch):
    """A pool of two threads beside the caller, whatever the machine has."""
    made = host_threads._Pool({0, 1, 2})
    monkeypatch.setattr(host_threads, "_pool", lambda: made)
    monkeypatch.setattr(os, "sched_setaffinity", lambda identity, processors: None, raising=False)
    return made


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("backwards", [True, False])
def test_results_are_in_the_order_of_the_tasks(pool, threaded, backwards):
    started = []

    def work(task):
        started.append(task)
        time.sleep(0.001 * (task % 3))
        return task * task

    assert run_tasks(work, range(20), threaded, backwards) == [task * task for task in range(20)]
    assert sorted(started) == list(range(20))
    if not threaded:
        assert started == sorted(started, reverse=backwards)


def test_tasks_run_on_several_threads(pool):
    meeting = threading.Barrier(3, timeout=20)
    assert len(set(run_tasks(lambda _: (meeting.wait(), threading.get_ident())[1], range(3), True))) == 3


@pytest.mark.parametrize("threaded", [True, False])
def test_an_error_reaches_the_caller(pool, threaded):
    def work(task):
        if task == 11:
            raise ZeroDivisionError("task 11")
        time.sleep(0.001)

    with pytest.raises(ZeroDivisionError, match="task 11"):
        run_tasks(work, range(20), threaded)
    assert run_tasks(abs, [-1, -2, -3], threaded) == [1, 2, 3]


def numpy_settings():
    return tuple(np.geterr().values()), np.getbufsize()


def test_numpy_settings_of_the_caller_hold_on_every_thread(pool):
    seen = quiet(run_tasks)(lambda _: (time.sleep(0.001), *numpy_settings())[1:], range(12), True)
    assert set(seen) == {(("ignore",) * 4, BUFFER)}
    with np.errstate(divide="raise"):
        seen = run_tasks(lambda _: (time.sleep(0.001), *numpy_settings())[1:], range(12), True)
        assert set(seen) == {numpy_settings()}


def test_numpy_settings_are_as_before_after_an_error():
    before = numpy_settings()

    @quiet
    def fail():
        np.seterr(all="warn")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert numpy_settings() == before
    assert quiet(numpy_settings)() == (("ignore",) * 4, BUFFER)


def test_workers_keep_off_the_callers_processor(pool, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda identity, processors: asked.append((identity, processors)))
    run_tasks(lambda _: time.sleep(0.002), range(12), True)  # both threads have begun after this
    for processor in (1, 1, 2):
        monkeypatch.setattr(pool, "_current_processor", lambda processor=processor: processor)
        run_tasks(lambda _: time.sleep(0.001), range(6), True)
    ours = [processors for identity, processors in asked if identity in [thread.native_id for thread in pool._threads]]
    assert ours[-4:] == [{0, 2}, {0, 2}, {0, 1}, {0, 1}]  # asked again only when the caller has moved
    assert threading.get_native_id() not in [identity for identity, _ in asked]


def test_a_system_that_forbids_it(pool, monkeypatch):
    run_tasks(lambda _: time.sleep(0.002), range(12), True)

    def refuse(identity, processors):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    monkeypatch.setattr(pool, "_current_processor", lambda: pool._avoided + 1)  # the caller has moved
    assert run_tasks(abs, [-1, 2], True) == [1, 2]
    assert pool._current_processor is None


def occupy(pool):
    """Keep all threads of the pool busy until the event is set that is returned."""
    gate, begun = threading.Event(), threading.Semaphore(0)
    for _ in range(pool.workers):
        pool.submit(lambda: (begun.release(), gate.wait(20)))
    for _ in range(pool.workers):
        assert begun.acquire(timeout=20)
    return gate


def test_work_ahead_is_done_on_another_thread_before_it_is_asked_for(pool):
    done = []
    waiting = run_ahead([lambda number=number: done.append((number, threading.get_ident())) for number in range(20)])
    while len(done) < 20:
        time.sleep(0.001)
    for _ in range(20):
        next(waiting)
    assert [number for number, _ in done] == list(range(20)) and next(waiting, "end") == "end"
    assert len({thread for _, thread in done}) == 1 and threading.get_ident() != done[0][1]


def test_one_waits_for_each_work_ahead(pool):
    gates = [threading.Event() for _ in range(3)]
    done = []
    waiting = run_ahead([lambda gate=gate: (gate.wait(20), time.sleep(0.01), done.append(gate)) for gate in gates])
    for number, gate in enumerate(gates):
        gate.set()
        next(waiting)
        assert done == gates[: number + 1]


def test_work_ahead_that_nobody_has_begun_is_done_by_the_one_who_asks(pool):
    gate, done = occupy(pool), []
    waiting = run_ahead([lambda number=number: done.append((number, threading.get_ident())) for number in range(3)])
    for number in range(3):
        next(waiting)
        assert done == [(each, threading.get_ident()) for each in range(number + 1)]
    gate.set()


def test_an_error_of_work_ahead_reaches_the_one_who_asks(pool):
    made = []
    waiting = run_ahead([lambda: made.append(0), lambda: 1 / 0, lambda: made.append(2)])
    with pytest.raises(ZeroDivisionError):
        list(waiting)
    assert made == [0]


def test_work_ahead_without_a_pool(monkeypatch):
    monkeypatch.setattr(host_threads, "_pool", lambda: None)
    done = []
    waiting = run_ahead([lambda number=number: done.append(number) for number in range(3)])
    assert next(waiting) is None and done == [0]
    assert list(waiting) == [None, None] and done == [0, 1, 2]


def test_work_that_is_taken_back_keeps_no_arrays_alive(pool):
    gate = occupy(pool)
    array = np.ones(10)
    kept = weakref.ref(array)
    run_tasks(lambda _, array=array: array.sum(), range(4), True)
    list(run_ahead([lambda array=array: array.sum()]))
    calls = InOrder()
    calls.add(lambda array=array: array.sum())
    calls.finish()
    del array, calls
    gc.collect()
    assert kept() is None
    gate.set()


@pytest.mark.parametrize("asked", [0, 1])
def test_work_ahead_that_nobody_waits_for_any_more_ends(pool, asked):
    done, gates = [], [threading.Event() for _ in range(100)]
    waiting = run_ahead([lambda gate=gate: (done.append(gate), gate.wait(20)) for gate in gates])
    while not done:  # else the one who asks first would do it all
        time.sleep(0.001)
    for gate in gates[:asked]:
        gate.set()
        next(waiting)
    while len(done) <= asked:
        time.sleep(0.001)
    del waiting
    for gate in gates:
        gate.set()
    run_tasks(lambda _: time.sleep(0.01), range(12), True)  # the thread is free again
    assert len(done) == asked + 1


@pytest.mark.parametrize("error", ["cannot schedule new futures after interpreter shutdown", "can't start new thread"])
def test_without_threads_the_caller_does_everything(pool, monkeypatch, error):
    def refuse(*_):
        raise RuntimeError(error)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert run_tasks(abs, [-1, -2, -3], True) == [1, 2, 3]
    made, calls = [], InOrder()
    for number in range(3):
        calls.add(lambda number=number: made.append(number))
    calls.finish()
    assert made == [0, 1, 2]
    assert list(run_ahead([lambda: made.append(3), lambda: made.append(4)])) == [None, None]
    assert made == [0, 1, 2, 3, 4]


def test_calls_in_order_on_another_thread(pool):
    calls, made = InOrder(), []
    for number in range(200):
        calls.add(lambda number=number: made.append((number, threading.get_ident())))
        if number % 50 == 0:
            time.sleep(0.01)  # the thread runs out of work, and is asked again
    calls.finish()
    assert [number for number, _ in made] == list(range(200))
    assert threading.get_ident() != made[0][1]


def test_calls_that_nobody_has_begun_are_made_by_the_one_who_finishes(pool):
    gate = occupy(pool)
    calls, made = InOrder(), []
    for number in range(3):
        calls.add(lambda number=number: made.append((number, threading.get_ident())))
    calls.finish()
    gate.set()
    assert made == [(number, threading.get_ident()) for number in range(3)]


def test_calls_in_order_without_a_pool(monkeypatch):
    monkeypatch.setattr(host_threads, "_pool", lambda: None)
    calls, made = InOrder(), []
    for number in range(3):
        calls.add(lambda number=number: made.append(number))
    assert made == []
    calls.finish()
    assert made == [0, 1, 2]


def test_an_error_of_a_call_in_order_reaches_the_one_who_finishes(pool):
    calls = InOrder()
    calls.add(lambda: 1 / 0)
    time.sleep(0.05)
    calls.add(lambda: None)
    with pytest.raises(ZeroDivisionError):
        calls.finish()


def test_work_ahead_has_the_callers_numpy_error_state(pool):
    with np.errstate(divide="raise"), pytest.raises(FloatingPointError):
        next(run_ahead([lambda: np.ones(3) / np.zeros(3)]))
