"""report.html: a run on one page, with every picture inside the file.

Loss curves from metrics.jsonl, recalls from eval/retrieval/metrics.json beside
chance, examples from predictions.json, the text-to-image attention of the last
fusion layer, and, where the system has them, completed patches, words and
anchors. What was not measured is left out and said so.
"""

from __future__ import annotations

import pathlib

from glscl_jax.export import (
  page,
  report_anchors,
  report_attention,
  report_completion,
  report_retrieval,
  report_run,
  selection,
)
from glscl_jax.export.weights import Weights
from glscl_jax.tasks import results


def make_report(
  workdir: pathlib.Path,
  weights: Weights,
  *,
  data_dir: str,
  charts: pathlib.Path,
  options: selection.Options,
) -> str:
  """The page as HTML; also writes its charts.

  Args:
    workdir: of a run, or an export directory with evaluations.
    weights: of that run, at the step that was evaluated.
    data_dir: where the examples are read.
    charts: folder of the charts as files.
    options: how much is shown.
  """
  data = results.identify(data_dir)
  found = results.read(workdir / "eval" / "retrieval" / results.METRICS)
  predictions = results.read(
    workdir / "eval" / "retrieval" / results.PREDICTIONS
  )
  charts.mkdir(parents=True, exist_ok=True)
  shown = (
    predictions["results"][data.name]
    if data.name in predictions["results"]
    else {}
  )
  splits = options.splits or selection.held_out(shown)
  blocks = [
    report_run.facts(workdir, weights, data_dir),
    report_retrieval.recalls(found["results"], weights, charts),
    report_run.curves(
      report_run.read_metrics(workdir / "metrics.jsonl"), charts
    ),
    *(
      report_retrieval.examples(
        data_dir,
        split,
        shown[split],
        found["results"][data.name][split],
        options,
      )
      if split in shown
      else page.absent("Examples", f"{split} of {data.name} was not evaluated.")
      for split in splits
    ),
    *(
      []
      if splits
      else [
        page.absent("Examples", report_retrieval.why_none(data, predictions))
      ]
    ),
    report_attention.maps(weights, data_dir, splits, options),
    report_completion.patches(weights, data_dir, splits, options),
    report_completion.words(weights, data_dir, splits, options),
    report_anchors.anchors(workdir, weights, data_dir, splits, options),
    report_run.config(weights),
    report_run.credits(data_dir),
  ]
  return page.whole(workdir, weights, blocks)
