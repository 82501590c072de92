"""SyCoCa against an independent NumPy version of its equations, in float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.special

from glscl_jax import draws
from tests import random_pairs

BATCH = 4
CONFIG = random_pairs.sycoca(
  depth=2,
  batch_size=BATCH,
  objectives={"ic": 2.0},
  masking={"r_high": 0.25, "attentive_empty": "order"},
)
KEY = jax.random.key(0)


def dense(p, x):
  return x @ p["kernel"] + (p["bias"] if "bias" in p else 0)


def norm(p, x):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  return x * p["scale"] + p["bias"]


def mlp(p, x):
  h = dense(p["fc1"], x)
  return dense(p["fc2"], 0.5 * h * (1 + scipy.special.erf(h / np.sqrt(2))))


def attention(p, x, context, allowed):
  """One head."""
  q, k, v = (
    dense(p[name], a)
    for name, a in (("query", x), ("key", context), ("value", context))
  )
  logits = np.where(allowed, q @ k.T / 8, -1e30)
  return dense(p["out"], scipy.special.softmax(logits, axis=-1) @ v)


def layer(p, i):
  return jax.tree.map(lambda a: a[i], p["layers"])


def f_image(p, image, hidden=()):
  """ViT: the class token, then patches, some replaced by the mask vector."""
  x = [patch @ p["patch_kernel"] for patch in patches_of(image)]
  for i in hidden:
    x[i] = p["mask_token"]["value"]
  x = np.stack([p["class_embedding"], *x]) + p["position_embedding"]
  x = norm(p["ln_pre"], x)
  for i in range(2):
    b = layer(p["blocks"], i)
    h = norm(b["norm1"], x)
    x = x + attention(b["attention"], h, h, True)
    x = x + mlp(b["mlp"], norm(b["norm2"], x))
  return norm(p["ln_post"], x)


def patches_of(image):
  return [
    image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].reshape(-1)
    for row in range(4)
    for column in range(4)
  ]


def f_text(p, ids, valid):
  """The causal tower: tokens, then the class; before LN_final."""
  x = p["word_embedding"][ids] + p["position_embedding"][: len(ids)]
  x = np.stack([*x, p["class_embedding"] + p["position_embedding"][-1]])
  allowed = np.tril(np.ones((len(x), len(x)), bool)) & np.append(valid, True)
  for i in range(2):
    b = layer(p["blocks"], i)
    h = norm(b["norm1"], x)
    x = x + attention(b["attention"], h, h, allowed)
    x = x + mlp(b["mlp"], norm(b["norm2"], x))
  return x


def blocks_of(p):
  return [layer(p["stack"], 0), p["last"]]


def describe(p, tokens, valid, patches):
  """The caption decoder: logits after each token."""
  x = tokens
  allowed = np.tril(np.ones((len(x), len(x)), bool)) & valid
  for b in blocks_of(p["caption_decoder"]):
    h = norm(b["self_norm"], x)
    x = x + attention(b["self_attention"], h, h, allowed)
    x = x + mlp(b["mlp"], norm(b["mlp_norm"], x))
    h, context = norm(b["query_norm"], x), norm(b["context_norm"], patches)
    x = x + attention(b["cross_attention"], h, context, True)
    x = x + mlp(b["cross_mlp"], norm(b["cross_mlp_norm"], x))
  return dense(p["caption_head"]["fc"], norm(p["caption_head"]["norm"], x))


def complete(p, patches, tokens, valid):
  """The image decoder: pixels of each patch; `tokens` None: without text."""
  x = patches + p["image_positions"]["value"]
  for b in blocks_of(p["image_decoder"]):
    h = norm(b["self_norm"], x)
    x = x + attention(b["self_attention"], h, h, True)
    if tokens is not None:
      h, context = norm(b["query_norm"], x), norm(b["context_norm"], tokens)
      x = x + attention(b["cross_attention"], h, context, valid[None])
    x = x + mlp(b["mlp"], norm(b["mlp_norm"], x))
  return dense(p["pixel_head"]["fc"], norm(p["pixel_head"]["norm"], x))


def unit(x):
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-8)


def attentive_order(p, z, u, valid):
  """Patches from the most to the least spoken of."""
  words = np.flatnonzero(valid)[1:-1]
  if not len(words):
    return np.arange(len(z))
  patch = unit(dense(p["image_projection"], z))
  word = unit(dense(p["text_projection"], norm(p["text"]["norm"], u[words])))
  return np.argsort(-(patch @ word.T).max(axis=1), kind="stable")


def cross_entropy(logits, label):
  return scipy.special.logsumexp(logits) - logits[label]


def random_orders(size):
  noise = np.asarray(draws.uniform(KEY, (size, 16)))
  return [np.argsort(-row, kind="stable") for row in noise]


def reference(params, batch, config):
  """Each loss of one batch, sample by sample."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  mean, std = np.array(config.data.mean), np.array(config.data.std)
  images = (batch.image_BYXC / 255 - mean) / std
  options, size = config.masking, len(images)
  num_high, num_low = round(16 * options.r_high), round(16 * options.r_low)
  ic, pixels, text_vectors, image_vectors = [], [], [], []
  for b in range(size):
    ids, valid = batch.text_ids_BT[b], batch.text_valid_BT[b]
    states = f_image(p["vision"], images[b])
    v, z = states[0], states[1:]
    *u, t = f_text(p["text"], ids, valid)
    u = np.stack(u)
    text_vectors.append(dense(p["text_projection"], norm(p["text"]["norm"], t)))
    image_vectors.append(dense(p["image_projection"], v))

    order = random_orders(size)[b]
    if options.split == "attentive":
      order = attentive_order(p, z, u, valid)
    high, low = order[:num_high], order[16 - num_low :]
    kept = [i for i in range(16) if i not in low or not options.ic_mask]
    logits = describe(p, u, valid, z[kept])
    for place in np.flatnonzero(valid)[1:]:
      ic.append(cross_entropy(logits[place - 1], ids[place]))

    if options.mim_mask_level == "input":
      x = f_image(p["vision"], images[b], high)[1:]
    else:
      x = z.copy()
      x[high] = p["vision"]["mask_token"]["value"]
    tokens = u if config.model.fusion.mim_text else None
    found = complete(p, x, tokens, valid)
    for i in high:
      wanted = patches_of(images[b])[i]
      if config.objectives.mim_patch_norm:
        wanted = (wanted - wanted.mean()) / np.sqrt(wanted.var(ddof=1) + 1e-6)
      pixels.append(np.mean((found[i] - wanted) ** 2))

  logits = unit(np.stack(text_vectors)) @ unit(np.stack(image_vectors)).T
  logits *= np.exp(p["logit_scale"]["value"])
  itc = [
    (cross_entropy(logits[b], b) + cross_entropy(logits[:, b], b)) / 2
    for b in range(size)
  ]
  return {
    "itc": np.mean(itc),
    "ic": np.mean(ic) if ic else 0.0,
    "tg_mim": np.mean(pixels),
  }


