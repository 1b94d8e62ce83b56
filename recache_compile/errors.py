"""The one error tree of the package: each message says what, where and the remedy."""


class RecacheError(Exception):
    """Something the user can mend."""


class ScheduleError(RecacheError):
    """A schedule, a budget or a policy's answer is not usable."""


class CaptureError(RecacheError):
    """A module cannot be captured, or an input has no role."""


class PassError(RecacheError):
    """A pass cannot do its work on this graph."""


class ModelError(RecacheError):
    """A model or pipeline cannot be loaded or driven."""


class RuntimeUnavailableError(RecacheError):
    """A runtime or an optional dependency is not usable on this machine."""


class DispatchError(RecacheError):
    """A call does not fit what was compiled."""


class MismatchError(DispatchError):
    """A call whose shapes, types or constants are not among those compiled."""


class ArtifactError(RecacheError):
    """An artifact is damaged, from a newer version, or cannot be written."""
