"""All machines of a hostfile: asked over SSH, as the launcher does, and compared with each other."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from hdscale.cluster.device import Check
from hdscale.cluster.hostfile import Host
from hdscale.cluster.launcher import python_path
from hdscale.preflight.machine import Facts, Question, check_run_root, marked

HERE = "here"
"""The machine that asks."""

_SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_SSH_FAILED = 255
_PATIENCE = 180
"""Seconds for one machine to answer: it imports torch, perhaps over the network, and looks at all shards."""

_EXPORTED = ("PYTHON", "NCCL", "UCX")
"""Beginnings of the environment variables that DeepSpeed's launcher passes on to all machines."""

_ENVIRONMENT_FILE = ".deepspeed_env"
_MARK = "hdscale-facts "
_AT_ONCE = 64  # machines
_REACHABLE = "reachable"
_SAME_VENV = "make its .venv with the same Python and the same versions of the packages"

_VIEWS: dict[str, Callable[[Facts], Any]] = {
    "python": lambda facts: facts.versions["python"],
    "packages": lambda facts: facts.versions,
    "source": lambda facts: facts.source,
    "devices": lambda facts: sorted(set(facts.devices)),
    "shards": lambda facts: facts.shards,
}
"""What machines are compared in, by name: values that JSON can hold."""


def check_hosts(
    hosts: Sequence[Host], question: Question, script: Path, environment: Mapping[str, str]
) -> dict[str, list[Check]]:
    """Ask all machines at once and judge their answers.

    Args:
        hosts: from `read_hostfile`.
        question: what a run will ask of them.
        script: `launch/preflight.py`; it is at the same path everywhere, and so is this Python.
        environment: of this process.

    Returns:
        The checks by machine, those of the machine that asks last.
    """
    here = [_check_tool("pdsh", "the launcher starts ranks by it"), _check_tool("ssh", "pdsh connects by it")]
    if question.run_root is not None:
        here.append(check_run_root(question.run_root))
    if any(check.name == "ssh" and check.ok is False for check in here):
        return {HERE: here}
    with contextlib.ExitStack() as stack:
        if question.run_root is not None:
            question = question._replace(mark=stack.enter_context(marked(question.run_root)))
        command = remote_command(question, script, environment)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            answers = list(pool.map(lambda host: _ask(host, command), hosts))
    return {**judge(dict(zip(hosts, answers, strict=True))), HERE: here}


def _check_tool(name: str, purpose: str) -> Check:
    if shutil.which(name) is None:
        return Check(name, False, f"no {name} on the PATH", f"install it: {purpose}")
    return Check(name, True, "installed")


def remote_command(question: Question, script: Path, environment: Mapping[str, str]) -> str:
    """Return the shell command that makes a machine print its facts, from the same folder and by the same Python."""
    here = Path.cwd()
    exported = {name: value for name, value in environment.items() if name.startswith(_EXPORTED)}
    # As the launcher does: this folder's hdscale, whatever is installed.
    exported["PYTHONPATH"] = python_path(here, environment)
    for folder in (Path(environment.get("HOME", ".")), Path()):
        if (folder / _ENVIRONMENT_FILE).is_file():
            lines = (folder / _ENVIRONMENT_FILE).read_text().splitlines()
            exported |= dict(line.split("=", 1) for line in lines if "=" in line)
    settings = [f"{name}={value}" for name, value in exported.items()]
    asked = {name: None if value is None else str(value) for name, value in question._asdict().items()}
    words = ["env", *settings, sys.executable, str(script), "--facts", json.dumps(asked)]
    return f"cd {shlex.quote(str(here))} && exec {shlex.join(words)}"


def question_from_json(text: str) -> Question:
    """Read what `remote_command` has asked."""
    asked = json.loads(text)
    paths = {name: None if asked[name] is None else Path(asked[name]) for name in ("shards", "run_root")}
    return Question(**{**asked, **paths})


def facts_line(facts: Facts) -> str:
    """Return the line that a machine answers with; a greeting may come before it."""
    return _MARK + json.dumps(facts._asdict())


