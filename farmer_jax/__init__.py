"""FARMER (Flow AutoRegressive Transformer over Pixels) for JAX."""
