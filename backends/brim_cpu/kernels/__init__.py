"""NumPy kernels, one file per family of ops; importing a file registers its kernels."""
