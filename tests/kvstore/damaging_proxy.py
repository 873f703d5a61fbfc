"""A TCP proxy that damages what a peer sends: `python -m tests.kvstore.damaging_proxy UPSTREAM EDITS`.

EDITS is JSON: {"hold": N, "turns": [...], "edits": [...]}. Of each connection the first N bytes from the peer are held
back, edited and sent on, at the turns what came up to there: then the client answers. What follows passes as it is.
An edit is {"at": offset} and one of "xor": byte, "replace": hex,
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
        edits = plan["edits"]
        assert isinstance(edits, list)
        held, num_sent, end = bytearray(), 0, ""
        # The first message must not wait for the rest of what is held: the client answers after it.
        for border in (24, *plan.get("turns", []), plan["hold"]):  # type: ignore[misc]
            while len(held) < border and (chunk := server.recv(border - len(held))):
                held += chunk
            sent, end = damage(held, [edit for edit in edits if num_sent <= edit["at"] < border])
            client.sendall(sent[num_sent:])
            num_sent = border
            if end:
                break
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
