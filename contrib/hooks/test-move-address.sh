#!/bin/bash
# Tries move-address.sh on three hosts, which are network namespaces on one bridge. Needs root.
# A client that knows the source's link address must reach the destination at once after the
# announcement, and never the destination before it.
set -eu

script=$(dirname "$(realpath "$0")")/move-address.sh
id=$$
hosts=(source destination client)
v4=192.0.2.7/24
v6=2001:db8::7/64

cleanup() {
    for host in "${hosts[@]}" bridge; do ip netns del "mv-$host-$id" 2>/dev/null || true; done
}
trap cleanup EXIT

on() { # HOST COMMAND…
    local host=$1
    shift
    ip netns exec "mv-$host-$id" "$@"
}

hook() { # HOST MOMENT [PATH]
    local side=$1
    on "$1" env "PATH=${3:-$PATH}" CRXFER_MOMENT="$2" CRXFER_SIDE="$side" "$script" eth0 "$v4" "$v6"
}

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# Whether ADDRESS refuses a connection, which is an answer too, within 0.3 s.
reaches() {
    local status=0
    on client timeout 0.3 bash -c "echo >/dev/tcp/$1/9" 2>/dev/null || status=$?
    [ $status != 124 ]
}

# Which host the client's neighbour table says has ADDRESS.
holder() {
    local mac host
    mac=$(on client ip neigh show "$1" | awk '{ for (i = 1; i < NF; i++) if ($i == "lladdr") print $(i + 1) }')
    for host in source destination; do
        [ "$mac" = "$(on "$host" cat /sys/class/net/eth0/address)" ] && echo "$host" && return
    done
    echo nobody
}

ip netns add "mv-bridge-$id"
on bridge ip link add br0 type bridge forward_delay 0
on bridge ip link set br0 up
number=1
for host in "${hosts[@]}"; do
    ip netns add "mv-$host-$id"
    on "$host" ip link set lo up
    on bridge ip link add "to-$host" type veth peer name eth0 netns "mv-$host-$id"
    on bridge ip link set "to-$host" master br0 up
    on "$host" ip address add "192.0.2.10$number/24" dev eth0
    on "$host" ip address add "2001:db8::10$number/64" dev eth0 nodad
    on "$host" ip link set eth0 up
    number=$((number + 1))
done
on source ip address add "$v4" dev eth0
on source ip address add "$v6" dev eth0 nodad
sleep 2.5 # until the bridge's ports and link-local addresses are ready

for path in "$PATH" "/nonexistent"; do
    tools=$PATH
    if [ "$path" = /nonexistent ]; then
        # Everything that the script needs but arping.
        tools=$(mktemp -d)
        for tool in ip awk cat env sh; do ln -s "$(command -v "$tool")" "$tools/$tool"; done
    fi
    for address in "${v4%/*}" "${v6%/*}"; do
        reaches "$address" || fail "the client does not reach the source at $address"
        [ "$(holder "$address")" = source ] || fail "$address is not the source's to begin with"
    done
    hook destination address-prepare "$tools"
    on destination ip route get 192.0.2.7 | grep -q '^local' || fail "prepared, and not local"
    on client ip neigh flush dev eth0
    for address in "${v4%/*}" "${v6%/*}"; do
        for _ in 1 2 3 4 5; do reaches "$address" || fail "$address is lost after prepare"; done
        [ "$(holder "$address")" = source ] || fail "the destination speaks for $address too early"
    done
    hook source before-source-kill "$tools"
    hook destination address-announce "$tools"
    sleep 0.05 # one packet's way
    for address in "${v4%/*}" "${v6%/*}"; do
        [ "$(holder "$address")" = destination ] || fail "the client was not told of $address"
        reaches "$address" || fail "the client does not reach the destination at $address"
    done
    [ -z "$(on destination ip -o address show dev lo | grep -F -e 192.0.2.7 -e 2001:db8::7)" ] || fail "left on lo"

    # And an attempt that fails after the source gave the addresses up: back where they were.
    hook destination before-source-kill "$tools"
    hook source after-abort "$tools"
    hook destination after-abort "$tools"
    sleep 0.05
    for address in "${v4%/*}" "${v6%/*}"; do
        [ "$(holder "$address")" = source ] || fail "the client was not told that $address is back"
        reaches "$address" || fail "the client does not reach the source at $address again"
    done
    echo "ok: $([ "$path" = /nonexistent ] && echo without || echo with) arping"
done
