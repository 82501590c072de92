import dataclasses
import json
import pathlib

import pytest
from absl import flags
from ml_collections import config_flags

from glscl_jax import config
from tests import random_pairs, random_regions, recipes

ROOT = pathlib.Path(__file__).parents[1]


def changed(path, value):
  """The default ConfigDict with the value at a dotted path replaced."""
  tree = config.to_config_dict(config.Config())
  *sections, name = path.split(".")
  place = tree
  for section in sections:
    place = place[section]
  place[name] = value
  return tree


def read(path, value):
  return config.from_config_dict(changed(path, value))


def error_of(path, value):
  with pytest.raises(config.ConfigError) as caught:
    read(path, value)
  return str(caught.value)


def parse_tree(tmp_path, *overrides):
  """What a launcher's command line makes of a recipe, before it is checked."""
  recipe = tmp_path / "recipe.py"
  recipe.write_text(
    "from glscl_jax import config\n"
    "def get_config(arg=''):\n"
    "  return config.to_config_dict(config.Config())\n"
  )
  values = flags.FlagValues()
  arguments = ["train.py", f"--config={recipe}", *overrides]
  holder = config_flags.DEFINE_config_file(
    "config",
    lock_config=True,
    flag_values=values,
    sys_argv=arguments,
  )
  values(arguments)
  return holder.value


def parse(tmp_path, *overrides):
  """What a launcher does with its command line."""
  return config.from_config_dict(parse_tree(tmp_path, *overrides))


def leaves(tree, path=""):
  for item in dataclasses.fields(tree):
    value = getattr(tree, item.name)
    here = f"{path}{item.name}"
    if dataclasses.is_dataclass(value):
      yield from leaves(value, here + ".")
    else:
      yield here, value


LEAVES = dict(leaves(config.Config()))


# Round trips.


def test_default_survives_a_config_dict():
  default = config.Config()
  assert config.from_config_dict(config.to_config_dict(default)) == default


def test_default_survives_json():
  default = config.Config()
  assert config.from_json(config.to_json(default)) == default


def test_changed_values_survive_json():
  tree = changed("optimizer.clip_norm", 0.5)
  tree.train.eval_splits = ("validation_seen", "validation_unseen")
  tree.objectives.itc_temperature_range = None
  made = config.from_config_dict(tree)
  assert made.optimizer.clip_norm == 0.5
  assert config.from_json(config.to_json(made)) == made


def test_a_locked_config_dict_is_read():
  tree = config.to_config_dict(config.Config()).lock()
  assert config.from_config_dict(tree) == config.Config()


def test_config_is_hashable_as_a_static_argument():
  assert hash(config.Config()) == hash(config.Config())


def test_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.Config().train.num_steps = 3


def test_fingerprint_changes_with_any_value():
  same = config.sha256(config.Config())
  assert same == config.sha256(config.Config())
  assert same != config.sha256(read("train.seed", 1))


def test_sections_that_are_left_out_keep_their_defaults():
  made = config.from_config_dict({"train": {"num_steps": 3}})
  assert made.train.num_steps == 3
  assert made.model == config.ModelConfig()


# Mistakes, each with its path.


@pytest.mark.parametrize(
  ("tree", "path", "near"),
  [
    ({"modle": {}}, "config.modle", "config.model"),
    (
      {"model": {"vision": {"widht": 64}}},
      "config.model.vision.widht",
      "config.model.vision.width",
    ),
    (
      {"optimizer": {"learning_rat": 1.0}},
      "config.optimizer.learning_rat",
      "config.optimizer.learning_rate",
    ),
  ],
)
def test_an_unknown_key_names_the_nearest(tree, path, near):
  with pytest.raises(config.ConfigError) as caught:
    config.from_config_dict(tree)
  assert str(caught.value) == f"{path}: unknown key; did you mean {near}?"


def test_an_unknown_key_like_no_other_lists_what_there_is():
  with pytest.raises(config.ConfigError, match="config.zzz: .*'model'"):
    config.from_config_dict({"zzz": 1})


