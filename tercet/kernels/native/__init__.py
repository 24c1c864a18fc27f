"""Kernels in C++ for CPUs: `library` compiles and loads them where they run, `layers` and `linear` call them."""
