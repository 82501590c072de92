"""Processes that come together and hear of each other, as threads."""

from __future__ import annotations

import concurrent.futures
import contextlib
import queue
import socket
import time

import pytest

from glscl_jax import roll_call

PORT = 4321  # what process 0 offers; nobody listens there


def free_port():
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


def seat(port, process_id, num_processes, **changes):
  values = {"join_timeout": 10.0, "heartbeat_timeout": 10.0} | changes
  return roll_call.Seat(
    host="localhost",
    port=port,
    process_id=process_id,
    num_processes=num_processes,
    **values,
  )


@contextlib.contextmanager
def pool():
  with concurrent.futures.ThreadPoolExecutor() as threads:
    yield threads


JOINED = []


def join(place):
  """The roll call of one process, its port, and where its end is told."""
  ends = queue.Queue()
  calls, port = roll_call.join(place, offer=lambda: PORT, on_end=ends.put)
  JOINED.append(calls)
  return calls, port, ends


@pytest.fixture(autouse=True)
def leave_nothing():
  """Threads and connections of a test end with it."""
  yield
  while JOINED:
    die(JOINED.pop())


@pytest.fixture
def three():
  """Three processes that are together."""
  port = free_port()
  with pool() as threads:
    futures = [threads.submit(join, seat(port, i, 3)) for i in (2, 0, 1)]
    found = [future.result(20) for future in futures]
  return [found[1], found[2], found[0]]


def die(calls):
  """What a kill does to a process: its connections close."""
  calls._over.set()
  calls._thread.join()
  for line in calls._lines.values():
    line.connection.close()


def test_all_come_together_and_learn_the_port_of_process_0(three):
  assert [port for _, port, _ in three] == [PORT] * 3
  names = three[2][0]._names
  assert [name[:14] for name in names] == [
    f"process {i} of 3" for i in range(3)
  ]


@pytest.mark.parametrize("dead", [0, 1])
def test_one_that_dies_ends_the_others_with_its_name(three, dead):
  die(three[dead][0])
  for number in {0, 1, 2} - {dead}:
    verdict = three[number][2].get(timeout=10)
    assert verdict.code == roll_call.LOST
    assert verdict.text.startswith(f"process {dead} of 3 (host ")
    assert "ended without a word" in verdict.text
    assert "start all processes again" in verdict.text


def test_one_that_fails_tells_the_others_why(three):
  three[2][0].fail("config.data.dir is empty", code=2)
  for number in (0, 1):
    verdict = three[number][2].get(timeout=10)
    assert verdict.code == 2
    assert "process 2 of 3" in verdict.text
    assert verdict.text.endswith("has failed: config.data.dir is empty")
  assert three[2][2].empty()


def test_nobody_misses_one_that_says_goodbye(three):
  three[1][0].leave()
  time.sleep(0.3)
  for calls, _, ends in three:
    assert ends.empty()
    if calls is not three[1][0]:
      calls.leave()
  assert all(ends.empty() for _, _, ends in three)


def test_one_that_falls_silent_is_lost(monkeypatch):
  monkeypatch.setattr(roll_call, "CLOSE_SECONDS", 0.2)
  port = free_port()
  with pool() as threads:
    host = threads.submit(join, seat(port, 0, 2, heartbeat_timeout=0.4))
    line = roll_call._reach(seat(port, 1, 2), time.monotonic() + 10)
    line.send(process=1, of=2, name="the silent one")
    _, _, ends = host.result(20)
    verdict = ends.get(timeout=10)
  assert verdict.text.startswith("the silent one has not been heard of for 0.4")
  assert verdict.code == roll_call.LOST
  told = []
  while not any("ended" in message for message in told):
    told += line.receive()
  line.connection.close()
  assert told[-1] == {"ended": verdict.text, "code": verdict.code}


def test_all_stop_after_the_same_step_that_none_has_passed(three):
  steps = (6, 7, 6)  # asked last, without a stop
  for (calls, _, _), step in zip(three, steps, strict=True):
    assert calls.must_stop(step) is None
  three[2][0].want_stop(15)

  def run(calls, step):
    while True:
      step += 1
      reason = calls.must_stop(step)
      if reason is not None:
        return step, reason
      time.sleep(0.01)

  with pool() as threads:
    futures = [
      threads.submit(run, calls, step)
      for (calls, _, _), step in zip(three, steps, strict=True)
    ]
    found = [future.result(10) for future in futures]
  assert len(set(found)) == 1
  assert found[0][0] >= 8 and found[0][1] == 15


def test_a_stop_before_the_first_step_reaches_all(three):
  three[1][0].want_stop(2)
  deadline = time.monotonic() + 10
  while three[0][0]._stop_after is None and time.monotonic() < deadline:
    time.sleep(0.01)
  with pool() as threads:
    asked = [threads.submit(calls.must_stop, 300) for calls, _, _ in three]
    assert [future.result(10) for future in asked] == [2, 2, 2]


def test_process_0_names_those_that_did_not_come():
  port = free_port()
  with pool() as threads:
    host = threads.submit(join, seat(port, 0, 4, join_timeout=1.0))
    guest = threads.submit(join, seat(port, 2, 4))
    for future in (host, guest):
      with pytest.raises(roll_call.RollCallError) as caught:
        future.result(20)
      assert "after 1 s 2 of 4 processes are at localhost:" in str(caught.value)
      assert "missing: 1, 3." in str(caught.value)


def test_a_process_0_that_is_not_there_is_named():
  port = free_port()
  with pytest.raises(roll_call.RollCallError) as caught:
    join(seat(port, 1, 2, join_timeout=0.5))
  assert f"nobody answers at localhost:{port} after 0.5 s" in str(caught.value)


def test_a_port_that_is_taken_is_named():
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(roll_call.RollCallError, match=f"on port {port} "):
      join(seat(port, 0, 2))


@pytest.mark.parametrize(
  ("first", "second", "message"),
  [
    ((1, 3), (1, 3), "two processes have the same --process_id"),
    ((1, 2), None, "are not of one run: give all the same --num_processes"),
  ],
)
def test_processes_that_contradict_each_other_are_named(first, second, message):
  port = free_port()
  guests = [guest for guest in (first, second) if guest is not None]
  with pool() as threads:
    futures = [threads.submit(join, seat(port, 0, 3))]
    futures += [threads.submit(join, seat(port, *guest)) for guest in guests]
    for future in futures:
      with pytest.raises(roll_call.RollCallError, match=message):
        future.result(20)


def test_strangers_at_the_port_are_turned_away():
  port = free_port()
  with pool() as threads:
    host = threads.submit(join, seat(port, 0, 2))
    stranger = roll_call._reach(seat(port, 1, 2), time.monotonic() + 10)
    stranger.connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    guest = threads.submit(join, seat(port, 1, 2))
    assert host.result(20)[1] == guest.result(20)[1] == PORT
    stranger.connection.close()


def test_one_that_was_started_again_takes_its_old_place():
  port = free_port()
  with pool() as threads:
    host = threads.submit(join, seat(port, 0, 3))
    old = roll_call._reach(seat(port, 1, 3), time.monotonic() + 10)
    old.send(process=1, of=3, name="old")
    time.sleep(0.2)
    old.connection.close()
    # The other one comes first: the place of the old one is not taken as full.
    guests = [threads.submit(join, seat(port, 2, 3))]
    time.sleep(0.2)
    guests.append(threads.submit(join, seat(port, 1, 3)))
    calls, _, ends = host.result(20)
    assert "old" not in calls._names and ends.empty()
    for guest in guests:
      guest.result(20)
