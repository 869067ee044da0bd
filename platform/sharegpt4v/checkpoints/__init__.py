"""Checkpoints on disk: the model card, the released layouts and ours, and the conversion between them."""
