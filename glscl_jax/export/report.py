"""report.html: a run on one page, with every picture inside the file.

Loss curves from metrics.jsonl, recalls from eval/retrieval/metrics.json beside
chance, examples from predictions.json, the text-to-image attention of the last
fusion layer, and, where the system has them, completed patches, words and
anchors. What was not measured is left out and said so.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from glscl_jax import config as config_lib
from glscl_jax.data import pairs, sources, transforms
from glscl_jax.export import (
  anchor_pictures,
  attention,
  pictures,
  reconstruction,
)
from glscl_jax.export.weights import Weights, name_arrays, params_sha256
from glscl_jax.systems import registry
from glscl_jax.tasks import results, retrieval

CELL_TITLES = {
  "train": "seen studios, seen concepts (training pairs)",
  "test_seen_studio_unseen_concept": "seen studios, unseen concepts",
  "test_unseen_studio_seen_concept": "unseen studio, seen concepts",
  "test_unseen_studio_unseen_concept": "unseen studio, unseen concepts",
}
CURVES = {  # metric -> title, in this order
  "loss": "loss, weighted sum",
  "mlm": "MLM (nats a masked token)",
  "itm": "ITM (nats a pair)",
  "itc": "ITC (nats a pair)",
  "mim": "MIM (deviations a pixel)",
  "ic": "IC (nats a token)",
  "tg_mim": "TG-MIM (squared deviations a pixel)",
  "amc": "AMC (nats a word and a region)",
  "wrc": "WRC (nats a pair)",
  "mrc": "MRC (nats a region)",
  "mrfr": "MRFR (squared, a value)",
  "mgsc_image": "MGSC image (nats)",
  "mgsc_text": "MGSC text (nats)",
  "mltc_image": "MLTC image (nats a patch)",
  "mltc_text": "MLTC text (nats a token)",
  "mlm_accuracy": "MLM accuracy",
  "ic_accuracy": "IC accuracy",
  "itm_accuracy": "ITM accuracy",
  "amc_word_anchor_accuracy": "AMC accuracy, anchors' words",
  "amc_word_masked_accuracy": "AMC accuracy, masked words",
  "amc_region_anchor_accuracy": "AMC accuracy, anchors' regions",
  "amc_region_hidden_accuracy": "AMC accuracy, hidden regions",
  "wrc_accuracy": "WRC accuracy",
  "itc_accuracy": "ITC accuracy in the batch",
  "itc_temperature": "ITC temperature",
  "grad_norm": "gradient norm",
  "learning_rate": "learning rate",
  "samples_per_second": "samples a second",
  "eval/mean_r1": "validation R@1, mean",
}
SHARES = frozenset(
  title
  for name, title in CURVES.items()
  if "accuracy" in name or name.startswith("eval/")
)
THUMBNAIL = 84  # pixels a side
MAX_POINTS = 600  # of a curve
FULL_RED = 4  # times even attention, at least
MAX_WORDS = 6  # of a caption whose attention is shown
SHOWN = 5  # candidates an example


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How much is shown."""

  num_queries: int = 6  # a split and direction
  num_maps: int = 6  # drawings whose attention, patches, words are shown
  num_measured: int = 256  # drawings whose patches and words are measured
  splits: tuple[str, ...] = ()  # of the examples; empty: the held-out ones
  seed: int = 0  # of the choice of examples


def make_report(
  workdir: pathlib.Path,
  weights: Weights,
  *,
  data_dir: str,
  charts: pathlib.Path,
  options: Options = Options(),
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
  splits = options.splits or _held_out(shown)
  blocks = [
    _facts(workdir, weights, data_dir),
    _recalls(found["results"], weights, charts),
    _curves(read_metrics(workdir / "metrics.jsonl"), charts),
    *(
      _examples(
        data_dir,
        split,
        shown[split],
        found["results"][data.name][split],
        options,
      )
      if split in shown
      else _absent("Examples", f"{split} of {data.name} was not evaluated.")
      for split in splits
    ),
    *([] if splits else [_absent("Examples", _why_none(data, predictions))]),
    _attention(weights, data_dir, splits, options),
    _patches(weights, data_dir, splits, options),
    _words(weights, data_dir, splits, options),
    _anchors(workdir, weights, data_dir, splits, options),
    _config(weights),
    _credits(data_dir),
  ]
  return _page(workdir, weights, blocks)


def _why_none(data: results.DataSet, predictions: Mapping[str, Any]) -> str:
  there = ", ".join(sorted(predictions["results"]))
  if not there:
    return "nothing was evaluated yet: run launch/evaluate.py."
  return f"no held-out split of {data.name} was evaluated, but {there}."


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
  """The lines of a metrics.jsonl; a last line cut by a kill is left out."""
  if not path.is_file():
    return []
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]


