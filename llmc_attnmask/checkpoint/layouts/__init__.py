"""How a sparse weight is stored packed: one file per storage, named as in config.json.

Nothing here imports more than torch.
"""