def assert_same(config, params, batch):
  found = random_pairs.loss_function(config)(params, batch, KEY).metrics
  expected = reference(params, batch, config)
  for name, value in expected.items():
    assert float(found[name]) == pytest.approx(value, rel=2e-4, abs=1e-5), name
  weights = {name: getattr(config.objectives, name) for name in expected}
  total = sum(weights[name] * float(found[name]) for name in expected)
  assert float(found["loss"]) == pytest.approx(total, rel=1e-5)
  return expected


def of_lengths(batch, *lengths):
  place_T = np.arange(batch.text_ids_BT.shape[1])
  return random_pairs.change(
    batch, text_valid_BT=place_T[None] < np.array(lengths)[:, None]
  )


BATCHES = {
  "random": lambda batch: batch,
  "a row of padding": lambda batch: of_lengths(batch, 5, 0, 10, 3),
  "texts without a word": lambda batch: of_lengths(batch, 2, 2, 1, 2),
  "no valid target": lambda batch: of_lengths(batch, 1, 0, 1, 1),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_each_loss_is_that_of_the_reference(kind):
  batch = BATCHES[kind](random_pairs.batch(CONFIG))
  expected = assert_same(CONFIG, random_pairs.spread_params(CONFIG), batch)
  if kind == "no valid target":
    assert expected["ic"] == 0


def test_equal_scores_split_by_number():
  params = random_pairs.spread_params(CONFIG)
  # Vectors without a direction: every cosine is 0.
  params["image_projection"]["kernel"][:] = 0
  expected = assert_same(CONFIG, params, random_pairs.batch(CONFIG))
  assert expected["itc"] == pytest.approx(np.log(BATCH))


def test_the_choices_of_the_ablations_are_those_of_the_reference():
  config = random_pairs.sycoca(
    depth=2,
    batch_size=BATCH,
    objectives={"mim_patch_norm": False},
    masking={"split": "random", "ic_mask": False, "mim_mask_level": "feature"},
    fusion={"mim_text": False},
  )
  params = random_pairs.spread_params(config)
  # A batch of one sample, which has no contrast.
  batch = random_pairs.batch(config, size=1)
  expected = assert_same(config, params, batch)
  assert expected["itc"] == pytest.approx(0, abs=1e-12)
