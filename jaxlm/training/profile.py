"""The steps of a run that train.profile asks a trace of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxlm.config import ProfileConfig, RunConfig
from jaxlm.devices.trace import start_trace, stop_trace
from jaxlm.errors import UserError
from jaxlm.processes.distributed import Hosts

FOLDER = "profile"


def check_profile(config: RunConfig, total: int) -> None:
    """Refuses a profile that a run has no step for.

    Args:
        total: steps of the run.

    Raises:
        UserError: its first step comes after the run's last one.
    """
    profile = config.train.profile
    if profile is not None and profile.start > total:
        raise UserError(f"train.profile.start: {profile.start} comes after the run's last step, {total}")


def profile_warnings(config: RunConfig, done: int) -> list[str]:
    """Warns of a profile whose steps an earlier start has done.

    Args:
        done: steps that are done.
    """
    profile = config.train.profile
    if profile is None or done < (end := profile.start + profile.steps) - 1:
        return []
    return [
        f"train.profile: the run is at step {done}, and steps {profile.start} to {end - 1} are not traced; set "
        f"train.profile.start to {done + 2} or later"
    ]


class Profile:
    """Traces the steps that train.profile names, each process its own.

    Args:
        config: the run.
        hosts: the processes.
        done: steps that are done.
        program: gives the text of the compiled step.

    Attributes:
        folder: where this process's trace is written.

    Raises:
        UserError: it cannot be made.
    """

    def __init__(self, config: RunConfig, hosts: Hosts, done: int, program: Callable[[], str]) -> None:
        profile = config.train.profile
        is_ahead = profile is not None and done + 1 < profile.start + profile.steps
        self._settings: ProfileConfig | None = profile if is_ahead else None
        self._program = program
        self._first: int | None = None  # of the trace that is being made
        self.folder = Path(config.output_dir) / FOLDER
        if hosts.processes > 1:
            self.folder /= f"process-{hosts.process:02}"
        if is_ahead:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"train.profile: {self.folder} cannot be made ({error.strerror}); move away what is in its place, "
                    "or leave train.profile out"
                ) from None

    def begins_with(self, step: int) -> bool:
        """Whether the trace begins with a step; a resumed run may begin in the middle of what was asked for."""
        profile = self._settings
        return self._first is None and profile is not None and profile.start <= step < profile.start + profile.steps

    def ends_with(self, step: int) -> bool:
        profile = self._settings
        return self._first is not None and profile is not None and step + 1 == profile.start + profile.steps

    def begin(self, step: int) -> None:
        """Begins the trace.

        Raises:
            UserError: this process makes another one.
        """
        try:
            start_trace(self.folder, for_perfetto=True)
        except RuntimeError:
            raise UserError(
                "train.profile: this process makes another trace already; end that, or leave train.profile out"
            ) from None
        self._first = step

    def end(self, step: int) -> str | None:
        """Ends the trace, if one is being made, and says where it is, or why it is not.

        Args:
            step: the last one of it.
        """
        if self._first is None:
            return None
        first, self._first, self._settings = self._first, None, None
        steps = f"step {first}" if step <= first else f"steps {first} to {step}"
        try:
            stop_trace(self.folder, self._program())
        except (OSError, RuntimeError) as error:  # the profiler's are RuntimeErrors; the run goes on without a trace
            return f"train.profile: the trace of {steps} could not be written to {self.folder}: {error}"
        return f"trace of {steps}: {self.folder}"
