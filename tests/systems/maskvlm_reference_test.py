"""MaskVLM against an independent NumPy version of its equations, in float64."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import scipy.special

from tests import random_pairs

# Groups of two samples: each has one negative, whatever is drawn. Two heads.
CONFIG = random_pairs.maskvlm(
  depth=2, width=128, batch_size=4, objectives={"neg_group": 2}
)
KEY = jax.random.key(0)


def dense(p, x):
  return x @ p["kernel"] + p["bias"]


def norm(p, x, eps):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
  return x * p["scale"] + p["bias"]


def gelu(x):
  return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))


def mlp(p, x):
  return dense(p["fc2"], gelu(dense(p["fc1"], x)))


def attention(p, x, context, valid):
  q, k, v = (
    dense(p[name], a).reshape(len(a), -1, 64).transpose(1, 0, 2)
    for name, a in (("query", x), ("key", context), ("value", context))
  )
  logits = q @ k.transpose(0, 2, 1) / 8 + np.where(valid, 0, -1e30)
  weights = scipy.special.softmax(logits, axis=-1)
  return dense(p["out"], (weights @ v).transpose(1, 0, 2).reshape(x.shape))


def all_of(x):
  return np.ones(len(x), bool)


def layer(p, i):
  return jax.tree.map(lambda a: a[i], p["layers"])


def f_image(p, image, hidden=()):
  """ViT: the class token, then patches, some replaced by the mask vector."""
  x = []
  for row in range(4):
    for column in range(4):
      patch = image[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
      x.append(patch.reshape(-1) @ p["patch_kernel"] + p["patch_bias"])
  for i in hidden:
    x[i] = p["mask_token"]["value"]
  x = np.stack([p["class_embedding"], *x]) + p["position_embedding"]
  for i in range(2):
    b = layer(p["blocks"], i)
    h = norm(b["norm1"], x, 1e-6)
    x = x + attention(b["attention"], h, h, all_of(h))
    x = x + mlp(b["mlp"], norm(b["norm2"], x, 1e-6))
  return norm(p["ln_post"], x, 1e-6)


def f_text(p, ids, valid):
  positions = np.where(valid, np.cumsum(valid) + 1, 1)
  x = p["word_embedding"][ids] + p["position_embedding"][positions]
  x = norm(p["norm"], x + p["type_embedding"][0], 1e-5)
  for i in range(2):
    b = layer(p["blocks"], i)
    x = norm(b["norm1"], x + attention(b["attention"], x, x, valid), 1e-5)
    x = norm(b["norm2"], x + mlp(b["mlp"], x), 1e-5)
  return x


def g(p, x, valid, context, context_valid):
  """A stack of cross-attention blocks."""
  for b in (layer(p["stack"], 0), p["last"]):
    h = attention(b["self_attention"], x, x, valid)
    x = norm(b["norm1"], x + h, 1e-12)
    h = attention(b["cross_attention"], x, context, context_valid)
    x = norm(b["norm2"], x + h, 1e-12)
    x = norm(b["norm3"], x + mlp(b["mlp"], x), 1e-12)
  return x


def cross_entropy(logits, label):
  return scipy.special.logsumexp(logits) - logits[label]


def reference(params, batch, patch_norm=False, power=1):
  """Each loss of one batch, sample by sample."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  mean, std = np.array(CONFIG.data.mean), np.array(CONFIG.data.std)
  images = (batch.image_BYXC / 255 - mean) / std
  valid, size = batch.text_valid_BT, len(images)
  v = [f_image(p["vision"], image) for image in images]
  w = [
    f_text(p["text"], *a) for a in zip(batch.text_ids_BT, valid, strict=True)
  ]

  mlm = []
  for b in range(size):
    masked = f_text(p["text"], batch.mlm_ids_BT[b], valid[b])
    x = g(p["text_cross"], masked, valid[b], v[b], all_of(v[b]))
    head = p["mlm_head"]
    h = norm(head["norm"], gelu(dense(head["fc1"], x)), 1e-12)
    logits = dense(head["fc2"], h)
    for j in np.flatnonzero(batch.mlm_ok_BJ[b]):
      label = batch.mlm_labels_BJ[b, j]
      mlm.append(cross_entropy(logits[batch.mlm_pos_BJ[b, j]], label))

  mim = []
  for b in range(size):
    hidden = batch.block_idx_BI[b]
    masked = f_image(p["vision"], images[b], hidden)
    y = g(p["image_cross"], masked, all_of(masked), w[b], valid[b])[1:]
    y = dense(
      p["pixel_head"]["fc"], g(p["decoder"], y, all_of(y), w[b], valid[b])
    )
    for i in hidden:
      row, column = 8 * (i // 4), 8 * (i % 4)
      wanted = images[b, row : row + 8, column : column + 8].reshape(-1)
      if patch_norm:
        wanted = (wanted - wanted.mean()) / np.sqrt(wanted.var(ddof=1) + 1e-6)
      mim.append(np.mean(np.abs(y[i] - wanted) ** power))

  unit = []
  for name, states in (("text", w), ("image", v)):
    e = dense(p[f"{name}_projection"], np.stack([x[0] for x in states]))
    unit.append(e / np.linalg.norm(e, axis=1, keepdims=True))
  logits = unit[0] @ unit[1].T / p["temperature"]["value"]
  itc = np.mean(
    [
      (cross_entropy(logits[b], b) + cross_entropy(logits[:, b], b)) / 2
      for b in range(size)
    ]
  )

  itm = []
  for b in range(size):
    other = b ^ 1  # the only other sample of the group
    for text, image in ((b, b), (b, other), (other, b)):
      x = g(p["text_cross"], w[text], valid[text], v[image], all_of(v[image]))
      y = g(p["image_cross"], v[image], all_of(v[image]), w[text], valid[text])
      logits = dense(p["match_head"]["fc"], x[0] * y[0])
      itm.append(cross_entropy(logits, int(text == image)))
  return {
    "mlm": np.mean(mlm) if mlm else 0.0,
    "mim": np.mean(mim),
    "itc": itc,
    "itm": np.mean(itm),
  }


def fully_padded(batch):
  valid_BT = batch.text_valid_BT.copy()
  valid_BT[2] = False
  return random_pairs.change(batch, text_valid_BT=valid_BT)


def nothing_masked(batch):
  return random_pairs.change(batch, mlm_ok_BJ=np.zeros_like(batch.mlm_ok_BJ))


BATCHES = {
  "random": lambda batch: batch,
  "nothing masked": nothing_masked,
  "a row of padding": fully_padded,
}


@pytest.mark.parametrize("kind", BATCHES)
def test_each_loss_is_that_of_the_reference(kind):
  batch = BATCHES[kind](random_pairs.batch(CONFIG))
  params = random_pairs.spread_params(CONFIG)
  found = random_pairs.loss_function(CONFIG)(params, batch, KEY).metrics
  for name, value in reference(params, batch).items():
    assert float(found[name]) == pytest.approx(value, rel=2e-4), name
  total = sum(float(found[name]) for name in ("mlm", "mim", "itc", "itm"))
  assert float(found["loss"]) == pytest.approx(total, rel=1e-5)


def test_other_pixel_losses_are_those_of_the_reference():
  config = random_pairs.maskvlm(
    "mim",
    depth=2,
    width=128,
    batch_size=4,
    objectives={"mim_loss": "l2", "mim_patch_norm": True},
  )
  whole = random_pairs.spread_params(CONFIG)
  params = {name: whole[name] for name in random_pairs.abstract_params(config)}
  batch = random_pairs.batch(config)
  found = random_pairs.loss_function(config)(params, batch, KEY).metrics
  value = reference(whole, batch, patch_norm=True, power=2)["mim"]
  assert float(found["mim"]) == pytest.approx(value, rel=2e-4)


def test_a_batch_of_one_sample_has_no_negative_and_no_contrast():
  batch = jax.tree.map(lambda a: a[:1], random_pairs.batch(CONFIG))
  params = random_pairs.spread_params(CONFIG)
  gradients, metrics = random_pairs.gradient_function(CONFIG)(
    params, batch, KEY
  )
  assert metrics["itc"] == 0
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
