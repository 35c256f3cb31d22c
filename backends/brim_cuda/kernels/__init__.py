"""Families of kernels: each ``*.py`` registers binders (``brim_cuda.registry``) for the ``*.cuh`` beside it."""
