"""The `alexnet` command; what its commands do is in launch.commands.

Results go to stdout, everything for people to stderr. A user's mistake is one line and exit code 2, a run
that fails one line and exit code 1.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import time
import traceback

import click

from launch import __version__
from launch.commands import ablations, benchmarks, data, doctor, pictures, recipes, report, training, watch, weights
from launch.environment import die_with_torchrun, end_job, end_stopped_siblings, tell_ending
from launch.errors import STOPPED, printable

# Before torch is imported: its C++ side would tell of a peer's death or absence in lines of its own beside ours. (What
# NCCL's watchdog has to say is hidden with them; the exchange has a time-out of its own.)
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
# And: threads of OpenMP that wait for each other look so often before they sleep. By its default they look for
# milliseconds, in which a thread that another program has put off the processor cannot go on.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


# What may be over when a job is started anew: of disks and networks, and of what other programs take.
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH,
           errno.ECONNREFUSED, errno.ECONNRESET, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN}


class _Failure(click.ClickException):
    """`final`: started anew, the job would fail in the same way. `of_another`: another process has ended first."""

    def __init__(self, message: str, exit_code: int, final: bool = False, of_another: bool = False):
        super().__init__(message)
        self.exit_code, self.final, self.of_another = exit_code, final, of_another

    def show(self, file=None) -> None:
        click.echo(f"alexnet: {printable(self.message)}", err=True)


class _Commands(click.Group):
    """Turns the errors that the packages raise for users into one line and an exit code."""

    def invoke(self, context: click.Context):
        from launch.errors import OutOfMemory, RunFailed, Stopped, UserError
        from model.errors import PeerError, RecipeError
        from pipeline.errors import DataError, PreprocessError

        try:
            return super().invoke(context)
        except (UserError, DataError, RecipeError) as error:
            raise _Failure(str(error), 2, final=True) from None
        except Stopped as error:
            tell_ending(STOPPED)
            raise _Failure(str(error), STOPPED) from None
        except PeerError as error:
            raise _Failure(str(error), 1, of_another=True) from None
        except (PreprocessError, OutOfMemory) as error:
            raise _Failure(str(error), 1) from None
        except RunFailed as error:
            raise _Failure(str(error), 1, final=True) from None
        except BrokenPipeError:  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter would complain at its end
            context.exit(1)
        except OSError as error:
            final = error.errno not in PASSING
            if error.filename is None:
                raise _Failure(f"cannot read or write: {error.strerror or error}", 1, final) from None
            raise _Failure(f"{error.filename}: {error.strerror}", 2, final) from None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """AlexNet (Krizhevsky, Sutskever and Hinton 2012) on two towers: from ImageNet's archives to its error."""


for command in (
    data.sample, data.inspect, data.preprocess, data.verify, recipes.recipes, training.train, training.evaluate,
    pictures.predict, pictures.similar, pictures.figures, report.report, ablations.ablate, weights.export,
    weights.import_, benchmarks.bench, doctor.doctor, watch.watch,
):
    cli.add_command(command)


def main() -> None:
    die_with_torchrun()  # at once: torch and DALI take seconds to import, in which torchrun may be killed
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # names of files and classes may be no text
    if "WORLD_SIZE" not in os.environ:  # alone: what is half done, as a file under a temporary name, is to go
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    warnings = logging.StreamHandler()
    warnings.setFormatter(logging.Formatter("alexnet: %(message)s"))
    for package in ("pipeline", "model"):
        logging.getLogger(package).addHandler(warnings)
    try:
        code = cli.main(prog_name="alexnet", standalone_mode=False) or 0
    except click.ClickException as error:
        leads = os.environ.get("LOCAL_RANK", "0") == "0"  # of this host's processes
        if error.exit_code == STOPPED and not leads:
            os._exit(STOPPED)  # all were stopped; the first says so
        of_another = getattr(error, "of_another", False)
        if "TORCHELASTIC_RUN_ID" in os.environ and (not leads or of_another):
            # Most likely the first process fails of the same, or another failed first and has told why: torchrun ends
            # this process while it waits, and what went wrong is told once.
            end_stopped_siblings()
            time.sleep(5 if of_another else 20)
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            click.echo(error.ctx.get_help(), err=True)
            sys.exit(error.exit_code)
        if isinstance(error, click.UsageError):
            where = error.ctx.command_path if error.ctx else "alexnet"
            error = _Failure(f"{error.format_message()} See `{where} --help`.", error.exit_code, final=True)
        error.show()
        code = error.exit_code
        if getattr(error, "final", False):
            end_job(code)
    except click.Abort:
        click.echo("alexnet: stopped", err=True)
        code = 130
    except Exception:  # a bug of ours
        traceback.print_exc()
        code = 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # After an error the peer may be dead or hang: RPC's and gloo's threads, which wait for it, are not to be
        # joined. After none all is closed, and profiled processes have crashed where Python unloads DALI.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
