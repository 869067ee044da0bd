"""Prompts, each with an id and a version that are stored beside every caption.

The captioner answers one unified prompt for every image (reference: released Share-Captioner). The
seed prompts by source for the GPT4-Vision-class teacher come with the seed stage.
"""

import hashlib
from dataclasses import dataclass

from sharegpt4v.errors import UserError


@dataclass(frozen=True, slots=True)
class Prompt:
    """`id` names the prompt for good; a changed text gets a new version."""

    id: str
    text: str

    @classmethod
    def of_user(cls, text: str) -> "Prompt":
        """Makes a prompt of a user's own text; its version is a digest of the text."""
        if not text.strip():
            raise UserError("empty: leave it out for the captioner's own", field="prompt")
        return cls(f"custom@{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}", text)


UNIFIED_CAPTION = Prompt("unified-caption@1", "Analyze the image in a comprehensive and detailed manner.")
