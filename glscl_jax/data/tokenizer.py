"""Text to token ids, by sentencepiece or by a Hugging Face tokenizer file.

One interface for both. Ids follow RoBERTa: start 0, pad 1, end 2, unknown 3,
mask last. Padding is known by position, never by its id.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import io
import itertools
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from glscl_jax import errors
from glscl_jax.config import Config, ConfigError
from glscl_jax.data import compounds, word_rules

MASK = "<mask>"
# unigram: any text is spelled in pieces. word: a piece a word; a word outside
# the vocabulary is the words that spell it, else the unknown piece.
MODEL_TYPES = ("unigram", "word")
_WORD_START = "\u2581"  # sentencepiece's mark of a space


class TokenizerError(errors.UserError):
  """A tokenizer file that cannot be used."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
  """One text, padded to a fixed length."""

  ids_T: np.ndarray  # int32
  valid_T: np.ndarray  # bool; True for the text and its two specials
  word_T: np.ndarray  # int32; word number, -1 for specials and padding
  truncated: bool
  unknown: bool  # a part has no piece of its own
  spelled: bool  # a word outside the vocabulary is read as others that spell it
  words: tuple[tuple[str, ...], ...]  # what each token of each word writes,
  # without marks of spaces; of the whole text, also of what was cut


class Tokenizer(abc.ABC):
  """What both kinds of file offer; can be pickled."""

  vocab_size: int
  start_id: int
  end_id: int
  pad_id: int
  mask_id: int
  unknown_id: int | None  # None: every text can be written
  sha256: str  # of the file

  @property
  def special_ids(self) -> frozenset[int]:
    """Ids that stand for no text: never masked, never a replacement."""
    return frozenset((self.start_id, self.end_id, self.pad_id, self.mask_id))

  def encode(self, text: str, max_length: int) -> Tokens:
    """Start, text, end, padding; a long text is cut before the end.

    Args:
      text: any string; empty gives the two specials alone.
      max_length: T, with both specials.
    """
    if max_length < 2:
      raise ValueError(f"max_length {max_length} has no room for the specials")
    ids, numbers, written, spelled = self._split(text)
    room = max_length - 2
    truncated = len(ids) > room
    words = _group(written, numbers)
    ids, numbers = ids[:room], numbers[:room]
    used = len(ids) + 2
    ids_T = np.full(max_length, self.pad_id, np.int32)
    ids_T[:used] = [self.start_id, *ids, self.end_id]
    word_T = np.full(max_length, -1, np.int32)
    word_T[1 : used - 1] = numbers
    return Tokens(
      ids_T=ids_T,
      valid_T=np.arange(max_length) < used,
      word_T=word_T,
      truncated=truncated,
      unknown=self.unknown_id in ids,
      spelled=spelled,
      words=words,
    )

  def count(self, text: str) -> int:
    """Tokens of all of a text, with both specials."""
    ids, *_ = self._split(text)
    return len(ids) + 2

  @abc.abstractmethod
  def pieces(self, ids: Iterable[int]) -> list[str]:
    """The written form of each id."""

  @abc.abstractmethod
  def text(self, ids: Iterable[int]) -> str:
    """What ids say, without specials; the mask is none of them."""

  @abc.abstractmethod
  def _split(self, text: str) -> _Split:
    """Of the bare text: ids, each one's word and writing, Tokens.spelled."""


_Split = tuple[list[int], list[int], list[str], bool]


def _group(
  written: Sequence[str], numbers: Sequence[int]
) -> tuple[tuple[str, ...], ...]:
  """The parts of each word."""
  parts = zip(numbers, written, strict=True)
  return tuple(
    tuple(text for _, text in word)
    for _, word in itertools.groupby(parts, key=lambda part: part[0])
  )


