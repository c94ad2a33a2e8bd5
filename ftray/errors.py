"""What can go wrong, as one tree.

    FtrayError                  every error that ftray raises on purpose
    ├── UserError               something the user wrote or pointed at; exit code 2
    │   ├── ConfigError         a run file
    │   ├── DataError           rows, files, formats
    │   ├── ModelError          a base, a tokenizer, a method that does not fit it
    │   ├── ArtefactError       a commit, an adapter, a manifest
    │   │   └── UnknownAdapter  no such tenant, name or version in the registry
    │   └── RequestError        a request to the engine that can never be answered
    ├── QueueFull               the engine has as much waiting as it may; later it will take the same request
    ├── RunError                a run that started and could not go on; exit code 3
    └── RunStopped              a run that was asked to stop and committed first; exit code 75

Every error says what is wrong, where, and what to change. All survive pickling with their fields, since they cross
process borders inside Ray.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_RUN = 3
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: the same command goes on where this one left off."""
EXIT_INTERRUPTED = 130
"""As shells have it for Ctrl-C: there was nothing to commit."""


class FtrayError(Exception):
    """Base of all. `what` is the sentence, `where` the file, key or row, `hint` what to change."""

    exit_code = EXIT_BUG

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.hint = what, where, hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return "\n  ".join([text, *([f"→ {self.hint}"] if self.hint else []), *self._notes()])

    def __reduce__(self):
        notes = self._notes()
        return _rebuild, (type(self), self.what, self.where, self.hint), {"__notes__": notes} if notes else None

    def _notes(self) -> list[str]:
        """What went wrong besides, as `add_note` took it."""
        return list(getattr(self, "__notes__", []))


def _rebuild(kind: type[FtrayError], what: str, where: str | None, hint: str | None) -> FtrayError:
    return kind(what, where=where, hint=hint)


class UserError(FtrayError):
    exit_code = EXIT_USER


class ConfigError(UserError):
    pass


class DataError(UserError):
    pass


class ModelError(UserError):
    pass


class ArtefactError(UserError):
    pass


class UnknownAdapter(ArtefactError):
    pass


class RequestError(UserError):
    pass


class QueueFull(FtrayError):
    pass


class RunError(FtrayError):
    exit_code = EXIT_RUN


class RunStopped(FtrayError):
    exit_code = EXIT_STOPPED
