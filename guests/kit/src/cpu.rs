//! Registers, descriptor tables.

use core::arch::asm;

use crate::Global;

/// Selectors of the kit's GDT. SYSCALL and SYSRET (STAR), SYSENTER and SYSEXIT want this order.
pub mod selector {
    pub const CODE: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const USER_CODE32: u16 = 0x1b;
    pub const USER_DATA: u16 = 0x23;
    pub const USER_CODE: u16 = 0x2b;
    pub const CODE32: u16 = 0x30;
    pub const CODE16: u16 = 0x38;
    pub const DATA16: u16 = 0x40;
    pub const TASK: u16 = 0x48;
    /// Data, not present.
    pub const ABSENT_DATA: u16 = 0x58;
    /// 64-bit code, not present.
    pub const ABSENT_CODE: u16 = 0x60;
    /// Two entries for a 64-bit call gate or whatever a test wants.
    pub const GATE: u16 = 0x68;
    /// Entries that are free for tests, as is the next.
    pub const SPARE: u16 = 0x78;
    pub const SPARE2: u16 = 0x80;
    /// First selector beyond the limit.
    pub const BEYOND: u16 = 0x90;
}

/// The GDT; [`crate::boot`] loads it with its limit.
#[unsafe(no_mangle)]
pub static KIT_GDT: Global<[u64; 18]> = Global::new([
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x0000_9b00_0000_ffff,
    0x0000_9300_0000_ffff,
    0,
    0,
    0x00cf_1300_0000_ffff,
    0x00af_1b00_0000_ffff,
    0,
    0,
    0,
    0,
    0,
]);

/// Sets entry `selector` of the GDT.
pub fn set_descriptor(selector: u16, value: u64) {
    // SAFETY: the index is inside, or the guest panics.
    unsafe { (*KIT_GDT.ptr())[usize::from(selector >> 3)] = value };
}

pub fn descriptor(selector: u16) -> u64 {
    // SAFETY: as above.
    unsafe { (*KIT_GDT.ptr())[usize::from(selector >> 3)] }
}

macro_rules! control {
    ($read:ident, $write:ident, $reg:literal) => {
        pub fn $read() -> u64 {
            let value;
            // SAFETY: the guest owns the processor.
            unsafe { asm!(concat!("mov {}, ", $reg), out(reg) value, options(nostack)) };
            value
        }
        pub fn $write(value: u64) {
            // SAFETY: the guest owns the processor.
            unsafe { asm!(concat!("mov ", $reg, ", {}"), in(reg) value, options(nostack)) };
        }
    };
}
control!(cr0, set_cr0, "cr0");
control!(cr2, set_cr2, "cr2");
control!(cr3, set_cr3, "cr3");
control!(cr4, set_cr4, "cr4");
control!(cr8, set_cr8, "cr8");
control!(dr0, set_dr0, "dr0");
control!(dr1, set_dr1, "dr1");
control!(dr2, set_dr2, "dr2");
control!(dr6, set_dr6, "dr6");
control!(dr7, set_dr7, "dr7");

pub fn rdmsr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the guest owns the processor.
    unsafe { asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

pub fn wrmsr(index: u32, value: u64) {
    // SAFETY: the guest owns the processor.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack))
    };
}

pub fn cpuid(leaf: u32, sub: u32) -> [u32; 4] {
    let r = core::arch::x86_64::__cpuid_count(leaf, sub);
    [r.eax, r.ebx, r.ecx, r.edx]
}

pub fn rdtsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: no memory is touched.
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

pub fn flags() -> u64 {
    let value;
    // SAFETY: reads flags by the stack.
    unsafe { asm!("pushfq", "pop {}", out(reg) value) };
    value
}

pub fn invlpg(at: u64) {
    // SAFETY: only drops a translation.
    unsafe { asm!("invlpg [{}]", in(reg) at, options(nostack)) };
}

pub fn sti() {
    // SAFETY: handlers are there.
    unsafe { asm!("sti") };
}

pub fn cli() {
    // SAFETY: always possible at CPL 0.
    unsafe { asm!("cli") };
}

/// Waits for an interrupt with interrupts on, then turns them off.
pub fn sti_hlt_cli() {
    // SAFETY: handlers are there; STI holds interrupts off until HLT.
    unsafe { asm!("sti", "hlt", "cli") };
}

pub mod msr {
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const PAT: u32 = 0x277;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const SFMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
}

/// Whether the processor calls itself Intel's: SYSENTER and SYSCALL differ in compatibility mode.
pub fn intel() -> bool {
    cpuid(0, 0)[1] == 0x756e_6547
}
