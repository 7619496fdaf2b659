"""The artifacts of the local W&B server (`wandb_server.py`)."""

from dataclasses import dataclass, field
from typing import Any

ENTITY = "somebody"


@dataclass
class Artifact:
    """One version of an artifact."""

    id: str
    sent: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    """Name -> MD5 of each announced file."""
    committed: bool = False


class ArtifactAnswers:
    """Stores artifacts and answers queries about them."""

    def __init__(self) -> None:
        self.artifacts: list[Artifact] = []
        self.url = ""
        """Address of the server."""

    def _artifact_type(self, variables: dict[str, Any]) -> dict[str, Any]:
        latest = self._latest(variables["name"])
        kind = {"artifactType": {"name": latest.sent["artifactTypeName"]}} if latest else None
        return {"project": {"artifact": kind}}

    def _latest(self, name: str) -> Artifact | None:
        name = name.split(":")[0]
        return next((each for each in reversed(self.artifacts) if each.sent["artifactCollectionName"] == name), None)

    def _membership(self, variables: dict[str, Any]) -> dict[str, Any]:
        latest = self._latest(variables["name"])
        if latest is None:
            return {"project": {"artifactCollectionMembership": None}}
        time = "2026-01-01T00:00:00"
        project = {"id": "1", "internalId": "1", "name": variables["project"], "entity": {"name": ENTITY}}
        collection = {
            "__typename": "ArtifactSequence",
            "name": latest.sent["artifactCollectionName"],
            "project": project,
        }
        artifact = {
            "__typename": "Artifact",
            "id": latest.id,
            "artifactSequence": collection,
            "versionIndex": 0,
            "artifactType": {"name": latest.sent["artifactTypeName"]},
            "description": None,
            "metadata": latest.sent["metadata"],
            "ttlDurationSeconds": -2,
            "ttlIsInherited": False,
            "tags": [],
            "historyStep": None,
            "state": "COMMITTED",
            "size": 1,
            "digest": latest.sent["digest"],
            "commitHash": None,
            "fileCount": len(latest.files),
            "createdAt": time,
            "updatedAt": None,
        }
        membership = {
            "__typename": "ArtifactCollectionMembership",
            "id": "m",
            "versionIndex": 0,
            "createdAt": time,
            "aliases": [{"__typename": "ArtifactAlias", "id": "a", "alias": "latest"}],
            "artifactCollection": collection,
            "artifact": artifact,
        }
        return {"project": {"artifactCollectionMembership": membership}}

    def _create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        values = variables.get("input", variables)
        artifact = Artifact(f"artifact{len(self.artifacts)}", values)
        self.artifacts.append(artifact)
        answer = {"id": artifact.id, "state": "PENDING", "artifactSequence": {"id": "sequence", "latestArtifact": None}}
        return {"createArtifact": {"artifact": answer}}

    def _create_manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/storage/{variables['artifactID']}/{variables['name']}"
        manifest = {
            "id": f"manifest-{variables['artifactID']}",
            "file": {
                "id": "f",
                "name": variables["name"],
                "displayName": variables["name"],
                "uploadUrl": url,
                "uploadHeaders": [],
            },
        }
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def _create_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for spec in variables.get("input", variables).get("artifactFiles", []):
            artifact = next(each for each in self.artifacts if each.id == spec["artifactID"])
            artifact.files[spec["name"]] = spec["md5"]
            url = f"{self.url}/storage/{artifact.id}/{spec['name']}"
            nodes.append(
                {
                    "id": spec["name"],
                    "name": spec["name"],
                    "displayName": spec["name"],
                    "uploadUrl": url,
                    "uploadHeaders": [],
                    "uploadMultipartUrls": None,
                    "storagePath": spec["name"],
                    "artifact": {"id": artifact.id},
                }
            )
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _commit(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = next(each for each in self.artifacts if each.id == variables["artifactID"])
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.sent["digest"]}}}
