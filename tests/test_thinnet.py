"""The thin network: real rates, the right environment, honest fallbacks, nothing left behind."""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import relay as thinnet_relay
import thinnet
from thinnet import LinkShape, ThinNet, interface_bytes

THINNET = thinnet.__file__
NOBODY = 65534
# In the environment of all that a test starts, so that a forgotten process can be found.
MARK = f"THINNET_TEST_{os.getpid()}"

# Sends sys.argv[1] bytes from rank 0 to rank 1, then the same back. Each prints what its interface
# counted; the sender also how long it took until the other had all. (The receiver's clock would
# start too late where the receiver has to wait for a core.)
TRANSFER = """
import json, os, socket, sys, time
from thinnet import interface_bytes
rank, size = int(os.environ["RANK"]), int(sys.argv[1])
if rank == 0:
    peer, _ = socket.create_server(("", 5001)).accept()
while rank == 1:
    try:
        peer = socket.create_connection((os.environ["MASTER_ADDR"], 5001), 30)
        break
    except ConnectionRefusedError:
        time.sleep(0.02)
for sender in (0, 1):
    before, start = interface_bytes(), time.monotonic()
    if rank == sender:
        peer.sendall(bytes(size))
        peer.recv(1)
        seconds = time.monotonic() - start
    else:
        missing = size
        while missing:
            missing -= len(peer.recv(missing))
        peer.sendall(b".")
    after = interface_bytes()
    report = {"direction": f"from {sender}", "tx": after.tx - before.tx, "rx": after.rx - before.rx}
    print(json.dumps({**report, "seconds": seconds} if rank == sender else report))
"""

# Rank 0 sends sys.argv[1] small packets to rank 1 and back, one after another, and prints the round trips in ms.
PING = """
import json, os, socket, sys, time
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
link.bind(("", 5002))
if os.environ["RANK"] == "1":
    while True:
        said, asker = link.recvfrom(100)
        link.sendto(said, asker)
        if said == b"end":
            raise SystemExit
link.settimeout(0.5)
def trip(words):  # again until rank 1 is there
    for _ in range(40):
        try:
            start = time.monotonic()
            link.sendto(words, ("10.77.0.2", 5002))
            while link.recv(100) != words:
                pass
            return (time.monotonic() - start) * 1e3
        except OSError:
            pass
    raise TimeoutError("rank 1 does not answer")
trip(b"first")
trips = [trip(b"%d" % i) for i in range(int(sys.argv[1]))]
trip(b"end")
print(json.dumps(trips))
"""

# Rank 0 sends sys.argv[1] numbered packets once rank 1 has made the file sys.argv[2]; rank 1 prints those that came.
# No other packet is sent, so that each run has the same.
DATAGRAMS = """
import json, os, pathlib, socket, sys, time
count, there = int(sys.argv[1]), pathlib.Path(sys.argv[2])
link = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
if os.environ["RANK"] == "0":
    while not there.exists():
        time.sleep(0.02)
    for i in range(count):
        link.sendto(b"%d" % i, ("10.77.0.2", 5003))
        if i == 0:
            time.sleep(0.3)  # what waits for the address of rank 1 may be overtaken
    raise SystemExit
link.bind(("", 5003))
there.touch()
link.settimeout(10)
came = [int(link.recv(100))]
link.settimeout(0.5)
try:
    while True:
        came.append(int(link.recv(100)))
except TimeoutError:
    print(json.dumps(came))
"""

CONGESTION = """
import socket, os, time
if os.environ["RANK"] == "0":
    peer, _ = socket.create_server(("", 5004)).accept()
else:
    while True:
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], 5004), 30)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
print(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(bytes(1)).decode())
"""

ENVIRONMENT = """
import json, os
from thinnet import interface_bytes
names = ("RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT GLOO_SOCKET_IFNAME "
         "OMP_NUM_THREADS COLOUR").split()
print(json.dumps({name: os.environ.get(name) for name in names} | {"bytes": interface_bytes()}))
"""

