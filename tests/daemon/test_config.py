"""fdbroker.toml: what is right, and that each mistake is found, with its line, and said."""

from __future__ import annotations

import grp
import os
import pwd
import textwrap
from pathlib import Path

import pytest
from support import open_files

from fdbroker.daemon.config import Config, Resource, Settings, read
from fdbroker.errors import ConfigError
from fdbroker.lender.accounting import DEFAULT, RESOURCES, Quota
from fdbroker.lender.rules import Rule

from .kit import run

EXAMPLE = Path(__file__).parents[2] / "fdbroker.toml"


@pytest.fixture
def written(tmp_path):
    """Writes the configuration, which is indented as the test is: its path."""

    def write(text: str | bytes) -> str:
        data = text if isinstance(text, bytes) else textwrap.dedent(text).encode()
        (tmp_path / "f.toml").write_bytes(data)
        return str(tmp_path / "f.toml")

    return write


# --- what is right ---


def test_everything(written):
    user, group = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    path = written(f"""
        [server]
        socket = "/run/x/broker.sock"
        mode = "0660"
        group = "{group}"
        drain = 2.5

        [entry.web]
        listen = ":8000"

        [entry."log/a.b"]
        open = "/var/log/a:a"

        [entry]
        memory = {{ memfd = "16M" }}
        pages = {{ memfd = 4096 }}
        port = {{ listen = 8000 }}

        [[rule]]
        uid = "{user}"
        names = ["web*", "log/?"]
        verbs = ["borrow", "list", "borrow"]

        [[rule]]
        gid = 17
        verbs = ["put", "retire", "admin"]

        [[rule]]
        everyone = true
        verbs = ["list", "borrow"]
        mode = "r"

        [[rule]]
        uid = 18
        verbs = ["borrow"]
        listeners = true
    """)
    assert read(path) == Config(
        Settings("/run/x/broker.sock", 0o660, os.getegid(), 2.5),
        (
            Resource("web", "listen", ":8000"),
            Resource("log/a.b", "open", "/var/log/a:a"),
            Resource("memory", "memfd", "16M"),
            Resource("pages", "memfd", "4096"),
            Resource("port", "listen", "8000"),
        ),
        (
            Rule(frozenset({"borrow", "list"}), ("web*", "log/?"), uid=os.geteuid()),
            Rule(frozenset({"put", "retire", "admin"}), ("*",), gid=17),
            Rule(frozenset({"list", "borrow"}), ("*",), everyone=True, mode="r"),
            Rule(frozenset({"borrow"}), ("*",), uid=18, listeners=True),
        ),
    )


def test_quotas(written):
    path = written("""
        [quota]
        sessions = 100
        loans = 0
        bytes = 9_007_199_254_740_991

        [[rule]]
        uid = 17
        verbs = ["borrow"]
        quota = { closes = 7, waiting = 5 }

        [[rule]]
        everyone = true
        verbs = ["borrow"]
        quota.entries = 6

        [[rule]]
        gid = 18
        verbs = ["list"]
        [rule.quota]
        sessions = 1
    """)
    config = read(path)
    assert config.quota == DEFAULT._replace(sessions=100, loans=0, bytes=2**53 - 1)
    assert [rule.quota for rule in config.rules] == [
        (("waiting", 5), ("closes", 7)),
        (("entries", 6),),
        (("sessions", 1),),
    ]
    every = "\n".join(f"{what} = {number}" for number, what in enumerate(RESOURCES, 1))
    assert read(written(f"[quota]\n{every}\n")).quota == Quota(1, 2, 3, 4, 5, 6, 7)
    assert Quota._fields == RESOURCES


@pytest.mark.parametrize("text", ["", "# nothing\n", "[server]\n", "[entry]\n", "[quota]\n"])
def test_nothing(written, text):
    assert read(written(text)) == Config()


def test_what_is_read_can_be_compared_and_hashed(written):
    text = '[entry.web]\nlisten = 80\n[[rule]]\nuid = 1\nverbs = ["put"]\n'
    one, other = read(written(text)), read(written("# the same\n" + text))
    assert hash(one) == hash(other)
    assert one == other