def _ask(host: Host, command: str) -> Facts | Check:
    """Return a machine's facts, or why there are none."""
    try:
        done = subprocess.run(
            [*_SSH, host.name, command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        way_out = (
            f"log in and run {Path(sys.executable).name} -c 'import torch' there: its disk or its network is stuck"
        )
        return Check(_REACHABLE, False, f"no answer within {_PATIENCE} seconds", way_out)
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if lines:
        answer = json.loads(lines[-1].removeprefix(_MARK))
        return Facts(**{**answer, "checks": [Check(*values) for values in answer["checks"]]})
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}, no message"]
    if done.returncode == _SSH_FAILED:
        way_out = f"switch it on, or mend `ssh {host.name} true`, which must work without a question"
        return Check(_REACHABLE, False, said[-1], way_out)
    way_out = f"give it the same checkout at {Path.cwd()} and the same {sys.executable}"
    return Check(_REACHABLE, False, f"the check does not run there: {said[-1]}", way_out)


def judge(answers: Mapping[Host, Facts | Check]) -> dict[str, list[Check]]:
    """Turn answers into checks by machine; what differs is compared with what most machines have."""
    known = {host: answer for host, answer in answers.items() if isinstance(answer, Facts)}
    usual = {view: _usual(view, known) for view in _VIEWS} if known else {}
    return {
        host.name: [answer] if isinstance(answer, Check) else _judge_one(host, answer, usual)
        for host, answer in answers.items()
    }


class _Usual(NamedTuple):
    facts: Facts
    host: str  # the first one that has it


def _usual(view: str, known: Mapping[Host, Facts]) -> _Usual:
    values = {host: json.dumps(_VIEWS[view](facts), sort_keys=True) for host, facts in known.items()}
    (value, _), *_ = Counter(values.values()).most_common(1)  # of equally many, the first
    host = next(host for host in known if values[host] == value)
    return _Usual(known[host], host.name)


def _judge_one(host: Host, facts: Facts, usual: Mapping[str, _Usual]) -> list[Check]:
    checks = [Check(_REACHABLE, True, "over SSH"), *_compare_versions(facts, usual)]
    checks.append(_check_devices(host, facts, usual["devices"]))
    for check in facts.checks:
        if check.name == "shards" and check.ok and facts.shards != usual["shards"].facts.shards:
            found = f"other shards than on {usual['shards'].host}"
            check = Check(
                "shards", False, found, "copy them again, or put them on a file system that all machines share"
            )
        checks.append(check)
    return checks


def _compare_versions(facts: Facts, usual: Mapping[str, _Usual]) -> list[Check]:
    python, common, source = usual["python"], usual["packages"], usual["source"]
    mine, theirs = facts.versions["python"], python.facts.versions["python"]
    differing = [
        f"{name} {version} ({common.host} has {common.facts.versions.get(name)})"
        for name, version in facts.versions.items()
        if name != "python" and version != common.facts.versions.get(name)
    ]
    alike = facts.source == source.facts.source
    same = f"torch {facts.versions.get('torch')}, deepspeed {facts.versions.get('deepspeed')}"
    return [
        Check("python", mine == theirs, mine if mine == theirs else f"{mine}, {python.host} has {theirs}", _SAME_VENV),
        Check("packages", not differing, ", ".join(differing) or same, _SAME_VENV),
        Check(
            "hdscale",
            alike,
            facts.source[:12] if alike else f"other code than on {source.host}",
            "check out the same commit, without changes of its own",
        ),
    ]


def _check_devices(host: Host, facts: Facts, usual: _Usual) -> Check:
    kinds = ", ".join(sorted(set(facts.devices)))
    have = len(facts.devices) or facts.cpus
    found = f"{have} x {kinds}" if facts.devices else f"no GPU, {have} CPU cores"
    if host.slots > have:
        return Check("devices", False, f"slots={host.slots}, but {found}", f"write slots={have}, or mend its devices")
    if set(facts.devices) != set(usual.facts.devices):
        theirs = ", ".join(sorted(set(usual.facts.devices))) or "no GPU"
        way_out = "leave it out: ranks must compute in the same precision, and the slowest sets the pace"
        return Check("devices", False, f"{found}, {usual.host} has {theirs}", way_out)
    return Check("devices", True, found)
