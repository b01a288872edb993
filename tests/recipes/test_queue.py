"""The queue of jobs: it resumes, is shared, and leaves what failed to the next sitting."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure
from rich.table import Table

from recipes.common import queue
from recipes.common.queue import Results, Study, main, ordered, work


def study(jobs, run):
    return Study("numbers", "none", lambda: jobs, run, lambda rows: [Table()], lambda _: Figure())


def double(job, data_dir=None):
    return {"twice": 2 * job["x"]}


def numbers(count, **more):
    return [{"size": 0, "seed": 0, "x": x} | more for x in range(count)]


def test_smallest_size_of_all_first():
    jobs = [{"size": size, "x": x} for x in "ab" for size in (2, 0, 1)]
    assert [(j["size"], j["x"]) for j in ordered(jobs)] == [
        *((0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b"))
    ]
    assert {j["size"] for j in ordered(jobs, [1])} == {1}


def test_done_jobs_are_not_run_again(tmp_path):
    ran, out = [], tmp_path / "numbers.json"

    def run(job, data_dir):
        ran.append(job["x"])
        return double(job)

    main(study(numbers(2), run), ["--out", str(out)])
    main(study(numbers(4), run), ["--out", str(out)])
    assert ran == [0, 1, 2, 3]
    written = json.loads(out.read_text())
    assert [entry["figures"]["twice"] for entry in written["jobs"]] == [0, 2, 4, 6]
    assert [entry["sitting"] for entry in written["jobs"]] == [0, 0, 1, 1]
    assert written["data"] == "none"
    for sitting in written["sittings"]:
        assert sitting["command"].startswith("python -m numbers")
        assert sitting["torch_threads"] == 1
        assert {"machine", "versions"} <= set(sitting)
    assert out.with_suffix(".png").exists()


def test_other_settings_are_other_jobs(tmp_path):
    out = tmp_path / "numbers.json"
    main(study(numbers(2, epochs=1), double), ["--out", str(out)])
    main(study(numbers(2, epochs=2), double), ["--out", str(out)])
    results = Results(out)
    assert len(json.loads(out.read_text())["jobs"]) == 4
    assert [row["epochs"] for row in results.rows(numbers(2, epochs=2))] == [2, 2]
    assert results.rows(numbers(2, epochs=3)) == []


def test_killed_in_the_middle(tmp_path):
    out = tmp_path / "numbers.json"

    def killed(job, data_dir):
        if job["x"] == 2:
            raise KeyboardInterrupt
        return double(job)

    with pytest.raises(KeyboardInterrupt):
        main(study(numbers(4), killed), ["--out", str(out)])
    assert [entry["settings"]["x"] for entry in json.loads(out.read_text())["jobs"]] == [0, 1]
    main(study(numbers(4), double), ["--out", str(out)])
    assert len(Results(out).rows(numbers(4))) == 4


def test_killed_while_writing(tmp_path, monkeypatch):
    results = Results(tmp_path / "numbers.json")
    results.sittings.append({})
    first, second = numbers(2)
    results.add(first, {"twice": 0}, {})

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr(queue.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results.add(second, {"twice": 2}, {})
    assert first in Results(results.path)
    assert second not in Results(results.path)


def test_failed_jobs_are_left_to_the_next_sitting(tmp_path, capsys):
    out = tmp_path / "numbers.json"

    def fails(job, data_dir):
        if job["x"] == 0:
            raise ValueError("no such gamma")
        return double(job)

    with pytest.raises(SystemExit, match="1"):
        main(study(numbers(3), fails), ["--out", str(out)])
    assert "ValueError: no such gamma" in capsys.readouterr().out
    assert len(Results(out).rows(numbers(3))) == 2


def test_no_job_starts_after_the_deadline(tmp_path):
    out = tmp_path / "numbers.json"
    main(study(numbers(3), double), ["--out", str(out), "--minutes", "0"])
    assert not out.exists()


@pytest.mark.slow
def test_several_processes():
    get = dict.get  # a function that other processes can import at once
    found = {job["x"]: future.result() for job, future in work(get, numbers(5), "x", 2)}
    assert found == {x: x for x in range(5)}


def test_jobs_are_chosen_by_their_settings():
    jobs = [{"size": 0, "row": row, "lr": lr} for row in ("a", "b") for lr in (0.1, 0.01)]
    assert queue.chosen(jobs, []) == jobs
    assert queue.chosen(jobs, ["row=a", "lr=0.01"]) == [jobs[1]]
    with pytest.raises(ValueError, match="No job has row=c: row is one of a, b"):
        queue.chosen(jobs, ["row=c"])
    with pytest.raises(ValueError, match="No job has rows=a: jobs have lr, row, size"):
        queue.chosen(jobs, ["rows=a"])


def test_two_commands_do_not_work_on_one_file(tmp_path, capsys):
    out = tmp_path / "numbers.json"
    jobs = [{"size": 0, "seed": 0, "x": 1}]

    def again(job, data_dir=None):
        with pytest.raises(SystemExit):
            main(study(jobs, double), [f"--out={out}"])
        assert "another command is at work" in capsys.readouterr().err
        return double(job)

    main(study(jobs, again), [f"--out={out}"])
    main(study(jobs, double), [f"--out={out}"])
    assert Results(out).rows(jobs) == [jobs[0] | {"twice": 2}]
