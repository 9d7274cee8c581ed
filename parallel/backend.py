"""The platform that JAX computes on."""

from __future__ import annotations

import jax

from errors import UserError


def check_platform() -> None:
    """Check that JAX has devices of the platform it is asked for; call it once the processes have met.

    Raises:
      UserError: naming the platform and why JAX cannot have it.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion if the platform's plugin is not installed
        reason = str(error).partition("\n")[0] or "its plugin is not installed"
        reason = reason.removesuffix("(set JAX_PLATFORMS='' to automatically choose an available backend)").rstrip(" .")
        platforms = getattr(jax.config, "jax_platforms", None) or ""
        raise UserError(
            f"JAX_PLATFORMS={platforms!r} is not available: {reason}; install that platform, or unset JAX_PLATFORMS to "
            "use what this machine has"
        ) from error
