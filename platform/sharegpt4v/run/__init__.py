"""The run folder: what a captioning run leaves on disk, and everything that reads it back."""
