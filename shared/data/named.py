"""Public data sets by name: what their files are, where they are found, under which licence.

A file is looked up in `$CORNUCOPIA_DATA/NAME/`, then in the Keras cache (`~/.keras/datasets/NAME/`), and else
downloaded into that cache. Whatever is found must have the SHA-256 that stands here.
"""

import dataclasses
import hashlib
import os
import urllib.error
import urllib.request
from pathlib import Path

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A public data set: its files with their SHA-256, and what a user of it must know."""

    files: dict[str, str]  # file name -> SHA-256
    address: str  # the files' folder on the web; empty: no address is known to be stable
    licence: str
    citation: str
    source: str  # where a person finds it
    published: dict[str, str] = dataclasses.field(default_factory=dict)  # metric -> figures of others, with sources


DATASETS = {
    "fashion-mnist": Dataset(
        files={
            "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        },
        address="https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
        licence="MIT",
        citation="Xiao, Rasul, Vollgraf 2017, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning "
        "Algorithms, arXiv:1708.07747",
        source="https://github.com/zalandoresearch/fashion-mnist",
        published={"accuracy": "two convolutions 0.916-0.925, WRN-28-10 0.959 (the data set's README)"},
    ),
    "mr": Dataset(
        files={
            "rt-polarity.neg": "2d11cfbc790f1cd96d78339f41ce53ced1efa83cd22d37d6788fa3fe3d17e2fd",
            "rt-polarity.pos": "4134882974a28d0c7b5151256f0e33a6169984ee7372c279e673f1114f475d58",
        },
        address="",
        licence="none stated (Cornell, research use)",
        citation="Pang & Lee 2005, Seeing stars, ACL",
        source="https://github.com/dennybritz/cnn-text-classification-tf (the UTF-8 version), data/rt-polaritydata",
        published={"accuracy": "ten folds: CNN-rand 0.761, CNN-non-static with word2vec 0.815 (Kim 2014, table 2)"},
    ),
    "sst2": Dataset(
        files={
            "train.tsv": "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920",
            "dev.tsv": "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359",
            "test.tsv": "831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7",
        },
        address="",
        licence="none stated (Stanford Sentiment Treebank)",
        citation="Socher et al. 2013, Recursive Deep Models for Semantic Compositionality, EMNLP",
        source="https://github.com/clairett/pytorch-sentiment-classification, data/SST2",
        published={
            "accuracy": "CNN-rand 0.827, CNN-non-static 0.872, both trained with phrases too (Kim 2014); BERT 0.949 "
            "(NLP-progress)"
        },
    ),
    "trec": Dataset(
        files={
            "train_5500.label": "8bd6e79493f43bbd22c364587366a1dced54e1e31259eaa92721a0f526031116",
            "TREC_10.label": "86ad53c8fc9d397ab2f4be7c967d8efb470b260140557d3e57afad69d1b88b76",
        },
        address="",
        licence="none stated (UIUC, research use)",
        citation="Li & Roth 2002, Learning Question Classifiers, COLING",
        source="https://cogcomp.seas.upenn.edu/Data/QA/QC/",
        published={
            "accuracy": "6 classes: CNN-rand 0.912, CNN-non-static 0.936 (Kim 2014); 50: SVM 0.916 (NLP-progress)"
        },
    ),
    "banking77": Dataset(
        files={
            "train.csv": "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
            "test.csv": "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
        },
        address="",
        licence="CC BY 4.0",
        citation="Casanueva et al. 2020, Efficient Intent Detection with Dual Sentence Encoders",
        source="https://github.com/PolyAI-LDN/task-specific-datasets, banking_data",
        published={
            "accuracy": "RNN and CNN on GloVe 0.880 (README of ianuragbhatt/clinc_oos); USE + ConveRT 0.934, "
            "BERT-large 0.937 (Casanueva et al. 2020)"
        },
    ),
    "fsdd": Dataset(
        files={"fsdd_recordings.tar.gz": "b8f087bc9d5c545fe5468a9febde9b9643520a6352c75be86b96328be04ef5c2"},
        address="",
        licence="CC BY-SA 4.0",
        citation="Jackson, Souza, Flaks, Pan, Nicolas, Thite 2018, Free Spoken Digit Dataset v1.0.8, Zenodo",
        source="https://github.com/Jakobovski/free-spoken-digit-dataset (its folder recordings, as a tar.gz)",
        published={
            "accuracy": "speakers heard in training: modified ResNet-18, random 2,400/600 split 0.9696 "
            "(dilne/Free-Spoken-Digit-Dataset, README)"
        },
    ),
    "ml-100k": Dataset(
        files={
            "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
            "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
        },
        address="",
        licence="GroupLens: research only, no commercial use, no redistribution without permission",
        citation="Harper & Konstan 2015, The MovieLens Datasets: History and Context, ACM TiiS 5(4)",
        source="https://grouplens.org/datasets/movielens/100k/",
        published={"ndcg@10": "popularity 0.045, BPR 0.064, ALS 0.072, EASE 0.073 (measured elsewhere, this protocol)"},
    ),
    "tinyshakespeare": Dataset(
        files={"input.txt": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"},
        address="",
        licence="public domain; the source repository is under MIT",
        citation="Karpathy 2015, The Unreasonable Effectiveness of Recurrent Neural Networks",
        source="https://github.com/karpathy/char-rnn (data/tinyshakespeare)",
        published={"loss": "nanoGPT 1.4697 (6 layers, 384 wide, context 256, on a GPU), 1.88 (its CPU recipe)"},
    ),
}


def find(name: str) -> dict[str, Path]:
    """The files of a named data set by file name, each with the right checksum; downloaded where need be.

    Raises:
        FileNotFoundError: no place has a file; says what was tried and how to get it.
        ValueError: a file is there but is not the published one.
    """
    return {file: _find_file(name, file) for file in DATASETS[name].files}


def about(name: str) -> dict[str, str]:
    """What a model card says of a named data set."""
    dataset = DATASETS[name]
    return {
        "data": name,
        "source": dataset.source,
        "licence": dataset.licence,
        "citation": dataset.citation,
        "checksums": str(dataset.files),
        **{f"published {metric}": text for metric, text in dataset.published.items()},
    }


def _find_file(name: str, file: str) -> Path:
    dataset = DATASETS[name]
    given = os.environ.get("CORNUCOPIA_DATA")
    cache = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "datasets" / name
    places = ([Path(given) / name] if given else []) + [cache]
    for place in places:
        if (place / file).is_file():
            _verify(place / file, dataset.files[file])
            return place / file
    try:
        if not dataset.address:
            raise OSError("no address is known")
        download(dataset.address + file, cache / file, sha256=dataset.files[file])
    except OSError as error:
        raise FileNotFoundError(
            f"{name}: {file} is not in {' nor in '.join(str(place) for place in places)}"
            f"{'' if given else ' (CORNUCOPIA_DATA is not set)'}, and {dataset.address + file or 'no address'} gave: "
            f"{error}. Get it from {dataset.source} and put it into {places[0]}"
        ) from error
    return cache / file


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} is not the published file: expected SHA-256 {sha256}, found {found}; remove it")


def download(url: str, target: Path, *, sha256: str) -> None:
    """Fetch a file with a progress bar; what a broken transfer left in `TARGET.part` is gone on with.

    Raises:
        OSError: the server or the disk refuses; what arrived is kept for the next try.
        ValueError: the whole file arrived and is not the one that was asked for; it is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        reply = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to send, the part is already whole
            raise
        reply = None
    if reply is not None:
        with reply:
            resumed = reply.status == 206
            total = int(reply.headers.get("Content-Length", 0)) + (have if resumed else 0)
            columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(),
                       TransferSpeedColumn(), TimeRemainingColumn())  # fmt: skip
            with Progress(*columns) as progress, part.open("ab" if resumed else "wb") as file:
                bar = progress.add_task(target.name, total=total or None, completed=have if resumed else 0)
                while block := reply.read(1 << 18):
                    file.write(block)
                    progress.advance(bar, len(block))
        if total and part.stat().st_size < total:
            raise OSError(f"the transfer broke after {part.stat().st_size:,} of {total:,} bytes; run again to go on")
    try:
        _verify(part, sha256)
    except ValueError:
        part.unlink()
        raise
    part.rename(target)
