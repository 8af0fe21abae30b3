"""What the tasks share: data, metrics, training, export and serving."""

import os
import platform

if platform.machine() in ("x86_64", "AMD64"):
    # Before TensorFlow is imported: by itself it takes oneDNN only where the processor has AVX-512 VNNI or AMX.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
