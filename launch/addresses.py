"""Which interface the processes of several hosts should meet on, and whether strangers can reach it."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct


def interface_towards(host: str) -> str | None:
    """Return the interface for what this host sends to `host`; None where that is loopback's, or IPv4 has no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: the kernel looks the route up
            source = probe.getsockname()[0]
    except (OSError, UnicodeError):
        return None
    if ipaddress.ip_address(source).is_loopback:
        return None
    return next((name for _, name in socket.if_nameindex() if address_of(name) == source), None)


def address_of(interface: str) -> str | None:
    """Return the IPv4 address of an interface; None where it has none, or is not there."""
    get_address = 0x8915  # SIOCGIFADDR of netdevice(7)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
            found = fcntl.ioctl(any_socket, get_address, struct.pack("16s24x", interface.encode()))
    except OSError:
        return None
    return socket.inet_ntoa(found[20:24])


def warning_about(address: str) -> str | None:
    """Return what to say where processes are to listen on an address that the internet may reach."""
    try:
        if not ipaddress.ip_address(address).is_global:
            return None
    except ValueError:
        return None
    return (f"the towers listen on {address}, which the internet may reach, and RPC does what its peers say: name a "
            "private interface in TP_SOCKET_IFNAME and GLOO_SOCKET_IFNAME, or have a firewall admit only their hosts")
