#!/bin/sh
# Process 1 of the guest. With wardian.run=<base64 of a shell script> on the kernel command line it runs
# that script on the console and powers off; without, it gives a shell on the console.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM="${TERM:-vt220}" LANG=C.UTF-8
read -r up rest < /proc/uptime
echo "WARDIAN-INIT $up"
mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
ln -sf /proc/self/fd /dev/fd
ln -sf fd/0 /dev/stdin
ln -sf fd/1 /dev/stdout
ln -sf fd/2 /dev/stderr
read -r name < /etc/hostname
echo "$name" > /proc/sys/kernel/hostname
cd /root
script=
read -r line < /proc/cmdline
for word in $line; do
    case $word in wardian.run=*) script=${word#*=} ;; esac
done
console=/dev/console
for tty in $(cat /sys/class/tty/console/active); do
    [ -c "/dev/$tty" ] && console=/dev/$tty
done
if [ -n "$script" ]; then
    echo "$script" | base64 -d > /run/wardian.sh
    # The end of the session hangs the terminal up, which drops what is not sent yet: stty waits for it.
    setsid -c -w sh -c 'sh /run/wardian.sh; s=$?; stty opost; exit $s' < $console > $console 2>&1
    status=$?
    read -r up rest < /proc/uptime
    echo "WARDIAN-EXIT $status $up"
    exec /sbin/poweroff
fi
export PS1='\u@\h:\w\$ '
setsid -c -w bash --norc -i < $console > $console 2>&1
exec /sbin/poweroff
