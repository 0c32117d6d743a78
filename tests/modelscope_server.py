"""A ModelScope of one repository on the loopback, with the misbehaviours of tests/hub_server.py."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qs

from tests.hub_server import REPO_ID, Answer, HubServer, Request, _Handler, _ranged, sha256_of


class ModelScopeServer(HubServer):
    """Lists the files with size and SHA-256, and sends them from where a Range asks."""

    def handler(self) -> type[_Handler]:
        return _ModelScopeHandler

    def of(self, name: str) -> list[Request]:
        return [r for r in self.requests if parse_qs(r.query).get("FilePath") == [name]]

    def listing(self) -> dict[str, Any]:
        files = [{"Type": "tree", "Path": "folder", "Name": "folder"}]
        files += [
            {
                "Type": "blob",
                "Path": name,
                "Name": name.rpartition("/")[2],
                "Size": len(content),
                "Sha256": sha256_of(content),
                "IsLFS": name.endswith(self.large),
                "Revision": "c0ffee",
            }
            for name, content in self.files.items()
        ]
        return {"Code": 200, "Data": {"Files": files}, "Message": "success", "Success": True}


class _ModelScopeHandler(_Handler):
    def _route(self, request: Request) -> tuple[str, Answer]:
        query = {name: values[0] for name, values in parse_qs(request.query).items()}
        here = f"/api/v1/models/{REPO_ID}/repo"
        if query.get("Revision") != "master" or not request.path.startswith(here):
            return "", Answer(404, {}, b'{"Code": 10010205001, "Message": "not found"}')
        if request.path == f"{here}/files":
            body = json.dumps(self.hub.listing()).encode()
            return "api", Answer(200, {"Content-Type": "application/json"}, body)
        name = query.get("FilePath", "")
        if name not in self.hub.files:
            return "", Answer(404, {}, b"")
        whole = Answer(
            200,
            {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"},
            self.hub.files[name],
        )
        self.hub.fault(name, late=False)(whole)
        return name, _ranged(whole, request.headers.get("range"))
