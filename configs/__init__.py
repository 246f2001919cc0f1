"""Configuration files. Each file modifies the values of `farmer_jax.config.defaults()`."""
