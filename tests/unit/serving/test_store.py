"""The store of users in SQLite and PostgreSQL: votes, cached answers, deletion."""

import contextlib
import getpass
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgenrm_train.records.pairs import Message, PreferencePair
from pgenrm_train.records.rows import pair_to_row
from pgenrm_train.serving.service import import_votes
from pgenrm_train.serving.store import _TABLES, UserStore

DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
POSTGRES = shutil.which("initdb", path=os.pathsep.join([os.environ["PATH"], *map(str, DEBIAN[-1:])]))


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of an empty PostgreSQL on a socket; it refuses to run as root, so root starts it as nobody."""
    binaries = Path(POSTGRES).resolve().parent
    owner = "nobody" if os.geteuid() == 0 else getpass.getuser()
    folder = Path(tempfile.mkdtemp(prefix="pg_", dir="/tmp"))  # short: AF_UNIX paths end at 107 bytes
    data, options = folder / "data", f"-k {folder} -c listen_addresses='' -c fsync=off"

    def call(program: str, *words: str) -> None:
        command = [binaries / program, "-D", data, *words]
        subprocess.run(command, check=True, cwd=folder, user=owner, stdout=subprocess.DEVNULL)

    try:
        shutil.chown(folder, owner)
        call("initdb", "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        call("pg_ctl", "start", "-w", "-o", options, "-l", str(folder / "log"))
        try:
            yield f"postgresql://tester@/postgres?host={folder}"
        finally:
            call("pg_ctl", "stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    if POSTGRES is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, tmp_path) -> Iterator[UserStore]:
    place = f"sqlite:///{tmp_path}/users.db"
    store = UserStore(place if request.param == "sqlite" else request.getfixturevalue("postgres_url"))
    yield store
    with store._engine.begin() as connection:
        _TABLES.drop_all(connection)
    store.close()


def vote(user: str, text: str = "Yes.", time: float | None = None) -> PreferencePair:
    return PreferencePair("", user, (Message("user", "Why? “é” 🦊"),), text, "No.", time=time)


def test_votes_come_back_as_written_the_oldest_first(store):
    store.add([vote("ann", text, time) for text, time in [("c", 3.5), ("a", None), ("b", 1.0), ("d", 3.5)]])
    store.add([vote("bob")])
    assert [v.chosen for v in store.votes("ann")] == ["a", "b", "c", "d"]
    (voted,) = store.votes("bob")
    assert (voted.context, voted.rejected, voted.time) == (vote("bob").context, "No.", None)
    store.add([vote("ann", "new")], replace=True)
    assert [v.chosen for v in store.votes("ann")] == ["new"] and len(store.votes("bob")) == 1
    assert store.votes("nobody") == []


def kept(store: UserStore) -> set[str]:
    return set(store.answers(["own", "both", "other"]))


def test_deletion_takes_every_answer_that_showed_the_user_s_votes(store):
    store.add([vote("ann"), vote("bob")])
    answers = {"own": ("[1]", {"ann"}), "both": ("[2]", {"ann", "bob"}), "other": ("[3]", {"bob"})}
    store.keep(answers)
    store.keep(answers)  # as another replica does
    assert store.answers(["own", "no"]) == {"own": "[1]"} and len(kept(store)) == 3
    assert store.deleted(["ann", "bob"]) == set()
    assert store.delete("ann") == 1 and store.votes("ann") == [] and kept(store) == {"other"}
    store.keep({"own": answers["own"]})
    store.keep({"both": answers["both"]})
    assert kept(store) == {"other"}, "an answer that was under way"
    assert store.delete("ann") == 0 and store.deleted(["ann", "bob"]) == {"ann"}
    store.add([vote("ann")])
    store.keep({"own": answers["own"]})
    assert kept(store) == {"own", "other"} and store.deleted(["ann"]) == set()


def test_an_import_leaves_deleted_users_out(store, tmp_path):
    pairs = [vote("ann"), vote("bob"), vote("bob", "Later.")]
    file = tmp_path / "votes.jsonl"
    rows = [pair_to_row(pair) | {"pair_id": str(n)} for n, pair in enumerate(pairs)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert import_votes(store, file) == (2, 3)
    store.delete("ann")
    assert import_votes(store, file) == (1, 2) and store.votes("ann") == []
    store.add([vote("ann")])
    assert import_votes(store, file) == (2, 3)


def test_no_answer_comes_in_during_a_deletion(store):
    """Threads keep answers about a user while others delete the user and add votes again."""
    end = threading.Event()
    errors = []

    def repeat(work):
        try:
            while not end.is_set():
                work()
        except Exception as error:
            errors.append(error)

    works = [
        lambda: store.keep({"own": ("[1]", {"ann"}), "both": ("[2]", {"ann", "bob"})}),
        lambda: store.add([vote("ann")], replace=True),
        lambda: store.delete("ann"),
    ]
    threads = [threading.Thread(target=repeat, args=(work,)) for work in works * 2]
    for thread in threads:
        thread.start()
    end.wait(1)
    end.set()
    for thread in threads:
        thread.join()
    store.delete("ann")
    assert errors == [] and kept(store) == set()


def test_connections_are_opened_again_after_a_restart_of_the_database(postgres_url):
    store = UserStore(postgres_url)
    store.add([vote("ann")], replace=True)
    with UserStore(postgres_url)._engine.connect() as other:
        others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        assert other.exec_driver_sql(f"SELECT COUNT(pg_terminate_backend(pid)) {others}").scalar()
    assert len(store.votes("ann")) == 1