@pytest.mark.parametrize(
  ("path", "value", "told"),
  [
    ("train.num_steps", True, "expected int, got bool True"),
    ("train.num_steps", 10.0, "expected int, got float 10.0"),
    ("train.num_steps", "10", "expected int, got str '10'"),
    ("train.num_steps", None, "expected int, got NoneType None"),
    ("model.scan", 1, "expected bool, got int 1"),
    ("data.dir", 3, "expected str, got int 3"),
    ("objectives.mlm", True, "expected float, got bool True"),
    ("objectives.mlm", "1.0", "expected float, got str '1.0'"),
    ("model.vision", 3, "expected a section, got 3"),
    ("data.mean", 0.5, "expected a tuple, got 0.5"),
    ("data.mean", (0.5, 0.5), "expected 3 values, got (0.5, 0.5)"),
    ("data.mean", (0.5,) * 4, "expected 3 values, got (0.5, 0.5, 0.5, 0.5)"),
    ("train.eval_splits", "validation", "expected a tuple, got 'validation'"),
    ("optimizer.clip_norm", "1", "expected float, got str '1'"),
    ("objectives.text_mgsc_group", 1.5, "expected int, got float 1.5"),
  ],
)
def test_a_wrong_type_names_its_path(path, value, told):
  with pytest.raises(config.ConfigError) as caught:
    *sections, name = path.split(".")
    tree = {name: value}
    for section in reversed(sections):
      tree = {section: tree}
    config.from_config_dict(tree)
  assert str(caught.value) == f"config.{path}: {told}"


def test_a_wrong_item_of_a_tuple_names_its_index():
  message = error_of("data.mean", (0.5, "x", 0.5))
  assert message == "config.data.mean[1]: expected float, got str 'x'"
  message = error_of("train.eval_splits", ("validation", 3))
  assert message.startswith("config.train.eval_splits[1]: expected str")


def test_an_unknown_choice_names_the_nearest():
  message = error_of("masking.mlm_scheme", "80101")
  assert message.startswith("config.masking.mlm_scheme: '80101' is not one of")
  assert message.endswith("did you mean '801010'?")


def test_int_widens_to_float():
  weight = read("objectives.mlm", 2).objectives.mlm
  assert (weight, type(weight)) == (2.0, float)
  mean = read("data.mean", (0, 1, 0)).data.mean
  assert mean == (0.0, 1.0, 0.0)
  assert {type(value) for value in mean} == {float}


def test_lists_become_tuples():
  assert read("data.mean", [0.1, 0.2, 0.3]).data.mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
  "path",
  ["optimizer.clip_norm", "objectives.text_mgsc_group"],
)
def test_optional_values_take_none_and_a_value(path):
  assert dict(leaves(read(path, None)))[path] is None
  assert dict(leaves(read(path, 4)))[path] == 4


