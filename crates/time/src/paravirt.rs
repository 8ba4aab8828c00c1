//! The paravirtual clock ABI of KVM: kvmclock (pvclock) and steal time records.
//!
//! Source: Linux `Documentation/virt/kvm/x86/msr.rst`. Pure data; the engine writes the bytes into
//! guest memory.

use crate::Nanos;

/// `MSR_KVM_WALL_CLOCK_NEW`.
pub const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
/// `MSR_KVM_SYSTEM_TIME_NEW`.
pub const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// `MSR_KVM_STEAL_TIME`.
pub const MSR_STEAL_TIME: u32 = 0x4b56_4d03;
/// Feature bits of CPUID 4000_0001h EAX: clock (new MSRs), steal time, stable clock.
pub const CPUID_FEATURES: u32 = (1 << 3) | (1 << 5) | (1 << 24);

/// TSC ticks to nanoseconds, as the guest computes it: `((ticks << shift) * mul) >> 32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscScale {
    /// 32-bit fixed-point multiplier.
    pub mul: u32,
    /// Left shift if positive, right shift if negative.
    pub shift: i8,
}

impl TscScale {
    /// The most precise scale for a counter of `hz`.
    #[must_use]
    pub fn for_hz(hz: u64) -> TscScale {
        // mul = 1e9 * 2^(32 - shift) / hz must lie in [2^31, 2^32).
        let mut shift = 0i8;
        let mul = |shift: i8| (1_000_000_000u128 << (32 - i32::from(shift)) as u32) / u128::from(hz.max(1));
        while mul(shift) >= 1 << 32 {
            shift += 1;
        }
        while mul(shift) < 1 << 31 && shift > -31 {
            shift -= 1;
        }
        TscScale { mul: mul(shift) as u32, shift }
    }

    /// Nanoseconds of `ticks`.
    #[must_use]
    pub fn to_ns(self, ticks: u64) -> u64 {
        let shifted = if self.shift >= 0 {
            u128::from(ticks) << self.shift
        } else {
            u128::from(ticks >> -i32::from(self.shift))
        };
        ((shifted * u128::from(self.mul)) >> 32) as u64
    }
}

/// `struct pvclock_vcpu_time_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PvClock {
    /// Guest TSC at `system_time`.
    pub tsc_timestamp: u64,
    /// Guest time at `tsc_timestamp`.
    pub system_time: Nanos,
    /// Rate.
    pub scale: TscScale,
    /// Readings agree across vCPUs (bit 0).
    pub stable: bool,
    /// The host stopped this guest (bit 1); the guest's watchdogs take note and clear it.
    pub guest_stopped: bool,
}

impl PvClock {
    /// The 32 bytes of the record with version `version` (even = consistent).
    #[must_use]
    pub fn to_bytes(self, version: u32) -> [u8; 32] {
        let mut out = [0u8; 32];
        out[0..4].copy_from_slice(&version.to_le_bytes());
        out[8..16].copy_from_slice(&self.tsc_timestamp.to_le_bytes());
        out[16..24].copy_from_slice(&self.system_time.0.to_le_bytes());
        out[24..28].copy_from_slice(&self.scale.mul.to_le_bytes());
        out[28] = self.scale.shift as u8;
        out[29] = u8::from(self.stable) | (u8::from(self.guest_stopped) << 1);
        out
    }
}

/// `struct pvclock_wall_clock`: wall time at guest time 0 (12 bytes).
#[must_use]
pub fn wall_clock_bytes(version: u32, wall_at_zero: Nanos) -> [u8; 12] {
    let mut out = [0u8; 12];
    out[0..4].copy_from_slice(&version.to_le_bytes());
    out[4..8].copy_from_slice(&((wall_at_zero.0 / 1_000_000_000) as u32).to_le_bytes());
    out[8..12].copy_from_slice(&((wall_at_zero.0 % 1_000_000_000) as u32).to_le_bytes());
    out
}

/// First 17 bytes of `struct kvm_steal_time` (64 bytes, the rest is padding).
#[must_use]
pub fn steal_time_bytes(version: u32, steal: Nanos, preempted: bool) -> [u8; 17] {
    let mut out = [0u8; 17];
    out[0..8].copy_from_slice(&steal.0.to_le_bytes());
    out[8..12].copy_from_slice(&version.to_le_bytes());
    out[16] = u8::from(preempted);
    out
}
