#!/usr/bin/env bash
# One sweep on Kubernetes twice, once with worker pods deleted midway: the tables must be equal byte for byte.
#
#   make test-kind                 skipped, with exit 0, where Docker, kind, kubectl or helm is missing
#   KEEP=1 make test-kind          leaves the kind cluster for a look
#
# Builds the image, makes a kind cluster of its own, installs KubeRay's operator, and runs deploy/kuberay's RayJob as
# deploy/kind/manifests.py changes it, against an S3 server in the cluster. Needs about 12 GB of memory and 20 GB of disk.
set -euo pipefail

for program in docker kind kubectl helm; do
    command -v "$program" > /dev/null || { echo "test-kind: skipped, $program is not here"; exit 0; }
done
docker info > /dev/null 2>&1 || { echo "test-kind: skipped, no Docker engine answers"; exit 0; }

cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OPERATOR=${OPERATOR:-1.7.0}
CHARTS=${CHARTS:-https://ray-project.github.io/kuberay-helm/}
CLUSTER=fimo-test
export IMAGE=fimo:test-kind STORE_IMAGE=fimo:test-kind-store
scratch=$(mktemp -d)
export KUBECONFIG=$scratch/kubeconfig
started=

finish() {
    code=$?
    if [ "$code" != 0 ] && [ -n "$started" ]; then
        kubectl -n fimo get pods,rayjobs,rayclusters -o wide || true
        kubectl -n fimo get events --sort-by=.lastTimestamp | tail -40 || true
        kubectl -n fimo logs -l ray.io/node-type=head -c ray-head --tail=40 || true
        kubectl -n kuberay-operator logs -l app.kubernetes.io/name=kuberay-operator --tail=40 || true
    fi
    if [ -z "${KEEP:-}" ]; then
        [ -z "$started" ] || kind delete cluster --name "$CLUSTER"
        rm -rf "$scratch"
    else
        echo "kept: export KUBECONFIG=$KUBECONFIG"
    fi
    exit "$code"
}
trap finish EXIT

say() { echo "== $*" >&2; }
in_store() { kubectl -n fimo exec store -- "$@"; }
state() { kubectl -n fimo get rayjob "$1" -o "jsonpath={.status.jobDeploymentStatus}"; }
workers() { kubectl -n fimo get pods -l "ray.io/node-type=worker" --field-selector=status.phase=Running -o name; }
# Parts that the store holds of the sweep in this prefix; 0 before it begins.
parts() {
    # `fimo status` exits with 3 while the sweep is not complete.
    { in_store fimo status "s3://fimo/$1/kind" --json 2> /dev/null || true; } |
        "$PYTHON" -c 'import json, sys; print(json.load(sys.stdin)["parts"])' 2> /dev/null || echo 0
}

# Until the job of this name is complete; fails if it fails, or after half an hour.
until_complete() {
    for _ in $(seq 360); do
        case $(state "$1") in
            Complete) return 0 ;;
            Failed) say "$1 failed"; return 1 ;;
        esac
        sleep 5
    done
    say "$1 did not end"
    return 1
}

# Until the sweep in this prefix has so many parts.
until_parts() {
    for _ in $(seq 360); do
        [ "$(parts "$1")" -lt "$2" ] || return 0
        sleep 3
    done
    say "$1 never had $2 parts"
    return 1
}

run() { # NAME PREFIX
    "$PYTHON" deploy/kind/manifests.py job "$1" "$2" | kubectl apply -f -
}

tables() { # PREFIX: its tables, whole, in a folder here
    mkdir -p "$scratch/$1"
    # shellcheck disable=SC2016 # $1 is the inner shell's.
    in_store sh -c 'fimo pull "s3://fimo/$1/kind" --to "/tmp/$1" >&2 && tar -C "/tmp/$1" -cf - .' sh "$1" |
        tar -C "$scratch/$1" -xf -
}

say "image"
docker build -q -f deploy/Dockerfile -t "$IMAGE" .
docker build -q -f deploy/kind/store.Dockerfile --build-arg IMAGE="$IMAGE" -t "$STORE_IMAGE" deploy/kind

say "cluster"
started=yes
kind create cluster --name "$CLUSTER" --kubeconfig "$KUBECONFIG" --wait 180s
kind load docker-image "$IMAGE" "$STORE_IMAGE" --name "$CLUSTER"
helm install kuberay-operator kuberay-operator --repo "$CHARTS" --version "$OPERATOR" \
    --namespace kuberay-operator --create-namespace --wait --timeout 300s
# The fields that deploy/README.md asks a cluster for.
kubectl explain raycluster.spec.authOptions.secretName > /dev/null
kubectl explain rayjob.spec.deletionStrategy.deletionRules.condition.jobDeploymentStatus > /dev/null
kubectl explain raycluster.spec.workerGroupSpecs.priority > /dev/null

say "store"
kubectl create namespace fimo
kubectl -n fimo create secret generic fimo-ray-token --from-literal=auth_token="$(openssl rand -hex 32)"
kubectl -n fimo create secret generic fimo-store --from-literal=key="$(openssl rand -hex 10)" \
    --from-literal=secret="$(openssl rand -hex 20)"
kubectl -n fimo create configmap fimo-sweep --from-file=sweep.yaml=deploy/kind/sweep.yaml
"$PYTHON" deploy/kind/manifests.py base | kubectl apply -f -
kubectl -n fimo wait --for=condition=Ready pod/store --timeout=180s

say "undisturbed"
run whole whole
until_complete whole
all=$(parts whole)
kubectl -n fimo delete rayjob whole --wait

say "with worker pods deleted"
run disturbed disturbed
until_parts disturbed 4
# Told, as before a node goes: it drains.
told=$(workers | head -1)
[ -n "$told" ] || { say "no worker runs"; exit 1; }
kubectl -n fimo delete "$told" --wait=false
seen=$(parts disturbed)
until_parts disturbed $((seen + 4))
# Without a word, as when a node is lost.
killed=$(workers | grep -vxF "$told" | head -1)
[ -n "$killed" ] || { say "no other worker runs"; exit 1; }
kubectl -n fimo delete "$killed" --grace-period=0 --force
seen=$(parts disturbed)
[ "$seen" -lt "$all" ] || { say "the sweep was over ($seen of $all parts) before a pod went"; exit 1; }
until_complete disturbed

say "compare"
tables whole
tables disturbed
compared=0
for table in "$scratch"/whole/*.parquet; do
    name=$(basename "$table")
    # Timings and hosts; everything else is a function of the spec.
    [ "$name" != costs.parquet ] || continue
    cmp "$table" "$scratch/disturbed/$name"
    compared=$((compared + 1))
done
[ "$compared" -ge 8 ] || { say "only $compared tables"; exit 1; }
echo "test-kind: $compared tables equal byte for byte, $told drained and $killed killed midway"
