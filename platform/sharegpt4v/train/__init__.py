"""Training on dialogues with their images."""
