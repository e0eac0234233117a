"""Transfer tensors from one checkpoint into another, a few megabytes at a time.

A weight changes its storage in the file that is named after it.
"""
