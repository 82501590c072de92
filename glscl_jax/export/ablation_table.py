"""An ablation's results: mean and spread over seeds, as Markdown and a plot."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Iterator, Mapping, Sequence

from glscl_jax import atomic
from glscl_jax.ablations import Suite
from glscl_jax.export import pictures
from glscl_jax.tasks import results

MARKDOWN, PLOT, NUMBERS = "results.md", "results.svg", "results.json"
# What rows are compared by: metrics of each task's result file, and their
# titles; None: that of the protocol, for R@1, the mean of both directions.
METRICS = {
  "retrieval": {"mean_r1": None},
  "anchors": {
    "pair_accuracy": "regions of words",
    "word_accuracy": "words at anchors",
    "class_accuracy": "classes at anchors",
  },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
  """One question that rows are compared by."""

  split: str
  label: str  # of protocol or metric
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
  seeds = max(len(workdirs) for workdirs in runs.values())
  table = format_table(suite, list(runs), columns, seeds=seeds)
  text = (
    "In percent; R@1 is the mean of both directions. Mean and standard "
    f"deviation of {_count(seeds)}.\n\n{table}\n\n"
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
  """One column a split and protocol, in the order of first mention.

  Raises:
    ResultError: a run has two values for one of them.
  """
  chances: dict[tuple[str, str], float] = {}
  values: dict[tuple[str, str], dict[str, list[float]]] = {}
  for name, workdirs in runs.items():
    for workdir in workdirs:
      seen = set()
      for split, label, value, chance in _measured(workdir):
        if (split, label) in seen:
          raise results.ResultError(
            f"{workdir}/eval: {split!r} was measured twice by {label!r}, on "
            "other data or with other settings; remove that folder and "
            "done.txt beside it, and measure again"
          )
        seen.add((split, label))
        chances.setdefault((split, label), chance)
        found = values.setdefault((split, label), {})
        found.setdefault(name, []).append(value)
  return [
    Column(
      split=split,
      label=label,
      chance=chance,
      values={n: tuple(v) for n, v in values[split, label].items()},
    )
    for (split, label), chance in chances.items()
  ]


def _measured(
  workdir: pathlib.Path,
) -> Iterator[tuple[str, str, float, float]]:
  """Split, label, value and chance of all that was measured of a run."""
  for task, metrics in METRICS.items():
    tree = results.read(workdir / "eval" / task / results.METRICS)
    for splits in tree["results"].values():
      for split, protocols in splits.items():
        for entry in protocols.values():
          for metric, title in metrics.items():
            if metric in entry["metrics"]:
              yield (
                split,
                title or results.protocol_label(entry["protocol"]),
                entry["metrics"][metric],
                entry["chance"][metric],
              )


def _count(seeds: int) -> str:
  return "1 seed" if seeds == 1 else f"{seeds} seeds"


def format_table(
  suite: Suite, rows: Sequence[str], columns: Sequence[Column], *, seeds: int
) -> str:
  """A Markdown table; a dash where a row has no such measure."""
  head = ["", *(column.title for column in columns), suite.paper_column]
  lines = [head, ["---", *["---:"] * (len(columns) + 1)]]
  for name in rows:
    row = suite.rows[name]
    cells = [
      format_values(column.values[name], seeds=seeds)
      if name in column.values
      else "-"
      for column in columns
    ]
    lines.append([row.title, *cells, row.paper or "-"])
  lines.append(
    ["chance", *(f"{100 * column.chance:.1f}" for column in columns), "-"]
  )
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_values(values: Sequence[float], *, seeds: int) -> str:
  """Mean and standard deviation in percent; of one value itself alone.

  Says of how many values it is where they are not as many as `seeds`.
  """
  text = f"{100 * statistics.fmean(values):.1f}"
  if len(values) > 1:
    text += f" \u00b1 {100 * statistics.stdev(values):.1f}"
  return text if len(values) == seeds else f"{text} (of {len(values)})"
