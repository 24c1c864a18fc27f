"""Talk over a line: what one end tells, a handler at the other end hears, in order; what it asks is answered.

Both ends beat, so that one that is stopped is noticed as one that died is. Whatever ends the talk, `on_end` is called
once, with a WorkerLost that names the rank.

Threads: one that reads, one that beats, and a pool that answers, since some answers take a while.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tercet.distributed.line import Line, Message
from tercet.errors import WorkerLost, as_named, from_wire

BEAT_S = 0.25
SILENT_S = 3.0  # of a rank that beats every BEAT_S, or takes nothing: it is stopped, or its host is
ANSWERS = 8  # at once

Handler = Callable[..., Any]


class Talk:
    def __init__(self, line: Line, on_end: Callable[[WorkerLost], None]) -> None:
        """on_end: called on any thread; must be quick."""
        self.rank = line.rank  # at the other end
        self._line, self._on_end = line, on_end
        self._told: Mapping[str, Handler] = {}
        self._asked: Mapping[str, Handler] = {}
        self._numbers = itertools.count()
        self._awaited: dict[int, Future[Any]] = {}
        self._changing = threading.Lock()
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(ANSWERS, thread_name_prefix=f"rank-{line.rank}-answers")

    @property
    def over(self) -> bool:
        """The other end is gone, or this one was closed."""
        return self._over.is_set()

    def start(self, told: Mapping[str, Handler], asked: Mapping[str, Handler]) -> None:
        """told: kind of message -> who hears it, on the reading thread; must be quick. asked: kind of question -> whose
        result answers it, on a thread of a pool; what it raises is raised where it was asked."""
        self._told, self._asked = told, asked
        self._line.settimeout(SILENT_S)
        for work, name in ((self._read, "read"), (self._beat, "beat")):
            threading.Thread(target=work, name=f"rank-{self.rank}-{name}", daemon=True).start()

    def tell(self, kind: str, *fields: Any) -> None:
        """Raises ProtocolViolation for a message that is too large. If the other end is gone, `on_end` is called, and
        nothing raised."""
        try:
            self._line.send(kind, *fields)
        except WorkerLost:
            self._line.close()  # the reading thread hears of the end behind what came before, which may be "stop"

    def ask(self, kind: str, *fields: Any, timeout_s: float) -> Any:
        """-> the answer. Raises what the handler raises, WorkerLost if the other end is gone or does not answer."""
        number, answer = next(self._numbers), Future[Any]()
        with self._changing:
            self._awaited[number] = answer
            over = self._over.is_set()
        try:
            if over:
                raise WorkerLost(f"rank {self.rank} of the group is gone")
            self.tell("ask", number, kind, *fields)
            return answer.result(timeout_s)
        except TimeoutError as error:
            raise WorkerLost(f"rank {self.rank} of the group did not answer {kind} in {timeout_s:g} s") from error
        finally:
            with self._changing:
                self._awaited.pop(number, None)

    def close(self) -> None:
        """End it from here, without `on_end`."""
        self._finish(WorkerLost(f"the talk with rank {self.rank} of the group was closed"))
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ---- threads

    def _read(self) -> None:
        try:
            while True:
                self._hear(self._line.receive())
        except WorkerLost as error:
            self._end(error)
        except Exception as error:  # noqa: BLE001  # a message that no handler takes, or a handler that fails
            self._end(WorkerLost(f"rank {self.rank} of the group sent what is not understood: {error!r}"))
        finally:
            self._line.dispose()

    def _hear(self, message: Message) -> None:
        kind, *fields = message
        match kind:
            case "beat":
                pass
            case "ask":
                number, question, *rest = fields
                self._pool.submit(self._answer, number, question, *rest)
            case "answer":
                self._answered(*fields)
            case _:
                self._told[kind](*fields)

    def _answer(self, number: int, kind: str, *fields: Any) -> None:
        try:
            self.tell("answer", number, self._asked[kind](*fields), None)
        except Exception as error:  # noqa: BLE001  # whatever it is, who asked must hear
            named = as_named(error, kind)
            self.tell("answer", number, None, [named.code(), str(named)])

    def _answered(self, number: int, value: Any, error: list[str] | None) -> None:
        with self._changing:
            awaited = self._awaited.pop(number, None)
        if awaited is None:
            return  # it came too late
        if error is None:
            awaited.set_result(value)
        else:
            awaited.set_exception(from_wire(*error))

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            self.tell("beat")

    def _end(self, error: WorkerLost) -> None:
        if self._finish(error):
            self._on_end(error)

    def _finish(self, error: WorkerLost) -> bool:
        """Nothing is said any more, and who waits for an answer gets the error. False: it was over before."""
        with self._changing:
            if self._over.is_set():
                return False
            self._over.set()
            awaited = list(self._awaited.values())
            self._awaited.clear()
        self._line.close()
        for answer in awaited:
            answer.set_exception(error)
        return True
