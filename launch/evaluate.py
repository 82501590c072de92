"""Measures a trained model on one task.

  python launch/evaluate.py --workdir=DIR --task=retrieval
  python launch/evaluate.py --workdir=DIR --data=OTHER --splits=test \
      --rerank=none,querybank,itm --rerank_k=64
  python launch/evaluate.py --workdir=DIR --task=captioning --decode=beam
  python launch/evaluate.py --workdir=DIR --task=anchors

DIR is a work dir of launch/train.py or a directory of launch/export.py. Writes
metrics.json and predictions.json to DIR/eval/TASK; what is in them is in
docs/evaluation.md. Exit code 0: done. 2: `error: ...` says what to change.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import flags

from glscl_jax import command_line, errors, sharding
from glscl_jax import config as config_lib
from glscl_jax.data import pairs, retrieval_set, sources, tokenizer
from glscl_jax.export import weights as weights_lib
from glscl_jax.tasks import anchors, captioning, results, retrieval
from glscl_jax.train import metrics

# {seen, unseen studio} x {seen, unseen concept} of the emoji data.
EMOJI_CELLS = (
  "train",
  "test_seen_studio_unseen_concept",
  "test_unseen_studio_seen_concept",
  "test_unseen_studio_unseen_concept",
)


# Flags that only one task reads.
OWN_FLAGS = {
  "anchors": (),
  "captioning": ("decode", "beam", "length_power", "max_tokens", "min_tokens"),
  "retrieval": (
    "rerank",
    "views",
    "querybank",
    "querybank_temperature",
    "conse_temperature",
    "rerank_k",
    "itc_weight",
    "captions",
    "limit",
    "pair_batch_size",
  ),
}
CAPTION_LOSSES = {
  "truncated": "longer than the text encoder takes",
  "unknown": "with words that the tokenizer does not know",
  "spelled": "with words read as known ones that spell them",
  "alike": "with the same tokens as another one",
}


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Reads the command line.

  Raises:
    absl.flags.Error: anything that is wrong with it.
  """
  # Not the global FLAGS, so that one process may parse several times.
  values = flags.FlagValues()
  flags.DEFINE_string(
    "workdir",
    None,
    "Work dir of a run, or an export directory.",
    flag_values=values,
  )
  flags.DEFINE_enum(
    "task",
    "retrieval",
    sorted(OWN_FLAGS),
    "What to measure.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "data",
    "",
    "Data directory (default: the one of the training).",
    flag_values=values,
  )
  flags.DEFINE_list(
    "splits",
    [],
    "Splits (default: the four cells of the emoji data, else the only one).",
    flag_values=values,
  )
  flags.DEFINE_list(
    "rerank",
    ["none"],
    f"Any of {', '.join(retrieval.RERANKS)}.",
    flag_values=values,
  )
  flags.register_validator(
    "rerank",
    lambda asked: set(asked) <= set(retrieval.RERANKS),
    message=f"takes any of {', '.join(retrieval.RERANKS)}",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "views",
    1,
    "Views of an image whose mean vector counts: the whole one, and random "
    "ones as in training.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "limit",
    0,
    "full: only among the first images of a split, so many; 0: all.",
    lower_bound=0,
    flag_values=values,
  )
  flags.DEFINE_string(
    "querybank",
    "train",
    "querybank, querybank_conse: split whose queries tell which candidates are "
    "hubs, and whose pairs vectors are moved towards.",
    flag_values=values,
  )
  flags.DEFINE_float(
    "querybank_temperature",
    retrieval.Protocol.querybank_temperature,
    "querybank, querybank_conse: temperature, in units of the cosine.",
    flag_values=values,
  )
  flags.DEFINE_float(
    "conse_temperature",
    retrieval.Protocol.conse_temperature,
    "querybank_conse: temperature of what vectors are moved towards.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "rerank_k",
    retrieval.DEFAULT_RERANK_K,
    "Candidates a query that the fusion layers score.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_float(
    "itc_weight", 1.0, "itm_plus_itc: weight of the cosine.", flag_values=values
  )
  flags.DEFINE_enum(
    "captions",
    "first",
    ["first", "all"],
    "Captions of a record that count.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "step",
    "auto",
    "best (by validation), latest, a number, or auto: best if the run was "
    "validated, else latest.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "output",
    "",
    "Where the results go (default: WORKDIR/eval/TASK).",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "batch_size",
    64,
    "Images or captions a call.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "pair_batch_size",
    256,
    "Pairs a call of the fusion layers.",
    lower_bound=1,
    flag_values=values,
  )
  _define_captioning(values)
  command_line.parse(values, argv, doc=__doc__, required=["workdir", "rerank"])
  _check_own(values)
  return values


