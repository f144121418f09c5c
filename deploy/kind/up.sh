#!/usr/bin/env bash
# Weir on a kind cluster of its own: build the image, make the cluster, load the image, install the chart.
# Redis' image is pulled by the nodes. It wants docker, kind, kubectl and helm, and may be run again after a change. Away with it all:
#   kind delete cluster --name weir
set -euo pipefail
cd "$(dirname "$0")/../.."
cluster=weir namespace=weir image=weir tag=kind redis=redis:8.4 port=30080
context=kind-$cluster

docker build --tag "$image:$tag" .
kind get clusters | grep -qx "$cluster" || kind create cluster --config deploy/kind/cluster.yaml --wait 2m
kind load docker-image "$image:$tag" --name "$cluster"

# The tag is always the same, so the annotation is what brings new pods with the new image.
helm upgrade --install weir helm/weir --kube-context "$context" --namespace "$namespace" --create-namespace \
  --set image.registry= --set image.repository="$image" --set image.tag="$tag" \
  --set image.pullPolicy=Never --set service.type=NodePort --set service.nodePort="$port" \
  --set-string podAnnotations.built="at-$(date +%s)"
kubectl --context "$context" --namespace "$namespace" rollout status deployment/weir --timeout 5m

cat <<HINT

Weir answers at http://127.0.0.1:8080; above is how to read its key.

Autoscalers need a metrics-server, which kind does not have:
  helm upgrade --install metrics-server metrics-server --repo https://kubernetes-sigs.github.io/metrics-server \\
    --kube-context $context --namespace kube-system --set 'args={--kubelet-insecure-tls}'

The tests of the chart, with this image, on this cluster (docs/e2e.md says what they need besides):
  kubectl config use-context $context
  KUBECONFIG=\$HOME/.kube/config E2E_IMAGE=$image:$tag E2E_REDIS_IMAGE=$redis E2E_PULL_POLICY=IfNotPresent make e2e
HINT
