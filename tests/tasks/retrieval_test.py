"""Retrieval end to end on a tiny data directory and a random tiny model."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax import sharding
from glscl_jax.data import retrieval_set, tokenizer
from glscl_jax.systems import glscl
from glscl_jax.tasks import ranking, results, retrieval
from tests import random_pairs, tiny


@dataclasses.dataclass(frozen=True)
class Model:
  data_dir: str
  config: config_lib.Config
  params: dict
  tokenizer: tokenizer.Tokenizer

  def encode(self, split="test", captions="all", **options):
    return retrieval.encode(
      self.params,
      retrieval_set.read(self.data_dir, split, captions=captions),
      config=self.config,
      tokenizer=self.tokenizer,
      batch_size=5,
      keep_tokens=True,
      **options,
    )

  def fuse(self, encodings, count, **options):
    return retrieval.fuse(
      self.params,
      encodings,
      config=self.config,
      count=count,
      pair_batch_size=7,
      **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """Nine pictures; three names twice, so relevance is not diagonal."""
  names = tiny.NAMES
  rows = [
    tiny.record("test", i, (names[i % 6], f"{names[i % 6]} in ink {i}"))
    for i in range(9)
  ]
  data_dir = tmp_path_factory.mktemp("retrieval") / "data"
  tiny.write_data(data_dir, {"test": rows})
  config = tiny.config(data_dir)
  return Model(
    data_dir=str(data_dir),
    config=config,
    params=tiny.params(config),
    tokenizer=tokenizer.load(data_dir / "tokenizer.model"),
  )


@pytest.fixture(scope="module")
def encodings(model):
  return model.encode()


def all_scores(model, encodings):
  """The ITM logit difference of every pair, one pair a call."""
  scores = np.zeros(encodings.cosine_UZ.shape, np.float32)
  match = jax.jit(
    lambda *arrays: glscl.match_scores(
      model.params, *arrays, config=model.config
    )
  )
  for i, row in enumerate(encodings.image_row_U):
    for j in range(scores.shape[1]):
      scores[i, j] = match(
        encodings.text_tokens[j : j + 1],
        encodings.text_valid[j : j + 1],
        encodings.image_tokens[row : row + 1],
      )[0]
  return scores


def test_a_system_without_matching_says_so_before_it_encodes(model):
  config = random_pairs.sycoca()
  for rerank in ("itm", "itm_plus_itc", "full"):
    protocol = retrieval.Protocol(rerank=rerank)
    with pytest.raises(
      retrieval.RetrievalError,
      match="'sycoca' has no image-text matching.*take none or querybank",
    ):
      retrieval.evaluate(
        {}, config, model.tokenizer, model.data_dir, "test", protocol=protocol
      )


def test_a_system_whose_text_states_have_a_class_row_of_their_own_ranks(model):
  tokens = model.tokenizer.vocab_size
  config = random_pairs.sycoca("itc", vocab_size=tokens, max_length=20)
  found = retrieval.evaluate(
    random_pairs.spread_params(config),
    config,
    model.tokenizer,
    model.data_dir,
    "test",
    batch_size=16,
  )
  assert 0 <= found["metrics"]["mean_r1"] <= 1


def test_several_captions_an_image_and_images_a_caption_are_kept(encodings):
  relevant = encodings.retrieval_set.relevant_UZ
  assert relevant.shape == (9, 15)
  assert set(relevant.sum(1)) == {2}
  assert set(relevant.sum(0)) == {1, 2}


def test_cosines_are_those_of_the_model_one_by_one(model, encodings):
  found = encodings.retrieval_set
  for i, j in ((0, 0), (8, 3), (4, 14)):
    batch = next(
      retrieval_set.image_batches(
        dataclasses.replace(
          found,
          record_U=found.record_U[i : i + 1],
          image_names=found.image_names[i : i + 1],
        ),
        batch_size=1,
        image_size=32,
      )
    )
    tokens = model.tokenizer.encode(found.captions[j], 20)
    config = model.config
    x_BTD = glscl.encode_text(
      model.params, tokens.ids_T[None], tokens.valid_T[None], config=config
    )
    y_BID = glscl.encode_visual(model.params, batch.visual, config=config)
    text = glscl.text_vectors(model.params, x_BTD, config=config)
    image = glscl.image_vectors(model.params, y_BID, config=config)
    expected = float((text * image).sum())
    assert encodings.cosine_UZ[i, j] == pytest.approx(expected, abs=1e-5)


def test_fused_pairs_are_scored_as_one_by_one(model, encodings):
  expected = all_scores(model, encodings)
  fused = model.fuse(encodings, 4)
  np.testing.assert_allclose(
    fused.scores, expected.ravel()[fused.pairs], atol=2e-5
  )
  assert len(np.unique(fused.pairs)) == len(fused.pairs) < expected.size


def test_reranking_with_all_candidates_equals_the_exhaustive_ranking(
  model, encodings
):
  scores = all_scores(model, encodings)
  relevant = encodings.retrieval_set.relevant_UZ
  for rerank in ("itm", "full"):
    protocol = retrieval.Protocol(rerank=rerank, rerank_k=1000)
    fused = model.fuse(encodings, protocol.candidates)
    assert len(fused.pairs) == scores.size
    found = retrieval.rank(encodings, protocol=protocol, fused=fused)
    np.testing.assert_array_equal(
      found.i2t.rank_Q, ranking.ranks(scores, relevant)
    )
    np.testing.assert_array_equal(
      found.t2i.rank_Q, ranking.ranks(scores.T, relevant.T)
    )


def test_itm_plus_itc_adds_the_weighted_cosine(model, encodings):
  scores = all_scores(model, encodings) + 3.0 * encodings.cosine_UZ
  protocol = retrieval.Protocol(
    rerank="itm_plus_itc", rerank_k=1000, itc_weight=3.0
  )
  found = retrieval.rank(
    encodings, protocol=protocol, fused=model.fuse(encodings, 1000)
  )
  np.testing.assert_array_equal(
    found.i2t.rank_Q,
    ranking.ranks(scores, encodings.retrieval_set.relevant_UZ),
  )


def test_one_candidate_keeps_the_best_by_cosine_first(model, encodings):
  plain = retrieval.rank(encodings, protocol=retrieval.Protocol())
  protocol = retrieval.Protocol(rerank="itm", rerank_k=1)
  found = retrieval.rank(
    encodings, protocol=protocol, fused=model.fuse(encodings, 1)
  )
  np.testing.assert_array_equal(found.i2t.rank_Q == 1, plain.i2t.rank_Q == 1)
  np.testing.assert_array_equal(found.t2i.top_QJ[:, 0], plain.t2i.top_QJ[:, 0])


@pytest.fixture(scope="module")
def bank(encodings):
  """Another split: some of the vectors, in another order."""
  return dataclasses.replace(
    encodings,
    retrieval_set=dataclasses.replace(encodings.retrieval_set, split="train"),
    image_UE=encodings.image_UE[[3, 1, 6, 0]],
    text_ZE=encodings.text_ZE[[5, 2, 8, 1, 0]],
  )


def without_hubs(query_QE, candidate_AE, bank_BE):
  """The ten best scores of each query less what the bank gives, sorted."""
  hub_A = np.log(np.exp(bank_BE @ candidate_AE.T / 0.1).mean(0)) * 0.1
  return np.sort(query_QE @ candidate_AE.T - hub_A)[:, ::-1][:, :10]


def test_a_querybank_takes_its_own_modality_and_split(encodings, bank):
  protocol = retrieval.Protocol(rerank="querybank")
  found = retrieval.rank(encodings, protocol=protocol, bank=bank)
  image_UE, text_ZE = encodings.image_UE, encodings.text_ZE
  np.testing.assert_allclose(
    found.i2t.top_score_QJ,
    without_hubs(image_UE, text_ZE, bank.image_UE),
    atol=1e-5,
  )
  np.testing.assert_allclose(
    found.t2i.top_score_QJ,
    without_hubs(text_ZE, image_UE, bank.text_ZE),
    atol=1e-5,
  )
  assert found.fused is None
  for other in (None, encodings):
    with pytest.raises(retrieval.RetrievalError, match="no bank of queries"):
      retrieval.rank(encodings, protocol=protocol, bank=other)


def test_conse_moves_queries_candidates_and_bank(encodings, bank):
  protocol = retrieval.Protocol(rerank="querybank_conse")
  found = retrieval.rank(encodings, protocol=protocol, bank=bank)

  def moved(x_QE, known_BE):
    share_QB = np.exp(x_QE @ known_BE.T / 0.03)
    mean_QE = share_QB @ known_BE / share_QB.sum(1, keepdims=True)
    sum_QE = x_QE + mean_QE / np.linalg.norm(mean_QE, axis=1, keepdims=True)
    return sum_QE / np.linalg.norm(sum_QE, axis=1, keepdims=True)

  image_UE = moved(encodings.image_UE, bank.text_ZE)
  text_ZE = moved(encodings.text_ZE, bank.image_UE)
  np.testing.assert_allclose(
    found.i2t.top_score_QJ,
    without_hubs(image_UE, text_ZE, moved(bank.image_UE, bank.text_ZE)),
    atol=1e-5,
  )
  np.testing.assert_allclose(
    found.t2i.top_score_QJ,
    without_hubs(text_ZE, image_UE, moved(bank.text_ZE, bank.image_UE)),
    atol=1e-5,
  )
  assert protocol.describe()["conse_temperature"] == 0.03


def test_a_bank_that_is_the_measured_split_is_told(encodings, bank):
  for other, asked in ((bank, "train"), (encodings, "test")):
    protocol = retrieval.Protocol(rerank="querybank", querybank=asked)
    rankings = retrieval.rank(encodings, protocol=protocol, bank=other)
    found = retrieval.report(encodings, rankings, protocol=protocol)
    told = "querybank_is_this_split" in found["protocol"]
    assert told == (asked == "test")
    assert (
      "(this split itself)" in results.protocol_label(found["protocol"])
    ) == told
    assert found["timing"]["bank_seconds"] == round(other.seconds, 3)


def test_views_count_as_their_mean_vector(model, encodings):
  found = model.encode(views=3)
  again = model.encode(views=3)
  np.testing.assert_array_equal(found.image_UE, again.image_UE)
  expected = encodings.image_UE.copy()
  for view in (1, 2):
    for batch in retrieval_set.image_batches(
      encodings.retrieval_set,
      batch_size=9,
      image_size=32,
      view=view,
      augment=retrieval.view_augment(model.config),
    ):
      y_BID = glscl.encode_visual(
        model.params, batch.visual, config=model.config
      )
      expected += glscl.image_vectors(model.params, y_BID, config=model.config)
  expected /= np.linalg.norm(expected, axis=1, keepdims=True)
  np.testing.assert_allclose(found.image_UE, expected, atol=1e-5)
  assert np.abs(found.image_UE - encodings.image_UE).max() > 1e-4
  # Captions, and what the fusion layers read, are as without.
  np.testing.assert_array_equal(found.text_ZE, encodings.text_ZE)
  np.testing.assert_array_equal(found.image_tokens, encodings.image_tokens)


def test_views_are_resized_as_the_whole_image_is(model):
  data = model.config.data
  augment = dataclasses.replace(data.augment, resize="opencv")
  config = dataclasses.replace(
    model.config, data=dataclasses.replace(data, augment=augment)
  )
  assert retrieval.view_augment(config) == retrieval.view_augment(model.config)


def test_one_call_reads_the_querybank_too(model):
  protocol = retrieval.Protocol(
    rerank="querybank", querybank="test", captions="all"
  )
  result = retrieval.evaluate(
    model.params,
    model.config,
    model.tokenizer,
    model.data_dir,
    "test",
    protocol=protocol,
  )
  assert result["protocol"]["querybank"] == "test"
  assert result["protocol"]["querybank_temperature"] == 0.1
  assert "num_pairs" not in result["timing"]


def test_captions_that_lose_something_are_counted(model, encodings):
  name = tiny.NAMES[0]
  names = (name, f" {name.upper()}", "\u4e2d", f"{name} " * 40)
  found = retrieval.encode(
    model.params,
    dataclasses.replace(
      encodings.retrieval_set,
      captions=names,
      fits=np.argwhere(np.ones((9, len(names)))),
    ),
    config=model.config,
    tokenizer=model.tokenizer,
  )
  assert found.caption_counts == {
    "num_truncated_captions": 1,
    "num_unknown_captions": 1,
    "num_spelled_captions": 0,
    "num_alike_captions": 2,
  }


def test_a_collapsed_model_scores_zero(model):
  zero = jax.tree.map(np.zeros_like, model.params)
  for protocol in (
    retrieval.Protocol(captions="all"),
    retrieval.Protocol(captions="all", views=2),
    retrieval.Protocol(
      rerank="querybank_conse", querybank="test", captions="all"
    ),
    retrieval.Protocol(rerank="full", captions="all"),
  ):
    result = retrieval.evaluate(
      zero,
      model.config,
      model.tokenizer,
      model.data_dir,
      "test",
      protocol=protocol,
    )
    assert result["metrics"]["i2t_r1"] == result["metrics"]["t2i_r1"] == 0
    assert result["metrics"]["i2t_median_rank"] == 14  # all but its other one


def test_a_mesh_gives_the_ranks_of_one_device(model, encodings):
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=-1, fsdp=2))
  params = jax.device_put(model.params, sharding.replicated(mesh))
  spread = dataclasses.replace(model, params=params)
  found = spread.encode(mesh=mesh)
  np.testing.assert_allclose(found.cosine_UZ, encodings.cosine_UZ, atol=1e-5)
  fused = spread.fuse(found, 4, mesh=mesh)
  here = model.fuse(encodings, 4)
  np.testing.assert_array_equal(fused.pairs, here.pairs)
  np.testing.assert_allclose(fused.scores, here.scores, atol=2e-5)


def test_the_report_states_protocol_sizes_chance_and_cost(model, encodings):
  protocol = retrieval.Protocol(rerank="itm", rerank_k=4, captions="all")
  fused = model.fuse(encodings, 4)
  found = retrieval.report(
    encodings,
    retrieval.rank(encodings, protocol=protocol, fused=fused),
    protocol=protocol,
  )
  assert found["protocol"]["rerank"] == "itm"
  assert found["protocol"]["rerank_k"] == 4
  assert found["protocol"]["ties"] == "count against the model"
  assert (found["num_images"], found["num_captions"]) == (9, 15)
  assert found["metrics"].keys() == found["chance"].keys()
  assert found["chance"]["i2t_r1"] == pytest.approx(2 / 15)
  assert found["timing"]["num_pairs"] == len(fused.pairs)
  assert found["timing"]["pairs_per_second"] > 0


def test_predictions_name_the_ten_best_and_the_rank(encodings):
  rankings = retrieval.rank(encodings, protocol=retrieval.Protocol())
  found = retrieval.predictions(encodings, rankings)
  assert [q["query"] for q in found["i2t"]] == list(
    encodings.retrieval_set.image_names
  )
  for query in found["i2t"]:
    scores = [item["score"] for item in query["top"]]
    assert len(scores) == 10 and scores == sorted(scores, reverse=True)
    matches = [item["match"] for item in query["top"]]
    first = matches.index(True) + 1 if any(matches) else math.inf
    assert first == query["rank"] or query["rank"] > 10 == len(matches)
  assert any(query["rank"] <= 10 for query in found["i2t"])


def test_progress_reaches_the_total_of_each_stage(model):
  seen = {}
  encodings = model.encode(
    on_progress=lambda stage, done, total: seen.update({stage: (done, total)})
  )
  fused = model.fuse(
    encodings,
    3,
    on_progress=lambda stage, done, total: seen.update({stage: (done, total)}),
  )
  assert seen == {
    "images": (9, 9),
    "captions": (15, 15),
    "pairs": (len(fused.pairs),) * 2,
  }


def test_a_model_with_nan_is_refused(model):
  broken = jax.tree.map(lambda x: x * math.nan, model.params)
  with pytest.raises(retrieval.RetrievalError, match="not finite"):
    dataclasses.replace(model, params=broken).encode()


def without_contrast(config):
  objectives = dataclasses.replace(config.objectives, itc=0.0)
  return dataclasses.replace(config, objectives=objectives)


def evaluate(model, config, **protocol):
  return retrieval.evaluate(
    model.params,
    config,
    model.tokenizer,
    model.data_dir,
    "test",
    protocol=retrieval.Protocol(**protocol),
    batch_size=16,
  )


def test_a_model_without_the_head_is_refused(model):
  config = without_contrast(model.config)
  for rerank in set(retrieval.RERANKS) - {"full"}:
    with pytest.raises(retrieval.RetrievalError, match="objectives.itc = 0"):
      evaluate(model, config, rerank=rerank)


def test_all_pairs_are_scored_without_a_contrastive_head_too(model):
  ranked = evaluate(model, without_contrast(model.config), rerank="full")
  assert (
    ranked["metrics"] == evaluate(model, model.config, rerank="full")["metrics"]
  )


def test_a_limit_leaves_the_first_images_and_stands_in_the_key(model):
  found = evaluate(model, model.config, limit=4)
  assert found["num_images"] == 4
  assert found["chance"]["i2t_r1"] > 1 / 15
  assert results.protocol_key(found["protocol"]) == "none_first4"
  assert "first 4 images" in results.protocol_label(found["protocol"])


def test_an_unknown_protocol_is_refused():
  with pytest.raises(retrieval.RetrievalError, match="rerank='best'"):
    retrieval.Protocol(rerank="best")
  with pytest.raises(retrieval.RetrievalError, match="views must be positive"):
    retrieval.Protocol(views=0)
  with pytest.raises(retrieval.RetrievalError, match="limit must not be neg"):
    retrieval.Protocol(limit=-1)
  for name in ("querybank_temperature", "conse_temperature"):
    with pytest.raises(retrieval.RetrievalError, match=name):
      retrieval.Protocol(rerank="querybank", **{name: 0.0})
