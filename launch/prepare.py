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
from typing import Any

from absl import app, flags

from glscl_jax import command_line
from glscl_jax.data import pairs, prepare

_SOURCE = flags.DEFINE_enum(
  "source", "emoji", ["emoji", "jsonl"], "What to make the pairs from."
)
_INPUT = flags.DEFINE_string(
  "input",
  "",
  "emoji: folder of npm tarballs, filled where they are missing (default: "
  "`npm` beside the output). jsonl: the file.",
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "The data directory to make.", required=True
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer", "", "Tokenizer file (.model or .json) to copy."
)
_TRAIN_TOKENIZER = flags.DEFINE_boolean(
  "train_tokenizer",
  None,
  "Train a sentencepiece tokenizer on the captions of the split `train` "
  "(default: where there is that split and no --tokenizer).",
)
_VOCAB_SIZE = flags.DEFINE_integer(
  "vocab_size", 2000, "Bound of the tokenizer trained here.", lower_bound=8
)
_SIZE = flags.DEFINE_integer(
  "size", 96, "emoji: pixels of a side of a drawing.", lower_bound=8
)
_NPM = flags.DEFINE_string("npm", "", "emoji: the npm program.")
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", 2, "emoji: processes that render.", lower_bound=1
)
_SPLIT = flags.DEFINE_string(
  "split", "train", "jsonl: split of the lines that name none."
)
_IMAGE_ROOT = flags.DEFINE_string(
  "image_root", "", "jsonl: folder of the images (default: the file's)."
)
_MAX_REJECT_SHARE = flags.DEFINE_float(
  "max_reject_share",
  0.01,
  "jsonl: share of unusable lines above which nothing is written.",
  lower_bound=0.0,
  upper_bound=1.0,
)


def _prepare() -> dict[str, Any]:
  vocabulary = prepare.Vocabulary(
    file=_TOKENIZER.value,
    train=_TRAIN_TOKENIZER.value,
    size=_VOCAB_SIZE.value,
  )
  output = pathlib.Path(_OUTPUT.value)
  if _SOURCE.value == "emoji":
    return prepare.prepare_emoji(
      output,
      cache=_INPUT.value or output.absolute().parent / "npm",
      size=_SIZE.value,
      npm=_NPM.value,
      vocabulary=vocabulary,
      num_processes=_NUM_PROCESSES.value,
    )
  if not _INPUT.value:
    raise pairs.DataError("--source=jsonl needs --input=FILE")
  return prepare.prepare_jsonl(
    output,
    path=_INPUT.value,
    image_root=_IMAGE_ROOT.value,
    split=_SPLIT.value,
    max_reject_share=_MAX_REJECT_SHARE.value,
    vocabulary=vocabulary,
  )


def _run() -> int:
  try:
    manifest = _prepare()
  except KeyboardInterrupt:
    print("stopped; the same command begins again", file=sys.stderr)
    return 130
  print(prepare.describe(_OUTPUT.value, manifest))
  return 0


def main(argv: list[str]) -> None:
  """Makes the directory and prints what is in it."""
  del argv
  sys.exit(command_line.run(_run))


def _parse(argv: list[str]) -> list[str]:
  def check() -> int:
    command_line.check_rest(flags.FLAGS(argv))
    return 0

  if code := command_line.run(check):
    sys.exit(code)
  return argv[:1]


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
