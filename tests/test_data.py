"""Readers, named data sets, streams and the audit, with every bad input that a user may have."""

import gzip
import hashlib
import http.server
import os
import struct
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from shared import data, run
from shared.data import archives, idx, images, named, tables, texts
from shared.data.audit import audit
from shared.data.divide import divide, whole

READ = {"size": 0, "channels": 0, "on_error": "fail"}


# A stream is a pure function of the seed and the step.


def numbers(count=10, batch=3, seed=1):
    return data.stream(count, batch=batch, seed=seed, read=lambda indices, step: (indices, step))


def test_stream_starts_at_any_step():
    whole = [(x.numpy().tolist(), int(step)) for x, step in numbers()(0).take(12)]
    later = [(x.numpy().tolist(), int(step)) for x, step in numbers()(7).take(5)]
    assert later == whole[7:]


def test_an_epoch_has_each_example_once_and_the_next_another_order():
    stream = numbers(count=9)
    first = np.concatenate([x for x, _ in stream(0).take(3)])
    second = np.concatenate([x for x, _ in stream(3).take(3)])
    assert sorted(first) == sorted(second) == list(range(9))
    assert list(first) != list(second)
    assert list(np.concatenate([x for x, _ in numbers(count=9, seed=2)(0).take(3)])) != list(first)


def test_examples_of_like_length_come_together_in_any_order():
    lengths = np.random.default_rng(1).integers(1, 100, 1003)
    stream = data.stream(1003, batch=10, seed=1, read=lambda indices, step: (indices, step), lengths=lengths)
    first = np.stack([x for x, _ in stream(0).take(100)])
    assert len(np.unique(first)) == 1000  # three are left over
    np.testing.assert_array_equal(np.stack([x for x, _ in stream(40).take(60)]), first[40:])
    spread = np.ptp(lengths[first], axis=1)  # 500 that are sorted, of lengths to 99: a batch spans some 2
    assert spread.mean() < 4
    middles = np.median(lengths[first], axis=1)
    assert abs(np.corrcoef(middles, np.arange(100))[0, 1]) < 0.3  # short ones do not come first
    second = np.stack([x for x, _ in stream(100).take(100)])
    assert sorted(map(tuple, first)) != sorted(map(tuple, second))  # other company in the next epoch


def test_fewer_examples_than_a_batch():
    with pytest.raises(ValueError, match=r"20 training examples do not fill one batch of 128: use --batch=20"):
        data.stream(20, batch=128, seed=1, read=None)


def test_arrays_on_disk_read_like_arrays_in_memory(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
    mapped = np.memmap(tmp_path / "array", np.uint8, "w+", shape=array.shape)
    mapped[:] = array
    wanted = tf.constant([5, 0, 2], tf.int64)
    assert (data.gather(mapped)(wanted).numpy() == data.gather(array)(wanted).numpy()).all()
    batches = list(data.in_order(mapped, np.arange(6), batch=4))
    assert [len(labels) for _, labels in batches] == [4, 2]
    assert (np.concatenate([rows for rows, _ in batches]) == array).all()


def test_splits_keep_every_class_and_follow_the_seed():
    labels = np.repeat([0, 1, 2], [50, 30, 4])
    none = np.full(84, "")
    rows = divide(none, labels, ("a", "b", "c"), seed=1, what="pictures")
    assert sorted(np.concatenate(list(rows.values()))) == list(range(84))
    for part in rows.values():
        assert set(labels[part]) == {0, 1, 2}
    again, other = (divide(none, labels, ("a", "b", "c"), seed=seed, what="pictures") for seed in (1, 2))
    assert list(again["test"]) == list(rows["test"]) != list(other["test"])
    with pytest.raises(ValueError, match=r"class b has too few pictures"):
        divide(np.full(6, ""), np.array([0, 0, 0, 0, 0, 1]), ("a", "b"), seed=1, what="pictures")


@pytest.mark.parametrize(
    ("splits", "rows", "protocol"),
    [(("", "", ""), [0, 1, 2], "all of it"), (("train", "test", "test"), [1, 2], "official test split")],
)
def test_other_data_are_measured_in_the_classes_of_the_model(splits, rows, protocol):
    found = texts.labelled(zip(("x", "y", "z"), ("b", "d", "b"), splits, strict=True), path="a table")
    about = {"licence": "MIT", "protocol": "official test split"}
    whole_of, at, about = whole(found, about, ["a", "b", "c", "d"])
    assert whole_of.names == ("a", "b", "c", "d")
    assert whole_of.labels.tolist() == [1, 3, 1]
    assert at["test"].tolist() == rows
    assert about == {"licence": "MIT", "protocol": protocol}
    with pytest.raises(ValueError, match=r"the data's classes \['d'\] are not the model's \['a', 'b'\]"):
        whole(found, about, ["a", "b"])


# Formats.


def write_idx(path, array, *, cut=0):
    body = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(body[: len(body) - cut]))