@pytest.mark.parametrize(
  ("path", "value", "told"),
  [
    ("masking.image_block_ratio", 1.0, "must be in [0, 1), is 1.0"),
    ("masking.image_block_size", 0, "must be positive, is 0"),
    ("masking.mlm_rate", -0.1, "must be in [0, 1), is -0.1"),
    ("masking.image_drop_ratio", 1.0, "must be in [0, 1), is 1.0"),
    ("masking.image_token_ratio", -1.0, "must be in [0, 1), is -1.0"),
    ("masking.completion_text_rate", 1.5, "must be in [0, 1), is 1.5"),
    ("model.text.dropout", -0.5, "must be in [0, 1), is -0.5"),
    ("model.fusion.dropout", 1.0, "must be in [0, 1), is 1.0"),
    ("optimizer.warmup_fraction", 1.0, "must be in [0, 1), is 1.0"),
    ("optimizer.final_fraction", 1.0, "must be in [0, 1), is 1.0"),
    ("optimizer.beta2", 1.0, "must be in [0, 1), is 1.0"),
    ("optimizer.learning_rate", 0.0, "must be positive, is 0.0"),
    ("optimizer.muon_rms", 0.0, "must be positive, is 0.0"),
    ("optimizer.muon_beta", 1.0, "must be in [0, 1), is 1.0"),
    ("optimizer.weight_decay", -1.0, "must not be negative, is -1.0"),
    ("optimizer.clip_norm", 0.0, "must be positive, is 0.0"),
    ("objectives.mim", -1.0, "must not be negative, is -1.0"),
    ("objectives.itc", -1.0, "must not be negative, is -1.0"),
    ("objectives.completion_temperature", 0.0, "must be positive, is 0.0"),
    ("objectives.text_mgsc_group", 0, "must be positive, is 0"),
    ("objectives.neg_group", 0, "must be positive, is 0"),
    ("objectives.amc_pair_group", 0, "must be positive, is 0"),
    ("objectives.amc_pair", -0.5, "must not be negative, is -0.5"),
    ("masking.max_anchors", 0, "must be positive, is 0"),
    ("masking.max_pairs", 0, "must be positive, is 0"),
    ("masking.region_mask_rate", 1.0, "must be in [0, 1), is 1.0"),
    ("model.region.number", 0, "must be positive, is 0"),
    ("model.region.feature_width", 0, "must be positive, is 0"),
    ("model.region.num_classes", 0, "must be positive, is 0"),
    ("objectives.itc_temperature_range", (0.5, 0.1), "0 < low <= high"),
    ("objectives.itc_temperature_range", (0.0, 0.1), "0 < low <= high"),
    ("data.batch_size", 0, "must be positive, is 0"),
    ("data.num_workers", -1, "must not be negative, is -1"),
    ("data.max_bad_share", 1.5, "must be in [0, 1]"),
    ("data.std", (1.0, 0.0, 1.0), "must be positive"),
    ("data.augment.crop_scale", (0.9, 0.8), "needs 0 < low <= high"),
    ("data.augment.crop_scale", (0.5, 1.5), "must not exceed 1"),
    ("data.augment.randaugment_magnitude", 31.0, "at most 30"),
    ("data.augment.warp", 2.5, "must not exceed 2, is 2.5"),
    ("data.augment.warp", -0.5, "must not be negative, is -0.5"),
    ("data.augment.recolor", 1.5, "must not exceed 1, is 1.5"),
    ("model.init_std", 0.0, "must be positive, is 0.0"),
    ("model.vision.norm_eps", 0.0, "must be positive, is 0.0"),
    ("model.text.norm_eps", 0.0, "must be positive, is 0.0"),
    ("model.fusion.norm_eps", -1e-5, "must be positive, is -1e-05"),
    ("model.vision.mask_token_std", -1.0, "must not be negative, is -1.0"),
    ("model.vision.width", 100, "not a multiple of 64"),
    ("model.text.width", 100, "not a multiple of 64"),
    ("model.fusion.width", 100, "not a multiple of 64"),
    ("model.fusion.image_depth", 0, "must be positive, is 0"),
    ("model.fusion.text_depth", 0, "must be positive, is 0"),
    ("model.fusion.decoder_depth", 0, "must be positive, is 0"),
    ("model.vision.depth", -1, "must not be negative, is -1"),
    ("model.vision.depth", 0, "set class_state to mean"),
    ("model.text.place_std", -0.1, "must not be negative, is -0.1"),
    ("model.text.depth", 0, "set class_state to mean"),
    ("model.text.max_length", 2, "needs room for 3 tokens"),
    ("train.num_steps", 0, "must be positive, is 0"),
    ("train.keep_last", 0, "must be positive, is 0"),
    ("train.seed", -1, "must not be negative, is -1"),
  ],
)
def test_a_value_out_of_range_names_its_path(path, value, told):
  message = error_of(path, value)
  assert message.startswith(f"config.{path}: ")
  assert told in message


# Values that contradict each other.


def test_without_a_projection_the_contrastive_space_is_that_of_fusion():
  with pytest.raises(config.ConfigError, match="has fusion.width 768"):
    config.ModelConfig(joint_projection="none", joint_width=512)
  config.ModelConfig(joint_projection="none", joint_width=768)


def test_the_patch_size_must_divide_the_image():
  message = error_of("model.vision.patch_size", 15)
  assert message == (
    "config.model.vision.patch_size: 15 does not divide image_size 288"
  )


def test_text_needs_a_position_for_every_token():
  message = error_of("model.text.max_length", 513)
  assert message.startswith("config.model.text.num_positions: ")
  assert read("model.text.max_length", 512).model.text.max_length == 512


def test_some_objective_must_count():
  tree = config.to_config_dict(config.Config())
  for name in config.OBJECTIVES:
    tree.objectives[name] = 0.0
  with pytest.raises(
    config.ConfigError, match=r"config\.objectives\.\*: every"
  ):
    config.from_config_dict(tree)


