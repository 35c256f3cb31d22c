"""The CUDA backend: kernels in CUDA C++, compiled with NVRTC, launched through a typed layer on a GPU or emulated.

Importing it needs NumPy only; CuPy is imported when a GPU is first used.
"""