@pytest.mark.parametrize(
    ("said", "mode"), [('"0600"', 0o600), ("0o666", 0o666), ('"0o640"', 0o640)]
)
def test_modes(written, said, mode):
    assert read(written(f"[server]\nmode = {said}\n")).settings.mode == mode


def test_the_example(monkeypatch):
    """It is right as it stands, on a system that has the group it names, and so is what is in
    its comments; reading opens nothing."""
    text = EXAMPLE.read_text()
    before = open_files()
    if any(group.gr_name == "www-data" for group in grp.getgrall()):
        config = read(str(EXAMPLE))
        assert {entry.how for entry in config.entries} == {"listen", "open", "memfd"}
        assert [rule.listeners for rule in config.rules] == [True, False]
    assert open_files() == before
    assert not os.path.exists("/tmp/app.log")
    assert text.isascii()


def test_the_comments_of_the_example_are_right(written):
    lines = EXAMPLE.read_text().splitlines()
    commented = [
        line[1:] if line.startswith("#") and line[1:2] not in ("", " ") else line for line in lines
    ]
    text = "\n".join(commented).replace("www-data", grp.getgrgid(os.getegid()).gr_name)
    config = read(written(text))
    assert None not in config.settings
    assert len(config.rules) == 4
    assert config.quota == DEFAULT  # what is commented out says what holds without it
    assert [dict(rule.quota) for rule in config.rules if rule.quota] == [
        {"sessions": 64, "loans": 512}
    ]


# --- what is wrong ---