ALL_REDUCE = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
total = torch.full((1000,), 1.0 + dist.get_rank())
dist.all_reduce(total)
print("sum", total.unique().tolist())
dist.destroy_process_group()
"""


def sh(script):
    return ["sh", "-c", script]


def python(script, *arguments):
    return [sys.executable, "-c", script, *arguments]


def namespaces(pid):
    """Names that the run with this pid has in `ip netns list`."""
    ip = thinnet._which("ip")
    if ip is None:
        return []
    listed = subprocess.run([ip, "netns", "list"], capture_output=True, text=True, check=True)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    return [name for name in names if name.startswith(f"thinwire-{pid}-")]


def marked_processes():
    """Living processes that a test here started, with ranks and all below them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if MARK.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


def eventually(condition, seconds=10):
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.02)
    return True


class Lines:
    """An on_line that remembers."""

    def __init__(self):
        self.all = []

    def __call__(self, rank, line, stream):
        self.all.append((rank, line, stream))

    def rank(self, rank):
        return [line for r, line, stream in self.all if r == rank and stream == "stdout"]

    def json(self, rank):
        return [json.loads(line) for line in self.rank(rank)]


@contextlib.contextmanager
def command(*arguments, **options):
    """Runs thinnet.py beside the test."""
    argv = options.pop("argv", [sys.executable, THINNET])
    process = subprocess.Popen(
        [*argv, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=20)


def finished(*arguments, **options):
    with command(*arguments, **options) as process:
        out, err = process.communicate(timeout=60)
        return process.pid, process.returncode, out, err


@pytest.fixture(scope="module")
def possible():
    with ThinNet(ranks=1) as net:
        if not net.isolated:
            pytest.skip(f"no network namespaces here: {net.why}")
    return True


@pytest.fixture
def visible(possible):
    if os.geteuid() != 0:
        pytest.skip("without root the namespaces are not in `ip netns list`")


@pytest.fixture
def relay(possible, monkeypatch):
    """The userspace switch, also where the kernel has netem."""
    monkeypatch.setattr(thinnet._Namespaces, "_has_netem", lambda self: False)
    with ThinNet(ranks=1, delay_ms=1) as net:
        if not net.isolated:
            pytest.skip(f"no relay here: {net.why}")


@pytest.fixture(params=["what the kernel has", "relay"])
def delays(request, possible):
    """Whatever makes the delay here, and the userspace switch."""
    if request.param == "relay":
        request.getfixturevalue("relay")


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch):
    """After every test: no namespace of this process, no process that a test started."""
    monkeypatch.setenv(MARK, "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(THINNET).parent))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    # A background job or nohup ignores these, and what it starts does too, unless they are set.
    ignored = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.SIGHUP: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    }
    yield
    for number, handler in ignored.items():
        signal.signal(number, handler)
    monkeypatch.undo()  # PATH among others
    assert namespaces(os.getpid()) == []
    assert eventually(lambda: marked_processes() == [], 2), marked_processes()


# The link


