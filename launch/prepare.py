"""Makes a data directory: the emoji data, or pairs listed in a JSON Lines file.

  python launch/prepare.py --source=emoji --output=data/emoji
  python launch/prepare.py --source=jsonl --input=pairs.jsonl --output=DIR

A directory that is whole and was made from the same input is left alone. What
the lines of a JSON Lines file look like is in docs/data.md.

Exit code 0: done. 2: `error: ...` says what to change. 130: Ctrl-C.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from glscl_jax import command_line
from glscl_jax.data import prepare, tokenizer

# The flags that only one source reads.
READ_BY = {
  "emoji": ("size", "npm", "num_processes"),
  "jsonl": ("split", "image_root", "max_reject_share"),
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
    "`npm` beside the output). jsonl: the file.",
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
    "jsonl: split of the lines that name none.",
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
    "jsonl: share of unusable lines above which nothing is written.",
    lower_bound=0.0,
    upper_bound=1.0,
    flag_values=values,
  )
  command_line.parse(values, argv, doc=__doc__, required=["output"])
  _check_needed(values)
  return values


def _check_needed(values: flags.FlagValues) -> None:
  """Raises absl.flags.Error for a flag too few, or one that changes nothing."""
  if values.source == "jsonl" and not values.input:
    raise flags.Error("--source=jsonl needs --input=FILE")
  for source, names in READ_BY.items():
    for name in names:
      if values[name].present and source != values.source:
        raise flags.Error(f"--{name} is read by --source={source} only")
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
