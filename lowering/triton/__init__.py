"""Triton kernels, free of torch: served by upstream Triton on NVIDIA and compiled by triton-ascend for Ascend."""
