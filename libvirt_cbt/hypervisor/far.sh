#!/bin/sh
# The far end: what has to be done on the host of a guest that is backed up over ssh, asked for by lines on stdin.
#
# The tool sends this text to `sh` there and nothing is installed; or it is installed as the one command of a key, which
# can then do nothing else (docs/remote.md).  A request is a verb and its words, each as printf's %b reads it.  An answer
# is one line, `ok WORD...` or `no KIND WORD`; a word that may be any text is in hexadecimal digits, a file in base64.
# What is made or removed carries a backup's id in its path.  POSIX sh, coreutils, qemu-img; virsh where it is there.

set -uf
umask 077
LC_ALL=C PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
export LC_ALL PATH
beat_seconds=60 # the near end says something more often; after that, and after the end of the connection, ...
grace_seconds=60 # ... so long it may come back before its job is ended

say() { printf '%s\n' "$*"; }

hex() { printf '%s' "$1" | od -An -v -tx1 | tr -d ' \n'; }

# refuse KIND TEXT: the last line of a tool's complaint, without the tool's name.
refuse() { say no "$1" "$(hex "$(printf '%s\n' "$2" | tail -n 1)")"; }

have() { command -v "$1" >/dev/null 2>&1; }

carries_id() {
    case ${1##*/} in
    [0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f]) ;;
    *) return 1 ;;
    esac
}

# Of RUN and DIRECTORY (or `-` where there is none): absolute, and named by an id.
are_ours() {
    case $1 in /*) ;; *) return 1 ;; esac
    carries_id "$1" || return 1
    case $2 in
    -) return 0 ;;
    /*/cbt-*) carries_id "${2%/*}/${2##*/cbt-}" ;;
    *) return 1 ;;
    esac
}

