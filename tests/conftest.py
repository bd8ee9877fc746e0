"""Before any test module: without a GPU, Triton's kernels are interpreted, which must be decided before triton is first imported."""

import emf_kernels  # noqa: F401
