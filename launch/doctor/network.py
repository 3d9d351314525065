"""What processes meet over."""

from __future__ import annotations

import ipaddress
import socket
import threading

from launch.doctor.finding import NOTE, OK, WRONG, Finding

PATIENCE_S = 1.0


def loopback() -> Finding:
    """Listen, connect and say something, by the name that torchrun uses."""
    addresses = addresses_of("localhost")
    if not addresses:
        return Finding(WRONG, "localhost does not resolve", "put `127.0.0.1 localhost` into /etc/hosts")
    try:
        socket.if_nametoindex("lo")
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(PATIENCE_S)
            with socket.create_connection(("localhost", server.getsockname()[1]), PATIENCE_S) as one:
                other, _ = server.accept()
                with other:
                    one.sendall(b"x")
                    other.settimeout(PATIENCE_S)
                    other.recv(1)
    except OSError as error:
        return Finding(WRONG, f"cannot be used: {error.strerror or error}",
                       "sudo ip link set lo up; or have the firewall let pass what goes from lo to lo")
    return Finding(OK, f"localhost is {', '.join(addresses)}")


def host_name() -> Finding:
    name = socket.gethostname()
    return judge_host_name(name, addresses_of(name))


def judge_host_name(name: str, addresses: list[str]) -> Finding:
    if not addresses:
        return Finding(NOTE, f"{name} does not resolve", f"put its address and {name} into /etc/hosts")
    found = f"{name} is {', '.join(addresses)}"
    if all(ipaddress.ip_address(address.split("%")[0]).is_loopback for address in addresses):
        return Finding(NOTE, f"{found}: enough for one host", "for several, give its real address in /etc/hosts")
    return Finding(OK, found)


def addresses_of(name: str) -> list[str]:
    """Return what a name resolves to; nothing where no answer comes in time: a name server may be asked for long."""
    found = []

    def ask() -> None:
        try:
            found.extend(dict.fromkeys(entry[4][0] for entry in socket.getaddrinfo(name, None)))
        except (OSError, UnicodeError):
            pass

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE_S)
    return list(found)