def test_rate_is_real_both_ways_and_counters_agree(possible):
    size = 1_250_000
    with ThinNet(ranks=2, mbit=20) as net:
        assert net.isolated and net.shaped and net.why is None
        lines = _transfer(net, size, mbit=20)
        for sender in (0, 1):
            # Headers are 66 of 1514 bytes; the rest of the margin is for what is sent twice.
            sent, received = lines.json(sender)[sender], lines.json(1 - sender)[sender]
            assert 1.02 * size < sent["tx"] < 1.12 * size
            assert 1.02 * size < received["rx"] < 1.12 * size
            assert sent["rx"] < 0.1 * size > received["tx"]

        # One slow link: traffic to the rank is slowed at the switch, from it at its interface.
        net.shape(rank=1, mbit=5)
        _transfer(net, size // 4, mbit=5)


def _transfer(net, size, mbit):
    """One transfer each way, never faster than the link. Only where cores are busy it may be slow."""
    theory = size * 8 / (mbit * 1e6)
    for _ in range(3):
        lines = Lines()
        assert net.run(python(TRANSFER, str(size)), on_line=lines) == 0
        seconds = [lines.json(sender)[sender]["seconds"] for sender in (0, 1)]
        assert min(seconds) > 0.95 * theory
        if max(seconds) < 3 * theory:
            return lines
    raise AssertionError(f"{size} bytes at {mbit} Mbit/s took {seconds} s, in theory {theory} s")


def test_unshaped_ranks_are_isolated_but_not_shaped(possible):
    with ThinNet(ranks=2) as net:
        assert net.isolated and not net.shaped and "mbit=0" in net.why
        net.shape(rank=0, mbit=5)
        assert net.shaped and net.why is None
        net.shape(rank=0, mbit=0)
        lines = Lines()
        assert net.run(python(TRANSFER, "2500000"), on_line=lines) == 0
        assert all(lines.json(sender)[sender]["seconds"] < 2 for sender in (0, 1))  # 4 s at 5 Mbit/s


# Delay, jitter, loss


def run(net, script, *arguments):
    lines = Lines()
    assert net.run(python(script, *arguments), on_line=lines) == 0, lines.all
    return lines


def test_delay_is_real_for_small_packets(delays):
    with ThinNet(ranks=2, mbit=100, delay_ms=15) as net:
        assert net.shaped and net.delayed_by in ("netem", "relay")
        medians = []
        while not medians or (medians[-1] >= 45 and len(medians) < 3):  # the machine may be busy
            trips = run(net, PING, "11").json(0)[0]
            assert min(trips) >= 30
            medians.append(statistics.median(trips))
        assert medians[-1] < 45, medians
        assert (net.relay_cpu_s() or 0) > 0 or net.delayed_by == "netem"
    assert net.delayed_by is None and net.relay_cpu_s() is None


def test_delay_leaves_the_rate(delays):
    size, theory = 2_500_000, 0.52  # of 40 Mbit/s, and a round trip
    with ThinNet(ranks=2, mbit=40, delay_ms=10) as net:
        for _ in range(3):
            lines = run(net, TRANSFER, str(size))
            seconds = [lines.json(sender)[sender]["seconds"] for sender in (0, 1)]
            assert min(seconds) > 0.95 * theory
            received = [lines.json(1 - sender)[sender]["rx"] for sender in (0, 1)]
            # A rank may have begun to count when the first frames were already there.
            assert all(0.9 * size < rx < 1.12 * size for rx in received)
            if max(seconds) < 1.6 * theory:
                break
        else:
            raise AssertionError(f"{size} bytes at 40 Mbit/s took {seconds} s, in theory {theory} s")


def test_one_slow_link_keeps_its_delay(relay):
    with ThinNet(ranks=2, mbit=100, delay_ms=10) as net:
        net.shape(rank=1, mbit=5)
        lines = run(net, TRANSFER, "312500")
        assert all(lines.json(sender)[sender]["seconds"] > 0.49 for sender in (0, 1))
        net.shape(rank=1, mbit=0)
        took = [1.0]
        while took[-1] >= 0.49 and len(took) < 4:  # the machine may be busy
            lines = run(net, TRANSFER, "312500")
            took.append(max(lines.json(sender)[sender]["seconds"] for sender in (0, 1)))
        assert took[-1] < 0.49, took
        assert min(run(net, PING, "5").json(0)[0]) >= 20


def test_a_link_is_shared_by_all_who_send_to_it(relay):
    """Two ranks send to a third: its downlink is the bottleneck, as behind a real switch."""
    script = """
import os, select, socket, time
if os.environ["RANK"] == "0":
    server = socket.create_server(("", 5005))
    peers = [server.accept()[0] for _ in range(2)]
    for peer in peers:
        peer.sendall(b".")
    start = time.monotonic()
    while peers:  # from both at once
        for peer in select.select(peers, [], [])[0]:
            if not peer.recv(1 << 16):
                peers.remove(peer)
    print(time.monotonic() - start)
else:
    while True:
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], 5005), 30)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    peer.recv(1)
    peer.sendall(bytes(2_500_000))
    peer.close()
"""
    with ThinNet(ranks=3, mbit=40, delay_ms=5) as net:
        (seconds,) = run(net, script).json(0)
    assert seconds > 0.95  # of 40 Mbit; each sender by itself would take half of it


def test_jitter_spreads_round_trips(delays):
    with ThinNet(ranks=2, delay_ms=10, jitter_ms=8) as net:
        assert net.shaped  # by its delay alone
        trips = run(net, PING, "25").json(0)[0]
    assert min(trips) >= 4
    # Of 25 sums of two delays from 2 to 18 ms hardly all are as near to 20 ms as without jitter.
    assert min(trips) < 17 and max(trips) > 23


def test_loss_is_the_share_asked_for_and_the_same_in_each_run(relay, tmp_path):
    came = []
    for again in ("first", "second"):
        with ThinNet(ranks=2, loss=0.2) as net:
            assert net.delayed_by == "relay"
            # Few enough for a socket's buffer, so that no other is lost.
            came.append(run(net, DATAGRAMS, "200", str(tmp_path / again)).json(1)[0])
            assert net.relay_counts().dropped == [0, 0]
            assert net.relay_counts().lost[0] == 200 - len(came[-1])
    # 160 ± 4 standard deviations.
    assert all(137 <= len(one) <= 183 and one == sorted(set(one)) for one in came)
    assert came[0] == came[1]


def test_tcp_is_that_of_long_paths(relay):
    with open("/proc/sys/net/ipv4/tcp_available_congestion_control") as names:
        expected = "cubic" if "cubic" in names.read().split() else "reno"
    with ThinNet(ranks=2, delay_ms=1) as net:
        lines = run(net, CONGESTION)
        assert [lines.rank(rank) for rank in (0, 1)] == [[expected]] * 2
        lines = Lines()
        assert net.run(sh("cd /proc/sys/net/ipv4; cut -f3 tcp_rmem tcp_wmem"), on_line=lines) == 0
        assert all(lines.rank(rank) == ["33554432"] * 2 for rank in (0, 1))
    with ThinNet(ranks=2) as net:
        assert net.delayed_by is None and net.relay_cpu_s() is None
        lines = run(net, CONGESTION)
        assert [lines.rank(rank) for rank in (0, 1)] == [["reno"]] * 2


def test_command_line_tells_what_the_relay_used(relay, capfd):
    argv = ["--ranks", "2", "--mbit", "50", "--delay", "15", "--jitter", "1", "--loss", "1"]
    assert thinnet.main([*argv, "--", *python(PING, "5")]) == 0
    out, err = capfd.readouterr()
    assert min(json.loads(out[len("[0] ") :])) >= 28
    (line,) = err.splitlines()
    assert line.startswith("thinnet: the relay used 0.") and "s of CPU (not the ranks')" in line


def test_netem_is_asked_for_one_delay_a_path(possible, monkeypatch):
    calls = []
    monkeypatch.setattr(thinnet._Namespaces, "_has_netem", lambda self: True)
    monkeypatch.setattr(thinnet._Namespaces, "_call", lambda self, *argv, **_: calls.append(argv[1:]) or "")
    with ThinNet(ranks=1, mbit=8, delay_ms=20, jitter_ms=2.5, loss=0.015) as net:
        assert net.delayed_by == "netem" and net.relay_cpu_s() is None
    name, bridge = (f"thinwire-{os.getpid()}-{net_of(calls)}-{end}" for end in ("0", "bridge"))
    qdiscs = [" ".join(argv) for argv in calls if "qdisc" in argv]
    tbf = "tbf rate 8000000bit burst 4542b limit 128000b"
    assert qdiscs == [
        f"-n {name} qdisc replace dev eth0 root {tbf}",
        f"-n {bridge} qdisc replace dev rank0 root handle 1: "
        "netem delay 20000us 2500us loss 1.5% limit 1000000",
        f"-n {bridge} qdisc replace dev rank0 parent 1:1 handle 10: {tbf}",
    ]


def net_of(calls):
    """The number in the names of the namespaces that were made."""
    return next(argv[2] for argv in calls if argv[:2] == ("netns", "add")).split("-")[2]


def test_a_longer_round_trip_has_a_longer_queue():
    assert LinkShape(100).queue_bytes == 625_000
    assert LinkShape(100, delay_ms=10).queue_bytes == 875_000
    assert LinkShape(1, delay_ms=10).queue_bytes == 128_000


# What a rank sees


def test_environment(possible):
    with ThinNet(ranks=2, mbit=100) as net:
        lines = Lines()
        assert net.run(python(ENVIRONMENT), env={"COLOUR": "red"}, on_line=lines) == 0
        first_port = lines.json(0)[0]["MASTER_PORT"]
        for rank in (0, 1):
            (seen,) = lines.json(rank)
            assert seen.pop("MASTER_PORT") == first_port
            assert len(seen.pop("bytes")) == 2
            assert seen == {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "10.77.0.1",
                "GLOO_SOCKET_IFNAME": "eth0",
                "OMP_NUM_THREADS": "1",
                "COLOUR": "red",
            }
        lines = Lines()
        assert net.run(python(ENVIRONMENT), env={"OMP_NUM_THREADS": "3"}, on_line=lines) == 0
        assert lines.json(1)[0]["OMP_NUM_THREADS"] == "3"
        assert lines.json(1)[0]["MASTER_PORT"] != first_port


@pytest.mark.parametrize("delay_ms", [pytest.param(0, marks=pytest.mark.full), 5])  # test_examples.py has 0, too
def test_all_reduce_over_gloo(possible, delay_ms):
    pytest.importorskip("torch")
    with ThinNet(ranks=2, mbit=100, delay_ms=delay_ms) as net:
        lines = Lines()
        assert net.run(python(ALL_REDUCE), on_line=lines) == 0, lines.all
    assert sorted(r for r, line, _ in lines.all if line == "sum [3.0]") == [0, 1]


def test_no_counters_outside():
    assert interface_bytes() is None


# Lines and exit status


def test_lines_are_prefixed_and_streams_kept_apart(possible):
    script = "echo out $RANK; echo err $RANK >&2; printf 'no newline'"
    _, status, out, err = finished("--ranks", "2", "--", *sh(script))
    assert status == 0
    assert sorted(out.splitlines()) == [
        "[0] no newline",
        "[0] out 0",
        "[1] no newline",
        "[1] out 1",
    ]
    assert sorted(err.splitlines()) == ["[0] err 0", "[1] err 1"]


def test_quiet_ranks_shows_rank_0_and_what_a_failed_rank_said_last(possible):
    script = "echo out $RANK; exit $((RANK * 3))"
    _, status, out, err = finished("--ranks", "2", "--quiet-ranks", "--", *sh(script))
    assert status == 3
    assert out.splitlines() == ["[0] out 0"]
    assert "[1] out 1" in err.splitlines()


@pytest.mark.parametrize(
    "ending, status, name, trap",
    [("exit 7", 7, "7", "trap '' TERM"), ("kill -KILL $$", 137, "137 (SIGKILL)", "")],
)
def test_first_failure_is_named_and_ends_the_others(possible, ending, status, name, trap):
    # Rank 2 fails because rank 1 did, as ranks do; rank 0 hangs, and may ignore a polite request.
    script = f"""{trap}
    case $RANK in
        0) setsid sleep 61 & sleep 60; sleep 60;;
        1) sleep 0.2; {ending};;
        2) sleep 0.5; exit 9;;
    esac"""
    start = time.monotonic()
    pid, got, _, err = finished("--ranks", "3", "--grace", "0.6", "--", *sh(script))
    assert got == status
    assert f"rank 1 failed with status {name}; still running 0.6 s later and ended: [0]" in err
    assert time.monotonic() - start < 10
    assert namespaces(pid) == []


def test_grace_lets_the_others_finish(possible, capfd):
    script = "[ $RANK = 1 ] && exit 5; sleep 0.5; echo done"
    with ThinNet(ranks=2) as net:
        lines = Lines()
        assert net.run(sh(script), on_line=lines, grace_s=10) == 5
        assert net.failed_rank == 1
        assert (0, "done", "stdout") in lines.all
        assert "rank 1 failed with status 5\n" in capfd.readouterr().err
        assert net.run(sh("true")) == 0 and net.failed_rank is None


# Nothing is left


def test_while_it_runs_there_is_something_to_leave_behind(visible):
    with ThinNet(ranks=2) as net:
        assert len(namespaces(os.getpid())) == 3  # two ranks and the bridge
        seen = []
        net.run(sh("setsid sleep 60 & echo up"), on_line=lambda *_: seen.extend(marked_processes()))
        assert seen
        assert eventually(lambda: marked_processes() == [])  # at the end of run, not of the net
    assert namespaces(os.getpid()) == []


@pytest.mark.parametrize("delay_ms", [0, 5])
def test_nothing_left_after_an_exception(possible, delay_ms):
    def fail(*_):
        raise ZeroDivisionError

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ZeroDivisionError), ThinNet(ranks=2, delay_ms=delay_ms) as net:
        net.run(sh("echo up; sleep 60"), on_line=fail)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert namespaces(os.getpid()) == []
    assert eventually(lambda: marked_processes() == [])


