"""Settings that all tests share."""

from hypothesis import settings

# The first example of each shape waits for MLX to compile its kernels, which no deadline should count.
settings.register_profile("dbrx_fn", deadline=None)
settings.load_profile("dbrx_fn")
