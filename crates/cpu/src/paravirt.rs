//! The clock and wall-clock records that KVM's guests read (Linux `Documentation/virt/kvm/x86/msr.rst`),
//! written into guest memory: the same on every engine, a function of the one time base.

use std::sync::atomic::{Ordering, fence};

use wardian_memory::{Gpa, GuestMemory};
use wardian_time::TimeBase;
use wardian_time::paravirt::wall_clock_bytes;

/// Byte of the clock record that holds the flags, and its "guest stopped" bit.
const CLOCK_FLAGS: u64 = 29;
const GUEST_STOPPED: u8 = 2;
/// Bytes of a clock record (`struct pvclock_vcpu_time_info`).
pub const CLOCK_LEN: u64 = 32;
/// Bytes of a wall-clock record (`struct pvclock_wall_clock`).
pub const WALL_LEN: u64 = 12;

fn read_u32(mem: &GuestMemory, at: u64) -> Option<u32> {
    let mut bytes = [0u8; 4];
    mem.read(Gpa(at), &mut bytes).ok()?;
    Some(u32::from_le_bytes(bytes))
}

/// Replaces the record at `at`, whose 32-bit version is its first field: odd while it changes.
fn publish(mem: &GuestMemory, at: u64, record: impl Fn(u32) -> ([u8; 32], usize)) -> Option<()> {
    let old = read_u32(mem, at)?;
    let odd = old.wrapping_add(1) | 1;
    mem.write(Gpa(at), &odd.to_le_bytes()).ok()?;
    fence(Ordering::SeqCst);
    let even = odd.wrapping_add(1);
    let (bytes, len) = record(even);
    mem.write(Gpa(at + 4), &bytes[4..len]).ok()?;
    fence(Ordering::SeqCst);
    mem.write(Gpa(at), &even.to_le_bytes()).ok()
}

/// Whether `MSR_KVM_SYSTEM_TIME` may be `value`: its record lies in RAM, or it is off.
#[must_use]
pub fn clock_allowed(mem: &GuestMemory, value: u64) -> bool {
    value & 1 == 0 || mem.contains(Gpa(value & !1), CLOCK_LEN)
}

/// Rewrites the clock record that `MSR_KVM_SYSTEM_TIME` = `register` asks for, of a vCPU whose TSC is
/// `tsc_adjust` before the time base's; `stopped` tells the guest that the machine was stopped.
pub fn write_clock(mem: &GuestMemory, time: &TimeBase, register: u64, tsc_adjust: u64, stopped: bool) {
    if register & 1 == 0 {
        return;
    }
    let at = register & !1;
    let mut flags = [0u8];
    if mem.read(Gpa(at + CLOCK_FLAGS), &mut flags).is_err() {
        return;
    }
    let mut clock = time.pvclock();
    // The record is read against this vCPU's TSC. Only vCPUs without an adjustment agree with each other.
    clock.tsc_timestamp = clock.tsc_timestamp.wrapping_add(tsc_adjust);
    clock.stable &= tsc_adjust == 0;
    // The guest clears the flag when it has seen it.
    clock.guest_stopped = stopped || flags[0] & GUEST_STOPPED != 0;
    if publish(mem, at, |version| (clock.to_bytes(version), CLOCK_LEN as usize)).is_none() {
        tracing::warn!(at, "The guest's clock page is not RAM any more");
    }
}

/// Whether `MSR_KVM_WALL_CLOCK` may be `value`.
#[must_use]
pub fn wall_clock_allowed(mem: &GuestMemory, value: u64) -> bool {
    value == 0 || mem.contains(Gpa(value), WALL_LEN)
}

/// `MSR_KVM_WALL_CLOCK`: the record at address `at` is written once.
pub fn write_wall_clock(mem: &GuestMemory, time: &TimeBase, at: u64) {
    if at == 0 {
        return;
    }
    let wall = time.wall_at_zero();
    publish(mem, at, |version| {
        let mut bytes = [0u8; 32];
        bytes[..12].copy_from_slice(&wall_clock_bytes(version, wall));
        (bytes, WALL_LEN as usize)
    });
}
