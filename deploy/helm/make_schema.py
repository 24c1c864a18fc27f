"""Writes the chart's values.schema.json: Kubernetes' part from here, that of the cluster spec from tercet.spec.

python deploy/helm/make_schema.py [--check]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tercet.spec import ClusterSpec

Schema = dict[str, Any]
PATH = Path(__file__).parent / "tercet" / "values.schema.json"

TEXT: Schema = {"type": "string"}
NAME: Schema = {"type": "string", "pattern": r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"}
NO_NAME: Schema = {"type": "string", "pattern": r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?)?$"}  # or empty
KEY: Schema = {"type": "string", "pattern": r"^[A-Za-z0-9._-]+$"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 4096}
SOME: Schema = {**COUNT, "minimum": 1}
PORT: Schema = {"type": "integer", "minimum": 1024, "maximum": 65535}  # nobody here may take one below
QUANTITY: Schema = {"anyOf": [{"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|[kMGTPE]i?)?$"}, {"type": "number"}]}
LABEL_VALUE: Schema = {"type": "string", "pattern": r"^([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?$"}
LABEL_KEY = r"^([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$"
TEXTS: Schema = {"type": "object", "additionalProperties": TEXT}
FREE: Schema = {"type": "object"}  # Kubernetes checks it
OBJECTS: Schema = {"type": "array", "items": FREE}


def fields(*required: str, **properties: Schema) -> Schema:
    """A map of these keys and no others."""
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}


def any_key(pattern: str, value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "patternProperties": {pattern: value}}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def resources(cpu: Schema) -> Schema:
    amounts = {"type": "object", "properties": {"cpu": cpu, "memory": QUANTITY}, "additionalProperties": QUANTITY}
    return fields("limits", limits={**amounts, "required": ["cpu", "memory"]}, requests=amounts)


SECRET = fields(secretName=NO_NAME, secretKey=KEY)
BUDGET = fields("maxUnavailable", maxUnavailable={"anyOf": [COUNT, {"type": "string", "pattern": "^[0-9]{1,3}%$"}]})
PLACE = {  # of a pod
    "nodeSelector": TEXTS,
    "tolerations": OBJECTS,
    "affinity": FREE,
    "podAnnotations": TEXTS,
    "priorityClassName": NO_NAME,
    "runtimeClassName": NO_NAME,
    "shmSize": QUANTITY,
    "tmpSize": QUANTITY,
}
LABELS: Schema = {**any_key(LABEL_KEY, LABEL_VALUE), "properties": {"pool": False}}  # which is the pool's name
POOL = fields(
    "accelerator",
    "replicas",
    "resources",
    accelerator=one_of("cpu", "gpu", "npu"),
    replicas=SOME,
    labels=LABELS,
    resources=resources(SOME),  # whole cores, as Ray counts them
    rdma=fields(
        "resource", "count", resource={"type": "string", "pattern": "^[a-z0-9.-]+/[A-Za-z0-9._-]+$"}, count=SOME
    ),
    **PLACE,
)
SCALE = fields(
    "maxReplicas",
    maxReplicas=SOME,
    targetCpuUtilization={"type": "integer", "minimum": 1, "maximum": 100},
    prometheus=fields(
        "serverAddress", "query", "threshold", serverAddress=TEXT, query=TEXT, threshold={"type": ["string", "number"]}
    ),
)
POOL_NAME = r"^[a-z]([a-z0-9-]{0,28}[a-z0-9])?$"
DIGEST: Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"}
ARTIFACTS: Schema = {
    "type": "string",
    "pattern": r"^(hf://[A-Za-z0-9._-]+/[A-Za-z0-9._-]+|pvc://[a-z0-9.-]+/[^ ]+|package:[A-Za-z0-9._-]+)$",
}


def kubernetes() -> dict[str, Schema]:
    """The values that are no part of a spec."""
    return {
        "nameOverride": NO_NAME,
        "fullnameOverride": {"type": "string", "pattern": "^([a-z]([a-z0-9-]{0,36}[a-z0-9])?)?$"},
        "image": fields(
            "repository",
            repository={"type": "string", "minLength": 1},
            tag={"type": "string", "pattern": "^[A-Za-z0-9_.-]{0,128}$", "not": {"const": "latest"}},
            digest=DIGEST,
            pullPolicy=one_of("Always", "IfNotPresent", "Never"),
            pullSecrets={"type": "array", "items": NAME},
        ),
        "modelArtifacts": fields("uri", uri=ARTIFACTS, hfToken=SECRET, cache=fields(size=QUANTITY, claim=NO_NAME)),
        "pools": any_key(POOL_NAME, POOL),
        "apiKey": SECRET,
        "tls": fields(
            gateway=fields(secretName=NO_NAME),
            workers=fields(secretName=NO_NAME, name={"type": "string", "minLength": 1}),
        ),
        "tracing": fields(
            otlpEndpoint={"type": "string", "pattern": "^(https?://[^ /]+/?)?$"},
            sampleRatio={"type": "number", "minimum": 0, "maximum": 1},
        ),
        "network": fields(hostNetwork=FLAG),
        "ray": fields(
            "mode",
            mode=one_of("kuberay", "plain"),
            submitter=one_of("sidecar", "rayjob"),
            version={"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+$"},
            auth=fields(secretName=NO_NAME),
            startTimeoutSeconds={"type": "integer", "minimum": 10, "maximum": 86400},
        ),
        "head": fields("resources", resources=resources(QUANTITY), serveResources=resources(QUANTITY), **PLACE),
        "serviceAccount": fields(create=FLAG, name=NO_NAME, annotations=TEXTS),
        "service": fields(
            type=one_of("ClusterIP", "NodePort", "LoadBalancer"), annotations=TEXTS, grpcAppProtocol=TEXT
        ),
        "podDisruptionBudget": fields(enabled=FLAG, head=BUDGET, pools=BUDGET),
        "networkPolicy": fields(
            enabled=FLAG, clients=OBJECTS, monitoring=OBJECTS, operatorNamespace=NO_NAME, extraEgress=OBJECTS
        ),
        "monitoring": fields(
            podMonitor=fields(
                enabled=FLAG, interval={"type": "string", "pattern": "^[0-9]+(s|m)$"}, labels=TEXTS, apiKey=SECRET
            )
        ),
        "autoscaling": autoscaling(),
        "test": fields(question={"type": "string", "minLength": 1}, apiKey=SECRET),
        "env": {"type": "array", "items": {"type": "object", "required": ["name"], "properties": {"name": TEXT}}},
    }


def autoscaling() -> Schema:
    """What scales a pool goes with the kind."""
    whole = fields("kind", kind=one_of("none", "hpa", "keda"), pools=any_key(POOL_NAME, SCALE))
    for kind, key in (("hpa", "targetCpuUtilization"), ("keda", "prometheus")):
        wanted = {"properties": {"pools": {"additionalProperties": {"required": [key]}}}}
        whole.setdefault("allOf", []).append({"if": {"properties": {"kind": {"const": kind}}}, "then": wanted})
    return whole


def of_spec() -> tuple[dict[str, Schema], dict[str, Schema]]:
    """The values that a spec takes unchanged, and the definitions that they refer to."""
    whole = ClusterSpec.model_json_schema()
    found: dict[str, Schema] = whole["$defs"]
    for name in ("source", "vision"):
        del found["ModelSpec"]["properties"][name]
    found["ModelSpec"]["properties"]["vision"] = {"type": "string", "pattern": "^/model/"}
    gateway = found["GatewaySpec"]["properties"]
    host = {"type": "string", "minLength": 1}
    values = {
        "model": {"$ref": "#/$defs/ModelSpec"},
        "topology": whole["properties"]["topology"],
        "roles": whole["properties"]["roles"],
        **{part: {"$ref": f"#/$defs/{part.title()}Spec"} for part in ("transfer", "limits", "logging")},
        "gateway": fields(
            host=host, httpPort=PORT, grpcPort=PORT, cors_origins=gateway["cors_origins"], images=gateway["images"]
        ),
    }
    unused = {"ClusterSpec", "GatewaySpec", "ListenSpec", "NetworkSpec", "PeerTlsSpec", "PoolSpec", "RaySpec"}
    unused |= {"TlsSpec", "TracingSpec"}
    return values, {name: schema for name, schema in found.items() if name not in unused}


def without_notes(schema: Any) -> Any:
    """Of pydantic's schema what checks. A key named title or default would be in `properties`, which is kept whole."""
    if isinstance(schema, list):
        return [without_notes(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: without_notes(one) for name, one in value.items()} if key == "properties" else without_notes(value)
        for key, value in schema.items()
        if key not in {"title", "description", "default"}
    }


def text() -> str:
    values, definitions = of_spec()
    properties = {**kubernetes(), **values, "global": FREE}  # global: Helm's, of charts that have this one below them
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the chart tercet; written by deploy/helm/make_schema.py",
        **without_notes(fields(*values, "image", "modelArtifacts", "pools", "ray", "head", **properties)),
        "$defs": without_notes(definitions),
    }
    return json.dumps(schema, indent=1) + "\n"


def main() -> None:
    if sys.argv[1:] != ["--check"]:
        PATH.write_text(text())
    elif PATH.read_text() != text():
        sys.exit(f"{PATH} is stale: run python {Path(__file__).name}")


if __name__ == "__main__":
    main()
