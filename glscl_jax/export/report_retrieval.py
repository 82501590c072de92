"""The report on retrieval: recalls beside chance, examples."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from glscl_jax.data import pairs, sources
from glscl_jax.export import (
  anchor_pictures,
  page,
  pictures,
  selection,
)
from glscl_jax.export.weights import Weights, params_sha256
from glscl_jax.tasks import results, retrieval

SHOWN = 5  # candidates an example


def why_none(data: results.DataSet, predictions: Mapping[str, Any]) -> str:
  """Why there are no examples."""
  there = ", ".join(sorted(predictions["results"]))
  if not there:
    return "retrieval was not measured: run launch/evaluate.py."
  return f"no held-out split of {data.name} was evaluated, but {there}."


def _by_protocol(entries: Mapping[str, Any]) -> list[dict[str, Any]]:
  """Results of one split, plain before re-ranked."""
  order = retrieval.RERANKS
  return sorted(
    entries.values(),
    key=lambda entry: (
      order.index(entry["protocol"]["rerank"]),
      results.protocol_label(entry["protocol"]),
    ),
  )


def recalls(
  found: Mapping[str, Any], weights: Weights, charts: pathlib.Path
) -> str:
  """Tables and charts of all data sets that were evaluated."""
  if not found:
    return page.absent("Retrieval", "launch/evaluate.py measured no retrieval.")
  blocks = []
  for name, splits in sorted(found.items()):
    ordered = {split: splits[split] for split in selection.in_order(splits)}
    chart = pictures.recall_bars(
      {
        selection.cell_title(split): {
          results.protocol_label(entry["protocol"]): entry["metrics"]
          for entry in _by_protocol(entries)
        }
        for split, entries in ordered.items()
      },
      {
        selection.cell_title(split): next(iter(entries.values()))["chance"]
        for split, entries in ordered.items()
      },
    )
    (charts / f"recall-{name}.svg").write_bytes(chart)
    blocks.append(
      f"<h3>{page.text(name)}</h3>"
      + page.figure(
        page.image(chart, "svg+xml", "recalls", "chart"),
        "Share of queries with a right answer among the first k (R@k), in "
        "percent. Black lines: what a random order would give, exactly. Ties "
        "count against the model.",
      )
      + _recall_table(ordered, weights)
    )
  return f"<section><h2>Retrieval</h2>{''.join(blocks)}</section>"


def _recall_table(splits: Mapping[str, Any], weights: Weights) -> str:
  columns = ("r1", "r5", "r10", "median_rank")
  head = (
    "<tr><th rowspan=2>split</th><th rowspan=2>ranked by</th>"
    "<th colspan=4>image to text</th><th colspan=4>text to image</th></tr><tr>"
    + "<th>R@1</th><th>R@5</th><th>R@10</th><th>median</th>" * 2
    + "</tr>"
  )
  rows, stale, fingerprint = [], False, params_sha256(weights.params)
  for split, entries in splits.items():
    for number, entry in enumerate(_by_protocol(entries)):
      stale = stale or entry["lineage"]["params_sha256"] != fingerprint
      size = (
        f"{entry['num_images']:,} images, {entry['num_captions']:,} captions"
      )
      first = (
        f"<td rowspan={len(entries) + 1}>"
        f"{page.text(selection.cell_title(split))}"
        f"<small>{size}<br>{page.text(entry['lineage']['regime'])}, step "
        f"{entry['lineage']['step']:,}</small></td>"
        if number == 0
        else ""
      )
      label = page.text(results.protocol_label(entry["protocol"]))
      rows.append(
        f"<tr>{first}<td>{label}</td>{_numbers(entry['metrics'], columns)}</tr>"
      )
    chance = next(iter(entries.values()))["chance"]
    rows.append(
      f'<tr class="chance"><td>chance</td>{_numbers(chance, columns)}</tr>'
    )
  note = (
    '<p class="warning">Some results are of other weights than those of '
    "this page; run launch/evaluate.py again.</p>"
    if stale
    else ""
  )
  return (
    f'{note}<div class="wide"><table class="numbers">{head}{"".join(rows)}'
    "</table></div><p>R@k in percent; median: median rank of the best right "
    "answer, 1 is best.</p>"
  )


def _numbers(values: Mapping[str, float], columns: Sequence[str]) -> str:
  cells = []
  for direction in ("i2t", "t2i"):
    for column in columns:
      value = values[f"{direction}_{column}"]
      text = f"{value:g}" if column == "median_rank" else f"{100 * value:.1f}"
      cells.append(f"<td>{text}</td>")
  return "".join(cells)


def examples(
  data_dir: str,
  split: str,
  entries: Mapping[str, Any],
  measured: Mapping[str, Any],
  options: selection.Options,
) -> str:
  """Queries of one split with the five best answers.

  `entries` are the predictions and `measured` the results, by protocol.
  """
  # The dual encoder where it was measured, else whatever was.
  key = min(
    sorted(entries),
    key=lambda name: retrieval.RERANKS.index(
      measured[name]["protocol"]["rerank"]
    ),
  )
  rng = np.random.default_rng(options.seed)
  chosen = {
    direction: _choose(rng, entries[key][direction], options.num_queries)
    for direction in ("i2t", "t2i")
  }
  wanted = {query["query"] for query in chosen["i2t"]}
  for query in chosen["t2i"]:
    wanted |= {item["id"] for item in query["top"][:SHOWN]} | {query["right"]}
  images = load_images(data_dir, split, wanted)
  count = len(entries[key]["i2t"])
  texts = len(entries[key]["t2i"])
  rows_i2t = "".join(_image_query(query, images) for query in chosen["i2t"])
  rows_t2i = "".join(_text_query(query, images) for query in chosen["t2i"])
  label = results.protocol_label(measured[key]["protocol"])
  return (
    f"<section><h2>Examples: {page.text(selection.cell_title(split))}</h2>"
    f"<p>Queries drawn at random (seed {options.seed}), ranked by "
    f"{page.text(label)}. Right answers are "
    "green with a tick; the number beside each is its score. Where none of "
    f"the best {SHOWN} is right, the right answer and its rank follow.</p>"
    f"<h3>Image to text, best {SHOWN} of {texts:,} captions</h3>"
    f'<div class="i2t">{rows_i2t}</div>'
    f"<h3>Text to image, best {SHOWN} of {count:,} images</h3>"
    f'<div class="t2i">{rows_t2i}</div></section>'
  )


def _choose(
  rng: np.random.Generator, queries: Sequence[Any], count: int
) -> list[Any]:
  index = rng.choice(len(queries), min(count, len(queries)), replace=False)
  return [queries[i] for i in sorted(index)]


def _image_query(
  query: Mapping[str, Any], images: Mapping[str, np.ndarray]
) -> str:
  items = "".join(
    f"<li{page.right(item)}>{page.text(item['id'])}<i>{item['score']:.2f}</i></li>"
    for item in query["top"][:SHOWN]
  )
  missed = (
    f"<small>right: {page.text(query['right'])} "
    f"(rank {query['rank']:,})</small>"
    if query["rank"] > SHOWN
    else ""
  )
  return (
    '<div class="query">'
    f"{page.thumbnail(images[query['query']], query['query'])}"
    f"<div><ol>{items}</ol>{missed}</div></div>"
  )


def _text_query(
  query: Mapping[str, Any], images: Mapping[str, np.ndarray]
) -> str:
  items = "".join(
    f"<figure{page.right(item)}>"
    f"{page.thumbnail(images[item['id']], item['id'])}"
    f"<figcaption>{item['score']:.2f}</figcaption></figure>"
    for item in query["top"][:SHOWN]
  )
  if query["rank"] > SHOWN:
    items += (
      '<figure class="missed">'
      f"{page.thumbnail(images[query['right']], 'right')}"
      f"<figcaption>rank {query['rank']:,}</figcaption></figure>"
    )
  return (
    f'<div class="query"><h4>{page.text(query["query"])}</h4>'
    f'<div class="row">{items}</div></div>'
  )


def load_images(
  data_dir: str, split: str, names: Iterable[str]
) -> dict[str, np.ndarray]:
  """The decoded pictures of some records, by id."""
  source, left, found = sources.open_source(data_dir, split), set(names), {}
  for record in range(len(source)):
    if not left:
      break
    example = source[record]
    if example.id in left:
      left.remove(example.id)
      found[example.id] = anchor_pictures.look(example)
  if left:
    raise pairs.DataError(
      f"{data_dir}, split {split}: no record {sorted(left)[0]!r}; the "
      "predictions are of other data: run launch/evaluate.py again"
    )
  return found