def test_nothing_left_when_setting_up_fails(possible, monkeypatch, capfd):
    monkeypatch.setattr(LinkShape, "tbf", lambda self: ["rate", "fast"])
    with ThinNet(ranks=2, mbit=10) as net:
        assert not net.isolated and not net.shaped
        assert "tc" in net.why and "fast" in net.why
        assert namespaces(os.getpid()) == []
    assert "NOT SHAPED" in capfd.readouterr().err


@pytest.mark.parametrize(
    "number, trap, delay",
    [
        (signal.SIGINT, "trap '' TERM", "0"),
        (signal.SIGTERM, "", "0"),
        (signal.SIGHUP, "", "0"),
        (signal.SIGINT, "", "5"),
    ],
)
def test_nothing_left_after_a_signal(possible, number, trap, delay):
    # Ranks that may ignore the polite request, with a child in a session of its own.
    script = f"{trap}\nsetsid sleep 61 & echo up; sleep 60; sleep 60"
    with command("--ranks", "2", "--mbit", "50", "--delay", delay, "--", *sh(script)) as process:
        assert {process.stdout.readline(), process.stdout.readline()} == {"[0] up\n", "[1] up\n"}
        assert len(marked_processes()) > 2
        if os.geteuid() == 0:
            assert len(namespaces(process.pid)) == 3
        process.send_signal(number)
        if trap:
            time.sleep(0.3)
            process.send_signal(number)  # an impatient second one must not stop the cleaning up
        process.communicate(timeout=10)
        assert process.returncode == 128 + number
    assert namespaces(process.pid) == []
    assert eventually(lambda: marked_processes() == [])