class _SentencePiece(Tokenizer):
  def __init__(self, proto: bytes, name: str):
    self._proto, self._name = proto, name
    self._load()
    model = self._model
    size = model.get_piece_size()
    self.start_id, self.end_id = model.bos_id(), model.eos_id()
    self.pad_id, self.unknown_id = model.pad_id(), model.unk_id()
    found = model.piece_to_id(MASK)
    has_mask = found != model.unk_id()
    # Ours have no mask piece: an id past the last one cannot come from text.
    self.mask_id = found if has_mask else size
    self.vocab_size = size if has_mask else size + 1
    self.sha256 = hashlib.sha256(proto).hexdigest()
    for what in ("start_id", "end_id", "pad_id"):
      if getattr(self, what) < 0:
        raise TokenizerError(
          f"{name}: the model has no {what.removesuffix('_id')} piece; train "
          "it with bos, eos and pad ids"
        )

  def _load(self) -> None:
    if not self._proto:  # the library takes no bytes for no model, and warns
      raise TokenizerError(f"{self._name}: not a sentencepiece model: empty")
    try:
      self._model = sentencepiece.SentencePieceProcessor(
        model_proto=self._proto
      )
    except RuntimeError as error:
      raise TokenizerError(
        f"{self._name}: not a sentencepiece model: {error}"
      ) from error
    self._words = _words(self._proto)

  def __getstate__(self) -> dict[str, Any]:
    made = ("_model", "_words")
    return {k: v for k, v in self.__dict__.items() if k not in made}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._load()

  def pieces(self, ids: Iterable[int]) -> list[str]:
    return [
      MASK if int(i) == self.mask_id else self._model.id_to_piece(int(i))
      for i in ids
    ]

  def text(self, ids: Iterable[int]) -> str:
    return self._model.decode([int(i) for i in ids])

  def _split(self, text: str) -> _Split:
    ids = self._model.encode(text)
    # As written, not as in the table: the unknown piece has no word mark there.
    written = self._model.encode(text, out_type=str)
    if self._words:
      return self._split_words(ids, written)
    starts = [piece.startswith(_WORD_START) for piece in written]
    starts[:1] = [True] * len(starts[:1])
    numbers = [int(n) - 1 for n in np.cumsum(starts)]
    bare = [piece.replace(_WORD_START, "") for piece in written]
    return ids, numbers, bare, False

  def _split_words(self, ids: list[int], written: list[str]) -> _Split:
    """The library's ids of words, its unknown ones taken apart."""
    found: list[list[tuple[int, str]]] = []
    for piece_id, piece in zip(ids, written, strict=True):
      piece = piece.removeprefix(_WORD_START)
      if piece_id != self.unknown_id:
        found.append([(piece_id, piece)])
        continue
      # It makes one piece of neighbours that are unknown.
      for word in piece.split(_WORD_START):
        spelled = compounds.parts(word, self._words)
        parts = [(self._words[part], part) for part in spelled]
        found.append(parts or [(piece_id, word)])
    numbers = [n for n, word in enumerate(found) for _ in word]
    ids = [i for word in found for i, _ in word]
    bare = [text for word in found for _, text in word]
    return ids, numbers, bare, len(ids) > len(found)


def _words(proto: bytes) -> dict[str, int]:
  """Ids of the words of a word model; nothing for another type of model."""
  model = sentencepiece_model_pb2.ModelProto.FromString(proto)
  if model.trainer_spec.model_type != model.trainer_spec.WORD:
    return {}
  pieces = ((piece.piece, i) for i, piece in enumerate(model.pieces))
  return {
    piece.removeprefix(_WORD_START): i
    for piece, i in pieces
    if piece.startswith(_WORD_START)
  }


class _HuggingFace(Tokenizer):
  def __init__(self, data: bytes, name: str):
    self._data, self._name = data, name
    self._load()
    self.start_id = self._find("<s>", "[CLS]")
    self.end_id = self._find("</s>", "[SEP]")
    self.pad_id = self._find("<pad>", "[PAD]")
    self.mask_id = self._find(MASK, "[MASK]")
    unknown = map(self._model.token_to_id, ("<unk>", "[UNK]"))
    self.unknown_id = next((i for i in unknown if i is not None), None)
    self.vocab_size = max(self._model.get_vocab().values()) + 1
    self.sha256 = hashlib.sha256(data).hexdigest()

  def _load(self) -> None:
    try:
      self._model = tokenizers.Tokenizer.from_buffer(self._data)
    except Exception as error:  # the library raises bare Exception
      raise TokenizerError(
        f"{self._name}: not a tokenizer.json of the tokenizers library: {error}"
      ) from error
    self._model.no_truncation()
    self._model.no_padding()
    # A caption that spells "<mask>" or "</s>" is text like any other.
    self._model.encode_special_tokens = True

  def _find(self, *names: str) -> int:
    for name in names:
      found = self._model.token_to_id(name)
      if found is not None:
        return found
    raise TokenizerError(f"{self._name}: no {' or '.join(names)} token")

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_model"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._load()

  def pieces(self, ids: Iterable[int]) -> list[str]:
    found = [self._model.id_to_token(int(i)) for i in ids]
    if None in found:
      raise IndexError(f"{self._name}: an id is not in the vocabulary")
    return found

  def text(self, ids: Iterable[int]) -> str:
    ids = [int(i) for i in ids]
    return self._model.decode(ids, skip_special_tokens=True).strip()

  def _split(self, text: str) -> _Split:
    encoding = self._model.encode(text, add_special_tokens=False)
    words = [w if w is not None else 0 for w in encoding.word_ids]
    bare, done = [], 0
    for first, end in encoding.offsets:
      # Bytes of one character all stand at its place: the first writes it.
      bare.append(text[max(first, done) : end].strip())
      done = max(done, end)
    return encoding.ids, words, bare, False


