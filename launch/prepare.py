r"""Makes a data directory: emoji, pairs of a JSON Lines file, or regions.

  python launch/prepare.py --source=emoji --output=data/emoji
  python launch/prepare.py --source=jsonl --input=pairs.jsonl --output=DIR
  python launch/prepare.py --source=regions --input=captions.jsonl \
    --features=FILE.tsv --classes=objects_vocab.txt --output=DIR
  python launch/prepare.py --source=scenes --input=data/emoji \
    --encoder=WORKDIR --output=data/scenes

A directory that is whole and was made from the same input is left alone. What
the lines of a JSON Lines file and files of regions look like is in
docs/data.md.

Exit code 0: done. 2: `error: ...` says what to change. 130: Ctrl-C.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from glscl_jax import command_line
from glscl_jax.data import prepare, scenes, tokenizer

# The flags that only some sources read.
READ_BY = {
  "emoji": ("size", "npm", "num_processes"),
  "jsonl": ("split", "image_root", "max_reject_share"),
  "regions": ("split", "max_reject_share", "features", "classes"),
  "scenes": ("encoder", "num_train", "num_held_out", "scene_size", "seed"),
}
NEEDED = {
  "emoji": (),
  "jsonl": ("input",),
  "regions": ("input", "features", "classes"),
  "scenes": ("input", "encoder"),
}


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Reads the command line.

  Raises:
    absl.flags.Error: anything that is wrong with it.
  """
  # Not the global FLAGS, so that one process may parse several times.
  values = flags.FlagValues()
  flags.DEFINE_enum(
    "source",
    "emoji",
    list(READ_BY),
    "What to make the pairs from.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "input",
    "",
    "emoji: folder of npm tarballs, filled where they are missing (default: "
    "`npm` beside the output). jsonl, regions: the file. scenes: the data "
    "directory of the drawings.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "output", None, "The data directory to make.", flag_values=values
  )
  flags.DEFINE_string(
    "tokenizer",
    "",
    "Tokenizer file (.model or .json) to copy.",
    flag_values=values,
  )
  flags.DEFINE_boolean(
    "train_tokenizer",
    None,
    "Train a sentencepiece tokenizer on the captions of the split `train` "
    "(default: where there is that split and no --tokenizer).",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "vocab_size",
    2000,
    "Bound of the tokenizer trained here.",
    lower_bound=8,
    flag_values=values,
  )
  flags.DEFINE_enum(
    "tokenizer_type",
    "unigram",
    list(tokenizer.MODEL_TYPES),
    "Of the tokenizer trained here. unigram: any text in pieces; word: a piece "
    "a word, all words outside of the training captions are one.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "size",
    96,
    "emoji: pixels of a side of a drawing.",
    lower_bound=8,
    flag_values=values,
  )
  flags.DEFINE_string("npm", "", "emoji: the npm program.", flag_values=values)
  flags.DEFINE_integer(
    "num_processes",
    2,
    "emoji: processes that render.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_string(
    "split",
    "train",
    "jsonl, regions: split of the lines that name none.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "image_root",
    "",
    "jsonl: folder of the images (default: the file's).",
    flag_values=values,
  )
  flags.DEFINE_float(
    "max_reject_share",
    0.01,
    "jsonl, regions: share of unusable lines above which nothing is written.",
    lower_bound=0.0,
    upper_bound=1.0,
    flag_values=values,
  )
  flags.DEFINE_string(
    "features",
    "",
    "regions: a .tsv file of bottom-up-attention, or a folder of .npz files.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "classes",
    "",
    "regions: the detector's classes, a class a line, names parted by commas.",
    flag_values=values,
  )
  _define_scenes(values)
  command_line.parse(values, argv, doc=__doc__, required=["output"])
  _check_needed(values)
  return values


def _define_scenes(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "encoder",
    "",
    "scenes: work dir or export whose image encoder gives the features.",
    flag_values=values,
  )
  flags.DEFINE_integer(
    "num_train",
    4000,
    "scenes: scenes of the split `train`.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "num_held_out",
    400,
    "scenes: scenes of each other split.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "scene_size",
    128,
    "scenes: pixels of a side.",
    lower_bound=32,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "seed",
    0,
    "scenes: of pictures and captions.",
    lower_bound=0,
    flag_values=values,
  )


def _check_needed(values: flags.FlagValues) -> None:
  """Raises absl.flags.Error for a flag too few, or one that changes nothing."""
  for name in NEEDED[values.source]:
    if not values[name].value:
      raise flags.Error(f"--source={values.source} needs --{name}=..")
  for name in sorted({name for names in READ_BY.values() for name in names}):
    readers = [source for source, names in READ_BY.items() if name in names]
    if values[name].present and values.source not in readers:
      listed = " and ".join(f"--source={source}" for source in readers)
      raise flags.Error(f"--{name} is read by {listed} only")
  trains = values.train_tokenizer is not False and not values.tokenizer
  for name in ("vocab_size", "tokenizer_type"):
    if values[name].present and not trains:
      raise flags.Error(f"--{name} is of a tokenizer that is trained here")


def _prepare(values: flags.FlagValues) -> dict[str, Any]:
  vocabulary = prepare.Vocabulary(
    file=values.tokenizer,
    train=values.train_tokenizer,
    size=values.vocab_size,
    model_type=values.tokenizer_type,
  )
  output = pathlib.Path(values.output)
  if values.source == "emoji":
    return prepare.prepare_emoji(
      output,
      cache=values.input or output.absolute().parent / "npm",
      size=values.size,
      npm=values.npm,
      vocabulary=vocabulary,
      num_processes=values.num_processes,
    )
  if values.source == "scenes":
    # Imported late: the other sources need no model.
    from glscl_jax.export import features

    return prepare.prepare_scenes(
      output,
      drawings=values.input,
      encoder=features.open_encoder(values.encoder),
      options=scenes.Options(
        num_train=values.num_train,
        num_held_out=values.num_held_out,
        size=values.scene_size,
        seed=values.seed,
      ),
      vocabulary=vocabulary,
    )
  if values.source == "regions":
    return prepare.prepare_regions(
      output,
      path=values.input,
      features=values.features,
      classes=values.classes,
      split=values.split,
      max_reject_share=values.max_reject_share,
      vocabulary=vocabulary,
    )
  return prepare.prepare_jsonl(
    output,
    path=values.input,
    image_root=values.image_root,
    split=values.split,
    max_reject_share=values.max_reject_share,
    vocabulary=vocabulary,
  )


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` and returns the exit code."""
  return command_line.run(lambda: _run(parse(argv)))


def _run(values: flags.FlagValues) -> int:
  try:
    manifest = _prepare(values)
  except KeyboardInterrupt:
    print("stopped; the same command begins again", file=sys.stderr)
    return 130
  print(prepare.describe(values.output, manifest))
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
