"""Checks array names against array shapes while tests run.

A local variable `x_BTD` must have rank 3; within one call every `B` is the
same size; a digit is the size itself (`mask_B11L`). `watch` looks at the
locals of every function of one folder at the moment it returns, tracers
included, so the check also works under jit, grad, vmap, scan and eval_shape.
Outside of tests nothing of this runs.
"""

from __future__ import annotations

import collections
import contextlib
import dis
import re
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

_SUFFIX = re.compile(r"_([A-Z0-9]*[A-Z][A-Z0-9]*)$")
_RETURN_OPCODES = {
  dis.opmap[name]
  for name in ("RETURN_VALUE", "RETURN_CONST")
  if name in dis.opmap
}


def mistakes_in(variables: dict[str, Any], suffixes: dict[str, str]) -> list:
  """Every disagreement between names and shapes among one call's locals."""
  mistakes = []
  sizes = collections.defaultdict(dict)  # letter -> size -> first name
  for name, suffix in suffixes.items():
    array = variables.get(name)
    if not hasattr(array, "ndim") or not hasattr(array, "shape"):
      continue
    if array.ndim != len(suffix):
      mistakes.append(f"{name} has rank {array.ndim}, shape {array.shape}")
      continue
    for letter, size in zip(suffix, array.shape, strict=True):
      if letter.isdigit():
        if size != int(letter):
          mistakes.append(f"{name} has shape {array.shape}, not {letter}")
      else:
        sizes[letter].setdefault(size, name)
  for letter, names in sizes.items():
    if len(names) > 1:
      found = ", ".join(f"{size} in {name}" for size, name in names.items())
      mistakes.append(f"{letter} has several sizes: {found}")
  return mistakes


class Watch:
  """Collects the mistakes of every call into the files below `folder`."""

  def __init__(self, folder: str):
    self.folder = folder
    # Keyed by identity: the hash of a code object reads all of it.
    self._suffixes: dict[int, tuple[types.CodeType, dict[str, str]]] = {}
    self.mistakes: dict[str, None] = {}  # ordered and without repeats
    self.num_calls = 0

  def suffixes(self, code: types.CodeType) -> dict[str, str]:
    """The suffix of each local that has one; empty for foreign code."""
    if not code.co_filename.startswith(self.folder):
      return {}
    if id(code) not in self._suffixes:
      names = (*code.co_varnames, *code.co_cellvars)
      matches = {name: _SUFFIX.search(name) for name in names}
      found = {name: match[1] for name, match in matches.items() if match}
      self._suffixes[id(code)] = code, found
    return self._suffixes[id(code)][1]

  def check(self, frame: types.FrameType) -> None:
    """Looks at one call that is about to return."""
    code = frame.f_code
    self.num_calls += 1
    for mistake in mistakes_in(frame.f_locals, self.suffixes(code)):
      place = f"{code.co_filename}:{code.co_firstlineno} {code.co_qualname}"
      self.mistakes[f"{place}: {mistake}"] = None


@contextlib.contextmanager
def watch(folder: str) -> Iterator[Watch]:
  """Watches the calls of this block; read `.mistakes` after it."""
  found = Watch(folder)
  start = _monitor if hasattr(sys, "monitoring") else _trace
  with start(found):
    yield found


@contextlib.contextmanager
def _trace(found: Watch) -> Iterator[None]:
  """Python 3.11: a trace function, local to the frames of the folder."""

  def on_call(frame, _, __):
    code = frame.f_code
    if not code.co_filename.startswith(folder) or not found.suffixes(code):
      return None
    frame.f_trace_lines = False
    return on_event

  def on_event(frame, event, _):
    # An exception that unwinds a call is a "return" event too, and then the
    # locals may be what a function has just refused.
    if (
      event == "return"
      and frame.f_code.co_code[frame.f_lasti] in _RETURN_OPCODES
    ):
      found.check(frame)
    return on_event

  folder = found.folder
  before = sys.gettrace()
  threading.settrace(on_call)
  sys.settrace(on_call)
  try:
    yield
  finally:
    sys.settrace(before)
    threading.settrace(None)


@contextlib.contextmanager
def _monitor(found: Watch) -> Iterator[None]:
  """Python 3.12 and newer: events that switch themselves off elsewhere."""
  monitoring = sys.monitoring
  event = monitoring.events.PY_RETURN
  tool = next(n for n in range(5, -1, -1) if not monitoring.get_tool(n))

  def on_return(code, _, __):
    if not found.suffixes(code):
      return monitoring.DISABLE
    found.check(sys._getframe(1))

  monitoring.use_tool_id(tool, "shape suffixes")
  monitoring.register_callback(tool, event, on_return)
  monitoring.set_events(tool, event)
  monitoring.restart_events()
  try:
    yield
  finally:
    monitoring.set_events(tool, 0)
    monitoring.register_callback(tool, event, None)
    monitoring.free_tool_id(tool)
