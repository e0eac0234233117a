"""Sparse kernels for CPUs with AVX-512: a compiled library, and what calls it.

* ``two_of_four_*.cpp`` multiply by 2:4 weights, ``any_mask_*.cpp`` by weights with any
  mask, in bf16 and W8A8 (INT8). The headers show how a weight is laid out.
* ``machine`` says what this CPU can run, ``library`` loads the compiled file,
  ``weights`` makes the forms that the kernels read, ``op`` is the operator that vLLM's
  layers call.
"""