@pytest.mark.parametrize("name", config.GROUPS)
def test_groups_of_active_objectives_must_divide_the_batch(name):
  objective = config.GROUPS[name]
  own = config.SYSTEM_OBJECTIVES["glscl"]
  made = config.Config() if objective in own else config.cmal_defaults()

  def with_group(weight):
    tree = config.to_config_dict(made)
    tree.data.batch_size = 4096
    tree.objectives[objective] = weight
    tree.objectives[name] = 24
    return tree

  with pytest.raises(config.ConfigError) as caught:
    config.from_config_dict(with_group(1.0))
  assert str(caught.value) == (
    f"config.objectives.{name}: 24 does not divide data.batch_size 4096"
  )
  config.from_config_dict(with_group(0.0))


def test_fields_that_a_system_does_not_read_keep_their_defaults():
  message = error_of("masking.split", "random")
  assert message == (
    "config.masking.split: 'random', but system 'glscl' does not read it: leave"
    " it at 'attentive'"
  )
  defaults = {
    "glscl": config.Config(),
    "maskvlm": config.maskvlm_defaults(),
    "sycoca": config.sycoca_defaults(),
    "cmal": config.cmal_defaults(),
  }
  other = {
    "mim_text": False,
    "ic_mask": False,
    "text_mask_with_replacement": True,
    "split": "random",
    "mim_mask_level": "feature",
    "attentive_empty": "order",
    "image_block_size": 64,
    "number": 7,
    "feature_width": 7,
    "num_classes": 7,
    "unimodal_layers": (1, 1),
    "anchors": "random",
    "anchor_match": "piece",
    "anchor_region": "random",
    "max_anchors": 7,
    "max_pairs": 7,
    "swap": "none",
    "swap_rescale": True,
    "region_mask_rate": 0.5,
    "amc_pair_group": 64,
  }
  for path, systems in config.READ_BY.items():
    *sections, name = path.split(".")
    for system, made in defaults.items():
      tree = config.to_config_dict(made)
      place = tree
      for section in sections:
        place = place[section]
      number = 7 if "depth" in name or name.endswith("steps") else 0.25
      place[name] = other[name] if name in other else number
      if system in systems and name != "image_block_size":
        config.from_config_dict(tree)
      elif system not in systems:
        with pytest.raises(config.ConfigError, match="does not read it"):
          config.from_config_dict(tree)


def test_a_batch_smaller_than_a_group_is_one_group():
  assert read("data.batch_size", 8).data.batch_size == 8


@pytest.mark.parametrize(
  "name",
  ["test", "test_seen", "seen_test", "testA", "coco_test1k", "Test", "train"],
)
def test_a_test_or_training_split_must_not_pick_the_checkpoint(name):
  message = error_of("train.eval_splits", ("validation", name))
  assert message.startswith("config.train.eval_splits: ")


def test_other_words_that_hold_the_letters_of_test_may_pick_it():
  names = ("latest", "contest_val")
  assert read("train.eval_splits", names).train.eval_splits == names


@pytest.mark.parametrize("value", [0.0009, 0.6])
def test_the_temperature_starts_within_its_range(value):
  assert error_of("model.itc_temperature", value) == (
    f"config.model.itc_temperature: {value} is outside of"
    " objectives.itc_temperature_range (0.001, 0.5)"
  )
  tree = changed("model.itc_temperature", value)
  tree.objectives.itc_temperature_range = None
  made = config.from_config_dict(tree)
  assert made.model.itc_temperature == value


@pytest.mark.parametrize("sizes", [(0, 1, 1), (-2, 1, 1), (-1, -1, 1)])
def test_a_mesh_has_at_most_one_open_axis(sizes):
  tree = config.to_config_dict(config.Config())
  tree.mesh.data, tree.mesh.fsdp, tree.mesh.tensor = sizes
  with pytest.raises(config.ConfigError, match=r"config\.mesh\.\*: "):
    config.from_config_dict(tree)


# Systems.


def maskvlm(**values):
  """A ConfigDict of MaskVLM with the values at some dotted paths replaced."""
  return replaced(random_pairs.maskvlm(), values)


def replaced(whole, values):
  tree = config.to_config_dict(whole)
  for path, value in values.items():
    *sections, name = path.split("__")
    place = tree
    for section in sections:
      place = place[section]
    place[name] = value
  return tree


