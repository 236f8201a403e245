"""The part of W&B's API that runs, sweeps, agents, artifacts and ``wandb sync`` use, on the loopback interface."""

import base64
import gzip
import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.helpers.graphql import answer, operation

ENTITY = {"id": "e", "name": "me"}


class SyncedRun:
    """What arrived of one run.

    Attributes:
        fields: of the run itself: ``displayName``, ``groupName``, ``sweep``, ``project``.
        config: the configuration, by key.
        history: the rows that were logged.
        summary: the summary, as it was last.
        exit_code: how it ended; None while it has not.
        files: names of the files that were uploaded.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.files: set[str] = set()

    def stream(self, body: dict[str, Any]) -> None:
        """Take in a part of what a run sends while it is alive."""
        for name, chunk in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                rows = [json.loads(line) for line in chunk["content"]]
                assert chunk["offset"] <= len(self.history), "a run that is continued says where it goes on"
                self.history[chunk["offset"] : chunk["offset"] + len(rows)] = rows
            if name == "wandb-summary.json":
                self.summary = json.loads(chunk["content"][-1])
        if body.get("complete"):
            self.exit_code = body.get("exitcode")


class WandbServer:
    """Takes in runs and their artifacts, hands those out again, and gives one sweep's runs to an agent.

    What it answers is cut to what was asked (:func:`tests.helpers.graphql.answer`), and read by W&B's own clients: by
    wandb-core, and what is said about artifacts by classes that were generated from W&B's schema.

    Args:
        sweep: YAML of the sweep, as the agent reads its command from it.
        batches: commands for the agent: lists that are sent one after the other, each once no run is alive. ``exit``
            comes after the last.

    Attributes:
        runs: what arrived, by the run's id.
        artifacts: all versions of all artifacts, in the order of their creation.
        used: names of the artifacts that runs have used.
        unknown: operations that it has no answer for.
    """

    def __init__(self, sweep: str = "", batches: list[list[dict[str, Any]]] | None = None) -> None:
        self.sweep, self.batches = sweep, list(batches or [])
        self.stop_when: dict[str, Callable[[], bool]] = {}
        self.alive: list[set[str]] = []
        self.runs: dict[str, SyncedRun] = defaultdict(SyncedRun)
        self.artifacts: list[dict[str, Any]] = []
        self.used: list[str] = []
        self.unknown: list[str] = []
        self.stored: dict[str, bytes] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.owner = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)

    def __enter__(self) -> "WandbServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def graphql(self, query: str, given: dict[str, Any]) -> Any:
        """Answer a query."""
        name = operation(query)
        known: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "UpsertBucket": self._upsert,
            "RunResumeStatus": lambda v: {
                "model": {"name": v["project"], "entity": ENTITY, "bucket": self._run(v["name"])}
            },
            "CreateRunFiles": self._run_files,
            "CreateArtifact": self._create_artifact,
            "CreateArtifactFiles": self._artifact_files,
            "CreateArtifactManifest": self._manifest,
            "UpdateArtifactManifest": self._manifest,
            "CommitArtifact": self._commit,
            "UseArtifact": self._use,
            "ArtifactMembershipByName": lambda v: {
                "project": {"artifactCollectionMembership": self._membership(v["name"])}
            },
            "FetchArtifactManifest": lambda v: {"artifact": self._artifact(v["id"])},
            "GetArtifactMembershipFileUrls": lambda v: {"project": {"artifactCollection": self._file_urls(v)}},
            "ArtifactByID": lambda v: {"artifact": self._artifact(v["id"])},
        }
        if name == "UpsertSweep":
            self.sweep = given["config"]
        if name in known:
            return answer(query, known[name](given))
        if "agentHeartbeat" in query:
            alive = set(json.loads(given["runState"] or "{}"))
            self.alive.append(alive)
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(self._commands(alive))}}
        user = {"id": "u", "entity": "me", "username": "me", "name": "me", "email": "", "flags": "{}"}
        fixed = {
            "createAgent": {"createAgent": {"agent": {"id": "agent"}}},
            "upsertSweep": {
                "upsertSweep": {
                    "configValidationWarnings": [],
                    "sweep": {"name": "sweep", "project": {"name": "p", "entity": ENTITY}},
                }
            },
            "SweepWithRuns": {
                "project": {"sweep": {"id": "s", "name": "sweep", "config": self.sweep, "runs": {"edges": []}}}
            },
            "viewer": {"viewer": {**user, "admin": False, "teams": {"edges": []}}},
            "serverInfo": {"serverInfo": {"features": []}},
        }
        for word, data in fixed.items():
            if word in query:
                return answer(query, data)
        self.unknown.append(name)
        return answer(query, {})

    def _commands(self, alive: set[str]) -> list[dict[str, Any]]:
        stops = [run for run in alive if run in self.stop_when and self.stop_when[run]()]
        if stops:
            return [{"type": "stop", "run_id": run} for run in stops]
        if alive:
            return []
        return self.batches.pop(0) if self.batches else [{"type": "exit"}]

    def _upsert(self, given: dict[str, Any]) -> dict[str, Any]:
        inserted = given["name"] not in self.runs
        run = self.runs[given["name"]]
        run.fields |= {k: v for k, v in given.items() if v is not None and k != "config"}
        run.config |= {k: v["value"] for k, v in json.loads(given.get("config") or "{}").items()}
        return {"upsertBucket": {"bucket": self._run(given["name"]), "inserted": inserted}}

    def _run(self, id: str) -> dict[str, Any] | None:
        if id not in self.runs:
            return None
        run = self.runs[id]
        return {
            "id": id,
            "name": id,
            "displayName": run.fields.get("displayName", ""),
            "config": json.dumps({k: {"value": v} for k, v in run.config.items()}),
            "project": {"id": "p", "name": run.fields["project"], "entity": ENTITY},
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.history),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": [],
            "runInfo": {"args": []},
        }

    def _run_files(self, given: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": f, "uploadUrl": f"{self.url}/up/{given['run']}/{f}"} for f in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    # Artifacts ------------------------------------------------------------------------------------------------------

    def _create_artifact(self, given: dict[str, Any]) -> dict[str, Any]:
        asked = given["input"]
        collection = asked["artifactCollectionName"]
        versions = [a for a in self.artifacts if a["artifactSequence"]["name"] == collection]
        same = next((a for a in versions if a["digest"] == asked["digest"]), None)
        project = {"id": "p", "internalId": "p", "name": asked["projectName"], "entity": ENTITY}
        artifact = same or {
            "__typename": "Artifact",
            "id": f"artifact-{len(self.artifacts)}",
            "state": "PENDING",
            "artifactSequence": {"__typename": "ArtifactSequence", "name": collection, "project": project},
            "versionIndex": len(versions),
            "artifactType": {"name": asked["artifactTypeName"]},
            "metadata": asked["metadata"],
            "tags": [],
            "ttlIsInherited": True,
            "size": 0,
            "digest": asked["digest"],
            "currentManifest": {"file": {"directUrl": f"{self.url}/artifact/artifact-{len(self.artifacts)}/manifest"}},
            "digestAlgorithm": "MANIFEST_MD5",
            "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00Z",
            "ttlDurationSeconds": -1,
            "names": [],
            "files": {},
        }
        if same is None:
            self.artifacts.append(artifact)
        for alias in [alias["alias"] for alias in asked["aliases"]]:
            for other in versions:
                other["names"] = [name for name in other["names"] if name != alias]
            artifact["names"].append(alias)
        latest = next((a for a in reversed(versions) if a["state"] == "COMMITTED"), None)
        return {"createArtifact": {"artifact": {**artifact, "artifactSequence": {"latestArtifact": latest}}}}

    def _artifact(self, id: str) -> dict[str, Any]:
        return next(a for a in self.artifacts if a["id"] == id)

    def _membership(self, name: str) -> dict[str, Any] | None:
        collection, _, alias = name.partition(":")
        for artifact in self.artifacts:
            sequence = artifact["artifactSequence"]
            if sequence["name"] == collection and alias in (*artifact["names"], f"v{artifact['versionIndex']}"):
                aliases = [{"__typename": "ArtifactAlias", "id": n, "alias": n} for n in artifact["names"]]
                about = {"__typename": "ArtifactCollectionMembership", "id": "m", "createdAt": artifact["createdAt"]}
                return {
                    **about,
                    "versionIndex": artifact["versionIndex"],
                    "aliases": aliases,
                    "artifactCollection": sequence,
                    "artifact": artifact,
                }
        return None

    def _artifact_files(self, given: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for file in given["input"]["artifactFiles"]:
            path = f"artifact/{file['artifactID']}/{file['md5']}"
            artifact = self._artifact(file["artifactID"])
            artifact["files"][file["name"]] = f"{self.url}/{path}"
            about = {"storagePath": path, "uploadUrl": f"{self.url}/{path}", "uploadHeaders": []}
            nodes.append({**about, "artifact": artifact})
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _file_urls(self, given: dict[str, Any]) -> dict[str, Any] | None:
        found = self._membership(f"{given['collection']}:{given['alias']}")
        if found is None:
            return None
        files = [{"__typename": "File", "name": n, "directUrl": u} for n, u in found["artifact"]["files"].items()]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        connection = {"pageInfo": page, "edges": [{"node": file} for file in files]}
        return {"__typename": "ArtifactSequence", "artifactMembership": {"files": connection}}

    def _manifest(self, given: dict[str, Any]) -> dict[str, Any]:
        id = given.get("artifactID") or given["artifactManifestID"]
        file = {"id": "f", "uploadUrl": f"{self.url}/artifact/{id}/manifest", "uploadHeaders": []}
        about = {"artifactManifest": {"id": id, "file": file}}
        return {"createArtifactManifest": about, "updateArtifactManifest": about}

    def _commit(self, given: dict[str, Any]) -> dict[str, Any]:
        artifact = self._artifact(given["artifactID"])
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": artifact}}

    def _use(self, given: dict[str, Any]) -> dict[str, Any]:
        id = (given.get("input") or given)["artifactID"]
        self.used.append(id)
        return {"useArtifact": {"artifact": self._artifact(id)}}


class _Handler(BaseHTTPRequestHandler):
    @property
    def _owner(self) -> WandbServer:
        return self.server.owner  # type: ignore[attr-defined,no-any-return]

    def _body(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(raw) if self.headers.get("Content-Encoding") == "gzip" else raw

    def _reply(self, content: dict[str, Any] | bytes) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self) -> None:
        self._reply(self._owner.stored.get(self.path, {}))

    def do_PUT(self) -> None:
        body = self._body()
        _, kind, owner, name = self.path.split("/", 3)
        if kind == "up":
            self._owner.runs[owner].files.add(name)
        elif name != "manifest":
            assert name == base64.b64encode(hashlib.md5(body).digest()).decode(), "a file arrives as it was"
        self._owner.stored[self.path] = body
        self._reply({})

    def do_POST(self) -> None:
        raw = self._body()
        if self.path == "/graphql":
            body = json.loads(raw)
            self._reply({"data": self._owner.graphql(body["query"], body.get("variables") or {})})
            return
        if self.path.endswith("/file_stream"):
            self._owner.runs[self.path.split("/")[-2]].stream(json.loads(raw))
        self._reply({})

    def log_message(self, *_: object) -> None:
        """Say nothing."""
