"""Why a setting has no figures, where no other exception says it."""


class MissingPackage(Exception):
    """Something to compare with is not installed; the message says what."""


class DeviceMemory(Exception):
    """There was too little memory; raised where a library has caught the error already."""
