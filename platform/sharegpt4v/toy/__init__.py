"""The toy world: rendered scenes whose truth is known, and the small models that learn them."""
