"""An ablation's results: mean and spread over seeds, as Markdown and a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from glscl_jax import atomic
from glscl_jax.ablations import Suite
from glscl_jax.export import pictures
from glscl_jax.tasks import results

MARKDOWN, PLOT, NUMBERS = "results.md", "results.svg", "results.json"
METRIC = "mean_r1"  # R@1, mean of both directions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
  """One question that rows are compared by."""

  split: str
  label: str  # of the protocol
  chance: float
  values: Mapping[str, tuple[float, ...]]  # row -> one value a seed

  @property
  def title(self) -> str:
    return f"{self.split.replace('_', ' ')}: {self.label}"


def write(
  directory: pathlib.Path,
  *,
  suite: Suite,
  runs: Mapping[str, Sequence[pathlib.Path]],
  command: str,
) -> None:
  """Reads what the runs measured and writes table, plot and numbers.

  Args:
    directory: where the three files go; made when missing.
    suite: of the rows.
    runs: row -> a work dir a seed; what was not measured is absent.
    command: that makes the table, told below it.
  """
  columns = collect(runs)
  directory.mkdir(parents=True, exist_ok=True)
  table = format_table(suite, list(runs), columns)
  seeds = max(len(workdirs) for workdirs in runs.values())
  text = (
    f"R@1 in percent, mean of both directions; mean and standard deviation of "
    f"{seeds} seeds.\n\n{table}\n\n"
    f"The paper's order: {suite.expected} ({suite.source}).\n\n"
    f"Made by `{command}`.\n"
  )
  atomic.write_text(directory / MARKDOWN, text)
  numbers = [dataclasses.asdict(column) for column in columns]
  atomic.write_text(directory / NUMBERS, json.dumps(numbers, indent=1) + "\n")
  if columns:
    titles = [suite.rows[name].title for name in runs]
    chart = pictures.dot_plot(
      titles,
      {
        column.title: [
          column.values[name] if name in column.values else () for name in runs
        ]
        for column in columns
      },
      {column.title: column.chance for column in columns},
    )
    temporary = directory / f"{PLOT}.tmp"
    temporary.write_bytes(chart)
    os.replace(temporary, directory / PLOT)


def collect(runs: Mapping[str, Sequence[pathlib.Path]]) -> list[Column]:
  """One column a split and protocol, in the order of first mention."""
  labels: dict[tuple[str, str], tuple[str, float]] = {}
  values: dict[tuple[str, str], dict[str, list[float]]] = {}
  for name, workdirs in runs.items():
    for workdir in workdirs:
      for split, key, entry in _measured(workdir):
        labels.setdefault(
          (split, key),
          (
            results.protocol_label(entry["protocol"]),
            entry["chance"][METRIC],
          ),
        )
        values.setdefault((split, key), {}).setdefault(name, []).append(
          entry["metrics"][METRIC]
        )
  return [
    Column(
      split=split,
      label=label,
      chance=chance,
      values={n: tuple(v) for n, v in values[split, key].items()},
    )
    for (split, key), (label, chance) in labels.items()
  ]


def _measured(
  workdir: pathlib.Path,
) -> list[tuple[str, str, Mapping[str, Any]]]:
  """Split, protocol and result of all that stands in a work dir's file."""
  tree = results.read(workdir / "eval/retrieval" / results.METRICS)
  return [
    (split, key, entry)
    for splits in tree["results"].values()
    for split, protocols in splits.items()
    for key, entry in protocols.items()
  ]


def format_table(
  suite: Suite, rows: Sequence[str], columns: Sequence[Column]
) -> str:
  """A Markdown table; a dash where a row has no such measure."""
  head = ["", *(column.title for column in columns), suite.paper_column]
  lines = [head, ["---", *["---:"] * (len(columns) + 1)]]
  for name in rows:
    row = suite.rows[name]
    cells = [
      format_values(column.values[name]) if name in column.values else "-"
      for column in columns
    ]
    lines.append([row.title, *cells, row.paper or "-"])
  lines.append(
    ["chance", *(f"{100 * column.chance:.1f}" for column in columns), "-"]
  )
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_values(values: Sequence[float]) -> str:
  """Mean and standard deviation in percent; of one value itself alone."""
  mean = f"{100 * statistics.fmean(values):.1f}"
  if len(values) < 2:
    return mean
  return f"{mean} \u00b1 {100 * statistics.stdev(values):.1f}"
