"""A small thread pool for chains of NumPy calls, which release the interpreter lock while they run.

Two things decide whether a second thread helps at all:

* The length of a call, and what is done between calls. A thread that finds the interpreter lock taken sleeps, and
  waking it takes tens of microseconds. So calls should last longer than that, and everything that can be prepared
  (cutting arrays, above all) should be, before any thread begins.
* The processor. Linux likes to wake a thread where it ran last, or on the processor of the thread that woke it; with
  few processors it may leave both on one for seconds while the other idles. Libraries whose threads spin while they
  wait never meet this. A Python thread cannot spin without the lock, so the pool's threads are told to keep off the
  processor that the caller is on.
"""

from __future__ import annotations

import collections
import contextvars
import ctypes
import functools
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

__all__ = ["InOrder", "run_ahead", "run_tasks"]

THREADS = 4  # at most, the calling one included

Task = TypeVar("Task")
Result = TypeVar("Result")


class _Submitted:
    """Work for a thread of the pool, which runs it with the caller's NumPy settings: they belong to the context."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._work, self._context = work, contextvars.copy_context()
        self._claimed, self._unfinished = threading.Lock(), threading.Lock()
        self._unfinished.acquire()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the work, unless it has been taken back. For the threads."""
        if not self._claimed.acquire(blocking=False):
            return
        try:
            self._context.run(self._work)
        except BaseException as error:
            self._error = error
        finally:
            del self._work, self._context
            self._unfinished.release()

    def take_back(self) -> bool:
        """Return whether no thread has begun; none will then, nor keep alive what the work refers to."""
        if not self._claimed.acquire(blocking=False):
            return False
        del self._work, self._context  # the rest stays in the queue until a thread throws it away
        return True

    def wait(self) -> None:
        """Return when it is done. Raises what it raised."""
        with self._unfinished:
            if self._error is not None:
                raise self._error