def maskvlm_error(**values):
  with pytest.raises(config.ConfigError) as caught:
    config.from_config_dict(maskvlm(**values))
  return str(caught.value)


def test_an_objective_of_another_system_names_those_of_this_one():
  assert error_of("objectives.mim", 0.5) == (
    "config.objectives.mim: 0.5, but the objectives of system 'glscl' are mlm,"
    " itm, itc, mgsc_image, mgsc_text, mltc_image, mltc_text; set it to 0"
  )
  assert maskvlm_error(objectives__mgsc_text=1.0) == (
    "config.objectives.mgsc_text: 1, but the objectives of system 'maskvlm'"
    " are mlm, mim, itc, itm; set it to 0"
  )


def test_every_objective_belongs_to_a_system():
  weights = {
    item.name
    for item in dataclasses.fields(config.ObjectiveConfig)
    if item.name in config.OBJECTIVES
  }
  assert weights == set(config.OBJECTIVES)
  assert set(config.OBJECTIVES) == {
    name for own in config.SYSTEM_OBJECTIVES.values() for name in own
  }


def test_active_objectives_are_those_with_a_weight():
  weights = random_pairs.only("mim", itc=0.5)
  assert config.ObjectiveConfig(**weights).active == ("itc", "mim")


@pytest.mark.parametrize(
  ("values", "told"),
  [
    (
      {"model__vision__patch_size": 32},
      "config.masking.image_block_size: 16 is no multiple of"
      " model.vision.patch_size 32",
    ),
    (
      {"model__vision__image_size": 40},
      "config.masking.image_block_size: 16 does not divide"
      " model.vision.image_size 40",
    ),
    (
      {"model__text__width": 128},
      "config.model.text.width: 128, but system 'maskvlm' needs"
      " fusion.width 64",
    ),
    (
      {"model__vision__width": 128},
      "config.model.vision.width: 128, but system 'maskvlm' needs"
      " fusion.width 64",
    ),
    (
      {"model__match_features": "pooled"},
      "config.model.match_features: 'pooled', but system 'maskvlm' knows"
      " product, concat",
    ),
    (
      {"objectives__itm_negatives": "dataset"},
      "config.objectives.itm_negatives: 'dataset', but system 'maskvlm' knows"
      " in_batch, hard",
    ),
    (
      {"objectives__share_text_dropout": False},
      "config.objectives.share_text_dropout: False, but system 'maskvlm'"
      " encodes each text once",
    ),
    (
      {"objectives__itc": 0.0},
      "config.objectives.itm_negatives: 'hard' draws by ITC similarity and"
      " needs itc > 0",
    ),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_maskvlm_cannot_run_names_its_path(values, told):
  assert maskvlm_error(**values) == told


@pytest.mark.parametrize(
  ("values", "told"),
  [
    (
      {"model__vision__width": 128},
      "model.vision.width: 128, but system 'sycoca' needs fusion.width 64",
    ),
    (
      {"model__text__dropout": 0.1},
      "model.text.dropout: 0.1, but system 'sycoca' knows 0.0 only",
    ),
    (
      {"model__fusion__dropout": 0.1},
      "model.fusion.dropout: 0.1, but system 'sycoca' knows 0.0 only",
    ),
    (
      {"model__text__embedding_norm": True},
      "model.text.embedding_norm: True, but system 'sycoca' knows False only",
    ),
    (
      {"model__text__class_state": "mean"},
      "model.text.class_state: 'mean', but system 'sycoca' knows 'token' only",
    ),
    (
      {"model__text__num_positions": 10},
      "model.text.num_positions: must be at least max_length + 1 = 11",
    ),
    (
      {"objectives__itc": 0.0},
      "masking.split: 'attentive' orders patches by ITC similarity and needs"
      " objectives.itc > 0",
    ),
    (
      {"masking__r_high": 0.03},
      "masking.r_high: 0.03 of 16 patches is none to predict",
    ),
    (
      {"masking__r_low": 0.97},
      "masking.r_low: 0.97 of 16 patches leaves none to describe",
    ),
    (
      {"objectives__mlm": 1.0},
      "objectives.mlm: 1, but the objectives of system 'sycoca' are itc, ic,"
      " tg_mim; set it to 0",
    ),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_sycoca_cannot_run_names_its_path(values, told):
  with pytest.raises(config.ConfigError) as caught:
    config.from_config_dict(replaced(random_pairs.sycoca(), values))
  assert str(caught.value) == f"config.{told}"


@pytest.mark.parametrize(
  ("values", "told"),
  [
    (
      {"model__text__width": 128},
      "model.text.width: 128, but system 'cmal' needs fusion.width 64",
    ),
    (
      {"model__text__embedding_norm": False},
      "model.text.embedding_norm: False, but system 'cmal' knows True only",
    ),
    (
      {"model__text__class_state": "mean"},
      "model.text.class_state: 'mean', but system 'cmal' knows 'token' only",
    ),
    (
      {"model__text__num_positions": 9},
      "model.text.num_positions: must be at least max_length + 0 = 10",
    ),
    (
      {"objectives__itm_negatives": "dataset"},
      "objectives.itm_negatives: 'dataset', but system 'cmal' knows 'in_batch'"
      " only",
    ),
    (
      {"objectives__amc": 0.0, "objectives__amc_pair": 0.5},
      "objectives.amc_pair: 0.5 is within AMC and needs objectives.amc > 0",
    ),
    (
      {"objectives__itc": 1.0},
      "objectives.itc: 1, but the objectives of system 'cmal' are amc, wrc,"
      " itm, mlm, mrc, mrfr; set it to 0",
    ),
    (
      {"model__unimodal_layers": (0, -1)},
      "model.unimodal_layers: must not be negative, is (0, -1)",
    ),
    (
      {"model__match_features": "product"},
      "model.match_features: 'product', but system 'cmal' knows pooled",
    ),
    (
      {"masking__mlm_scheme": "all"},
      "masking.mlm_scheme: 'all', but around anchors system 'cmal' knows"
      " '801010' only",
    ),
    (
      {"masking__mlm_whole_word": True},
      "masking.mlm_whole_word: True, but around anchors system 'cmal' knows"
      " False only",
    ),
    (
      {
        "objectives__amc": 0.0,
        "objectives__mlm": 1.0,
        "masking__mlm_padded_draw": True,
      },
      "masking.mlm_padded_draw: True, but around anchors system 'cmal' knows"
      " False only",
    ),
  ],
  ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cmal_cannot_run_names_its_path(values, told):
  with pytest.raises(config.ConfigError) as caught:
    config.from_config_dict(replaced(random_regions.config(), values))
  assert str(caught.value) == f"config.{told}"


def test_words_are_masked_by_any_rule_where_no_anchor_is_among_them():
  rule = {"mlm_scheme": "all", "mlm_whole_word": True}
  for swap in ("image", "none"):
    made = random_regions.config("mlm", masking={"swap": swap, **rule})
    assert made.masking.mlm_whole_word


def test_other_systems_compute_all_objectives_in_every_step():
  assert error_of("objectives.task_mix", "sample") == (
    "config.objectives.task_mix: 'sample', but system 'glscl' knows 'sum' only"
  )


def test_what_coca_and_clip_do_not_read_may_have_any_value():
  tree = replaced(
    random_pairs.sycoca("itc", "ic"),
    {"masking__ic_mask": False, "masking__r_low": 0.97},
  )
  tree.objectives.itc = 0.0
  assert config.from_config_dict(tree).objectives.active == ("ic",)
  tree = replaced(random_pairs.sycoca("itc"), {"masking__r_high": 0.0})
  assert config.from_config_dict(tree).objectives.active == ("itc",)


def test_patches_of_18_pixels_are_hidden_in_blocks_of_36():
  tree = maskvlm(model__vision__patch_size=18, model__vision__image_size=144)
  tree.masking.image_block_size = 36
  assert config.from_config_dict(tree).model.vision.num_patches == 64


def test_without_mim_blocks_need_not_fit():
  tree = maskvlm(objectives__mim=0.0, model__vision__patch_size=32)
  assert config.from_config_dict(tree).objectives.mim == 0


def test_only_the_patch_matrix_has_a_bias():
  message = error_of(
    "model.vision", {"patch_bias": True, "stem": (768,), "stem_blocks": (0,)}
  )
  assert message.startswith("config.model.vision.patch_bias: ")


# The command line.


def test_every_value_can_be_changed_on_the_command_line(tmp_path):
  change = {
    int: lambda value: value + 1,
    bool: lambda value: not value,
    float: lambda value: value + 0.5,
    str: lambda value: value + "x",
    tuple: lambda value: (*value, *(value[:1] or (1,))),
    type(None): lambda value: 4,
  }
  others = {path: change[type(value)](value) for path, value in LEAVES.items()}
  tree = parse_tree(
    tmp_path, *(f"--config.{path}={value}" for path, value in others.items())
  )
  for path, other in others.items():
    found = tree
    for name in path.split("."):
      found = found[name]
    assert found == other, path


@pytest.mark.parametrize(
  ("override", "path", "value"),
  [
    ("--config.train.num_steps=7", "train.num_steps", 7),
    ("--config.optimizer.eps=1e-6", "optimizer.eps", 1e-6),
    ("--config.objectives.mlm=2", "objectives.mlm", 2.0),
    ("--config.model.scan=false", "model.scan", False),
    ("--config.data.mean=(0,0,0)", "data.mean", (0.0, 0.0, 0.0)),
    ("--config.optimizer.clip_norm=1", "optimizer.clip_norm", 1.0),
    ("--config.objectives.text_mgsc_group=8", "objectives.text_mgsc_group", 8),
    (
      "--config.objectives.itc_temperature_range=None",
      "objectives.itc_temperature_range",
      None,
    ),
    (
      "--config.train.eval_splits=('a','b')",
      "train.eval_splits",
      ("a", "b"),
    ),
    (
      "--config.train.eval_splits=validation",
      "train.eval_splits",
      ("validation",),
    ),
  ],
)
def test_an_override_arrives(tmp_path, override, path, value):
  assert dict(leaves(parse(tmp_path, override)))[path] == value


def test_a_mistyped_override_names_the_nearest_key(tmp_path):
  with pytest.raises(AttributeError, match='Did you mean "num_steps"'):
    parse(tmp_path, "--config.train.num_step=7")


@pytest.mark.parametrize("value", ["2.5", "many", "True", "None"])
def test_an_override_of_the_wrong_type_names_the_flag(tmp_path, value):
  with pytest.raises(flags.IllegalFlagValueError, match="train.num_steps"):
    parse(tmp_path, f"--config.train.num_steps={value}")


def test_an_override_out_of_range_names_its_path(tmp_path):
  with pytest.raises(config.ConfigError, match="config.masking.mlm_rate: "):
    parse(tmp_path, "--config.masking.mlm_rate=-0.5")


# The recipes.


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=recipes.golden_name)
def test_a_recipe_is_what_its_golden_file_says(recipe, check_golden):
  made = config.from_config_dict(recipes.load(recipe))
  check_golden(
    f"config/{recipes.golden_name(recipe)}.json", config.to_json(made) + "\n"
  )


@pytest.mark.parametrize("recipe", recipes.RECIPES, ids=recipes.golden_name)
def test_a_recipe_names_every_value(recipe):
  """A recipe starts from the defaults, so every value can be overridden."""

  def names(tree):
    return {
      name: names(value) if isinstance(value, dict) else None
      for name, value in json.loads(json.dumps(tree)).items()
    }

  default = config.to_config_dict(config.Config())
  assert names(recipes.load(recipe).to_dict()) == names(default.to_dict())


def test_the_tests_of_small_data_run_the_encoders_of_the_quick_start():
  recipe = config.from_config_dict(
    recipes.load(str(ROOT / "configs/quickstart.py"))
  )
  made = random_pairs.config(**random_pairs.SMALL_DATA)
  assert len(made.model.vision.stem) == len(recipe.model.vision.stem)
  # Sizes differ, and initial spreads (_std) do not matter to spread_params.
  sizes = {
    "vision": {"width", "stem"},
    "text": {"width", "vocab_size", "max_length", "num_positions"},
  }
  for part, names in sizes.items():
    for name, value in leaves(getattr(recipe.model, part)):
      if name not in names and not name.endswith("_std"):
        assert getattr(getattr(made.model, part), name) == value, name
  for name in ("joint_projection", "zero_residual"):
    assert getattr(made.model, name) == getattr(recipe.model, name)


def test_every_golden_text_has_its_recipe():
  texts = {path.stem for path in (ROOT / "tests/golden/config").glob("*")}
  assert texts == {recipes.golden_name(recipe) for recipe in recipes.RECIPES}
