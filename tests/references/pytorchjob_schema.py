"""What a PyTorchJob (kubeflow.org/v1) and what goes with it may hold, as JSON schemas that refuse unknown keys.

Written from the field names and types of Kubeflow's Training Operator 1.9 and of Kubernetes' core/v1, reduced to what
the examples use and what stands next to it. The operator's own definition is kubeflow.org_pytorchjobs.yaml under
manifests/base/crds in github.com/kubeflow/training-operator at v1.9.0; every key here is one of it, with its type.
Unlike it, this refuses what a cluster would drop in silence.
"""

from __future__ import annotations

TEXT = {"type": "string", "minLength": 1}
WHOLE = {"type": "integer", "minimum": 0}
FLAG = {"type": "boolean"}
TEXTS = {"type": "array", "items": {"type": "string"}}
TEXT_BY_NAME = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY = {"type": ["integer", "string"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|[KMGTPE]i?)?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}


def _one_of(*values: str) -> dict:
    return {"enum": list(values)}


def _fields(*required: str, **properties: dict) -> dict:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list_of(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": 1}


METADATA = _fields("name", name=TEXT, namespace=TEXT, labels=TEXT_BY_NAME, annotations=TEXT_BY_NAME)
TEMPLATE_METADATA = _fields(labels=TEXT_BY_NAME, annotations=TEXT_BY_NAME)

_KEY = _fields("key", "name", key=TEXT, name=TEXT, optional=FLAG)
ENVIRONMENT = _fields(
    "name",
    name={"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
    value={"type": "string"},
    valueFrom=_fields(
        fieldRef=_fields("fieldPath", apiVersion=TEXT, fieldPath=TEXT), configMapKeyRef=_KEY, secretKeyRef=_KEY
    ),
)
CAPABILITIES = _fields(add=TEXTS, drop=TEXTS)
SECCOMP = _fields("type", type=_one_of("RuntimeDefault", "Localhost", "Unconfined"), localhostProfile=TEXT)
_SECURITY = {
    "runAsNonRoot": FLAG,
    "runAsUser": WHOLE,
    "runAsGroup": WHOLE,
    "seccompProfile": SECCOMP,
}
CONTAINER = _fields(
    "name",
    "image",
    name=TEXT,
    image=TEXT,
    imagePullPolicy=_one_of("Always", "IfNotPresent", "Never"),
    workingDir=TEXT,
    command=TEXTS,
    args=TEXTS,
    ports=_list_of(
        _fields(
            "containerPort",
            name={"type": "string", "maxLength": 15},
            containerPort={"type": "integer", "minimum": 1, "maximum": 65535},
            protocol=_one_of("TCP", "UDP", "SCTP"),
        )
    ),
    env=_list_of(ENVIRONMENT),
    resources=_fields(requests=QUANTITIES, limits=QUANTITIES),
    securityContext=_fields(
        **_SECURITY,
        allowPrivilegeEscalation=FLAG,
        privileged=FLAG,
        readOnlyRootFilesystem=FLAG,
        capabilities=CAPABILITIES,
    ),
    volumeMounts=_list_of(
        _fields("name", "mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG, subPath={"type": "string"})
    ),
)
VOLUME = _fields(
    "name",
    name=TEXT,
    persistentVolumeClaim=_fields("claimName", claimName=TEXT, readOnly=FLAG),
    configMap=_fields(name=TEXT, defaultMode=WHOLE, optional=FLAG),
    emptyDir=_fields(medium=_one_of("", "Memory"), sizeLimit=QUANTITY),
)
POD = _fields(
    "containers",
    containers=_list_of(CONTAINER),
    initContainers=_list_of(CONTAINER),
    volumes=_list_of(VOLUME),
    securityContext=_fields(
        **_SECURITY, fsGroup=WHOLE, fsGroupChangePolicy=_one_of("OnRootMismatch", "Always"), supplementalGroups={}
    ),
    terminationGracePeriodSeconds=WHOLE,
    nodeSelector=TEXT_BY_NAME,
    tolerations={"type": "array"},
    affinity={"type": "object"},
    hostNetwork=FLAG,
    hostIPC=FLAG,
    priorityClassName=TEXT,
    schedulerName=TEXT,
    serviceAccountName=TEXT,
    imagePullSecrets=_list_of(_fields(name=TEXT)),
)
REPLICAS = _fields(
    "template",
    replicas=WHOLE,
    restartPolicy=_one_of("Always", "OnFailure", "Never", "ExitCode"),
    template=_fields("spec", metadata=TEMPLATE_METADATA, spec=POD),
)
JOB_SPEC = _fields(
    "pytorchReplicaSpecs",
    nprocPerNode={"type": "string", "pattern": "^(auto|cpu|gpu|[1-9][0-9]*)$"},
    runPolicy=_fields(
        cleanPodPolicy=_one_of("All", "Running", "None"),
        backoffLimit=WHOLE,
        activeDeadlineSeconds=WHOLE,
        ttlSecondsAfterFinished=WHOLE,
        suspend=FLAG,
        managedBy=TEXT,
        schedulingPolicy=_fields(
            minAvailable=WHOLE,
            queue=TEXT,
            priorityClass=TEXT,
            scheduleTimeoutSeconds=WHOLE,
            minResources=QUANTITIES,
        ),
    ),
    elasticPolicy=_fields(
        minReplicas=WHOLE,
        maxReplicas=WHOLE,
        maxRestarts=WHOLE,
        rdzvBackend=TEXT,
        rdzvHost=TEXT,
        rdzvPort=WHOLE,
        rdzvId=TEXT,
        rdzvConf=_list_of(_fields(key=TEXT, value=TEXT)),
        standalone=FLAG,
    ),
    pytorchReplicaSpecs={**_fields(Master=REPLICAS, Worker=REPLICAS), "minProperties": 1},
)


def _resource(api_version: str, kind: str, **properties: dict) -> dict:
    named = {"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": METADATA}
    return _fields(*named, *properties, **named, **properties)


KINDS = {
    "ConfigMap": _resource("v1", "ConfigMap", data=TEXT_BY_NAME),
    "PersistentVolumeClaim": _resource(
        "v1",
        "PersistentVolumeClaim",
        spec=_fields(
            "accessModes",
            "resources",
            accessModes=_list_of(_one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")),
            resources=_fields("requests", requests=QUANTITIES, limits=QUANTITIES),
            storageClassName={"type": "string"},
            volumeName=TEXT,
            volumeMode=_one_of("Filesystem", "Block"),
        ),
    ),
    "PyTorchJob": _resource("kubeflow.org/v1", "PyTorchJob", spec=JOB_SPEC),
}
