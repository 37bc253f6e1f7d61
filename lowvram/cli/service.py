"""`lowvram service`: have the system start a run, and again after a reboot."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowvram.cli.next_step import next_step


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and those below it."""
    parser = commands.add_parser(
        "service",
        help="have the system start a run, again after a reboot",
        description="Have the system start a run by itself: a systemd user unit on Linux, a launchd agent on macOS, a "
        "scheduled task on Windows. It runs `lowvram train RUN.toml --supervise`.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    install = actions.add_parser(
        "install",
        help="write the service and start it",
        description="Write a service that trains what RUN.toml describes; it is started now, and after each login (on "
        "Linux, where lingering is on, after each start of the computer).",
    )
    install.add_argument("run_file", type=Path, metavar="RUN.toml", help="the run file: model, data, training")
    install.add_argument("--name", metavar="NAME", help="name of the service (default: that of the run directory)")
    install.add_argument("--print", action="store_true", help="print the file that would be written, and do nothing")
    install.set_defaults(run=_install)
    for action, does, what in (
        ("remove", _remove, "stop a service, which saves its run, and delete it"),
        ("status", _show_status, "show what a service does"),
    ):
        each = actions.add_parser(action, help=what, description=f"{what[0].upper()}{what[1:]}.")
        each.add_argument("name", metavar="NAME", help="name of the service")
        each.set_defaults(run=does)
    what = "show the services that are installed"
    actions.add_parser("list", help=what, description=f"{what[0].upper()}{what[1:]}.").set_defaults(run=_list)


def _install(arguments: argparse.Namespace) -> None:
    from lowvram.api.services import describe_service, host_here, name_after, refuse_busy
    from lowvram.api.training import read_run_file
    from lowvram.cli.console import copyable, literal, notice, result

    config = read_run_file(arguments.run_file)
    service = describe_service(arguments.run_file, arguments.name or name_after(config.run.dir))
    host = host_here()
    if arguments.print:
        notice(f"{host.path(service.name)} would be:", "dim")
        literal(host.contents(service).rstrip("\n"))
        return
    refuse_busy(config.run.dir)
    host.install(service)
    result(f"The service {service.name} trains now; its file is {host.path(service.name)}")
    for remark in host.remarks(service.name):
        notice(remark)
    copyable(next_step("service", "status", service.name, why="what it does"))


def _remove(arguments: argparse.Namespace) -> None:
    from lowvram.api.services import host_here
    from lowvram.cli.console import notice, result

    host = host_here()
    host.refuse_unknown(arguments.name)
    notice(f"Stopping {arguments.name}; a step in progress is finished and saved first.")
    host.remove(arguments.name)
    result(f"The service {arguments.name} is removed; its run and its checkpoints are kept.")


def _show_status(arguments: argparse.Namespace) -> None:
    from lowvram.api.services import host_here
    from lowvram.cli.console import notice, result

    host = host_here()
    host.refuse_unknown(arguments.name)
    result(f"{arguments.name}: {host.state(arguments.name)}")
    notice(f"Its file is {host.path(arguments.name)}")
    for remark in host.remarks(arguments.name):
        notice(remark)


def _list(arguments: argparse.Namespace) -> None:
    from lowvram.api.services import host_here
    from lowvram.cli.console import notice, result

    host = host_here()
    for name in host.names():
        result(f"{name}: {host.state(name)}")
    if not host.names():
        notice("No service is installed; lowvram service install RUN.toml installs one.")
