#!/bin/bash
# Runs end-to-end cases in a machine whose kernel tracks writes (CONFIG_MEM_SOFT_DIRTY), with programs
# that were built outside of it: for kernels that have none, in a virtual machine with Debian's kernel.
#
#   outside:                 cargo build -p xtask && cargo build --release -p crxfer-tools
#                            cp target/debug/xtask target/release/crxfer tools/xtask/e2e-elsewhere.sh SHARE
#   inside, as root:         SHARE/e2e-elsewhere.sh [options of cargo xtask e2e] [FILTER]
#
# FILTER is "by pre-dumps" unless given. Inside it needs criu, memcached, redis-server, nginx, iproute2,
# util-linux and iputils-arping.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
[ $# -gt 0 ] || set -- "by pre-dumps"
criu check --feature mem_dirty_track >/dev/null || {
	echo "this kernel does not track writes, or criu is missing" >&2
	exit 77
}
echo "kernel $(uname -r), $(criu --version | head -n 1), $(nproc) processors"
# Shared directories are slow and may not be visible in other mount namespaces.
work=$(mktemp -d /var/tmp/crxfer-e2e.XXXXXX)
trap 'rm -rf "$work"' EXIT
install -m 755 "$here/xtask" "$here/crxfer" "$work/"
modprobe -qa veth sch_tbf sch_htb nf_tables nft_ct || :
CRXFER_PROGRAM=$work/crxfer "$work/xtask" e2e "$@"
