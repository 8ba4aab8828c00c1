#!/bin/busybox sh
# First program of a Linux guest of the skew lab (rdinit=/lab): loads the drivers, starts what is to keep the
# guest busy, rings the doorbell, powers off. On the kernel command line: lab.seconds=S lab.dd=N lab.spin=N.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
while read -r module; do $b insmod "/modules/$module"; done < /modules.list
seconds=10 dd=0 spin=0
read -r line < /proc/cmdline
for word in $line; do
    case $word in
        lab.seconds=*) seconds=${word#*=} ;;
        lab.dd=*) dd=${word#*=} ;;
        lab.spin=*) spin=${word#*=} ;;
    esac
done
$b cat /sys/devices/system/clocksource/clocksource0/current_clocksource
$b grep -e '^Clock Event Device' -e event_handler /proc/timer_list
while [ "$dd" -gt 0 ]; do
    (while :; do
        $b dd if=/dev/vda of=/dev/null bs=64k 2> /dev/null
        echo 1 > /proc/sys/vm/drop_caches
    done) &
    dd=$((dd - 1))
done
while [ "$spin" -gt 0 ]; do
    (while :; do :; done) &
    spin=$((spin - 1))
done
echo "LAB-BEGIN"
/ring "$seconds" && echo "LAB-END"
$b poweroff -f
