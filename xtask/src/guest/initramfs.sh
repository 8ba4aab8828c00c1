#!/bin/busybox sh
# First program of the initial RAM disk: loads the drivers that /modules.list names, in its order, mounts
# the root disk and hands over. wardian.root= on the kernel command line names another disk than /dev/vda.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
while read -r module; do
    $b insmod "/modules/$module" || echo "initrd: cannot load $module"
done < /modules.list
root=/dev/vda
read -r line < /proc/cmdline
for word in $line; do
    case $word in wardian.root=*) root=${word#*=} ;; esac
done
tries=0
while [ ! -b "$root" ] && [ $tries -lt 100 ]; do
    $b usleep 50000
    tries=$((tries + 1))
done
if ! $b mount -t ext4 "$root" /root; then
    echo "initrd: cannot mount $root; a shell follows, 'poweroff -f' ends it"
    exec $b sh
fi
$b mount -o move /dev /root/dev
$b mount -o move /proc /root/proc
exec $b switch_root /root /sbin/wardian-init
