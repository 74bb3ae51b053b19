"""Requests that come while others are answered: JSON lines of a file or of stdin, each at its time."""

import contextlib
import heapq
import json
import math
import queue
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from .gguf_model import InputError

FIELDS = {
    "prompt": "the text",
    "id": "what the answer is called; else the line's number, from 0",
    "arrival": "seconds from the start; else at once",
    "max_new_tokens": "tokens to make, at most; else --max-new-tokens",
    "temperature": "of sampling; else 0, the likeliest token",
    "seed": "of sampling; else the line's number",
}
"""What a line may say of its request."""


@dataclass(frozen=True)
class Arrival:
    """A request as a line says it."""

    number: int  # of its line, from 0
    id: str | int
    prompt: str
    arrival: float
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Refusal:
    """A line that is no request."""

    number: int
    why: str


class Arrivals:
    """Requests in the order in which they come.

    Args:
        lines: JSON objects, one a line. Blank lines are passed over.
        max_new_tokens: Of requests that do not say.
        wait: Whether lines come one by one, as from a terminal: they are read by a thread of their own, so that none
            has to wait for the next.
    """

    def __init__(self, lines: Iterable[str], max_new_tokens: int, wait: bool = False):
        self._max_new_tokens, self._open = max_new_tokens, True
        self._read: queue.SimpleQueue[tuple[int, str] | Exception | None] = queue.SimpleQueue()
        self._later: list[tuple[float, int, Arrival | Refusal]] = []
        if wait:
            threading.Thread(target=self._read_all, args=(lines,), daemon=True).start()
        else:
            self._read_all(lines)

    @property
    def over(self) -> bool:
        """Whether no more will come."""
        return not self._open and not self._later

    def due(self, now: float) -> list[Arrival | Refusal]:
        """Takes what has come by now, in seconds since the start.

        Raises:
            InputError: the lines cannot be read.
        """
        while self._open:
            try:
                line = self._read.get_nowait()
            except queue.Empty:
                break
            self._take(line)
        found = []
        while self._later and self._later[0][0] <= now:
            found.append(heapq.heappop(self._later)[2])
        return found

    def wait(self, now: float) -> None:
        """Waits until the next is due, or a line is read, or there are no more. Raises as `due`."""
        pause = max(0.0, self._later[0][0] - now) if self._later else None
        if not self._open:
            time.sleep(pause or 0.0)
            return
        with contextlib.suppress(queue.Empty):  # the next is due
            self._take(self._read.get(timeout=pause))

    def _take(self, line: tuple[int, str] | Exception | None) -> None:
        if isinstance(line, Exception):
            raise InputError(f"requests must be lines of text in UTF-8, got: {line}") from line
        if line is None:
            self._open = False
            return
        number, text = line
        try:
            arrival = parse_line(text, number, self._max_new_tokens)
        except InputError as error:
            arrival = Refusal(number, str(error))
        heapq.heappush(self._later, (getattr(arrival, "arrival", 0.0), number, arrival))

    def _read_all(self, lines: Iterable[str]) -> None:
        number = 0
        try:
            for line in lines:
                if line.strip():
                    self._read.put((number, line))
                    number += 1
        except (OSError, UnicodeDecodeError) as error:  # raised where it is read, in the thread that answers
            self._read.put(error)
        self._read.put(None)


def parse_line(text: str, number: int, max_new_tokens: int) -> Arrival:
    """A request in JSON.

    Raises:
        InputError: it is none; the message says what must be otherwise.
    """
    try:
        said: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"a request must be a JSON object in one line, got {text.strip()!r}: {error}") from error
    if not isinstance(said, dict):
        raise InputError(f"a request must be a JSON object in one line, got {text.strip()!r}")
    if unknown := said.keys() - FIELDS.keys():
        raise InputError(f"a request must have no fields but {', '.join(FIELDS)}, got {', '.join(sorted(unknown))}")
    default = {"id": number, "arrival": 0, "max_new_tokens": max_new_tokens, "temperature": 0, "seed": number}
    said = default | said

    def refuse(name: str, requirement: str) -> NoReturn:
        raise InputError(f"{name} must be {requirement}, got {json.dumps(said.get(name))}")

    if not isinstance(said.get("prompt"), str):
        refuse("prompt", "a text")
    if type(said["id"]) not in (str, int):
        refuse("id", "a text or an integer")
    for name in ("arrival", "temperature"):
        if type(said[name]) not in (int, float) or not (said[name] >= 0 and math.isfinite(said[name])):
            refuse(name, "0 or a finite number above")
    if type(said["max_new_tokens"]) is not int:
        refuse("max_new_tokens", "an integer")
    if type(said["seed"]) is not int or not 0 <= said["seed"] < 2**32:
        refuse("seed", "an integer from 0 to 2^32 - 1")
    return Arrival(number=number, **said)
