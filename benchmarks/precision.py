"""What vision.classify learns in each precision: the same command, seed and data.

python -m benchmarks.precision [FLAG ...]    flags of the task, e.g. --data=fashion-mnist --epochs=2
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def main(flags: list[str]) -> None:
    rows = [
        "| precision | test accuracy (95 % interval) | test calibration error | examples/s |",
        "| --- | --- | --- | --- |",
    ]
    for precision in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            words = ["train", "vision.classify", *flags, f"--precision={precision}", f"--runs={folder}/runs",
                     f"--saved-models={folder}/saved"]  # fmt: skip
            subprocess.run([Path(sys.executable).with_name("cornucopia"), *words], check=True)
            saved = Path(folder, "saved", "vision.classify", "1", "assets.extra", "metrics.json")
            report = json.loads(saved.read_text())
        accuracy, error = (report["test"][name] for name in ("accuracy", "calibration_error"))
        rows.append(f"| {precision} | {accuracy['value']:.4f} ({accuracy['low']:.4f}-{accuracy['high']:.4f}) | "
                    f"{error['value']:.4f} | {report['cost']['examples_per_second']:,.0f} |")  # fmt: skip
    print("\n".join(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
