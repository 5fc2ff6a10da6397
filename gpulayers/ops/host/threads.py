"""A small thread pool for chains of NumPy calls, which release the interpreter lock while they run.

Two things decide whether a second thread helps at all:

* The length of a call, and what is done between calls. A thread that finds the interpreter lock taken sleeps, and
  waking it takes some 50 us. So calls should last longer than that, and everything that can be prepared (cutting
  arrays, above all) should be, before any thread begins.
* The processor. Linux likes to wake a thread where it ran last, or on the processor of the thread that woke it; with
  few processors it may leave both on one for seconds while the other idles. Libraries whose threads spin while they
  wait never meet this. A Python thread cannot spin without the lock, so the pool's threads are told to keep off the
  processor that the caller is on.
"""

from __future__ import annotations

import collections
import contextvars
import functools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["InOrder", "run_ahead", "run_tasks"]

THREADS = 4  # at most, the calling one included

BUFFER = 1024
"""Elements of NumPy's buffers. Where one holds several rows of an operation that broadcasts one number along each row,
NumPy first writes the numbers out into a buffer, at a third of the speed; rows of at least this length escape it."""

Task = TypeVar("Task")
Result = TypeVar("Result")


class _Submitted:
    """Work for a thread of the pool, which runs it with the caller's NumPy error state."""

    future: Future[None]

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = [work]

    def run(self) -> None:
        for work in self.work:
            work()

    def take_back(self) -> bool:
        """Return whether no thread has begun; none will then, nor keep alive what the work refers to."""
        if self.future.cancel():
            self.work.clear()  # the cancelled future itself waits for a thread that throws it away
            return True
        return False

    def wait(self) -> None:
        """Return when it is done. Raises what it raised."""
        self.future.result()


class _Pool:
    """The sleeping threads, one fewer than there are processors to use."""

    def __init__(self, processors: set[int]) -> None:
        import ctypes  # these two cost a tenth of the package's import time, for large arrays only
        from concurrent.futures import ThreadPoolExecutor

        movable = hasattr(os, "sched_setaffinity")  # Linux

        self.workers = min(len(processors), THREADS) - 1
        self._processors = processors
        self._identities: list[int] = []
        self._avoided = -1
        self._current_processor = getattr(ctypes.CDLL(None), "sched_getcpu", None) if movable else None
        self._executor: ThreadPoolExecutor = ThreadPoolExecutor(
            self.workers, "gpulayers", initializer=lambda: self._identities.append(threading.get_native_id())
        )

    def submit(self, work: Callable[[], object]) -> _Submitted | None:
        """Start `work` on a thread, away from the caller's processor; None where no thread can be had any more."""
        if self._current_processor is not None:
            self._avoid(self._current_processor())
        submitted = _Submitted(work)
        try:
            submitted.future = self._executor.submit(contextvars.copy_context().run, submitted.run)
        except RuntimeError:  # the interpreter is shutting down, or the system gives no more threads
            submitted.work.clear()
            return None
        return submitted

    def _avoid(self, processor: int) -> None:
        if processor == self._avoided or len(self._identities) < self.workers:
            return
        try:
            for identity in self._identities:
                os.sched_setaffinity(identity, self._processors - {processor})
            self._avoided = processor
        except OSError:  # the system forbids it, or the processors have changed: threads run where it puts them
            self._current_processor = None


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

    The threads take the next task when they are done with one: `backwards` from the last to the first. Floating-point
    warnings are off inside. `threaded` False keeps to the calling thread.

    >>> run_tasks(abs, [-1, 2, -3], threaded=True)
    [1, 2, 3]
    """
    results: list[Any] = [None] * len(tasks)
    waiting = collections.deque(range(len(tasks)))
    take = waiting.pop if backwards else waiting.popleft

    def work_off() -> None:
        # NumPy keeps both settings per thread. Infinities and NaN pass through silently.
        buffer = np.setbufsize(BUFFER)
        try:
            with np.errstate(all="ignore"):
                while True:
                    try:
                        index = take()
                    except IndexError:
                        return
                    results[index] = work(tasks[index])
        finally:
            np.setbufsize(buffer)

    pool = _pool() if threaded and len(tasks) > 1 else None
    submitted = [] if pool is None else [pool.submit(work_off) for _ in range(pool.workers)]
    try:
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
