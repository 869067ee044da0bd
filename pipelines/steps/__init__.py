"""The parts of the pipelines: plain classes and functions, most of which run without Ray."""
