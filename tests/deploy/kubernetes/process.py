"""`python -m tests.deploy.kubernetes.process FOLDER`: the fake API server as a process, for a pod elsewhere.

FOLDER has what a pod gets to see (`token`, `ca.crt` with its `key.pem`, `namespace`), `rules.json`, the rules of the
Role that the token has, and `objects.json`, what is there at first. Prints its port; when standard input ends, the
calls that were made.
"""

from __future__ import annotations

import json
import ssl
import sys
from pathlib import Path

from tests.deploy.kubernetes.fake_api import FakeKubernetes


def main(folder: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "key.pem")
    server = FakeKubernetes(context)
    server.tokens[(folder / "token").read_text()] = "autoscaler"
    server.roles["autoscaler"] = json.loads((folder / "rules.json").read_text())
    for item in json.loads((folder / "objects.json").read_text()):
        server.add(item)
    print(server.url.rpartition(":")[2], flush=True)
    sys.stdin.read()
    print(json.dumps({"seen": [[s.verb, s.resource, s.status] for s in server.seen]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
