"""The doctor: a table of what runs here, and an exit code."""

import json

import pytest

from attnlab import doctor
from attnlab.ops import dispatch


def test_the_command_on_a_cpu(run_python):
    process = run_python(["-m", "attnlab.doctor", "--json"])
    report = json.loads(process.stdout.splitlines()[-1])
    rows = report["rows"]
    assert report["platform"] == "cpu" and report["bad"] == 0
    ran = {(row["op"], row["implementation"]) for row in rows if row["status"] == "ok"}
    for op in ("softmax_attention", "sigmoid_attention", "block_attention", "topk_attention"):
        assert (op, "xla") in ran
    families = {("gated_linear_scan", "chunked"), ("sparse_state_attention", "varlen"), ("neural_memory", "xla_chunked")}
    assert families | {("shifted_attention", "grouped"), ("bilevel_routing_attention", "blocks")} <= ran
    assert not any("no case" in row["note"] for row in rows)
    elsewhere = {row["implementation"]: row["note"] for row in rows if row["status"] == "elsewhere"}
    assert elsewhere["triton"] == "runs on gpu" and elsewhere["pallas"] == "runs on tpu"


def test_kernels_in_their_interpreters(monkeypatch):
    chosen = [case for case in doctor.cases() if case.op == "block_attention"]
    monkeypatch.setattr(doctor, "cases", lambda: chosen)
    rows = list(doctor.examine(interpret=True, dtypes=("float32",)))
    status = {row.implementation: row.status for row in rows if row.op == "block_attention"}
    assert status == {"pallas": "ok", "triton": "ok", "xla": "ok"}
    assert "in the interpreter" in doctor.table(rows)


def test_wrong_and_broken_implementations_are_found(monkeypatch, capsys):
    monkeypatch.setitem(dispatch._tables, "softmax_attention", dict(dispatch._tables["softmax_attention"]))

    def breaks(call):
        raise ZeroDivisionError("no luck\nat all")

    dispatch.register("softmax_attention", "wrong", dispatch.Implementation(lambda call: call.q))
    dispatch.register("softmax_attention", "broken", dispatch.Implementation(breaks))
    dispatch.register("softmax_attention", "shy", dispatch.Implementation(breaks, refuse=lambda call: "not today"))
    chosen = doctor.cases()[:1]
    monkeypatch.setattr(doctor, "cases", lambda: chosen)
    assert doctor.main([]) == 1
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("softmax")}
    assert "WRONG" in lines["wrong"] and "refused" in lines["shy"] and "not today" in lines["shy"]
    assert "BROKEN" in lines["broken"] and "ZeroDivisionError: no luck" in lines["broken"]


def test_a_platform_that_is_not_here(run_python):
    process = run_python(["-m", "attnlab.doctor", "--platform", "tpux"], check=False)
    assert process.returncode == 1 and "no device" in process.stderr


@pytest.mark.parametrize("argument", ["--unknown"])
def test_unknown_arguments(argument):
    with pytest.raises(SystemExit):
        doctor.main([argument])
