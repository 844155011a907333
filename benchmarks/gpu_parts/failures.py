"""The reasons why a setting has no figures, besides other exceptions."""


class MissingPackage(Exception):
    """A peer that is not installed; the message names it."""


class DeviceMemory(Exception):
    """Too little memory, where a library has caught the error already."""
