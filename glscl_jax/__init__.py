"""glscl_jax: vision-language pre-training in JAX (GLSCL, SCL and relatives)."""