class _Pool:
    """The sleeping threads, one fewer than there are processors to use.

    They wait at one queue. An executor of the standard library would do, but makes a future and its condition for every
    piece of work, and most of that on the caller's way to its own share.
    """

    def __init__(self, processors: set[int]) -> None:
        movable = hasattr(os, "sched_setaffinity")  # Linux

        self.workers = min(len(processors), THREADS) - 1
        self._processors = processors
        self._avoided = -1
        self._current_processor = getattr(ctypes.CDLL(None), "sched_getcpu", None) if movable else None
        self._queue: queue.SimpleQueue[_Submitted] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._starting = threading.Lock()

    def submit(self, work: Callable[[], object]) -> _Submitted | None:
        """Start `work` on a thread, away from the caller's processor; None where no thread can be had any more."""
        if len(self._threads) < self.workers and not self._start():
            return None
        if self._current_processor is not None:
            self._avoid(self._current_processor())
        submitted = _Submitted(work)
        self._queue.put(submitted)
        return submitted

    def _start(self) -> bool:
        """Start one more thread, and return whether there is any."""
        with self._starting:
            if len(self._threads) < self.workers:
                thread = threading.Thread(target=_serve, args=(self._queue,), name="gpulayers", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # the interpreter is shutting down, or the system gives no more threads
                    return bool(self._threads)
                self._threads.append(thread)
                self._avoided = -1
        return True

    def _avoid(self, processor: int) -> None:
        if processor == self._avoided:
            return
        try:
            for thread in self._threads:
                os.sched_setaffinity(thread.native_id or 0, self._processors - {processor})
            self._avoided = processor
        except OSError:  # the system forbids it, or the processors have changed: threads run where it puts them
            self._current_processor = None


def _serve(waiting: queue.SimpleQueue[_Submitted]) -> None:
    """Work off a queue for ever. The interpreter, when it ends, does not wait for a thread that does."""
    while True:
        waiting.get().run()


@functools.cache
def _pool() -> _Pool | None:
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return _Pool(processors) if len(processors) > 1 else None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has no threads


def run_tasks(
    work: Callable[[Task], Result], tasks: Sequence[Task], threaded: bool, backwards: bool = False
) -> list[Result]:
    """Call `work` on every task and return the results in the order of the tasks.

    The threads take the next task when they are done with one: `backwards` from the last to the first. `threaded` False
    keeps to the calling thread.

    >>> run_tasks(abs, [-1, 2, -3], threaded=True)
    [1, 2, 3]
    """
    results: list[Any] = [None] * len(tasks)
    waiting = collections.deque(range(len(tasks)))
    take = waiting.pop if backwards else waiting.popleft

    def work_off() -> None:
        while True:
            try:
                index = take()
            except IndexError:
                return
            results[index] = work(tasks[index])

    pool = _pool() if threaded and len(tasks) > 1 else None
    submitted: list[_Submitted | None] = []
    try:
        if pool is not None:
            submitted += [pool.submit(work_off) for _ in range(pool.workers)]
        work_off()
    finally:
        waiting.clear()  # after an error nobody begins another task
        for each in submitted:
            if each is not None and not each.take_back():  # one that has not begun would find nothing to do
                each.wait()
    return results


def run_ahead(works: Sequence[Callable[[], object]]) -> Iterator[None]:
    """Start `works` on a thread of the pool, one after the other; each `next` of the result waits for one more.

    What no thread has begun by then is done by the one who asks, one work at a time. A thread does next to nothing
    between two works, so that the one who asks seldom meets it at the interpreter lock. It stops when nobody can ask
    any more.

    >>> made = []
    >>> for number, _ in enumerate(run_ahead([functools.partial(made.append, name) for name in "abc"])):
    ...     made[number]
    'a'
    'b'
    'c'
    """
    return _Ahead(works)


class _Ahead(Iterator[None]):
    def __init__(self, works: Sequence[Callable[[], object]]) -> None:
        self._works = list(zip(works, [threading.Lock() for _ in works], strict=True))
        self._asked = 0
        self._failed: list[bool] = []
        self._given_up: list[bool] = []
        for _, unfinished in self._works:
            unfinished.acquire()
        pool = _pool() if works else None
        work_off = functools.partial(_work_ahead, self._works, self._failed, self._given_up)
        self._submitted = None if pool is None else pool.submit(work_off)

    def __next__(self) -> None:
        if self._asked == len(self._works):
            raise StopIteration
        work, unfinished = self._works[self._asked]
        self._asked += 1
        if self._submitted is not None and not unfinished.acquire(blocking=False):
            if self._submitted.take_back():
                self._submitted = None
            else:
                unfinished.acquire()
        if self._submitted is None:
            work()
        elif self._failed:
            self._submitted.wait()

    def __del__(self) -> None:
        self._given_up.append(True)


def _work_ahead(works: list[tuple[Callable[[], object], Any]], failed: list[bool], given_up: list[bool]) -> None:
    for work, unfinished in works:
        if given_up:
            return
        try:
            work()
        except BaseException:
            failed.append(True)
            raise
        finally:
            unfinished.release()


class InOrder:
    """Calls that another thread makes one after the other, in the order given, while the caller goes on.

    Without a pool, nothing is called before `finish`.

    >>> made = []
    >>> calls = InOrder()
    >>> for number in range(3):
    ...     calls.add(functools.partial(made.append, number))
    >>> calls.finish()
    >>> made
    [0, 1, 2]
    """

    def __init__(self) -> None:
        self._pool = _pool()
        self._lock = threading.Lock()
        self._waiting: collections.deque[Callable[[], object]] = collections.deque()
        self._submitted: list[_Submitted | None] = []
        self._running = self._pool is None

    def add(self, work: Callable[[], object]) -> None:
        """Have `work` called after all that was added before."""
        with self._lock:
            self._waiting.append(work)
            start, self._running = not self._running, True
        if start and self._pool is not None:
            self._submitted.append(self._pool.submit(self._work_off))

    def finish(self) -> None:
        """Return when all has been called; what no thread has begun is called here. Raises what a call raised."""
        for each in self._submitted:
            if each is not None and not each.take_back():
                each.wait()
        self._work_off()

    def _work_off(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return
                work = self._waiting.popleft()
            work()
