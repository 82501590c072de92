"""GLSCL at a size that trains on two CPU cores in minutes (emoji drawings).

Two stages, as in the papers, which start from CLIP and RoBERTa weights:

  --config=configs/quickstart.py:towers  both encoders, contrastive only; the
                                         stand-in for the pre-trained weights
  --config=configs/quickstart.py         GLSCL, all objectives; start it with
                                         --config.train.init_from=WORKDIR
"""

from glscl_jax import config as config_lib

VOCAB_SIZE = 3365  # as launch/prepare.py prints for the emoji captions
TOWERS_STEPS = 2000
GLSCL_STEPS = 200


def get_config(stage: str = "glscl"):
  """64 px, 16 patches, width 256; every choice here is ours [choice]."""
  config = config_lib.to_config_dict(config_lib.Config())

  # 4,350 drawings do not teach a patch matrix what a shape is, nor attention
  # where to look: convolutions, averages and bags of words start with it. What
  # attends are the fusion layers.
  vision = config.model.vision
  vision.image_size = 64
  vision.patch_size = 16
  vision.width = 256
  vision.depth = 0
  vision.stem = (32, 128, 256)
  vision.stem_blocks = (1, 1, 1)
  vision.class_state = "mean"
  vision.mask_token_std = 0.02

  text = config.model.text
  # Fragments of words mean nothing here: "man" in "mantelpiece" is no man. A
  # piece a word, and what was never trained counts for nearly nothing.
  text.vocab_size = VOCAB_SIZE
  text.embedding_norm = False
  text.max_length = 24  # names have at most 11 tokens; longer ones are cut
  text.num_positions = 32
  text.width = 256
  text.depth = 0
  text.class_state = "mean"
  text.place_std = 0.002
  text.dropout = 0.0  # at this size noise drowns the difference of two names

  fusion = config.model.fusion
  fusion.width = 128
  fusion.depth = 2

  config.model.joint_width = 128
  config.model.joint_projection = "none"
  config.model.zero_residual = True
  config.model.remat = "none"
  config.model.scan = False

  config.data.batch_size = 128
  config.data.num_threads = 1
  # Another studio's drawing of the same concept is no false image.
  config.data.identity = "caption"
  # Studios differ in colours and proportions: so do the views of a drawing.
  config.data.augment.warp = 1.0
  config.data.augment.recolor = 0.25
  config.data.augment.hflip = "off"  # letters, arrows, clock faces
  config.data.augment.phrases = "subset"

  config.objectives.itc_temperature_range = (0.001, 0.1)
  config.model.itc_temperature = 0.06

  # Muon fits the drawings in less than half of AdamW's steps.
  config.optimizer.variant = "muon"
  config.optimizer.muon_rms = 0.4
  config.optimizer.schedule = "cosine"
  # Without a norm the words that carry a caption are those that outgrow it.
  config.optimizer.weight_decay = 2.0

  config.train.log_every = 20
  config.train.eval_splits = (
    "validation_seen_concept",
    "validation_unseen_concept",
  )
  if stage == "towers":
    for name in config_lib.OBJECTIVES:
      config.objectives[name] = 1.0 if name == "itc" else 0.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.fusion_multiplier = 1.0  # here only the two transforms
    config.train.num_steps = TOWERS_STEPS
    config.train.eval_every = TOWERS_STEPS // 5
  elif stage == "glscl":
    # The encoders are trained and the fusion layers begin: these, and with them
    # the transforms, move ten times more (five in the papers).
    config.optimizer.learning_rate = 1e-4
    config.optimizer.fusion_multiplier = 10.0
    config.optimizer.head_multiplier = 10.0
    config.train.num_steps = GLSCL_STEPS
    config.train.eval_every = GLSCL_STEPS // 2
  else:
    raise ValueError(f"quickstart.py:{stage}: the stages are towers and glscl")
  config.train.save_every = config.train.eval_every
  return config