def test_a_second_signal_does_not_interrupt_the_first_ones_unwinding(possible):
    reached = False
    with pytest.raises(KeyboardInterrupt), ThinNet(ranks=1):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)
            reached = True
    assert reached


@pytest.mark.parametrize("after, delay", [(0, "0"), (0.1, "0"), (0.2, "0"), (0.1, "5"), (0.2, "5")])
def test_nothing_left_after_a_signal_while_setting_up(visible, after, delay):
    with command("--ranks", "8", "--mbit", "50", "--delay", delay, "--", "sleep", "60") as process:
        assert eventually(lambda: namespaces(process.pid) != [])
        time.sleep(after)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)
        assert process.returncode == 143
    assert namespaces(process.pid) == []


def test_cleanup_removes_what_a_killed_run_left(visible):
    with ThinNet(ranks=1), command("--ranks", "2", "--", *sh("echo up; sleep 60")) as process:
        process.stdout.readline()
        assert process.pid not in {_owner(name) for name in thinnet.cleanup()}  # it is alive
        process.kill()
        process.wait()
        assert len(namespaces(process.pid)) == 3
        _, status, _, err = finished("--cleanup")
        assert status == 0 and f"thinwire-{process.pid}-0-bridge" in err
        assert namespaces(process.pid) == []
        assert len(namespaces(os.getpid())) == 2  # ours lives