def series(
  records: Iterable[Mapping[str, float]], name: str
) -> list[tuple[float, float]]:
  """(step, value) of one metric, at most MAX_POINTS of them."""
  points = [
    (record["step"], record[name])
    for record in records
    if name in record and record[name] is not None
  ]
  stride = -(-len(points) // MAX_POINTS) or 1
  # The last point is the one that is looked for.
  return points[::-1][::stride][::-1]


def cell_title(split: str) -> str:
  """The name of a split for people."""
  return CELL_TITLES[split] if split in CELL_TITLES else split


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


def _in_order(splits: Iterable[str]) -> list[str]:
  known = [split for split in CELL_TITLES if split in splits]
  return known + sorted(set(splits) - set(known))


def _held_out(own: Mapping[str, Any]) -> tuple[str, ...]:
  """At most two splits, the hardest first, never the training one."""
  rest = [split for split in _in_order(own) if split != "train"]
  return tuple(rest[::-1][:2])


def _facts(workdir: pathlib.Path, weights: Weights, data_dir: str) -> str:
  config, lineage = weights.config, weights.lineage
  count = sum(array.size for array in name_arrays(weights.params).values())
  facts = {
    "System": f"{config.system}: "
    + ", ".join(
      f"{name} {getattr(config.objectives, name):g}"
      for name in config_lib.OBJECTIVES
      if getattr(config.objectives, name) > 0
    ),
    "Parameters": f"{count:,}",
    **_describe_inputs(config),
    "Fusion": registry.find(config).describe_fusion(config),
    "Steps": f"{weights.step:,} of {config.train.num_steps:,}, batch "
    f"{config.data.batch_size:,}, peak learning rate "
    f"{config.optimizer.learning_rate:g}, seed {config.train.seed}",
    "Data": _describe_data(data_dir, config),
    "Time": "; ".join(_spent(workdir)),
    "Started from": _describe_origin(lineage),
    "Fingerprints": f"weights {params_sha256(weights.params)[:12]}, config "
    f"{config_lib.sha256(config)[:12]}, tokenizer "
    f"{lineage['tokenizer_sha256'][:12]}",
  }
  rows = "".join(
    f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>"
    for name, value in facts.items()
    if value
  )
  return f'<section><h2>Run</h2><table class="facts">{rows}</table></section>'


def _describe_inputs(config: config_lib.Config) -> dict[str, str]:
  describe, model = registry.find(config).describe_inputs, config.model
  if describe is not None:
    return describe(config)
  return {
    "Image encoder": f"depth {model.vision.depth}, width "
    f"{model.vision.width}, {model.vision.image_size} px, patches of "
    f"{model.vision.patch_size} px{_describe_stem(model.vision)}",
    "Text encoder": f"depth {model.text.depth}, width {model.text.width}, "
    f"{model.text.vocab_size:,} pieces, at most {model.text.max_length} tokens",
  }


def _describe_stem(vision: config_lib.VisionConfig) -> str:
  if not vision.stem:
    return ""
  widths = ", ".join(map(str, vision.stem))
  blocks = ", ".join(map(str, vision.stem_blocks))
  return f", convolution stem of widths {widths} with {blocks} residual blocks"


def _describe_data(data_dir: str, config: config_lib.Config) -> str:
  manifest = pairs.read_manifest(data_dir)
  split = config.data.train_split
  count = (
    f", {manifest['splits'][split]:,} training records"
    if split in manifest["splits"]
    else ""
  )
  return f"{pathlib.Path(data_dir).name}{count}"


def _describe_origin(lineage: Mapping[str, Any]) -> str:
  if "imported" in lineage:
    return lineage["imported"]
  parent = lineage["init_from"] if "init_from" in lineage else None
  if not parent:
    return "random weights"
  if "workdir" in parent:
    return f"{parent['workdir']}, step {parent['step']}"
  return parent["imported"] if "imported" in parent else "other weights"


def _spent(workdir: pathlib.Path) -> list[str]:
  """What the log says of each call of the training, in order."""
  log = workdir / "log-0.txt"
  if not log.is_file():
    return []
  return re.findall(
    r"(?:finished at step|stopped by).*?; (\d+ steps in this call, time: .*)",
    log.read_text(encoding="utf-8"),
  )


def _recalls(
  found: Mapping[str, Any], weights: Weights, charts: pathlib.Path
) -> str:
  if not found:
    return _absent("Retrieval", "launch/evaluate.py was not run on this.")
  blocks = []
  for name, splits in sorted(found.items()):
    ordered = {split: splits[split] for split in _in_order(splits)}
    chart = pictures.recall_bars(
      {
        cell_title(split): {
          results.protocol_label(entry["protocol"]): entry["metrics"]
          for entry in _by_protocol(entries)
        }
        for split, entries in ordered.items()
      },
      {
        cell_title(split): next(iter(entries.values()))["chance"]
        for split, entries in ordered.items()
      },
    )
    (charts / f"recall-{name}.svg").write_bytes(chart)
    blocks.append(
      f"<h3>{_text(name)}</h3>"
      + _figure(
        _image(chart, "svg+xml", "recalls", "chart"),
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
        f"<td rowspan={len(entries) + 1}>{_text(cell_title(split))}"
        f"<small>{size}<br>{_text(entry['lineage']['regime'])}, step "
        f"{entry['lineage']['step']:,}</small></td>"
        if number == 0
        else ""
      )
      label = _text(results.protocol_label(entry["protocol"]))
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


def _curves(
  records: Sequence[Mapping[str, float]], charts: pathlib.Path
) -> str:
  found = {title: series(records, name) for name, title in CURVES.items()}
  found = {title: points for title, points in found.items() if points}
  if not found:
    return _absent("Training", "There is no metrics.jsonl.")
  chart = pictures.curves(found, percent=SHARES)
  (charts / "curves.svg").write_bytes(chart)
  return (
    "<section><h2>Training</h2>"
    + _figure(
      _image(chart, "svg+xml", "training curves", "chart"),
      "Against optimizer steps. Dark: mean over 5% of the steps; pale: logged "
      "values. Losses in nats; validation R@1 is the mean over the validation "
      "splits and both directions.",
    )
    + "</section>"
  )


def _examples(
  data_dir: str,
  split: str,
  entries: Mapping[str, Any],
  measured: Mapping[str, Any],
  options: Options,
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
    f"<section><h2>Examples: {_text(cell_title(split))}</h2>"
    f"<p>Queries drawn at random (seed {options.seed}), ranked by "
    f"{_text(label)}. Right answers are "
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
    f"<li{_right(item)}>{_text(item['id'])}<i>{item['score']:.2f}</i></li>"
    for item in query["top"][:SHOWN]
  )
  missed = (
    f"<small>right: {_text(query['right'])} (rank {query['rank']:,})</small>"
    if query["rank"] > SHOWN
    else ""
  )
  return (
    f'<div class="query">{_thumbnail(images[query["query"]], query["query"])}'
    f"<div><ol>{items}</ol>{missed}</div></div>"
  )


def _text_query(
  query: Mapping[str, Any], images: Mapping[str, np.ndarray]
) -> str:
  items = "".join(
    f"<figure{_right(item)}>{_thumbnail(images[item['id']], item['id'])}"
    f"<figcaption>{item['score']:.2f}</figcaption></figure>"
    for item in query["top"][:SHOWN]
  )
  if query["rank"] > SHOWN:
    items += (
      f'<figure class="missed">{_thumbnail(images[query["right"]], "right")}'
      f"<figcaption>rank {query['rank']:,}</figcaption></figure>"
    )
  return (
    f'<div class="query"><h4>{_text(query["query"])}</h4>'
    f'<div class="row">{items}</div></div>'
  )


def _right(item: Mapping[str, Any]) -> str:
  return ' class="right"' if item["match"] else ""


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


def _attention(
  weights: Weights, data_dir: str, splits: Sequence[str], options: Options
) -> str:
  """Attention maps of each word of some held-out captions."""
  if registry.find(weights.config).cross_attention is None:
    return ""
  if not _attends(weights):
    return _absent(
      "Where each word looks",
      "no objective of this run uses the fusion of text with image.",
    )
  split = _shown_split(data_dir, splits)
  found = attention.attend(
    weights,
    attention.choose(
      sources.open_source(data_dir, split),
      count=options.num_maps,
      max_words=MAX_WORDS,
      seed=options.seed,
    ),
  )
  rows = "".join(_attention_row(example) for example in found)
  return (
    "<section><h2>Where each word looks</h2><p>Text-to-image attention of "
    "the last fusion layer: strongest head, mean over the pieces of a word, "
    f"without the class token. Split: {_text(cell_title(split))}; captions of "
    f"two to {MAX_WORDS} words, drawn at random (seed {options.seed}). The "
    "number is the largest value of a word as a multiple of even attention; "
    "full red is the largest value of the drawing, at least "
    f"{FULL_RED:g}x.</p>"
    f'<div class="maps">{rows}</div></section>'
  )


def _shown_split(data_dir: str, splits: Sequence[str]) -> str:
  """The first of those asked for, else the hardest held-out one."""
  if splits:
    return splits[0]
  there = sources.splits(data_dir)
  held_out = [split for split in _in_order(there) if split != "train"]
  return (held_out or list(there))[-1]


def _attends(weights: Weights) -> bool:
  """Whether the last fusion layer has parameters of its text stream."""
  part = registry.find(weights.config).attention_part
  return part is not None and any(
    name.startswith(f"{part}.") for name in name_arrays(weights.params)
  )


def _attention_row(found: attention.Attention) -> str:
  # What every patch gets when patches and class token share evenly.
  even = 1 / (found.maps_WGG[0].size + 1)
  top = max(float(found.maps_WGG.max()), FULL_RED * even)
  tiles = []
  for word, map_GG in zip(found.words, found.maps_WGG, strict=True):
    picture = pictures.overlay(
      found.image_YXC, map_GG, top=top, size=2 * THUMBNAIL
    )
    tiles.append(
      f"<figure>{_image(pictures.png(picture), 'png', word, 'thumb')}"
      f"<figcaption><b>{_text(word)}</b> {map_GG.max() / even:.1f}x"
      "</figcaption></figure>"
    )
  drawing = _thumbnail(found.image_YXC, " ".join(found.words))
  return (
    f'<div class="row"><figure>{drawing}<figcaption>drawing</figcaption>'
    f"</figure>{''.join(tiles)}</div>"
  )


def _patches(
  weights: Weights, data_dir: str, splits: Sequence[str], options: Options
) -> str:
  """Masked images, completed from their own captions and from others."""
  system, config = registry.find(weights.config), weights.config
  name = system.patch_objective
  if name not in config.objectives.active:
    return ""
  title = "What stands in the hidden patches"
  split = _shown_split(data_dir, splits)
  examples = reconstruction.choose(
    sources.open_source(data_dir, split),
    count=options.num_measured,
    seed=options.seed,
  )
  if len({example.captions[0] for example in examples}) < 2:
    return _absent(title, f"{split} has no two captions to compare.")
  found = reconstruction.complete(
    weights, examples, num_shown=options.num_maps, seed=options.seed
  )
  rows = "".join(_patch_row(one) for one in found.shown)
  note = (
    "The model predicts a patch up to its brightness and contrast, which are "
    "taken from the drawing. "
    if config.objectives.mim_patch_norm
    else ""
  )
  return (
    f"<section><h2>{_text(title)}</h2><p>Pixels of hidden patches, predicted "
    "from the patches that are left and a caption: the drawing's own one, and "
    "for comparison that of another drawing, with the same patches hidden: "
    f"{_text(system.describe_hidden(config))}. {note}"
    f"Split: {_text(cell_title(split))}; drawn at random (seed "
    f"{options.seed}).</p><p>{_text(_compare_errors(found, CURVES[name]))}</p>"
    f'<div class="patches">{rows}</div></section>'
  )


def _compare_errors(found: reconstruction.Completions, title: str) -> str:
  """The numbers behind the pictures, with standard errors."""
  own_A, other_A = found.error_A, found.other_error_A
  count, gain_A = len(own_A), other_A - own_A
  if not gain_A.any():
    return (
      f"{title} over {count:,} drawings: {own_A.mean():.4f}, whatever the "
      "caption; it is not read."
    )
  share = float(np.mean(gain_A > 0))
  error = float(np.std(gain_A)) / count**0.5
  return (
    f"{title} over {count:,} drawings: {own_A.mean():.4f} from the own "
    f"caption, {other_A.mean():.4f} from another one; difference "
    f"{gain_A.mean():.4f}, "
    f"standard error {error:.4f}. From the own caption it is lower for "
    f"{100 * share:.0f} % of the drawings, standard error "
    f"{100 * (share * (1 - share) / count) ** 0.5:.0f} %."
  )


def _patch_row(found: reconstruction.Completion) -> str:
  image_YXC, hidden_I = found.image_YXC, found.hidden_I
  tiles = {
    "which are hidden": pictures.mark(image_YXC, hidden_I),
    "what is seen": pictures.hide(image_YXC, hidden_I),
    "from its caption": found.by_caption_YXC,
    f"from: {found.other}": found.by_other_YXC,
    "drawing": image_YXC,
  }
  figures = "".join(
    f"<figure>{_thumbnail(tile_YXC, label)}"
    f"<figcaption>{_text(label)}</figcaption></figure>"
    for label, tile_YXC in tiles.items()
  )
  return (
    f"<div><h4>{_text(found.caption)}</h4>"
    f'<div class="row">{figures}</div></div>'
  )


def _words(
  weights: Weights, data_dir: str, splits: Sequence[str], options: Options
) -> str:
  """Masked words as guessed with the image and without it."""
  system, config = registry.find(weights.config), weights.config
  if system.word_objective not in config.objectives.active:
    return ""
  split = _shown_split(data_dir, splits)
  examples = reconstruction.choose(
    sources.open_source(data_dir, split),
    count=options.num_measured,
    seed=options.seed,
  )
  title = "What stands in the place of masked words"
  if not examples:
    return _absent(title, f"{split} has no captions.")
  found = reconstruction.guess(
    weights, examples, num_shown=options.num_maps, seed=options.seed
  )
  rows = "".join(_word_row(one) for one in found.shown)
  return (
    f"<section><h2>{_text(title)}</h2><p>The "
    f"{reconstruction.TOP} likeliest tokens at masked places, with the drawing "
    "and with a blank image of the mean colour. Right ones are green with a "
    f"tick. Split: {_text(cell_title(split))}; drawn at random (seed "
    f"{options.seed}).</p><p>The likeliest token is right for "
    f"{100 * found.by_image:.1f} % of {found.num_words:,} masked tokens with "
    f"the drawing, for {100 * found.by_blank:.1f} % without.</p>"
    f'<div class="i2t">{rows}</div></section>'
  )


def _word_row(found: reconstruction.MaskedText) -> str:
  lists = "".join(
    f"<p>with the drawing</p>{_guesses(one.by_image)}"
    f"<p>without</p>{_guesses(one.by_blank)}"
    for one in found.guesses
  )
  return (
    f'<div class="query">{_thumbnail(found.image_YXC, "drawing")}'
    f"<div><h4>{_text(' '.join(found.pieces))}</h4>{lists}</div></div>"
  )


def _guesses(guesses: Sequence[reconstruction.Candidate]) -> str:
  items = "".join(
    f"<li{_right({'match': one.right})}>{_text(one.name)}"
    f"<i>{one.probability:.2f}</i></li>"
    for one in guesses
  )
  return f"<ol>{items}</ol>"


def _anchors(
  workdir: pathlib.Path,
  weights: Weights,
  data_dir: str,
  splits: Sequence[str],
  options: Options,
) -> str:
  """What stands in swapped slots: figures, and images with their anchors."""
  system, config = registry.find(weights.config), weights.config
  if system.answer is None:
    return ""
  title = "Anchors and swaps"
  if not system.answered(config):
    return _absent(title, "no objective of this run asks for words or regions.")
  found = results.read(workdir / "eval" / "anchors" / results.METRICS)
  name = results.identify(data_dir).name
  if not options.splits and name in found["results"]:
    splits = _held_out(found["results"][name]) or splits
  split = _shown_split(data_dir, splits)
  source = sources.open_source(data_dir, split)
  scenes = anchor_pictures.make_scenes(
    weights,
    source,
    num_shown=options.num_maps,
    num_tried=options.num_measured,
    seed=options.seed,
  )
  if scenes:
    shown = (
      f"<h3>{_text(cell_title(split))}</h3><p>{_text(_say_swap(config))} "
      f"Images with an anchor, drawn at random (seed {options.seed}).</p>"
      f'<div class="scenes">{"".join(map(_scene, scenes))}</div>'
    )
  else:
    shown = (
      f"<p>No image is shown: none of {min(options.num_measured, len(source))} "
      f"of {_text(split)} has an anchor that this run asks for.</p>"
    )
  return (
    f"<section><h2>{_text(title)}</h2><p>An anchor is a word of the caption "
    "and a region of the image that name the same.</p>"
    f"{_anchor_table(found['results'], weights)}{shown}</section>"
  )


def _say_swap(config: config_lib.Config) -> str:
  """What the model of the pictures is shown, and asked."""
  masking, fields = config.masking, registry.find(config).answered(config)
  parts = ["Anchors have a colour each; other regions are grey."]
  if fields & {"words", "classes"}:
    parts.append(
      {
        "both": "The contents of an anchor's word and region change places; ",
        "text": "An anchor's word takes the content of its region; ",
        "image": "An anchor's region takes the content of its word; ",
        "none": "Nothing is swapped, anchors are hidden; ",
      }[masking.swap]
      + "beside it stands what the model says was there: the first token of "
      "the word, the class of the region. Other words and regions are masked "
      "as in training."
    )
  if "cosine_BTR" in fields:
    parts.append(
      "Bars, from -1 to 1: cosine of the word's state with those of the "
      "regions, nothing swapped or masked; the regions that the word names are "
      "green with a tick."
    )
  return " ".join(parts)


ANCHOR_COLUMNS = {
  "word_accuracy": "word, swapped",
  "masked_word_accuracy": "word, masked",
  "class_accuracy": "class, swapped",
  "masked_class_accuracy": "class, hidden",
  "pair_accuracy": "nearest region",
}


def _anchor_table(found: Mapping[str, Any], weights: Weights) -> str:
  if not found:
    return "<p>Not measured: launch/evaluate.py --task=anchors was not run.</p>"
  head = "".join(f"<th>{title}</th>" for title in ANCHOR_COLUMNS.values())
  rows, stale, fingerprint = [], False, params_sha256(weights.params)
  for name, measured in sorted(found.items()):
    for split in _in_order(measured):
      for entry in measured[split].values():
        stale = stale or entry["lineage"]["params_sha256"] != fingerprint
        cells = "".join(_anchor_cell(entry, name) for name in ANCHOR_COLUMNS)
        rows.append(
          f"<tr><td>{_text(cell_title(split))}<small>{_text(name)}, "
          f"{entry['num_samples']:,} images, {_text(_per_sample(entry))}<br>"
          f"{_text(entry['lineage']['regime'])}, step "
          f"{entry['lineage']['step']:,}</small></td>{cells}</tr>"
        )
  note = (
    '<p class="warning">Some results are of other weights than those of '
    "this page; run launch/evaluate.py --task=anchors again.</p>"
    if stale
    else ""
  )
  return (
    f'{note}<div class="wide"><table class="numbers anchored"><tr><th>split'
    f"</th>{head}</tr>{''.join(rows)}</table></div><p>Right answers in "
    "percent, of first captions. Small: for words and classes what always "
    "giving the commonest right answer would reach, for the nearest region "
    "what a random one would; n: slots or words asked. Ties count against the "
    "model.</p>"
  )


def _per_sample(entry: Mapping[str, Any]) -> str:
  name = "anchors_per_sample"
  if name not in entry["metrics"]:
    return "no anchors asked"
  return f"{entry['metrics'][name]:.2f} anchors an image"


def _anchor_cell(entry: Mapping[str, Any], name: str) -> str:
  if name not in entry["metrics"]:
    return "<td>not asked</td>"
  return (
    f"<td>{100 * entry['metrics'][name]:.1f}<small>"
    f"{100 * entry['chance'][name]:.1f}; n = {entry['counts'][name]:,}"
    "</small></td>"
  )


def _scene(scene: anchor_pictures.Scene) -> str:
  caption = " ".join(
    _text(word)
    if number is None
    else f'<b style="{_underline(number)}">{_text(word)}</b>'
    for word, number in scene.words
  )
  rows = "".join(
    f'<div class="anchor"><b style="{_underline(i)}">{_text(anchor.phrase)}'
    f"</b>{_said('word', anchor.word)}{_said('class', anchor.classed)}"
    f"{_bars(anchor, scene)}</div>"
    for i, anchor in enumerate(scene.anchors)
  )
  picture = _image(pictures.png(scene.image_YXC), "png", "regions", "boxes")
  return f"<div><h4>{caption}</h4><div>{picture}{rows}</div></div>"


def _underline(number: int) -> str:
  return f"border-bottom: 3px solid {pictures.anchor_colour(number)}"


def _said(title: str, answer: anchor_pictures.Answer | None) -> str:
  if answer is None:
    return ""
  own = "" if answer.right else f" <i>is: {_text(answer.own)}</i>"
  kind = "right" if answer.right else "wrong"
  return f'<span>{title} <q class="{kind}">{_text(answer.said)}</q>{own}</span>'


def _bars(anchor: anchor_pictures.Anchor, scene: anchor_pictures.Scene) -> str:
  rows = "".join(
    f'<li{_right({"match": near.named})}><u style="width: '
    f'{30 * (1 + near.cosine):.0f}px"></u>{near.cosine:.2f} '
    f"<small>{near.region + 1} {_text(scene.classes[near.region])}</small></li>"
    for near in anchor.near
  )
  return f'<ul class="bars">{rows}</ul>' if rows else ""


def _config(weights: Weights) -> str:
  text = _text(config_lib.to_json(weights.config))
  return (
    "<section><h2>Configuration</h2><details><summary>the whole configuration"
    f"</summary><pre>{text}</pre></details></section>"
  )


def _credits(data_dir: str) -> str:
  """Authors and licences of the pictures, where the data names them."""
  manifest = pairs.read_manifest(data_dir)
  if "studios" not in manifest:
    return ""
  items = ", ".join(
    f"{_text(name)} by {_text(entry['author'])} ({_text(entry['licence'])})"
    for name, entry in sorted(manifest["studios"].items())
  )
  return f"<footer>Drawings: {items}.</footer>"


def _absent(title: str, why: str) -> str:
  return (
    f"<section><h2>{_text(title)}</h2><p>Not shown: {_text(why)}</p></section>"
  )


def _figure(content: str, caption: str) -> str:
  return f"<figure>{content}<figcaption>{_text(caption)}</figcaption></figure>"


def _thumbnail(image_YXC: np.ndarray, label: str) -> str:
  # Twice the size shown, for fine screens.
  small = transforms.resize(image_YXC, size=2 * THUMBNAIL)
  return _image(pictures.png(small), "png", label, "thumb")


def _image(data: bytes, kind: str, label: str, css: str) -> str:
  text = base64.b64encode(data).decode()
  return (
    f'<img class="{css}" alt="{_text(label)}" '
    f'src="data:image/{kind};base64,{text}">'
  )


def _text(value: str) -> str:
  return html.escape(str(value))


def _page(
  workdir: pathlib.Path, weights: Weights, blocks: Sequence[str]
) -> str:
  title = f"{weights.config.system} / {pathlib.Path(workdir).absolute().name}"
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><main>"
    f"<h1>{_text(title)}</h1><p class=lead>Image-text pre-training, step "
    f"{weights.step:,}</p>{''.join(blocks)}</main></body></html>\n"
  )


STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #fff; color: #1f2933;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Arial, sans-serif; }}
main {{ max-width: 1060px; margin: 0 auto; padding: 32px 24px 64px; }}
h1 {{ font-size: 26px; font-weight: 600; margin: 0; }}
h2 {{ font-size: 19px; font-weight: 600; margin: 44px 0 10px;
  padding-top: 18px; border-top: 1px solid #e4e7eb; }}
h3 {{ font-size: 15px; font-weight: 600; margin: 22px 0 8px; }}
h4 {{ font-size: 14px; font-weight: 600; margin: 0 0 6px; }}
p {{ margin: 6px 0 12px; max-width: 76ch; }}
.lead, small, figcaption {{ color: #616e7c; }}
small {{ display: block; font-weight: 400; font-size: 12px; }}
figure {{ margin: 0; }}
figcaption {{ font-size: 12.5px; max-width: 92ch; }}
.chart {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13.5px; }}
th, td {{ text-align: left; vertical-align: top; padding: 4px 12px 4px 0; }}
.facts th {{ color: #616e7c; font-weight: 400; white-space: nowrap; }}
.numbers {{ margin-top: 14px; width: 100%; }}
.numbers th {{ font-weight: 600; border-bottom: 1px solid #cbd2d9; }}
.numbers td {{ border-bottom: 1px solid #e4e7eb; }}
.numbers td:nth-last-child(-n+8), .numbers tr:nth-child(2) th {{
  text-align: right; font-variant-numeric: tabular-nums; }}
.chance td {{ color: #616e7c; }}
.warning {{ background: #fff8e1; padding: 8px 12px; }}
.thumb {{ width: {THUMBNAIL}px; height: {THUMBNAIL}px; display: block;
  background: #fff; border-radius: 4px; }}
.i2t, .t2i {{ display: grid; gap: 18px 28px;
  grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }}
.t2i {{ grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); }}
.i2t .query {{ display: flex; gap: 16px; }}
.i2t .query > div {{ flex: 1; }}
ol {{ margin: 0; padding-left: 22px; font-size: 13.5px; }}
ol i {{ font-style: normal; color: #9aa5b1; font-size: 12px;
  margin-left: 8px; font-variant-numeric: tabular-nums; }}
li.right {{ color: #0b6e3a; font-weight: 600; }}
li.right::after {{ content: " \\2713"; }}
.row {{ display: flex; flex-wrap: wrap; gap: 8px; }}
.t2i .thumb {{ width: 66px; height: 66px; }}
.row figure {{ padding: 3px; border: 2px solid #e4e7eb; border-radius: 7px; }}
.row figure.right {{ border-color: #17924f; }}
.row figure.missed {{ border: 2px dashed #9aa5b1; margin-left: 8px; }}
.row figcaption {{ text-align: center; max-width: {THUMBNAIL}px;
  overflow-wrap: anywhere; line-height: 1.3; padding-top: 2px; }}
.row figure.right figcaption {{ color: #0b6e3a; font-weight: 600; }}
.row figure.right figcaption::after {{ content: " \\2713"; }}
.maps {{ display: grid; gap: 14px 28px;
  grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); }}
.maps .row figure {{ border-color: transparent; }}
.patches {{ display: grid; gap: 18px 28px;
  grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); }}
.patches .thumb {{ image-rendering: pixelated; }}
.patches .row figure {{ border-color: transparent; }}
.anchored td:first-child {{ text-align: left; }}
.scenes {{ display: grid; gap: 26px; }}
.scenes > div > div {{ display: flex; flex-wrap: wrap; gap: 10px 18px; }}
.scenes h4 b {{ font-weight: 600; }}
.boxes {{ width: 220px; height: auto; display: block; align-self: start;
  border: 1px solid #e4e7eb; }}
.anchor {{ font-size: 12.5px; flex: 1; min-width: 120px; }}
.anchor span, .anchor small {{ display: block; }}
.anchor i {{ font-style: normal; color: #616e7c; display: block; }}
.anchor q {{ quotes: none; font-weight: 600; }}
.anchor q.right {{ color: #0b6e3a; }}
.anchor q.right::after {{ content: " \\2713"; }}
.anchor q.wrong {{ color: #a4161a; }}
.bars {{ list-style: none; margin: 6px 0 0; padding: 0; }}
.bars li {{ font-variant-numeric: tabular-nums; line-height: 1.25; }}
.bars u {{ display: inline-block; height: 8px; background: #9aa5b1;
  margin-right: 5px; }}
.bars small {{ display: inline; font-size: 11.5px; }}
.bars li.right u {{ background: #17924f; }}
pre {{ font-size: 12px; background: #f5f7fa; padding: 12px; overflow-x: auto; }}
summary {{ cursor: pointer; }}
footer {{ margin-top: 44px; padding-top: 14px; border-top: 1px solid #e4e7eb;
  color: #616e7c; font-size: 12.5px; }}
"""
