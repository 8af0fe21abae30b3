"""Record a golden model and its answers anew: python tests/golden/make.py VERSION_FOLDER.

VERSION_FOLDER comes from `cornucopia train vision.classify --size=8 --width=8 --batch=64 --epochs=8`.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_digits

here = Path(__file__).parent
version = here / "vision.classify" / "1"
if Path(sys.argv[1]).resolve() != version:
    shutil.rmtree(version, ignore_errors=True)
    shutil.copytree(sys.argv[1], version, ignore=shutil.ignore_patterns("assets*"))
pictures = []
for index, digit in enumerate(load_digits().images[:4]):
    image = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    if index == 3:
        image = image.convert("RGB").resize((40, 40))
    pictures.append(f"{index}.png")
    image.save(here / pictures[-1])
contents = tf.constant([(here / name).read_bytes() for name in pictures])
answer = tf.saved_model.load(str(version)).signatures["serving_default"](image=contents)
recorded = {
    "pictures": pictures,
    "label": [label.decode() for label in answer["label"].numpy()],
    "top_scores": np.round(answer["top_scores"].numpy().astype(float), 6).tolist(),
}
(here / "answers.json").write_text(json.dumps(recorded, indent=1) + "\n")
print(recorded["label"])
