"""Manifests by option, and those of a plan that replaces another."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import msgspec.structs
import pytest
from jsonschema import Draft202012Validator, ValidationError
from rendered import containers, kustomized, of_kind, pods, selects, word_after

from onnxsplit.errors import InputError, PlanError
from onnxsplit.plan_files import parse_plan
from runtime.deploy.folder import write
from runtime.deploy.kubernetes import DeployOptions, manifests, replace_commands
from runtime.deploy.names import pull_policy
from runtime.wire.keys import Keys, revoke

GOLDEN = Path(__file__).parents[2] / "tests" / "onnxsplit" / "golden_plan.json"
OPTIONS = DeployOptions(name="reader", image="registry.example/onnxsplit:0.1.0", claim="plans")
ALL = replace(OPTIONS, token=True, tls_secret="web", network_policy=True, service_monitor=True)
DIGEST = "sha256:" + "0123456789abcdef" * 4
NAME, COMPONENT, VERSION = (f"app.kubernetes.io/{word}" for word in ("name", "component", "version"))


@pytest.fixture
def plan():
    return parse_plan(GOLDEN.read_bytes(), where=GOLDEN)


@pytest.fixture
def longer(plan):
    """A plan with one more stage."""
    extra = msgspec.structs.replace(plan.stages[-1], index=len(plan.stages))
    return msgspec.structs.replace(plan, stages=(*plan.stages, extra))


# Options


def test_without_options_there_is_no_token_no_tls_no_policy_and_no_monitor(plan):
    _, files = manifests(plan, OPTIONS)
    assert "base/network.yaml" not in files
    assert "base/monitor.yaml" not in files
    gateway = pods(files)[0]["spec"]["containers"][0]
    assert not {"--token-file", "--tls-cert", "--tls-key"} & set(gateway["args"])
    assert {gateway[probe]["httpGet"]["scheme"] for probe in gateway if probe.endswith("Probe")} == {"HTTP"}


def test_with_tls_the_gateway_serves_the_certificate_of_the_secret_and_probes_use_it(plan):
    _, files = manifests(plan, replace(OPTIONS, tls_secret="web"))
    spec = pods(files)[0]["spec"]
    (gateway,) = spec["containers"]
    assert (word_after(gateway, "--tls-cert"), word_after(gateway, "--tls-key")) == ("/tls/tls.crt", "/tls/tls.key")
    assert {gateway[probe]["httpGet"]["scheme"] for probe in gateway if probe.endswith("Probe")} == {"HTTPS"}
    (mount,) = [one for one in gateway["volumeMounts"] if one["mountPath"] == "/tls"]
    (volume,) = [one for one in spec["volumes"] if one["name"] == mount["name"]]
    assert volume["secret"]["secretName"] == "web"


def test_a_token_is_made_once_and_another_one_makes_another_release(plan, tmp_path):
    options, file = replace(OPTIONS, token=True), tmp_path / "m" / "base" / "keys" / "token"
    first = write(plan, options, tmp_path / "m")
    token = file.read_text()
    assert len(token) >= 32
    assert file.stat().st_mode & 0o777 == 0o600
    assert write(plan, options, tmp_path / "m").release == first.release
    assert file.read_text() == token
    file.write_text("another-token-of-the-user")
    assert write(plan, options, tmp_path / "m").release != first.release
    assert "another-token" not in "".join(path.read_text() for path in first.files)
    for bad in ("short", "a token with spaces in it", "one-token-and-a-line-end\n"):
        file.write_text(bad)
        with pytest.raises(InputError, match=r"token must hold one token of at least 16 characters.*remove the file"):
            write(plan, options, tmp_path / "m")


def allowed(files, source: dict, target: dict, port: int) -> bool:
    """Whether the policies allow a connection between two pods of the namespace."""
    policies = of_kind(files, "NetworkPolicy").values()
    (container,) = target["spec"]["containers"]
    names = {one["name"]: one["containerPort"] for one in container["ports"]}

    def passes(pod, other, direction, peers) -> bool:
        chosen = [
            policy["spec"]
            for policy in policies
            if selects(policy["spec"]["podSelector"]["matchLabels"], pod["metadata"]["labels"])
            and direction in policy["spec"]["policyTypes"]
        ]
        rules = [rule for spec in chosen for rule in spec.get(direction.lower(), ())]
        return not chosen or any(
            any(names.get(one["port"], one["port"]) == port for one in rule["ports"])
            and any(
                selects(peer["podSelector"]["matchLabels"], other["metadata"]["labels"])
                if "podSelector" in peer
                else peer["namespaceSelector"] == {}
                for peer in rule.get(peers, [{"namespaceSelector": {}}])
            )
            for rule in rules
        )

    return passes(source, target, "Egress", "to") and passes(target, source, "Ingress", "from")


def test_policies_allow_exactly_the_connections_that_a_release_makes(plan, longer):
    _, files = manifests(plan, ALL)
    _, others = manifests(longer, ALL)
    both = {
        f"{number}{path}": documents for number, one in enumerate((files, others)) for path, documents in one.items()
    }
    gateway, first, second = pods(files)
    other_gateway, other_node, *_ = pods(others)
    stranger = {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"ports": []}]}}
    internal = (5555, 5556, 5557)
    for source, target in product((first, second), repeat=2):
        assert allowed(both, source, target, 5558)
    for node in (first, second):
        assert all(allowed(both, node, gateway, port) for port in internal)
        assert allowed(both, gateway, node, 5558)
        assert not allowed(both, node, gateway, 8000), "nodes have nothing to ask there"
        assert not allowed(both, node, node, 22)
    for source in (stranger, other_gateway, other_node):
        assert not allowed(both, source, first, 5558)
        assert not any(allowed(both, source, gateway, port) for port in internal)
    assert allowed(both, stranger, gateway, 8000)
    assert allowed(both, stranger, gateway, 8001)
    for policy in of_kind(both, "NetworkPolicy").values():
        egress = policy["spec"].get("egress")
        dns = [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]
        assert egress is None or {"ports": dns} in egress


MONITOR = {  # the fields of a ServiceMonitor that are used here, as the operator's documentation describes them
    "type": "object",
    "required": ["selector", "endpoints"],
    "additionalProperties": False,
    "properties": {
        "selector": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"matchLabels": {"type": "object", "additionalProperties": {"type": "string"}}},
        },
        "endpoints": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "port": {"type": "string"},
                    "path": {"type": "string"},
                    "scheme": {"enum": ["http", "https"]},
                    "tlsConfig": {"type": "object", "properties": {"insecureSkipVerify": {"type": "boolean"}}},
                    "authorization": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "type": {"type": "string"},
                            "credentials": {
                                "type": "object",
                                "required": ["key"],
                                "additionalProperties": False,
                                "properties": {"name": {"type": "string"}, "key": {"type": "string"}},
                            },
                        },
                    },
                },
            },
        },
    },
}


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("tls", [None, "web"])
def test_a_monitor_finds_the_metrics_with_the_token_and_over_tls(plan, tmp_path, token, tls):
    options = replace(OPTIONS, service_monitor=True, token=token, tls_secret=tls)
    objects = kustomized(write(plan, options, tmp_path / "m").overlay)
    (monitor,) = [one for one in objects if one["kind"] == "ServiceMonitor"]
    Draft202012Validator(MONITOR).validate(monitor["spec"])
    found = [
        one
        for one in objects
        if one["kind"] == "Service"
        and selects(monitor["spec"]["selector"]["matchLabels"], one["metadata"]["labels"])
        and monitor["spec"]["endpoints"][0]["port"] in {port["name"] for port in one["spec"]["ports"]}
    ]
    assert [one["metadata"]["name"] for one in found] == ["reader"]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint.get("scheme", "http") == ("https" if tls else "http")
    assert ("authorization" in endpoint) is token
    if token:
        secret = endpoint["authorization"]["credentials"]
        (held,) = [one for one in objects if one["kind"] == "Secret" and one["metadata"]["name"] == secret["name"]]
        assert set(held["data"]) == {secret["key"]}
    monitor["spec"]["endpoints"][0]["ports"] = []
    with pytest.raises(ValidationError):
        Draft202012Validator(MONITOR).validate(monitor["spec"])


@pytest.mark.parametrize(
    ("image", "policy"),
    [
        ("onnxsplit", "Always"),
        ("onnxsplit:latest", "Always"),
        ("onnxsplit:cpu", "IfNotPresent"),
        ("registry.example:5000/onnxsplit", "Always"),
        ("registry.example:5000/team/one_two/on-nx.split:1.2_b", "IfNotPresent"),
        (f"onnxsplit@{DIGEST}", "IfNotPresent"),
        (f"localhost/onnxsplit:latest@{DIGEST}", "IfNotPresent"),
    ],
)
def test_an_image_is_asked_for_again_only_where_its_name_may_mean_another(plan, image, policy):
    assert pull_policy(image) == policy
    for container in containers(manifests(plan, replace(OPTIONS, image=image))[1]):
        assert (container["image"], container["imagePullPolicy"]) == (image, policy)


@pytest.mark.parametrize(
    "image",
    [
        *("", "a b", "Onnxsplit", "a:", ":1", "a@", "a/", "/a", "a//b", "a:1:2", "a@sha256:12", "registry.example:x/a"),
        *("a@" + DIGEST.upper(), f"a@{DIGEST}0", f"{DIGEST}@a", "a:" + "1" * 129, "https://a/b", "a\n", "a" * 600),
    ],
)
def test_what_is_no_image_is_refused(plan, image):
    with pytest.raises(InputError, match=r"is not a container image; allowed: .*--image") as refused:
        manifests(plan, replace(OPTIONS, image=image))
    assert len(str(refused.value)) < 400


# Releases


def test_a_release_names_the_plan_and_all_that_its_pods_are_made_of(plan, longer):
    first, _ = manifests(plan, OPTIONS)
    assert re.fullmatch(r"r[0-9a-f]{7}", first)
    assert manifests(plan, OPTIONS)[0] == first
    same = {"most_replicas": 9, "utilisation": 0.5, "network_policy": True, "service_monitor": True}
    for option, value in same.items():
        assert manifests(plan, replace(OPTIONS, **{option: value}))[0] == first, option
    changed = {"image": "onnxsplit:2", "claim": "others", "tls_secret": "web", "token": True, "revision": "2"}
    others = [manifests(plan, replace(OPTIONS, **{option: value}))[0] for option, value in changed.items()]
    others += [manifests(longer, OPTIONS)[0], manifests(msgspec.structs.replace(plan, strategy="x"), OPTIONS)[0]]
    assert len({first, *others}) == 1 + len(others)


def test_objects_of_two_releases_stand_side_by_side_and_find_their_own(plan, longer):
    (old, former), (new, files) = manifests(plan, ALL), manifests(longer, ALL)
    kinds = ("StatefulSet", "HorizontalPodAutoscaler", "PodDisruptionBudget")
    for kind in kinds:
        assert not of_kind(former, kind).keys() & of_kind(files, kind).keys()
    for release, one in ((old, former), (new, files)):
        _, *nodes = pods(one)
        (clients, coordinator) = (of_kind(one, "Service")[name] for name in ("reader", f"reader-coordinator-{release}"))
        for other in (former, files):
            found = pods(other)[0]["metadata"]["labels"]
            assert selects(clients["spec"]["selector"], found), "clients reach both"
            assert selects(coordinator["spec"]["selector"], found) is (other is one)
        for node in nodes:
            connect = word_after(node["spec"]["containers"][0], "--connect")
            assert connect == f"tcp://reader-coordinator-{release}:5555"
            assert not selects(clients["spec"]["selector"], node["metadata"]["labels"])
    assert of_kind(former, "Deployment").keys() == of_kind(files, "Deployment").keys()
    (before,), (after,) = (of_kind(one, "Deployment").values() for one in (former, files))
    assert before["spec"]["selector"] == after["spec"]["selector"], "it cannot be changed"
    assert after["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def pruned(command: str, labels: dict[str, str]) -> bool:
    """Whether the label selector of a command selects an object with these labels."""
    terms = re.findall(r"-l '([^']*)'", command)[-1].split(",")
    for term in terms:
        key, unequal, value = term.partition("!=")
        if unequal:
            if labels.get(key) == value:
                return False
            continue
        key, equal, value = term.partition("=")
        if key not in labels or (equal and labels[key] != value):
            return False
    return True


def test_pruning_removes_all_of_other_releases_and_nothing_else(plan, longer, tmp_path):
    former = kustomized(write(plan, ALL, tmp_path / "m").overlay)
    written = write(longer, ALL, tmp_path / "m")
    objects = {(d["kind"], d["metadata"]["name"]): d for d in kustomized(written.overlay)}
    cluster = {(d["kind"], d["metadata"]["name"]): d for d in former} | objects
    _, command = replace_commands("reader", written.release, written.overlay, written.namespace)
    gone = {key for key, one in cluster.items() if pruned(command, one["metadata"].get("labels", {}))}
    assert gone == cluster.keys() - objects.keys()
    kinds = re.search(r"kubectl -n default delete (\S+)", command)[1].split(",")
    assert {f"{kind.lower()}s".replace("policys", "policies") for kind, _ in gone} == set(kinds) - {"secrets"}
    assert Counter(kind for kind, _ in gone)["StatefulSet"] == len(plan.stages)
    other = {NAME: "writer", VERSION: "r0000000", COMPONENT: "node"}
    assert not pruned(command, other)


def test_a_new_plan_in_the_same_folder_keeps_keys_token_and_overlay(plan, longer, tmp_path):
    folder = tmp_path / "m"
    write(plan, ALL, folder)
    overlay = folder / "overlays" / "example" / "kustomization.yaml"
    overlay.write_text(overlay.read_text().replace("default", "production"))
    keys = folder / "base" / "keys"
    before = {path: path.read_text() for path in keys.rglob("*") if path.is_file()}
    written = write(longer, ALL, folder)
    assert {path: path.read_text() for path in before} == before
    assert Keys(keys / "stage-2").pair.public in Keys(keys / "coordinator").allowed
    objects = kustomized(written.overlay)
    assert {one["metadata"]["namespace"] for one in objects} == {written.namespace} == {"production"}
    for one in replace_commands("reader", written.release, written.overlay, written.namespace):
        words = re.findall(r"kubectl (-n production )?(\w+)", one)
        assert all(namespace or verb == "apply" for namespace, verb in words), "the overlay says it to apply"
    write(plan, OPTIONS, folder)
    files = {path.name for path in (folder / "base").glob("*.yaml")}
    assert files == {"gateway.yaml", "stage-0.yaml", "stage-1.yaml", "kustomization.yaml"}
    (allowed,) = [one for one in kustomized(written.overlay) if one["kind"] == "ConfigMap"]
    assert "stage-2.key" in allowed["data"], "its nodes may still run"
    assert sorted(path.name for path in folder.iterdir()) == ["base", "overlays"]


def test_a_stage_whose_key_was_revoked_is_refused_until_it_has_another(plan, tmp_path):
    folder = tmp_path / "m"
    write(plan, OPTIONS, folder)
    keys = folder / "base" / "keys"
    revoke(keys / "coordinator", "stage-1")
    with pytest.raises(InputError, match=r"key of stage-1 was revoked.*Remove the folder .*stage-1 to have a new one"):
        write(plan, OPTIONS, folder)
    for path in sorted((keys / "stage-1").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (keys / "stage-1").rmdir()
    write(plan, OPTIONS, folder)
    assert Keys(keys / "stage-1").pair.public in Keys(keys / "coordinator").allowed


def test_a_folder_with_something_else_in_it_is_not_touched(plan, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    with pytest.raises(PlanError, match="holds no manifests; nothing was touched"):
        write(plan, OPTIONS, tmp_path / "letters")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["dear.txt"]
    write(plan, OPTIONS, tmp_path / "m")
    with pytest.raises(InputError, match=r"manifests of 'reader', not of 'writer'.*--name reader"):
        write(plan, replace(OPTIONS, name="writer"), tmp_path / "m")


def test_files_of_the_user_stay_and_an_overlay_that_sets_the_image_is_refused(plan, longer, tmp_path):
    folder = tmp_path / "new" / "m"
    write(longer, ALL, folder)
    (folder / "base" / "mine.yaml").write_text("kind: ConfigMap")
    write(plan, ALL, folder)
    assert (folder / "base" / "mine.yaml").is_file()
    assert not (folder / "base" / "stage-2.yaml").exists()
    overlay = folder / "overlays" / "example" / "kustomization.yaml"
    overlay.write_text(overlay.read_text() + "images:\n- name: x\n  newTag: '2'\n")
    before = (folder / "base" / "gateway.yaml").read_bytes()
    with pytest.raises(InputError, match=r"kustomization\.yaml sets images, .*Give the image with --image"):
        write(longer, ALL, folder)
    assert (folder / "base" / "gateway.yaml").read_bytes() == before


def test_what_cannot_be_written_leaves_nothing_behind(plan, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(PlanError, match="No space left on device"):
        write(plan, OPTIONS, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
