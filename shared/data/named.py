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
