"""The engine over device kernels (`kernels.device`): one code for CUDA with Triton, and for a CPU
with the reference ops or Triton's interpreter.
"""
