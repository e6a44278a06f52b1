"""Kernels in C++ for the CPU, built on the machine that they are for."""
