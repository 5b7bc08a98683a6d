"""Kernels for the CPU, where PyTorch's are made for other shapes."""
