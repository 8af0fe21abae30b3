#!/usr/bin/env bash
# A worker of deploy/train-job.yaml: names all workers in TF_CONFIG, then trains; goes on where a run of that name stopped.
set -euo pipefail
cd "${FOLDER:-/shared}"
: "${WORKERS:?}" "${TASK:?}" "${FLAGS:?}" "${JOB_COMPLETION_INDEX:?}"
addresses=$(for ((index = 0; index < WORKERS; index++)); do
    printf '"cornucopia-train-%d.cornucopia-train:2222",' "$index"
done)
# shellcheck disable=SC2089,SC2090  # the quotes are JSON's
printf -v TF_CONFIG '{"cluster": {"worker": [%s]}, "task": {"type": "worker", "index": %d}}' \
    "${addresses%,}" "$JOB_COMPLETION_INDEX"
# shellcheck disable=SC2090
export TF_CONFIG
name=$(sed -n 's/.*--name=\([^ ]*\).*/\1/p' <<<"$FLAGS")
: "${name:?FLAGS must have --name, the same for all workers}"
resume=()
if [ -e "runs/$name/config.json" ]; then resume=(--resume); fi  # also before the first checkpoint
read -ra flags <<<"$FLAGS"
exec cornucopia train "$TASK" --strategy=multiworker "${flags[@]}" "${resume[@]}"
