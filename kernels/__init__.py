"""The Triton kernels, installed as `fastsds.kernels`: one file per op, of the op's name."""
