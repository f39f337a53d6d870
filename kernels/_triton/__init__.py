"""The Triton kernels; imported when the first of them runs, so that the package needs no Triton."""
