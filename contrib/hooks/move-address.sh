#!/bin/sh
# Moves a service's addresses with its workload. The same script on both hosts:
#
#   HOOK="move-address.sh eth0 192.0.2.7/24"
#   crxfer migrate … --hook before-source-kill="$HOOK" --hook after-abort="$HOOK"
#   crxfer recv …    --hook address-prepare="$HOOK" --hook address-announce="$HOOK" \
#                    --hook after-abort="$HOOK"
#
# Arguments: the interface of this host, then the addresses with their prefix lengths on the link.
#
#   address-prepare     destination: each address goes onto lo with all bits, so that sockets can be
#                       bound and connected, and no link answers for it
#   before-source-kill  source: the addresses go; the workload is frozen and its packets are dropped
#                       anyway. (As after-commit it costs no downtime, but for a moment both hosts
#                       would answer.)
#   address-announce    destination: they go onto the interface, and the neighbours are told
#   after-abort         source: back onto the interface and announced; destination: off lo
#
# On the destination the sysctls arp_ignore and arp_announce of "all" are raised and stay so: lower
# them again if that host depends on the defaults.
#
# Needs iproute2 and awk; where arping of iputils is there, IPv4 neighbours are told three times.
set -eu

moment=${CRXFER_MOMENT:-}
if [ $# -lt 2 ] || [ -z "$moment" ]; then
    echo "usage: CRXFER_MOMENT=MOMENT CRXFER_SIDE=SIDE $0 INTERFACE ADDRESS/PREFIX…" >&2
    exit 2
fi
interface=$1
shift

on_lo() { # ADDRESS/PREFIX
    case $1 in *:*) echo "${1%/*}/128" ;; *) echo "${1%/*}/32" ;; esac
}

has() { # ADDRESS/PREFIX DEVICE
    ip -o address show dev "$2" | awk -v a="$1" '$4 == a || $4 "/32" == a { found = 1 } END { exit !found }'
}

remove() { # ADDRESS/PREFIX DEVICE
    if has "$1" "$2"; then ip address del "$1" dev "$2"; fi
}

sysctl() { # PATH VALUE
    if [ -e "/proc/sys/net/$1" ]; then echo "$2" >"/proc/sys/net/$1"; fi
}

# 1: answer for an address only on the interface that has it. 2: never name an address of another
# interface as the sender. Otherwise every link would speak for what is on lo.
raise() { # NAME LEAST
    file=/proc/sys/net/ipv4/conf/all/$1
    [ "$(cat "$file")" -ge "$2" ] || echo "$2" >"$file"
}

prepare() {
    raise arp_ignore 1
    raise arp_announce 2
    for address in "$@"; do
        if ! has "$address" "$interface" && ! has "$(on_lo "$address")" lo; then
            ip address add "$(on_lo "$address")" dev lo
        fi
    done
}

clean_lo() {
    for address in "$@"; do remove "$(on_lo "$address")" lo; done
}

# First onto the link, then off lo: in between the kernel knows the address all the time, and no
# packet of a connection is answered with a reset.
announce() {
    # IPv6: the kernel itself tells the neighbours of an address that needs no duplicate detection.
    sysctl "ipv6/conf/$interface/ndisc_notify" 1
    accept_dad=$(cat "/proc/sys/net/ipv6/conf/$interface/accept_dad" 2>/dev/null || echo 0)
    sysctl "ipv6/conf/$interface/accept_dad" 0
    for address in "$@"; do
        has "$address" "$interface" || ip address add "$address" dev "$interface"
    done
    sysctl "ipv6/conf/$interface/accept_dad" "$accept_dad"
    for address in "$@"; do tell "$address"; done
    clean_lo "$@"
}

tell() { # ADDRESS/PREFIX
    case $1 in
    *:*) return ;;
    esac
    if command -v arping >/dev/null; then
        # The first one leaves at once; the others, for who missed it, are not waited for.
        arping -q -A -c 3 -I "$interface" "${1%/*}" </dev/null >/dev/null 2>&1 &
    else
        # A change of the link's address, though it be the same, makes the kernel tell them.
        sysctl "ipv4/conf/$interface/arp_notify" 1
        ip link set dev "$interface" address "$(cat "/sys/class/net/$interface/address")"
    fi
}

give_up() {
    for address in "$@"; do remove "$address" "$interface"; done
}

case $moment in
address-prepare) prepare "$@" ;;
address-announce) announce "$@" ;;
before-source-kill | after-commit) give_up "$@" ;;
after-abort)
    case ${CRXFER_SIDE:-} in
    source) announce "$@" ;;
    *) clean_lo "$@" ;;
    esac
    ;;
*)
    echo "$0: nothing to do at $moment" >&2
    exit 2
    ;;
esac
