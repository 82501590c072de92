"""The command line of launch/prepare.py; what it makes: tests/data."""

import pytest
from absl import flags

from launch import prepare


def parse(*arguments):
  return prepare.parse(["launch/prepare.py", "--output=data", *arguments])


EMOJI = ["--size=48", "--npm=/bin/npm", "--num_processes=1"]
JSONL = ["--split=test", "--image_root=x", "--max_reject_share=0.5"]
FILE = ["--source=jsonl", "--input=pairs.jsonl"]
REGIONS = ["--source=regions", "--input=x", "--features=y", "--classes=z"]
SCENES = ["--source=scenes", "--input=x", "--encoder=y"]
OF_SCENES = ["--num_train=4", "--num_held_out=4", "--scene_size=64", "--seed=1"]


def test_each_source_takes_its_own_flags():
  assert parse(*EMOJI).size == 48
  assert parse(*FILE, *JSONL).split == "test"
  assert (
    parse(*REGIONS, "--split=test", "--max_reject_share=0.5").classes == "z"
  )
  assert parse(*SCENES, *OF_SCENES).num_train == 4


@pytest.mark.parametrize("flag", EMOJI)
def test_jsonl_refuses_what_only_emoji_reads(flag):
  with pytest.raises(flags.Error, match="is read by --source=emoji only"):
    parse(*FILE, flag)


@pytest.mark.parametrize(
  ("flag", "readers"),
  [
    ("--split=test", "--source=jsonl and --source=regions"),
    ("--max_reject_share=0.5", "--source=jsonl and --source=regions"),
    ("--image_root=x", "--source=jsonl"),
    ("--features=x", "--source=regions"),
    ("--classes=x", "--source=regions"),
    ("--encoder=x", "--source=scenes"),
    *((flag, "--source=scenes") for flag in OF_SCENES),
  ],
)
def test_emoji_refuses_what_only_others_read(flag, readers):
  with pytest.raises(flags.Error, match=f"is read by {readers} only"):
    parse(flag)


@pytest.mark.parametrize("arguments", [FILE, REGIONS, SCENES])
def test_what_a_source_needs_is_named(arguments):
  for left_out in arguments[1:]:
    name = left_out.partition("=")[0]
    given = [flag for flag in arguments if flag != left_out]
    with pytest.raises(flags.Error, match=f"{arguments[0]} needs {name}="):
      parse(*given)


@pytest.mark.parametrize("flag", ["--tokenizer=t.model", "--notrain_tokenizer"])
@pytest.mark.parametrize(
  "of_training", ["--vocab_size=40", "--tokenizer_type=word"]
)
def test_what_only_a_trained_tokenizer_reads_is_refused(flag, of_training):
  with pytest.raises(flags.Error, match=of_training.partition("=")[0]):
    parse(of_training, flag)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--source=jsonl", "--output=x"], "error: --source=jsonl needs --input="),
    ([], "error: --output is missing"),
    (["--sorce=emoji"], "error: Unknown command line flag 'sorce'"),
  ],
)
def test_a_mistake_ends_with_one_line_and_code_2(arguments, message, capsys):
  assert prepare.main(["launch/prepare.py", *arguments]) == 2
  assert capsys.readouterr().err.startswith(message)
