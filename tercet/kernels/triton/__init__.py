"""The operations of the kernels room for a GPU, in Triton: one file an operation.

Nothing here waits for the device: every launch may be captured in a CUDA graph. Sizes that depend on data come in as
Python ints. Without a GPU they run in Triton's interpreter (TRITON_INTERPRET=1, set before the import).
"""
