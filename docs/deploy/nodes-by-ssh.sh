#!/bin/bash
# Start a node on each given host by ssh; Ctrl-C stops all of them.
#   docs/deploy/nodes-by-ssh.sh tcp://10.0.0.1:5555 host-a host-b host-b
# On every host: onnxsplit installed for the user, and keys in ~/.config/onnxsplit/keys. A node that ends is restarted.
set -euo pipefail
address=$1
shift
ssh=${SSH:-ssh}
trap 'trap - TERM; kill 0' INT TERM EXIT
for host in "$@"; do
  (
    while true; do
      # -tt: the node ends with the connection
      $ssh -tt -o ServerAliveInterval=5 -o ServerAliveCountMax=3 "$host" \
        onnxsplit node --connect "$address" --host "$host" --rejoin 3600 </dev/null || true
      sleep 2
    done
  ) &
done
wait
