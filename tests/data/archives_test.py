"""Tests of ppnet.data.archives."""

import gzip
import pickle
import threading
import zipfile

import pytest

from ppnet.data import archives
from tests.data import raw_tools

_FILES = {"b/2": b"two", "a": b"one", ".hidden/x": b"", "b/.DS_Store": b"?"}


@pytest.mark.parametrize("write", [raw_tools.zip_of, raw_tools.folder_of])
def test_zip_and_folder_look_the_same(tmp_path, write):
  path = write(tmp_path / "set.zip", _FILES | {"__MACOSX/a": b"shadow"})
  if path.is_dir():
    path = path.rename(tmp_path / "set")
    for file in (path / "__MACOSX").iterdir():
      file.unlink()
  files = archives.open_files(path)
  assert files.names() == ("a", "b/2")
  assert (files.read("b/2"), files.size("b/2")) == (b"two", 3)
  copy = pickle.loads(pickle.dumps(files))
  assert copy.read("a") == b"one"
  with pytest.raises(archives.UnreadableError):
    files.read("c")


@pytest.mark.parametrize(
  ("name", "fault"),
  [
    ("/etc/passwd", "absolute"),
    ("../up", "leads out"),
    ("a/../../up", "leads out"),
    ("a\\..\\up", "elsewhere"),
    ("C:/up", "elsewhere"),
    ("./same", "twice"),
    ("same", "twice"),
  ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zip_that_would_write_elsewhere_is_refused_by_name(
  tmp_path, name, fault
):
  path = tmp_path / "set.zip"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("same", b"1")
    archive.writestr(name, b"2")
  with pytest.raises(ValueError, match=fault) as info:
    archives.open_files(path)
  assert repr(name) in str(info.value)
  assert {p.name for p in tmp_path.iterdir()} == {"set.zip"}
  # Fails if: `..` is compared with the whole name.


def test_encrypted_and_nul_names_are_refused(tmp_path):
  path = raw_tools.zip_of(tmp_path / "set.zip", {"name.txt": b"1"})
  content = path.read_bytes()
  central = content.index(b"PK\x01\x02")
  # General purpose flags, bit 0, in the central directory.
  locked = bytearray(content)
  locked[central + 8] |= 1
  path.write_bytes(locked)
  with pytest.raises(ValueError, match="encrypted"):
    archives.open_files(path)
  path.write_bytes(content.replace(b"name.txt", b"nam\0.txt"))
  with pytest.raises(ValueError, match="leads out"):
    archives.open_files(path)


@pytest.mark.parametrize("keep", [0, 1, 30, 0.5, 0.9, 0.99])
def test_truncated_zip_is_named(tmp_path, keep):
  path = raw_tools.zip_of(tmp_path / "set.zip", {"a": b"1" * 999, "b": b"2"})
  content = path.read_bytes()
  cut = int(keep * len(content)) if isinstance(keep, float) else keep
  path.write_bytes(content[:cut])
  with pytest.raises(ValueError, match=r"a whole zip.*set\.zip"):
    archives.open_files(path)


def test_any_flipped_byte_gives_an_error_or_the_same_content(tmp_path):
  path = raw_tools.zip_of(tmp_path / "set.zip", {"a": b"abc" * 40, "b": b"d"})
  whole = path.read_bytes()
  refused = 0
  for at in range(len(whole)):
    spoilt = bytearray(whole)
    spoilt[at] ^= 0x55
    path.write_bytes(spoilt)
    try:
      files = archives.open_files(path)
      content = [files.read(name) for name in files.names()]
    except ValueError:  # `UnreadableError` is one.
      refused += 1
      continue
    # What the checksum does not cover: times, versions, names.
    assert all(c in (b"abc" * 40, b"d") for c in content)
  assert refused > 50


def test_entry_that_claims_too_much_is_not_read(tmp_path, monkeypatch):
  path = raw_tools.zip_of(tmp_path / "set.zip", {"bomb": b"\0" * 5000})
  monkeypatch.setattr(archives, "MAX_BYTES", 4999)
  files = archives.open_files(path)
  with pytest.raises(archives.UnreadableError, match="claims 5000 bytes"):
    files.read("bomb")
  packed = tmp_path / "bomb.gz"
  packed.write_bytes(gzip.compress(b"\0" * 5000))
  with pytest.raises(ValueError, match="at most 4999"):
    archives.read_plain_or_gzip(packed)


def test_gzip_that_was_cut_short_is_named(tmp_path):
  path = tmp_path / "a.gz"
  path.write_bytes(gzip.compress(b"abc" * 100)[:-9])
  with pytest.raises(ValueError, match=r"read to its end.*a\.gz"):
    archives.read_plain_or_gzip(path)


def test_neither_folder_nor_zip_is_refused(tmp_path):
  (tmp_path / "a.rar").write_bytes(b"Rar!")
  with pytest.raises(ValueError, match=r"a folder or a \.zip"):
    archives.open_files(tmp_path / "a.rar")


def test_folder_that_links_to_itself_ends(tmp_path):
  raw_tools.folder_of(tmp_path / "set", {"a/1": b"", "b/2": b""})
  (tmp_path / "set" / "a" / "up").symlink_to(tmp_path / "set")
  (tmp_path / "set" / "c").symlink_to(tmp_path / "set" / "b")
  files = archives.open_files(tmp_path / "set")
  assert files.names() == ("a/1", "b/2", "c/2")


def test_threads_share_one_zip(tmp_path):
  expected = {f"{i}": bytes([i]) * (i + 1) * 1000 for i in range(40)}
  files = archives.open_files(raw_tools.zip_of(tmp_path / "s.zip", expected))
  wrong = []

  def read() -> None:
    for name in files.names():
      if files.read(name) != expected[name]:
        wrong.append(name)

  threads = [threading.Thread(target=read) for _ in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not wrong
