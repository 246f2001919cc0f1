"""One file a result: each starts from `farmer_jax.config.defaults()` and changes what differs."""