def load(path: str | pathlib.Path) -> Tokenizer:
  """Reads a `.model` (sentencepiece) or `.json` (tokenizers) file.

  Raises:
    TokenizerError: no such file, another suffix, or a file that lacks the
      special tokens.
  """
  path = pathlib.Path(path)
  if path.suffix not in (".model", ".json"):
    raise TokenizerError(
      f"{path}: expected .model (sentencepiece) or .json (tokenizers)"
    )
  try:
    data = path.read_bytes()
  except OSError as error:
    raise TokenizerError(
      f"{path}: cannot be read ({error.strerror}); set data.tokenizer or run "
      "launch/prepare.py"
    ) from error
  if path.suffix == ".model":
    return _SentencePiece(data, str(path))
  return _HuggingFace(data, str(path))


def train_sentencepiece(
  texts: Sequence[str],
  path: str | pathlib.Path,
  vocab_size: int,
  *,
  model_type: str = "unigram",
) -> None:
  """Trains a lower-casing model on `texts` and writes it to `path`.

  Args:
    texts: the training captions and nothing else.
    path: ends in .model.
    vocab_size: V with the mask, which is an id past the model's last piece; a
      small corpus may end with fewer.
    model_type: of MODEL_TYPES.

  Raises:
    TokenizerError: an unknown type, too few texts, or a V below the number of
      characters (unigram) or specials (word).
  """
  if model_type == "unigram":
    rules = {"normalization_rule_name": "nmt_nfkc_cf"}
    proto = _train(texts, vocab_size, model_type, rules)
  elif model_type == "word":
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder) / "rules.tsv"
      file.write_text(word_rules.normalization_rules())
      rules = {"normalization_rule_tsv": str(file)}
      proto = _without_path(_train(texts, vocab_size, model_type, rules))
  else:
    raise TokenizerError(
      f"tokenizer type {model_type!r}: expected one of {MODEL_TYPES}"
    )
  pathlib.Path(path).write_bytes(proto)


def _without_path(proto: bytes) -> bytes:
  """The model without the name of the rules' file: equal texts, equal bytes."""
  model = sentencepiece_model_pb2.ModelProto.FromString(proto)
  model.normalizer_spec.ClearField("normalization_rule_tsv")
  return model.SerializeToString(deterministic=True)


def _train(
  texts: Sequence[str],
  vocab_size: int,
  model_type: str,
  normalization: dict[str, str],
) -> bytes:
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(texts),
      model_writer=model,
      model_type=model_type,
      **normalization,
      vocab_size=vocab_size - 1,
      hard_vocab_limit=False,
      bos_id=0,
      pad_id=1,
      eos_id=2,
      unk_id=3,
      bos_piece="<s>",
      pad_piece="<pad>",
      eos_piece="</s>",
      unk_piece="<unk>",
      character_coverage=1.0,
      num_threads=1,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise TokenizerError(
      f"sentencepiece cannot train {vocab_size} pieces on {len(texts)} texts "
      f"(--vocab_size): {error}"
    ) from error
  return model.getvalue()


def check_vocab(config: Config, tokenizer: Tokenizer) -> None:
  """Raises ConfigError unless the model's vocabulary is the tokenizer's."""
  expected = config.model.text.vocab_size
  if tokenizer.vocab_size != expected:
    raise ConfigError(
      f"model.text.vocab_size: is {expected}, but the tokenizer has "
      f"{tokenizer.vocab_size} entries: set --config.model.text.vocab_size="
      f"{tokenizer.vocab_size}"
    )