def test_a_killed_run_leaves_no_relay(visible):
    script = "import sys, thinnet; thinnet._Namespaces._has_netem = lambda self: False; thinnet.main(sys.argv[1:])"
    argv = python(script, "--ranks", "2", "--delay", "5", "--", *sh("echo up; exec sleep 60"))
    with command(argv=argv) as process:
        process.stdout.readline()
        assert relays() != []
        process.kill()
        process.wait()
        assert eventually(lambda: relays() == [], 2)
        assert process.pid in {_owner(name) for name in thinnet.cleanup()}


def relays():
    """Relays among the processes that a test started."""
    return [pid for pid in marked_processes() if "relay" in Path(f"/proc/{pid}/comm").read_text()]


def test_a_relay_that_ends_ends_the_run(relay):
    with ThinNet(ranks=2, delay_ms=5) as net:
        with pytest.raises(OSError, match="relay ended"):
            net.run(sh("echo up; sleep 60"), on_line=lambda *_: [os.kill(pid, signal.SIGKILL) for pid in relays()])
        with pytest.raises(OSError, match="status -9"):
            net.shape(rank=0, mbit=10)


def test_without_a_compiler_it_says_so_and_uses_the_loopback(relay, monkeypatch, capfd):
    monkeypatch.setattr(thinnet_relay, "compiler", lambda: None)
    with ThinNet(ranks=2, mbit=10, delay_ms=5) as net:
        assert not net.isolated and not net.shaped and net.delayed_by is None
        assert "C++ compiler" in net.why and "CXX" in net.why
        assert namespaces(os.getpid()) == []
    assert "NOT SHAPED" in capfd.readouterr().err
    with ThinNet(ranks=1, mbit=10) as net:
        assert net.shaped  # nothing to compile


