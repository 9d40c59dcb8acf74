"""Check machines before training: torch for their GPUs, precision, attention, versions, data, links between them.

python launch/preflight.py [--hostfile hosts] [--shards DIR] [--run-root DIR]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hdscale.cli import EXIT_DONE, EXIT_USER_ERROR, run
from hdscale.errors import UserError


def main(argv: list[str]) -> int:
    """Run the command; return its exit code: 0 all fine, 2 something to mend."""
    parser = argparse.ArgumentParser(prog="preflight.py", description=str(__doc__).splitlines()[0])
    parser.add_argument("--hostfile", type=Path, help="check every machine of it, over SSH; left out: this one")
    parser.add_argument("--shards", type=Path, help="folder of shards that training will read")
    parser.add_argument("--split", default="train", help="of the shards")
    parser.add_argument("--run-root", type=Path, help="folder that run folders will be in")
    parser.add_argument("--precision", choices=("auto", "fp16", "bf16", "fp32"), default="auto", help="run.precision")
    parser.add_argument("--facts", help=argparse.SUPPRESS)  # what one machine asks another
    parser.add_argument("--all-reduce", action="store_true", help=argparse.SUPPRESS)  # what the launcher starts
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)

    from hdscale.cluster.hostfile import read_hostfile
    from hdscale.cluster.launcher import started_by_launcher
    from hdscale.preflight import bandwidth, hosts
    from hdscale.preflight.machine import Question, machine_facts
    from hdscale.preflight.table import render

    if options.all_reduce:
        from hdscale.engine.ranks import distributed

        with distributed() as ranks:
            rates = bandwidth.measure_all_reduce(ranks)
            if ranks.is_first:
                print(bandwidth.rates_line(rates), flush=True)
        return EXIT_DONE
    if options.facts is not None:
        print(hosts.facts_line(machine_facts(hosts.question_from_json(options.facts))), flush=True)
        return EXIT_DONE
    if started_by_launcher():
        raise UserError("start preflight.py with python: it starts the launcher itself")
    question = Question(options.precision, options.shards, options.split, options.run_root)
    script = Path(__file__).resolve()
    if options.hostfile is None:
        facts = machine_facts(question)
        columns, num_ranks = {hosts.HERE: facts.checks}, len(facts.devices)
    else:
        machines = read_hostfile(options.hostfile)
        columns = hosts.check_hosts(machines, question, script, os.environ)
        num_ranks = sum(machine.slots for machine in machines)
    print(render(columns), flush=True)
    if any(check.ok is False for checks in columns.values() for check in checks):
        return EXIT_USER_ERROR
    if num_ranks < 2:
        return EXIT_DONE
    rates, error = bandwidth.launch_all_reduce(script, options.hostfile, num_ranks)
    print(f"\nFAILS, all-reduce: {error}" if error else f"\n{bandwidth.render_rates(rates)}")
    return EXIT_USER_ERROR if error else EXIT_DONE


if __name__ == "__main__":
    run(main)