def _define_captioning(values: flags.FlagValues) -> None:
  flags.DEFINE_enum(
    "decode",
    captioning.Protocol.decode,
    captioning.DECODES,
    "captioning: how a caption is searched.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "beam",
    captioning.Protocol.beam,
    "captioning, beam: captions that live on.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_float(
    "length_power",
    captioning.Protocol.length_power,
    "captioning, beam: score = log-probability / length ** this.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "max_tokens",
    None,
    "captioning: of a caption, with the end (default: "
    f"{captioning.Protocol.max_tokens}, or fewer where the texts of the "
    "training were shorter).",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "min_tokens",
    captioning.Protocol.min_tokens,
    "captioning: of a caption, with the end.",
    flag_values=values,
  )


def _check_own(values: flags.FlagValues) -> None:
  """Raises absl.flags.Error for a flag that would not be read."""
  for task, names in OWN_FLAGS.items():
    for name in names:
      if values[name].present and task != values.task:
        raise flags.Error(
          f"--{name} is of --task={task}, but this is --task={values.task}"
        )
  if values["limit"].present and "full" not in values.rerank:
    raise flags.Error("--limit is of --rerank=full, which is not asked for")
  if values.decode == "greedy":
    for name in ("beam", "length_power"):
      if values[name].present:
        raise flags.Error(f"--{name} is of --decode=beam, not of greedy")


class Progress:
  """One line a stage with the time left; rewritten in place on a terminal."""

  def __init__(self, label: str):
    self._label = label
    self._stage = ""
    self._started = self._said = 0.0
    self._first = 0

  def __call__(self, stage: str, done: int, total: int) -> None:
    """Says how far `stage` is; off a terminal at most every ten seconds."""
    now = time.monotonic()
    if stage != self._stage:
      # The first batch compiles: the rate is that of those after it.
      self._stage, self._started, self._first = stage, now, done
      self._said = now
    live = sys.stdout.isatty()
    if not live and done < total and now - self._said < 10:
      return
    self._said = now
    rate = (done - self._first) / max(now - self._started, 1e-9)
    left = metrics.format_duration((total - done) / rate) if rate else "unknown"
    text = f"{self._label}: {stage} {done}/{total}, eta {left}"
    end = "\n" if done == total or not live else ""
    print(f"\r{text}\x1b[K" if live else text, end=end, flush=True)


def choose_splits(data_dir: str, asked: list[str]) -> list[str]:
  """The splits asked for, or the ones that stand for this data.

  Raises:
    DataError: an unknown split, or several to choose from.
  """
  there = sources.splits(data_dir)
  sources.check_splits(data_dir, asked, option="--splits")
  if asked:
    return asked
  if set(EMOJI_CELLS) <= set(there):
    return list(EMOJI_CELLS)
  if len(there) == 1:
    return list(there)
  raise pairs.DataError(
    f"{data_dir} has the splits {sorted(there)}: say which with --splits"
  )


