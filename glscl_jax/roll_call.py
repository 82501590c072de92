"""Who is there: processes of one run that tell each other when one is lost.

Process 0 listens; the others connect, say who they are, and the run begins
when all have. The connections stay open. When a process dies its connection
closes, when its host or network dies it falls silent, and when it fails it
says so: process 0 passes on what it has learnt, and every process ends, where
a collective would wait for ever. A stop that one process is asked for becomes
a stop of all after the same step.

Messages are lines of JSON. Imports nothing of jax: nothing is compiled or
placed before all are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from glscl_jax import errors

LOST = 75  # exit code where another process was lost: EX_TEMPFAIL, try again
PINGS = 4  # a process says that it lives so often in the time it is given
RETRY_SECONDS = 0.2  # between attempts to reach process 0
CLOSE_SECONDS = 2.0  # the other end gets to close too
LONGEST_LINE = 1 << 16  # bytes; strangers may connect and say anything

_ADVICE = (
  "All processes end, since none can go on alone. Checkpoints are whole: start "
  "all processes again and they continue from the last one."
)


class RollCallError(errors.UserError):
  """The processes of a run did not come together; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """Why this process must end."""

  text: str
  code: int  # to exit with


OnEnd = Callable[[Verdict], None]


class Line:
  """One connection: messages out, messages in, and when the last one came."""

  def __init__(self, connection: socket.socket):
    connection.settimeout(10.0)  # of a send to a process that reads nothing
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self.connection = connection
    self.heard = time.monotonic()
    self._rest = b""
    self._sending = threading.Lock()

  def send(self, **message: Any) -> None:
    """Sends one message; a line that is closed at the other end takes none."""
    text = json.dumps(message).encode() + b"\n"
    with self._sending, contextlib.suppress(OSError):
      self.connection.sendall(text)

  def receive(self) -> list[dict[str, Any]] | None:
    """Messages that have come, waiting for some; None when it has closed.

    Raises:
      ValueError: what came is no message.
    """
    try:
      data = self.connection.recv(LONGEST_LINE)
    except TimeoutError:
      return []
    except OSError:
      return None
    if not data:
      return None
    self.heard = time.monotonic()
    *lines, self._rest = (self._rest + data).split(b"\n")
    if len(self._rest) > LONGEST_LINE:
      raise ValueError("a line that does not end")
    found = [json.loads(line) for line in lines]
    if not all(isinstance(message, dict) for message in found):
      raise ValueError("no message")
    return found

  def is_closed(self) -> bool:
    """Whether the other end is gone, of one that has nothing to say."""
    ready, _, _ = select.select([self.connection], [], [], 0)
    return bool(ready)


def close_all(lines: Iterable[Line]) -> None:
  """Lets go of lines; what was sent still arrives.

  A connection that is closed with something unread in it is reset, and takes
  what is on its way with it: the other end gets a moment to close first.
  """
  lines = list(lines)
  for line in lines:
    with contextlib.suppress(OSError):
      line.connection.shutdown(socket.SHUT_WR)
  end = time.monotonic() + CLOSE_SECONDS
  for line in lines:
    with contextlib.suppress(OSError, ValueError):
      while (left := end - time.monotonic()) > 0:
        line.connection.settimeout(left)
        if line.receive() is None:
          break
    line.connection.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seat:
  """Which process of how many this is, and where process 0 listens."""

  host: str
  port: int
  process_id: int
  num_processes: int
  join_timeout: float  # seconds until all must be there
  heartbeat_timeout: float  # seconds of silence after which one is lost

  @property
  def address(self) -> str:
    """As it is given to people and to jax."""
    host = f"[{self.host}]" if ":" in self.host else self.host
    return f"{host}:{self.port}"


