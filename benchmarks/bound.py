"""How fast a step of many hosts can be at best, by the gradient's bytes: python -m benchmarks.bound [SAVED_MODELS].

Reads the newest version of each model below saved_models, and writes the table in deploy/README.md.
"""

import json
import sys
from pathlib import Path

from benchmarks.report import fill
from shared import export

PAGE = Path(__file__).parent.parent / "deploy" / "README.md"
HOSTS, LINKS = 8, (1, 10, 100, 400)  # Gbit/s


def milliseconds(size: int, *, hosts: int, gigabits: float) -> float:
    """That a ring all-reduce of some bytes takes at least (Patarasuk & Yuan 2009)."""
    return 1000 * 2 * (hosts - 1) / hosts * 8 * size / (gigabits * 1e9)


def row(base: Path) -> str:
    import keras

    versions = export.versions(base)
    extra = versions[max(versions)] / "assets.extra"
    model = keras.saving.load_model(extra / "model.keras")
    count = sum(int(weight.value.shape.num_elements()) for weight in model.trainable_weights)
    data = json.loads((extra / "metrics.json").read_text())["data"]
    bounds = [f"{milliseconds(4 * count, hosts=HOSTS, gigabits=link):.2f}" for link in LINKS]
    return " | ".join([f"`{base.name}`, {data}", f"{count:,}", f"{4 * count / 2**20:.2f}", *bounds])


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "saved_models")
    head = ["model", "trainable weights", "MiB a step", *[f"ms at {link} Gbit/s" for link in LINKS]]
    lines = [" | ".join(head), " | ".join(["---"] * len(head))]
    lines += [row(base) for base in sorted(folder.iterdir()) if base.is_dir() and export.versions(base)]
    table = "\n".join(f"| {line} |" for line in lines)
    PAGE.write_text(fill(PAGE.read_text(), "bound: python -m benchmarks.bound", "bound", table))


if __name__ == "__main__":
    main()
