"""The library: records, images, prompts, engines and models. It imports no Ray and no server."""
