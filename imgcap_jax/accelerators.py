"""Settings of accelerators that are made before JAX is imported."""

import importlib.util
import os
from pathlib import Path

WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment variables with which libtpu neither asks Google's metadata server nor complains on the standard error
that it is on no TPU host. None of them affects the topology that is compiled for."""


def quiet_libtpu() -> None:
    """Keeps libtpu, which ``imgcap plan`` needs, from complaining on a machine without TPU whenever JAX starts."""
    has_tpu = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    if not has_tpu and importlib.util.find_spec("libtpu") is not None:
        for name, value in WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