def test_the_compiler_is_the_one_asked_for(relay, tmp_path, monkeypatch, capfd):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho error: out of order >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", f"{broken} -m64")
    with ThinNet(ranks=1, delay_ms=5) as net:
        assert not net.isolated and "broken -m64 could not compile relay.cpp: error: out of order" in net.why


def _owner(name):
    return int(name.split("-")[1])


# Fewer rights, fewer tools


def test_user_namespace_without_root(possible):
    """As nobody, where root runs the tests; other users are here in all tests anyway."""
    python3 = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")
    if os.geteuid() != 0 or python3 is None:
        pytest.skip("needs root to become nobody, and a python3 that nobody may run")
    nobody = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    probe = ["unshare", "--user", "--map-root-user", "--net", "--mount", "true"]
    if subprocess.run(probe, check=False, capture_output=True, **nobody).returncode:
        pytest.skip("no unprivileged user namespaces here")
    script = "pwd; head -c 4 /dev/zero; ls /sys/class/net; setsid sleep 60 & exit $((RANK * 4))"
    with open(THINNET) as source:  # nobody may not be able to read the repository
        _, status, out, err = finished(
            *("--ranks", "2", "--mbit", "20", "--", *sh(script)),
            argv=[python3, "-"],
            stdin=source,
            cwd="/usr",
            **nobody,
        )
    assert "NOT SHAPED" not in err and "rank 1 failed with status 4" in err
    assert status == 4
    assert "[1] /usr\n" in out and "eth0" in out


def test_delay_in_a_user_namespace(relay, monkeypatch):
    """As root, whom /dev/net/tun surely lets in."""
    if subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    monkeypatch.setattr(thinnet._Namespaces, "make", only_rootless(thinnet._Namespaces.make))
    with ThinNet(ranks=2, delay_ms=5) as net:
        assert net.isolated and net._namespaces._rootless and net.delayed_by == "relay"
        assert namespaces(os.getpid()) == []
        assert min(run(net, PING, "3").json(0)[0]) >= 10


def only_rootless(make):
    def refuse(self):
        if not self._rootless:
            raise OSError("not as root")
        make(self)

    return refuse


