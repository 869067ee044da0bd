"""Training: from dialogues with their images to weights."""
