"""Every system at a size that trains on two CPU cores in minutes (emoji).

`--config=configs/quickstart.py:STAGE`, by default `glscl`. As in the papers,
GLSCL and MaskVLM start from encoders that are trained already; contrast alone
trains them here, the stand-in for the weights of CLIP, RoBERTa or ImageNet:

  glscl_towers, then glscl with --config.train.init_from=WORKDIR of it
  maskvlm_towers, then maskvlm likewise
  sycoca                from random parameters
  cmal                  from random parameters, on composed scenes whose regions
                        glscl_towers has described (prepare.py --source=scenes)
"""

from glscl_jax import config as config_lib

VOCAB_SIZE = 3365  # as launch/prepare.py prints for the emoji captions
TOWERS_STEPS = 2000
MASKVLM_TOWERS_STEPS = 1000  # leave its slower second stage time: half an hour
SECOND_STEPS = 200  # of GLSCL and MaskVLM, after the towers
SYCOCA_STEPS = 800
CMAL_STEPS = 2000
SCENE_VOCAB_SIZE = 1518  # as launch/prepare.py prints for the scenes' captions
SCENE_CLASSES = 1330  # and for their regions


def _shrink(config) -> None:
  """64 px, 16 patches, small batches; every choice here is ours [choice].

  4,350 drawings do not teach a patch matrix what a shape is, nor attention
  where to look: convolutions, averages and bags of words start with it.
  """
  vision = config.model.vision
  vision.image_size = 64
  vision.patch_size = 16
  vision.depth = 0
  vision.stem_blocks = (1, 1, 1)
  vision.class_state = "mean"
  vision.patch_bias = False  # the stem has its own
  vision.mask_token_std = 0.02

  text = config.model.text
  # Fragments of words mean nothing here: "man" in "mantelpiece" is no man. A
  # piece a word, and what was never trained counts for nearly nothing.
  text.vocab_size = VOCAB_SIZE
  text.embedding_norm = False
  text.max_length = 24  # names have at most 11 tokens; longer ones are cut
  text.num_positions = 32
  text.place_std = 0.002
  text.dropout = 0.0  # at this size noise drowns the difference of two names

  config.model.zero_residual = True
  config.model.remat = "none"
  config.model.scan = False
  config.model.itc_temperature = 0.06

  config.data.batch_size = 128
  config.data.num_threads = 1
  # Another studio's drawing of the same concept is no false image.
  config.data.identity = "caption"
  # Studios differ in colours and proportions: so do the views of a drawing.
  augment = config.data.augment
  augment.warp = 1.0
  augment.recolor = 0.25
  augment.randaugment_ops = 0
  augment.hflip = "off"  # letters, arrows, clock faces
  augment.phrases = "subset"

  config.objectives.itc_temperature_range = (0.001, 0.1)

  optimizer = config.optimizer
  # Muon fits the drawings in less than half of AdamW's steps.
  optimizer.variant = "muon"
  optimizer.muon_rms = 0.4
  optimizer.schedule = "cosine"
  optimizer.final_fraction = 0.0
  optimizer.beta2 = 0.98
  # Without a norm the words that carry a caption are those that outgrow it.
  optimizer.weight_decay = 2.0

  config.train.log_every = 20
  config.train.eval_splits = (
    "validation_seen_concept",
    "validation_unseen_concept",
  )


def _contrast_alone(config, num_steps: int) -> None:
  for name in config_lib.OBJECTIVES:
    config.objectives[name] = 1.0 if name == "itc" else 0.0
  config.optimizer.learning_rate = 2e-3
  config.optimizer.fusion_multiplier = 1.0  # the transforms of GLSCL
  config.train.num_steps = num_steps


def _second_stage(config) -> None:
  # The encoders are trained and the fusion layers begin: these, and with them
  # the transforms, move ten times more (five in GLSCL's papers).
  config.optimizer.learning_rate = 1e-4
  config.optimizer.fusion_multiplier = 10.0
  config.optimizer.head_multiplier = 10.0
  config.train.num_steps = SECOND_STEPS


def _glscl():
  config = config_lib.to_config_dict(config_lib.Config())
  _shrink(config)
  model = config.model
  model.vision.width = model.text.width = 256
  model.vision.stem = (32, 128, 256)
  model.text.depth = 0
  model.text.class_state = "mean"
  model.fusion.width = model.joint_width = 128
  model.fusion.depth = 2
  model.joint_projection = "none"
  return config


def _maskvlm():
  config = config_lib.to_config_dict(config_lib.maskvlm_defaults())
  _shrink(config)
  model = config.model
  # No transform stands between the encoders and the cross encoders.
  model.vision.width = model.text.width = model.fusion.width = 128
  model.vision.stem = (32, 128, 128)
  model.text.depth = 0
  model.text.class_state = "mean"
  model.joint_width = 128
  model.joint_projection = "none"
  model.fusion.image_depth = model.fusion.text_depth = 2
  model.fusion.decoder_depth = 1
  # A seventh of the side in the paper, a quarter here: a patch.
  config.masking.image_block_size = 16
  return config


def _sycoca():
  config = config_lib.to_config_dict(config_lib.sycoca_defaults())
  _shrink(config)
  model = config.model
  model.vision.width = model.text.width = model.fusion.width = 128
  model.vision.stem = (32, 128, 128)
  model.text.depth = 1
  model.joint_width = 128
  model.fusion.text_depth = 2
  model.fusion.image_depth = 2
  config.objectives.itc_temperature_range = (0.01, 0.1)
  config.optimizer.learning_rate = 2e-3
  config.train.num_steps = SYCOCA_STEPS
  return config


def _cmal():
  config = config_lib.to_config_dict(config_lib.cmal_defaults())
  model = config.model
  region = model.region
  region.number = 8  # scenes hold at most five
  region.feature_width = 256  # glscl_towers
  region.num_classes = SCENE_CLASSES
  text = model.text
  text.vocab_size = SCENE_VOCAB_SIZE
  text.max_length = 24
  text.num_positions = 32
  text.width = model.fusion.width = 128
  text.dropout = model.fusion.dropout = 0.0
  model.fusion.depth = 2
  model.remat = "none"
  model.scan = False
  config.data.batch_size = 128
  config.data.num_threads = 1
  config.data.identity = "caption"
  optimizer = config.optimizer
  optimizer.learning_rate = 1e-3
  optimizer.schedule = "cosine"
  config.train.log_every = 20
  config.train.num_steps = CMAL_STEPS
  return config


def _make(stage: str):
  match stage:
    case "glscl_towers":
      config = _glscl()
      _contrast_alone(config, TOWERS_STEPS)
    case "maskvlm_towers":
      config = _maskvlm()
      _contrast_alone(config, MASKVLM_TOWERS_STEPS)
    case "glscl":
      config = _glscl()
      _second_stage(config)
    case "maskvlm":
      config = _maskvlm()
      _second_stage(config)
    case "sycoca":
      config = _sycoca()
    case "cmal":
      config = _cmal()
    case _:
      raise ValueError(
        f"quickstart.py:{stage}: the stages are glscl_towers, glscl, "
        "maskvlm_towers, maskvlm, sycoca, cmal"
      )
  return config


def get_config(stage: str = "glscl"):
  """The recipe of a stage, saved five times (the second stages twice).

  With each save comes a validation; CMAL has no vectors to rank by.
  """
  config = _make(stage)
  parts = 2 if config.train.num_steps <= SECOND_STEPS else 5
  config.train.save_every = config.train.num_steps // parts
  if config.objectives.itc > 0:
    config.train.eval_every = config.train.save_every
  return config
