"""Every mistake of a user ends with one clear line and exit code 2."""

from __future__ import annotations

import json
import pathlib
import re
import shutil

import cv2
import numpy as np
import pytest

from glscl_jax.data import pairs, prepare, sources
from glscl_jax.data import tokenizer as tokenizers

RECIPES = pathlib.Path(__file__).parents[2] / "configs"


def make_pairs_data(folder, records):
  """A data directory with one training split and a tokenizer."""

  def finish(directory, manifest):
    captions = ["a small red square", "a large blue disc"] * 8
    tokenizers.train_sentencepiece(captions, directory / "tokenizer.model", 40)

  pairs.write(
    folder, splits={"train": lambda: records}, source={}, finish=finish
  )
  return folder


def copy_data(project, folder):
  return shutil.copytree(project.data, folder / "data")


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    (
      "--config.data.batch_siz=3",
      "config.data.batch_siz: unknown key; did you mean "
      "config.data.batch_size?",
    ),
    (
      "--config.batch_size=3",
      "config.batch_size: unknown key; did you mean config.data.batch_size?",
    ),
    (
      "--config.masking.mlm_rate=-0.2",
      "config.masking.mlm_rate: must be in [0, 1), is -0.2",
    ),
    ("--config.data.batch_size=3.5", "invalid literal for int()"),
    ("--config.train.seed=-1", "config.train.seed: must not be negative"),
    ("--wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
    ("extra", "argument 'extra' is no flag"),
    (
      "--config.mesh.fsdp=3",
      "data x fsdp x tensor = (-1, 3, 1) does not give the 8 devices",
    ),
    (
      "--config.data.batch_size=12",
      "config.objectives.neg_group: 8 does not divide data.batch_size 12",
    ),
    (
      "--config.data.dir=/nowhere/data",
      "/nowhere/data: no such data directory",
    ),
    ("--config.data.dir=", "config.data.dir is empty"),
    ("--config.data.train_split=tran", "no split 'tran'; it has ['train'"),
    ("--config.data.tokenizer=/nowhere/t.model", "/nowhere/t.model: cannot be"),
    ("--config.train.eval_every=2", "config.train.eval_splits: empty"),
    (
      "--config.model.text.vocab_size=99",
      "model.text.vocab_size: is 99, but the tokenizer has",
    ),
    ("--config.train.init_from=/nowhere", "/nowhere"),
  ],
)
def test_a_wrong_flag_ends_with_its_name(project, tmp_path, flag, message):
  result = project.run(tmp_path / "work", flag)
  assert result.code == 2
  assert result.err.startswith("error: ") and message in result.err
  assert "Traceback" not in result.err


def test_a_data_directory_is_no_work_dir(project):
  before = {path.name for path in project.data.iterdir()}
  result = project.run(project.data)
  assert result.code == 2
  assert f"--workdir={project.data} is a data directory" in result.err
  assert {path.name for path in project.data.iterdir()} == before


def test_a_batch_that_the_mesh_does_not_divide_is_refused(project, tmp_path):
  flags = [
    f"--config.objectives.{name}=6"
    for name in ("neg_group", "mltc_image_group", "mltc_text_group")
  ]
  result = project.run(tmp_path, "--config.data.batch_size=12", *flags)
  assert result.code == 2
  assert "config.data.batch_size 12 is not divisible by the 8" in result.err


def test_a_recipe_that_is_not_there_is_named(project, tmp_path):
  recipe = type(project)(project.data, tmp_path / "nope.py")
  result = recipe.run(tmp_path)
  assert result.code == 2 and "nope.py" in result.err


@pytest.mark.parametrize(
  ("recipe", "message"),
  [
    (
      "glscl_base.py:abblation",
      "the recipes are ablation, main, meter, meter_itc, scl, glscl",
    ),
    ("scl_base.py:x", "the recipes are ablation and main"),
    (
      "quickstart.py:x",
      "the stages are glscl_towers, glscl, maskvlm_towers, maskvlm, "
      "sycoca, cmal",
    ),
    (
      "maskvlm_base.py:x",
      "the recipes are main, ablation, itc, itc_itm, mlm, mim, mlm_mim, "
      "maskvlm, albef_like",
    ),
    ("maskvlm_tiny.py:x", "this recipe takes no argument"),
    (
      "sycoca_base.py:x",
      "the recipes are main, ablation, clip, coca, coca_attentive, "
      "mim_random, mim_attentive, tg_mim_random, sycoca",
    ),
    ("sycoca_tiny.py:x", "this recipe takes no argument"),
    ("tiny.py:x", "this recipe takes no argument"),
  ],
)
def test_a_wrong_argument_of_a_recipe_ends_with_one_line(
  project, tmp_path, recipe, message
):
  path = RECIPES / recipe
  result = type(project)(project.data, path).run(tmp_path / "work")
  assert result.code == 2
  assert result.err == f"error: flag --config={path}: {recipe}: {message}\n"