MISTAKES = [  # the text, the line of the mistake, and a part of what is said
    ("x", 1, "toml.io"),
    ("\n[entry.web]\nlisten = \n", 3, "toml.io"),
    ("[entry.web]\nlisten = 1\n[entry.web]\nlisten = 2\n", 3, "twice"),
    ("a = [1,\n2", 2, "toml.io"),
    ("a = " + "[" * 3000, 0, "nested too deeply"),
    ("a = " + "9" * 5000, 0, "too many digits"),
    (b"# fine\n# \xff\n", 2, "UTF-8"),
    ("[sever]\n", 1, "unknown key 'sever': the file has server, entry, rule"),
    ("server = 1\n", 1, "[server] is a table, not 1"),
    ("entry = []\n", 1, "[entry] is a table, not []"),
    ("\nrule = {}\n", 2, "rule is given as [[rule]]"),
    ("[rule]\nuid = 1\n", 1, "rule is given as [[rule]]"),
    ("\nrule = [1]\n", 2, "[[rule]] is a table, not 1"),
    ("[server]\n\nsockte = 'x'\n", 3, "unknown key 'sockte': [server] has socket, mode"),
    ("[server]\nsocket = 1\n", 2, "socket is a path, not 1"),
    ("[server]\nsocket = ''\n", 2, "socket is a path"),
    (f"[server]\nsocket = '/{'x' * 107}'\n", 2, "107 bytes"),
    ("[server]\nmode = 660\n", 2, 'mode is a mode like "0660" or 0o660, not 660'),
    ("[server]\nmode = '0888'\n", 2, "mode like"),
    ("[server]\nmode = '01777'\n", 2, "mode like"),
    ("[server]\nmode = true\n", 2, "mode like"),
    ("[server]\nmode = -1\n", 2, "mode like"),
    ("[server]\ngroup = 'no such group'\n", 2, "it knows none of that name"),
    ("[server]\ngroup = 'a\\u0000b'\n", 2, "it knows none of that name"),
    ("[server]\ngroup = -1\n", 2, "the number or the name of a group"),
    ("[server]\ndrain = 'x'\n", 2, "number of seconds"),
    ("[server]\ndrain = true\n", 2, "number of seconds"),
    ("[server]\ndrain = -1\n", 2, "number of seconds"),
    ("[server]\ndrain = nan\n", 2, "number of seconds"),
    ("[server]\ndrain = inf\n", 2, "number of seconds"),
    ("[entry]\nweb = 8000\n", 2, "[entry.web] is a table, not 8000"),
    ("[entry.web]\n", 1, 'entry "web" takes exactly one of listen, open, memfd'),
    ("[entry.web]\nlisten = 80\nmemfd = 80\n", 1, 'entry "web" takes exactly one of'),
    ("[entry.web]\nlisen = 80\n", 2, "unknown key 'lisen': [entry.web] has listen, open, memfd"),
    ("[entry.a.b]\nlisten = 80\n", 1, "unknown key 'b': [entry.a] has"),
    ("[entry.'a b']\nlisten = 80\n", 1, "'a b' is no name"),
    ("[entry]\n'\\u001b[31m' = { listen = 80 }\n", 2, "is no name"),
    ("[entry.a]\nlisten = 1\n[entry.web]\nlisten = ':http'\n", 4, "port from 0 to 65535"),
    ("[entry.web]\nlisten = 65536\n", 2, "port from 0 to 65535"),
    ("[entry.web]\nlisten = 1.5\n", 2, "listen is an address, in quotes, not 1.5"),
    ("[entry.web]\nopen = ':rw'\n", 2, "open is a path (it is PATH"),
    ("[entry.web]\nopen = 5\n", 2, "open is a path, in quotes, not 5"),
    ("[entry]\nweb = { memfd = 'much' }\n", 2, "memfd is a size (a size is bytes"),
    ("[entry.web]\nfd = 5\n", 2, "unknown key 'fd'"),
    ("[[rule]]\nverbs = ['put']\n", 1, "exactly one of uid, gid, everyone"),
    ("[[rule]]\nuid = 1\ngid = 1\nverbs = ['put']\n", 1, "exactly one of uid, gid, everyone"),
    ("[[rule]]\nuid = 1\nverbs = ['put']\n\n[[rule]]\nuid = 1\n", 5, "a rule takes verbs"),
    ("[[rule]]\nuid = 1\nverbs = ['put']\n[[rule]]\nuid = 1\nverbs = 1\n", 6, "verbs is a list"),
    ("[[rule]]\nuid = true\n", 2, "the number or the name of a user"),
    ("[[rule]]\nuid = 4294967295\n", 2, "the number or the name of a user"),
    ("[[rule]]\nuid = 'no such user'\n", 2, "uid is a user of this system"),
    ("[[rule]]\ngid = 'no such group'\n", 2, "gid is a group of this system"),
    ("[[rule]]\neveryone = false\n", 2, "everyone is true or left out, not False"),
    ("[[rule]]\neveryone = true\nverbs = ['steal']\n", 3, "verbs is a list of borrow, put"),
    ("[[rule]]\nuid = 1\nmode = 'w'\nverbs = ['borrow']\n", 3, 'mode is "r"'),
    ("[[rule]]\nuid = 1\nmode = 'r'\nverbs = ['put']\n", 1, 'verbs take "borrow" then'),
    (
        "[[rule]]\nuid = 1\nverbs = ['borrow']\nlisteners = false\n",
        4,
        "listeners is true or left out, not False",
    ),
    ("[[rule]]\nuid = 1\nverbs = ['borrow']\nlisteners = ['web']\n", 4, "true or left out"),
    (
        "[[rule]]\nuid = 1\nlisteners = true\nverbs = ['put', 'list']\n",
        3,
        'listeners = true is about what is borrowed: verbs take "borrow" then',
    ),
    (
        "[[rule]]\nuid = 1\nmode = 'r'\nverbs = ['borrow']\nlisteners = true\n",
        5,
        'does not go with mode = "r": no socket can be lent read-only',
    ),
    ("[[rule]]\nuid = 1\nverbs = ['borrow']\nlistener = true\n", 4, "verbs, mode, listeners"),
    ("[[rule]]\neveryone = true\nverbs = []\n", 3, "verbs is a list"),
    ("[[rule]]\neveryone = true\nverbs = 'put'\n", 3, "verbs is a list"),
    ("[[rule]]\neveryone = true\nnames = [\n  1,\n]\nverbs = ['put']\n", 3, "names is a list"),
    ("[[rule]]\neveryone = true\nverbs = ['put']\nname = ['a']\n", 4, "unknown key 'name'"),
    (f"[entry.web]\nlisten = '{'x' * 10_000}'\n", 2, "xxx..."),
    ("\nquota = 5\n", 2, "[quota] is a table, not 5"),
    ("[[quota]]\nloans = 5\n", 1, "[quota] is a table, not [{'loans': 5}]"),
    (
        "[quota]\n\nloan = 5\n",
        3,
        "unknown key 'loan': [quota] has sessions, loans, entries, waiting, bytes, closes",
    ),
    ("[quota]\nsessions = 1\nloans = -1\n", 3, "loans is a number, 0 or more, not -1"),
    ("[quota]\nloans = true\n", 2, "loans is a number, 0 or more, not True"),
    ("[quota]\nloans = 1.5\n", 2, "loans is a number, 0 or more, not 1.5"),
    ("[quota]\nbytes = '4M'\n", 2, "bytes is a number, 0 or more, not '4M'"),
    ("[quota]\nbytes = inf\n", 2, "bytes is a number, 0 or more, not inf"),
    ("[quota]\nbytes = 9007199254740992\n", 2, "bytes is a number"),
    ("[[rule]]\nuid = 1\nverbs = ['put']\nquota = 5\n", 4, "[[rule]] quota is a table, not 5"),
    (
        "[[rule]]\nuid = 1\nverbs = ['put']\nquota = { sesions = 5 }\n",
        4,
        "unknown key 'sesions': [[rule]] quota has sessions, loans",
    ),
    (
        "[[rule]]\nuid = 1\nverbs = ['put']\n[rule.quota]\nloans = 1\nclose = 5\n",
        6,
        "unknown key 'close'",
    ),
    (
        "[[rule]]\nuid = 1\nverbs=['put']\n[[rule]]\nuid = 2\nverbs=['put']\nquota.loans = ''\n",
        7,
        "loans is a number, 0 or more, not ''",
    ),
    (
        2 * "[[rule]]\nuid = 1\nverbs = ['put']\n[rule.quota]\nloans = 1\n" + "loan = 1\n",
        11,
        "unknown key 'loan'",
    ),
    ("server.drain = 1\nserver.mode = 5000\n", 2, "mode like"),
    ("\nserver.drain = 1\nserver.drein = 1\n", 3, "unknown key 'drein'"),
    ("\nentry.web.listen = 1\nentry.web.open = ''\n", 3, "open is a path"),
    ("\nentry.web.listen = 1\nentry.web.memfd = 1\n", 2, "takes exactly one of"),
    ("[[rule]]\nuid = 1\nverbs = ['put']\nquotas = {}\n", 4, "listeners, quota"),
]


