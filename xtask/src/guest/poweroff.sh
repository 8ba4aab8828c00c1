#!/bin/sh
# Ends the machine: writes everything back, then asks the kernel by the name this program was called by.
sync
mount -o remount,ro / 2> /dev/null || { echo u > /proc/sysrq-trigger; sleep 0.2; }
exec busybox "${0##*/}" -f
