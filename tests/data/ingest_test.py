"""JSON Lines files: every kind of bad line is named, good ones survive."""

from __future__ import annotations

import io
import json

import pytest
from PIL import Image

from glscl_jax.data import ingest, pairs


def _write(tmp_path, *rows):
  path = tmp_path / "pairs.jsonl"
  data = [
    row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows
  ]
  path.write_bytes(b"\n".join(data) + b"\n")
  return path


def _row(**changes):
  return {"image": "a.png", "caption": "a cat", **changes}


def test_a_line_needs_only_image_and_caption(tmp_path):
  lines, rejects, num_lines = ingest.read_lines(_write(tmp_path, _row()))
  assert rejects == [] and num_lines == 1
  assert lines == [
    ingest.Line(
      number=1, id="line-1", split="train", image="a.png", captions=("a cat",)
    )
  ]


def test_captions_may_be_a_list_and_are_stripped(tmp_path):
  path = _write(tmp_path, _row(caption=[" a cat ", "cat\n"]))
  lines, _, _ = ingest.read_lines(path)
  assert lines[0].captions == ("a cat", "cat")


def test_a_line_may_name_its_split_and_id(tmp_path):
  path = _write(tmp_path, _row(split="val", id=12), _row())
  lines, _, _ = ingest.read_lines(path, split="test")
  assert [(line.id, line.split) for line in lines] == [
    ("12", "val"),
    ("line-2", "test"),
  ]


def test_other_keys_are_nobodys_business(tmp_path):
  path = _write(tmp_path, _row(url="x", idx=3, splits=1, split="val"))
  (line,), rejects, _ = ingest.read_lines(path)
  assert line.split == "val" and not rejects


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
  path = _write(tmp_path, _row())
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
  lines, rejects, _ = ingest.read_lines(path)
  assert len(lines) == 1 and not rejects


def test_empty_lines_do_not_count_but_keep_the_numbers_right(tmp_path):
  path = _write(tmp_path, b"", _row(), b"   ", _row(caption=""))
  lines, rejects, num_lines = ingest.read_lines(path)
  assert num_lines == 2
  assert lines[0].number == 2
  assert rejects[0].line == 4


@pytest.mark.parametrize(
  ("row", "reason"),
  [
    (b"{", "not valid JSON"),
    (b'{"image": "\xff"}', "not valid UTF-8"),
    (["a.png", "a cat"], "expected an object, got list"),
    ({"caption": "a cat"}, "no key 'image'; it has ['caption']"),
    ({"image": "a.png"}, "no key 'caption'"),
    (_row(image=3), "image: expected a path, got 3"),
    (_row(image=""), "image: expected a path"),
    (_row(caption=""), "caption: empty"),
    (_row(caption=" \t"), "caption: empty"),
    (_row(caption=[]), "caption: empty"),
    (_row(caption=["a cat", ""]), "caption: empty"),
    (_row(caption=3), "caption: expected a string or a list"),
    (_row(caption=["a", 3]), "caption: expected a string or a list"),
    (_row(caption=None), "caption: expected a string or a list"),
    (_row(id=""), "id: expected a string"),
    (_row(id=True), "id: expected a string"),
    (_row(id=[1]), "id: expected a string"),
    (_row(split="a b"), "split: expected a name"),
    (_row(split="../x"), "split: expected a name"),
    (_row(split="all"), "split: expected a name"),
    (_row(split=None), "split: expected a name"),
    (_row(Split="test"), "key 'Split' is not read: did you mean 'split'?"),
    (_row(splt="test"), "key 'splt' is not read"),
  ],
)
def test_a_bad_line_is_rejected_with_its_number_and_reason(
  tmp_path, row, reason
):
  path = _write(tmp_path, _row(), row, _row())
  lines, rejects, num_lines = ingest.read_lines(path)
  assert [line.number for line in lines] == [1, 3]
  assert num_lines == 3
  assert rejects[0].line == 2
  assert reason in rejects[0].reason


def test_an_id_counts_once(tmp_path):
  path = _write(tmp_path, _row(id="x"), _row(id="x", split="test"))
  lines, rejects, _ = ingest.read_lines(path)
  assert len(lines) == 1
  assert "'x' was used on an earlier line" in rejects[0].reason


def test_a_file_that_is_missing_or_empty_is_named(tmp_path):
  with pytest.raises(pairs.DataError, match=r"none\.jsonl: cannot be read"):
    ingest.read_lines(tmp_path / "none.jsonl")
  with pytest.raises(pairs.DataError, match=r"pairs\.jsonl: the file is empty"):
    ingest.read_lines(_write(tmp_path, b"", b" "))


def _image_bytes(kind):
  out = io.BytesIO()
  Image.linear_gradient("L").convert("RGB").save(out, kind)
  return out.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "folder"])
def test_an_unreadable_image_is_rejected_and_the_next_one_read(
  tmp_path, kind, damage
):
  data = _image_bytes(kind)
  bad = tmp_path / "bad"
  if damage == "folder":
    bad.mkdir()
  else:
    bad.write_bytes(
      {"cut": data[: len(data) // 2], "empty": b"", "text": b"hello"}[damage]
    )
  (tmp_path / "good").write_bytes(data)
  lines, rejects, _ = ingest.read_lines(
    _write(tmp_path, _row(image="bad", id="b"), _row(image="good", id="g"))
  )
  records = list(
    ingest.read_records(lines, tmp_path, split="train", rejects=rejects)
  )
  assert [record.id for record in records] == ["g"]
  assert records[0].image == data
  assert [(reject.line, reject.id) for reject in rejects] == [(1, "b")]
  assert str(bad) in rejects[0].reason


def test_only_the_lines_of_the_split_are_read(tmp_path):
  (tmp_path / "a.png").write_bytes(_image_bytes("PNG"))
  path = _write(tmp_path, _row(id="a"), _row(id="b", split="test"))
  lines, rejects, _ = ingest.read_lines(path)
  records = list(
    ingest.read_records(lines, tmp_path, split="test", rejects=rejects)
  )
  assert [record.id for record in records] == ["b"]


def test_rejects_up_to_the_share_are_allowed_and_more_are_not(tmp_path):
  rejects = [ingest.Reject(line=n, id="", reason=f"bad {n}") for n in (1, 2)]
  ingest.check_rejects(tmp_path, rejects, num_lines=4, max_share=0.5)
  with pytest.raises(pairs.DataError) as caught:
    ingest.check_rejects(tmp_path, rejects, num_lines=4, max_share=0.49)
  for part in ("2 of 4 lines", "--max_reject_share=0.49", "line 2: bad 2"):
    assert part in str(caught.value)


def test_the_fingerprint_changes_with_any_image(tmp_path):
  (tmp_path / "a.png").write_bytes(b"1")
  lines, _, _ = ingest.read_lines(_write(tmp_path, _row()))
  before = ingest.fingerprint(lines, tmp_path)
  assert ingest.fingerprint(lines, tmp_path) == before
  (tmp_path / "a.png").write_bytes(b"12")
  assert ingest.fingerprint(lines, tmp_path) != before
