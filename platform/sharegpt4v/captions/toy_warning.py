"""Says of captions that were not written by a real captioner that they were not."""

_SENTENCES = {
    "toy-": "Written by a toy model of about a million parameters, which was made to exercise the pipeline "
    "on rendered scenes: these captions say nothing of Share-Captioner and are not fit to train on.",
    "fake@": "Written by the fake engine, which looks at no image: these captions exercise the pipeline and "
    "describe nothing.",
}


def toy_warning(model: str) -> str | None:
    """Returns one line of warning for the model name of a run, `toy-captioner@1f3c` for example, or None."""
    return next((line for prefix, line in _SENTENCES.items() if model.startswith(prefix)), None)
