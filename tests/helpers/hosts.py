"""Several hosts on one machine, for tests of launches over SSH.

A host is a network, mount, host name and process namespace with an SSH daemon of its own; a bridge joins their eth0.
Files are shared, as on a cluster's network file system, but for what a test binds over. Needs root, and Debian's
iproute2, openssh-server and pdsh.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.helpers.launcher import until

_BRIDGE = "hds-switch"  # a namespace of its own: the machine's network stays as it is
_NETWORK = "10.213.77"
_SSHD = "/usr/sbin/sshd"
_LOCK = Path("/tmp/hds-hosts.lock")
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "ssh": "openssh-client", "ssh-keygen": "openssh-client"}
_TOOLS |= {_SSHD: "openssh-server", "pdsh": "pdsh", "nsenter": "util-linux", "unshare": "util-linux"}


class Host(NamedTuple):
    """One of the hosts; its `init` is the outer process id of what the host dies with."""

    name: str
    address: str
    namespace: str
    init: int


def why_not():
    """Return why this machine cannot hold hosts, or None."""
    if os.geteuid() != 0:
        return "several hosts on one machine need root"
    missing = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if missing:
        return f"several hosts on one machine need {', '.join(missing)}"
    probe = "hds-probe"
    try:
        _run("ip", "netns", "add", probe)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    _run("ip", "netns", "delete", probe)
    return None


class Cluster:
    """Hosts node1 ... nodeN; commands run on node1, as people do on a head node."""

    def __init__(self, folder, count):
        self.folder = folder
        self.names = [f"node{number}" for number in range(1, count + 1)]
        self._hosts = {}
        folder.mkdir(parents=True)
        self._write_settings()
        _run("ip", "netns", "add", _BRIDGE)
        _inside(_BRIDGE, "ip", "link", "add", "bridge0", "type", "bridge")
        _inside(_BRIDGE, "ip", "link", "set", "bridge0", "up")
        for name in self.names:
            self.start(name)

    def close(self):
        """Leave nothing behind: processes, namespaces, links."""
        for name in list(self._hosts):
            self.stop(name)
        _run("ip", "netns", "delete", _BRIDGE)

    def hostfile(self, count=2, slots=1):
        """Write a hostfile of the first hosts and return its path."""
        path = self.folder / f"hosts-{count}-{slots}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.names[:count]))
        return path

    def run(self, *command, host="node1", cwd, env=()):
        """Run a command on a host to its end; return it with its output as text."""
        with self.popen(*command, host=host, cwd=cwd, env=env) as process:
            out, err = process.communicate()
            return subprocess.CompletedProcess(command, process.returncode, out, err)

    def popen(self, *command, host="node1", cwd, env=()):
        """Start a command on a host."""
        target = str(self._hosts[host].init)
        spaces = ["nsenter", "--target", target, "--net", "--mount", "--uts", "--pid", f"--wdns={cwd}"]
        return subprocess.Popen(
            [*spaces, *map(str, command)],
            env={**self.environment(), **dict(env)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def environment(self):
        """Return what a person's shell on node1 has."""
        kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        path = [self.folder / "bin", Path(sys.executable).parent, "/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin"]
        kept |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # hosts have CPUs, whatever this machine has
        return {**kept, "HOME": str(self.folder), "PATH": ":".join(map(str, path))}

    def bind(self, host, source, target):
        """Show another file or folder at a path of one host."""
        self._in(host, "mount", "--bind", str(source), str(target))

    def unbind(self, host, target):
        """Take back what `bind` has shown."""
        self._in(host, "umount", str(target))

    def limit(self, rate):
        """Limit what each host sends, such as to `100mbit`; None: no limit."""
        for name in self.names:
            if rate is None:
                self._in(name, "tc", "qdisc", "del", "dev", "eth0", "root")
            else:
                shape = ["rate", rate, "burst", "128kb", "latency", "500ms"]
                self._in(name, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *shape)

    def bytes_sent(self, host):
        """Return what a host has sent through eth0 since it started."""
        lines = self._in(host, "cat", "/proc/net/dev").stdout.splitlines()
        (figures,) = [line.partition(":")[2].split() for line in lines if line.strip().startswith("eth0:")]
        return int(figures[8])

    def start(self, name):
        """Switch a host on."""
        number = self.names.index(name) + 1
        space, address = f"hds-{name}", f"{_NETWORK}.{number}"
        _run("ip", "netns", "add", space)
        link = ["link", "add", f"to-{name}", "netns", _BRIDGE, "type", "veth", "peer", "name", "eth0", "netns", space]
        _run("ip", *link)
        _inside(_BRIDGE, "ip", "link", "set", f"to-{name}", "master", "bridge0", "up")
        # A host that comes back has the address that the others remember.
        _inside(space, "ip", "link", "set", "eth0", "address", f"02:00:00:00:00:{number:02x}")
        _inside(space, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _inside(space, "ip", "link", "set", device, "up")
        spaces = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = self.folder / "start-host"
        command = ["ip", "netns", "exec", space, *spaces, "sh", str(script), name]
        outer = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
        self._hosts[name] = Host(name, address, space, _child_of(outer))
        self._wait_for_ssh(name)

    def stop(self, name):
        """Switch a host off, as a power cut does."""
        host = self._hosts.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.kill(host.init, signal.SIGKILL)  # of a process namespace's first process: all others go with it
        _run("ip", "netns", "delete", host.namespace)  # and eth0 with its other end
        until(lambda: f"to-{name}" not in _inside(_BRIDGE, "ip", "link").stdout, f"{name} to be gone")

    def _in(self, host, *command):
        target = str(self._hosts[host].init)
        return _run("nsenter", "--target", target, "--net", "--mount", "--uts", "--pid", "--", *command)

    def _wait_for_ssh(self, name):
        def answers():
            probe = [str(self.folder / "bin/ssh"), f"{_NETWORK}.{self.names.index(name) + 1}", "true"]
            target = str(self._hosts[name].init)
            return subprocess.run(["nsenter", "--target", target, "--net", *probe], capture_output=True).returncode == 0

        until(answers, f"sshd of {name}")

    def _write_settings(self):
        folder = self.folder
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
        shutil.copy(folder / "key.pub", folder / "authorized_keys")
        known, hosts = [], ["127.0.0.1 localhost\n"]
        for number, name in enumerate(self.names, 1):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / f"{name}.key"))
            public = " ".join((folder / f"{name}.key.pub").read_text().split()[:2])
            known.append(f"{name},{_NETWORK}.{number} {public}\n")
            hosts.append(f"{_NETWORK}.{number} {name}\n")
        (folder / "known_hosts").write_text("".join(known))
        (folder / "hosts").write_text("".join(hosts))
        (folder / "ssh_config").write_text(
            f"Host *\n  User root\n  IdentityFile {folder}/key\n  IdentitiesOnly yes\n  StrictHostKeyChecking yes\n"
            f"  UserKnownHostsFile {folder}/known_hosts\n  BatchMode yes\n  ConnectTimeout 5\n  LogLevel ERROR\n"
        )
        (folder / "sshd_config").write_text(
            f"AuthorizedKeysFile {folder}/authorized_keys\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
            f"PasswordAuthentication no\nPidFile none\nMaxStartups 100\nHostKey {folder}/HOST.key\n"
        )
        for name in self.names:
            text = (folder / "sshd_config").read_text().replace("HOST", name)
            (folder / f"{name}.sshd_config").write_text(text)
        (folder / "bin").mkdir()
        _write_script(folder / "bin/ssh", f'exec /usr/bin/ssh -F {folder}/ssh_config "$@"\n')
        _write_script(
            folder / "start-host",
            # Shared memory is a host's own; processes find their host's names in its own file.
            f"hostname $1\nmount --bind {folder}/hosts /etc/hosts\nmount -t tmpfs tmpfs /dev/shm\n"
            f"mkdir -p /run/sshd\nexec {_SSHD} -D -e -f {folder}/$1.sshd_config 2>{folder}/$1.log\n",
        )
        extensions = os.environ.get("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache/torch_extensions"))
        # What DeepSpeed's launcher passes on to all hosts.
        (folder / ".deepspeed_env").write_text(
            f"CUDA_VISIBLE_DEVICES=\nDS_ACCELERATOR=cpu\nGLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nTORCH_EXTENSIONS_DIR={extensions}\n"
        )


@contextlib.contextmanager
def hosts_on_one_machine(folder, count):
    """Yield a cluster; whatever happens, it is gone afterwards. What a killed test run has left goes first."""
    with _LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run on this machine has the same hosts
        _sweep()
        try:
            cluster = Cluster(folder, count)
            yield cluster
            cluster.close()
        finally:
            _sweep()


def _sweep():
    for line in _run("ip", "netns", "list").stdout.splitlines():
        space = line.split()[0]
        if space.startswith("hds-"):
            for pid in _run("ip", "netns", "pids", space).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "delete", space)


def _child_of(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: bool(path.read_text().split()), "a host's first process")
    return int(path.read_text().split()[0])


def _write_script(path, body):
    path.write_text(f"#!/bin/sh\n{body}")
    path.chmod(0o755)


def _inside(space, *command):
    return _run("ip", "netns", "exec", space, *command)


def _run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True)
