"""What every kind of job needs of its run folder: paths, settings, lock, charts."""