def format_result(result: Mapping[str, Any]) -> str:
  """A small table: each number with chance beside it."""
  protocol, numbers = result["protocol"], result["metrics"]
  title = (
    f"{result['split']}: {result['num_images']} images, "
    f"{result['num_captions']} captions, "
    f"{results.protocol_label(protocol)} ({result['lineage']['regime']})"
  )
  names = ("r1", "r5", "r10", "median_rank")
  lines = [title, "        " + "".join(f"{n:>18}" for n in names)]
  for direction in retrieval.DIRECTIONS:
    cells = []
    for name in names:
      value = numbers[f"{direction}_{name}"]
      chance = result["chance"][f"{direction}_{name}"]
      share = name != "median_rank"
      cells.append(
        f"{value:.4f} ({chance:.4f})" if share else f"{value:g} ({chance:g})"
      )
    lines.append(f"  {direction}   " + "".join(f"{c:>18}" for c in cells))
  timing = result["timing"]
  if "num_pairs" in timing:
    rate = (
      f", {timing['pairs_per_second']:g} pairs/s"
      if "pairs_per_second" in timing
      else ""
    )
    lines.append(
      f"  {timing['num_pairs']} pairs re-ranked in "
      f"{timing['rerank_seconds']:g} s{rate}"
    )
  lost = [
    f"{result[f'num_{kind}_captions']} {text}"
    for kind, text in CAPTION_LOSSES.items()
    if result[f"num_{kind}_captions"]
  ]
  if lost:
    lines.append(f"  captions: {', '.join(lost)}")
  return "\n".join([*lines, *_format_bad(result)])


def _format_bad(result: Mapping[str, Any]) -> list[str]:
  if not result["num_bad_records"]:
    return []
  shown = "; ".join(result["bad_records"][:3])
  return [f"  {result['num_bad_records']} bad records left out: {shown}"]


def make_lineage_adder(
  model: weights_lib.Weights, data: results.DataSet
) -> Callable[[dict[str, Any]], None]:
  """What puts the lineage of these weights into the result of a split."""
  fingerprint = weights_lib.params_sha256(model.params)

  def add_lineage(result: dict[str, Any]) -> None:
    result["lineage"] = results.make_lineage(
      step=model.step,
      params_sha256=fingerprint,
      config=model.config,
      training=model.lineage,
      data=data,
      split=result["split"],
    )

  return add_lineage