@pytest.mark.parametrize(("text", "line", "said"), MISTAKES)
def test_a_mistake_is_found_and_said(written, text, line, said):
    path = written(text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    error = caught.value
    assert (error.path, error.line) == (path, line)
    assert said in error.reason
    assert str(error).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert str(error).isprintable()
    assert len(error.reason) < 300


@pytest.mark.parametrize("name", ["none", "folder", "secret"])
def test_a_file_that_cannot_be_read(tmp_path, name):
    (tmp_path / "folder").mkdir()
    path = str(tmp_path / name) if name != "secret" else "/proc/1/mem"
    with pytest.raises(ConfigError, match="it cannot be read") as caught:
        read(path)
    assert caught.value.line == 0


# --- the command ---


def test_check_says_what_there_is(written, tmp_path):
    path = written("""
        [entry.web]
        listen = "127.0.0.1:1"
        [entry.log]
        open = "made-if-it-were-opened:a"
        [[rule]]
        everyone = true
        verbs = ["borrow"]
    """)
    before = os.listdir(tmp_path)
    done = run("serve", "--config", path, "--check", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (
        0,
        f"{path}: ok, 2 entries, 1 rule\n",
        "",
    )
    assert os.listdir(tmp_path) == before


def test_check_says_what_is_wrong_in_one_line(written):
    path = written("[entry.web]\nlisten = ':http'\n")
    done = run("serve", "--config", path, "--check")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"fdbroker: {path}:2: listen is an address")
    assert done.stderr.count("\n") == 1