def test_idx(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", array)
    assert (idx.read(tmp_path / "a.gz") == array).all()
    write_idx(tmp_path / "b.gz", array, cut=5)
    with pytest.raises(ValueError, match=r"cut short: its header promises 24 numbers, it holds 19"):
        idx.read(tmp_path / "b.gz")
    (tmp_path / "c.gz").write_bytes((tmp_path / "a.gz").read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"broken or cut short"):
        idx.read(tmp_path / "c.gz")
    (tmp_path / "d").write_bytes(b"PNG?")
    with pytest.raises(ValueError, match=r"is not an IDX file"):
        idx.read(tmp_path / "d")


def test_tables(tmp_path):
    (tmp_path / "a.csv").write_text('label,text\nyes,"one, two"\nno,three\n')
    assert tables.read(tmp_path / "a.csv", ("text", "label")) == [("one, two", "yes"), ("three", "no")]
    (tmp_path / "a.tsv").write_text("label\ttext\nyes\tone, two\n")
    assert tables.read(tmp_path / "a.tsv", ("text", "label")) == [("one, two", "yes")]
    with pytest.raises(ValueError, match=r"has no column image; expected a first line that names image, label"):
        tables.read(tmp_path / "a.csv", ("image", "label"))
    (tmp_path / "b.csv").write_text("text,label\none\n")
    with pytest.raises(ValueError, match=r"line 2: 1 fields, the first line names 2"):
        tables.read(tmp_path / "b.csv", ("text", "label"))
    (tmp_path / "c.csv").write_bytes("text,label\ncaf\xe9,x\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"not UTF-8"):
        tables.read(tmp_path / "c.csv", ("text", "label"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "label,text\npos,good, but long\n", "line 2: 3 fields, the first line names 2"),
        ("a.csv", 'label,text\npos,"good\nneg,bad\n', "line 3: unexpected end of data; a field that begins with"),
        ("a.csv", 'label,text\npos,"good" film\n', "line 2: ',' expected after '\"'"),
        ("a.tsv", 'text\tlabel\n"good\tpos\nbad "film"\tneg\n', "a field that begins with a quotation mark"),
        ("a.tsv", 'text\tlabel\n"good\tpos\nbad"\tneg\n', "line 3: a field of several lines with tabs in it"),
    ],
)
def test_rows_that_would_be_cut_or_merged_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        tables.read(tmp_path / name, ("text", "label"))


def test_cells_may_be_long_and_columns_may_be_quoted(tmp_path):
    long = "word " * 100_000
    (tmp_path / "a.csv").write_text(f'"text","label","split"\n"{long}","x","test"\n\n"b","y","train"\n')
    assert tables.labelled(tmp_path / "a.csv", "text") == [(long, "x", "test"), ("b", "y", "train")]
    (tmp_path / "a.tsv").write_text('text\tlabel\n"two\nlines"\tx\n"two\ttabs"\ty\n')
    assert tables.labelled(tmp_path / "a.tsv", "text") == [("two\nlines", "x", ""), ("two\ttabs", "y", "")]
    (tmp_path / "b.csv").write_text("text,label,note\na,x,,\nb,y\n")  # what is missing is not asked for
    assert tables.labelled(tmp_path / "b.csv", "text") == [("a", "x", ""), ("b", "y", "")]


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
def test_archives_read_like_folders(pictures, tmp_path, form):
    folder = pictures()
    (folder / ".DS_Store").write_bytes(b"clutter")
    packed = tmp_path / f"pictures.{form}"
    if form == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            for file in folder.rglob("*"):
                archive.write(file, Path("wrapped") / file.relative_to(folder))
    else:
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(folder, "wrapped")
    plain, read = images.read(folder, **READ), images.read(packed, **READ)
    assert read.names == plain.names == ("dark", "light", "striped")
    assert (read.pixels == plain.pixels).all()
    assert (read.labels == plain.labels).all()
    packed.write_bytes(packed.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"is a broken archive"):
        archives.names(packed)


@pytest.mark.parametrize("form", ["tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_damaged_tar_is_not_read_as_a_shorter_one(pictures, tmp_path, form):
    packed = tmp_path / f"pictures.{form}"
    with tarfile.open(packed, f"w:{form.partition('.')[2]}") as archive:
        archive.add(pictures(), "pictures")
        ends = archive.offset
    assert len(archives.names(packed)) == 60
    whole = packed.read_bytes()
    hurt = [whole[: len(whole) * share // 8] for share in range(1, 8)]
    places = range(100, len(whole) - 100, 999)  # behind what names the file, which no checksum guards
    hurt += [whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :] for at in places]
    if form == "tar":
        at = whole.index(b"ustar", ends // 2)
        # A header's checksum is all that it has; and cut off at the end of a member it looks whole.
        hurt = [whole[:at] + b"?" + whole[at + 1 :], whole[: ends // 2 // 512 * 512], whole[:ends]]
    for content in hurt:
        packed.write_bytes(content)
        with pytest.raises(ValueError, match=r"is a broken archive"):
            archives.names(packed)
    if form == "tar.gz":
        packed.write_bytes(whole + b"what somebody put behind it")
        assert len(archives.names(packed)) == 60


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_file_of_a_zip_is_named_and_can_be_skipped(pictures, tmp_path, method):
    folder, packed = pictures(), tmp_path / "pictures.zip"
    with zipfile.ZipFile(packed, "w", method) as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(folder))
        hurt = archive.getinfo("dark/3.png")
    content = bytearray(packed.read_bytes())
    for at in range(hurt.header_offset + 60, hurt.header_offset + 80):
        content[at] ^= 255
    packed.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 of 60 files below .*\n  dark/3\.png: \w"):
        images.read(packed, **READ)
    found = images.read(packed, **{**READ, "on_error": "skip"})
    assert len(found.labels) == 59
    assert found.unreadable[0].startswith("dark/3.png: ")


def test_a_checksum_tells_that_data_changed(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / os.fsdecode(b"caf\xe9.txt")).write_text("one")  # a name that is no UTF-8

    def checksum():
        return run.checksum(run.Config(data=str(tmp_path / "data")))

    before = checksum()
    (tmp_path / "data" / ".DS_Store").write_text("clutter")
    assert checksum() == before
    (tmp_path / "data" / "a" / "b.txt").write_text("two")
    more = checksum()
    (tmp_path / "data" / "a" / "b.txt").rename(tmp_path / "data" / "a" / "c.txt")
    assert len({before, more, checksum()}) == 3
    assert run.checksum(run.Config(data="banking77")) == run.checksum(run.Config()) == ""


# Pictures.


@pytest.mark.parametrize(
    ("mode", "form", "channels"), [("L", "png", 1), ("RGB", "jpg", 3), ("RGBA", "png", 3), ("RGB", "bmp", 3)]
)
def test_pictures_of_any_kind(pictures, mode, form, channels):
    found = images.read(pictures(mode=mode, form=form, size=20), **READ)
    assert found.pixels.shape == (60, 20, 20, channels)
    assert found.pixels[found.labels == 1].mean() > found.pixels[found.labels == 0].mean() + 100


def test_training_and_serving_see_the_same_pixels(pictures):
    folder = pictures(size=30)
    found = images.read(folder, size=16, channels=1, on_error="fail")
    contents = [(folder / name).read_bytes() for name in archives.names(folder)]
    served = images.decode_batch(tf.constant(contents), size=16, channels=1)
    assert (served.numpy() == found.pixels).all()


def test_splits_by_folder_and_by_table(pictures, tmp_path):
    inner = pictures(count=3)
    for split in ("train", "val", "test"):
        (tmp_path / "whole" / split).mkdir(parents=True)
        for name in ("dark", "light"):
            os.link(inner / name / "0.png", tmp_path / f"{split}-{name}.png")
            (tmp_path / "whole" / split / name).mkdir()
            os.link(inner / name / "1.png", tmp_path / "whole" / split / name / "a.png")
    found = images.read(tmp_path / "whole", **READ)
    assert found.names == ("dark", "light")
    assert sorted(found.splits) == ["test", "test", "train", "train", "validation", "validation"]
    lines = [f"{split}-{name}.png,{name},{split}" for split in ("train", "val", "test") for name in ("dark", "light")]
    (tmp_path / "list.csv").write_text("image,label,split\n" + "\n".join(lines))
    listed = images.read(tmp_path / "list.csv", **READ)
    assert listed.names == found.names
    assert sorted(listed.splits) == sorted(found.splits)
    for file in (tmp_path / "whole" / "test").rglob("*.png"):
        file.unlink()
    for folder in (*(tmp_path / "whole" / "test").iterdir(), tmp_path / "whole" / "test"):
        folder.rmdir()
    found = images.read(tmp_path / "whole", **READ)  # the test part is to be drawn
    assert found.names == ("dark", "light")
    assert sorted(found.splits) == ["train", "train", "validation", "validation"]
    (tmp_path / "list.csv").write_text("image,label\nnone.png,dark\n")
    with pytest.raises(FileNotFoundError, match=r"lists none\.png, which is not in"):
        images.read(tmp_path / "list.csv", **READ)


def test_a_licence_beside_the_classes_is_none(pictures, tmp_path):
    packed = tmp_path / "flowers.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in pictures().rglob("*.png"):
            archive.write(file, Path("flowers", file.parent.name, file.name))
        archive.writestr("flowers/LICENSE.txt", "CC-BY")
        archive.writestr("flowers/readme.png", b"")
    found = images.read(packed, **READ)
    assert found.names == ("dark", "light", "striped")
    assert len(found.labels) == 60


def test_more_pictures_than_memory_go_to_disk(pictures, monkeypatch):
    folder = pictures()
    expected = images.read(folder, **READ)
    monkeypatch.setattr(images, "IN_MEMORY", 100)
    found = images.read(folder, **READ)
    assert isinstance(found.pixels, np.memmap)
    assert (found.pixels == expected.pixels).all()


def test_corrupt_picture_is_named_and_can_be_skipped(pictures):
    folder = pictures()
    (folder / "dark" / "3.png").write_bytes((folder / "dark" / "4.png").read_bytes()[:60])
    (folder / "light" / "5.png").write_bytes(b"")
    (folder / "light" / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"3 of 61 files") as error:
        images.read(folder, **READ)
    message = str(error.value)
    assert "--on-error=skip" in message
    assert "dark/3.png: Invalid PNG" in message
    assert "light/5.png: the file is empty" in message
    assert "light/notes.txt: no picture by its ending" in message
    found = images.read(folder, **{**READ, "on_error": "skip"})
    assert len(found.labels) == len(found.pixels) == 58
    assert len(found.unreadable) == 3


def test_folders_that_cannot_be_learned_from(pictures, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; expected a folder or an archive"):
        images.read(tmp_path / "nowhere", **READ)
    (tmp_path / "file.mp3").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is neither a folder nor an archive"):
        images.read(tmp_path / "file.mp3", **READ)
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"no pictures below .*; expected one sub-folder a class"):
        images.read(tmp_path / "void", **READ)
    folder = pictures(names=("dark",))
    with pytest.raises(ValueError, match=r"holds one class only \(dark\)"):
        images.read(folder, **READ)
    (folder / "light").mkdir()
    with pytest.raises(ValueError, match=r"class light is empty: no file is below"):
        images.read(folder, **READ)
    (folder / "light" / "clip.webp").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"light/clip\.webp: no picture by its ending"):
        images.read(folder, **READ)
    with pytest.raises(ValueError, match=r"class light below .* is empty: no readable picture"):
        images.read(folder, **{**READ, "on_error": "skip"})


# The audit.


def test_audit_counts(capsys):
    items = np.arange(24, dtype=np.uint8).reshape(6, 4).repeat(1, axis=0)
    items[1] = items[0]  # a duplicate within train, under another label
    items[4] = items[2]  # a test example that is also in train
    items[5] = 7
    splits = {"train": (items[:4], np.array([0, 1, 0, 1])), "test": (items[4:], np.array([0, 1]))}
    facts = audit(splits, ["no", "yes"], unreadable=["x.png: broken"])
    assert facts["train_duplicates"] == 1
    assert facts["test_also_in_train"] == 1
    assert facts["contradictions"] == 1
    assert facts["constant"] == 1
    assert facts["unreadable"] == 1
    printed = capsys.readouterr().out
    assert "train 4  test 2  in 2 classes; in train 2 each" in printed
    assert "left out x.png: broken" in printed
    audit({"train": (items[:3], np.array([0, 1, 0])), "test": splits["test"]}, ["no", "yes"])
    assert "in train 1 (yes) to 2 (no) each" in capsys.readouterr().out
    facts = audit({"test": (items[:3], np.array([0, 1, 0]))}, ["no", "yes", "perhaps"])  # to measure on
    assert (facts["test_duplicates"], facts["contradictions"]) == (1, 1)
    printed = capsys.readouterr().out
    assert "audit      test 3  in 2 classes of the model's 3\n" in printed
    assert "exact duplicates: test 1; same input, other label: 1\n" in printed


def test_audit_refuses():
    with pytest.raises(ValueError, match=r"no training example of class yes"):
        audit({"train": (np.ones((2, 2)), np.array([0, 0]))}, ["no", "yes"])
    broken = np.array([[1.0, np.nan], [1, 2]])
    with pytest.raises(ValueError, match=r"NaN or infinity \(1 in train\)"):
        audit({"train": (broken, np.array([0, 1]))}, ["no", "yes"])


# Public data sets by name.


@pytest.fixture
def web(tmp_path, monkeypatch):
    """A data set on a server of ours, which understands ranges and can break a transfer."""
    content = np.random.default_rng(1).bytes(1 << 20)
    state = {"content": content, "cut": None, "ranges": []}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if not self.path.endswith("numbers.bin"):
                return self.send_error(404)
            wanted = self.headers.get("Range")
            state["ranges"].append(wanted)
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            if start >= len(state["content"]):
                return self.send_error(416)
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(state["content"]) - start))
            self.end_headers()
            return self.wfile.write(state["content"][start : state["cut"]])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    numbers = named.Dataset(
        files={"numbers.bin": hashlib.sha256(content).hexdigest()},
        address=f"http://127.0.0.1:{server.server_port}/", licence="", citation="", source="https://example.org/numbers",
    )  # fmt: skip
    monkeypatch.setitem(named.DATASETS, "numbers", numbers)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.delenv("CORNUCOPIA_DATA", raising=False)
    yield state
    server.shutdown()
    server.server_close()


def test_download_goes_on_where_it_broke(web, tmp_path):
    web["cut"] = 400_000
    with pytest.raises(FileNotFoundError, match=r"the transfer broke after 400,000 of 1,048,576 bytes"):
        named.find("numbers")
    web["cut"] = None
    path = named.find("numbers")["numbers.bin"]
    assert path == tmp_path / "keras" / "datasets" / "numbers" / "numbers.bin"
    assert path.read_bytes() == web["content"]
    assert web["ranges"] == [None, "bytes=400000-"]
    assert not list(path.parent.glob("*.part"))
    named.find("numbers")
    assert len(web["ranges"]) == 2  # found in the cache


def test_download_of_something_else_is_refused(web, tmp_path):
    web["content"] = b"an error page"
    with pytest.raises(ValueError, match=r"is not the published file"):
        named.find("numbers")
    assert not list((tmp_path / "keras").rglob("*.bin*"))


def test_data_that_cannot_be_had(web, monkeypatch, tmp_path):
    gone = named.Dataset({"gone.bin": "0" * 64}, named.DATASETS["numbers"].address, "", "", "https://example.org/gone")
    monkeypatch.setitem(named.DATASETS, "gone", gone)
    with pytest.raises(
        FileNotFoundError, match=r"CORNUCOPIA_DATA is not set.*404.*Get it from https://example.org/gone"
    ):
        named.find("gone")
    monkeypatch.setenv("CORNUCOPIA_DATA", str(tmp_path / "given"))
    (tmp_path / "given" / "gone").mkdir(parents=True)
    (tmp_path / "given" / "gone" / "gone.bin").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"is not the published file: expected SHA-256 0000"):
        named.find("gone")