class RollCall:
  """The connections of this process, watched by a thread of its own.

  Args:
    seat: of this process.
    lines: to process 0, or of process 0 to all others, by their process_id.
    names: how people know each process.
    on_end: called once, in the thread, when this process must end.
  """

  def __init__(
    self,
    seat: Seat,
    lines: dict[int, Line],
    names: Sequence[str],
    on_end: OnEnd,
  ):
    self._seat = seat
    self._lines = lines
    self._names = names
    self._on_end = on_end
    self._left: set[int] = set()  # processes that have said goodbye
    # A signal handler may find any lock taken: it only leaves a number here.
    self._wanted: int | None = None
    self._sent_wanted = False
    self._stop = threading.Condition()
    self._passed = -1  # last step after which this process went on
    self._reason: int | None = None  # set: all processes are about to stop
    self._reports: dict[int, int] = {}  # in process 0: what the others passed
    self._stop_after: int | None = None  # the step that all stop after
    self._over = threading.Event()
    self._ending = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name="roll-call", daemon=True
    )
    self._thread.start()

  def want_stop(self, number: int) -> None:
    """Asks all processes to stop soon, for a reason; safe in a handler."""
    self._wanted = number

  def must_stop(self, step: int) -> int | None:
    """Whether all processes stop after `step`: the reason, or None.

    Every process asks after each of its steps, and gets the same answers.
    While they agree on a step, a process waits here: those that have gone on
    are at most one step further, and will find the others there.
    """
    with self._stop:
      while self._reason is not None and self._stop_after is None:
        self._stop.wait()
      if self._stop_after is not None and step >= self._stop_after:
        return self._reason
      self._passed = step
      return None

  def wait_for_news(self, seconds: float) -> None:
    """Returns when nobody is known to be lost; else the thread ends it all.

    Called after an error, which may be what a collective says whose other end
    is gone: connections close together, but are noticed in any order.
    """
    if self._ending.wait(seconds):
      self._thread.join()

  def fail(self, text: str, *, code: int) -> None:
    """Tells all others that this process ends, and why."""
    self._over.set()
    name = self._names[self._seat.process_id]
    for line in self._lines.values():
      line.send(ended=f"{name} has failed: {text}", code=code)
    close_all(self._lines.values())

  def leave(self) -> None:
    """Says goodbye: from here on nobody misses this process."""
    self._over.set()
    self._thread.join()
    here = [self._lines[other] for other in self._lines.keys() - self._left]
    for line in here:
      line.send(goodbye=True)
    close_all(here)

  def _watch(self) -> None:
    patience = self._seat.heartbeat_timeout
    pause = min(0.2, patience / PINGS)
    said = -patience
    for line in self._lines.values():
      line.heard = time.monotonic()
    with selectors.DefaultSelector() as selector:
      for process, line in self._lines.items():
        selector.register(line.connection, selectors.EVENT_READ, process)
      while not self._over.is_set():
        if self._wanted is not None and not self._sent_wanted:
          self._sent_wanted = True
          self._ask_stop(self._wanted)
        if time.monotonic() - said >= patience / PINGS:
          said = time.monotonic()
          for process in self._lines.keys() - self._left:
            self._lines[process].send(ping=True)
        for key, _ in selector.select(pause):
          verdict = self._hear(key.data)
          if key.data in self._left:
            selector.unregister(key.fileobj)
            close_all([self._lines[key.data]])
          if verdict is not None:
            self._end(verdict)
            return
        silent = self._find_silent(patience)
        if silent is not None:
          text = f"has not been heard of for {patience:g} s"
          self._end(self._lost(silent, text))
          return

  def _hear(self, process: int) -> Verdict | None:
    """Reads what has come from a process."""
    try:
      messages = self._lines[process].receive()
    except ValueError as error:
      return self._lost(process, f"sent what cannot be read ({error})")
    if messages is None:
      why = "ended without a word (killed, out of memory, or its host is gone)"
      return self._lost(process, why)
    for message in messages:
      if "goodbye" in message:
        self._left.add(process)
        return None
      if "ended" in message:
        return Verdict(text=message["ended"], code=message["code"])
      self._take_stop(process, message)
    return None

  def _ask_stop(self, number: int) -> None:
    """Process 0 asks how far all are; the others ask it to do so."""
    if self._seat.process_id:
      self._lines[0].send(stop=number)
    elif self._reason is None:
      passed = self._pause(number)
      for line in self._lines.values():
        line.send(pause=number)
      self._report(0, passed)

  def _pause(self, number: int) -> int:
    """From here on `must_stop` waits; returns how far this process is."""
    with self._stop:
      self._reason = number
      return self._passed

  def _report(self, process: int, passed: int) -> None:
    """Process 0: the last report settles where all stop."""
    self._reports[process] = passed
    if len(self._reports) == self._seat.num_processes:
      step = max(self._reports.values()) + 1
      for line in self._lines.values():
        line.send(stop_after=step)
      self._settle(step)

  def _settle(self, step: int) -> None:
    with self._stop:
      self._stop_after = step
      self._stop.notify_all()

  def _take_stop(self, process: int, message: dict[str, Any]) -> None:
    if "stop" in message:
      self._ask_stop(message["stop"])
    elif "pause" in message:
      self._lines[0].send(passed=self._pause(message["pause"]))
    elif "passed" in message:
      self._report(process, message["passed"])
    elif "stop_after" in message:
      self._settle(message["stop_after"])

  def _find_silent(self, patience: float) -> int | None:
    now = time.monotonic()
    for process in self._lines.keys() - self._left:
      if now - self._lines[process].heard > patience:
        return process
    return None

  def _lost(self, process: int, why: str) -> Verdict:
    return Verdict(text=f"{self._names[process]} {why}. {_ADVICE}", code=LOST)

  def _end(self, verdict: Verdict) -> None:
    if self._over.is_set():
      return
    self._ending.set()
    # The lost one too: it may have been cut off for a while.
    for line in self._lines.values():
      line.send(ended=verdict.text, code=verdict.code)
    close_all(self._lines.values())
    self._on_end(verdict)


