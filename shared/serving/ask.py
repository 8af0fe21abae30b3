"""One raw request to a server, and its answer as a person reads it."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import grpc
import numpy as np

from shared.serving.client import Client, Inputs, ServerError

FILES = ("image", "audio")  # inputs that take the content of a file; a person gives its path
FIRST = ("label", "text")  # what a person wants to know before the rest


def ask(
    model: str,
    values: Mapping[str, str],
    *,
    address: str,
    signature: str = "serving_default",
    version: int | None = None,
    label: str = "",
    token: str = "",
    certificate: Sequence[str | Path] = (),
    timeout: float = 60.0,
    top: int | None = None,
) -> None:
    """Print the answer of a model's signature to inputs given as text; of a list of best ones the `top` first.

    `token` and `certificate` are as for Client.

    Raises:
        ValueError: an input is missing, unknown or not of its type, or the server refuses; says which.
        OSError: no server answers at the address, or a file cannot be read.
    """
    which = {"signature": signature, "version": version, "label": label}
    with Client(address, timeout=timeout, token=token, certificate=certificate, retries=0) as client:
        try:
            example = read(model, values, client.inputs(model, **which), client.defaults(model, **which))
            answer = client.predict(model, example, **which)
        except ServerError as error:
            raise explained(error, address) from error
    print(describe({name: value[0] for name, value in answer.items()}, top=top))


def read(
    model: str, values: Mapping[str, str], inputs: Inputs, optional: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """One example, with a batch of one in front, from inputs given as text; ValueError: they are not what it takes."""
    missing, unknown = sorted(set(inputs) - set(values) - set(optional)), sorted(set(values) - set(inputs))
    if missing or unknown:
        flags = {name: f"--{name}={'FILE' if name in FILES else 'VALUE'}" for name in inputs}
        expected = " ".join(f"[{flag}]" if name in optional else flag for name, flag in flags.items())
        raise ValueError(f"{model} takes {expected}; "
                         + "; ".join([f"{name} is missing" for name in missing]
                                     + [f"{name} is unknown" for name in unknown]))  # fmt: skip
    return {name: _parse(name, values[name], *inputs[name]) for name in inputs if name in values}


def _parse(name: str, text: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    if dtype == np.dtype(object):
        if len(shape) > 1:  # a list, with commas between
            return np.array([[part.strip().encode() for part in text.split(",")]], object)
        return np.array([Path(text).read_bytes() if name in FILES else text.encode()], object)
    try:
        value = np.array([float(number) for number in text.replace(",", " ").split()]).astype(dtype)
        return value.reshape([1, *shape[1:]])
    except ValueError as error:
        count = math.prod(shape[1:]) if min(shape[1:], default=1) >= 0 else "any count of"
        expected = f"one {dtype} number" if count == 1 else f"{count} {dtype} numbers with commas or spaces between"
        raise ValueError(f"--{name} takes {expected}, not {text!r}") from error


def explained(error: ServerError, address: str) -> ValueError | ConnectionError:
    """A failed call as a person at the command line needs it."""
    if error.code == grpc.StatusCode.UNAVAILABLE:
        rest = "" if "://" in address else f", or, if that is a port for REST, write http://{address}"
        return ConnectionError(f"no server answers at {address} ({error.details}); start one with make serve{rest}")
    details = re.sub(r"\s*\[\[\{\{.*", "", error.details, flags=re.DOTALL)  # where in TensorFlow's graph it happened
    return ValueError(f"the server refuses ({error.code.name}): {details or error.details}")


def describe(answer: Mapping[str, np.ndarray], *, top: int | None = None) -> str:
    """An answer to one example, a line for each output; `top_labels` and `top_scores` become a list, or its `top`."""
    lines = []
    for name, value in sorted(answer.items(), key=lambda item: (item[0] not in FIRST, item[0])):
        if name in ("top_labels", "top_scores"):
            continue
        lines.append(f"{name:<10} {_show(value)}")
    if "top_labels" in answer:
        best = list(zip(answer["top_labels"], answer["top_scores"], strict=True))
        for place, (label, score) in enumerate(best[:top], start=1):
            lines.append(f"{f'top {place}':<10} {_show(score)}  {_show(label)}")
    return "\n".join(lines)


def shorten(answer: Mapping[str, np.ndarray], most: int = 40) -> str:
    """The first thing that an answer says, on one line."""
    said = " ".join(describe(answer).splitlines()[0].split())
    return said if len(said) <= most else said[: most - 1] + "…"


def _show(value) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray) and value.ndim:
        items = [_show(item) for item in value.tolist()]
        spaced = value.dtype == object and any(not item or re.search(r"\s", item) for item in items)
        return " ".join(map(repr, items) if spaced else items)  # marks tell where each begins and ends
    if isinstance(value, float | np.floating):
        return f"{value:.4f}"
    return str(value)