def test_without_iproute2_it_says_so_and_uses_the_loopback(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(thinnet, "_SBIN", "")
    argv = ["--ranks", "2", "--mbit", "100", "--", *python(ENVIRONMENT)]
    assert thinnet.main(argv) == 0
    out, err = capfd.readouterr()
    assert err.count("\n") == 1
    for words in ("NOT SHAPED", "timings mean nothing", "loopback", "ip and tc", "iproute2"):
        assert words in err
    seen = [json.loads(line[len("[0] ") :]) for line in sorted(out.splitlines())]
    assert [rank["RANK"] for rank in seen] == ["0", "1"]
    for rank in seen:
        assert rank["MASTER_ADDR"] == "127.0.0.1" and rank["GLOO_SOCKET_IFNAME"] == "lo"
        assert rank["MASTER_PORT"] == seen[0]["MASTER_PORT"]
        assert rank["bytes"] is None


def test_on_the_loopback_net_is_honest(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(thinnet, "_SBIN", "")
    with monkeypatch.context() as without_tools:
        without_tools.setenv("PATH", str(tmp_path))
        with ThinNet(ranks=2, mbit=10) as net:
            net.shape(rank=1, mbit=5)  # quietly nothing: `shaped` tells
            assert not net.shaped and not net.isolated and "iproute2" in net.why
            # No namespace tells here what belongs to a rank, only its process group.
            shell = shutil.which("sh", path="/usr/bin:/bin")
            script = """
                if [ $RANK = 1 ]; then read -r never; exit 6; fi
                PATH=/usr/bin:/bin; trap '' TERM; sleep 60 & sleep 61; sleep 62
            """
            start = time.monotonic()
            assert net.run([shell, "-c", script], on_line=Lines(), grace_s=0.3) == 6
            assert time.monotonic() - start < 10
            assert eventually(lambda: marked_processes() == [], 2)


def test_without_rights_it_says_so_and_uses_the_loopback():
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs root and setpriv (package util-linux) to give up rights")
    pid, status, out, err = finished(
        *("--ranks", "2", "--mbit", "100", "--", *sh("echo $RANK $MASTER_ADDR; exit $RANK")),
        argv=["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", sys.executable, THINNET],
    )
    assert status == 1
    assert err.splitlines()[0].startswith("thinnet: NOT SHAPED, timings mean nothing")
    assert "netns" in err.splitlines()[0]
    assert sorted(out.splitlines()) == ["[0] 0 127.0.0.1", "[1] 1 127.0.0.1"]
    assert namespaces(pid) == []


# Arguments

BAD_OPTIONS = [
    (["--ranks", "0", "--", "true"], "ranks=0: expected 1 to 250"),
    (["--ranks", "251", "--", "true"], "ranks=251: expected 1 to 250"),
    (["--mbit", "-1", "--", "true"], "mbit=-1.0: expected 0 (unshaped), or at least 0.01"),
    (["--mbit", "nan", "--", "true"], "mbit=nan: expected"),
    (["--delay", "-1", "--", "true"], "delay_ms=-1.0: expected 0 or more (ms one way)"),
    (["--delay", "inf", "--", "true"], "delay_ms=inf: expected"),
    (["--delay", "2", "--jitter", "3", "--", "true"], "jitter_ms=3.0: expected 0 to delay_ms=2.0"),
    (["--jitter", "-1", "--", "true"], "jitter_ms=-1.0: expected 0 to"),
    (["--jitter", "nan", "--", "true"], "jitter_ms=nan: expected"),
    (["--loss", "100", "--", "true"], "--loss 100.0: expected a percentage from 0 to under 100"),
    (["--loss", "nan", "--", "true"], "--loss nan: expected"),
    (["--mbit", "fast", "--", "true"], "invalid float value: 'fast'"),
    (["--grace", "-2", "--", "true"], "--grace -2.0: expected seconds, 0 or more"),
    (["--ranks", "2"], "no command: expected `-- command ...`"),
    (["--ranks", "2", "--"], "no command: expected `-- command ...`"),
    (["--ranks", "2", "train.py"], "unrecognized arguments: train.py"),
]


@pytest.mark.parametrize("argv, message", BAD_OPTIONS)
def test_bad_options(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        thinnet.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("loss", [-0.1, 1.0, float("nan")])
def test_bad_loss(loss):
    with pytest.raises(ValueError, match=f"loss={loss!r}: expected a share from 0 to under 1"):
        ThinNet(ranks=2, loss=loss)


def test_bad_calls(possible):
    net = ThinNet(ranks=2)
    with pytest.raises(RuntimeError, match="with ThinNet"):
        net.run(["true"])
    with net:
        with pytest.raises(ValueError, match="rank=2: expected 0 to 1"):
            net.shape(rank=2, mbit=10)
        with pytest.raises(ValueError, match="mbit=-3: expected 0"):
            net.shape(rank=1, mbit=-3)
        with pytest.raises(ValueError, match="expected a program"):
            net.run([])
        with pytest.raises(FileNotFoundError, match="no-such-program"):
            net.run(["no-such-program"])
        with pytest.raises(ValueError, match="grace_s=-1"):
            net.run(["true"], grace_s=-1)
    with pytest.raises(RuntimeError, match="with ThinNet"):
        net.run(["true"])


def test_missing_program_is_status_127(possible):
    _, status, _, err = finished("--ranks", "1", "--", "no-such-program")
    assert status == 127 and "no-such-program" in err
