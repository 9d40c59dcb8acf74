import functools

import pytest

from hdscale import cli
from hdscale.cli import exit_code
from hdscale.errors import LostRankError, UserError


@pytest.mark.parametrize(("error", "code"), [(UserError, 2), (functools.partial(LostRankError, reported_by=0), 1)])
def test_a_mistake_is_one_line_however_many_its_message_has(error, code, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)

    def main(argv):
        raise error(f"{argv[0]} is wrong:\n  line 3,\n\n  column 4\tof it\n")

    assert exit_code(main, ["recipe.yaml"]) == code
    assert capsys.readouterr() == ("", "error: recipe.yaml is wrong: line 3, column 4 of it\n")


def test_another_rank_says_who_it_is_after_rank_0_had_its_time(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(cli.socket, "gethostname", lambda: "node1")
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)

    def main(argv):
        raise UserError("no shards")

    assert exit_code(main, []) == 2
    assert waited == [5.0]
    assert capsys.readouterr().err == "error (rank 3 on node1): no shards\n"
