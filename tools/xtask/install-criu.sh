#!/bin/bash
# Puts a working `criu` on a Debian machine whose own release has none that is new enough.
#
#   install-criu.sh [--bin DIR] [--home DIR] [--suite NAME] [--min VERSION]
#
#   --bin    where the `criu` command goes            /usr/local/sbin
#   --home   where the unpacked packages go           /usr/local/lib/criu-SUITE
#   --suite  Debian release that has the packages     forky
#   --min    oldest version that will do              4.2
#
# CRIU 3.17 of Debian 12 does not start on new kernels, and 4.1.1 of Debian 13 cannot dump
# programs with TCP sockets on Linux 6.16 and later.  Three ways, the first that works:
#   1. nothing, where a good one is in PATH already;
#   2. apt, where the machine's own release has one that is new enough;
#   3. the packages of another release, unpacked into a folder of their own and started
#      through that folder's dynamic loader, so that neither the system's C library nor
#      its package database is touched.
#
# Exit status: 0 installed and `criu check` passes; 1 not installed; 3 installed, but this
# kernel or container does not let it work.
set -euo pipefail

bin=/usr/local/sbin
home=
suite=forky
min=4.2
own_place=no

while [ $# -gt 0 ]; do
    case $1 in
        --bin)   bin=$2; own_place=yes ;;
        --home)  home=$2 ;;
        --suite) suite=$2; own_place=yes ;;
        --min)   min=$2 ;;
        *) echo "install-criu: unknown option $1" >&2; exit 2 ;;
    esac
    shift 2
done
home=${home:-/usr/local/lib/criu-$suite}

note() { echo "install-criu: $*"; }
fail() { echo "install-criu: $*" >&2; exit 1; }

# Prints the version of the criu command $1; fails where it does not start or is too old.
good_version() {
    local text version
    text=$("$1" --version 2>/dev/null) || return 1
    version=$(awk '$1 == "Version:" { print $2; exit }' <<<"$text")
    dpkg --compare-versions "${version#v}" ge "$min" && echo "${version#v}"
}

# Ends the script with the verdict of `criu check` about the criu command $1.
finish() {
    local version problem
    version=$(good_version "$1") || fail "$1 was installed but does not start"
    if problem=$("$1" check 2>&1); then
        note "criu $version at $1 works here"
        exit 0
    fi
    echo "$problem" >&2
    note "criu $version at $1 starts, but this kernel or container does not let it work" >&2
    exit 3
}

# An apt that knows only the wanted release and believes that nothing is installed, so that
# its simulated installation names every library down to the C library.
foreign_apt() {
    local tool=$1
    shift
    "$tool" -qq \
        -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=- \
        -o Dir::State::Lists="$work/lists" -o Dir::State::Status=/dev/null -o Dir::Cache="$work/cache" \
        -o APT::Sandbox::User=root -o Acquire::Languages=none "$@"
}

# The mirror that this machine has its base system from.
mirror() {
    apt-get download --print-uris base-files 2>/dev/null | sed -n "s|^'\(.*\)/pool/.*|\1|p" | head -n 1
}

# 1. Already there?
if [ -x "$bin/criu" ] && good_version "$bin/criu" >/dev/null; then finish "$bin/criu"; fi
if [ $own_place = no ] && found=$(command -v criu) && good_version "$found" >/dev/null; then
    finish "$found"
fi

[ "$(id -u)" = 0 ] || fail "needs root"
command -v apt-get >/dev/null || fail "this is no Debian: install CRIU $min or later by hand"
[ -n "$(mirror)" ] || apt-get -qq update || fail "apt-get update failed"

# 2. The machine's own release?
if [ $own_place = no ]; then
    candidate=$(apt-cache policy criu | awk '$1 == "Candidate:" { print $2 }')
    if [ -n "$candidate" ] && [ "$candidate" != "(none)" ] && dpkg --compare-versions "$candidate" ge "$min"; then
        note "installing criu $candidate with apt"
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y install criu >/dev/null || fail "apt-get install criu failed"
        finish "$(command -v criu || echo /usr/sbin/criu)"
    fi
fi

# 3. Packages of another release, in a folder of their own.
origin=$(mirror)
[ -n "$origin" ] || fail "apt's sources name no Debian mirror"
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e $keyring ] || apt-get -qq -y install debian-archive-keyring >/dev/null || fail "no key ring of the Debian archive"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{lists,cache}/partial "$work"/cache/archives/partial "$work"/deb
echo "deb [signed-by=$keyring] $origin $suite main" >"$work/sources.list"
note "reading Debian $suite from the mirror of this machine"
foreign_apt apt-get update >&2 || fail "apt cannot read the release $suite"
wanted=$(foreign_apt apt-get --simulate --no-install-recommends install criu | awk '$1 == "Inst" { print $2 }' |
    grep -E '^(criu|lib.*)$') || fail "the release $suite has no criu"
note "downloading $(wc -w <<<"$wanted") packages"
# shellcheck disable=SC2086 # one word for each package
(cd "$work/deb" && foreign_apt apt-get download $wanted) >&2 || fail "download failed"

rm -rf "$home.new"
mkdir -p "$home.new"
for package in "$work"/deb/*.deb; do
    dpkg-deb -x "$package" "$home.new" || fail "cannot unpack $(basename "$package")"
done
rm -rf "$home.new"/{etc,var,usr/share}
program=$(cd "$home.new" && find . -name criu -type f -perm -u+x -print -quit)
loader=$(cd "$home.new" && find . -name 'ld-linux*.so*' -type f -print -quit)
[ -n "$program" ] && [ -n "$loader" ] || fail "the packages hold no criu or no dynamic loader"
rm -rf "$home"
mv "$home.new" "$home"

# The name in argv[0] and the loader's options survive `criu swrk`, which runtimes start.
mkdir -p "$bin"
cat >"$bin/.criu.new" <<END
#!/bin/sh
exec '$home/${loader#./}' --library-path '$home/$(dirname "${loader#./}")' --argv0 criu '$home/${program#./}' "\$@"
END
chmod 755 "$bin/.criu.new"
mv "$bin/.criu.new" "$bin/criu"
finish "$bin/criu"