def test_an_argument_that_a_recipe_does_not_take_ends_with_one_line(
  project, tmp_path
):
  path = tmp_path / "recipe.py"
  path.write_text("def get_config():\n  return {}\n")
  result = type(project)(project.data, f"{path}:x").run(tmp_path / "work")
  assert result.code == 2
  assert result.err == (
    f"error: flag --config={path}:x: TypeError: get_config() takes 0 "
    "positional arguments but 1 was given\n"
  )


def test_an_unknown_key_in_a_recipe_is_named(project, tmp_path):
  text = project.recipe.read_text()
  path = tmp_path / "recipe.py"
  path.write_text(text.replace("  return c", "  c.train.sead = 3\n  return c"))
  result = type(project)(project.data, path).run(tmp_path / "work")
  assert result.code == 2
  assert "config.train.sead: unknown key; did you mean config.train.seed?" in (
    result.err
  )


def test_a_truncated_array_record_is_named(project, tmp_path):
  data = copy_data(project, tmp_path)
  (path,) = data.glob("*-train.array_record*")
  path.write_bytes(path.read_bytes()[:-100])
  result = project.run(tmp_path / "work", f"--config.data.dir={data}")
  assert result.code == 2
  assert path.name in result.err and "make the directory again" in result.err


def test_a_damaged_array_record_of_full_size_is_named(project, tmp_path):
  data = copy_data(project, tmp_path)
  (path,) = data.glob("*-train.array_record*")
  path.write_bytes(bytes(path.stat().st_size))
  result = project.run(tmp_path / "work", f"--config.data.dir={data}")
  assert result.code == 2
  assert f"{data}, split train, record 0: not readable" in result.err


@pytest.mark.parametrize(
  ("image", "captions", "reason"),
  [
    (b"no picture", ("a red square",), "bad-3: unreadable image"),
    (None, ("",), "bad-3: empty caption"),
  ],
)
def test_a_bad_record_beyond_the_limit_ends_the_run_with_its_name(
  project, tmp_path, image, captions, reason
):
  good = sources.open_source(project.data, "train")[0].image
  records = [
    pairs.Record(
      id=f"{'bad' if i == 3 else 'good'}-{i}",
      split="train",
      image=image if i == 3 and image else good,
      captions=captions if i == 3 else ("a red square",),
    )
    for i in range(8)
  ]
  data = make_pairs_data(tmp_path / "data", records)
  size = tokenizers.load(data / "tokenizer.model").vocab_size
  result = project.run(
    tmp_path / "work",
    "--dry_run",
    f"--config.data.dir={data}",
    f"--config.model.text.vocab_size={size}",
    "--config.data.max_bad_share=0.0",
  )
  assert result.code == 2
  assert reason in result.err and "max_bad_share" in result.err


def test_what_preparation_cannot_use_is_counted_by_line_and_reason(tmp_path):
  white_YXC = np.full((8, 8, 3), 255, np.uint8)
  (tmp_path / "white.png").write_bytes(cv2.imencode(".png", white_YXC)[1])
  (tmp_path / "broken.png").write_bytes(b"no picture")
  lines = [
    {"image": "white.png", "caption": "a white square"},
    {"image": "broken.png", "caption": "a broken picture"},
    {"image": "white.png", "caption": "  "},
  ]
  path = tmp_path / "pairs.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)))
  with pytest.raises(pairs.DataError, match="line 3: caption: empty"):
    prepare.prepare_jsonl(tmp_path / "data", path=path)
  manifest = prepare.prepare_jsonl(
    tmp_path / "data",
    path=path,
    max_reject_share=1.0,
    vocabulary=prepare.Vocabulary(train=False),
  )
  assert [reject["line"] for reject in manifest["rejected"]] == [3, 2]


def test_a_work_dir_of_another_configuration_is_refused_key_by_key(trained):
  project, workdir = trained.project, trained.workdir
  before = sorted(workdir.rglob("*"))
  result = project.run(workdir, *trained.flags, "--config.model.joint_width=32")
  assert result.code == 2
  assert "model.joint_width: 16 there, 32 now" in result.err
  assert "choose another --workdir" in result.err
  assert sorted(workdir.rglob("*")) == before


def test_another_tokenizer_of_the_same_size_is_refused(trained, tmp_path):
  project = trained.project
  source = sources.open_source(project.data, "train")
  texts = [source[i].captions[0] for i in range(len(source))]
  size = tokenizers.load(project.data / "tokenizer.model").vocab_size
  other = tmp_path / "other.model"
  tokenizers.train_sentencepiece(texts[:9] * 3 + texts[9:], other, size)
  result = project.run(
    trained.workdir, *trained.flags, f"--config.data.tokenizer={other}"
  )
  assert result.code == 2
  assert "another tokenizer: sha256" in result.err


def test_captions_over_the_limit_are_counted(trained):
  text = (trained.workdir / "log-0.txt").read_text()
  assert re.search(r"data: 480 rows, [1-9]\d* captions cut to 12 tokens", text)
