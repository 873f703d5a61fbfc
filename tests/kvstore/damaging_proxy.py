"""A TCP proxy that damages what a peer sends: `python -m tests.kvstore.damaging_proxy UPSTREAM EDITS`.

EDITS is JSON: {"hold": N, "edits": [...]}. Of each connection the first N bytes from the peer are held back, edited and
sent on; what follows passes as it is. An edit is {"at": offset} and one of "xor": byte, "replace": hex,
"swap": [other offset, length], "cut": true (nothing from there on, closed), "stall": true (nothing from there on).
Prints its port.
"""

import json
import socket
import sys
import threading
import time


def damage(held: bytearray, edits: list[dict[str, object]]) -> tuple[bytes, str]:
    """The edited bytes, and what is to follow: "", "cut" or "stall"."""
    for edit in edits:
        at = int(str(edit["at"]))
        if "xor" in edit:
            held[at] ^= int(str(edit["xor"]))
        elif "replace" in edit:
            content = bytes.fromhex(str(edit["replace"]))
            held[at : at + len(content)] = content
        elif "swap" in edit:
            other, length = edit["swap"]  # type: ignore[misc]
            one = bytes(held[at : at + length])
            held[at : at + length] = held[other : other + length]
            held[other : other + length] = one
        else:
            return bytes(held[:at]), "cut" if "cut" in edit else "stall"
    return bytes(held), ""


def pump(source: socket.socket, target: socket.socket) -> None:
    """Everything, until the source ends."""
    try:
        while chunk := source.recv(65536):
            target.sendall(chunk)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def serve(client: socket.socket, upstream: str, plan: dict[str, object]) -> None:
    """One connection."""
    host, _, port = upstream.rpartition(":")
    with client, socket.create_connection((host, int(port))) as server:
        threading.Thread(target=pump, args=(client, server), daemon=True).start()
        # The first message must not wait for the rest of what is held: the client speaks after it.
        hello = server.recv(24, socket.MSG_WAITALL)
        edits = plan["edits"]
        assert isinstance(edits, list)
        first = [edit for edit in edits if edit["at"] < 24]
        sent, end = damage(bytearray(hello), first)
        client.sendall(sent)
        held = bytearray(hello)
        while not end and len(held) < int(str(plan["hold"])) and (chunk := server.recv(65536)):
            held += chunk
        sent, end = damage(held, [edit for edit in edits if edit["at"] >= 24]) if not end else (b"", end)
        client.sendall(sent[24:])
        if end == "stall":
            time.sleep(60)
        elif not end:
            pump(server, client)


def main(upstream: str, plan: dict[str, object]) -> None:
    """Serves until it is killed."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=serve, args=(client, upstream, plan), daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
