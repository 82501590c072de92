"""Checks array names against array shapes while tests run.

A local variable `x_BTD` must have rank 3; within one call every `B` is the
same size; a digit is the size itself (`mask_B11L`). `watch` looks at the
locals of every function of one folder at the moment it returns, tracers
included, so the check also works under jit, grad, vmap, scan and eval_shape.

`install` makes that moment visible: it compiles a package so that each
`return x` is `return __returning__(x)`. A trace function would see the same
returns, but also every call inside of jax, which doubles the time of tracing.
Outside of tests nothing of this runs.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import importlib.machinery
import importlib.util
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

_SUFFIX = re.compile(r"_([A-Z0-9]*[A-Z][A-Z0-9]*)$")
_HOOK = "__returning__"


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


_active: list[Watch] = []  # the innermost is the last


@contextlib.contextmanager
def watch(folder: str) -> Iterator[Watch]:
  """Watches the calls of this block; read `.mistakes` after it."""
  found = Watch(folder)
  _active.append(found)
  try:
    yield found
  finally:
    _active.remove(found)


def _returning(value: Any = None) -> Any:
  """What every function of an installed package calls before it returns."""
  if _active:
    frame = sys._getframe(1)
    if _active[-1].suffixes(frame.f_code):
      _active[-1].check(frame)
  return value


class _Rewriter(ast.NodeTransformer):
  """Passes what functions return through the hook; lines stay as they are.

  A call that an exception unwinds does not get there: its locals may be what
  the function has just refused.
  """

  def _hooked(self, value: ast.expr | None, place: ast.AST) -> ast.Call:
    call = ast.Call(
      ast.Name(_HOOK, ast.Load()), [value] if value else [], keywords=[]
    )
    return ast.fix_missing_locations(ast.copy_location(call, place))

  def visit_Return(self, node: ast.Return) -> ast.Return:
    self.generic_visit(node)
    node.value = self._hooked(node.value, node)
    return node

  def visit_Lambda(self, node: ast.Lambda) -> ast.Lambda:
    self.generic_visit(node)
    node.body = self._hooked(node.body, node.body)
    return node

  def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
    self.generic_visit(node)
    last = node.body[-1]  # the end of a function returns, too
    if not isinstance(last, ast.Return):
      end = ast.Expr(self._hooked(None, last))
      node.body.append(ast.copy_location(end, last))
    return node


class Loader(importlib.machinery.SourceFileLoader):
  """Loads a module so that its returns can be watched."""

  def get_code(self, fullname: str) -> types.CodeType:
    path = self.get_filename(fullname)
    tree = _Rewriter().visit(ast.parse(self.get_data(path), path))
    return compile(tree, path, "exec", dont_inherit=True)

  def exec_module(self, module: types.ModuleType) -> None:
    setattr(module, _HOOK, _returning)
    super().exec_module(module)


class _Finder:
  """Finds the modules of one package for the loader above."""

  def __init__(self, package: str):
    self.package = package

  def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
    if name.partition(".")[0] != self.package:
      return None
    spec = importlib.machinery.PathFinder.find_spec(name, path, target)
    if spec and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
      spec.loader = Loader(name, spec.origin)
    return spec


def install(package: str) -> None:
  """Makes the functions of a package visible to `watch`, before its import."""
  assert package not in sys.modules, f"{package} has been imported already"
  sys.meta_path.insert(0, _Finder(package))
  spec = importlib.util.find_spec(package)
  assert spec and isinstance(spec.loader, Loader), f"{package} was not found"