def join(
  seat: Seat, *, offer: Callable[[], int], on_end: OnEnd
) -> tuple[RollCall, int]:
  """Comes together with all processes of the run.

  Args:
    seat: of this process.
    offer: called in process 0, once all are there: a port for them to use.
    on_end: see `RollCall`.

  Returns:
    The roll call, and the port.

  Raises:
    RollCallError: not all came in time, or they contradict each other.
  """
  if seat.process_id == 0:
    lines, names = _gather(seat)
    port = offer()
    for line in lines.values():
      line.send(start=port, names=names)
  else:
    lines, names, port = _answer(seat)
  return RollCall(seat, lines, names, on_end), port


def _name(process_id: int, num_processes: int) -> str:
  """How people know a process: where to look, and for what."""
  return (
    f"process {process_id} of {num_processes} (host {socket.gethostname()}, "
    f"pid {os.getpid()})"
  )


def is_loopback(host: str) -> bool:
  """Whether a host name means this machine, seen from itself alone."""
  return host in ("localhost", "::1") or host.startswith("127.")


def _listen(seat: Seat) -> socket.socket:
  try:
    if is_loopback(seat.host):
      return socket.create_server(
        ("127.0.0.1" if seat.host != "::1" else "::1", seat.port),
        family=socket.AF_INET6 if seat.host == "::1" else socket.AF_INET,
      )
    # On all interfaces: the name may be of one that only others see.
    dual = socket.has_dualstack_ipv6()
    return socket.create_server(
      ("", seat.port),
      family=socket.AF_INET6 if dual else socket.AF_INET,
      dualstack_ipv6=dual,
    )
  except OSError as error:
    raise RollCallError(
      f"process 0 cannot listen on port {seat.port} ({error.strerror}): is "
      "another run, or an older process of this one, still there? End it, or "
      "give all processes a --coordinator_address with another port"
    ) from None