def evaluate(
  model: weights_lib.Weights,
  *,
  data_dir: str,
  splits: list[str],
  protocols: list[retrieval.Protocol],
  output: pathlib.Path,
  batch_size: int,
  pair_batch_size: int,
) -> None:
  """Measures all splits by all protocols; writes after each.

  The protocols share captions and views: a split is encoded once a limit.
  """
  ((captions, views),) = {(p.captions, p.views) for p in protocols}
  for protocol in protocols:
    retrieval.check_protocol(model.config, protocol)
  text_tokenizer = tokenizer.load(model.tokenizer_path)
  tokenizer.check_vocab(model.config, text_tokenizer)
  data = results.identify(data_dir)
  add_lineage = make_lineage_adder(model, data)
  mesh, params = None, model.params
  if jax.device_count() > 1:
    mesh = sharding.make_mesh(config_lib.MeshConfig())
    params = jax.device_put(params, sharding.replicated(mesh))
  else:
    params = jax.device_put(params)
  encode = functools.partial(
    retrieval.encode,
    params,
    config=model.config,
    tokenizer=text_tokenizer,
    batch_size=batch_size,
    mesh=mesh,
  )
  print(
    "i2t: images ask for captions; t2i: captions ask for images; in "
    "parentheses what a random order gives",
    flush=True,
  )
  banks = dict.fromkeys(p.querybank for p in protocols if p.asks_bank)
  bank_of = {
    split: encode(
      retrieval_set.read(data_dir, split, captions=captions),
      on_progress=Progress(f"querybank {split}"),
    )
    for split in banks
  }
  limits = dict.fromkeys(p.limit for p in protocols)
  parts = list(itertools.product(splits, limits))
  for number, (split, limit) in enumerate(parts, 1):
    own = [p for p in protocols if p.limit == limit]
    progress = Progress(f"[{number}/{len(parts)}] {split}")
    encodings = encode(
      retrieval_set.read(data_dir, split, captions=captions, limit=limit),
      keep_tokens=any(p.fuses for p in own),
      views=views,
      on_progress=progress,
    )
    fused: dict[int | None, retrieval.Fused] = {}
    for protocol in own:
      count = protocol.candidates
      if protocol.fuses and count not in fused:
        fused[count] = retrieval.fuse(
          params,
          encodings,
          config=model.config,
          count=count,
          pair_batch_size=pair_batch_size,
          mesh=mesh,
          on_progress=progress,
        )
      rankings = retrieval.rank(
        encodings,
        protocol=protocol,
        fused=fused[count] if protocol.fuses else None,
        bank=bank_of[protocol.querybank] if protocol.asks_bank else None,
      )
      result = retrieval.report(encodings, rankings, protocol=protocol)
      add_lineage(result)
      if jax.process_index() == 0:
        results.write(
          output,
          task="retrieval",
          data=data,
          result=result,
          predictions=retrieval.predictions(encodings, rankings),
        )
        print(format_result(result), flush=True)


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` and returns the exit code."""
  return command_line.run(lambda: _run(parse(argv)))


def _run(values: flags.FlagValues) -> int:
  workdir = pathlib.Path(values.workdir)
  output = pathlib.Path(values.output or workdir / "eval" / values.task)
  errors.check_writable(output, option=f"--output={output}")
  model = weights_lib.open_weights(workdir, step=values.step)
  print(f"{workdir}: step {model.step}", flush=True)
  data_dir = model.data_dir(values.data)
  run = {"anchors": _ask, "captioning": _caption, "retrieval": _retrieve}[
    values.task
  ]
  run(values, model, data_dir, output)
  print(f"wrote {output / results.METRICS}")
  return 0


def _retrieve(
  values: flags.FlagValues,
  model: weights_lib.Weights,
  data_dir: str,
  output: pathlib.Path,
) -> None:
  protocols = [
    retrieval.Protocol(
      rerank=rerank,
      querybank=values.querybank,
      querybank_temperature=values.querybank_temperature,
      conse_temperature=values.conse_temperature,
      rerank_k=values.rerank_k,
      itc_weight=values.itc_weight,
      captions=values.captions,
      views=values.views,
      limit=values.limit if rerank == "full" else 0,
    )
    for rerank in values.rerank
  ]
  if any(protocol.asks_bank for protocol in protocols):
    sources.check_splits(data_dir, [values.querybank], option="--querybank")
  evaluate(
    model,
    data_dir=data_dir,
    splits=choose_splits(data_dir, values.splits),
    protocols=protocols,
    output=output,
    batch_size=values.batch_size,
    pair_batch_size=values.pair_batch_size,
  )


def _caption(
  values: flags.FlagValues,
  model: weights_lib.Weights,
  data_dir: str,
  output: pathlib.Path,
) -> None:
  write_captions(
    model,
    data_dir=data_dir,
    splits=choose_splits(data_dir, values.splits),
    protocol=captioning.Protocol(
      decode=values.decode,
      beam=values.beam,
      length_power=values.length_power,
      max_tokens=values.max_tokens
      or min(captioning.Protocol.max_tokens, captioning.longest(model.config)),
      min_tokens=values.min_tokens,
    ),
    output=output,
    batch_size=values.batch_size,
  )


def write_captions(
  model: weights_lib.Weights,
  *,
  data_dir: str,
  splits: list[str],
  protocol: captioning.Protocol,
  output: pathlib.Path,
  batch_size: int,
) -> None:
  """Writes a caption for each image of all splits, after each, on one device.

  Raises:
    CaptioningError: the model writes none of that length.
  """
  captioning.check(model.config, protocol)
  text_tokenizer = tokenizer.load(model.tokenizer_path)
  tokenizer.check_vocab(model.config, text_tokenizer)
  data = results.identify(data_dir)
  add_lineage = make_lineage_adder(model, data)
  params = jax.device_put(model.params)
  for number, split in enumerate(splits, 1):
    written = captioning.write(
      params,
      retrieval_set.read(data_dir, split, captions="all"),
      config=model.config,
      tokenizer=text_tokenizer,
      protocol=protocol,
      batch_size=batch_size,
      on_progress=Progress(f"[{number}/{len(splits)}] {split}"),
    )
    result = captioning.report(written, protocol=protocol)
    add_lineage(result)
    results.write(
      output,
      task="captioning",
      data=data,
      result=result,
      predictions=captioning.predictions(written),
    )
    print(format_captions(result, written.texts[:3]), flush=True)


def format_captions(result: Mapping[str, Any], examples: Sequence[str]) -> str:
  """A few lines; the captions themselves are in predictions.json."""
  numbers = result["metrics"]
  lines = [
    f"{result['split']}: {result['num_images']} images "
    f"({result['lineage']['regime']})",
    f"  {numbers['exact']:.4f} as one of the image's own captions, "
    f"{result['num_distinct']} different ones, "
    f"{numbers['mean_tokens']:.1f} tokens, {result['num_unended']} cut",
    *(f"  {text}" for text in examples),
    *_format_bad(result),
  ]
  return "\n".join(lines)


def _ask(
  values: flags.FlagValues,
  model: weights_lib.Weights,
  data_dir: str,
  output: pathlib.Path,
) -> None:
  ask_anchors(
    model,
    data_dir=data_dir,
    splits=choose_splits(data_dir, values.splits),
    protocol=anchors.Protocol(),
    output=output,
    batch_size=values.batch_size,
  )


def ask_anchors(
  model: weights_lib.Weights,
  *,
  data_dir: str,
  splits: list[str],
  protocol: anchors.Protocol,
  output: pathlib.Path,
  batch_size: int,
) -> None:
  """Asks for the anchors of all splits; writes after each; on one device.

  Raises:
    AnchorError: no objective of the model trains what is asked.
  """
  anchors.check(model.config)
  text_tokenizer = tokenizer.load(model.tokenizer_path)
  data = results.identify(data_dir)
  add_lineage = make_lineage_adder(model, data)
  params = jax.device_put(model.params)
  print("in parentheses what the best single answer gives; of pairs, chance")
  for number, split in enumerate(splits, 1):
    found = anchors.measure(
      params,
      anchors.read(
        sources.open_source(data_dir, split),
        config=model.config,
        tokenizer=text_tokenizer,
        protocol=protocol,
      ),
      config=model.config,
      batch_size=batch_size,
      on_progress=Progress(f"[{number}/{len(splits)}] {split}"),
    )
    result = anchors.report(found, config=model.config, protocol=protocol)
    add_lineage(result)
    results.write(
      output,
      task="anchors",
      data=data,
      result=result,
      predictions=anchors.predictions(found, text_tokenizer),
    )
    print(format_anchors(result), flush=True)


def format_anchors(result: Mapping[str, Any]) -> str:
  """A line a number, with chance beside it."""
  lines = [
    f"{result['split']}: {result['num_samples']} images "
    f"({result['lineage']['regime']})"
  ]
  for name, value in result["metrics"].items():
    if name in result["chance"]:
      lines.append(
        f"  {name:<24}{value:.4f} ({result['chance'][name]:.4f})  of "
        f"{result['counts'][name]}"
      )
    else:
      lines.append(f"  {name:<24}{value:.4f}")
  return "\n".join([*lines, *_format_bad(result)])


if __name__ == "__main__":
  sys.exit(main(sys.argv))
