"""The configuration that every experiment starts from; `settings.TABLE` says what each setting means."""

from __future__ import annotations

from ml_collections import ConfigDict

from configs import settings


def get_config() -> ConfigDict:
    """Return a configuration with every setting at its default; locked, so that a misspelt name fails at once."""
    return settings.defaults().lock()
