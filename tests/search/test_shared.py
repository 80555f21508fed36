"""One search by two processes: one is killed, and nothing is lost or measured twice."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray

from ofa.errors import UserError
from ofa.files import read_jsonl
from ofa.space import Genes
from search.agents import keys
from search.feasible import InfeasibleError
from search.optuna_agent import OptunaAgent, parameters
from search.problem import Problem
from search.shared import WORKER, _Leases, _me, _take_over, create_shared, shared_result, tell_shared, work
from search.storage import open_storage
from tests.search.shared_worker import NAME, told
from tests.search.toy import SPACE, problem

ROOT = Path(__file__).parents[2]
EVALUATIONS = 16
HOLD = """
import sys, time
from search.storage import open_storage
lock = open_storage(sys.argv[1])._backend._lock
print(lock.acquire(), flush=True)
time.sleep(float(sys.argv[2]))
"""


def start(storage: str, seed: int, file: Path) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "tests.search.shared_worker", storage, str(EVALUATIONS), str(seed), str(file)]
    return subprocess.Popen(line, cwd=ROOT)


def measured(file: Path) -> list[bytes]:
    return [keys(np.array([line["genes"]], dtype=np.int8))[0] for line in read_jsonl(file)]


@pytest.fixture
def journal(tmp_path: Path) -> str:
    """A journal file."""
    return f"journal:{tmp_path}/study.journal"


@pytest.fixture
def postgresql() -> Iterator[str]:
    """A database server of this test alone, on a socket in a folder of its own."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("PostgreSQL is not installed (apt-get install postgresql)")
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (pip install psycopg[binary])")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)  # the server refuses to run as root, so root starts it as another user
        user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []

        def run(program: str, *line: str) -> None:
            command = [*user, str(programs[-1] / program), "-D", f"{folder}/data", *line]
            done = subprocess.run(command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                pytest.skip(f"PostgreSQL does not start here: {done.stderr.strip()[-300:]}")

        run("initdb", "-U", "test", "-A", "trust", "--no-sync")
        settings = f"-k {folder} -c listen_addresses= -c fsync=off"
        run("pg_ctl", "-w", "-l", f"{folder}/log", "-o", settings, "start")
        try:
            yield f"postgresql+psycopg://test@/postgres?host={folder}"
        finally:
            run("pg_ctl", "-m", "immediate", "stop")


PROXY = """
import sys
from optuna.storages import RDBStorage, run_grpc_proxy_server
run_grpc_proxy_server(RDBStorage(sys.argv[1]), port=int(sys.argv[2]))
"""


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[str]:
    """A gRPC proxy of this test alone, before an SQLite file."""
    pytest.importorskip("grpc", reason="gRPC is not installed (pip install ofa-nas[grpc])")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", PROXY, f"sqlite:///{tmp_path}/study.db", str(port)])
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("localhost", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "the proxy does not start"
                time.sleep(0.1)
        yield f"grpc://localhost:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("kind", ["journal", "postgresql", "proxy"])
def test_two_processes_lose_and_repeat_nothing_when_one_is_killed(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    storage = request.getfixturevalue(kind)
    create_shared(storage, NAME, told())
    files = [tmp_path / f"{i}.jsonl" for i in range(2)]
    with start(storage, 0, files[0]) as first, start(storage, 0, files[1]) as second:  # the same seed: the same wishes
        try:
            deadline = time.monotonic() + 120
            while len(read_jsonl(files[1])) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            second.kill()  # what is left of it waits for this process to hear that it ended
            assert first.wait(timeout=240) == 0
        finally:
            first.kill()
            second.kill()
    one, other = map(measured, files)
    result = shared_result(storage, NAME, SPACE, told())
    assert len(result.evaluations) == len(set(keys(result.genes))) == EVALUATIONS
    assert len(other) >= 4
    assert len(one) >= 4
    twice = [key for key, count in Counter(one + other).items() if count > 1]
    assert set(twice) <= {other[-1]}  # killed after the measurement, before the storage had it
    assert set(one + other) == set(keys(result.genes))


def test_networks_that_were_measured_before_count_in_the_choice_and_not_in_the_budget(tmp_path: Path) -> None:
    storage, predictors, seen = f"journal:{tmp_path}/study.journal", problem(SPACE).predictors, list[bytes]()
    drawn = np.unique(SPACE.sample(400, np.random.default_rng(1)), axis=0)
    drawn, tight = drawn[np.argsort(predictors["gain"](drawn))], float(np.median(predictors["macs"](drawn)))
    known = np.concatenate([drawn[-3:], drawn[predictors["macs"](drawn) <= tight][-6:]])

    def gain(genes: Genes) -> NDArray[Any]:
        seen.extend(keys(genes))
        return np.asarray(predictors["gain"](genes))

    limited = Problem({"gain": gain, "macs": predictors["macs"]}, {"gain": -1}, {"macs": tight}, frugal=True)
    within = known[predictors["macs"](known) <= tight]
    assert 0 < len(within) < len(known)
    create_shared(storage, NAME, limited)
    for _ in range(2):  # told again, they are not told twice
        tell_shared(storage, NAME, SPACE, limited, known)
    tell_shared(storage, NAME, SPACE, limited, known[:0])
    assert seen == keys(within)
    shown: list[tuple[int, int]] = []
    work(storage, NAME, SPACE, limited, 5, sampler="random", progress=lambda *done: shown.append(done))
    result = shared_result(storage, NAME, SPACE, limited, seed=3)
    assert shown[0] == (0, 5) and shown[-1] == (5, 5) and result.seed == 3
    assert len(result.evaluations) == len(within) + 5 and keys(result.genes)[: len(within)] == keys(within)
    assert result.evaluations["gain"].max() == predictors["gain"](within).max()


def test_limits_that_no_network_meets_or_none_so_far_are_told(tmp_path: Path) -> None:
    storage = f"journal:{tmp_path}/study.journal"
    tight = problem(SPACE, macs=float(problem(SPACE).predictors["macs"](SPACE.smallest())[0]) * 1.0001)
    create_shared(storage, NAME, tight)
    with pytest.raises(InfeasibleError, match="relax macs"):
        work(storage, NAME, SPACE, problem(SPACE, macs=1e-3), 5)
    work(storage, NAME, SPACE, tight, 3, sampler="random")
    with pytest.raises(UserError, match="none of 3 networks of study test meets the limits; let the workers measure"):
        shared_result(storage, NAME, SPACE, tight)


def test_a_measurement_that_outlasts_its_lease_is_kept(tmp_path: Path) -> None:
    storage, predictors, seen = f"journal:{tmp_path}/study.journal", problem(SPACE).predictors, list[bytes]()

    def gain(genes: Genes) -> NDArray[Any]:
        if not seen:  # another worker gives up the first measurement, which still goes on
            other = optuna.load_study(study_name=NAME, storage=open_storage(storage))
            _take_over(other, SPACE, _Leases(-1.0))
        seen.extend(keys(genes))
        return np.asarray(predictors["gain"](genes))

    slow = Problem({"gain": gain}, {"gain": -1})
    create_shared(storage, NAME, slow)
    work(storage, NAME, SPACE, slow, 3, sampler="random")
    result = shared_result(storage, NAME, SPACE, slow)
    assert sorted(keys(result.genes)) == sorted(seen)
    trials = optuna.load_study(study_name=NAME, storage=open_storage(storage)).get_trials()
    assert [trial.state.name for trial in trials].count("COMPLETE") == 3


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Sets the time zone of this process."""

    def zone(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield zone
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("zone", ["Etc/GMT-14", "Etc/GMT+12"])  # 14 hours before, 12 behind
def test_a_lease_holds_for_machines_in_other_time_zones(
    zone: str, named: bool, tmp_path: Path, clock: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = f"journal:{tmp_path}/study.journal"
    create_shared(storage, NAME, problem())
    clock("UTC")
    study = optuna.load_study(study_name=NAME, storage=open_storage(storage))
    trial = study.ask(parameters(SPACE))
    if named:
        trial.set_user_attr(WORKER, _me())
    clock(zone)
    leases = _Leases(3600.0)
    _take_over(study, SPACE, leases)
    assert [t.state.name for t in study.trials] == ["RUNNING"]
    later = time.monotonic() + 3601
    monkeypatch.setattr("search.shared.time.monotonic", lambda: later)
    _take_over(study, SPACE, leases)
    assert [t.state.name for t in study.trials] == ["FAIL", "WAITING"]


def test_what_a_frugal_problem_does_not_measure_leaves_the_hypervolume_finite(tmp_path: Path) -> None:
    storage, predictors = f"journal:{tmp_path}/study.journal", problem(SPACE).predictors
    limit = {"macs": float(np.median(predictors["macs"](SPACE.sample(1000, np.random.default_rng(0)))))}
    frugal = Problem(predictors, {"gain": -1, "macs": 1}, limit, frugal=True)
    create_shared(storage, NAME, frugal)
    work(storage, NAME, SPACE, frugal, 12, sampler="random")
    result = shared_result(storage, NAME, SPACE, frugal)
    assert (result.evaluations["violation"] > 0).any()
    assert 0 < result.hypervolume() < np.inf


def test_networks_beyond_the_limits_are_moved_before_they_are_measured(tmp_path: Path) -> None:
    storage, seen = f"journal:{tmp_path}/study.journal", list[tuple[int, int]]()
    some = SPACE.sample(1000, np.random.default_rng(0))
    told = problem(SPACE, macs=float(np.quantile(problem(SPACE).predictors["macs"](some), 0.1)))
    create_shared(storage, NAME, told)
    work(
        *(storage, NAME, SPACE, told, 12),
        sampler="random",
        violation=told.exceeds,
        progress=lambda *done: seen.append(done),
    )
    result = shared_result(storage, NAME, SPACE, told)
    assert len(result.evaluations) == 12 and result.measured == ("accuracy",)
    assert (result.evaluations["violation"] == 0).all()
    assert seen[0] == (0, 12) and seen[-1] == (12, 12) and seen == sorted(seen)


def test_an_agent_keeps_its_study_in_a_journal_and_its_owner_begins_it_anew(tmp_path: Path) -> None:
    url = f"journal:{tmp_path}/study.journal"
    proposals = []
    for _ in range(2):
        agent = OptunaAgent(SPACE, seed=0, sampler="random", storage=url, owner="one")
        genes = agent.ask(3)
        agent.tell(genes, np.zeros((3, 1)), np.zeros(3))
        proposals.append(genes)
        assert len(agent._study.trials) == 3
    assert np.array_equal(*proposals)
    for owner in ("another", None):
        with pytest.raises(UserError, match=r"study search is in the storage already, of another search; name another"):
            OptunaAgent(SPACE, storage=url, owner=owner)
    assert len(optuna.load_study(study_name="search", storage=open_storage(url)).trials) == 3
    OptunaAgent(SPACE, storage=url, study="nobody's")
    with pytest.raises(UserError, match=r"study nobody's is in the storage already"):
        OptunaAgent(SPACE, storage=url, study="nobody's")
    assert np.array_equal(proposals[0], OptunaAgent(SPACE, seed=0, sampler="random").ask(3))


def test_a_lock_goes_with_a_killed_worker_at_once(tmp_path: Path) -> None:
    line = [sys.executable, "-c", HOLD]
    url = f"journal:{tmp_path}/runs/study.journal"
    with subprocess.Popen([*line, url, "600"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "True\n"
            with Path(url.partition(":")[2]).open("rb") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            holder.kill()
    subprocess.run([*line, url, "0"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, timeout=25)


def test_a_storage_that_cannot_be_opened_says_how_one_is_written() -> None:
    with pytest.raises(UserError, match=r"storage nowhere cannot be opened .* like one of journal:"):
        open_storage("nowhere")


def test_a_storage_whose_driver_is_absent_names_it() -> None:
    if importlib.util.find_spec("pymysql") is not None:
        pytest.skip("pymysql is installed")
    with pytest.raises(UserError, match=r"storage mysql.* needs the package pymysql; pip install pymysql"):
        open_storage("mysql+pymysql://user@host/name")
