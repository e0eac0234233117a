"""The paper's own problem (arXiv 2410.11261), on a fused query-key weight, as written.

It uses nothing of the rest of the package, and the rest nothing of it: tests hold one
against the other.
"""
