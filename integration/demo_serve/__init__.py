"""Serve a model dense and sparse with vLLM, and show what that gains."""