def _gather(seat: Seat) -> tuple[dict[int, Line], list[str]]:
  """Process 0: waits until all others have said who they are."""
  end = time.monotonic() + seat.join_timeout
  lines: dict[int, Line] = {}
  names = {0: _name(0, seat.num_processes)}
  with contextlib.ExitStack() as stack, _listen(seat) as server:
    stack.callback(lambda: close_all(lines.values()))
    while len(lines) < seat.num_processes - 1:
      server.settimeout(max(0.0, end - time.monotonic()) or 1e-3)
      try:
        line = Line(server.accept()[0])
        told = _introduction(line)
      except TimeoutError:
        missing = sorted(set(range(1, seat.num_processes)) - lines.keys())
        _refuse(
          [*lines.values()],
          f"after {seat.join_timeout:g} s {len(lines) + 1} of "
          f"{seat.num_processes} processes are at {seat.address}; missing: "
          f"{', '.join(map(str, missing))}. Look at their output: did they "
          "start, with the same --coordinator_address?",
        )
      if told is None:
        line.connection.close()  # a stranger
        continue
      _forget_ended(lines, names)
      problem = _find_contradiction(seat, told, names)
      if problem is not None:
        _refuse([*lines.values(), line], problem)
      lines[told["process"]], names[told["process"]] = line, told["name"]
      _forget_ended(lines, names)
    stack.pop_all()
  return lines, [names[process] for process in range(seat.num_processes)]


def _forget_ended(lines: dict[int, Line], names: dict[int, str]) -> None:
  """Leaves the places of those that have ended to who comes again."""
  for process in [p for p, line in lines.items() if line.is_closed()]:
    close_all([lines.pop(process)])
    del names[process]


def _introduction(line: Line) -> dict[str, Any] | None:
  """The first message of one who connected; None if it is no process of ours.

  It comes with the connection: process 0 does not wait for strangers.
  """
  line.connection.settimeout(5.0)
  try:
    messages = line.receive()
  except ValueError:
    return None
  line.connection.settimeout(10.0)
  if not messages:
    return None
  kinds = {name: type(value) for name, value in messages[0].items()}
  known = {"process": int, "of": int, "name": str}
  return messages[0] if kinds == known else None


def _find_contradiction(
  seat: Seat, told: dict[str, Any], names: dict[int, str]
) -> str | None:
  """What makes a process that came no part of this run."""
  process, of, name = told["process"], told["of"], told["name"]
  if of != seat.num_processes:
    return (
      f"{names[0]} and {name} are not of one run: give all the same "
      "--num_processes, and each run a --coordinator_address of its own"
    )
  if process in names:
    return (
      f"two processes have the same --process_id: {names[process]} and {name}"
    )
  return None


def _refuse(lines: Iterable[Line], problem: str) -> None:
  for line in lines:
    line.send(refused=problem)
  close_all(lines)
  raise RollCallError(problem)


def _answer(seat: Seat) -> tuple[dict[int, Line], list[str], int]:
  """The others: find process 0, say who they are, wait for the start."""
  end = time.monotonic() + seat.join_timeout
  line = _reach(seat, end)
  name = _name(seat.process_id, seat.num_processes)
  line.send(process=seat.process_id, of=seat.num_processes, name=name)
  # Process 0 may have begun to wait later: its word counts.
  while time.monotonic() < end + seat.join_timeout:
    try:
      messages = line.receive()
    except ValueError:
      messages = None
    if messages is None:
      break
    for message in messages:
      if "refused" in message:
        close_all([line])
        raise RollCallError(message["refused"])
      if "start" in message:
        return {0: line}, message["names"], message["start"]
  close_all([line])
  raise RollCallError(
    f"{name}: {seat.address} answered and closed before the run began. Is "
    "that process 0 of this run? Look at its output"
  )


def _reach(seat: Seat, end: float) -> Line:
  reason = "no time left"
  while time.monotonic() < end:
    try:
      left = max(0.1, end - time.monotonic())
      return Line(
        socket.create_connection((seat.host, seat.port), timeout=min(10, left))
      )
    except OSError as error:  # not there yet, or a name not known yet
      reason = error.strerror or str(error)
      time.sleep(RETRY_SECONDS)
  raise RollCallError(
    f"{_name(seat.process_id, seat.num_processes)}: nobody answers at "
    f"{seat.address} after {seat.join_timeout:g} s ({reason}). Is process 0 "
    "running there, and may this host reach that port? --join_timeout gives "
    "it more time"
  )
