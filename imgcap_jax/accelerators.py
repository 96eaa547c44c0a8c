"""Settings of accelerators that are made before JAX is imported."""

WITHOUT_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
"""Environment variables with which libtpu neither asks Google's metadata server nor complains on the standard error
that it is on no TPU host. None of them affects the topology that is compiled for."""
