"""What the tasks share: data, metrics, training, export and serving."""

import os
import platform

if platform.machine() in ("x86_64", "AMD64"):
    # Read when TensorFlow is imported, which by itself takes oneDNN only where the processor has AVX-512 VNNI or AMX.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
