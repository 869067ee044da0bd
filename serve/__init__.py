"""Online applications: captioner and chat model behind an OpenAI-style API, and the demo on top of it."""