free_bytes() {
    # shellcheck disable=SC2046 -- two numbers
    set -- $(stat -f -c '%a %S' -- "$1" 2>/dev/null)
    [ $# = 2 ] && say $(($1 * $2))
}

# hello: who we are here, and where things go.
do_hello() {
    if [ "$(id -u)" = 0 ]; then
        run=/run/libvirt-cbt scratch=/var/lib/libvirt/cbt-scratch
    else
        run=${XDG_RUNTIME_DIR:-/tmp}/libvirt-cbt scratch=${XDG_CACHE_HOME:-$HOME/.cache}/libvirt-cbt/scratch
        [ -n "${XDG_RUNTIME_DIR-}" ] || run=$run-$(id -u)
    fi
    found=
    for tool in qemu-img qemu-storage-daemon virsh base64 timeout; do
        if have "$tool"; then found="$found $tool"; fi
    done
    say ok 1 "$(hex "$run")" "$(hex "$scratch")" "$found"
}

# room DIRECTORY: bytes that a normal user may still write there.
do_room() {
    bytes=$(free_bytes "$1") || { refuse gone "$1 is not there"; return; }
    say ok "$bytes"
}

# folder PATH: the nearest folder above that exists, its mode, and whether this user may write to it.
do_folder() {
    at=$1
    while [ ! -d "$at" ] && [ "$at" != / ]; do at=$(dirname -- "$at"); done
    writable=no
    if [ -w "$at" ] && [ -x "$at" ]; then writable=yes; fi
    say ok "$(hex "$at")" "$(stat -L -c %a -- "$at")" "$writable"
}

# look PATH...: of each device:inode, kind (f, b or o) and its first 32 bytes.
do_look() {
    answer=
    for path; do
        kind=o head=
        if ! number=$(stat -L -c %d:%i -- "$path" 2>/dev/null); then
            if [ ! -L "$path" ]; then kind=-; fi
            answer="$answer - $kind -"
            continue
        fi
        if [ -f "$path" ]; then kind=f; elif [ -b "$path" ]; then kind=b; fi
        if [ "$kind" != o ]; then head=$(head -c 32 -- "$path" 2>/dev/null | od -An -v -tx1 | tr -d ' \n'); fi
        answer="$answer $number $kind ${head:--}"
    done
    say ok "$answer"
}

# read PATH MOST: a whole file of at most so many bytes, and its length.
do_read() {
    if [ ! -e "$1" ]; then refuse file 'No such file or directory'
    elif [ ! -f "$1" ]; then refuse file 'it is no file'
    elif [ ! -r "$1" ]; then refuse file 'Permission denied'
    elif [ "$(stat -L -c %s -- "$1")" -gt "$2" ]; then refuse file "it is longer than $2 bytes"
    else
        printf 'ok %s ' "$(stat -L -c %s -- "$1")"
        head -c "$2" -- "$1" | base64 | tr -d '\n'
        say
    fi
}

# make RUN DIRECTORY GROUP FLOOR [SIZE PATH]...: the folders, for QEMU's group too unless it is `-`, and scratch files.
do_make() {
    run=$1 directory=$2 group=$3 floor=$4
    shift 4
    are_ours "$run" "$directory" || { refuse denied "$run and $directory are no places of a backup"; return; }
    make_folder "$run" "$group" 730 || return
    if [ "$directory" = - ]; then say ok 0; return; fi
    make_folder "$directory" "$group" 710 || return
    bytes=$(free_bytes "$directory") || { refuse denied "how much room $directory has is not known"; return; }
    if [ "$bytes" -lt "$floor" ]; then say no space "$bytes"; return; fi
    for word; do # sizes, and files; never one that is there: its old clusters would hide the disk
        case $word in
        [0-9]*) continue ;;
        esac
        [ "${word%/*}" = "$directory" ] || { refuse denied "$word is not in $directory"; return; }
        why=$( (set -C && : >"$word") 2>&1) || { refuse denied "$why"; return; }
    done
    children='' why=''
    while [ $# -ge 2 ]; do
        qemu-img create -q -f qcow2 "$2" "$1" </dev/null >&2 &
        children="$children $!"
        shift 2
    done
    for child in $children; do
        wait "$child" || why='qemu-img could not make the scratch files'
    done
    if [ -n "$why" ]; then refuse denied "$why"; return; fi
    say ok "$(free_bytes "$directory")"
}

# exposed PATH: says why somebody else could put another thing in the place of a folder, or of one above it.
exposed() {
    at=$1
    while [ ! -d "$at" ]; do
        at=${at%/*}
        at=${at:-/}
    done
    owner=$(stat -L -c %u -- "$at")
    if [ "$at" = "$1" ] && [ "$owner" != 0 ] && [ "$owner" != "$(id -u)" ]; then
        say "$at belongs to user $owner"
        return
    fi
    at=$(cd -P -- "$at" && pwd)
    while :; do
        mode=$(stat -c %a -- "$at")
        case $mode in
        [1357]???) ;; # the sticky bit
        *[2367])
            say "everybody may write to $at and rename what is in it"
            return
            ;;
        esac
        if [ "$at" = / ]; then return 1; fi
        at=${at%/*}
        at=${at:-/}
    done
}

make_folder() { # PATH GROUP MODE
    parent=${1%/*}
    if why=$(exposed "$parent"); then refuse denied "$why"; return 1; fi
    if [ ! -d "$parent" ]; then
        why=$( (umask 022 && mkdir -p -- "${parent%/*}" && mkdir -m 711 -- "$parent") 2>&1)
        if [ ! -d "$parent" ]; then refuse denied "$why"; return 1; fi
    fi
    why=$(mkdir -- "$1" 2>&1) || { refuse denied "$why"; return 1; }
    if [ "$2" = - ] || [ "$(id -u)" != 0 ]; then return; fi
    why=$( (chown "0:$2" -- "$1" && chmod "$3" -- "$1") 2>&1) || { refuse denied "$why"; return 1; }
}

# remove RUN DIRECTORY PATH...: what is there of it and is of the expected kind; what went.
do_remove() {
    run=$1 directory=$2 answer=
    shift 2
    are_ours "$run" "$directory" || { refuse denied "$run and $directory are no places of a backup"; return; }
    for path; do
        if [ "${path%/*}" = "$directory" ] && [ -f "$path" ] && [ ! -L "$path" ] && rm -f -- "$path"; then
            answer="$answer $(hex "$path")"
        fi
    done
    if [ "$directory" != - ] && [ -f "$directory/.guard" ] && [ ! -L "$directory/.guard" ]; then rm -f -- "$directory/.guard"; fi
    set +f
    for path in "$run"/*; do
        if [ -S "$path" ] && [ ! -L "$path" ] && rm -f -- "$path"; then answer="$answer $(hex "$path")"; fi
    done
    set -f
    for path in "$directory" "$run"; do
        if [ "$path" != - ] && rmdir -- "$path" 2>/dev/null; then answer="$answer $(hex "$path")"; fi
    done
    say ok "$answer"
}

# info SHARED NAME: what `qemu-img info` says of an image; SHARED is yes to look past QEMU's locks.
do_info() {
    shared=
    if [ "$1" = yes ]; then shared=-U; fi
    # shellcheck disable=SC2086 -- one word or none
    if found=$(qemu-img info $shared --output=json "$2" </dev/null 2>&1); then
        say ok "$(printf '%s' "$found" | base64 | tr -d '\n')"
    else
        refuse tool "$found"
    fi
}

# bitmap --add|--remove NAME BITMAP
do_bitmap() {
    case $1 in --add | --remove) ;; *) refuse tool "no such action: $1"; return ;; esac
    if found=$(qemu-img bitmap "$1" "$2" "$3" </dev/null 2>&1); then say ok; else refuse tool "$found"; fi
}

# Whether a child of ours has not ended yet.
runs() {
    case $(cut -d ' ' -f 3 "/proc/$1/stat" 2>/dev/null) in
    Z | '') return 1 ;;
    esac
}

# hold SOCKET ARGUMENT...: a storage daemon over images, until the line `end` or the end of the connection.  To each line
# `alive` the answer is ok, or why it ended.
do_hold() {
    socket=$1
    shift
    carries_id "${socket%/*}" || { refuse denied "$socket is no place of a backup"; return; }
    why=$( (: >"$socket.log") 2>&1) || { refuse denied "$why"; return; }
    exec 3>"$socket.log" 4<"$socket.log"
    rm -f -- "$socket.log"
    tied=
    if setpriv --pdeathsig KILL true 2>/dev/null; then tied='setpriv --pdeathsig KILL --'; fi
    # shellcheck disable=SC2086 -- words, or none
    $tied qemu-storage-daemon "$@" </dev/null >/dev/null 2>&3 &
    child=$!
    trap 'kill "$child" 2>/dev/null' EXIT
    say ok
    why='it ended by itself'
    while IFS= read -r word; do
        runs "$child" || break
        if [ "$word" != alive ]; then
            why=
            break
        fi
        say ok
    done
    kill "$child" 2>/dev/null
    wait "$child" 2>/dev/null
    trap - EXIT
    if [ -n "$why" ]; then
        said=$(cat <&4)
        why=${said:-$why}
    fi
    exec 3>&- 4<&-
    if [ -n "$why" ]; then refuse tool "$why"; else say ok; fi
}

# guard DOMAIN URI: minds a job from beside it.  Then, each a line: `freeze SECONDS`, `thawed`, `watch SOCKET DIRECTORY
# RESERVE`, `beat`, and `release` at the end.  Told are `free BYTES` and, once, `full BYTES`.
#
# Without virsh it only tells.  With it a guest is thawed and a job is ended also when nobody can be told any more.
do_guard() {
    domain=$1 uri=$2 socket='' directory='' thawing='' watching=''
    trap '' PIPE
    say ok
    while line=$(timeout "$beat_seconds" sh -c 'IFS= read -r line && printf "%s\n" "$line"'); do
        words "$line"
        shift_words
        case $word in
        freeze)
            (sleep "$rest" && thaw) </dev/null >/dev/null 2>&1 &
            thawing=$!
            ;;
        thawed) stop_thawing ;;
        watch)
            # shellcheck disable=SC2086 -- words without spaces
            set -- $rest
            plain "$1" && socket=$plain
            plain "$2" && directory=$plain
            printf %s "$$" >"$directory/.guard"
            watch "$3" &
            watching=$!
            ;;
        release)
            stop_thawing
            if [ -n "$watching" ]; then kill "$watching" 2>/dev/null; fi
            exit 0
            ;;
        esac
    done
    exec >/dev/null 2>&1
    if [ -n "$thawing" ]; then
        stop_thawing
        thaw
    fi
    if [ -z "$watching" ]; then exit 0; fi
    left=$grace_seconds
    while [ "$left" -gt 0 ] && is_mine; do
        sleep 1
        left=$((left - 1))
    done
    kill "$watching" 2>/dev/null
    if is_mine; then end_job; fi
    exit 0
}

words() { line=$1; }

shift_words() {
    word=${line%% *} rest=${line#* }
}

stop_thawing() {
    if [ -n "$thawing" ]; then kill "$thawing" 2>/dev/null; fi
    thawing=
}

thaw() { virsh -q -c "$uri" domfsthaw "$domain"; }

# Another connection of the same tool takes the guard over, and whoever removes the folder has ended the job.
is_mine() { [ "$(cat -- "$directory/.guard" 2>/dev/null)" = "$$" ]; }

end_job() {
    virsh -q -c "$uri" backup-dumpxml "$domain" 2>/dev/null | grep -qF "socket='$socket'" || return 0
    virsh -q -c "$uri" domjobabort "$domain"
}

watch() { # RESERVE
    turns=0
    while bytes=$(free_bytes "$directory"); do
        if [ "$bytes" -lt "$1" ]; then
            say full "$bytes"
            end_job >/dev/null 2>&1
            rm -f -- "$directory/.guard"
            return
        fi
        if [ $((turns % 10)) = 0 ]; then
            is_mine || return
            say free "$bytes"
        fi
        turns=$((turns + 1))
        # It outlives us when we are released, and sshd ends nothing while somebody holds the session's output.
        if [ $((bytes - $1)) -gt 8589934592 ]; then sleep 1; else sleep 0.1; fi >/dev/null 2>&1
    done
}

plain() {
    plain=$(printf '%bx' "$1")
    plain=${plain%x}
}

main() {
    say libvirt-cbt-ready
    while IFS= read -r line; do
        # shellcheck disable=SC2086 -- words; none of them is a pattern
        set -- $line
        count=$#
        while [ "$count" -gt 0 ]; do
            plain "$1"
            shift
            set -- "$@" "$plain"
            count=$((count - 1))
        done
        if [ $# = 0 ]; then continue; fi
        verb=$1
        shift
        case $verb in
        hello | room | folder | look | read | make | remove | info | bitmap | hold | guard) "do_$verb" "$@" ;;
        *) refuse verb "$verb is no verb of this version" ;;
        esac
    done
}

# As the one command of a key: libvirt's own connection comes this way, too.
case ${SSH_ORIGINAL_COMMAND-} in
'' | *libvirt-cbt-bare*) main ;;
*virt-ssh-helper*) exec virt-ssh-helper qemu:///system ;;
*)
    printf 'this key is for libvirt-cbt only\n' >&2
    exit 1
    ;;
esac
