"""Objects of foreign libraries that raise where a program expects it least."""


class Raising:
    """A scalar that cannot be read."""

    def item(self):
        raise ValueError("no item")

    def __float__(self):
        raise OSError("no float")

    def __repr__(self):
        raise RuntimeError("no repr")


class RaisingAttributes:
    """No attribute can be read, not even its class."""

    def __getattribute__(self, name):
        raise RuntimeError(name)


class RaisingClass:
    """Its class cannot be read."""

    @property
    def __class__(self):
        raise RuntimeError("no class")


class Interrupt(BaseException):
    """Like KeyboardInterrupt, but not caught by name."""


class RaisingKeyErrors:
    """For an attribute that it lacks it raises another error than `getattr` expects."""

    def __init__(self, **entries):
        vars(self)["entries"] = entries

    def __getattr__(self, name):
        return self.entries[name]
