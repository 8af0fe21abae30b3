"""Readers of labelled texts, with every bad input that a user may have."""

import zipfile

import numpy as np
import pytest

from shared.data import texts

READ = {"fine": False, "on_error": "fail"}
ROWS = [("good film", "pos"), ("bad film", "neg"), ('fine, "quoted" film', "pos")]


def write_folder(root, *, splits=("",)):
    for split in splits:
        for number, (text, label) in enumerate(ROWS):
            folder = root / split / label
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number}.txt").write_text(text, "utf-8")
    return root


def as_set(found):
    return {(text, found.names[label]) for text, label in zip(found.texts, found.labels, strict=True)}


def test_every_format_gives_the_same_texts(tmp_path):
    folder = write_folder(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "folder.zip", "w") as archive:
        for file in folder.rglob("*.txt"):
            archive.write(file, file.relative_to(tmp_path))
    (tmp_path / "table.csv").write_text('text,label\ngood film,pos\nbad film,neg\n"fine, ""quoted"" film",pos\n')
    (tmp_path / "table.tsv").write_text('label\ttext\npos\tgood film\nneg\tbad film\npos\t"fine, ""quoted"" film"\n')
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "films.pos").write_text('good film\nfine, "quoted" film\n')
    (tmp_path / "lines" / "films.neg").write_text("bad film\n")
    for name in ("folder", "folder.zip", "table.csv", "table.tsv", "lines"):
        found = texts.read(tmp_path / name, **READ)
        assert as_set(found) == set(ROWS), name
        assert found.names == ("neg", "pos")
        assert found.labels.dtype.kind == "i"
        assert set(found.splits) == {""}


def test_coarse_and_fine_labels(tmp_path):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "train_2.label").write_text("NUM:dist How far ?\nLOC:city Which city ?\n")
    (tmp_path / "q" / "TEST_1.label").write_text("NUM:date When ?\n")
    coarse = texts.read(tmp_path / "q", **READ)
    assert as_set(coarse) == {("How far ?", "NUM"), ("Which city ?", "LOC"), ("When ?", "NUM")}
    assert sorted(coarse.splits) == ["test", "train", "train"]
    fine = texts.read(tmp_path / "q", fine=True, on_error="fail")
    assert fine.names == ("LOC:city", "NUM:date", "NUM:dist")
    assert texts.read(tmp_path / "q" / "train_2.label", **READ).names == ("LOC", "NUM")


def test_splits_by_folder_and_by_table(tmp_path):
    found = texts.read(write_folder(tmp_path / "parted", splits=("train", "dev", "test")), **READ)
    assert sorted(found.splits) == ["test"] * 3 + ["train"] * 3 + ["validation"] * 3
    (tmp_path / "table.csv").write_text("text,label,split\na,x,train\nb,y,val\nc,y,test\n")
    assert list(texts.read(tmp_path / "table.csv", **READ).splits) == ["train", "validation", "test"]
    (tmp_path / "table.csv").write_text("text,label,split\na,x,train\nb,y,later\n")
    with pytest.raises(ValueError, match="split later is unknown; expected train"):
        texts.read(tmp_path / "table.csv", **READ)


def test_what_cannot_be_used_is_named_and_can_be_skipped(tmp_path):
    folder = write_folder(tmp_path / "folder")
    (folder / "pos" / "9.txt").write_bytes(b"caf\xe9")
    (folder / "pos" / "picture.png").write_bytes(b"x")
    (folder / "neg" / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="3 of 6 texts in") as refused:
        texts.read(folder, **READ)
    for reason in ("pos/9.txt: not UTF-8", "pos/picture.png: no text by its ending", ": no text"):
        assert reason in str(refused.value)
    found = texts.read(folder, fine=False, on_error="skip")
    assert as_set(found) == set(ROWS)
    assert len(found.unreadable) == 3


def test_data_that_cannot_be_learned_from(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; expected a folder or an archive"):
        texts.read(tmp_path / "nowhere", **READ)
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.doc is in no known format; expected \.csv or \.tsv"):
        texts.read(tmp_path / "notes.doc", **READ)
    (tmp_path / "one.csv").write_text("text,label\na,x\nb,x\n")
    with pytest.raises(ValueError, match=r"holds one class only \(x\); a classifier needs two classes or more"):
        texts.read(tmp_path / "one.csv", **READ)
    (tmp_path / "none.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match="holds no text; a classifier"):
        texts.read(tmp_path / "none.csv", **READ)
    (tmp_path / "other.csv").write_text("sentence,label\na,x\n")
    with pytest.raises(ValueError, match="has no column text"):
        texts.read(tmp_path / "other.csv", **READ)
    (tmp_path / "q.label").write_text("NUM:dist How far ?\nno label\n")
    with pytest.raises(ValueError, match="line 2: expected COARSE:fine and a text, found 'no label'"):
        texts.read(tmp_path / "q.label", **READ)
    (tmp_path / "q.label").write_bytes("NUM:a où ?\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is not utf-8"):
        texts.read(tmp_path / "q.label", **READ)
    assert texts.questions(tmp_path / "q.label", fine=False, encoding="latin-1") == [("où ?", "NUM")]


def test_labels_are_indices_of_names():
    found = texts.labelled([("a", "y", ""), ("b", "x", "test")], path="here")
    assert found.names == ("x", "y")
    np.testing.assert_array_equal(found.labels, [1, 0])
