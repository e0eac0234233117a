"""The paper's own problem (arXiv 2410.11261), on a fused query-key weight, as written.

This room and the rest of the package do not use each other; tests compare them.
"""
