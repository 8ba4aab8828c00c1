//! Ports.

use core::arch::asm;

/// Text for the host.
pub const DEBUG_CONSOLE: u16 = 0xe9;
/// Ends the machine with status `value << 1 | 1`.
pub const DEBUG_EXIT: u16 = 0xf4;

macro_rules! port {
    ($out:ident, $in:ident, $type:ty, $reg:tt) => {
        pub fn $out(port: u16, value: $type) {
            // SAFETY: the guest owns the machine.
            unsafe { asm!(concat!("out dx, ", $reg), in("dx") port, in($reg) value, options(nostack)) };
        }
        pub fn $in(port: u16) -> $type {
            let value;
            // SAFETY: the guest owns the machine.
            unsafe { asm!(concat!("in ", $reg, ", dx"), in("dx") port, out($reg) value, options(nostack)) };
            value
        }
    };
}
port!(out8, in8, u8, "al");
port!(out16, in16, u16, "ax");
port!(out32, in32, u32, "eax");

/// Ends the machine.
pub fn exit(code: u32) -> ! {
    out32(DEBUG_EXIT, code);
    loop {
        // SAFETY: nothing is left to do when there is no debug exit.
        unsafe { asm!("cli", "hlt") };
    }
}

/// A 32-bit device register in memory.
pub fn read32(at: u64) -> u32 {
    // SAFETY: the caller names a mapped register.
    unsafe { (at as *const u32).read_volatile() }
}
pub fn write32(at: u64, value: u32) {
    // SAFETY: as above.
    unsafe { (at as *mut u32).write_volatile(value) }
}
pub fn read64(at: u64) -> u64 {
    // SAFETY: as above.
    unsafe { (at as *const u64).read_volatile() }
}
pub fn write64(at: u64, value: u64) {
    // SAFETY: as above.
    unsafe { (at as *mut u64).write_volatile(value) }
}
